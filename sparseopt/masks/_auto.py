"""``granularity="auto"``: rows, columns or single entries, whichever is the cheapest for each tensor.

For a matrix [d_out, d_in] with n entries and room for a = round(density * n) of them, let S_e, S_r and S_c be the scores that
the best single entries, the best whole rows and the best whole columns keep in that room. Against single entries, whose
weight gradient is computed whole and whose input X [T, d_in] is kept whole, they spare a training step

    V_r = n - a                           numbers of the gradient
    V_c = n - a + T (d_in - a / d_out)    and what the forward need not keep of X, for T = 1024 tokens

and cost the score S_e - S_r or S_e - S_c. The structure with the least score lost per number spared is taken, columns where
both lose the same; single entries where it keeps less than half of S_e, and in tensors that are no matrices. (T weighs one
against the other; for nn.Linear columns are input features. Where a weight is stored the other way round, as in Conv1D,
the rows are, and the choice merely favours the less thrifty of the two.) Matrices in three dimensions [E, d_out, d_in], such
as experts, are counted as one of E d_out rows: as if each token went to one of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from sparseopt.masks._pieces import Part
from sparseopt.masks._select import Picked, Source, pick, top
from sparseopt.masks._structured import Structure, pick_structures

__all__ = ["TOKENS", "choose_grain", "pick_mixed"]

TOKENS = 1024
LEAST_KEPT = 0.5  # of what single entries keep
WIDE = (torch.float32, torch.bfloat16, torch.float16)


def choose_grain(name: str, scores: Part, density: float) -> int | str:
    """1, "row" or "column" for one tensor."""
    n = scores.numel()
    room = round(density * n)
    if len(scores.shape) not in (2, 3) or room == 0:
        return 1
    columns = scores.shape[-1]
    rows = n // columns
    source = _source(name, scores)
    (cut,) = top([source], room, [0])
    best = pick(source, cut, torch.zeros((n + 7) // 8, dtype=torch.uint8)).kept
    spared = {"column": n - room + TOKENS * (columns - room / rows), "row": float(n - room)}
    costs: dict[str, float] = {}
    for grain, numbers in spared.items():
        structure = Structure(name, scores, grain)
        count = room // structure.size
        with np.errstate(invalid="ignore", over="ignore"):
            kept = float(-np.sort(-structure.sums)[:count].sum())
        if numbers > 0 and math.isfinite(kept) and math.isfinite(best) and kept >= LEAST_KEPT * best and count:
            costs[grain] = (best - kept) / numbers
    return min(costs, key=costs.__getitem__) if costs else 1


def _source(name: str, scores: Part) -> Source:
    return Source(name, scores, 1, scores.dtype not in WIDE, False)


def pick_mixed(
    tensors: Mapping[str, Part], grains: Mapping[str, int | str], budget: int, minimum: Sequence[int],
    packed: Mapping[str, Tensor],
) -> list[Picked]:  # fmt: skip
    """The best rows and columns of the tensors that have them, then single entries of the others.

    Groups get their tensors' share of the budget, in the order of their mean scores; what they leave goes to single entries.
    So a mixture that has enough of those keeps exactly ``budget`` entries.
    """
    least = dict(zip(tensors, minimum, strict=True))
    groups = [name for name in tensors if grains[name] != 1]
    singles = [name for name in tensors if grains[name] == 1]
    total = sum(part.numel() for part in tensors.values())
    mine = sum(tensors[name].numel() for name in groups)
    floor = sum(least[name] for name in singles)
    share = budget if not singles else min(budget - floor, max(budget * mine // max(total, 1), budget - (total - mine)))
    share = max(share, min(budget - floor, sum(least[name] for name in groups)))
    found: dict[str, Picked] = {}
    if groups:
        structures = [Structure(name, tensors[name], str(grains[name])) for name in groups]
        picked = pick_structures(structures, share, [least[name] for name in groups], by_mean=True)
        found.update(zip(groups, picked, strict=True))
    if singles:
        sources = [_source(name, tensors[name]) for name in singles]
        rest = budget - sum(part.active for part in found.values())
        cuts = top(sources, rest, [least[name] for name in singles])
        for source, cut in zip(sources, cuts, strict=True):
            found[source.name] = pick(source, cut, packed[source.name])
    return [found[name] for name in tensors]
