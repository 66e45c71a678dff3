"""How many active entries each layer has: exact in total, at least one in every layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from sparseopt.masks import _select
from sparseopt.masks._pieces import Reader
from sparseopt.optim.dynamic.layers import Layer

__all__ = ["DISTRIBUTIONS", "distribute", "global_counts", "proportional_counts"]

DISTRIBUTIONS = ("uniform", "erk", "global")


def distribute(
    layers: Sequence[Layer], sparsity: float, how: str, scores: Callable[[int], Tensor] | None = None
) -> list[int]:
    """Active entries of each layer.

    Args:
        layers: the layers.
        sparsity: share of all their entries that is inactive, in [0, 1).
        how: ``"uniform"``: the same density everywhere; ``"erk"``: density in proportion to (inputs + outputs) /
            (inputs * outputs), at most 1 (Evci et al. 2020); ``"global"``: the best scores wherever they are.
        scores: for ``"global"``: position of a layer -> fp32 of its shape.

    Returns:
        Counts whose sum is ``round((1 - sparsity) * entries)``, raised to one a layer.
    """
    if how not in DISTRIBUTIONS:
        raise ValueError(f"the distribution must be one of {', '.join(DISTRIBUTIONS)}, got {how!r}.")
    sizes = [layer.numel for layer in layers]
    total = max(len(layers), round((1 - sparsity) * sum(sizes)))
    if how == "uniform":
        return proportional_counts(sizes, total, [float(size) for size in sizes])
    if how == "erk":
        return proportional_counts(sizes, total, [float(layer.inputs + layer.outputs) for layer in layers])
    if scores is None:
        raise ValueError("the distribution 'global' needs scores.")
    return global_counts(layers, total, scores)


def proportional_counts(sizes: Sequence[int], total: int, shares: Sequence[float]) -> list[int]:
    """``total`` entries over tensors in proportion to ``shares``, at least 1 and at most all of each.

    What a full tensor cannot take goes to the others; remainders go to the largest fractions, the earlier first.
    """
    wanted = [0.0] * len(sizes)
    free = list(range(len(sizes)))
    rest = total
    while free:
        scale = rest / math.fsum(shares[i] for i in free)
        full = [i for i in free if shares[i] * scale >= sizes[i]]
        for i in full or free:
            wanted[i] = sizes[i] if full else shares[i] * scale
        if not full:
            break
        rest -= sum(sizes[i] for i in full)
        free = [i for i in free if i not in set(full)]
    counts = [min(size, max(1, math.floor(want))) for size, want in zip(sizes, wanted, strict=True)]
    order = sorted(range(len(sizes)), key=lambda i: (-(wanted[i] - math.floor(wanted[i])), i))
    while (missing := total - sum(counts)) > 0:
        for i in [i for i in order if counts[i] < sizes[i]][:missing]:
            counts[i] += 1
    while (excess := sum(counts) - total) > 0:  # layers were raised to one entry
        for i in sorted(range(len(sizes)), key=lambda i: (-counts[i], i))[:excess]:
            counts[i] -= counts[i] > 1
    return counts


class _Computed:
    """Scores of a layer that are computed anew for every pass over them."""

    def __init__(self, layer: Layer, compute: Callable[[], Tensor]) -> None:
        self._compute, self._numel = compute, layer.numel
        self.shape = layer.shape
        self.dtype = layer.param.dtype

    def numel(self) -> int:
        return self._numel

    def open(self) -> Reader:
        flat = self._compute().reshape(-1).float().cpu()
        return lambda start, stop: flat[start:stop]


def global_counts(layers: Sequence[Layer], total: int, scores: Callable[[int], Tensor]) -> list[int]:
    """How many of the ``total`` best scores lie in each layer, at least one each."""
    sources = [
        _select.Source(layer.name, _Computed(layer, lambda i=i: scores(i)), group=1, wide=False)  # type: ignore[misc]
        for i, layer in enumerate(layers)
    ]
    cuts = _select.choose(sources, total, [1] * len(layers))
    counts = []
    for source, cut in zip(sources, cuts, strict=True):
        above = sum(int((keys > cut.key).sum()) for keys in source.pieces())
        counts.append(above + cut.ties)
    return counts
