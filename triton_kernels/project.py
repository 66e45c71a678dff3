# mypy: disable-error-code="no-untyped-def"
"""grad_project: per-sample weight gradients of a linear layer, projected, without the weight gradients.

    out[b] = scale * sum_t (P g_bt) a_bt^T = scale * (G_b P^T)^T A_b

G [B, T, d_out] and P [k_o, d_out] fp32, bf16 or fp16 (P may be fp32 beside 16-bit G; both are then fp32), A [B, T, k_i],
the inputs already projected, any of the three -> fp32 [B, k_o, k_i], k_o and k_i up to 256.

One pass over G, whose bytes are the cost: B * T * d_out * element size / bandwidth (8 x 1024 x 3072 bf16: 50 MB, 17 us
at 3 TB/s). A program is a sample, a block of tokens and a range of columns of d_out: it reads its part of G once, tile by
tile against the same columns of P (from L2), keeps [tokens, k_o] in registers, multiplies it at the end with its tokens'
A, and writes a partial [k_o, k_i]; the sum of a sample's partials is a second, small launch. The product is linear in the
columns too, so long rows (a vocabulary) are split until there are some 512 programs, whatever the number of tokens;
the split depends on shapes alone. 64 tokens, 128 for k_o > 64 where shared memory holds that: more would leave too few
programs, fewer would read P more often than L2 can bear. k_o is padded to 16 or a power of two.

16-bit tiles multiply on tensor cores with fp32 sums; past k_o = 128 G is read twice. [tokens, k_o] is fp32 and its product
with A too: `ieee` for k <= 32, whose operands fit in registers, else `bf16x6` (each factor as three bf16 terms that hold
all its 24 bits; the terms left out are under 2^-24). fp32 tiles multiply as `ieee`, nothing less, 32 rows of P at a time:
wider tiles spill registers; G is then read k_o / 32 times, from L2 but for the first. No atomics, a fixed order of sums:
deterministic.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseopt.triton_kernels.common import INTERPRET, TL_DTYPES, widen

__all__ = ["grad_project"]

PROGRAMS = 512  # about four for each multiprocessor of an H100


@triton.jit(do_not_specialize=["scale", "tokens", "blocks", "splits", "k_o", "k_i"])
def _project_kernel(
    gradients,  # [B, T, columns]
    inputs,  # [B, T, k_i]
    matrix,  # [k_o, columns]
    partials,  # fp32 [B, blocks * splits, k_o, k_i]
    scale,
    tokens,  # T
    columns,  # d_out
    k_o,
    k_i,
    blocks,  # of tokens
    splits,  # of columns
    part,  # columns of one split, a multiple of 128
    gradient_batch,
    gradient_token,
    input_batch,
    input_token,
    matrix_row,
    WIDEN: tl.constexpr,  # multiply as fp32
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    K_O: tl.constexpr,
    K_I: tl.constexpr,
    OUTER: tl.constexpr,  # precision of the product with the inputs
):
    program = tl.program_id(0)
    split = program % splits
    block = program // splits
    sample = (block // blocks).to(tl.int64)
    t = (block % blocks) * TOKENS + tl.arange(0, TOKENS)
    o = tl.program_id(1) * K_O + tl.arange(0, K_O)
    token, row = t.to(tl.int64)[:, None], o.to(tl.int64)[:, None]
    is_token, is_row = (t < tokens)[:, None], (o < k_o)[:, None]
    g_rows = gradients + sample * gradient_batch + token * gradient_token
    p_rows = matrix + row * matrix_row

    first = split * part
    end = tl.minimum(first + part, columns)
    projected = tl.zeros([TOKENS, K_O], tl.float32)
    for start in range(first, end, COLUMNS):
        d = (start + tl.arange(0, COLUMNS))[None, :]
        g = tl.load(g_rows + d, mask=is_token & (d < end), other=0)  # [TOKENS, COLUMNS]
        p = tl.load(p_rows + d, mask=is_row & (d < end), other=0)  # [K_O, COLUMNS]
        if WIDEN:
            g = widen(g, tl.float32)
            p = widen(p, tl.float32)
        projected = tl.dot(g, tl.trans(p), projected, input_precision="ieee")

    transposed = tl.trans(projected * scale)
    a_rows = inputs + sample * input_batch + token * input_token
    out_rows = partials + (program.to(tl.int64) * k_o + row) * k_i
    for start in range(0, k_i, K_I):
        i = (start + tl.arange(0, K_I))[None, :]
        a = widen(tl.load(a_rows + i, mask=is_token & (i < k_i), other=0), tl.float32)  # [TOKENS, K_I]
        outer = tl.dot(transposed, a, input_precision=OUTER)
        tl.store(out_rows + i, outer, mask=is_row & (i < k_i))


class Tiles(NamedTuple):
    """What one program holds: tokens, columns of G and P, rows of P, columns of A; warps, and loads in flight."""

    tokens: int
    columns: int
    k_o: int
    k_i: int
    outer: str
    warps: int
    stages: int


def tiles_for(k_o: int, k_i: int, wide: bool, shared: int) -> Tiles:
    """Tiles for a rank, for products in fp32 (``wide``) or 16 bits, on a device with so many bytes of shared memory."""
    k_o, k_i = (max(16, triton.next_power_of_2(k)) for k in (k_o, k_i))
    if wide:
        return Tiles(64, 64 if k_o == 16 else 32, min(k_o, 32), min(k_i, 32), "ieee", 4, 3)
    if k_o <= 32 and k_i <= 32:
        return Tiles(64, 128, k_o, k_i, "ieee", 4, 3)
    if k_o <= 64:
        return Tiles(64, 64, k_o, min(k_i, 64), "bf16x6", 4, 3)
    if shared >= 200 * 1024:
        return Tiles(128, 64, 128, min(k_i, 64), "bf16x6", 8, 3)
    return Tiles(64, 64, 128, min(k_i, 32), "bf16x6", 4, 2)


@cache
def _shared_memory(device: torch.device) -> int:
    """Bytes that one program can have; 0 where nothing is compiled."""
    if INTERPRET or device.index is None:
        return 0
    return int(triton.runtime.driver.active.utils.get_device_properties(device.index)["max_shared_mem"])


def grad_project(gradients: Tensor, inputs: Tensor, matrix: Tensor, scale: float) -> Tensor:
    """Launches the partials and their sum; arguments as in :mod:`sparseopt._schema`."""
    batch, tokens, columns = gradients.shape
    k_o, k_i = matrix.shape[0], inputs.shape[2]
    for name, tensor in (("gradients", gradients), ("inputs", inputs), ("matrix", matrix)):
        # A kernel that follows a wrong stride reads anywhere, so direct callers of the op are checked as well.
        if tensor.dtype not in TL_DTYPES or tensor.dtype == torch.float64 or tensor.device != gradients.device:
            raise ValueError(f"{name} must be fp32, bf16 or fp16 on {gradients.device}, got {tensor.dtype}.")
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"{name} must have a contiguous last dimension, got strides {tensor.stride()}.")
    if inputs.shape[:2] != (batch, tokens) or matrix.shape[1] != columns:
        raise ValueError(
            f"gradients {list(gradients.shape)} fit neither inputs {list(inputs.shape)} nor matrix {list(matrix.shape)}."
        )
    if not (batch and tokens and columns and k_o and k_i):
        return gradients.new_zeros((batch, k_o, k_i), dtype=torch.float32)
    wide = gradients.dtype == torch.float32 or gradients.dtype != matrix.dtype
    chosen = tiles_for(k_o, k_i, wide, _shared_memory(gradients.device))
    rows, blocks = triton.cdiv(k_o, chosen.k_o), triton.cdiv(tokens, chosen.tokens)
    # A partial costs k_o * k_i * 4 bytes: with large ones, longer ranges.
    splits = max(1, min(PROGRAMS // (batch * blocks * rows), columns // (256 if k_o <= 32 else 1024)))
    part = triton.cdiv(triton.cdiv(columns, splits), 128) * 128
    splits = triton.cdiv(columns, part)
    partials = gradients.new_empty((batch, blocks * splits, k_o, k_i), dtype=torch.float32)
    with torch.cuda.device_of(gradients):
        _project_kernel[(batch * blocks * splits, rows)](
            gradients,
            inputs,
            matrix,
            partials,
            scale,
            tokens,
            columns,
            k_o,
            k_i,
            blocks,
            splits,
            part,
            gradients.stride(0),
            gradients.stride(1),
            inputs.stride(0),
            inputs.stride(1),
            matrix.stride(0),
            WIDEN=wide or INTERPRET,  # the interpreter has no product of bf16
            TOKENS=chosen.tokens,
            COLUMNS=chosen.columns,
            K_O=chosen.k_o,
            K_I=chosen.k_i,
            OUTER="ieee" if INTERPRET else chosen.outer,
            num_warps=chosen.warps,
            num_stages=chosen.stages,
        )
    return partials.squeeze(1) if partials.shape[1] == 1 else partials.sum(1)
