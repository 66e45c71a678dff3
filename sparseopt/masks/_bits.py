"""Pieces of packed masks: bool tensors of some entries, and weighted votes over several masks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

from sparseopt import functional
from sparseopt.masks._pieces import Scores
from sparseopt.masks.maskset import MaskSet

__all__ = ["Votes", "exact_weights", "unpack_range"]

LEVELS = 1 << 22  # distinct sums of weights that can be told apart as fp32 ranks, with room to spare
FP32_INTEGERS = 1 << 24  # fp32 holds every integer up to here
LARGEST_TOTAL = 1 << 62


def unpack_range(packed: Tensor, start: int, stop: int) -> Tensor:
    """bool[stop - start]: entries ``start <= i < stop`` of a packed mask."""
    first = start // 8
    piece = packed[first : (stop + 7) // 8]
    return functional.unpack_mask(piece, piece.numel() * 8)[start - 8 * first : stop - 8 * first]


def exact_weights(weights: Sequence[float]) -> tuple[list[int], int]:
    """Weights as whole numbers: 0.1 and 0.2 become 1 and 2 of 10, so that 0.1 + 0.2 reaches 0.3.

    Returns:
        The numbers, and what 1 is in them.

    Raises:
        ValueError: a weight is negative or not finite, all are 0, or they have too many digits together.
    """
    for weight in weights:
        if not math.isfinite(weight) or weight < 0:
            raise ValueError(f"weights must be finite and not negative, got {weight}.")
    exact = [Fraction(repr(float(weight))) for weight in weights]
    one = math.lcm(*(number.denominator for number in exact))
    numbers = [int(number * one) for number in exact]
    if not any(numbers):
        raise ValueError(f"at least one weight must be above 0, got {list(weights)}.")
    if max(one, sum(numbers)) >= LARGEST_TOTAL:
        raise ValueError(
            f"weights must have fewer than 18 digits from the largest to the smallest, got {list(weights)}."
        )
    return numbers, one


class Votes(Scores):
    """Sums of whole weights, by entry, of the masks in which the entry is active; computed piece by piece."""

    def __init__(self, masks: Sequence[MaskSet], weights: Sequence[int]) -> None:
        super().__init__(masks[0].shapes)
        self._masks, self._weights = list(masks), list(weights)
        total = sum(weights)
        self._dtype = next(d for d in (torch.int16, torch.int32, torch.int64) if total <= torch.iinfo(d).max)
        self._levels: Tensor | None = None

    def sums(self, name: str, start: int, stop: int) -> Tensor:
        """int16, int32 or int64 [stop - start]."""
        total = torch.zeros(stop - start, dtype=self._dtype)
        for masks, weight in zip(self._masks, self._weights, strict=True):
            if weight:
                total.add_(unpack_range(masks.packed(name), start, stop), alpha=weight)
        return total

    def reaching(self, name: str, least: int, block: int) -> Tensor:
        """uint8[ceil(n/8)]: entries whose sum is at least ``least`` (above 0), counted ``block`` (8 k) at a time."""
        n = math.prod(self.shapes[name])
        packed = torch.zeros((n + 7) // 8, dtype=torch.uint8)
        for start in range(0, n, block):
            stop = min(start + block, n)
            packed[start // 8 : (stop + 7) // 8] = functional.pack_mask(self.sums(name, start, stop) >= least)
        return packed

    def piece(self, name: str, start: int, stop: int) -> Tensor:
        """fp32[stop - start] in the order of the sums, 0 for 0: the sums, or their ranks where fp32 cannot hold them."""
        sums = self.sums(name, start, stop)
        if sum(self._weights) <= FP32_INTEGERS:
            return sums.float()
        if self._levels is None:
            self._levels = self._find_levels()
        return torch.searchsorted(self._levels, sums.to(torch.int64)).float()

    def _find_levels(self) -> Tensor:
        levels = torch.zeros(1, dtype=torch.int64)
        for weight in self._weights:
            levels = torch.cat([levels, levels + weight]).unique()
            if levels.numel() > LEVELS:
                raise ValueError("these weights have too many different sums: give them fewer digits.")
        return levels
