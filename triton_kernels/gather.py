# mypy: disable-error-code="no-untyped-def"
"""gather_grads_: compact[entry] (+)= grad[position of the entry], all tensors in one launch; and what clipping needs.

compact: fp32[N] (fp64[N] for fp64 gradients), arena order; grads: T tensors of one dtype, an empty one is left out.

One program takes up to 1024 entries of a row of the chunk table; their loads are all in flight together, 4 per thread at 8
warps. Entries of a random mask lie on different 64-byte pieces of memory, so pieces touched are the cost; aligned runs
read whole pieces. A program also leaves the sum of squares of what it wrote, so that the norm costs no second pass:
`clip_coefficient_` adds one number per program. Each output has one writer and
sums have a fixed order: deterministic.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseopt.triton_kernels.common import (
    CHUNK,
    TL_DTYPES,
    address_of,
    block_of_entries,
    describe,
    widen,
)

__all__ = ["clip_coefficient_", "gather_grads_"]

BLOCK = 1024  # sparseopt.optim.plan.SQUARES
CLIP_BLOCK = 8192


@triton.jit(do_not_specialize=["tensor_offset"])
def _gather_kernel(
    compact,  # ACC [N]
    grads,  # int64 [T], addresses
    indices,  # int16 or int32
    chunks,  # int64 [C, 6]
    squares,  # ACC [C * BLOCKS] or None
    tensor_offset,
    ACCUMULATE: tl.constexpr,
    GRAD: tl.constexpr,
    ACC: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,  # per row of the chunk table
):
    program = tl.program_id(0)
    row = chunks + (program // BLOCKS).to(tl.int64) * 6
    tensor = tl.load(row) - tensor_offset
    if tl.load(grads + tensor) != 0:
        grad = address_of(grads, tensor, GRAD, RUN)
        entries, positions, valid = block_of_entries(program % BLOCKS, row, indices, RUN, BLOCK)
        values = widen(tl.load(grad + positions, mask=valid, other=0), ACC)
        out = compact + entries
        if ACCUMULATE:
            values += tl.load(out, mask=valid, other=0)
        tl.store(out, values, mask=valid)
        if squares is not None:
            tl.store(squares + program, tl.sum(tl.reshape(values * values, [BLOCK]), axis=0))


def gather_grads_(
    compact: Tensor, grads: Sequence[Tensor], indices: Tensor, chunks: Tensor, tensor_offset: int, accumulate: bool,
    run: int, squares: Tensor | None,
) -> None:  # fmt: skip
    """Launches the gather; arguments as in :mod:`sparseopt._schema`."""
    found = describe("gradients", grads, compact.device)
    if found is None or not len(chunks):
        return
    with torch.cuda.device_of(compact):
        blocks = CHUNK[indices.dtype] // BLOCK
        _gather_kernel[(len(chunks) * blocks,)](
            compact,
            found.table,
            indices,
            chunks,
            squares,
            tensor_offset,
            ACCUMULATE=accumulate,
            GRAD=TL_DTYPES[found.dtype],
            ACC=TL_DTYPES[compact.dtype],
            RUN=run if found.aligned else 1,
            BLOCK=BLOCK,
            BLOCKS=blocks,
            num_warps=8,
        )


@triton.jit(do_not_specialize=["size", "max_norm"])
def _clip_kernel(
    squares,  # ACC [size]
    size,
    max_norm,
    inverse_scale,  # fp32 [] or None
    found_inf,  # fp32 [] or None
    norm,  # fp32 [], and the next two
    multiplier,
    skip,
    BLOCK: tl.constexpr,
):
    i = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float64)
    for first in range(0, size, BLOCK):
        sums += tl.load(squares + first + i, mask=first + i < size, other=0).to(tl.float64)
    total = tl.sqrt(tl.sum(sums, axis=0))
    scale = 1.0 + 0 * total
    if inverse_scale is not None:
        scale = tl.load(inverse_scale).to(tl.float64)
    total = (total * scale).to(tl.float32)
    tl.store(norm, total)
    coefficient = max_norm / (total.to(tl.float64) + 1e-6)
    tl.store(multiplier, (tl.minimum(coefficient, 1.0) * scale).to(tl.float32))
    finite = total - total == 0  # inf and NaN leave a NaN
    overflow = tl.where(finite, 0.0, 1.0)
    if found_inf is not None:
        overflow = tl.where(tl.load(found_inf) != 0, 1.0, overflow)
    tl.store(skip, overflow)


def clip_coefficient_(
    squares: Tensor, max_norm: float, inverse_scale: Tensor | None, found_inf: Tensor | None, norm: Tensor,
    multiplier: Tensor, skip: Tensor,
) -> None:  # fmt: skip
    """Launches the reduction, one program; arguments as in :mod:`sparseopt._schema`."""
    with torch.cuda.device_of(squares):
        _clip_kernel[(1,)](
            squares,
            squares.numel(),
            float(max_norm),
            inverse_scale,
            found_inf,
            norm,
            multiplier,
            skip,
            BLOCK=CLIP_BLOCK,
            num_warps=16,
        )
