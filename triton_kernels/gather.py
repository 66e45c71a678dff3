# mypy: disable-error-code="no-untyped-def"
"""gather_grads_: compact[entry] (+)= grad[position of the entry], all tensors in one launch.

compact: fp32[N] (fp64[N] for fp64 gradients), arena order; grads: T tensors of one dtype, an empty one is left out.

One program per row of the chunk table (at most 4096 entries). A row's loads are all in flight together: 16 per thread
at 8 warps, enough to hide the latency of a random gather without spilling. Entries of a random mask lie on different
64-byte lines, so lines touched are the cost; aligned runs read whole lines. Each entry has one writer: deterministic.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseopt.triton_kernels.common import CHUNK, TL_DTYPES, common_dtype, entry_positions, pointer_table, widen

__all__ = ["gather_grads_"]


@triton.jit(do_not_specialize=["tensor_offset"])
def _gather_kernel(
    compact,  # ACC [N]
    grads,  # int64 [T], addresses
    indices,  # int32
    chunks,  # int64 [C, 6]
    tensor_offset,
    ACCUMULATE: tl.constexpr,
    GRAD: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = chunks + tl.program_id(0).to(tl.int64) * 6
    address = tl.load(grads + (tl.load(row) - tensor_offset))
    if address != 0:
        grad = address.to(tl.pointer_type(GRAD))
        k = tl.arange(0, BLOCK)
        valid = k < tl.load(row + 3)
        positions = entry_positions(row, indices, k, valid)
        values = widen(tl.load(grad + positions, mask=valid, other=0), ACC)
        out = compact + tl.load(row + 2) + k
        if ACCUMULATE:
            values += tl.load(out, mask=valid, other=0)
        tl.store(out, values, mask=valid)


def gather_grads_(
    compact: Tensor, grads: Sequence[Tensor], indices: Tensor, chunks: Tensor, tensor_offset: int, accumulate: bool
) -> None:
    """Launches the gather; arguments as in :mod:`sparseopt._schema`."""
    dtype = common_dtype("gradients", grads)
    if dtype is None or not len(chunks):
        return
    with torch.cuda.device_of(compact):
        table = pointer_table(grads, compact.device)
        _gather_kernel[(len(chunks),)](
            compact,
            table,
            indices,
            chunks,
            tensor_offset,
            ACCUMULATE=accumulate,
            GRAD=TL_DTYPES[dtype],
            ACC=TL_DTYPES[compact.dtype],
            BLOCK=CHUNK,
            num_warps=8,
        )
