"""Gradient capture: the active entries of each gradient are gathered as backward produces it, and the rest is freed.

A hook runs after autograd has accumulated a parameter's gradient: it takes ``param.grad`` away and adds the active entries
to a compact fp32 buffer. On a GPU dense gradients wait until ``WAITING_BYTES`` of them are there, so that one launch serves
many small parameters; never more of them coexist. Every call accumulates (reentrant checkpointing fires once per segment,
tied weights once, micro-batches once each); ``step()`` consumes.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sparseopt.optim.sparse_adamw import SparseAdamW

__all__ = ["WAITING_BYTES", "GradientCapture"]

WAITING_BYTES = 64 * 2**20


class GradientCapture:
    """The hooks of one optimizer and which parameters have captured gradients since the last step."""

    def __init__(self, optimizer: SparseAdamW) -> None:
        # The parameters own the hooks; a strong reference would keep a discarded optimizer alive with the model.
        self._optimizer = weakref.ref(optimizer)
        self._handles: dict[Tensor, torch.utils.hooks.RemovableHandle] = {}
        self.captured: set[Tensor] = set()
        # Dense gradients that are still to be gathered: (gradient, whether to add to what is in the buffer).
        self._waiting: dict[Tensor, tuple[Tensor, bool]] = {}
        self._waiting_bytes = 0
        self.arm()

    def arm(self) -> None:
        """Hooks every trained parameter that has no hook yet."""
        optimizer = self._optimizer()
        assert optimizer is not None
        for group in optimizer.param_groups:
            for param in group["params"]:
                if param.requires_grad and param not in self._handles:
                    self._handles[param] = param.register_post_accumulate_grad_hook(self._hook)

    def disarm(self) -> None:
        """Removes all hooks: gradients stay dense."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()
        self.discard()

    def discard(self) -> None:
        """Forgets every captured gradient."""
        self.captured.clear()
        self._waiting.clear()
        self._waiting_bytes = 0
        optimizer = self._optimizer()
        for arena in optimizer._arenas if optimizer is not None else ():
            arena.squares.zero_()

    def _hook(self, param: Tensor) -> None:
        optimizer = self._optimizer()
        if optimizer is None:
            self.disarm()
            return
        if _in_process_group():
            raise RuntimeError(
                "capture_gradients=True under torch.distributed is not supported yet: gradients would be captured before "
                "they are averaged over ranks. Set capture_gradients=False."
            )
        home = optimizer._slots.get(param)
        if optimizer._dirty or home is None or home[0].device != param.device or home[0].dtype != param.dtype:
            optimizer._build()  # compares all parameters: not at every hook
        if param in optimizer._slots:  # else it was taken out of its group
            self._take(optimizer, param)

    def _take(self, optimizer: SparseAdamW, param: Tensor) -> None:
        arena, tensor = optimizer._slots[param]
        grad = param.grad
        if grad is None:
            return
        if grad.layout != torch.strided:
            raise RuntimeError(f"SparseAdamW does not support sparse gradients (parameter {arena.names[tensor]!r}).")
        param.grad = None
        if arena.plan.counts[tensor]:
            if param in self._waiting:
                self.flush()
            self._waiting[param] = (grad.detach(), param in self.captured)
            self._waiting_bytes += grad.nbytes
        self.captured.add(param)
        if self._waiting_bytes >= WAITING_BYTES or param.device.type == "cpu":
            self.flush()

    def flush(self) -> None:
        """Gathers the waiting gradients: one launch for each arena, and for new and accumulating ones."""
        optimizer = self._optimizer()
        assert optimizer is not None
        calls: dict[tuple[int, bool], dict[int, Tensor]] = {}
        for param, (grad, accumulate) in self._waiting.items():
            arena, tensor = optimizer._slots[param]
            calls.setdefault((optimizer._arenas.index(arena), accumulate), {})[tensor] = grad
        self._waiting.clear()
        self._waiting_bytes = 0
        for (position, accumulate), grads in calls.items():
            first, last = min(grads), max(grads)
            nothing = grads[first].new_empty(0)
            listed = [grads.pop(tensor, nothing) for tensor in range(first, last + 1)]
            optimizer._arenas[position].gather(first, listed, accumulate)

    def pending(self) -> dict[str, Tensor]:
        """Captured gradients that no step has consumed, by parameter name: compact, in the state's dtype."""
        optimizer = self._optimizer()
        assert optimizer is not None
        if self._waiting:
            self.flush()
        homes = [optimizer._slots[param] for param in self.captured]
        return {arena.names[t]: arena.gradient_buffer()[arena.plan.arena(t)] for arena, t in homes}

    def restore(self, pending: dict[str, Tensor]) -> None:
        """Hands pending gradients to the arenas that replaced the ones they were captured in."""
        optimizer = self._optimizer()
        assert optimizer is not None
        self.captured.clear()
        for param, (arena, t) in optimizer._slots.items():
            if arena.names[t] in pending:
                arena.set_gradient(t, pending[arena.names[t]])
                self.captured.add(param)

    def take_dense(self) -> None:
        """Captures gradients that somebody put into ``param.grad`` by hand."""
        optimizer = self._optimizer()
        assert optimizer is not None
        for param in optimizer._slots:
            if param.grad is not None:
                self._take(optimizer, param)


def _in_process_group() -> bool:
    return (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    )
