"""Gradient capture: the active entries of each gradient are gathered as backward produces it, and the rest is freed.

A hook runs after autograd has accumulated a parameter's gradient: it adds the active entries to a compact fp32 buffer and
drops ``param.grad``, so that dense gradients of different parameters never exist at the same time. Every call accumulates
(reentrant checkpointing fires once per segment, tied weights once, micro-batches once each); ``step()`` consumes.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sparseopt.optim.sparse_adamw import SparseAdamW

__all__ = ["GradientCapture"]


class GradientCapture:
    """The hooks of one optimizer and which parameters have captured gradients since the last step."""

    def __init__(self, optimizer: SparseAdamW) -> None:
        # The parameters own the hooks; a strong reference would keep a discarded optimizer alive with the model.
        self._optimizer = weakref.ref(optimizer)
        self._handles: dict[Tensor, torch.utils.hooks.RemovableHandle] = {}
        self.captured: set[Tensor] = set()
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
        self.captured.clear()

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
        if arena.plan.counts[tensor]:
            arena.gather(tensor, grad.detach(), accumulate=param in self.captured)
        param.grad = None
        self.captured.add(param)

    def pending(self) -> dict[str, Tensor]:
        """Captured gradients that no step has consumed, by parameter name: compact, in the state's dtype."""
        optimizer = self._optimizer()
        assert optimizer is not None
        homes = [optimizer._slots[param] for param in self.captured]
        return {arena.names[t]: arena.gradient_buffer()[arena.plan.arena(t)] for arena, t in homes}

    def restore(self, pending: dict[str, Tensor]) -> None:
        """Hands pending gradients to the arenas that replaced the ones they were captured in."""
        optimizer = self._optimizer()
        assert optimizer is not None
        self.captured.clear()
        for param, (arena, t) in optimizer._slots.items():
            if arena.names[t] in pending:
                arena.gradient_buffer()[arena.plan.arena(t)] = pending[arena.names[t]].to(arena.device)
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
