"""The model of a dynamic sparse fine-tuning: loading, precision, dropout, quantised weights, and what may become sparse."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from sparseopt import models
from sparseopt.masks.maskset import normalize_name
from sparseopt.optim.dynamic.criteria import Criterion, keep_scores
from sparseopt.optim.dynamic.layers import find_layers
from sparseopt.optim.dynamic.patterns import parse_pattern
from sparseopt.trainers.finetune_settings import FinetuneSettings

__all__ = [
    "Dropout",
    "check_layers",
    "checkpointing",
    "load",
    "load_tokenizer",
    "most_tokens",
    "precision",
    "quantised",
    "task_head",
]

# bitsandbytes' classes, known by name: the package need not be installed.
QUANTISED_LAYERS = {"Linear4bit", "LinearNF4", "LinearFP4", "Linear8bitLt"}
QUANTISED_WEIGHTS = {"Params4bit", "Int8Params"}


def precision(fp16: bool, device: torch.device, given: bool) -> tuple[str, bool, str]:
    """What mixed precision means on a device.

    Args:
        fp16: whether it was asked for.
        device: where training runs.
        given: the model is an object, whose weights keep their dtype.

    Returns:
        (dtype to load weights in, whether to autocast to bf16, a sentence for the log).
    """
    if not fp16:
        return "float32", False, "Precision: fp32."
    if device.type != "cuda":
        return "float32", False, f"Precision: fp32; fp16=True is for GPUs, it is off on {device.type}."
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        return "float32", False, (
            "Precision: fp32; this GPU has no bf16, and under fp16 the scaled loss would distort the gradients that masks grow by."
        )  # fmt: skip
    if given:
        return (
            "float32",
            True,
            "Precision: bf16 where autocast has it, weights as they are (fp16=True means bf16 here).",
        )
    return "bfloat16", False, (
        "Precision: bf16 weights, with a 16-bit residual per trained entry that makes updates fp32 (fp16=True means bf16 here)."
    )  # fmt: skip


def load(settings: FinetuneSettings, dtype: str, device: torch.device, labels: Sequence[str] | None) -> PreTrainedModel:
    """The model on its device; an object stays what it is.

    Raises:
        FileNotFoundError: there is no such model.
        TypeError: neither a name nor a transformers model.
        ValueError: an object that does not classify, or into another number of classes.
    """
    model: Any = settings.model_name
    if isinstance(model, (str, os.PathLike)):
        return models.load_model(os.fspath(model), dtype, device, labels=labels)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model_name must be a name, a folder or a transformers model, got {type(model).__name__}.")
    if labels is not None and getattr(model.config, "num_labels", 0) < len(labels):
        raise ValueError(f"{type(model).__name__} has {model.config.num_labels} classes, the data {len(labels)}.")
    if not quantised(model):
        model.to(device)  # type: ignore[arg-type]
    return model.eval()


def load_tokenizer(settings: FinetuneSettings) -> Any:
    """The tokenizer that was given, or the model's; None where a model object has none."""
    if settings.tokenizer is not None:
        if not isinstance(settings.tokenizer, (str, os.PathLike)):
            return settings.tokenizer
        return models.load_tokenizer(os.fspath(settings.tokenizer))
    if isinstance(settings.model_name, (str, os.PathLike)):
        return models.load_tokenizer(os.fspath(settings.model_name))
    origin = getattr(settings.model_name, "name_or_path", "")
    return models.load_tokenizer(origin) if origin else None


def most_tokens(model: PreTrainedModel, asked: int) -> int:
    """The longest sample that was asked for, and that the model can read."""
    positions = getattr(model.config, "max_position_embeddings", None)
    return asked if not isinstance(positions, int) else min(asked, positions)


# ---- what may become sparse --------------------------------------------------------------------------------------------
def quantised(model: nn.Module) -> set[str]:
    """Names of weights that bitsandbytes quantised to 4 or 8 bits."""
    found = set()
    for path, module in model.named_modules():
        layer = type(module).__name__ in QUANTISED_LAYERS
        for name, param in module.named_parameters(recurse=False):
            marked = type(param).__name__ in QUANTISED_WEIGHTS or getattr(param, "quant_state", None) is not None
            if marked or (layer and name == "weight" and not param.is_floating_point()):
                found.add(normalize_name(f"{path}.{name}" if path else name))
    return found


def task_head(model: PreTrainedModel) -> set[str]:
    """Parameters of a classifier beside its base model: few, new, and needed whole."""
    if not model.base_model_prefix:
        return set()
    prefix = f"{model.base_model_prefix}."
    return {normalize_name(name) for name, _ in model.named_parameters() if not name.startswith(prefix)}


def check_layers(model: PreTrainedModel, settings: FinetuneSettings) -> tuple[list[str], str]:
    """Finds what cannot be made sparse, before anything long begins.

    Returns:
        (parameters to exclude, a sentence for the log or nothing).

    Raises:
        ValueError: quantised weights, no layer is left, an input dimension that M does not divide (all name the layer), or a
            criterion that scores wrongly.
    """
    fixed, said, exclude = quantised(model), "", settings.patterns
    if fixed:
        first = sorted(fixed)[0]
        if settings.target == "weights":
            raise ValueError(
                f"target='weights' cannot prune quantised weights ({len(fixed)} of them, first {first!r}): load the model "
                "without bitsandbytes, or train target='updates' of what is not quantised."
            )
        exclude = [*exclude, *sorted(fixed)]
        if not [layer for layer in find_layers(model, settings.patterns) if layer.name not in fixed]:
            raise ValueError(
                f"all linear weights are quantised ({len(fixed)}, first {first!r}), there is nothing to update: load the "
                "model without bitsandbytes, or keep some layers unquantised."
            )
        said = f"Quantised: {len(fixed)} weights stay as they are; only unquantised ones train."
    if settings.task == "sequence-classification":
        head = task_head(model)
        linear = {layer.name for layer in find_layers(model, exclude)}
        exclude = [*exclude, *sorted(head & linear)]
    layers, pattern = find_layers(model, exclude), parse_pattern(settings.sparsity_type)
    for layer in layers:
        pattern.check(layer)
        if not layer.param.requires_grad:
            raise ValueError(f"{layer.name!r} is frozen (requires_grad=False): exclude it, or let it train.")
    _try(settings.score, min(layers, key=lambda layer: layer.numel), settings.sparsity_ratio)
    return exclude, said


@torch.no_grad()
def _try(criterion: Criterion, layer: Any, sparsity: float) -> None:
    if criterion is not None:
        gradient = torch.zeros(layer.shape, device=layer.param.device)
        keep_scores(criterion, layer, None, gradient, round(sparsity * layer.numel))


class Dropout:
    """Sets the dropout of a model while it trains; as a context, puts the old ones back.

    Raises:
        ValueError: the model has none to set.
    """

    def __init__(self, model: PreTrainedModel, share: float | None) -> None:
        self._old: list[tuple[nn.Module, str, float]] = []
        self._share = share
        if share is None:
            return
        for module in model.modules():
            names = ["p"] if isinstance(module, nn.Dropout) else ["attention_dropout", "dropout"]
            for name in names:
                if isinstance(getattr(module, name, None), (int, float)):
                    self._old.append((module, name, getattr(module, name)))
        if not self._old:
            raise ValueError(f"{type(model).__name__} has no dropout that could be set to {share}.")

    def __enter__(self) -> Dropout:
        for module, name, _ in self._old:
            setattr(module, name, float(self._share or 0.0))
        return self

    def __exit__(self, *_: object) -> None:
        for module, name, value in self._old:
            setattr(module, name, value)


@contextlib.contextmanager
def checkpointing(model: Any) -> Iterator[None]:
    """Afterwards, recomputing of activations is off again where it was."""
    name = "activation" if hasattr(model, "activation_checkpointing_disable") else "gradient"
    before = getattr(model, f"is_{name}_checkpointing")
    try:
        yield
    finally:
        if not before:
            getattr(model, f"{name}_checkpointing_disable")()
