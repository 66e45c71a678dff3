"""A text that a tiny model can learn, and a fine-tuning of a second on it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch

import sparseopt as so


def text(words: int = 4000) -> str:
    """A chain in which each word leaves three for the next."""
    rng, at = random.Random(0), 0
    chain = []
    for _ in range(words):
        at = (7 * at + rng.choice((1, 2, 3))) % 60
        chain.append(f"w{at}")
    return " ".join(chain)


def options(folder: Path, **changes: Any) -> dict[str, Any]:
    """Arguments of a run of 12 steps, with 4 updates of the masks."""
    return {
        "sparsity_ratio": 0.75, "mask_update_interval": 2, "learning_rate": 1e-2, "batch_size": 4, "max_steps": 12,
        "warmup_steps": 2, "gradient_accumulation_steps": 2, "max_length": 16, "logging_steps": 1, "device": "cpu",
        "output_dir": folder, **changes,
    }  # fmt: skip


def finetune(model: Any, data: Any, folder: Path, **changes: Any) -> Any:
    return so.sparse_finetune(model, data, **options(folder, **changes))


def same_weights(first: Any, second: Any) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())


def records(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "mask_history.json").read_text())


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def first_masks(folder: Path) -> so.MaskSet:
    return so.MaskSet.load(folder / "masks.safetensors")
