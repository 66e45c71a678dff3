# mypy: disable-error-code="no-untyped-def"
"""accumulate_squares_: stored <- stored * decay + ((g * inverse) * weight) * (g * inverse), all tensors in one launch.

stored: T tensors, fp32; grads: T tensors of one dtype and of their sizes, an empty one means "none"; decay, inverse: fp32[]
on the device, or None; weight: a number that changes with every call and is no part of what is compiled.

A program takes one range of 4096 entries: 16 per thread at 8 warps, moved 4 at a time (16 bytes; of 16-bit gradients 8, since
with 16 a thread would hold others than of the accumulators, and exchange them), so that a multiprocessor has some 190 KiB on
their way. Memory bounds it: 10 bytes an entry with 16-bit gradients. The table of ranges, int64[C, 3] with rows (tensor, range,
entries), depends on the sizes only and stays on the device. The last range of a tensor is masked, in a branch of its own: a
mask would make the loads of all others narrow.

No multiply-adds are fused: every operation is rounded, as on the CPU. Each entry has one writer: deterministic.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseopt.triton_kernels.common import TL_DTYPES, address_of, describe, kept_table, ranges_of, widen

__all__ = ["accumulate_squares_"]

BLOCK = 4096


@triton.jit
def _square_added(
    value, gradient, i, count, present, weight, decay, inverse, ACC: tl.constexpr, WHOLE: tl.constexpr
):  # fmt: skip
    """What the accumulators fp32[BLOCK] become; WHOLE: all of ``i`` are entries."""
    if decay is not None:
        value = value * tl.load(decay)
    if present:
        if WHOLE:
            loaded = tl.load(gradient + i)
        else:
            loaded = tl.load(gradient + i, mask=i < count, other=0)
        wide = widen(loaded, ACC)
        if inverse is not None:
            wide = wide * tl.load(inverse).to(ACC)
            wide = tl.where(wide - wide == 0, wide, 0.0)  # infinities and NaN leave a NaN
        value = (value.to(ACC) + (wide * weight) * wide).to(tl.float32)
    return value


@triton.jit(do_not_specialize=["weight"])
def _accumulate_kernel(
    stored,  # int64 [T], addresses
    grads,  # int64 [T], addresses
    ranges,  # int64 [C, 3]
    weight,  # fp32
    decay,  # fp32 [] or None
    inverse,  # fp32 [] or None
    GRAD: tl.constexpr,
    ACC: tl.constexpr,
    STORED_ALIGNED: tl.constexpr,  # to 16 bytes, all of them
    GRAD_ALIGNED: tl.constexpr,
    GRAD_BYTES: tl.constexpr,  # that a thread loads at a time
    BLOCK: tl.constexpr,
):
    row = ranges + tl.program_id(0).to(tl.int64) * 3
    tensor = tl.load(row)
    first = tl.load(row + 1) * BLOCK  # int64
    count = tl.load(row + 2).to(tl.int32)
    present = tl.load(grads + tensor) != 0
    squares, gradient = address_of(stored, tensor, tl.float32, 1), address_of(grads, tensor, GRAD, 1)
    # Said of the pointers: the compiler forgets what it knows of an integer when it becomes one.
    if STORED_ALIGNED:
        squares = tl.multiple_of(squares, 16)
    if GRAD_ALIGNED:
        gradient = tl.multiple_of(gradient, GRAD_BYTES)
    squares, gradient = squares + first, gradient + first
    i = tl.arange(0, BLOCK)
    if present or decay is not None:
        if count == BLOCK:
            value = tl.load(squares + i)
            value = _square_added(value, gradient, i, count, present, weight, decay, inverse, ACC, True)
            tl.store(squares + i, value)
        else:
            value = tl.load(squares + i, mask=i < count, other=0)
            value = _square_added(value, gradient, i, count, present, weight, decay, inverse, ACC, False)
            tl.store(squares + i, value, mask=i < count)


def accumulate_squares_(
    stored: Sequence[Tensor], grads: Sequence[Tensor], weight: float, decay: Tensor | None, inverse: Tensor | None
) -> None:
    """Launches the accumulation; arguments as in :mod:`sparseopt._schema`."""
    if len(stored) != len(grads):
        raise ValueError(f"expected a gradient for each of {len(stored)} accumulators, got {len(grads)}.")
    if not stored:
        return
    device = stored[0].device
    home, found = describe("accumulators", stored, device), describe("gradients", grads, device)
    if home is None:
        return
    if home.dtype != torch.float32:
        raise TypeError(f"accumulators must be fp32, got {home.dtype}.")
    sizes = tuple(squares.numel() for squares in stored)
    for position, (size, grad) in enumerate(zip(sizes, grads, strict=True)):
        if grad.numel() not in (0, size):
            raise ValueError(f"gradient {position} must have {size} entries or none, got {grad.numel()}.")
    if found is None:
        if decay is not None:
            torch._foreach_mul_(list(stored), decay)
        return
    ranges = kept_table(("ranges", BLOCK, sizes), device, lambda: ranges_of(sizes, BLOCK))
    with torch.cuda.device_of(stored[0]):
        _accumulate_kernel[(len(ranges),)](
            home.table,
            found.table,
            ranges,
            ctypes.c_float(weight).value,  # rounded once, on the host
            decay,
            inverse,
            GRAD=TL_DTYPES[found.dtype],
            ACC=tl.float64 if found.dtype == torch.float64 else tl.float32,
            STORED_ALIGNED=home.aligned,
            GRAD_ALIGNED=found.aligned,
            GRAD_BYTES=min(16, 4 * found.dtype.itemsize),
            BLOCK=BLOCK,
            num_warps=8,
            enable_fp_fusion=False,
        )
