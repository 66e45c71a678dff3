"""A small run of projections, alone or as one of several processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sparseopt.projection.pipeline import Data, ModelSource, Projection, ProjectRun

MODEL = ModelSource(model="tiny", random_weights=True, dtype="float32")


def make(source: str, folder: Path | None, **changes: Any) -> ProjectRun:
    data = Data(source, block_size=32, max_samples=changes.pop("max_samples", 20), seed=1)
    projection = Projection(rank_total=changes.pop("rank_total", 16), rank_min=2, dtype=changes.pop("dtype", "float32"))
    return ProjectRun(MODEL, data, torch.device("cpu"), projection, output_dir=folder, batch_size=3, **changes)


def project(rank: int, world: int, source: str, folder: str, changes: dict[str, Any]) -> dict[str, Any]:
    """One process of a launch."""
    return make(source, Path(folder), worker=rank, workers=world, together=True, **changes).execute()
