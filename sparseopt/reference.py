"""Every op in plain PyTorch: the oracle of the tests, and the backend of last resort.

Written for clarity; shapes and the chunk table are described in :mod:`sparseopt._schema`. Runs on any device and dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sparseopt._schema import mask_begins

__all__ = [
    "IMPLEMENTATIONS",
    "RESIDUAL_LIMIT",
    "accumulate_squares_",
    "arena_positions",
    "clip_coefficient_",
    "cross_entropy_",
    "gather_grads_",
    "grad_project",
    "join_master",
    "mask_indices",
    "mask_overlap",
    "pack_mask",
    "popcount",
    "random_keys",
    "remap_entries_",
    "scatter_values_",
    "select_entries",
    "sparse_adamw_",
    "split_master",
    "unpack_mask",
]

INT32_NUMEL = 2**31

# Largest residual, in units of the last place of fp32: below half a unit in the last place of the 16-bit dtype, so that
# rounding `join_master(p, r)` always returns p, whatever r is left over from an earlier p.
RESIDUAL_LIMIT = {torch.bfloat16: 2**15 - 1, torch.float16: 2**12 - 1}


# ---- masks -----------------------------------------------------------------------------------------------------------
def pack_mask(mask: Tensor) -> Tensor:
    """bool (any shape, n entries) -> uint8[ceil(n/8)]."""
    flat = mask.reshape(-1)
    padded = flat.new_zeros(((flat.numel() + 7) // 8) * 8)
    padded[: flat.numel()] = flat
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=mask.device)
    return (padded.view(-1, 8).to(torch.uint8) * weights).sum(dim=1, dtype=torch.uint8)


def unpack_mask(packed: Tensor, numel: int) -> Tensor:
    """uint8[ceil(n/8)] -> bool[n]."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = (packed.reshape(-1, 1) >> shifts) & 1
    return bits.view(-1)[:numel].to(torch.bool)


def popcount(packed: Tensor) -> Tensor:
    """uint8[...] -> int64[], the number of set bits."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed.reshape(-1, 1) >> shifts) & 1).sum(dtype=torch.int64)


def mask_indices(packed: Tensor, numel: int) -> Tensor:
    """Packed mask of ``numel`` entries -> sorted flat indices, int32 (int64 when numel > 2^31)."""
    dtype = torch.int32 if numel <= INT32_NUMEL else torch.int64
    return unpack_mask(packed, numel).nonzero().view(-1).to(dtype)


def mask_overlap(a: Tensor, b: Tensor) -> Tensor:
    """Two packed masks of one length -> int64[2]: sizes of the intersection and of the union."""
    return torch.stack([popcount(a & b), popcount(a | b)])


# ---- master weights --------------------------------------------------------------------------------------------------
def join_master(param: Tensor, residual: Tensor) -> Tensor:
    """16-bit weight + int16 residual -> fp32 master: the residual counts fp32 units in the last place."""
    return (param.float().view(torch.int32) + residual.to(torch.int32)).view(torch.float32)


def split_master(master: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """fp32 master -> (nearest weight of ``dtype``, int16 residual); exact but for ties (one fp32 unit)."""
    param = master.to(dtype)
    limit = RESIDUAL_LIMIT[dtype]
    difference = master.view(torch.int32) - param.float().view(torch.int32)
    return param, difference.clamp(-limit, limit).to(torch.int16)


# ---- gather and step -------------------------------------------------------------------------------------------------
def arena_positions(indices: Tensor, chunks: Tensor, total: int | None = None) -> Tensor:
    """Flat position within its tensor of each entry of consecutive ``chunks`` rows -> int64[sum of counts].

    Given ``total``, the sum of counts, the host does not wait for the device.
    """
    base, count, index_start, shift = (chunks[:, c] for c in (1, 3, 4, 5))
    row = torch.repeat_interleave(torch.arange(len(chunks), device=chunks.device), count, output_size=total)
    first = torch.cumsum(count, 0) - count
    within = torch.arange(row.numel(), device=chunks.device) - first[row]
    run = within >> shift[row]
    return base[row] + indices[index_start[row] + run].to(torch.int64) + (within - (run << shift[row]))


def _chunks_by_tensor(chunks: Tensor) -> list[tuple[int, Tensor, slice]]:
    """(tensor, its rows, its arena slice) for each tensor of the table; a tensor's rows are consecutive."""
    result = []
    ids, counts = torch.unique_consecutive(chunks[:, 0], return_counts=True)
    row = 0
    for tensor, count in zip(ids.tolist(), counts.tolist(), strict=True):
        rows = chunks[row : row + count]
        start = int(rows[0, 2])
        result.append((tensor, rows, slice(start, int(rows[-1, 2] + rows[-1, 3]))))
        row += count
    return result


@torch.no_grad()
def gather_grads_(
    compact: Tensor, grads: Sequence[Tensor], indices: Tensor, chunks: Tensor, tensor_offset: int, accumulate: bool,
    run: int = 1, squares: Tensor | None = None,
) -> None:  # fmt: skip
    """compact[entry] (+)= grads[tensor - tensor_offset][position of the entry], in the dtype of ``compact``;
    squares, so many for each row of chunks, add up to the sum of squares of what compact then holds there."""
    for tensor, rows, entries in _chunks_by_tensor(chunks):
        grad = grads[tensor - tensor_offset]
        if grad.numel() == 0:
            continue
        values = grad.reshape(-1)[arena_positions(indices, rows)].to(compact.dtype)
        if accumulate:
            compact[entries] += values
        else:
            compact[entries] = values
    if squares is not None:
        per_row = squares.view(len(chunks), -1)
        for row, (tensor, _, start, count, _, _) in enumerate(chunks.tolist()):
            if grads[tensor - tensor_offset].numel():
                per_row[row] = 0
                per_row[row, :1] = compact[start : start + count].square().sum()


@torch.no_grad()
def clip_coefficient_(
    squares: Tensor, max_norm: float, inverse_scale: Tensor | None, found_inf: Tensor | None, norm: Tensor,
    multiplier: Tensor, skip: Tensor,
) -> None:  # fmt: skip
    """norm = sqrt(sum of squares) * inverse_scale; multiplier = min(1, max_norm / (norm + 1e-6)) * inverse_scale;
    skip = 1 where the norm is not finite or found_inf is set, else 0."""
    total = squares.double().sum().sqrt()
    scale = torch.ones_like(total) if inverse_scale is None else inverse_scale.double()
    norm.copy_(total * scale)
    multiplier.copy_((max_norm / (norm.double() + 1e-6)).clamp(max=1.0) * scale)
    skip.copy_(~torch.isfinite(norm) if found_inf is None else ~torch.isfinite(norm) | (found_inf != 0))


@torch.no_grad()
def scatter_values_(params: Sequence[Tensor], values: Tensor, indices: Tensor, chunks: Tensor, run: int = 1) -> None:
    """params[tensor][position of the entry] = values[entry], bit by bit; the inverse of :func:`gather_grads_`."""
    if any(param.numel() and param.dtype != values.dtype for param in params):
        raise ValueError(f"values must have the parameters' dtype, got {values.dtype}.")
    for tensor, rows, entries in _chunks_by_tensor(chunks):
        if params[tensor].numel():
            params[tensor].view(-1)[arena_positions(indices, rows)] = values[entries]


@torch.no_grad()
def remap_entries_(
    targets: Sequence[Tensor], sources: Sequence[Tensor], indices: Tensor, chunks: Tensor, old_indices: Tensor,
    old_chunks: Tensor,
) -> None:  # fmt: skip
    """target[new place] = source[old place] of the entries that both plans have, bit by bit; the others stay."""
    if any(target.dtype != source.dtype for target, source in zip(targets, sources, strict=True)):
        raise ValueError("a source must have its target's dtype.")
    old = {tensor: (rows, entries) for tensor, rows, entries in _chunks_by_tensor(old_chunks)}
    for tensor, rows, entries in _chunks_by_tensor(chunks):
        if tensor not in old:
            continue
        positions, known = arena_positions(indices, rows), arena_positions(old_indices, old[tensor][0])
        at = torch.searchsorted(known, positions).clamp_(max=known.numel() - 1)
        both = known[at] == positions
        for target, source in zip(targets, sources, strict=True):
            target[entries][both] = source[old[tensor][1]][at[both]]


# ---- entries that leave a mask or join it ----------------------------------------------------------------------------
@torch.no_grad()
def select_entries(
    scores: Sequence[Tensor], packed: Tensor, counts: Tensor, grow: bool, seeds: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each tensor ``counts`` entries: active ones of smallest |score|, or (``grow``) inactive ones of largest.

    Ties go to the lower index. Among active entries an infinity is fp32's largest number; to grow, what is not finite is 0.
    fp64 is rounded to fp32 first. With ``seeds`` those of largest :func:`random_keys` are chosen. Returns the chosen entries,
    the number of NaNs among the active entries (``grow``: of all entries that are not finite), and (``grow``) the sum of
    squares of the inactive scores.
    """
    chosen, odd = torch.zeros_like(packed), torch.zeros_like(counts)
    squares = torch.zeros((), dtype=torch.float64, device=packed.device)
    begins = mask_begins([tensor.numel() for tensor in scores])
    for t, tensor in enumerate(scores):
        n, bits = tensor.numel(), slice(begins[t], begins[t] + (tensor.numel() + 7) // 8)
        eligible = unpack_mask(packed[bits], n) ^ grow
        if seeds is not None:
            order = random_keys(int(seeds[t]), torch.arange(n, device=packed.device))
        else:
            magnitude = tensor.reshape(-1).float().abs()
            if grow:
                odd[t] = (~magnitude.isfinite()).sum()
                magnitude = magnitude.where(magnitude.isfinite(), 0)
                squares += magnitude[eligible].square().sum(dtype=torch.float64)
            else:
                odd[t] = (magnitude.isnan() & eligible).sum()
                magnitude = magnitude.clamp(max=torch.finfo(torch.float32).max)
            order = magnitude.view(torch.int32)  # numbers that are not negative have the order of their bits
        candidates = eligible.nonzero().view(-1)
        best = order[candidates].sort(stable=True, descending=grow or seeds is not None).indices[: int(counts[t])]
        mask = torch.zeros_like(eligible)
        mask[candidates[best]] = True
        chosen[bits] = pack_mask(mask)
    return chosen, odd, squares


def random_keys(seed: int, index: Tensor) -> Tensor:
    """24-bit numbers that depend on a seed (63 bits) and an int64 index: MurmurHash3's 32-bit finaliser, twice."""
    low = 0xFFFFFFFF
    x = ((index & low) * 0x9E3779B1 + (index >> 32) * 0x85EBCA77 + (seed & low)) & low
    for more in (seed >> 32, 0):
        x ^= x >> 16
        x = (x * 0x85EBCA6B) & low
        x ^= x >> 13
        x = (x * 0xC2B2AE35) & low
        x = ((x ^ (x >> 16)) + more) & low
    return x >> 8


@torch.no_grad()
def accumulate_squares_(
    stored: Sequence[Tensor], grads: Sequence[Tensor], weight: float, decay: Tensor | None, inverse: Tensor | None
) -> None:
    """stored <- stored * decay + ((g * inverse) * weight) * (g * inverse), each operation rounded, in this order.

    The product with ``decay`` is fp32, the rest too, or fp64 for fp64 gradients; ``weight`` is rounded to fp32. With
    ``inverse``, what is not finite after it counts as 0. Tensors without a gradient decay.
    """
    weight = torch.tensor(weight, dtype=torch.float32).item()
    for squares, grad in zip(stored, grads, strict=True):
        if decay is not None:
            squares.mul_(decay)
        if grad.numel() != squares.numel():
            if grad.numel():
                raise ValueError(
                    f"a gradient of {grad.numel()} entries does not fit {squares.numel()} accumulated ones."
                )
            continue
        wide = grad.to(torch.promote_types(grad.dtype, torch.float32)).view(squares.shape)
        if inverse is not None:
            wide = wide * inverse
            wide = torch.where(torch.isfinite(wide), wide, 0.0)
        squares.copy_(squares + (wide * weight) * wide)


@torch.no_grad()
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
    run: int = 1,
    follow: bool = False,
) -> None:
    """One AdamW step (decoupled weight decay, Loshchilov & Hutter 2019) on the active entries only.

    In torch's order of operations, with t the age of the entry (steps since it became active)::

        w <- w * (1 - lr * weight_decay)
        m <- m + (1 - beta1) * (g - m);   v <- beta2 * v + (1 - beta2) * g * g
        w <- w - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
    """
    if skip is not None and bool(skip != 0):
        return
    for tensor, param in enumerate(params):
        if param.numel():
            steps[tensor] += 1
    for tensor, rows, entries in _chunks_by_tensor(chunks):
        param = params[tensor]
        if param.numel() == 0:
            continue
        lr, beta1, beta2, eps, weight_decay, maximize, correct_bias, amsgrad = hyper[int(groups[tensor])].tolist()
        positions = arena_positions(indices, rows)
        m, v = exp_avg[entries], exp_avg_sq[entries]
        flat = param.view(-1)
        gradient = compact_grad[entries] if compact_grad is not None else grads[tensor].reshape(-1)[positions]
        gradient = gradient.to(m.dtype)
        if multiplier is not None:
            gradient = gradient * multiplier
        if maximize:
            gradient = -gradient

        weight = flat[positions]
        if master is not None:
            copy = master[entries]
            weight = torch.where(copy.to(param.dtype) == weight, copy, weight.float()) if follow else copy
        if residual is not None:
            weight = join_master(weight, residual[entries])
        weight = weight.to(m.dtype) * (1 - lr * weight_decay)
        m.lerp_(gradient, 1 - beta1)
        v.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)

        step_size, root = _bias_corrections(steps[tensor], lr, beta1, beta2, bool(correct_bias))
        if cohorts is not None and births is not None:
            ages = steps[tensor] - births[tensor]
            step_size, root = _bias_corrections(ages.clamp(min=1), lr, beta1, beta2, bool(correct_bias))
            cohort = cohorts[entries].long()
            step_size, root = step_size[cohort], root[cohort]
        second = v
        if amsgrad and max_exp_avg_sq is not None:
            second = torch.maximum(max_exp_avg_sq[entries], v)
            max_exp_avg_sq[entries] = second
        weight = weight - step_size.to(m.dtype) * (m / (second.sqrt() / root.to(m.dtype) + eps))

        if residual is not None:
            flat[positions], residual[entries] = split_master(weight, param.dtype)
        else:
            flat[positions] = weight.to(param.dtype)
            if master is not None:
                master[entries] = weight


def _bias_corrections(age: Tensor, lr: float, beta1: float, beta2: float, correct: bool) -> tuple[Tensor, Tensor]:
    """(lr / (1 - beta1^age), sqrt(1 - beta2^age)) in float64; (lr, 1) without correction."""
    age = age.double()
    if not correct:
        return torch.full_like(age, lr), torch.ones_like(age)
    return lr / (1 - beta1**age), (1 - beta2**age).sqrt()


# ---- per-sample gradients --------------------------------------------------------------------------------------------
def grad_project(gradients: Tensor, inputs: Tensor, matrix: Tensor, scale: float) -> Tensor:
    """fp32[B, k_o, k_i] = scale * sum over tokens t of (matrix g_t) (inputs_t)^T, accumulated in fp32."""
    projected = gradients.float() @ matrix.float().t()  # [B, T, k_o]
    return projected.transpose(1, 2) @ inputs.float() * scale


@torch.no_grad()
def cross_entropy_(logits: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """fp32[N] losses; logits become softmax - onehot. Ignored: 0 and zeros; a target outside the row: NaN and NaNs."""
    ignored = targets == ignore_index
    inside = (targets >= 0) & (targets < logits.shape[1])
    rows = torch.arange(len(targets), device=logits.device)[inside]
    gradients = torch.softmax(logits.float(), 1)
    losses = torch.full(targets.shape, torch.nan, device=logits.device)
    losses[inside] = (torch.logsumexp(logits.float(), 1)[inside]) - logits[rows, targets[inside]].float()
    gradients[rows, targets[inside]] -= 1
    gradients[~inside] = torch.nan
    gradients[ignored] = 0
    logits.copy_(gradients)
    return losses.masked_fill(ignored, 0)


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "pack_mask": pack_mask,
    "unpack_mask": unpack_mask,
    "popcount": popcount,
    "mask_indices": mask_indices,
    "mask_overlap": mask_overlap,
    "gather_grads_": gather_grads_,
    "clip_coefficient_": clip_coefficient_,
    "scatter_values_": scatter_values_,
    "remap_entries_": remap_entries_,
    "select_entries": select_entries,
    "accumulate_squares_": accumulate_squares_,
    "sparse_adamw_": sparse_adamw_,
    "grad_project": grad_project,
    "cross_entropy_": cross_entropy_,
}
