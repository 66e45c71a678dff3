"""How well projections of each rank keep the dot products of gradients.

For reference samples i (the first ones) and all other samples j, a rank's <p_i, p_j> is compared with a reference value:

    rank=NNN               the projections of that rank
    full                   exact gradients of all trainable parameters (``project full-grads``)
    full_layers            exact gradients of the projected layers
    naive_proj_layers=NNN  exact gradients of the projected layers times matrices rebuilt from metadata and seed

    rmse = mean over i of sqrt(mean over j of (<p_i, p_j> - ref_ij)^2),    relative error = rmse / sqrt(mean of ref_ij^2)
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sparseopt._files import atomic_write
from sparseopt.progress import track
from sparseopt.projection import _error_data as data
from sparseopt.projection._error_data import Folder

__all__ = ["analyse", "results_folder_name"]


def results_folder_name(metadata: Mapping[str, Any]) -> str:
    """The folder's name by its settings, as the analysis expects it: ``proj_layers_mlp,attn_rank_total_256_...``."""
    layers = re.sub(r"[\s/]+", "", metadata["proj_layers"])
    return (
        f"proj_layers_{layers}_rank_total_{metadata['proj_rank_total']}_rank_min_{metadata['proj_rank_min']}"
        f"_seed_{metadata['proj_seed']}_dtype_{metadata['proj_dtype']}"
        f"_row_on_{metadata['proj_row_orthonormal']}_emb_{metadata['include_embeddings']}"
    )


def analyse(
    results_dir: str | os.PathLike[str],
    pattern: str,
    *,
    pattern_type: Literal["regex", "glob"] = "regex",
    num_ref: int = 50,
    max_iters: int = 100,
    reference: str = "rank=1024",
    plots_dir: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Compares all ranks, draws three pictures (PDF) and writes the numbers (JSON).

    Args:
        results_dir: folder of the folders with projections (stores, or exported ``.pt`` files) and of ``fullgrads*``.
        pattern: of the names of folders that differ in ``rank_total_K`` only.
        pattern_type: ``regex`` (found anywhere in the name) or ``glob`` (the whole name).
        num_ref: reference samples; where there are fewer samples, all.
        max_iters: files (of a store: batches) used of each folder.
        reference: see the module.
        plots_dir: where the files go, default ``Plots`` beside ``results_dir``.

    Returns:
        What the JSON has: ``ranks``, ``rmse_values``, ``relative_errors_percent`` (one for each rank), ``rmse_std`` (over
        reference samples), ``dimensions`` (entries of a row), ``reference``, ``reference_rms``, ``num_ref_samples``,
        ``num_test_samples`` (others, for each), ``loglog_slope`` (of the rmse over the rank, least squares; None with
        fewer than two ranks), ``results_pattern``, ``max_iters``, ``folders``, ``files``.

    Raises:
        ValueError: folders that differ in more than the rank, an unknown reference, fewer than two common samples.
        FileNotFoundError: no such folder, or no exact gradients.
        FormatError: a folder or file that is damaged.
        ModuleNotFoundError: matplotlib is missing.
    """
    for name, value in (("num_ref", num_ref), ("max_iters", max_iters)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}.")
    import matplotlib  # noqa: F401 - missing: say so before the work

    base = Path(results_dir)
    mode, rank = _parse(reference)
    folders = data.find_folders(base, pattern, pattern_type)
    against = _Reference(base, folders, mode, rank, max_iters)
    compared = {k: f for k, f in folders.items() if not (mode == "rank" and k == rank)}
    if not compared:
        raise ValueError(f"only the reference of rank {rank} matches {pattern!r}: there is nothing to compare.")
    ids = _common(compared, against, max_iters)
    count = min(num_ref, len(ids))
    exact = against.products(ids, count)
    others = ~torch.eye(len(ids), dtype=torch.bool)[:count]
    rms = math.sqrt(float(exact[others].square().mean()))
    if rms == 0:
        raise ValueError(f"all dot products of the reference {reference} are zero: there is no relative error.")
    errors = []
    for folder in track(list(compared.values()), "ranks", unit="rank"):
        wrong = (folder.products(ids, count, max_iters) - exact)[others].view(count, len(ids) - 1)
        errors.append(wrong.square().mean(1).sqrt())
    target = Path(plots_dir) if plots_dir is not None else base.absolute().parent / "Plots"
    stem = f"{next(iter(folders.values())).template}__ref_{reference.replace('=', '_')}"
    result = _summary(list(compared), errors, rms)
    result |= {
        "dimensions": [folder.columns for folder in compared.values()],
        "reference": reference,
        "num_ref_samples": count,
        "num_test_samples": len(ids) - 1,
        "results_pattern": pattern,
        "max_iters": max_iters,
        "folders": [folder.path.name for folder in compared.values()],
    }
    return _write(target, stem, result)


def _parse(reference: str) -> tuple[str, int | None]:
    match = re.fullmatch(r"(rank|naive_proj_layers)=(\d+)|(full|full_layers)", reference)
    if match is None or (match[2] is not None and int(match[2]) < 1):
        raise ValueError(
            f"reference must be rank=NNN, full, full_layers or naive_proj_layers=NNN with a positive NNN, got {reference!r}."
        )
    return (match[1], int(match[2])) if match[1] else (match[3], None)


class _Reference:
    """Where the values come from that the ranks are compared with."""

    def __init__(self, base: Path, folders: dict[int, Folder], mode: str, rank: int | None, max_iters: int) -> None:
        self._mode, self._max_iters = mode, max_iters
        self._first = next(iter(folders.values()))
        self._folder = None if rank is None else folders.get(rank) or self._beside(base, rank)
        if mode == "rank" and self._folder is None:
            ranks = ", ".join(map(str, folders))
            raise ValueError(f"there are no projections of the reference rank {rank}; the ranks are {ranks}.")
        self._gradients = None if mode == "rank" else data.find_full_gradients(base)
        if self._gradients is not None:
            data.check_same_samples(self._first, self._gradients)
        self._metadata = self._first.metadata
        if mode == "naive_proj_layers" and rank is not None:
            self._metadata = self._folder.metadata if self._folder else data.at_rank(self._first, rank)

    def _beside(self, base: Path, rank: int) -> Folder | None:
        """A folder of that rank which the pattern left out."""
        path = base / data.RANK.sub(f"rank_total_{rank}", self._first.path.name)
        if not path.is_dir():
            return None
        folder = data.open_folder(path)
        data.check_alike(self._first, folder)
        return folder

    def ids(self) -> set[int]:
        if self._gradients is not None:
            return set(self._gradients.ids)
        assert self._folder is not None
        return set(self._folder.ids(self._max_iters))

    def products(self, ids: list[int], count: int) -> Tensor:
        if self._gradients is None:
            assert self._folder is not None
            return self._folder.products(ids, count, self._max_iters)
        if self._mode == "naive_proj_layers":
            rows = data.naive_rows(self._gradients, ids, self._metadata).double()
            return rows[:count] @ rows.T
        whole = [(0, self._gradients.metadata["total_param_dim"])]
        slices = whole if self._mode == "full" else data.layer_slices(self._gradients, self._metadata)
        return data.products(self._gradients, ids, count, slices)


def _common(folders: dict[int, Folder], against: _Reference, max_iters: int) -> list[int]:
    found = [set(folder.ids(max_iters)) for folder in folders.values()]
    known = against.ids()
    common = sorted(set.intersection(known, *found))
    if len(common) < 2:
        raise ValueError(
            f"the folders and the reference have {len(common)} samples in common, of {len(known)} in the reference: "
            "two are needed, which have the same ids everywhere."
        )
    most = max(len(ids) for ids in found)
    if len(common) < most:
        print(
            f"Samples: {len(common)} that every folder and the reference have, of {most}.", file=sys.stderr, flush=True
        )
    return common


def _summary(ranks: list[int], errors: list[Tensor], rms: float) -> dict[str, Any]:
    means = [float(error.mean()) for error in errors]
    slope = None
    if len(ranks) > 1 and min(means) > 0:
        x, y = torch.tensor(ranks).double().log(), torch.tensor(means).double().log()
        x, y = x - x.mean(), y - y.mean()
        slope = float((x * y).sum() / (x * x).sum())
    return {
        "ranks": ranks,
        "rmse_values": means,
        "rmse_std": [float(error.std(correction=0)) for error in errors],
        "relative_errors_percent": [100 * mean / rms for mean in means],
        "reference_rms": rms,
        "loglog_slope": slope,
    }


def _write(target: Path, stem: str, result: dict[str, Any]) -> dict[str, Any]:
    from sparseopt.projection._error_plots import draw

    numbers = target / f"{stem}__error_vs_dimension_results.json"
    result["files"] = [*draw(result, target, stem), str(numbers)]
    atomic_write(numbers, json.dumps(result, indent=2, allow_nan=False) + "\n")
    return result
