"""What an optimizer can say about the weights it trains: their values before training, and what changed."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparseopt import functional
from sparseopt.deltas.delta import INT32_NUMEL, Delta

if TYPE_CHECKING:
    from sparseopt.masks.maskset import MaskSet
    from sparseopt.optim.arena import Arena
    from sparseopt.optim.plan import IndexPlan
    from sparseopt.optim.sparse_adamw import SparseAdamW

__all__ = ["Follower", "LeftEntries", "Part", "base_weights", "export_delta", "follow", "read"]


@dataclass(eq=False)
class Follower:
    """What somebody who follows the weights must look at besides the active entries.

    Attributes:
        left: packed bits on any device, by parameter name, of the entries that left the mask since the last look and are out
            of it.
        lost: whether any entry of the optimizer's parameters may have changed: state was loaded, and masks had changed.
        active: (index plan, active positions) by name, kept between looks, on CPUs; None: not kept.
    """

    left: dict[str, Tensor] = field(default_factory=dict)
    lost: bool = False
    active: dict[str, tuple[IndexPlan, Tensor]] | None = None

    def positions(self, arena: Arena, t: int) -> Tensor:
        """Sorted positions of a tensor's active entries."""
        if self.active is None or arena.device.type != "cpu":
            return arena.plan.positions(t)
        kept = self.active.get(arena.names[t])
        if kept is None or kept[0] is not arena.plan:
            dtype = torch.int32 if arena.params[t].numel() <= INT32_NUMEL else torch.int64
            kept = self.active[arena.names[t]] = (arena.plan, arena.plan.positions(t).to(dtype))
        return kept[1]

    def drop(self, names: Sequence[str], old: Sequence[Tensor], new: Sequence[Tensor]) -> None:
        """Masks change from ``old`` to ``new`` (packed, on one device), all of them in a few launches."""
        sizes = [bits.numel() for bits in old]
        once = torch.cat(list(old))
        if any(name in self.left for name in names):
            before = [self.left.get(name, bits).to(once.device) for name, bits in zip(names, old, strict=True)]
            once.bitwise_or_(torch.cat(before))
        left = once.bitwise_and_(torch.cat(list(new)).bitwise_not_())
        self.left.update(zip(names, left.split(sizes), strict=True))

    def looked(self) -> None:
        self.left.clear()
        self.lost = False


@dataclass
class LeftEntries:
    """Entries that were active once and are no longer, by parameter name.

    Attributes:
        mask_changes: times that masks were changed, in this process and in those whose state was loaded.
        export: for ``export_delta``.
        followers: further ones, each with its own account.
        base: (sorted positions, int64, values before training) of all that left, kept only where the optimizer keeps a
            base copy.
        exported: (positions, values) of the last export, kept once ``export_delta(changed_only=True)`` was used.
        compares: whether it was.
        exports: whether there was any export.
    """

    mask_changes: int = 0
    export: Follower = field(default_factory=Follower)
    followers: weakref.WeakSet[Follower] = field(default_factory=weakref.WeakSet)
    base: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    exported: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    compares: bool = False
    exports: bool = False

    def __getstate__(self) -> dict[str, Any]:
        # Whoever follows this optimizer does not follow a copy of it (and weak references cannot be pickled).
        return {key: value for key, value in vars(self).items() if key != "followers"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, followers=weakref.WeakSet())

    def before_update(
        self, optimizer: SparseAdamW, masks: MaskSet, before: Mapping[str, Tensor | None], near: Mapping[str, Tensor]
    ) -> None:
        """Remembers what the new masks drop from those ``before`` (packed, None: all), with its base values.

        ``near``: copies of the new masks' bits on another device, which does the work where there are any.
        """
        self.mask_changes += 1
        together: dict[torch.device, tuple[list[str], list[Tensor], list[Tensor]]] = {}
        for arena in optimizer._arenas:
            for t, name in enumerate(arena.names):
                if name not in masks:
                    continue
                new, numel, given = near.get(name, masks.packed(name)), arena.params[t].numel(), before[name]
                old = _all_active(numel, new.device) if given is None else given.to(new.device)
                names, olds, news = together.setdefault(new.device, ([], [], []))
                names.append(name)
                olds.append(old)
                news.append(new)
                if arena.base is not None:
                    self._keep_base(arena, t, old, new)
        # As bits: positions of what left would take more than the state of what trains.
        for names, olds, news in together.values():
            for follower in (self.export, *self.followers):
                follower.drop(names, olds, news)

    def _keep_base(self, arena: Arena, t: int, old: Tensor, new: Tensor) -> None:
        """Base values of what leaves a tensor's mask."""
        name, numel = arena.names[t], arena.params[t].numel()
        gone = functional.mask_indices(old & ~new, numel).long().to(arena.device)
        active, stays = (functional.unpack_mask(bits.to(arena.device), (numel,)) for bits in (old, new))
        positions, values = self.base.get(name, (gone[:0], arena.base[:0]))  # type: ignore[index]
        base = arena.base[arena.plan.arena(t)][~stays[active]]  # type: ignore[index]
        merged, order = torch.cat([positions, gone]).sort()
        self.base[name] = (merged, torch.cat([values, base])[order])

    def after_load(self, changes: int | None, same_masks: bool) -> None:
        """State was loaded whose masks had changed ``changes`` times (None: nobody knows).

        Under masks that never changed, the active entries are all that can differ. Otherwise entries may differ that were
        active at some time between the two states, which nobody recorded.
        """
        if changes is None or changes or self.mask_changes or not same_masks:
            for follower in (self.export, *self.followers):
                follower.lost = True
            self.mask_changes = max(self.mask_changes, changes or 1)

    def take_back(self, arena: Arena) -> None:
        """Gives entries that are active again their base values, and forgets them here."""
        for t, name in enumerate(arena.names):
            if arena.base is None or name not in self.base:
                continue
            positions, values = self.base[name]
            active = arena.plan.positions(t)
            back = contains(active, positions)
            arena.base[arena.plan.arena(t)][torch.searchsorted(active, positions[back])] = values[back]
            self.base[name] = (positions[~back], values[~back])


def _all_active(numel: int, device: torch.device) -> Tensor:
    """The packed mask of which every entry is active."""
    bits = torch.full(((numel + 7) // 8,), 255, dtype=torch.uint8, device=device)
    if numel % 8:
        bits[-1] = (1 << numel % 8) - 1
    return bits


def contains(sorted_set: Tensor, values: Tensor) -> Tensor:
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
    # Entries that came back into the mask may be both in an arena and among those that left: what was there first is
    # written back last.
    with torch.no_grad():
        active = [arena.exchange(arena.base) for arena in optimizer._arenas if arena.base is not None]
        left = {name: _exchange_left(optimizer, name, values) for name, (_, values) in optimizer._left.base.items()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, values in left.items():
                _exchange_left(optimizer, name, values)
            for arena, values in zip(optimizer._arenas, active, strict=True):
                arena.exchange(values)


def _exchange_left(optimizer: SparseAdamW, name: str, values: Tensor) -> Tensor:
    """Writes entries of one parameter that left the mask; returns what was there."""
    positions = optimizer._left.base[name][0]
    param = next(arena.params[arena.names.index(name)] for arena in optimizer._arenas if name in arena.names)
    flat = param.detach().reshape(-1)
    before = flat[positions]
    if param.is_contiguous():
        flat[positions] = values
        torch.autograd.graph.increment_version([param])
    else:
        copy = flat.clone()
        copy[positions] = values
        param.copy_(copy.view(param.shape))
    return before


@dataclass(frozen=True)
class Part:
    """Entries of one parameter that may have changed.

    Attributes:
        name: of the parameter.
        param: the parameter.
        positions: sorted flat indices, int[k] on its device, not to be written; None = every entry.
        values: [k], a copy or (every entry) perhaps a view.
        plan: the index plan, where the positions are exactly the active ones; else None.
    """

    name: str
    param: Tensor
    positions: Tensor | None
    values: Tensor
    plan: IndexPlan | None


def follow(optimizer: SparseAdamW) -> Follower:
    """A new account of what leaves the masks from now on, kept for as long as the caller keeps it."""
    optimizer._build()
    follower = Follower(active={})
    optimizer._left.followers.add(follower)
    return follower


@torch.no_grad()
def read(optimizer: SparseAdamW, follower: Follower) -> Iterator[Part]:
    """Everything that may have changed since the follower's last look, tensor by tensor; never waits for the device."""
    optimizer._build()
    for arena in optimizer._arenas:
        for t, name in enumerate(arena.names):
            flat = arena.params[t].detach().reshape(-1)
            if follower.lost:
                yield Part(name, arena.params[t], None, flat, None)
                continue
            positions, bits = follower.positions(arena, t), follower.left.get(name)
            left = None if bits is None else functional.mask_indices(bits.to(arena.device), flat.numel())
            if left is not None and left.numel():
                positions = torch.cat([positions, left.to(positions.dtype)]).sort().values
                yield Part(name, arena.params[t], positions, flat[positions], None)
            else:
                yield Part(name, arena.params[t], positions, flat[positions], arena.plan)
    follower.looked()


def steps_taken(optimizer: SparseAdamW) -> int:
    return max((int(arena.steps.max()) for arena in optimizer._arenas if arena.steps.numel()), default=0)


@torch.no_grad()
def export_delta(optimizer: SparseAdamW, changed_only: bool) -> Delta:
    optimizer._build()
    left = optimizer._left
    left.compares |= changed_only
    # The base copy tells what a first export adds. After a complete export it no longer does: entries may be back at
    # their base values, and the reader must hear of it.
    bases: dict[str, tuple[Tensor, Tensor]] = {}
    for arena in optimizer._arenas:
        if changed_only and arena.base is not None and not left.exports:
            for t, name in enumerate(arena.names):
                bases[name] = (arena.plan.positions(t), arena.base[arena.plan.arena(t)])
    entries: dict[str, tuple[Tensor, Tensor]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for part in read(optimizer, left.export):
        name, values, n = part.name, part.values, part.param.numel()
        positions = torch.arange(n, device=values.device) if part.positions is None else part.positions
        reference = left.exported.get(name, bases.get(name))
        if left.compares:
            left.exported[name] = (positions, values.clone() if part.positions is None else values)
        if changed_only and reference is not None:
            known, old = (tensor.to(values.device) for tensor in reference)
            positions, values = _changed(positions, values, known, old)
        shapes[name] = tuple(part.param.shape)
        # A whole parameter may be a view of what training goes on to write.
        entries[name] = (
            positions.to("cpu", torch.int32 if n <= INT32_NUMEL else torch.int64),
            values.to("cpu", copy=True),
        )
    left.exports = True
    return Delta.from_dict(entries, shapes, step=steps_taken(optimizer))


def _changed(positions: Tensor, values: Tensor, old_positions: Tensor, old_values: Tensor) -> tuple[Tensor, Tensor]:
    """Entries that are new or whose bits differ from the earlier export."""
    known = contains(old_positions, positions)
    same = torch.zeros_like(known)
    at = torch.searchsorted(old_positions, positions[known])
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    same[known] = old_values[at].view(bits) == values[known].view(bits)
    return positions[~same], values[~same]
