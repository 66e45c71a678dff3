"""A collector that is due at every step of a short run, and what it left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import sparseopt as so
from sparseopt.trainers import MaskCollector

METRICS = {"grad_ema/rms_mean", "grad_mask/active_fraction", "grad_mask/active_count", "grad_mask/total_count",
           "grad_mask/sparsity", "grad_mask/step"}  # fmt: skip
TOLERANCE = 1e-7


def collector(folder: Path, **options: Any) -> MaskCollector:
    return MaskCollector(folder, **{"save_interval": 100, "tolerance": TOLERANCE, **options})


def ema_of(one: MaskCollector) -> so.GradientEMA:
    assert one.ema is not None
    return one.ema


def names(folder: Path) -> set[str]:
    return {path.name for path in (folder / "grad_acc").iterdir()}
