"""Exports a projection store to ``proj_iter_NNNNNN.pt`` files, and reads such files."""

from __future__ import annotations

import json
import pickle
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparseopt._files import FormatError, atomic_path, atomic_write
from sparseopt.progress import track
from sparseopt.projection._store_files import METADATA_FILE, difference

if TYPE_CHECKING:
    from sparseopt.projection.store import ProjectionStore

__all__ = ["export", "exported", "load_tensors", "save_tensors"]

_FILE = re.compile(r"proj_iter_(\d{6,})\.pt")


def export(store: ProjectionStore, folder: Path, batch_size: int, incomplete: str) -> int:
    """See :meth:`ProjectionStore.export_pt`."""
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size must be a positive integer, got {batch_size!r}.")
    if incomplete not in ("error", "skip"):
        raise ValueError(f"incomplete must be 'error' or 'skip', got {incomplete!r}.")
    ids = store.completed
    if not len(ids):
        raise ValueError(f"'{store.path}' holds no finished row: there is nothing to export.")
    batches, counts = torch.unique_consecutive(ids // batch_size, return_counts=True)
    expected = torch.full_like(counts, batch_size)
    expected[-1] = ids[-1] % batch_size + 1  # nothing is known of what comes after the last sample
    whole = batches[counts == expected]
    lacking = int(batches[-1]) + 1 - len(whole)
    if lacking:
        missing = _first_missing(ids)
        text = f"{lacking} of {int(batches[-1]) + 1} batches of {batch_size} lack samples (the first: {missing})"
        if incomplete == "error":
            raise ValueError(f"'{store.path}' cannot be exported: {text}; finish them, or skip these batches.")
        print(f"Export: {text}: left out.", file=sys.stderr, flush=True)
    _prepare(store, folder, {int(batch) + 1 for batch in whole})
    for batch in track(whole.tolist(), "export", unit="file"):
        samples = range(batch * batch_size, min((batch + 1) * batch_size, int(ids[-1]) + 1))
        contents = {"proj": store.rows(samples), "iter": batch + 1, "batch_size": len(samples), "batch_idx": [*samples]}
        save_tensors(contents, folder / f"proj_iter_{batch + 1:06d}.pt")
    return len(whole)


def _first_missing(ids: Tensor) -> int:
    gaps = (ids != torch.arange(len(ids))).nonzero()
    return int(gaps[0]) if len(gaps) else len(ids)


def _prepare(store: ProjectionStore, folder: Path, iterations: set[int]) -> None:
    """Writes the metadata, after a look for files that a reader would take for part of this export."""
    folder.mkdir(parents=True, exist_ok=True)
    target, own = folder / METADATA_FILE, store.path / METADATA_FILE
    for number, path in _files(folder):
        if number not in iterations:
            raise ValueError(f"'{path}' belongs to another export; choose an empty folder.")
    if target.exists() and target.samefile(own):
        return  # the store's own folder: its metadata has every key already
    if target.exists():
        try:
            found = difference(json.loads(target.read_bytes()), store.metadata)
        except ValueError as error:
            raise FormatError(f"'{target}' is damaged: {error}.") from error
        if found:
            raise ValueError(f"'{folder}' holds the metadata of other projections: {found}.")
    atomic_write(target, json.dumps(store.metadata, indent=2, allow_nan=False) + "\n")


def _files(folder: Path) -> list[tuple[int, Path]]:
    found = ((_FILE.fullmatch(path.name), path) for path in folder.glob("proj_iter_*.pt"))
    return sorted((int(match[1]), path) for match, path in found if match)


def exported(folder: Path, columns: int, limit: int | None = None) -> Iterator[tuple[int, list[int], Tensor]]:
    """Yields (iteration, sample ids, rows [n, columns]) of each exported file (of the first ``limit``), in order.

    Files without ``batch_idx`` hold consecutive samples, from 0 on.
    """
    start = 0
    for _, path in _files(folder)[:limit]:
        contents = load_tensors(path)
        rows, ids = contents.get("proj"), contents.get("batch_idx")
        if not isinstance(rows, Tensor) or rows.dim() != 2 or rows.shape[1] != columns or not rows.is_floating_point():
            raise FormatError(f"'{path}' is damaged: expected 'proj', a float tensor [n, {columns}].")
        ids = list(range(start, start + len(rows))) if ids is None else ids
        if not isinstance(ids, list) or len(ids) != len(rows) or not all(isinstance(i, int) and i >= 0 for i in ids):
            raise FormatError(f"'{path}' is damaged: batch_idx must list the {len(rows)} sample ids of its rows.")
        start += len(rows)
        yield int(contents.get("iter", 0)), ids, rows


def save_tensors(contents: dict[str, Any], path: Path) -> None:
    """``torch.save``, whole or not at all; equal contents are equal bytes."""
    # Given a name, torch would write the temporary one into the file.
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        torch.save(contents, file)


def load_tensors(path: Path, *, mmap: bool = False) -> dict[str, Any]:
    """A dict that ``torch.save`` wrote, without running code from the file.

    Raises:
        FormatError: damaged, truncated, or not such a file.
    """
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise
    except (
        pickle.UnpicklingError, RuntimeError, ValueError, EOFError, OSError, KeyError, TypeError, AttributeError,
        IndexError, OverflowError,
    ) as error:  # fmt: skip
        # Whatever torch or pickle stumble over in a damaged or foreign file.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FormatError(f"'{path}' was not written by torch.save, or it is damaged ({reason}).") from error
    if not isinstance(contents, dict):
        raise FormatError(f"'{path}' is not a projection or gradient file: expected a dict.")
    return contents
