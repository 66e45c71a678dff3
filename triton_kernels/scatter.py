# mypy: disable-error-code="no-untyped-def"
"""scatter_values_: param[position of the entry] = values[entry], all tensors of one dtype in one launch.

params: T tensors of one dtype, an empty one is left out; values: [N] of that dtype, arena order.

One program takes up to 1024 entries of a row of the chunk table, as in `gather.py`, whose inverse this is: 64-byte pieces
touched are the cost. Values are moved as integers of the same size, so that every bit arrives (NaN payloads, -0,
subnormals) and one compiled kernel serves bf16 and fp16. Each entry has one writer: deterministic as long as no two
tensors overlap.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseopt.triton_kernels.common import CHUNK, address_of, block_of_entries, describe

__all__ = ["scatter_values_"]

BLOCK = 1024
BITS = {2: (torch.int16, tl.int16), 4: (torch.int32, tl.int32), 8: (torch.int64, tl.int64)}


@triton.jit
def _scatter_kernel(
    addresses,  # int64 [T]; not `params`: the generated launcher has a local of that name
    values,  # VALUE [N]
    indices,  # int16 or int32
    chunks,  # int64 [C, 6]
    VALUE: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,  # per row of the chunk table
):
    program = tl.program_id(0)
    row = chunks + (program // BLOCKS).to(tl.int64) * 6
    tensor = tl.load(row)
    if tl.load(addresses + tensor) != 0:
        param = address_of(addresses, tensor, VALUE, RUN)
        entries, positions, valid = block_of_entries(program % BLOCKS, row, indices, RUN, BLOCK)
        tl.store(param + positions, tl.load(values + entries, mask=valid, other=0), mask=valid)


def scatter_values_(params: Sequence[Tensor], values: Tensor, indices: Tensor, chunks: Tensor, run: int) -> None:
    """Launches the scatter; arguments as in :mod:`sparseopt._schema`."""
    found = describe("parameters", params, values.device)
    if found is None or not len(chunks):
        return
    if values.dtype != found.dtype or not values.is_contiguous():
        raise ValueError(f"values must be contiguous and of the parameters' dtype {found.dtype}, got {values.dtype}.")
    integer, kind = BITS[values.element_size()]
    with torch.cuda.device_of(values):
        blocks = CHUNK[indices.dtype] // BLOCK
        _scatter_kernel[(len(chunks) * blocks,)](
            found.table,
            values.view(integer),
            indices,
            chunks,
            VALUE=kind,
            RUN=run if found.aligned else 1,
            BLOCK=BLOCK,
            BLOCKS=blocks,
            num_warps=8,
        )
