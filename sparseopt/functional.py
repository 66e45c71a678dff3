"""The ops that people call: arguments are checked here, and errors say what was expected and what came.

The ops themselves are in ``torch.ops.sparseopt`` (schemas in :mod:`sparseopt._schema`); everything here also works
under ``torch.compile(fullgraph=True)``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparseopt import _backend, _schema
from sparseopt._functional_samples import PROJECTION_RANK, cross_entropy_, describe, grad_project
from sparseopt._functional_selection import select_entries

if TYPE_CHECKING:
    from sparseopt.optim.plan import IndexPlan

__all__ = [
    "PROJECTION_RANK",
    "accumulate_squares_",
    "clip_coefficient_",
    "cross_entropy_",
    "gather_grads_",
    "grad_project",
    "mask_indices",
    "mask_overlap",
    "pack_mask",
    "popcount",
    "remap_entries_",
    "scatter_values_",
    "select_entries",
    "sparse_adamw_",
    "unpack_mask",
]

_backend.load()
_ops = torch.ops.sparseopt

PARAMETER_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


# ---- masks -----------------------------------------------------------------------------------------------------------
def pack_mask(mask: Tensor) -> Tensor:
    """Packs a bool tensor to one bit per entry.

    Args:
        mask: bool, any shape, n entries in logical (row-major) order.

    Returns:
        uint8[ceil(n/8)] on the same device, little bit order: equal to ``numpy.packbits(..., bitorder="little")``.
        Unused bits of the last byte are zero.
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"pack_mask expects a bool tensor, got {describe(mask)}.")
    return _ops.pack_mask(mask)


def unpack_mask(packed: Tensor, shape: int | Sequence[int]) -> Tensor:
    """The inverse of :func:`pack_mask`: uint8[ceil(n/8)] -> bool tensor of ``shape`` (n entries)."""
    sizes = (shape,) if isinstance(shape, int) else tuple(shape)
    numel = math.prod(sizes)
    _check_packed("unpack_mask", packed, numel)
    return _ops.unpack_mask(packed.contiguous(), numel).view(sizes)


def popcount(packed: Tensor) -> Tensor:
    """Number of set bits of a uint8 tensor -> int64[] on its device."""
    _check_packed("popcount", packed, None)
    return _ops.popcount(packed.contiguous())


def mask_indices(packed: Tensor, numel: int) -> Tensor:
    """Sorted flat indices of the set bits of a packed mask of ``numel`` entries -> int32 (int64 past 2^31 entries)."""
    _check_packed("mask_indices", packed, numel)
    return _ops.mask_indices(packed.contiguous(), numel)


def mask_overlap(a: Tensor, b: Tensor) -> Tensor:
    """Sizes of the intersection and union of two packed masks of one length -> int64[2] on their device."""
    _check_packed("mask_overlap", a, None)
    _check_packed("mask_overlap", b, None)
    if a.numel() != b.numel() or a.device != b.device:
        raise ValueError(
            f"mask_overlap expects two masks of one length on one device, got {describe(a)} and {describe(b)}."
        )
    return _ops.mask_overlap(a.contiguous(), b.contiguous())


# ---- gather and step -------------------------------------------------------------------------------------------------
def gather_grads_(
    compact: Tensor, grads: Sequence[Tensor], plan: IndexPlan, *, first_tensor: int = 0, accumulate: bool = False,
    squares: Tensor | None = None,
) -> None:  # fmt: skip
    """Gathers the active entries of dense gradients into a compact buffer, in one call for all tensors.

    Args:
        compact: fp32[N] (fp64 for fp64 gradients), N = ``plan.active``; written in place. Entries of tensors without a
            gradient are left as they are.
        grads: gradients of the plan's tensors ``first_tensor ..``, contiguous; an empty tensor means "none".
        plan: where the active entries are.
        first_tensor: the plan's tensor that ``grads[0]`` belongs to.
        accumulate: add to ``compact`` (micro-batches) instead of overwriting.
        squares: like ``compact``, ``plan.squares_per_chunk`` for each row of ``plan.chunks``: their sum becomes the sum
            of squares of what ``compact`` then holds of that row; rows of tensors without a gradient are left alone.
    """
    if not 0 <= first_tensor <= first_tensor + len(grads) <= plan.tensors:
        raise ValueError(
            f"gather_grads_ got gradients for tensors {first_tensor}..{first_tensor + len(grads)} of a plan of {plan.tensors}."
        )
    if compact.dim() != 1 or compact.numel() != plan.active or not compact.is_contiguous():
        raise ValueError(f"compact must be a contiguous vector of {plan.active} entries, got {describe(compact)}.")
    _check_tensors("gradient", grads, plan, first_tensor)
    chunks = plan.chunks
    per_chunk = plan.squares_per_chunk
    if squares is not None and (squares.shape != (len(chunks) * per_chunk,) or squares.dtype != compact.dtype):
        raise ValueError(f"squares must be {compact.dtype}[{len(chunks) * per_chunk}], got {describe(squares)}.")
    if len(grads) != plan.tensors:
        first, last = plan.first_chunk[first_tensor], plan.first_chunk[first_tensor + len(grads)]
        chunks = chunks[first:last]
        squares = None if squares is None else squares[first * per_chunk : last * per_chunk]
    _ops.gather_grads_(compact, list(grads), plan.indices, chunks, first_tensor, accumulate, plan.run, squares)


def clip_coefficient_(
    squares: Tensor, max_norm: float, *, norm: Tensor, multiplier: Tensor, skip: Tensor,
    inverse_scale: Tensor | None = None, found_inf: Tensor | None = None,
) -> None:  # fmt: skip
    """Norm of the gradients and what clipping multiplies them by, without waiting for the device.

    Args:
        squares: fp32 or fp64, any length: sums of squares that :func:`gather_grads_` left.
        max_norm: the norm to clip to; ``inf`` measures only.
        norm, multiplier, skip: fp32[], written: the norm (after ``inverse_scale``), ``min(1, max_norm / (norm + 1e-6))``
            times ``inverse_scale``, and 1 where the norm is not finite or ``found_inf`` is set, else 0.
        inverse_scale: fp32[], 1 / loss scale.
        found_inf: fp32[], nonzero: an overflow was found elsewhere.
    """
    if squares.dim() != 1 or squares.dtype not in (torch.float32, torch.float64) or not squares.is_contiguous():
        raise ValueError(f"squares must be a contiguous fp32 or fp64 vector, got {describe(squares)}.")
    for name, value in {
        "norm": norm, "multiplier": multiplier, "skip": skip, "inverse_scale": inverse_scale, "found_inf": found_inf,
    }.items():  # fmt: skip
        if value is not None and (value.numel() != 1 or value.dtype != torch.float32 or value.device != squares.device):
            raise ValueError(f"{name} must be one fp32 number on {squares.device}, got {describe(value)}.")
    _ops.clip_coefficient_(squares, max_norm, inverse_scale, found_inf, norm, multiplier, skip)


def scatter_values_(params: Sequence[Tensor], values: Tensor, indices: Tensor, chunks: Tensor, *, run: int = 1) -> None:
    """Writes values to given entries of a list of tensors, bit by bit, in one call: the inverse of gathering.

    Args:
        params: T tensors of one dtype (fp32, bf16, fp16 or fp64) and device, contiguous, written in place; an empty
            tensor is left out. No two may overlap.
        values: [N] of that dtype, in arena order.
        indices: int16 or int32 offsets, and
        chunks: int64[C, 6], the chunk table (:mod:`sparseopt._schema`), as an ``IndexPlan`` has them. That they stay
            within the tensors is not checked.
        run: as in the plan; 1 is always right.
    """
    dtypes = {t.dtype for t in params if t.numel()}
    if len(dtypes) > 1 or not dtypes <= set(PARAMETER_DTYPES):
        raise TypeError(
            f"expected parameters of one dtype among fp32, bf16, fp16 and fp64, got {sorted(map(str, dtypes))}."
        )
    dtype = next(iter(dtypes), values.dtype)
    if values.dim() != 1 or values.dtype != dtype or not values.is_contiguous():
        raise ValueError(f"values must be a contiguous vector of {dtype}, got {describe(values)}.")
    for position, tensor in enumerate(params):
        if tensor.numel() and (tensor.device != values.device or not tensor.is_contiguous()):
            raise ValueError(f"parameter {position} must be contiguous on {values.device}, got {describe(tensor)}.")
    if indices.dtype not in (torch.int16, torch.int32) or indices.dim() != 1 or indices.device != values.device:
        raise ValueError(f"indices must be an int16 or int32 vector on {values.device}, got {describe(indices)}.")
    if chunks.dim() != 2 or chunks.shape[1] != 6 or chunks.dtype != torch.int64 or chunks.device != values.device:
        raise ValueError(f"chunks must be int64[C, 6] on {values.device}, got {describe(chunks)}.")
    _ops.scatter_values_(list(params), values, indices, chunks, run)


def remap_entries_(targets: Sequence[Tensor], sources: Sequence[Tensor], plan: IndexPlan, old: IndexPlan) -> None:
    """Moves values of active entries from the arena of one plan to that of another, bit by bit, all tensors in one call.

    Args:
        targets: vectors [N] in the order of ``plan``, contiguous, written in place; entries that ``old`` lacks stay as
            they are. None may overlap a source.
        sources: as many vectors [M] in the order of ``old``, each of its target's dtype (1 to 8 bytes a value).
        plan: where the entries are now.
        old: where they were; of the same tensors.
    """
    if len(targets) != len(sources):
        raise ValueError(f"expected as many sources as targets, {len(targets)}, got {len(sources)}.")
    if plan.numels != old.numels:
        raise ValueError("the two plans must be of the same tensors.")
    for position, (target, source) in enumerate(zip(targets, sources, strict=True)):
        for what, tensor, where in (("target", target, plan), ("source", source, old)):
            if tensor.shape != (where.active,) or not tensor.is_contiguous() or tensor.device != plan.indices.device:
                raise ValueError(
                    f"{what} {position} must be a contiguous vector of {where.active} values on {plan.indices.device}, got "
                    f"{describe(tensor)}."
                )
        if target.dtype != source.dtype or target.element_size() > 8:
            raise TypeError(f"source {position} must be of its target's dtype {target.dtype}, got {source.dtype}.")
    _ops.remap_entries_(list(targets), list(sources), plan.indices, plan.chunks, old.indices, old.chunks)


def accumulate_squares_(
    stored: Sequence[Tensor],
    grads: Sequence[Tensor],
    weight: float,
    *,
    decay: float | Tensor | None = None,
    inverse: Tensor | None = None,
) -> None:
    """Adds the weighted squares of gradients to accumulators, all tensors in one call, without waiting for the device::

        stored <- stored * decay + ((g * inverse) * weight) * (g * inverse)

    Each operation is rounded, in this order: every backend gives the same bits. The product with ``decay`` is fp32, the
    rest too, or fp64 for fp64 gradients.

    Args:
        stored: T accumulators, fp32, contiguous, on one device, written in place. No two may overlap.
        grads: T gradients of their sizes, of one dtype (fp32, bf16, fp16 or fp64), on that device; one that is not
            contiguous is copied. An empty one means "none": its accumulator decays only.
        weight: of the squares; rounded to fp32. May change at every call.
        decay: what the accumulators are multiplied by in the same pass, a number or fp32[] on the device.
        inverse: fp32[] on the device, what gradients are multiplied by (1 / loss scale; 0 after an overflow). With it,
            entries that are not finite count as 0.
    """
    if len(stored) != len(grads):
        raise ValueError(f"accumulate_squares_ got {len(grads)} gradients for {len(stored)} accumulators.")
    if not stored:
        return
    device = stored[0].device
    dtypes = {grad.dtype for grad in grads if grad.numel()}
    if len(dtypes) > 1 or not dtypes <= set(PARAMETER_DTYPES):
        raise TypeError(
            f"expected gradients of one dtype among fp32, bf16, fp16 and fp64, got {sorted(map(str, dtypes))}."
        )
    for position, (squares, grad) in enumerate(zip(stored, grads, strict=True)):
        if squares.dtype != torch.float32 or squares.device != device or not squares.is_contiguous():
            raise ValueError(f"accumulator {position} must be contiguous fp32 on {device}, got {describe(squares)}.")
        if grad.numel() and (grad.numel() != squares.numel() or grad.device != device):
            raise ValueError(
                f"gradient {position} must have {squares.numel()} entries on {device}, got {describe(grad)}."
            )
    if isinstance(decay, float):
        decay = torch.full((), decay, dtype=torch.float32, device=device)
    for name, value in {"decay": decay, "inverse": inverse}.items():
        if value is not None and (value.dim() or value.dtype != torch.float32 or value.device != device):
            raise ValueError(f"{name} must be one fp32 number on {device}, got {describe(value)}.")
    _ops.accumulate_squares_(list(stored), [grad.contiguous() for grad in grads], float(weight), decay, inverse)


def sparse_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor] | Tensor,
    plan: IndexPlan,
    *,
    groups: Tensor,
    hyper: Tensor,
    steps: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None = None,
    residual: Tensor | None = None,
    master: Tensor | None = None,
    cohorts: Tensor | None = None,
    births: Tensor | None = None,
    multiplier: Tensor | None = None,
    skip: Tensor | None = None,
    follow: bool = False,
) -> None:
    """One fused AdamW step on the active entries of all tensors; every other entry stays bit-identical.

    Args:
        params: the plan's T tensors (one dtype: fp32, bf16, fp16 or fp64; contiguous), updated in place; an empty tensor
            means "no gradient this time": nothing of that tensor changes, its step included.
        grads: dense gradients like ``params``, or the compact fp32[N] buffer that :func:`gather_grads_` filled.
        plan: where the active entries are (N entries).
        groups: int32[T], the row of ``hyper`` of each tensor.
        hyper: float64[G, 8], columns :data:`sparseopt._schema.HYPER_COLUMNS`.
        steps: fp32[T], steps taken so far; incremented.
        exp_avg, exp_avg_sq: first and second moments, fp32[N] (fp64[N] for fp64 parameters).
        max_exp_avg_sq: the same for AMSGrad; needed where a group's ``amsgrad`` is 1.
        residual: int16[N], master weights of bf16/fp16 parameters as what the weights lack of them
            (:func:`sparseopt.reference.join_master`).
        master: fp32[N], master weights as a copy; then the weights are written, not read. At most one of the two.
        cohorts, births: uint8[N] and fp32[T, K]: entry i became active when its tensor had taken
            ``births[tensor, cohorts[i]]`` steps; without them every entry is as old as its tensor's step.
        multiplier: fp32[], scales the gradients (clip coefficient, 1 / loss scale).
        skip: fp32[], nonzero: nothing changes (overflow).
        follow: entries of ``master`` that no longer round to their weight take the weight first: somebody has written it.
    """
    if len(params) != plan.tensors:
        raise ValueError(f"sparse_adamw_ got {len(params)} parameters for a plan of {plan.tensors} tensors.")
    _check_tensors("parameter", params, plan, 0)
    dense, compact = ([], grads) if isinstance(grads, Tensor) else (list(grads), None)
    if compact is None:
        if len(dense) != len(params):
            raise ValueError(f"sparse_adamw_ got {len(dense)} gradients for {len(params)} parameters.")
        for position, (param, grad) in enumerate(zip(params, dense, strict=True)):
            if grad.numel() != param.numel() or grad.dtype != param.dtype or not grad.is_contiguous():
                raise ValueError(
                    f"gradient {position} must be contiguous with {param.numel()} entries of {param.dtype}, "
                    f"got {describe(grad)}."
                )
    state_dtype = torch.float64 if any(p.dtype == torch.float64 for p in params) else torch.float32
    for name, buffer, dtype in (
        ("compact gradients", compact, state_dtype),
        ("exp_avg", exp_avg, state_dtype),
        ("exp_avg_sq", exp_avg_sq, state_dtype),
        ("max_exp_avg_sq", max_exp_avg_sq, state_dtype),
        ("residual", residual, torch.int16),
        ("master", master, torch.float32),
        ("cohorts", cohorts, torch.uint8),
    ):
        if buffer is not None and (
            buffer.shape != (plan.active,) or buffer.dtype != dtype or not buffer.is_contiguous()
        ):
            raise ValueError(f"{name} must be a contiguous {dtype}[{plan.active}], got {describe(buffer)}.")
    if steps.shape != (plan.tensors,) or steps.dtype != torch.float32:
        raise ValueError(f"steps must be float32[{plan.tensors}], got {describe(steps)}.")
    if groups.shape != (plan.tensors,) or groups.dtype != torch.int32:
        raise ValueError(f"groups must be int32[{plan.tensors}], got {describe(groups)}.")
    if hyper.dim() != 2 or hyper.shape[1] != len(_schema.HYPER_COLUMNS) or hyper.dtype != torch.float64:
        raise ValueError(f"hyper must be float64[G, {len(_schema.HYPER_COLUMNS)}], got {describe(hyper)}.")
    if (cohorts is None) != (births is None):
        raise ValueError("cohorts and births come together.")
    if residual is not None and master is not None:
        raise ValueError("master weights are kept as residual or as master, not as both.")
    if (residual is not None or master is not None) and any(
        p.dtype not in (torch.bfloat16, torch.float16) for p in params
    ):
        raise ValueError("residual and master hold the master weights of bf16 and fp16 parameters only.")
    _ops.sparse_adamw_(
        list(params), dense, compact, plan.indices, plan.chunks, groups, hyper, steps, exp_avg, exp_avg_sq,
        max_exp_avg_sq, residual, master, cohorts, births, multiplier, skip, plan.run, follow,
    )  # fmt: skip


# ---- checks ----------------------------------------------------------------------------------------------------------
def _check_packed(function: str, packed: Tensor, numel: int | None) -> None:
    if not isinstance(packed, Tensor) or packed.dtype != torch.uint8 or packed.dim() != 1:
        raise TypeError(f"{function} expects a packed mask, uint8[ceil(n/8)], got {describe(packed)}.")
    if numel is not None and packed.numel() != (numel + 7) // 8:
        raise ValueError(
            f"{function} expects {(numel + 7) // 8} bytes for a mask of {numel} entries, got {packed.numel()} bytes."
        )


def _check_tensors(what: str, tensors: Sequence[Tensor], plan: IndexPlan, first: int) -> None:
    dtypes = {t.dtype for t in tensors if t.numel()}
    if len(dtypes) > 1 or not dtypes <= set(PARAMETER_DTYPES):
        raise TypeError(
            f"expected {what}s of one dtype among fp32, bf16, fp16 and fp64, got {sorted(map(str, dtypes))}."
        )
    for position, tensor in enumerate(tensors, first):
        if tensor.numel() and tensor.device != plan.indices.device:
            raise ValueError(f"{what} {position} is on {tensor.device}, its index plan on {plan.indices.device}.")
        if tensor.numel() not in (0, plan.numels[position]) or not tensor.is_contiguous():
            raise ValueError(
                f"{what} {position} must be contiguous with {plan.numels[position]} entries, got {describe(tensor)}."
            )
