"""Gradient capture: the active entries of each gradient are gathered as backward produces it, and the rest is freed.

A hook runs after autograd has accumulated a parameter's gradient: it takes ``param.grad`` away and adds the active entries
to a compact fp32 buffer. On a GPU dense gradients wait until ``WAITING_BYTES`` of them are there, so that one launch serves
many parameters; never more of them coexist, and none outlives the backward pass, since it may lie in memory that the next pass
overwrites (of the CUDA graphs that torch.compile's mode "reduce-overhead" makes). Every call accumulates (reentrant
checkpointing fires once per segment, tied weights once, micro-batches once each); ``step()`` consumes.

A hook runs for every parameter in every backward pass, while the GPU waits for the host: it does as little as it can.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from sparseopt._sharded import local, offloaded
from sparseopt.optim import distributed, structured

if TYPE_CHECKING:
    from torch.nn.parallel import DistributedDataParallel

    from sparseopt.optim.arena import Arena
    from sparseopt.optim.sparse_adamw import SparseAdamW

__all__ = ["WAITING_BYTES", "GradientCapture"]

WAITING_BYTES = 256 * 2**20
AT_ONCE = frozenset({"cpu"})  # device types on which a launch for each parameter costs no more than one for many


class _Slot:
    """The hook of one parameter, and where its gradients go."""

    __slots__ = ("arena", "at_once", "capture", "compact", "gradient", "seen", "tensor")

    def __init__(self, capture: GradientCapture) -> None:
        self.capture = capture
        # Position among the optimizer's arenas, -1 while not known: the arena itself holds the parameter, which holds
        # this hook, and Python's collector does not see through tensors.
        self.arena = -1
        self.tensor = 0
        self.gradient: Tensor | None = None  # still to be gathered
        self.compact = False  # whether that has the active entries only
        self.seen = False  # captured since the last step: the next gradient adds to the buffer
        self.at_once = False  # its gradients lie in memory that somebody else writes within this backward pass

    def __call__(self, param: Tensor) -> None:
        gradient = param.grad
        if gradient is not None:
            gradient = local(gradient)
            arena = self.capture.home(self, param, gradient)
            if arena is not None:
                if self.capture.observer is not None:
                    self.capture.observer(param, gradient)
                param.grad = None
                self.capture.take(self, arena, gradient)

    def mask(self, param: Tensor) -> tuple[bool, Tensor | None]:
        """(whether the optimizer has laid out its state, the packed mask it did that for; None: all active)."""
        optimizer = self.capture._optimizer()
        if optimizer is None or optimizer._dirty or param not in optimizer._slots:
            return False, None
        arena, tensor = optimizer._slots[param]
        return True, arena.packed_mask(tensor)

    def take_compact(self, param: Tensor, gradient: Tensor) -> bool:
        """Takes the active entries of a gradient, in order, from a layer that computes no more (see ``structured.py``);
        False if the parameter is not the optimizer's."""
        arena = self.capture.home(self, param, gradient)
        if arena is None:
            return False
        self.capture.take(self, arena, gradient, compact=True)
        return True


class GradientCapture:
    """The hooks of one optimizer and what they have captured since the last step.

    Attributes:
        observer: called with each parameter and its dense gradient before that is dropped.
    """

    def __init__(self, optimizer: SparseAdamW) -> None:
        # The parameters own the hooks: strong references to the optimizer or to parameters would keep them alive.
        self._optimizer = weakref.ref(optimizer)
        self._slots: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._touched: list[_Slot] = []
        self._waiting: list[_Slot] = []
        self._waiting_bytes = 0
        self.observer: Callable[[Tensor, Tensor], None] | None = None
        # Several processes: whether it is known who reduces dense gradients; the DDP that does so in this step still; and
        # whether the captured gradients are averaged already.
        self._sought = False
        self._ddp: DistributedDataParallel | None = None
        self.averaged = False
        self._stepping = False
        self.arm()

    def arm(self) -> None:
        """Hooks every trained parameter that has no hook yet, and looks up where gradients go."""
        optimizer = self._optimizer()
        assert optimizer is not None
        for group in optimizer.param_groups:
            for param in group["params"]:
                if param.requires_grad and param not in self._slots:
                    slot = self._slots[param] = _Slot(self)
                    structured.connect(param, slot)
                    self._handles.append(param.register_post_accumulate_grad_hook(slot))
        positions = {id(arena): position for position, arena in enumerate(optimizer._arenas)}
        for param, slot in self._slots.items():
            arena, slot.tensor = optimizer._slots.get(param, (None, 0))
            slot.arena = positions.get(id(arena), -1)

    def take_over(self, between_passes: bool) -> None:
        """Where several processes train: takes the parameters out of DDP's buckets, once.

        During a backward pass DDP's buckets cannot be changed: that step takes the gradients as DDP averages them.
        """
        optimizer = self._optimizer()
        if self._sought or optimizer is None or not distributed.several_processes(optimizer):
            return
        found = distributed.wrapper_of(distributed.plain_parameters(optimizer))
        if not between_passes:
            self._ddp, self._sought = found, True
        elif found is not None:
            distributed.release_from_ddp(optimizer, found)

    def disarm(self) -> None:
        """Removes all hooks: gradients stay dense."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.discard()
        for param, slot in self._slots.items():
            structured.disconnect(param, slot)
        self._slots = WeakIdKeyDictionary()

    def discard(self) -> None:
        """Forgets every captured gradient."""
        if not self._touched:
            return
        self.consumed()
        optimizer = self._optimizer()
        for arena in optimizer._arenas if optimizer is not None else ():
            arena.squares.zero_()

    def consumed(self) -> None:
        """After a step: the next gradients start anew."""
        for slot in self._touched:
            slot.seen, slot.gradient = False, None
        if self.averaged:
            self.averaged = self._sought = False
            self.take_over(between_passes=True)
        self._touched.clear()
        self._waiting.clear()
        self._waiting_bytes = 0

    # ---- taking gradients --------------------------------------------------------------------------------------------
    def home(self, slot: _Slot, param: Tensor, gradient: Tensor) -> Arena | None:
        """Where this gradient goes; None if it is not the optimizer's."""
        optimizer = self._optimizer()
        if optimizer is None:
            self.disarm()
            return None
        if not self._touched:
            self.take_over(between_passes=False)
            if self._ddp is not None:
                return None
        if not self._stepping and offloaded(param):
            return None  # it is still on its way to the CPU until backward ends: the step takes it
        arena = optimizer._arenas[slot.arena] if slot.arena >= 0 and not optimizer._dirty else None
        if arena is None or gradient.dtype != arena.dtype or gradient.device != arena.device:
            optimizer._build()  # compares all parameters: not at every hook
            if param not in optimizer._slots:  # it was taken out of its group
                return None
            arena = optimizer._arenas[slot.arena]
        if gradient.layout is not torch.strided:
            raise RuntimeError(
                f"SparseAdamW does not support sparse gradients (parameter {arena.names[slot.tensor]!r})."
            )
        return arena

    def take(self, slot: _Slot, arena: Arena, gradient: Tensor, compact: bool = False) -> None:
        if slot.gradient is not None:
            self.flush()
        if not slot.seen:
            self._touched.append(slot)
        if not arena.plan.counts[slot.tensor]:
            slot.seen = True
            return
        slot.gradient = gradient.detach() if gradient.requires_grad else gradient
        slot.compact = compact
        self._waiting.append(slot)
        self._waiting_bytes += gradient.nbytes if compact else arena.dense_bytes[slot.tensor]
        if self._waiting_bytes >= WAITING_BYTES or slot.at_once or arena.device.type in AT_ONCE:
            self.flush()
        elif len(self._waiting) == 1 and torch._C._current_graph_task_id() >= 0:
            torch.autograd.Variable._execution_engine.queue_callback(self.flush)  # at the end of this backward pass

    def gather_at_once(self, param: Tensor) -> None:
        """Gradients of ``param`` do not wait: see ``_Slot.at_once``."""
        if param in self._slots:
            self._slots[param].at_once = True

    def take_dense(self) -> None:
        """Captures gradients that somebody put into ``param.grad`` by hand."""
        optimizer = self._optimizer()
        assert optimizer is not None
        self.averaged, self._ddp = self._ddp is not None, None
        self._stepping = True
        for group in optimizer.param_groups:
            for param in group["params"]:
                if param.grad is not None and param in self._slots:
                    self._slots[param](param)
        self._stepping = False

    def flush(self) -> None:
        """Gathers the waiting gradients: one launch for each arena, for new and accumulating, dense and compact ones."""
        if not self._waiting:
            return
        optimizer = self._optimizer()
        assert optimizer is not None
        calls: dict[tuple[int, bool, bool], list[_Slot]] = {}
        for slot in self._waiting:
            calls.setdefault((slot.arena, slot.seen, slot.compact), []).append(slot)
        self._waiting.clear()
        self._waiting_bytes = 0
        for (position, accumulate, compact), slots in calls.items():
            arena = optimizer._arenas[position]
            gradients: dict[int, Tensor] = {}
            for slot in slots:
                assert slot.gradient is not None
                gradients[slot.tensor] = slot.gradient
                slot.gradient, slot.seen = None, True
            first, last = min(gradients), max(gradients)
            listed = [gradients.pop(tensor, arena.nothing) for tensor in range(first, last + 1)]
            arena.gather(first, listed, accumulate, compact)

    # ---- what was captured -------------------------------------------------------------------------------------------
    def __bool__(self) -> bool:
        """Whether anything was captured since the last step."""
        return bool(self._touched)

    def present(self, arena: Arena) -> list[bool]:
        """Which of an arena's tensors have a captured gradient."""
        optimizer = self._optimizer()
        assert optimizer is not None
        result = [False] * arena.plan.tensors
        for slot in self._touched:
            if slot.arena >= 0 and optimizer._arenas[slot.arena] is arena:
                result[slot.tensor] = True
        return result

    def pending(self) -> dict[str, Tensor]:
        """Captured gradients that no step has consumed, by parameter name: compact, in the state's dtype."""
        self.flush()
        optimizer = self._optimizer()
        assert optimizer is not None
        homes = [(optimizer._arenas[slot.arena], slot.tensor) for slot in self._touched if slot.arena >= 0]
        return {arena.names[t]: arena.gradient_buffer()[arena.plan.arena(t)] for arena, t in homes}

    def restore(self, pending: dict[str, Tensor]) -> None:
        """Hands pending gradients to the arenas that replaced the ones they were captured in."""
        self.consumed()
        optimizer = self._optimizer()
        assert optimizer is not None
        for slot in self._slots.values():
            arena = optimizer._arenas[slot.arena] if slot.arena >= 0 else None
            if arena is not None and arena.names[slot.tensor] in pending:
                arena.set_gradient(slot.tensor, pending[arena.names[slot.tensor]])
                slot.seen = True
                self._touched.append(slot)
