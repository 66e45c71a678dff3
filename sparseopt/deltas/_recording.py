"""Taking the values of a moment, and finding out what changed since the step logged before.

Staging happens in the caller's thread, between two training steps: a copy on the CPU; on a GPU a copy into pinned memory on
a stream of its own, for which the host does not wait. Everything else happens later, in the log's thread.
"""

from __future__ import annotations

import abc
import math
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from sparseopt.deltas._source import chunks
from sparseopt.deltas.base import Base, state_of
from sparseopt.deltas.delta import INT32_NUMEL, Delta
from sparseopt.deltas.statistics import Statistics, bits
from sparseopt.optim import weights
from sparseopt.optim.plan import IndexPlan
from sparseopt.optim.sparse_adamw import SparseAdamW

__all__ = ["DenseTracker", "Entries", "SparseTracker", "Staged", "Tracker"]

Entries = dict[str, tuple[Tensor, Tensor]]  # name -> (sorted flat positions, new values)
Chain = Callable[[], Iterable[Delta]]  # the deltas logged so far, in order


class Staged:
    """Values of one moment on their way to the CPU.

    Attributes:
        parts: (name, sorted positions, values) on the CPU; positions None = every entry. Complete after :meth:`wait`.
    """

    def __init__(self) -> None:
        self.parts: list[tuple[str, Tensor | None, Tensor]] = []
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._events: list[torch.cuda.Event] = []

    def copy(self, tensor: Tensor, into: Tensor | None = None) -> Tensor:
        """A CPU copy of ``tensor`` as it is now in the order of the current stream; in ``into`` if given."""
        tensor = tensor.detach()
        if tensor.device.type != "cuda":
            return tensor.to("cpu", copy=True) if into is None else into.copy_(tensor)
        stream = self._streams.get(tensor.device)
        if stream is None:
            stream = self._streams[tensor.device] = torch.cuda.Stream(tensor.device)
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        if into is None:
            into = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        with torch.cuda.stream(stream):
            into.copy_(tensor, non_blocking=True)
        tensor.record_stream(stream)
        return into

    def seal(self) -> None:
        """After the last copy: nothing on the devices' current streams may overwrite what is being copied."""
        for device, stream in self._streams.items():
            event = stream.record_event()
            torch.cuda.current_stream(device).wait_event(event)
            self._events.append(event)

    def wait(self) -> None:
        for event in self._events:
            event.synchronize()


class Tracker(abc.ABC):
    """Knows the values of the step logged last."""

    @abc.abstractmethod
    def stage(self, source: Any) -> Staged:
        """Takes the values of now."""

    @abc.abstractmethod
    def compare(self, staged: Staged, statistics: Statistics) -> Entries:
        """What differs from the step logged last; adds to the statistics."""

    @abc.abstractmethod
    def commit(self, entries: Entries) -> None:
        """The entries are in the log now."""

    def failed(self) -> None:  # noqa: B027 (most have nothing to do)
        """What was staged last did not reach the log."""


class DenseTracker(Tracker):
    """Of a model: two copies of it in CPU memory, one of the step logged last, one of the moment being recorded."""

    def __init__(self, base: Base, chain: Chain) -> None:
        self._base, self._chain = base, chain
        self._last: dict[str, Tensor] = {}
        self._buffers: dict[str, Tensor] = {}

    def stage(self, source: torch.nn.Module | Mapping[str, Tensor]) -> Staged:
        state, base, staged = state_of(source), self._base, Staged()
        missing = [name for name in base.names if name not in state]
        extra = [name for name in state if name not in base.shapes and name not in base.tied]
        if missing or extra:
            what = f"lacks {missing[0]!r}" if missing else f"has {extra[0]!r}"
            raise ValueError(f"the model to record {what}, unlike the base of its delta log.")
        for name in base.names:
            _check_fit(name, state[name], base)
        for name in base.names:
            tensor = state[name]
            if name not in self._buffers:
                pinned = tensor.device.type == "cuda"
                self._buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
            copied = staged.copy(tensor, self._buffers[name])
            staged.parts.append((name, None, copied.view(-1)))
        staged.seal()
        return staged

    def compare(self, staged: Staged, statistics: Statistics) -> Entries:
        base = self._base
        if not self._last:
            # In a fresh dictionary: an error on the way leaves none behind that looks complete.
            last = {name: base.tensor(name).reshape(-1).clone() for name in base.names}
            for delta in self._chain():
                for name in delta.names:
                    last[name][delta.indices(name).long()] = delta.values(name)
            self._last = last
        entries: Entries = {}
        for name, _, values in staged.parts:
            n = values.numel()
            found: list[tuple[Tensor, Tensor]] = []
            for start, stop in chunks(n):
                now, before, first = values[start:stop], self._last[name][start:stop], base.piece(name, start, stop)
                changed = (bits(now) != bits(before)).nonzero().view(-1)
                if changed.numel():
                    found.append(((changed + start).to(_index_dtype(n)), now[changed]))
                moved = bits(now) != bits(first)
                if 4 * int(moved.sum()) > now.numel():  # picking would take longer than it spares
                    statistics.add(name, now, first)
                else:
                    statistics.add(name, now[moved], first[moved])
            if found:
                entries[name] = (torch.cat([p for p, _ in found]), torch.cat([v for _, v in found]))
                statistics.count(name, entries[name][0].numel())
        return entries

    def commit(self, entries: Entries) -> None:
        for name, (positions, values) in entries.items():
            self._last[name][positions.long()] = values


class SparseTracker(Tracker):
    """Of a SparseAdamW: every entry that was ever active, with its last and its base value, and nothing of the rest."""

    def __init__(self, base: Base, chain: Chain, fresh: bool) -> None:
        """``fresh``: the log began with the model as it is, so that entries change under the optimizer's masks only."""
        self._base, self._chain, self._fresh = base, chain, fresh
        # name -> (sorted positions, values in the log, values in the base); None: still to be read from the chain.
        self._known: dict[str, tuple[Tensor, Tensor, Tensor]] | None = {} if fresh else None
        self._optimizer: weakref.ref[SparseAdamW] | None = None
        self._follower = weights.Follower()
        # Of parameters on GPUs: active positions on the CPU, good for as long as the optimizer has the same index plan.
        self._active: dict[str, tuple[IndexPlan, Tensor]] = {}

    def stage(self, source: SparseAdamW) -> Staged:
        base, staged = self._base, Staged()
        names: dict[str, str] = {}
        for name, param, _ in source._layout():
            try:
                names[name] = base.canonical(name)
            except KeyError:
                raise ValueError(
                    f"the optimizer trains {name!r}, which the base of the delta log does not have: give it the model's "
                    "named_parameters()."
                ) from None
            _check_fit(names[name], param, base)
        if self._optimizer is None or self._optimizer() is not source:
            self._follower = weights.follow(source)
            # What another optimizer, an earlier process or an earlier mask trained may have changed too.
            self._follower.lost = not self._fresh or source._left.mask_changes > 0
            self._optimizer, self._fresh = weakref.ref(source), False
        for part in weights.read(source, self._follower):
            name = names[part.name]
            if part.positions is None:
                staged.parts.append((name, None, staged.copy(part.values)))
                continue
            if part.values.device.type == "cpu":  # indexing made a copy already
                staged.parts.append((name, part.positions.to(_index_dtype(part.param.numel())), part.values))
                continue
            plan, positions = self._active.get(name, (None, None))
            if positions is None or plan is not part.plan:
                positions = staged.copy(part.positions.to(_index_dtype(part.param.numel())))
                if part.plan is not None:
                    self._active[name] = (part.plan, positions)
            staged.parts.append((name, positions, staged.copy(part.values)))
        staged.seal()
        return staged

    def compare(self, staged: Staged, statistics: Statistics) -> Entries:
        if self._known is None:
            self._known = {}
            for delta in self._chain():
                for name in delta.names:
                    self._extend(name, delta.indices(name))
                self.commit({name: (delta.indices(name), delta.values(name)) for name in delta.names})
        entries: Entries = {}
        for name, positions, values in staged.parts:
            if positions is None:
                positions, values = self._differing(name, values)
            self._extend(name, positions)
            known, last, _ = self._known[name]
            at = torch.searchsorted(known, positions) if known is not positions else None
            changed = bits(last if at is None else last[at]) != bits(values)
            if bool(changed.any()):
                entries[name] = (positions[changed], values[changed])
                statistics.count(name, entries[name][0].numel())
        for name, (known, last, base) in self._known.items():
            now = last
            if name in entries:
                now = last.clone()
                now[torch.searchsorted(known, entries[name][0])] = entries[name][1]
            statistics.add(name, now, base)
        return entries

    def commit(self, entries: Entries) -> None:
        assert self._known is not None
        for name, (positions, values) in entries.items():
            known, last, _ = self._known[name]
            last[torch.searchsorted(known, positions)] = values

    def failed(self) -> None:
        self._follower.lost = True
        self._active.clear()  # positions may not have come over
        self._known = None  # perhaps half extended: the chain has it

    def _extend(self, name: str, positions: Tensor) -> None:
        """Makes entries known; one that was never logged has its base value."""
        assert self._known is not None
        if name not in self._known:
            base = self._base_at(name, positions)
            self._known[name] = (positions, base.clone(), base)
            return
        known, last, base = self._known[name]
        if known is positions or torch.equal(known, positions):
            self._known[name] = (positions, last, base)  # one tensor of positions, not two equal ones
            return
        new = positions[~weights.contains(known, positions)]
        if new.numel():
            more = self._base_at(name, new)
            merged, order = torch.cat([known, new]).sort()
            self._known[name] = (merged, torch.cat([last, more])[order], torch.cat([base, more])[order])

    def _base_at(self, name: str, positions: Tensor) -> Tensor:
        base = self._base
        parts = [torch.empty(0, dtype=base.dtypes[name])]
        for start, stop in chunks(math.prod(base.shapes[name])):
            # stop - 1, because stop itself may not fit the dtype of the positions.
            bounds = torch.tensor([start, stop - 1], dtype=positions.dtype)
            low = int(torch.searchsorted(positions, bounds[0]))
            high = int(torch.searchsorted(positions, bounds[1], right=True))
            if high > low:
                parts.append(base.piece(name, start, stop)[positions[low:high].long() - start])
        return torch.cat(parts)

    def _differing(self, name: str, values: Tensor) -> tuple[Tensor, Tensor]:
        """The entries of a whole tensor that differ from the log's."""
        assert self._known is not None
        known, last, _ = self._known.get(name, (None, None, None))
        found = []
        for start, stop in chunks(values.numel()):
            before = self._base.piece(name, start, stop)
            if known is not None and last is not None:
                low = int((known < start).sum())
                high = int((known < stop).sum())
                before = before.clone()
                before[known[low:high].long() - start] = last[low:high]
            found.append((bits(values[start:stop]) != bits(before)).nonzero().view(-1) + start)
        positions = torch.cat(found) if found else torch.empty(0, dtype=torch.int64)
        return positions.to(_index_dtype(values.numel())), values[positions]


def _check_fit(name: str, tensor: Tensor, base: Base) -> None:
    if tuple(tensor.shape) != base.shapes[name] or tensor.dtype != base.dtypes[name]:
        raise ValueError(
            f"{name!r} is {_described(tensor.dtype, tensor.shape)} now, but "
            f"{_described(base.dtypes[name], base.shapes[name])} in the base of the delta log."
        )


def _described(dtype: torch.dtype, shape: Iterable[int]) -> str:
    return f"{str(dtype).removeprefix('torch.')}{list(shape)}"


def _index_dtype(n: int) -> torch.dtype:
    return torch.int32 if n <= INT32_NUMEL else torch.int64
