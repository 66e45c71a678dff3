"""Where active entries may lie: anywhere in a layer, or exactly N in every group of M along the input dimension.

A *move* drops some active entries and activates as many others (more or fewer where the density changes). Counts are exact,
ties go to the lower index, and nothing depends on the device.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from sparseopt import functional
from sparseopt.masks import _select
from sparseopt.masks._pieces import TensorPart
from sparseopt.optim.dynamic.layers import Layer

__all__ = ["Pattern", "choose", "parse_pattern"]

LOWEST = -torch.inf
LARGEST = torch.finfo(torch.float32).max


def choose(scores: Tensor, count: int, name: str = "scores") -> Tensor:
    """The ``count`` largest scores: bool of their shape. Ties go to the lower flat index.

    Args:
        scores: fp32, any shape and device.
        count: 0 <= count <= entries.
        name: of the parameter, for errors.

    Raises:
        ValueError: NaN among the scores, or more asked for than there are.
    """
    if not 0 <= count <= scores.numel():
        raise ValueError(f"{count} of the {scores.numel()} entries of {name!r} were to be chosen.")
    if scores.device.type == "cpu":
        source = _select.Source(name, TensorPart(scores), group=1, wide=False)
        cut = _select.choose([source], count, [0])[0]
        packed = torch.zeros((scores.numel() + 7) // 8, dtype=torch.uint8)
        return functional.unpack_mask(_select.pick(source, cut, packed).packed, tuple(scores.shape))
    return _above_cut(scores.reshape(-1), count, name).view(scores.shape)


def _above_cut(scores: Tensor, count: int, name: str) -> Tensor:
    """:func:`choose` for a vector on a GPU: a radix selection finds the lowest chosen score, nothing is sorted."""
    if not scores.numel():
        return torch.zeros_like(scores, dtype=torch.bool)
    # A NaN counts as the largest there, and makes the minimum NaN.
    cut = scores.topk(max(1, count), sorted=False).values.min()
    if bool(cut.isnan()):
        raise ValueError(f"the scores of {name!r} contain NaN.")
    above, tied = scores > cut, scores == cut
    return above | (tied & (tied.cumsum(0, dtype=torch.int64) <= count - above.sum()))


@dataclass(frozen=True)
class Pattern:
    """Unstructured (``n`` and ``m`` are 0), or N:M."""

    n: int = 0
    m: int = 0

    def __str__(self) -> str:
        return f"{self.n}:{self.m}" if self.m else "unstructured"

    @property
    def sparsity(self) -> float | None:
        """Share of inactive entries that the pattern itself means; None where it is free."""
        return 1 - self.n / self.m if self.m else None

    def check(self, layer: Layer) -> None:
        """Raises ValueError where groups of M do not fit the layer's input dimension."""
        if self.m and layer.inputs % self.m:
            raise ValueError(
                f"pattern {self} needs an input dimension divisible by {self.m}; {layer.name!r} has {layer.inputs}: "
                "exclude it or choose another pattern."
            )

    def per_group(self, sparsity: float) -> int:
        """Active entries of each group at a sparsity on the way to the pattern's own: never fewer than N."""
        return max(self.n, math.ceil((1 - sparsity) * self.m - 1e-9))

    def groups(self, layer: Layer, tensor: Tensor) -> Tensor:
        """A tensor of the layer's shape as [groups, M], M neighbours along the input dimension."""
        return (tensor.t() if layer.transposed else tensor).reshape(-1, self.m)

    def layout(self, layer: Layer, grouped: Tensor) -> Tensor:
        """[groups, M] back in the layer's shape."""
        if layer.transposed:
            return grouped.reshape(layer.outputs, layer.inputs).t().contiguous()
        return grouped.reshape(layer.outputs, layer.inputs)

    def select(self, layer: Layer, scores: Tensor, count: int) -> Tensor:
        """The best ``count`` entries (N:M: the best ``count / groups`` of each group), bool of the layer's shape."""
        if not self.m:
            return choose(scores, count, layer.name)
        grouped = self.groups(layer, scores)
        if bool(grouped.isnan().any()):
            raise ValueError(f"the scores of {layer.name!r} contain NaN.")
        return self.layout(layer, _ranks(grouped) < count // len(grouped))

    def swaps(self, layer: Layer, fraction: float, before: int, after: int) -> int:
        """Entries that can and should be exchanged when a layer goes from ``before`` to ``after`` active entries."""
        limit = layer.numel - max(before, after)
        return min(round(fraction * min(before, after)), min(before, after), limit)

    def move(
        self, layer: Layer, mask: Tensor, keep: Tensor, grow: Tensor | None, swaps: int, after: int
    ) -> tuple[Tensor, Tensor]:
        """What leaves and what comes.

        Args:
            layer: the layer.
            mask: bool, active entries.
            keep: fp32, of active entries the lowest leave.
            grow: fp32, of inactive entries the highest come; None where none come.
            swaps: entries to exchange, see :meth:`swaps`.
            after: active entries afterwards.

        Returns:
            (dropped, grown): bool of the layer's shape; grown entries were inactive before.
        """
        before = int(mask.sum())
        fewer, more = max(0, before - after), max(0, after - before)
        keep = keep.clamp(-LARGEST, LARGEST)
        grow = torch.zeros_like(keep) if grow is None else grow.clamp(-LARGEST, LARGEST)
        if not self.m:
            dropped = choose(torch.where(mask, -keep, LOWEST), swaps + fewer, layer.name)
            return dropped, choose(torch.where(mask, LOWEST, grow), swaps + more, layer.name)
        active, keep, grow = (self.groups(layer, tensor) for tensor in (mask, keep, grow))
        count = len(active)
        # Of each group: so many leave because the density falls, and no more are exchanged than find room.
        forced, room = fewer // count, self.m - max(before, after) // count
        if bool((keep.isnan() & active).any()):
            raise ValueError(f"the scores of {layer.name!r} contain NaN.")
        order = _ranks(torch.where(active, -keep, LOWEST))
        dropped = active & (order < forced)
        exchangeable = active & (order >= forced) & (order < forced + room)
        leaving = choose(torch.where(exchangeable, -keep, LOWEST), swaps, layer.name)
        coming = leaving.sum(1, keepdim=True) + more // count
        grown = ~active & (_ranks(torch.where(active, LOWEST, grow)) < coming)
        return self.layout(layer, dropped | leaving), self.layout(layer, grown)


def _ranks(grouped: Tensor) -> Tensor:
    """Position of each entry in its group's descending order, ties by index: int16[groups, M]; no NaN.

    Counts what comes before each entry: M passes, faster than sorting many short rows.
    """
    ranks = torch.zeros_like(grouped, dtype=torch.int16)
    for j in range(grouped.shape[1]):
        one = grouped[:, j : j + 1]
        ranks += grouped < one
        ranks[:, j + 1 :] += grouped[:, j + 1 :] == one
    return ranks


def parse_pattern(text: str) -> Pattern:
    """``"unstructured"`` or ``"N:M"`` with 1 <= N < M.

    Raises:
        ValueError: anything else.
    """
    found = re.fullmatch(r"(\d+):(\d+)", text) if isinstance(text, str) else None
    if text == "unstructured":
        return Pattern()
    if found is None or not 1 <= int(found[1]) < int(found[2]):
        raise ValueError(f"the pattern must be 'unstructured' or 'N:M' with 1 <= N < M (2:4, 4:8), got {text!r}.")
    return Pattern(int(found[1]), int(found[2]))
