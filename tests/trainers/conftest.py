"""Preference pairs in a file and the settings of a short run: with ``tiny_folder``, what a DPO run needs, in milliseconds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Config = dict[str, dict[str, Any]]


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 pairs of plain text; 14 train and 6 are held out: 7 batches of 2 an epoch."""
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = []
    for i in range(20):
        a, b, c = (3 + (7 * i + k) % 50 for k in (1, 5, 11))
        rows.append({"prompt": f"w{a} w{b}", "chosen": f" w{b} w{a}", "rejected": f" w{c} w{c}"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def settings(tiny_folder: Path, pairs_file: Path) -> Callable[..., list[str]]:
    """``section.key=value`` of a run of 10 steps (more than an epoch) in a folder; keyword arguments change some."""

    def build(folder: Path, changes: dict[str, Any] | None = None) -> list[str]:
        values: dict[str, Any] = {
            "model.name": tiny_folder, "data.name": pairs_file, "data.n_train": 14, "data.n_eval": 6,
            "mask.method": "gradient", "mask.batches": 3, "mask.exclude": "[]",
            "optimizer.learning_rate": 0.01, "optimizer.weight_decay": 0.1,
            "training.n_steps": 10, "training.batch_size": 2, "training.max_length": 32, "training.device": "cpu",
            "evaluation.n_generate": 3, "evaluation.max_new_tokens": 4, "output.dir": folder, **(changes or {}),
        }  # fmt: skip
        return [f"{key}={'null' if value is None else value}" for key, value in values.items()]

    return build


@pytest.fixture(scope="session")
def configure(settings: Callable[..., list[str]]) -> Callable[..., Config]:
    """The configuration of such a run."""

    def build(folder: Path, changes: dict[str, Any] | None = None) -> Config:
        from sparseopt import config, schemas

        return config.load(schemas.DPO, None, settings(folder, changes))

    return build
