"""A language-model run of a second: GPT-2 of two layers on bytes of a small text."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch

from sparseopt import config, schemas
from sparseopt.trainers import lm

NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def write_text(path: Path, words: int = 1400) -> Path:
    """About six characters a word."""
    rng = random.Random(0)
    path.write_text("".join(f"word{rng.randrange(10, 60)}{' ' if i % 12 else chr(10)}" for i in range(words)))
    return path


def settings_of(folder: Path, **changes: Any) -> list[str]:
    """``key=value`` of a run of 9 steps of 16 sequences, 4 micro-batches each; ``section__key`` changes some."""
    text = folder / "text.txt"
    values: dict[str, Any] = {
        "model.context_length": 32, "model.tokenizer": "bytes", "model.config": "{n_layer: 2, n_head: 2, n_embd: 16}",
        "data.dataset_path": text if text.is_file() else write_text(text), "data.dataset_size": "5K",
        "training.batch_size": 8, "training.max_gpu_batch_size": 4, "training.gradient_accumulation_steps": 2,
        "training.save_steps": 3, "training.eval_steps": 4, "training.device": "cpu", "run.name": "test",
    }  # fmt: skip
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    return [f"{key}={'null' if value is None else value}" for key, value in values.items()]


def run(folder: Path, *, base_dir: Path | None = None, resume: str | None = None, **changes: Any) -> Path:
    """Trains; returns the run's folder."""
    base_dir = base_dir or folder / "saved_models"
    source = None if resume is None else lm.RunManager(base_dir).get_run_config(resume)
    overrides = settings_of(folder, **changes) if resume is None else []
    return lm.train(*config.load_open(schemas.LM, source, overrides), base_dir, resume=resume)


def gradients(checkpoint: Path) -> dict[str, torch.Tensor]:
    """As the seed's snippets load them."""
    loaded: dict[str, torch.Tensor] = torch.load(checkpoint / "gradients.pt")
    return loaded
