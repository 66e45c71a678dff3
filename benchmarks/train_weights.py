"""Where :mod:`sparseopt.benchmarks.train_step` gets a model's weights and its tokenizer from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

import sparseopt as so
from sparseopt.benchmarks.train_settings import Settings
from sparseopt.shapes import build_shape

__all__ = ["load_tokenizer", "make_model", "without_dropout"]

ENTRIES = "trained_entries.safetensors"  # what a sparse run keeps in its folder


def make_model(settings: Settings, device: torch.device) -> nn.Module:
    """A fresh model, the same at every call: a shape, a model, or the weights of a checkpoint.

    A checkpoint is a folder with a model in it, or the folder of a run: its ``model``, or its trained entries in the base.

    Raises:
        FileNotFoundError: no such model or folder, or there are no weights in it.
        ValueError: a run's trained entries belong to another model or dtype, or ``seq`` exceeds the model's positions.
    """
    if settings.shape:
        return build_shape(settings.shape, device=device, dtype=getattr(torch, settings.dtype))
    from sparseopt.models import load_model

    assert settings.model is not None
    folder = _model_folder(settings.checkpoint) if settings.checkpoint else None
    model = load_model(str(folder or settings.model), settings.dtype, device)
    if settings.checkpoint and folder is None:
        so.Delta.load(Path(settings.checkpoint) / ENTRIES).apply_(model)
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and settings.seq > positions:
        raise ValueError(f"--seq {settings.seq} is longer than the {positions} positions of {settings.label()}.")
    return model


def _model_folder(checkpoint: str) -> Path | None:
    """Where a whole model is; None: the folder of a sparse run, whose entries go into the base model."""
    folder = Path(checkpoint)
    if not folder.is_dir():
        raise FileNotFoundError(f"Checkpoint folder {checkpoint!r} does not exist.")
    run = (folder / ENTRIES).is_file()
    # The config.json of a run's folder holds settings, not a model's configuration.
    for candidate in [folder / "model"] if run else [folder, folder / "model"]:
        if (candidate / "config.json").is_file() and any(candidate.glob("*.safetensors*")):
            return candidate
    if not run:
        raise FileNotFoundError(
            f"Checkpoint folder {checkpoint!r} holds no weights: expected a model (config.json and .safetensors), or the "
            f"folder of a run with {ENTRIES} or model/ in it."
        )
    return None


def load_tokenizer(settings: Settings) -> Any:
    """The checkpoint's own tokenizer where it has one, else the model's."""
    from sparseopt import models

    assert settings.model is not None
    folder = _model_folder(settings.checkpoint) if settings.checkpoint else None
    own = folder is not None and (folder / "tokenizer_config.json").is_file()
    return models.load_tokenizer(str(folder) if own else settings.model)


def without_dropout(model: nn.Module) -> None:
    """Turns dropout off, as TRL's DPO trainer does: policy and reference must be the same at the start."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]
