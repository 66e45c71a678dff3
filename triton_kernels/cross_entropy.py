# mypy: disable-error-code="no-untyped-def"
"""cross_entropy_: losses of rows of logits, and in place of the logits their gradient.

    loss_n = log(sum_v exp(x_nv)) - x_n,target;    x_nv <- exp(x_nv) / sum_v exp(x_nv) - [v = target]

logits [N, V] fp32, bf16 or fp16 with any row stride, targets int64 [N] -> losses fp32 [N]. Everything between load and
store is fp32.

One program per row: a row of 50,257 to 151,936 entries is work enough for one, and N rows are enough programs. Two passes
over blocks of 4096 entries: an online softmax (running maximum, running sum), then probabilities. 8 warps: 16 entries per
thread, loaded 8 to 16 bytes at a time where rows are aligned (V odd: narrower). Bytes are the cost: two reads and a
write, the second read mostly from L2, so about 2 * N * V * element size / bandwidth. An ignored row is only written. A
target outside the row makes its loss and gradient NaN; its address is never formed.

One writer per entry and a fixed order of sums: deterministic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseopt.triton_kernels.common import INTERPRET, TL_DTYPES, narrow, widen

__all__ = ["cross_entropy_"]

BLOCK = 4096


@triton.jit(do_not_specialize=["ignore_index"])
def _cross_entropy_kernel(
    logits,  # DTYPE [N, V], rows `stride` apart
    targets,  # int64 [N]
    losses,  # fp32 [N]
    stride,
    width,  # V
    ignore_index,
    DTYPE: tl.constexpr,
    BF16_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    entries = logits + row * stride
    target = tl.load(targets + row)
    block = tl.arange(0, BLOCK)
    if target == ignore_index:
        for first in range(0, width, BLOCK):
            tl.store(entries + first + block, tl.zeros([BLOCK], DTYPE), mask=first + block < width)
        tl.store(losses + row, 0.0)
    else:
        inside = (target >= 0) & (target < width)
        # Read here: the barriers of the reductions below lie between this and the writes of other threads.
        picked = widen(tl.load(entries + tl.where(inside, target, 0), mask=inside, other=0), tl.float32)
        highest = float("-inf")
        total = 0.0
        for first in range(0, width, BLOCK):
            x = tl.load(entries + first + block, mask=first + block < width, other=float("-inf"))
            x = widen(x, tl.float32)
            higher = tl.maximum(highest, tl.max(x, axis=0))
            # Nothing but -inf so far: any finite number keeps exp from seeing inf - inf.
            shift = tl.where(higher == float("-inf"), 0.0, higher)
            total = total * tl.exp(highest - shift) + tl.sum(tl.exp(x - shift), axis=0)
            highest = higher
        # A row of -inf alone: log(0) - -inf and 0 / 0, NaN, as torch has it.
        shift = tl.where(highest == float("-inf"), 0.0, highest)
        valid = tl.where(inside, 1.0, float("nan"))
        tl.store(losses + row, (tl.log(total) + shift - picked) * valid)
        inverse = valid / total
        for first in range(0, width, BLOCK):
            v = first + block
            x = widen(tl.load(entries + v, mask=v < width, other=float("-inf")), tl.float32)
            gradient = tl.exp(x - shift) * inverse - tl.where(v == target, 1.0, 0.0)
            tl.store(entries + v, narrow(gradient, DTYPE, BF16_BITS), mask=v < width)


def cross_entropy_(logits: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """Launches one program per row; arguments as in :mod:`sparseopt._schema`."""
    rows, width = logits.shape
    if logits.dtype not in TL_DTYPES or logits.dtype == torch.float64 or (width > 1 and logits.stride(1) != 1):
        raise ValueError(
            f"logits must be fp32, bf16 or fp16 with a contiguous last dimension, got {logits.dtype}, {logits.stride()}."
        )
    if targets.dtype != torch.int64 or targets.shape != (rows,) or targets.device != logits.device:
        raise ValueError(f"targets must be int64[{rows}] on {logits.device}, got {targets.dtype}{list(targets.shape)}.")
    losses = logits.new_empty((rows,), dtype=torch.float32)
    if rows:
        with torch.cuda.device_of(logits):
            _cross_entropy_kernel[(rows,)](
                logits,
                targets.contiguous(),
                losses,
                logits.stride(0),
                width,
                ignore_index,
                DTYPE=TL_DTYPES[logits.dtype],
                BF16_BITS=INTERPRET and logits.dtype == torch.bfloat16,
                BLOCK=BLOCK,
                num_warps=8,
            )
    return losses
