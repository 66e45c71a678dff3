"""Merging and comparing mask sets, on packed bits."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from torch import Tensor

from sparseopt import functional
from sparseopt.masks._bits import Votes, exact_weights
from sparseopt.masks.find import find_masks
from sparseopt.masks.kinds import KINDS, kind_of
from sparseopt.masks.maskset import MaskSet

__all__ = ["HOW", "compare", "compare_many", "merge", "opened"]

HOW = ("union", "intersection", "majority", "weighted")
VOTE_BYTES = 1 << 18  # packed bytes whose votes are counted at a time: 2 M entries, at most 16 MB of counters


# ---- merging ---------------------------------------------------------------------------------------------------------
def merge(
    masks: Sequence[MaskSet],
    how: str = "union",
    *,
    weights: Sequence[float] | None = None,
    threshold: float | None = None,
    sparsity: float | None = None,
) -> MaskSet:
    """Merges mask sets of the same parameters; works on packed bits, a block at a time.

    Args:
        masks: one or more sets; names and shapes must agree.
        how: ``"union"`` (active in any), ``"intersection"`` (in all), ``"majority"`` (in more than half), ``"weighted"``
            (by the sum of the weights of the sets in which an entry is active).
        weights: weighted only: one number, 0 or more, for each set: its score; None = 1 each. Taken as the decimal
            numbers they print as, so that sums are exact.
        threshold: weighted only: entries whose sum is at least this are active; default half of the total weight.
        sparsity: weighted only, instead of a threshold: exactly ``round((1 - sparsity) * n)`` of all n entries, those
            with the largest sums; ties go to the lower name, then to the lower flat index.

    Returns:
        A MaskSet whose metadata says how it came about, with the fingerprints of the sets merged.

    Raises:
        ValueError: no sets, an unknown ``how``, arguments of another ``how``, a parameter that differs (it is named), or
            a sparsity that asks for more entries than are active in any of the sets.
    """
    masks = list(masks)
    if how not in HOW:
        raise ValueError(f"how must be one of {', '.join(map(repr, HOW))}, got {how!r}.")
    if how != "weighted":
        for name, value in (("weights", weights), ("threshold", threshold), ("sparsity", sparsity)):
            if value is not None:
                raise ValueError(f"{name} belongs to how='weighted', got how={how!r}.")
    if not masks:
        raise ValueError("merge needs at least one mask set, got none.")
    first = masks[0]
    for other in masks[1:]:
        first.require_same_parameters(other)
    metadata: dict[str, Any] = {"method": "merge", "how": how, "merged": [m.fingerprint for m in masks]}
    if how == "weighted":
        return _weighted(masks, [1.0] * len(masks) if weights is None else list(weights), threshold, sparsity, metadata)
    if how == "majority":
        packed = _reaching(Votes(masks, [1] * len(masks)), len(masks) // 2 + 1)
    else:
        packed = {name: _merge_bits([m.packed(name) for m in masks], how) for name in first}
    return MaskSet(packed, first.shapes, metadata, copy_bits=False)


def _merge_bits(bits: list[Tensor], how: str) -> Tensor:
    result = bits[0].clone()
    for other in bits[1:]:
        if how == "union":
            result |= other
        else:
            result &= other
    return result


def _reaching(votes: Votes, least: int) -> dict[str, Tensor]:
    return {name: votes.reaching(name, least, 8 * VOTE_BYTES) for name in votes.shapes}


def _weighted(
    masks: list[MaskSet],
    weights: list[float],
    threshold: float | None,
    sparsity: float | None,
    metadata: dict[str, Any],
) -> MaskSet:
    if len(weights) != len(masks):
        raise ValueError(f"{len(masks)} mask sets need as many weights, got {len(weights)}.")
    if threshold is not None and sparsity is not None:
        raise ValueError("give a threshold or a sparsity, not both.")
    numbers, one = exact_weights(weights)
    votes, total = Votes(masks, numbers), sum(numbers)
    metadata["weights"] = [float(weight) for weight in weights]
    if sparsity is not None:
        return _by_rank(masks, numbers, votes, sparsity, metadata)
    if threshold is None:
        least = -(-total // 2)
    else:
        if not math.isfinite(threshold) or not 0 < (wanted := Fraction(repr(float(threshold))) * one) <= total:
            raise ValueError(
                f"threshold must lie above 0 and within the total weight {total / one:g}, got {threshold}."
            )
        least = math.ceil(wanted)
    metadata["threshold"] = total / one / 2 if threshold is None else float(threshold)
    return MaskSet(_reaching(votes, least), masks[0].shapes, metadata, copy_bits=False)


def _by_rank(
    masks: list[MaskSet], numbers: list[int], votes: Votes, sparsity: float, metadata: dict[str, Any]
) -> MaskSet:
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity must be a number in 0..1, got {sparsity!r}.")
    voting = [m for m, number in zip(masks, numbers, strict=True) if number]
    known = sum(int(functional.popcount(_merge_bits([m.packed(name) for m in voting], "union"))) for name in masks[0])
    wanted = round((1 - sparsity) * masks[0].total_parameters)
    if wanted > known:
        raise ValueError(
            f"sparsity={sparsity} asks for {wanted:,} active entries, but only {known:,} are active in any of the sets "
            "with a weight above 0."
        )
    found = find_masks(votes, sparsity)
    metadata |= {"target_sparsity": sparsity, "tie_share": found.metadata["tie_share"]}
    return MaskSet({n: found.packed(n) for n in found}, found.shapes, metadata, copy_bits=False)


# ---- comparing -------------------------------------------------------------------------------------------------------
def compare(left: MaskSet, right: MaskSet) -> dict[str, Any]:
    """How alike two mask sets of the same parameters are.

    Returns:
        ``jaccard``: intersection / union (1 when both are empty);
        ``chance_jaccard``: what independent random masks with the same counts per tensor would give (expected
        intersection over expected union);
        ``overlap``: intersection / the smaller count (Szymkiewicz-Simpson; 1 when both are empty, 0 when one is);
        ``hamming``: share of all entries that differ;
        ``per_layer``: the same four by parameter name;
        ``per_kind``: over all parameters of a kind of module (attention, mlp, embedding, norm, other);
        ``per_projection``: over all of one name, such as q_proj, whatever the layer;
        ``per_block``: by number of the transformer layer, ascending; parameters outside layers are left out.
    """
    from sparseopt.masks.jaccard import place  # which imports this module

    left.require_same_parameters(right)
    sums: dict[str, _Sums] = {key: {} for key in ("kind", "projection", "block")}
    per_layer: dict[str, dict[str, float]] = {}
    everything = [0.0] * 6
    for name, shape in left.shapes.items():
        both, either = functional.mask_overlap(left.packed(name), right.packed(name)).tolist()
        n, a, b = math.prod(shape), left.count(name), right.count(name)
        counted = [both, either, a * b / n if n else 0.0, n, a, b]
        per_layer[name] = _measures(*counted)
        layer, projection = place(name)
        _add(everything, counted)
        _add(sums["kind"].setdefault(kind_of(name), [0.0] * 6), counted)
        _add(sums["projection"].setdefault(projection, [0.0] * 6), counted)
        if layer is not None:
            _add(sums["block"].setdefault(layer, [0.0] * 6), counted)
    kinds, blocks = sums["kind"], sums["block"]
    return {
        **_measures(*everything),
        "per_layer": per_layer,
        "per_kind": {kind: _measures(*kinds[kind]) for kind in KINDS if kind in kinds},
        "per_projection": {key: _measures(*values) for key, values in sums["projection"].items()},
        "per_block": {layer: _measures(*blocks[layer]) for layer in sorted(blocks)},
    }


def compare_many(masks: Sequence[MaskSet | str | os.PathLike[str]]) -> dict[str, Any]:
    """Compares mask sets of the same parameters in pairs.

    Args:
        masks: two or more sets, or files of them, of which two are in memory at a time.

    Returns:
        ``jaccard``, ``chance_jaccard``: symmetric matrices in the order given, 1 on the diagonal;
        ``pairs``: for each two sets ``left`` and ``right`` (positions, left < right) and what :func:`compare` says.

    Raises:
        ValueError: fewer than two sets, or a parameter that differs.
    """
    size = len(masks)
    if size < 2:
        raise ValueError(f"comparing takes at least two mask sets, got {size}.")
    jaccard = [[1.0] * size for _ in range(size)]
    chance = [[1.0] * size for _ in range(size)]
    pairs = []
    for i in range(size - 1):
        left = opened(masks[i])
        for j in range(i + 1, size):
            result = compare(left, opened(masks[j]))
            jaccard[i][j] = jaccard[j][i] = result["jaccard"]
            chance[i][j] = chance[j][i] = result["chance_jaccard"]
            pairs.append({"left": i, "right": j, **result})
    return {"jaccard": jaccard, "chance_jaccard": chance, "pairs": pairs}


def opened(masks: MaskSet | str | os.PathLike[str]) -> MaskSet:
    """A mask set, loaded if its file was named."""
    return masks if isinstance(masks, MaskSet) else MaskSet.load(masks)


_Sums = dict[Any, list[float]]  # group -> both, either, both by chance, entries, active left, active right


def _add(total: list[float], counted: Sequence[float]) -> None:
    for position, value in enumerate(counted):
        total[position] += value


def _measures(both: float, either: float, chance: float, n: float, a: float, b: float) -> dict[str, float]:
    smaller = min(a, b)
    return {
        "jaccard": both / either if either else 1.0,
        "chance_jaccard": chance / (a + b - chance) if a + b else 1.0,
        "overlap": both / smaller if smaller else float(a == b),
        "hamming": (either - both) / n if n else 0.0,
    }
