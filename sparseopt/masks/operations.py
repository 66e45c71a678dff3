"""Merging and comparing mask sets, on packed bits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparseopt import functional
from sparseopt.masks.maskset import MaskSet

__all__ = ["compare", "merge"]

HOW = ("union", "intersection", "majority")
VOTE_BYTES = 1 << 20  # packed bytes whose votes are counted at a time: 8 M entries, 16 MB of counters


def merge(masks: Sequence[MaskSet], how: str = "union") -> MaskSet:
    """Merges mask sets of the same parameters.

    Args:
        masks: one or more sets; names and shapes must agree.
        how: ``"union"`` (active in any), ``"intersection"`` (in all), ``"majority"`` (in more than half).

    Raises:
        ValueError: no sets, an unknown ``how``, or a parameter that differs (it is named).
    """
    masks = list(masks)
    if how not in HOW:
        raise ValueError(f"how must be one of {', '.join(map(repr, HOW))}, got {how!r}.")
    if not masks:
        raise ValueError("merge needs at least one mask set, got none.")
    first = masks[0]
    for other in masks[1:]:
        first.require_same_parameters(other)
    packed = {name: _merge_bits([m.packed(name) for m in masks], how) for name in first}
    metadata = {"method": "merge", "how": how, "merged": [m.fingerprint for m in masks]}
    return MaskSet(packed, first.shapes, metadata, copy_bits=False)


def _merge_bits(bits: list[Tensor], how: str) -> Tensor:
    if how == "majority":
        return _majority(bits)
    result = bits[0].clone()
    for other in bits[1:]:
        if how == "union":
            result |= other
        else:
            result &= other
    return result


def _majority(bits: list[Tensor]) -> Tensor:
    result = torch.empty_like(bits[0])
    for start in range(0, result.numel(), VOTE_BYTES):
        pieces = [b[start : start + VOTE_BYTES] for b in bits]
        votes = torch.zeros(pieces[0].numel() * 8, dtype=torch.int16)
        for piece in pieces:
            votes += functional.unpack_mask(piece, votes.numel())
        result[start : start + VOTE_BYTES] = functional.pack_mask(votes > len(bits) // 2)
    return result


def compare(left: MaskSet, right: MaskSet) -> dict[str, Any]:
    """How alike two mask sets of the same parameters are.

    Returns:
        ``jaccard``: intersection / union (1 when both are empty);
        ``chance_jaccard``: what independent random masks with the same counts per tensor would give (expected
        intersection over expected union);
        ``overlap``: intersection / the smaller count (Szymkiewicz-Simpson; 1 when both are empty, 0 when one is);
        ``hamming``: share of all entries that differ;
        ``per_layer``: the same four by parameter name.
    """
    left.require_same_parameters(right)
    per_layer: dict[str, dict[str, float]] = {}
    all_both, all_either, all_chance = 0, 0, 0.0
    for name, shape in left.shapes.items():
        both, either = functional.mask_overlap(left.packed(name), right.packed(name)).tolist()
        n, a, b = math.prod(shape), left.count(name), right.count(name)
        chance = a * b / n if n else 0.0
        per_layer[name] = _measures(both, either, chance, n, a, b)
        all_both, all_either, all_chance = all_both + both, all_either + either, all_chance + chance
    n, a, b = left.total_parameters, left.active_parameters, right.active_parameters
    return {**_measures(all_both, all_either, all_chance, n, a, b), "per_layer": per_layer}


def _measures(both: float, either: float, chance: float, n: int, a: int, b: int) -> dict[str, float]:
    smaller = min(a, b)
    return {
        "jaccard": both / either if either else 1.0,
        "chance_jaccard": chance / (a + b - chance) if a + b else 1.0,
        "overlap": both / smaller if smaller else float(a == b),
        "hamming": (either - both) / n if n else 0.0,
    }
