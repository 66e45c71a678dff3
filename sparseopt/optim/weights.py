"""What an optimizer can say about the weights it trains: their values before training, and what changed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparseopt.deltas.delta import Delta

if TYPE_CHECKING:
    from sparseopt.masks.maskset import MaskSet
    from sparseopt.optim.arena import Arena
    from sparseopt.optim.sparse_adamw import SparseAdamW

__all__ = ["LeftEntries", "base_weights", "export_delta"]


@dataclass
class LeftEntries:
    """Entries that were active once and are no longer, by parameter name; positions are sorted, int64.

    Attributes:
        since_export: positions that left since the last export.
        base: (positions, values before training) of all that left, kept only where the optimizer keeps a base copy.
        exported: (positions, values) of the last export, kept once ``export_delta(changed_only=True)`` was used.
        compares: whether it was.
    """

    since_export: dict[str, Tensor] = field(default_factory=dict)
    base: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    exported: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    compares: bool = False

    def before_update(self, optimizer: SparseAdamW, masks: MaskSet) -> None:
        """Remembers what the new masks drop, and hands base values back to entries that return."""
        for arena in optimizer._arenas:
            for t, name in enumerate(arena.names):
                if name not in masks:
                    continue
                old, new = arena.plan.positions(t), masks.indices(name).long().to(arena.device)
                dropped = old[~_contains(new, old)]
                earlier = self.since_export.get(name, dropped[:0]).to(arena.device)
                together = torch.cat([earlier, dropped]).unique()
                self.since_export[name] = together[~_contains(new, together)]
                if arena.base is not None:
                    positions, values = self.base.get(name, (dropped[:0], arena.base[:0]))
                    base = arena.base[arena.plan.arena(t)][~_contains(new, old)]
                    merged, order = torch.cat([positions, dropped]).sort()
                    self.base[name] = (merged, torch.cat([values, base])[order])

    def take_back(self, arena: Arena) -> None:
        """Gives entries that are active again their base values, and forgets them here."""
        for t, name in enumerate(arena.names):
            if arena.base is None or name not in self.base:
                continue
            positions, values = self.base[name]
            active = arena.plan.positions(t)
            back = _contains(active, positions)
            arena.base[arena.plan.arena(t)][torch.searchsorted(active, positions[back])] = values[back]
            self.base[name] = (positions[~back], values[~back])


def _contains(sorted_set: Tensor, values: Tensor) -> Tensor:
    """bool per value: is it in the sorted set?"""
    if not sorted_set.numel():
        return torch.zeros_like(values, dtype=torch.bool)
    at = torch.searchsorted(sorted_set, values).clamp(max=sorted_set.numel() - 1)
    return sorted_set[at] == values


@contextlib.contextmanager
def base_weights(optimizer: SparseAdamW) -> Iterator[None]:
    optimizer._build()
    for arena in optimizer._arenas:
        if arena.base is None:
            if bool((arena.steps > 0).any()):
                raise RuntimeError(
                    "base_weights() was first used after training began, when the base values were gone: enter it once "
                    "before the first step to have them kept."
                )
            arena.keep_base()
            for param, (home, t) in optimizer._slots.items():
                if home is arena:
                    optimizer.state[param] = arena.state(t)
    current = _exchange(optimizer, None)
    try:
        yield
    finally:
        _exchange(optimizer, current)


@torch.no_grad()
def _exchange(optimizer: SparseAdamW, restore: list[tuple[Tensor, Tensor]] | None) -> list[tuple[Tensor, Tensor]]:
    """Writes base values (or ``restore``, from an earlier call) into the model; returns what was there."""
    saved: list[tuple[Tensor, Tensor]] = []
    given = iter(restore) if restore is not None else None
    for arena in optimizer._arenas:
        assert arena.base is not None
        for t, name in enumerate(arena.names):
            positions, base = arena.plan.positions(t), arena.base[arena.plan.arena(t)]
            if name in optimizer._left.base:
                extra, values = optimizer._left.base[name]
                positions, base = torch.cat([positions, extra]), torch.cat([base, values])
            if given is not None:
                positions, base = next(given)
            flat = arena.params[t].detach().reshape(-1)
            saved.append((positions, flat[positions]))
            if arena.params[t].is_contiguous():
                flat[positions] = base
                torch.autograd.graph.increment_version([arena.params[t]])
            else:
                copy = flat.clone()
                copy[positions] = base
                arena.params[t].copy_(copy.view(arena.params[t].shape))
    return saved


@torch.no_grad()
def export_delta(optimizer: SparseAdamW, changed_only: bool) -> Delta:
    optimizer._build()
    left = optimizer._left
    left.compares |= changed_only
    entries: dict[str, tuple[Tensor, Tensor]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    step = 0
    for arena in optimizer._arenas:
        step = max(step, int(arena.steps.max()) if arena.steps.numel() else 0)
        for t, name in enumerate(arena.names):
            positions = arena.plan.positions(t)
            if name in left.since_export:
                positions = torch.cat([positions, left.since_export[name].to(arena.device)]).sort().values
            values = arena.params[t].detach().reshape(-1)[positions]
            reference = left.exported.get(name)
            if reference is None and arena.base is not None:
                reference = (arena.plan.positions(t), arena.base[arena.plan.arena(t)])
            if left.compares:
                left.exported[name] = (positions, values)
            if changed_only and reference is not None:
                positions, values = _changed(positions, values, *reference)
            shapes[name] = tuple(arena.params[t].shape)
            index_dtype = torch.int32 if arena.params[t].numel() <= 2**31 else torch.int64
            entries[name] = (positions.to("cpu", index_dtype), values.cpu())
    left.since_export.clear()
    return Delta.from_dict(entries, shapes, step=step)


def _changed(positions: Tensor, values: Tensor, old_positions: Tensor, old_values: Tensor) -> tuple[Tensor, Tensor]:
    """Entries that are new or whose bits differ from the earlier export."""
    known = _contains(old_positions, positions)
    same = torch.zeros_like(known)
    at = torch.searchsorted(old_positions, positions[known])
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    same[known] = old_values[at].view(bits) == values[known].view(bits)
    return positions[~same], values[~same]
