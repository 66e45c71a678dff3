# mypy: disable-error-code="no-untyped-def"
"""sparse_adamw_: one AdamW step (decoupled weight decay) on the active entries of all tensors, in two launches.

    w <- w * (1 - lr * weight_decay)
    m <- m + (1 - beta1) * (g - m);   v <- beta2 * v + (1 - beta2) * g * g
    w <- w - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)          t: age of the entry

params, grads: T tensors of one dtype each; moments ACC[N] in arena order, ACC = fp32 (fp64 for fp64 parameters);
residual int16[N]; hyper float64[G, 8]; steps fp32[T]; cohorts uint8[N]; births fp32[T, K].

1. `_constants_kernel`, one lane per tensor: counts the step and turns the tensor's hyper-parameters into the constants
   of this step, in float64. lr, step, clip coefficient and the overflow flag stay on the device: nothing is read back
   and nothing is compiled again when they change. With cohorts, `_corrections_kernel` (one lane per tensor and cohort)
   makes the step sizes and roots of each age.
2. `_step_kernel`, several programs per row of the chunk table. Memory bounds it: a random entry moves a 64-byte piece of
   the weights out (and of weights and gradients in), and its state once each way. One entry per thread measured best for
   single entries: more warps hide the latency of a gather better than more loads per thread. Groups of RUN consecutive
   entries are moved 16 bytes at a time. A DRAM piece that is written in part is read first by the memory itself, so a
   kernel that also reads the weights (residual) pays for that piece twice; a master copy saves the second read.

Products and sums are not contracted; roots and quotients of fp32 have the hardware's error of at most 2 units in the last
place, of the update, not of the weight. Each entry has one writer: deterministic.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseopt.triton_kernels.common import (
    CHUNK,
    INTERPRET,
    TL_DTYPES,
    address_of,
    block_of_entries,
    describe,
    narrow,
    widen,
)

__all__ = ["sparse_adamw_"]

# Columns of the table of constants, ACC[T, CONSTANTS]:
# present, decay, 1 - beta1, beta2, 1 - beta2, eps, factor of the gradient, amsgrad, step size, 1 / root
CONSTANTS = tl.constexpr(10)
ROWS_PER_PROGRAM = 128  # of the tables of constants
# Single entries per program at 8 warps, by the dtype of the offsets: at low density, where int32 is used, programs that
# give every entry to two threads hide a little more latency. The interpreter's time goes by programs.
ENTRIES = {torch.int16: 512, torch.int32: 1024} if INTERPRET else {torch.int16: 256, torch.int32: 128}
RUN_ENTRIES = 1024  # of runs per program

# As sparseopt.reference.RESIDUAL_LIMIT: rounding a master always returns its weight.
RESIDUAL_LIMIT = {torch.bfloat16: 2**15 - 1, torch.float16: 2**12 - 1}


@triton.jit
def _power(base, exponent):
    """base ** exponent in float64, base in [0, 1), exponent >= 1."""
    return tl.exp(exponent * tl.log(tl.maximum(base, 1e-300)))


@triton.jit
def _store_corrections(out, age, lr, beta1, beta2, correct, valid):
    """out[0] = lr / (1 - beta1^age), out[1] = 1 / sqrt(1 - beta2^age); lr and 1 without correction."""
    age = age.to(tl.float64)
    one = 1.0 + 0 * age
    step_size = tl.where(correct, lr / (1 - _power(beta1, age)), lr)
    inverse_root = tl.where(correct, 1 / tl.sqrt(1 - _power(beta2, age)), one)
    tl.store(out, step_size.to(out.dtype.element_ty), mask=valid)
    tl.store(out + 1, inverse_root.to(out.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["tensors"])
def _constants_kernel(
    param_addresses,  # int64 [T], addresses
    steps,  # fp32 [T]
    groups,  # int32 [T]
    hyper,  # float64 [G, 8]
    multiplier,  # fp32 [] or None
    skip,  # fp32 [] or None
    constants,  # ACC [T, CONSTANTS]
    tensors,
    BLOCK: tl.constexpr,
):
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = t < tensors
    present = valid & (tl.load(param_addresses + t, mask=valid, other=0) != 0)
    if skip is not None:
        present = present & (tl.load(skip + tl.zeros([BLOCK], tl.int32)) == 0)
    step = tl.load(steps + t, mask=valid, other=0) + 1
    tl.store(steps + t, step, mask=present)

    h = hyper + tl.load(groups + t, mask=valid, other=0).to(tl.int64) * 8
    lr = tl.load(h, mask=valid, other=0)
    beta1 = tl.load(h + 1, mask=valid, other=0)
    beta2 = tl.load(h + 2, mask=valid, other=0)
    eps = tl.load(h + 3, mask=valid, other=0)
    weight_decay = tl.load(h + 4, mask=valid, other=0)
    factor = tl.where(tl.load(h + 5, mask=valid, other=0) != 0, -1.0, 1.0).to(tl.float64)
    correct = tl.load(h + 6, mask=valid, other=0) != 0
    amsgrad = tl.load(h + 7, mask=valid, other=0)
    if multiplier is not None:
        factor = factor * tl.load(multiplier).to(tl.float64)

    ACC: tl.constexpr = constants.dtype.element_ty
    c = constants + t * CONSTANTS
    tl.store(c, present.to(ACC), mask=valid)
    tl.store(c + 1, (1 - lr * weight_decay).to(ACC), mask=valid)
    tl.store(c + 2, (1 - beta1).to(ACC), mask=valid)
    tl.store(c + 3, beta2.to(ACC), mask=valid)
    tl.store(c + 4, (1 - beta2).to(ACC), mask=valid)
    tl.store(c + 5, eps.to(ACC), mask=valid)
    tl.store(c + 6, factor.to(ACC), mask=valid)
    tl.store(c + 7, amsgrad.to(ACC), mask=valid)
    _store_corrections(c + 8, step, lr, beta1, beta2, correct, valid)


@triton.jit(do_not_specialize=["cohort_count", "pairs"])
def _corrections_kernel(
    steps,  # fp32 [T], this step counted
    groups,  # int32 [T]
    hyper,  # float64 [G, 8]
    births,  # fp32 [T, K]
    corrections,  # ACC [T, K, 2]
    cohort_count,
    pairs,  # T * K
    BLOCK: tl.constexpr,
):
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = pair < pairs
    t = pair // cohort_count
    h = hyper + tl.load(groups + t, mask=valid, other=0).to(tl.int64) * 8
    lr = tl.load(h, mask=valid, other=0)
    beta1 = tl.load(h + 1, mask=valid, other=0)
    beta2 = tl.load(h + 2, mask=valid, other=0)
    correct = tl.load(h + 6, mask=valid, other=0) != 0
    age = tl.load(steps + t, mask=valid, other=1) - tl.load(births + pair, mask=valid, other=0)
    _store_corrections(corrections + pair * 2, tl.maximum(age, 1.0), lr, beta1, beta2, correct, valid)


@triton.jit(do_not_specialize=["cohort_count"])
def _step_kernel(
    param_addresses,  # int64 [T], addresses
    grad_addresses,  # int64 [T], addresses, or None
    compact,  # ACC [N] or None
    indices,  # int16 or int32
    chunks,  # int64 [C, 6]
    constants,  # ACC [T, CONSTANTS]
    corrections,  # ACC [T, K, 2] or None
    exp_avg,  # ACC [N]
    exp_avg_sq,  # ACC [N]
    max_exp_avg_sq,  # ACC [N] or None
    residual,  # int16 [N] or None
    master,  # fp32 [N] or None
    cohorts,  # uint8 [N] or None
    cohort_count,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    RESIDUAL_LIMIT: tl.constexpr,
    BF16_BITS: tl.constexpr,
    FOLLOW: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,  # per row of the chunk table
):
    program = tl.program_id(0)
    row = chunks + (program // BLOCKS).to(tl.int64) * 6
    sub = program % BLOCKS
    tensor = tl.load(row)
    c = constants + tensor * CONSTANTS
    present = tl.load(c) != 0  # has a gradient, and the step is not skipped
    if present & (sub * BLOCK < tl.load(row + 3)):
        ACC: tl.constexpr = constants.dtype.element_ty
        entry, positions, valid = block_of_entries(sub, row, indices, RUN, BLOCK)

        weights = address_of(param_addresses, tensor, PARAM, RUN) + positions
        if master is not None:
            w = tl.load(master + entry, mask=valid, other=0)
            if FOLLOW:
                there = widen(tl.load(weights, mask=valid, other=0), ACC)
                w = tl.where(widen(narrow(w, PARAM, BF16_BITS), ACC) == there, w, there)
        else:
            w = widen(tl.load(weights, mask=valid, other=0), ACC)
        if compact is not None:
            g = tl.load(compact + entry, mask=valid, other=0)
        else:
            grad = address_of(grad_addresses, tensor, GRAD, RUN)
            g = widen(tl.load(grad + positions, mask=valid, other=0), ACC)
        m = tl.load(exp_avg + entry, mask=valid, other=0)
        v = tl.load(exp_avg_sq + entry, mask=valid, other=0)
        if residual is not None:  # fp32 master: the residual counts its units in the last place
            rest = tl.load(residual + entry, mask=valid, other=0).to(tl.int32)
            w = (w.to(tl.int32, bitcast=True) + rest).to(tl.float32, bitcast=True)

        g = g * tl.load(c + 6)
        w = w * tl.load(c + 1)
        m = m + tl.load(c + 2) * (g - m)
        v = v * tl.load(c + 3) + tl.load(c + 4) * g * g
        second = v
        if max_exp_avg_sq is not None:  # noqa: SIM102 - decided when compiling; the next line when running
            if tl.load(c + 7) != 0:
                largest = tl.load(max_exp_avg_sq + entry, mask=valid, other=0)
                # NaN wins on either side, as in torch.maximum.
                second = tl.where((largest > v) | (largest != largest), largest, v)
                tl.store(max_exp_avg_sq + entry, second, mask=valid)
        if cohorts is not None:
            cohort = tl.load(cohorts + entry, mask=valid, other=0).to(tl.int64)
            pair = corrections + (tensor * cohort_count + cohort) * 2
            step_size = tl.load(pair, mask=valid, other=0)
            inverse_root = tl.load(pair + 1, mask=valid, other=1)
        else:
            step_size = tl.load(c + 8)
            inverse_root = tl.load(c + 9)
        w = w - step_size * (m / (tl.sqrt(second) * inverse_root + tl.load(c + 5)))

        tl.store(exp_avg + entry, m, mask=valid)
        tl.store(exp_avg_sq + entry, v, mask=valid)
        rounded = narrow(w, PARAM, BF16_BITS)
        tl.store(weights, rounded, mask=valid)
        if master is not None:
            tl.store(master + entry, w, mask=valid)
        if residual is not None:
            difference = w.to(tl.int32, bitcast=True) - widen(rounded, tl.float32).to(tl.int32, bitcast=True)
            difference = tl.minimum(tl.maximum(difference, -RESIDUAL_LIMIT), RESIDUAL_LIMIT)
            tl.store(residual + entry, difference.to(tl.int16), mask=valid)


def sparse_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    compact_grad: Tensor | None,
    indices: Tensor,
    chunks: Tensor,
    groups: Tensor,
    hyper: Tensor,
    steps: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    residual: Tensor | None,
    master: Tensor | None,
    cohorts: Tensor | None,
    births: Tensor | None,
    multiplier: Tensor | None,
    skip: Tensor | None,
    run: int,
    follow: bool,
) -> None:
    """Launches the step; arguments as in :mod:`sparseopt._schema`. Never waits for the device."""
    device = exp_avg.device
    found = describe("parameters", params, device)
    if found is None:
        return
    dtype = found.dtype
    dense = describe("gradients", grads, device) if compact_grad is None else None
    tensors = len(params)
    if compact_grad is None and [g.numel() for g in grads] != [p.numel() for p in params]:
        raise ValueError("gradients must match their parameters: one of as many entries for each, or a compact buffer.")
    with torch.cuda.device_of(exp_avg):
        constants = exp_avg.new_empty((tensors, CONSTANTS.value))
        _constants_kernel[(triton.cdiv(tensors, ROWS_PER_PROGRAM),)](
            found.table,
            steps,
            groups,
            hyper,
            multiplier,
            skip,
            constants,
            tensors,
            BLOCK=ROWS_PER_PROGRAM,
            enable_fp_fusion=False,
        )
        cohort_count, corrections = 0, None
        if births is not None:
            cohort_count = births.shape[1]
            corrections = exp_avg.new_empty((tensors, cohort_count, 2))
            _corrections_kernel[(triton.cdiv(births.numel(), ROWS_PER_PROGRAM),)](
                steps,
                groups,
                hyper,
                births.contiguous(),
                corrections,
                cohort_count,
                births.numel(),
                BLOCK=ROWS_PER_PROGRAM,
                enable_fp_fusion=False,
            )
        if not len(chunks):
            return
        if not (found.aligned and (dense is None or dense.aligned)):
            run = 1
        block = ENTRIES[indices.dtype] if run == 1 else RUN_ENTRIES
        blocks = CHUNK[indices.dtype] // block
        _step_kernel[(len(chunks) * blocks,)](
            found.table,
            None if dense is None else dense.table,
            compact_grad,
            indices,
            chunks,
            constants,
            corrections,
            exp_avg,
            exp_avg_sq,
            max_exp_avg_sq,
            residual,
            master,
            cohorts,
            cohort_count,
            PARAM=TL_DTYPES[dtype],
            GRAD=TL_DTYPES[dense.dtype if dense is not None else dtype],
            RESIDUAL_LIMIT=RESIDUAL_LIMIT.get(dtype, 0),
            BF16_BITS=INTERPRET and dtype == torch.bfloat16,
            FOLLOW=follow,
            RUN=run,
            BLOCK=block,
            BLOCKS=blocks,
            enable_fp_fusion=False,
            num_warps=8,
        )
