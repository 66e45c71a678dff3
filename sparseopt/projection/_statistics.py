"""What ``sparseopt project run`` counts and times: one file of a process, and of several processes one after all."""

from __future__ import annotations

import json
import time
import uuid
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparseopt._files import FormatError, atomic_write

__all__ = ["STATISTICS", "Statistics", "merge", "reported"]

STATISTICS = "projection_stats.json"
SUMS = {"samples": int, "batches": int, "tokens": int, "loss_sum": float, "seconds": float}


def _read(path: Path) -> dict[str, Any] | None:
    """The sums in a file, its id, and the ids of the files that were merged into it last; None: there is no file."""
    if not path.is_file():
        return None
    try:
        kept = json.loads(path.read_text())
        sums = {key: kind(kept[key]) for key, kind in SUMS.items()}
        return {"sums": sums, "id": str(kept.get("id", "")), "merged": [str(i) for i in kept.get("merged", [])]}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"'{path}' is damaged ({error!r}): remove it, the projections are not affected.") from error


class Statistics:
    """Loss, timing and tokens of a run, over all its processes one after another.

    Args:
        path: the file; what it holds is continued.
        device: where the work is done.
        whole: the run's file, if this is one worker's: what was merged into that does not count again.
    """

    def __init__(self, path: Path, device: torch.device, whole: Path | None = None) -> None:
        self.path, self.device = path, device
        self.sums = {"samples": 0, "batches": 0, "tokens": 0, "loss_sum": 0.0, "seconds": 0.0}
        self.id, self.merged = uuid.uuid4().hex, []
        kept = _read(path)
        if kept is not None and whole is not None and whole != path:
            into = _read(whole)
            kept = None if into is not None and kept["id"] in into["merged"] else kept
        if kept is not None:
            self.sums, self.id, self.merged = kept["sums"], kept["id"], kept["merged"]
        self.last = self.rate = 0.0
        self._began, self._tokens = 0.0, 0

    def batch(self, tokens: Tensor, mask: Tensor) -> Statistics:
        self._tokens = int(mask.sum())
        return self

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        if error[0] is None:
            seconds = time.perf_counter() - self._began
            self.sums["seconds"] += seconds
            self.rate = self._tokens / seconds

    def add(self, losses: Tensor, mask: Tensor) -> None:
        """Reading the losses waits for the device: the batch is computed then, and its time is honest."""
        values = losses.tolist()
        self.last = sum(values) / len(values)
        self.sums["samples"] += len(values)
        self.sums["batches"] += 1
        self.sums["tokens"] += int(mask.sum())
        self.sums["loss_sum"] += sum(values)

    def save(self) -> None:
        sums = self.sums
        about = {
            **sums,
            "id": self.id,
            "merged": self.merged,
            "mean_loss": sums["loss_sum"] / max(sums["samples"], 1),
            "tokens_per_second": sums["tokens"] / sums["seconds"] if sums["seconds"] else 0.0,
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else str(self.device),
            "torch": torch.__version__,
        }
        atomic_write(self.path, json.dumps(about, indent=2))


def reported(path: Path) -> dict[str, Any]:
    """What a run tells of its file; nothing where there is none."""
    if not path.is_file():
        return {}
    return {key: value for key, value in json.loads(path.read_text()).items() if key not in ("id", "merged")}


def merge(folder: Path, device: torch.device) -> None:
    """Adds the workers' files to the run's and removes them; none counts twice, whenever this is killed."""
    whole, paths = Statistics(folder / STATISTICS, device), sorted(folder.glob("projection_stats_*.json"))
    parts = [Statistics(path, device) for path in paths]
    for part in parts:
        if part.id not in whole.merged:
            whole.sums = {key: value + part.sums[key] for key, value in whole.sums.items()}
    whole.merged = [part.id for part in parts]
    whole.save()
    for path in paths:
        path.unlink()
