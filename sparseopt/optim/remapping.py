"""An arena under other masks: survivors move to their new places with all they have, new entries start afresh."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparseopt import functional
from sparseopt.optim.plan import IndexPlan
from sparseopt.optim.plan_on_device import build_on_device

if TYPE_CHECKING:
    from sparseopt.optim.arena import Arena

__all__ = ["change_masks", "forget_cohort"]

# Entries (and the rest of their tensor) that follow new masks in one launch: more make fewer launches, and need more memory.
ENTRIES_AT_ONCE = {"cpu": 1 << 20, "cuda": 1 << 25}
# Cohorts are numbered in a byte; beyond that the two oldest, whose bias corrections are nearly equal, become one.
MAX_COHORTS = 256


@torch.no_grad()
def change_masks(arena: Arena, packed: Sequence[Tensor | None], changed: Sequence[int]) -> Tensor | None:
    """Other entries are active from now on.

    Survivors keep all they have; new entries have zero moments, age 0, and the weight that is there as master and base.
    ``ENTRIES_AT_ONCE`` entries take one launch, whatever the number of tensors, and only they exist twice at a time
    (where the number of active entries changes: all, one kind of state after the other).

    Args:
        packed: of every tensor, None: all active.
        changed: positions of the tensors whose mask may be another one.

    Returns:
        Whether any entry is new, bool[] on the device, if that has to be known: :func:`forget_cohort` where none is.
    """
    old = arena.plan
    if arena.device.type == "cpu":
        arena.plan = IndexPlan.build(packed, old.numels)
    else:
        still_empty = {t for t, count in enumerate(old.counts) if not count} - set(changed)
        arena.plan = build_on_device(packed, old.numels, arena.device, still_empty)
    born = _new_cohort(arena)
    kinds = [name for name in arena.PER_ENTRY if getattr(arena, name) is not None]
    # Where no tensor's count changes, entries move within their own tensor's part of the arena.
    in_place = old.starts == arena.plan.starts
    for first, last in _spans(arena, changed) if in_place else [(0, old.tensors)]:
        here, there = arena.plan.part(first, last), old.part(first, last)
        for names in [kinds] if in_place else [[name] for name in kinds]:
            sources = [getattr(arena, name)[old.starts[first] : old.starts[last]] for name in names]
            targets = [_of_new_entries(arena, name, born, first, last) for name in names]
            functional.remap_entries_(targets, sources, here, there)
            for name, source, target in zip(names, sources, targets, strict=True):
                if in_place:
                    source.copy_(target)
                else:
                    setattr(arena, name, target)
    arena.follow_plan()
    arena.forget_versions()
    return (arena.cohorts == born).any() if arena.cohorts is not None and born else None


def forget_cohort(arena: Arena) -> None:
    """Nothing was new when masks changed last: no cohort was born."""
    assert arena.births is not None
    arena.births = arena.births[:, :-1].contiguous()
    if arena.births.shape[1] == 1:
        arena.cohorts = arena.births = None


def _spans(arena: Arena, changed: Sequence[int]) -> list[tuple[int, int]]:
    """(first, last + 1) of tensors that take a launch together: all changed ones, and others in between."""
    most, spans = ENTRIES_AT_ONCE.get(arena.device.type, 1 << 25), list[tuple[int, int]]()
    for tensor in sorted(changed):
        first = spans[-1][0] if spans else tensor
        if spans and arena.plan.starts[tensor + 1] - arena.plan.starts[first] <= most:
            spans[-1] = (first, tensor + 1)
        else:
            spans.append((tensor, tensor + 1))
    return spans


def _new_cohort(arena: Arena) -> int:
    """The number of a cohort that is born now; 0 where no entry is any older."""
    if not bool((arena.steps > 0).any()):
        return 0
    if arena.cohorts is None or arena.births is None:
        arena.cohorts = torch.zeros(arena.exp_avg.numel(), dtype=torch.uint8, device=arena.device)
        arena.births = torch.zeros(arena.plan.tensors, 1, device=arena.device)
    if arena.births.shape[1] == MAX_COHORTS:
        arena.cohorts -= (arena.cohorts > 0).to(torch.uint8)
        arena.births = torch.cat([arena.births[:, :1], arena.births[:, 2:]], 1)
    arena.births = torch.cat([arena.births, arena.steps[:, None]], 1)
    return arena.births.shape[1] - 1


def _of_new_entries(arena: Arena, name: str, born: int, first: int, last: int) -> Tensor:
    """A kind of state of the tensors ``first .. last - 1`` as if every active entry were new."""
    count, dtype = arena.plan.starts[last] - arena.plan.starts[first], getattr(arena, name).dtype
    if name not in ("master", "base"):
        return torch.full((count,), born if name == "cohorts" else 0, dtype=dtype, device=arena.device)
    part, weights = arena.plan.part(first, last), torch.empty(count, dtype=arena.state_dtype, device=arena.device)
    views = [param.detach().contiguous() for param in arena.params[first:last]]
    part.chunks[:, 0] -= first
    functional.gather_grads_(weights, views, part)
    return weights.to(dtype)
