"""The checked function of changing masks; :mod:`sparseopt.functional` has it too, beside all others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparseopt import _schema
from sparseopt._functional_samples import describe

__all__ = ["select_entries"]

SCORE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def select_entries(
    scores: Sequence[Tensor], packed: Tensor, counts: Tensor, *, grow: bool, seeds: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Chooses, of every tensor, active entries that leave its mask or inactive ones that join it; nothing is sorted.

    Active entries of smallest |score|, or with ``grow`` inactive ones of largest; ties go to the lower index. fp64 scores are
    rounded to fp32 first. The device is not waited for.

    Args:
        scores: T tensors of one dtype (fp32, bf16, fp16 or fp64), contiguous, on one device.
        packed: uint8[B], their packed masks one behind the other, beginning at ``_schema.mask_begins(sizes)``; what lies
            between them is 0.
        counts: int64[T], how many of each, at most as many as there are to choose from.
        grow: choose inactive entries. Then a score that is not finite counts as 0; else an infinity counts as fp32's
            largest number.
        seeds: int64[T], not negative: the entries with the largest random numbers are chosen, which have 24 bits and depend
            on the tensor's seed and the flat index (:func:`sparseopt.reference.random_keys`); ``scores`` are not read.

    Returns:
        ``chosen`` uint8[B], packed as the masks are; ``odd`` int64[T], the number of NaNs among the active entries, or with
        ``grow`` of all entries that are not finite (0 with ``seeds``); ``squares`` fp64[], with ``grow`` the sum of the
        squares of all finite scores of inactive entries (fp32 within ranges of a tensor; 0 with ``seeds``).
    """
    device, dtypes = packed.device, {tensor.dtype for tensor in scores}
    if len(dtypes) > 1 or not dtypes <= set(SCORE_DTYPES):
        raise TypeError(
            f"expected scores of one dtype among fp32, bf16, fp16 and fp64, got {sorted(map(str, dtypes))}."
        )
    for position, tensor in enumerate(scores):
        if tensor.device != device or not tensor.is_contiguous():
            raise ValueError(f"scores {position} must be contiguous on {device}, got {describe(tensor)}.")
    length = _schema.mask_begins([tensor.numel() for tensor in scores])[-1]
    if packed.shape != (length,) or packed.dtype != torch.uint8 or not packed.is_contiguous():
        raise ValueError(f"packed must be a contiguous uint8[{length}], got {describe(packed)}.")
    for name, vector in {"counts": counts, "seeds": seeds}.items():
        if vector is not None and (
            vector.shape != (len(scores),) or vector.dtype != torch.int64 or vector.device != device
        ):
            raise ValueError(f"{name} must be int64[{len(scores)}] on {device}, got {describe(vector)}.")
    return torch.ops.sparseopt.select_entries(
        list(scores), packed, counts.contiguous(), grow, None if seeds is None else seeds.contiguous()
    )
