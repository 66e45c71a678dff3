"""Exact top-k over many tensors of scores, streaming: nothing is concatenated, and nothing of full size is sorted.

Scores become integers of the same order: for a float's bits b read as a signed integer, b >= 0 stays and b < 0 becomes
b ^ 0x7f..f (-0.0 is made +0.0 first, so that the two tie). The k-th largest key is found 16 bits at a time: one pass
counts the leading 16 bits of all keys, the next the following 16 bits of the keys that share the winning prefix, and so
on: two passes for fp32 and narrower scores, four for fp64 scores and for sums over groups (which are fp64); one more
pass counts the ties.

Minimums per tensor cost nothing extra: a tensor's selection is always a prefix of its own order, of length
max(minimum, entries at or above the threshold), and the sum of those over the tensors falls as the threshold rises.

numpy works on pieces that stay in the second-level cache; that beats multi-threaded passes over whole tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sparseopt.masks._pieces import Part

__all__ = ["CACHED_GROUPS", "Cut", "Picked", "Source", "choose", "pick", "shares", "top"]

Keys = npt.NDArray[Any]  # int32 or int64

PIECE = 1 << 18  # score elements worked on at a time: a multiple of 8 and of every group
DIGIT = 16
CACHED_GROUPS = 1 << 25  # keys of groups are kept (8 bytes each) when there are no more than this


class Source:
    """One tensor's scores as ordered integer keys: of its entries, or of its aligned groups (their sums)."""

    def __init__(self, name: str, scores: Part, group: int, wide: bool, cache: bool = False) -> None:
        self.name = name
        self.group = group
        self.entries = scores.numel()
        self.items = -(-self.entries // group)
        self.ragged = -self.entries % group  # how many entries the last group lacks
        self.wide = wide
        self._scores = scores
        self._cache: list[Keys] | None = [] if cache else None
        self._cached = False
        self.checked = False

    def pieces(self) -> Iterator[Keys]:
        """Pieces of keys in order; the first time, scores are checked for NaN."""
        if self._cached and self._cache is not None:
            yield from self._cache
            return
        read = self._scores.open()
        for start in range(0, self.entries, PIECE):
            keys = _to_keys(self._values(read(start, min(start + PIECE, self.entries))))
            if self._cache is not None:
                self._cache.append(keys)
            yield keys
        self._cached = self._cache is not None
        self.checked = True

    def _values(self, piece: Tensor) -> npt.NDArray[Any]:
        values = _to_numpy(piece).astype(np.float64 if self.wide else np.float32, copy=False)
        if not self.checked and np.isnan(values.max()):
            raise ValueError(f"the scores of {self.name!r} contain NaN.")
        if self.group == 1:
            return values
        whole = values.size // self.group
        columns = values[: whole * self.group].reshape(whole, self.group)
        sums: npt.NDArray[Any] = columns[:, 0].copy()
        with np.errstate(invalid="ignore"):
            for column in range(1, self.group):
                sums += columns[:, column]
            if whole * self.group < values.size:
                sums = np.append(sums, values[whole * self.group :].sum())
        if not self.checked and np.isnan(sums.max()):
            raise ValueError(f"the scores of {self.name!r} hold infinities of both signs in one group.")
        return sums


def _to_numpy(piece: Tensor) -> npt.NDArray[Any]:
    piece = piece.cpu()
    if piece.dtype == torch.bfloat16:  # unknown to numpy: the upper half of an fp32
        return (piece.view(torch.int16).numpy().astype(np.uint32) << 16).view(np.float32)
    return piece.numpy()


def _to_keys(values: npt.NDArray[Any]) -> Keys:
    bits = (values + values.dtype.type(0)).view(np.int32 if values.dtype == np.float32 else np.int64)
    flip = bits >> (8 * bits.itemsize - 1)
    flip &= np.iinfo(bits.dtype).max
    bits ^= flip
    return bits


def to_values(keys: Keys) -> npt.NDArray[Any]:
    """The scores that ``keys`` stand for."""
    flip = keys >> (8 * keys.itemsize - 1)
    flip &= np.iinfo(keys.dtype).max
    flip ^= keys
    return flip.view(np.float32 if keys.dtype == np.int32 else np.float64)


@dataclass
class Cut:
    """What one tensor contributes: every key above ``key``, and the first ``ties`` of those equal to it."""

    key: int
    ties: int
    tied: bool = False  # whether equal keys were left out, here or in another tensor of the same choice


def choose(sources: Sequence[Source], count: int, minimum: Sequence[int]) -> list[Cut]:
    """Cuts that select exactly ``count`` items: each tensor's ``minimum`` first, then the best of the rest.

    Ties go to the earlier source, then to the lower index. Needs sum(minimum) <= count <= sum of the items.
    """
    bits = 64 if sources[0].wide else 32
    highest = (1 << (bits - 1)) - 1
    if not count:
        for source in sources:  # still has to refuse NaN
            for _ in source.pieces():
                pass
        return [Cut(highest, 0) for _ in sources]
    prefix = 0
    for shift in range(bits - DIGIT, -1, -DIGIT):
        first = shift == bits - DIGIT
        selected = np.zeros(1 << DIGIT, dtype=np.int64)  # items selected with the threshold at each digit
        for source, least in zip(sources, minimum, strict=True):
            higher, digits = _count_digits(source, shift, prefix, first)
            suffix = np.cumsum(digits[::-1])[::-1] + higher
            selected += np.maximum(suffix, least)
        digit = int(np.flatnonzero(selected >= count)[-1])
        prefix = (prefix << DIGIT) + digit - ((1 << (DIGIT - 1)) if first else 0)
    return _share_ties(sources, count, minimum, prefix)


def _count_digits(source: Source, shift: int, prefix: int, first: bool) -> tuple[int, npt.NDArray[np.int64]]:
    """-> (keys above the prefix, counts by the 16 bits at ``shift`` of the keys that share it)."""
    higher = 0
    digits = np.zeros(1 << DIGIT, dtype=np.int64)
    for keys in source.pieces():
        lead = keys >> shift
        if first:
            lead += 1 << (DIGIT - 1)
        else:
            leading = lead >> DIGIT
            higher += int(np.count_nonzero(leading > prefix))
            lead = lead[leading == prefix]
            if not lead.size:
                continue
            lead &= (1 << DIGIT) - 1
        digits += np.bincount(lead, minlength=1 << DIGIT)
    return higher, digits


def _share_ties(sources: Sequence[Source], count: int, minimum: Sequence[int], key: int) -> list[Cut]:
    above, equal = [0] * len(sources), [0] * len(sources)
    for position, source in enumerate(sources):
        for keys in source.pieces():
            above[position] += int(np.count_nonzero(keys > key))
            equal[position] += int(np.count_nonzero(keys == key))
    least = [max(a, m) for a, m in zip(above, minimum, strict=True)]
    missing = count - sum(least)
    cuts: list[Cut] = []
    cut_short = []
    for source, floor, more, same in zip(sources, least, above, equal, strict=True):
        if floor > more + same:  # the minimum reaches below the common threshold: a threshold of its own
            cuts.append(choose([source], floor, [0])[0])
            continue
        taken = min(missing, more + same - floor)
        missing -= taken
        cuts.append(Cut(key, floor + taken - more))
        cut_short.append(floor + taken < more + same)
    if any(cut_short):
        for cut in cuts:
            cut.tied |= cut.key == key
    return cuts


def top(sources: Sequence[Source], budget: int, minimum: Sequence[int]) -> list[Cut]:
    """Cuts for whole groups: at most ``budget`` entries, less than one group under it. ``minimum`` is in entries."""
    group = sources[0].group
    available = sum(source.items for source in sources)
    count = min(budget // group, available)
    least = [min(-(-m // group), s.items) for m, s in zip(minimum, sources, strict=True)]
    if sum(least) > count:
        least = [m // group for m in minimum]
    while True:
        cuts = choose(sources, count, least)
        # A last group that is shorter leaves room; at most one of them per tensor, so this ends after a step or two.
        short = sum(s.ragged for s, cut in zip(sources, cuts, strict=True) if s.ragged and _last_taken(s, cut))
        room = budget - (count * group - short)
        if room < group or count == available:
            return cuts
        count = min(count + room // group, available)


def _last_taken(source: Source, cut: Cut) -> bool:
    """Whether the last group is selected: it is the last of its ties too."""
    last, same = 0, 0
    for keys in source.pieces():
        last = int(keys[-1])
        same += int(np.count_nonzero(keys == cut.key))
    return last > cut.key or (last == cut.key and cut.ties == same)


@dataclass
class Picked:
    """One tensor's mask, and what the selection looked like (counts in entries)."""

    packed: Tensor  # uint8[ceil(n/8)]
    active: int = 0
    zeros: int = 0
    ties: int = 0
    kept: float = 0.0
    total: float = 0.0
    negative: bool = False


def pick(source: Source, cut: Cut, packed: Tensor) -> Picked:
    """Writes the packed mask of one tensor into ``packed``, uint8[ceil(n/8)]."""
    group = source.group
    out = packed.numpy()
    result = Picked(packed)
    ties, position, items = cut.ties, 0, 0
    for keys in source.pieces():
        chosen = keys > cut.key
        if ties:
            same = np.flatnonzero(keys == cut.key)[:ties]
            chosen[same] = True
            ties -= same.size
        values = to_values(keys)
        picked = values[chosen]
        items += picked.size
        result.zeros += int(np.count_nonzero(picked == 0)) * group
        with np.errstate(invalid="ignore", over="ignore"):
            result.kept += float(picked.sum(dtype=np.float64))
            result.total += float(values.sum(dtype=np.float64))
        result.negative |= bool(values.min() < 0)
        if group == 1:
            part = np.packbits(chosen, bitorder="little")
        else:
            part = np.repeat(np.where(chosen, np.uint8(255), np.uint8(0)), group // 8)[: out.size - position]
        out[position : position + part.size] = part
        position += part.size
    result.active = items * group
    result.ties = cut.ties * group if cut.tied else 0
    if source.ragged and out.size:
        if out[-1] & 1:
            result.active -= source.ragged
        if source.entries % 8:
            out[-1] &= (1 << source.entries % 8) - 1
    return result


def shares(parts: Sequence[Picked]) -> dict[str, float]:
    """Zero-score and tie shares of the picked entries, and the share of the total score that they hold."""
    active = sum(part.active for part in parts)
    total = math.fsum(part.total for part in parts) if all(math.isfinite(part.total) for part in parts) else math.inf
    result = {
        "zero_score_share": min(1.0, sum(part.zeros for part in parts) / active) if active else 0.0,
        "tie_share": min(1.0, sum(part.ties for part in parts) / active) if active else 0.0,
    }
    if 0 < total < math.inf and not any(part.negative for part in parts):
        result["kept_score"] = math.fsum(part.kept for part in parts) / total
    return result
