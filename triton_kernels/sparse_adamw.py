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
2. `_step_kernel`, one program per row of the chunk table (at most 4096 entries, 16 per thread at 8 warps: the loads of
   all of them are in flight together, which a random gather needs). Memory bounds it: a random entry moves a 32-byte
   sector of the weights in and out, and its state once each way.

Products and sums are not contracted, and roots and quotients are correctly rounded, so that results follow PyTorch's to
the last bits. Each entry has one writer: deterministic.
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
    common_dtype,
    entry_positions,
    narrow,
    pointer_table,
    widen,
)

__all__ = ["sparse_adamw_"]

# Columns of the table of constants, ACC[T, CONSTANTS]:
# present, decay, 1 - beta1, beta2, 1 - beta2, eps, factor of the gradient, amsgrad, step size, root
CONSTANTS = tl.constexpr(10)
ROWS_PER_PROGRAM = 128  # of the tables of constants

# As sparseopt.reference.RESIDUAL_LIMIT: rounding a master always returns its weight.
RESIDUAL_LIMIT = {torch.bfloat16: 2**15 - 1, torch.float16: 2**12 - 1}


@triton.jit
def _power(base, exponent):
    """base ** exponent in float64, base in [0, 1), exponent >= 1."""
    return tl.exp(exponent * tl.log(tl.maximum(base, 1e-300)))


@triton.jit
def _store_corrections(out, age, lr, beta1, beta2, correct, valid):
    """out[0] = lr / (1 - beta1^age), out[1] = sqrt(1 - beta2^age); lr and 1 without correction."""
    age = age.to(tl.float64)
    one = 1.0 + 0 * age
    step_size = tl.where(correct, lr / (1 - _power(beta1, age)), lr)
    root = tl.where(correct, tl.sqrt(1 - _power(beta2, age)), one)
    tl.store(out, step_size.to(out.dtype.element_ty), mask=valid)
    tl.store(out + 1, root.to(out.dtype.element_ty), mask=valid)


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


@triton.jit
def _sqrt(x):
    if x.dtype == tl.float32:
        result = tl.sqrt_rn(x)
    else:
        result = tl.sqrt(x)  # float64: correctly rounded already
    return result


@triton.jit
def _divide(x, y):
    if x.dtype == tl.float32:
        result = tl.div_rn(x, y)
    else:
        result = x / y
    return result


@triton.jit(do_not_specialize=["cohort_count"])
def _step_kernel(
    param_addresses,  # int64 [T], addresses
    grad_addresses,  # int64 [T], addresses, or None
    compact,  # ACC [N] or None
    indices,  # int32
    chunks,  # int64 [C, 6]
    constants,  # ACC [T, CONSTANTS]
    corrections,  # ACC [T, K, 2] or None
    exp_avg,  # ACC [N]
    exp_avg_sq,  # ACC [N]
    max_exp_avg_sq,  # ACC [N] or None
    residual,  # int16 [N] or None
    cohorts,  # uint8 [N] or None
    cohort_count,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    RESIDUAL_LIMIT: tl.constexpr,
    BF16_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = chunks + tl.program_id(0).to(tl.int64) * 6
    tensor = tl.load(row)
    c = constants + tensor * CONSTANTS
    if tl.load(c) != 0:  # has a gradient, and the step is not skipped
        ACC: tl.constexpr = constants.dtype.element_ty
        k = tl.arange(0, BLOCK)
        valid = k < tl.load(row + 3)
        entry = tl.load(row + 2) + k  # int64 [BLOCK]
        positions = entry_positions(row, indices, k, valid)

        weights = tl.load(param_addresses + tensor).to(tl.pointer_type(PARAM)) + positions
        w = widen(tl.load(weights, mask=valid, other=0), ACC)
        if compact is not None:
            g = tl.load(compact + entry, mask=valid, other=0)
        else:
            grad = tl.load(grad_addresses + tensor).to(tl.pointer_type(GRAD))
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
            root = tl.load(pair + 1, mask=valid, other=1)
        else:
            step_size = tl.load(c + 8)
            root = tl.load(c + 9) + tl.zeros([BLOCK], ACC)
        w = w - step_size * _divide(m, _divide(_sqrt(second), root) + tl.load(c + 5))

        tl.store(exp_avg + entry, m, mask=valid)
        tl.store(exp_avg_sq + entry, v, mask=valid)
        rounded = narrow(w, PARAM, BF16_BITS)
        tl.store(weights, rounded, mask=valid)
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
    cohorts: Tensor | None,
    births: Tensor | None,
    multiplier: Tensor | None,
    skip: Tensor | None,
) -> None:
    """Launches the step; arguments as in :mod:`sparseopt._schema`. Never waits for the device."""
    dtype = common_dtype("parameters", params)
    if dtype is None:
        return
    grad_dtype = common_dtype("gradients", grads) or dtype
    device = exp_avg.device
    tensors = len(params)
    if compact_grad is None and [g.numel() for g in grads] != [p.numel() for p in params]:
        raise ValueError("gradients must match their parameters: one of as many entries for each, or a compact buffer.")
    with torch.cuda.device_of(exp_avg):
        # Absent tensors have address 0 in both tables.
        param_table = pointer_table(params, device)
        grad_table = pointer_table(grads, device) if compact_grad is None else None
        constants = exp_avg.new_empty((tensors, CONSTANTS.value))
        _constants_kernel[(triton.cdiv(tensors, ROWS_PER_PROGRAM),)](
            param_table,
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
        _step_kernel[(len(chunks),)](
            param_table,
            grad_table,
            compact_grad,
            indices,
            chunks,
            constants,
            corrections,
            exp_avg,
            exp_avg_sq,
            max_exp_avg_sq,
            residual,
            cohorts,
            cohort_count,
            PARAM=TL_DTYPES[dtype],
            GRAD=TL_DTYPES[grad_dtype],
            RESIDUAL_LIMIT=RESIDUAL_LIMIT.get(dtype, 0),
            BF16_BITS=INTERPRET and dtype == torch.bfloat16,
            BLOCK=CHUNK,
            enable_fp_fusion=False,
            num_warps=8,
        )
