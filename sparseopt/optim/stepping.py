"""One step of SparseAdamW: where gradients come from, clipping, and the call of the kernels for every arena.

Nothing here waits for the device: the norm, the coefficient, overflow and the learning rate stay there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparseopt import functional
from sparseopt._schema import HYPER_COLUMNS
from sparseopt._sharded import local
from sparseopt.optim import distributed
from sparseopt.optim.sharding import sum_over_shards

if TYPE_CHECKING:
    from sparseopt.optim.arena import Arena
    from sparseopt.optim.sparse_adamw import SparseAdamW

__all__ = ["take_step"]


@torch._disable_dynamo
@torch.no_grad()
def take_step(optimizer: SparseAdamW) -> None:
    optimizer._build()
    arenas, capture = optimizer._arenas, optimizer._capture
    if capture is not None:
        capture.take_dense()
        capture.flush()
        if not capture and optimizer._slots:
            raise RuntimeError(
                "SparseAdamW captured no gradient since the last step: run backward() first (was the model's "
                "forward run under no_grad, or zero_grad() called after backward()?)."
            )
    if not optimizer._agreed:
        distributed.check_agreement(optimizer)
        optimizer._agreed = True
    multiplier, skip = _loss_scale(optimizer)
    sources = [_gradients(optimizer, arena) for arena in arenas]
    if optimizer.max_grad_norm is not None and sources:
        multiplier, skip = _clip(optimizer, optimizer.max_grad_norm, multiplier, skip)
    if skip is not None:
        if optimizer._skipped is None:
            optimizer._skipped = torch.zeros_like(skip)
        optimizer._skipped = optimizer._skipped.to(skip.device)  # a loaded count comes from the CPU
        optimizer._skipped += skip
    hyper = _hyper_rows(optimizer)
    capturable = any(group["capturable"] for group in optimizer.param_groups)
    for arena, (present, grads) in zip(arenas, sources, strict=True):
        arena.set_hyper(hyper)
        arena.step(present, grads, multiplier, skip)
        if arena.mesh is not None:
            arena.count_for_empty_parts(present, skip)
        if isinstance(grads, Tensor):
            # A CUDA graph knows the buffer by its address.
            arena.forget_gradients(keep_buffer=capturable)
    if capture is not None:
        capture.consumed()


def _gradients(optimizer: SparseAdamW, arena: Arena) -> tuple[list[bool], Sequence[Tensor] | Tensor]:
    """(which tensors have a gradient, the gradients: dense, or compact when captured or clipped)."""
    capture = optimizer._capture
    if capture is not None:
        here = capture.present(arena)
        if arena.mesh is None and not capture.averaged and distributed.several_processes(optimizer):
            here = distributed.reduce_gradients(optimizer, arena, here)
        return here, arena.gradient_buffer()
    grads = []
    for name, param in zip(arena.names, arena.owners, strict=True):
        grad = None if param.grad is None else local(param.grad)
        if grad is not None and grad.layout != torch.strided:
            raise RuntimeError(f"SparseAdamW does not support sparse gradients (parameter {name!r}).")
        grads.append(arena.nothing if grad is None else grad.detach().contiguous())
    present = [param.grad is not None for param in arena.owners]
    if optimizer.max_grad_norm is None:
        return present, grads
    arena.gather(0, grads, accumulate=False)
    return present, arena.gradient_buffer()


def _clip(
    optimizer: SparseAdamW, max_norm: float, inverse_scale: Tensor | None, found_inf: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(what gradients are multiplied by, whether the step is skipped), from the norm over all active entries."""
    norm = optimizer.grad_norm_buffer()
    if optimizer._clipping is None:
        optimizer._clipping = torch.ones_like(norm), torch.zeros_like(norm)
    multiplier, skip = optimizer._clipping
    squares = [
        (arena.squares if arena.mesh is None else sum_over_shards(optimizer, arena.mesh, arena.squares)).to(norm.device)
        for arena in optimizer._arenas
    ]
    if any(arena.mesh is not None for arena in optimizer._arenas):
        squares = [part.double() for part in squares]
    functional.clip_coefficient_(
        squares[0] if len(squares) == 1 else torch.cat(squares), float(max_norm), norm=norm, multiplier=multiplier,
        skip=skip, inverse_scale=_number(inverse_scale, norm), found_inf=_number(found_inf, norm),
    )  # fmt: skip
    optimizer._norm_measured = True
    return multiplier, skip


def _hyper_rows(optimizer: SparseAdamW) -> list[tuple[float | Tensor, ...]]:
    rows = []
    for group in optimizer.param_groups:
        values = {**group, "beta1": group["betas"][0], "beta2": group["betas"][1]}
        rows.append(tuple(values[column] for column in HYPER_COLUMNS))
    return rows


def _loss_scale(optimizer: SparseAdamW) -> tuple[Tensor | None, Tensor | None]:
    """(1 / loss scale, overflow flag), which torch.amp.GradScaler leaves on the optimizer for the time of a step."""
    scale, found = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
    return (None if scale is None else scale.double().reciprocal().float()), found


def _number(value: Tensor | None, like: Tensor) -> Tensor | None:
    return None if value is None else value.detach().reshape(()).to(like)
