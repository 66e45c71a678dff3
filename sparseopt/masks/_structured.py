"""Selection of whole rows or columns, and random masks.

Rows (index of dimension 0) and columns (index of the last dimension) are few enough to be sorted, but differ in size
from tensor to tensor: they are taken greedily in the order of their summed scores, skipping those that no longer fit.
Tensors of three dimensions are matrices one after the other, such as the experts of a mixture, each with rows (index of
dimension 1) and columns of its own: [E, A, B] has E A rows of B entries and E B columns of A. In tensors of fewer than two
dimensions every entry is a row and a column of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sparseopt import functional
from sparseopt.masks._pieces import Part
from sparseopt.masks._select import Picked

__all__ = ["Structure", "pick_structures", "random_mask", "structure_of", "whole_groups"]

Bools = npt.NDArray[np.bool_]
PIECE = 1 << 22  # score elements summed at a time


def structure_of(shape: Sequence[int], grain: str) -> tuple[int, int]:
    """-> (number of rows or columns, entries in each)."""
    n = math.prod(shape)
    if n == 0:
        return 0, 0
    if len(shape) < 2:
        return n, 1
    count = shape[0] if grain == "row" else shape[-1]
    if len(shape) == 3:
        count = n // shape[2 if grain == "row" else 1]
    return count, n // count


class Structure:
    """One tensor's rows or columns with their summed scores (fp64)."""

    def __init__(self, name: str, scores: Part, grain: str) -> None:
        self.name, self.grain = name, grain
        self.shape = scores.shape
        self.count, self.size = structure_of(self.shape, grain)
        sums, has_nan = _sums(scores, grain, self.count)
        self.sums: npt.NDArray[np.float64] = sums.numpy()
        if np.isnan(self.sums).any():
            if has_nan:
                raise ValueError(f"the scores of {name!r} contain NaN.")
            raise ValueError(f"the scores of {name!r} hold infinities of both signs in one {grain}.")

    def expand(self, chosen: Bools) -> Tensor:
        """bool[rows or columns] -> packed mask."""
        return _expand(torch.from_numpy(chosen), self.shape, self.grain)


def _sums(scores: Part, grain: str, count: int) -> tuple[Tensor, bool]:
    """-> (fp64[count] sums of the rows or columns, whether a score is NaN)."""
    total = torch.zeros(count, dtype=torch.float64)
    n = scores.numel()
    if n == 0:
        return total, False
    by_row = grain == "row" or len(scores.shape) < 2
    # The flat view is matrices of height x width; rows are matrices of one row.
    width = n // count if by_row else scores.shape[-1]
    height = 1 if by_row else n // count
    count_rows, step = n // width, max(1, PIECE // width)
    if step > height:  # whole matrices at a time, else pieces of one
        step -= step % height
    read = scores.open()
    has_nan = False
    start = 0
    while start < count_rows:
        stop = min(start + step, count_rows)
        if step < height:
            stop = min(stop, (start // height + 1) * height)
        rows = read(start * width, stop * width).view(-1, min(height, stop - start), width)
        found = rows.sum(2 if by_row else 1, dtype=torch.float64).view(-1).cpu()
        first = start // height * (1 if by_row else width)
        total[first : first + found.numel()] += found
        has_nan = has_nan or (bool(torch.isnan(found).any()) and bool(torch.isnan(rows).any()))
        start = stop
    return total, has_nan


def _expand(chosen: Tensor, shape: Sequence[int], grain: str) -> Tensor:
    if math.prod(shape) == 0 or len(shape) < 2:
        return functional.pack_mask(chosen)
    outer = (1,) * (len(shape) - 2)
    if len(shape) == 3:
        outer, chosen = (), chosen.view(shape[0], -1)
    view = (*chosen.shape, 1, *outer) if grain == "row" else (*chosen.shape[:-1], *outer, 1, chosen.shape[-1])
    return functional.pack_mask(chosen.view(view).expand(tuple(shape)).contiguous())


def whole_groups(packed: Tensor, shape: Sequence[int]) -> tuple[str, Tensor] | None:
    """Whether the mask of a matrix, or of several in three dimensions, is made of whole rows or whole columns.

    Args:
        packed: uint8[ceil(n/8)] on the CPU.
        shape: two sizes, or three.

    Returns:
        ("row" or "column", their indices: sorted int64; matrix by matrix in three dimensions), or None. Full and empty
        masks are rows.
    """
    rows, columns = shape[-2:]
    matrices = math.prod(shape[:-2])
    if matrices * rows * columns == 0:
        return "row", torch.arange(0)
    # Eight columns to a byte where rows begin at bytes: an eighth of the work.
    whole = columns % 8 == 0
    bits = packed if whole else functional.unpack_mask(packed, matrices * rows * columns)
    bits = bits.view(matrices, rows, -1)
    full = 255 if whole else 1
    for part in (bits[:1, :64], bits):  # most masks that are neither show it at once
        first = part[:, :, :1]
        by_row = bool(((first == 0) | (first == full)).all()) and bool((part == first).all())
        by_column = bool((part == part[:, :1]).all())
        if not (by_row or by_column):
            return None
    if by_row:
        return "row", bits[:, :, 0].reshape(-1).nonzero().view(-1)
    lines = bits[:, 0].reshape(-1)
    return "column", (functional.unpack_mask(lines, matrices * columns) if whole else lines).nonzero().view(-1)


def pick_structures(
    structures: Sequence[Structure], budget: int, minimum: Sequence[int], by_mean: bool = False
) -> list[Picked]:
    """The best rows or columns of several tensors: at most ``budget`` entries, and nothing more would fit.

    Ties go to the earlier tensor, then to the lower index. ``minimum`` is in entries, filled first. ``by_mean`` orders by
    score per entry instead of per group.
    """
    chosen = [np.zeros(s.count, dtype=np.bool_) for s in structures]
    least = [min(-(-m // s.size), s.count) if s.size else 0 for m, s in zip(minimum, structures, strict=True)]
    if sum(k * s.size for k, s in zip(least, structures, strict=True)) > budget:
        least = [m // s.size if s.size else 0 for m, s in zip(minimum, structures, strict=True)]
    for structure, mask, k in zip(structures, chosen, least, strict=True):
        mask[np.argsort(-structure.sums, kind="stable")[:k]] = True
        budget -= k * structure.size

    sums = np.concatenate([s.sums for s in structures])
    sizes = np.concatenate([np.full(s.count, s.size, dtype=np.int64) for s in structures])
    flat = np.concatenate(chosen)
    ranked = sums / np.maximum(sizes, 1) if by_mean else sums
    order = np.argsort(-ranked, kind="stable")
    order = order[~flat[order]]
    picked: list[npt.NDArray[np.intp]] = []
    while True:
        order = order[sizes[order] <= budget]
        if not order.size:
            break
        fits = int(np.searchsorted(np.cumsum(sizes[order]), budget, side="right"))
        picked.append(order[:fits])
        budget -= int(sizes[order[:fits]].sum())
        order = order[fits:]
    rest = np.concatenate(picked) if picked else np.empty(0, dtype=np.intp)
    flat[rest] = True
    tied = np.zeros_like(flat)
    if rest.size:
        lowest = ranked[rest].min()
        if (ranked[~flat] == lowest).any():
            tied[rest] = ranked[rest] == lowest

    results = []
    position = 0
    for structure in structures:
        part = slice(position, position + structure.count)
        results.append(_picked(structure, flat[part], tied[part]))
        position += structure.count
    return results


def _picked(structure: Structure, chosen: Bools, tied: Bools) -> Picked:
    taken = structure.sums[chosen]
    with np.errstate(invalid="ignore", over="ignore"):
        kept, total = float(taken.sum()), float(structure.sums.sum())
    return Picked(
        packed=structure.expand(chosen),
        active=int(chosen.sum()) * structure.size,
        zeros=int((taken == 0).sum()) * structure.size,
        ties=int(tied.sum()) * structure.size,
        kept=kept,
        total=total,
        negative=bool((structure.sums < 0).any()),
    )


def random_mask(shape: Sequence[int], budget: int, grain: Any, generator: torch.Generator) -> Tensor:
    """Packed mask of uniformly random entries (exactly ``budget``) or whole groups (at most ``budget`` entries)."""
    n = math.prod(shape)
    if isinstance(grain, str):
        count, size = structure_of(shape, grain)
        chosen = _draw(torch.zeros(count, dtype=torch.bool), budget // size if size else 0, generator)
        return _expand(chosen, shape, grain)
    items = -(-n // grain)
    if grain == 1 and budget > n // 2:
        return functional.pack_mask(~_draw(torch.zeros(n, dtype=torch.bool), n - budget, generator))
    chosen = _draw(torch.zeros(items, dtype=torch.bool), budget // grain, generator)
    if items and bool(chosen[-1]):
        # The last group may be shorter, and leave room for one more.
        room = budget - (int(chosen.sum()) * grain - (-n % grain))
        chosen = _draw(chosen, min(items, int(chosen.sum()) + room // grain), generator)
    if grain == 1:
        return functional.pack_mask(chosen)
    return functional.pack_mask(chosen.view(-1, 1).expand(-1, grain).reshape(-1)[:n].contiguous())


def _draw(chosen: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Sets random entries of a bool vector until ``count`` are set: sampling without replacement, by rejection."""
    if count > chosen.numel() // 2:
        # Rejections pile up when little is left: permute what is left instead.
        free = (~chosen).nonzero().view(-1)
        missing = count - int(chosen.sum())
        chosen[free[torch.randperm(free.numel(), generator=generator)[:missing]]] = True
        return chosen
    bits = chosen.numpy()  # the same memory; numpy sets and counts single bools faster
    while (missing := count - int(np.count_nonzero(bits))) > 0:
        bits[torch.randint(bits.size, (missing,), generator=generator).numpy()] = True
    return chosen
