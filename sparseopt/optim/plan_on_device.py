"""The index plan of masks of single entries, of all tensors at once: what a GPU is asked for changing masks.

:meth:`IndexPlan.build` goes tensor by tensor, some fifty small operations each, for which a CPU is the right place. Here the
masks lie one behind the other in one vector of bits, and every operation serves all tensors.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from sparseopt import functional
from sparseopt.optim.plan import CHUNK, ROW_BYTES, SPAN_BITS, IndexPlan

__all__ = ["build_on_device"]

# A mask begins at a multiple of this: where chunks must be cut (multiples of 2^16 elements) is then the same in the vector.
ALIGNMENT = 1 << 13  # bytes
SAMPLE = 4096  # bytes of each mask, at even distances, that tell whether it may be made of aligned runs


def build_on_device(
    packed: Sequence[Tensor | None], numels: Sequence[int], device: torch.device, empty: Collection[int] = ()
) -> IndexPlan:
    """Plan on ``device``, equal to ``IndexPlan.build(packed, numels)``; masks that may have runs are left to that.

    Args:
        packed: per tensor uint8[ceil(n/8)] on any device, or None where every entry is active.
        numels: per tensor n.
        empty: tensors known to have nothing active, whose masks need not be sent there.
    """
    plan = _together(packed, numels, device, empty)
    if plan is not None:
        return plan
    return IndexPlan.build([None if mask is None else mask.to(device) for mask in packed], numels).to(device)


def _together(
    packed: Sequence[Tensor | None], numels: Sequence[int], device: torch.device, empty: Collection[int]
) -> IndexPlan | None:
    members = [t for t, mask in enumerate(packed) if mask is not None and t not in empty]
    if not members or max(numels) >= 1 << SPAN_BITS[torch.int32]:
        return None
    begins = [0]
    for t in members:
        begins.append(begins[-1] + -(-max(1, numels[t]) // (8 * ALIGNMENT)) * ALIGNMENT)
    bits = torch.zeros(begins[-1], dtype=torch.uint8, device=device)
    masks = [mask for t in members if (mask := packed[t]) is not None]
    places = [bits[begin : begin + mask.numel()] for begin, mask in zip(begins, masks, strict=False)]
    torch._foreach_copy_(places, masks, non_blocking=True)  # those that are there already: one launch
    first_bits = torch.tensor(begins, device=device) * 8
    lengths = torch.tensor([-(-numels[t] // 8) for t in members], device=device)
    sample = bits[first_bits[:-1, None] // 8 + lengths[:, None] * torch.arange(SAMPLE, device=device) // SAMPLE]
    single = ((sample != 0) & (sample != 255)).any(1)
    indices = functional.mask_indices(bits, 8 * bits.numel())
    # The first active entry of each mask among all, and the end.
    firsts = torch.searchsorted(indices, first_bits.to(indices.dtype))
    *entries, total = firsts.tolist()
    counts = [after - before for before, after in zip(entries, [*entries[1:], total], strict=True)]
    for count, t, alone in zip(counts, members, single.tolist(), strict=True):
        if count and (not alone or count == numels[t]):
            return None
    if not total:
        return None
    cuts = {dtype: _cuts(indices, firsts, counts, dtype) for dtype in CHUNK}
    dtype = _dtype(cuts, total, counts)
    cut = cuts[dtype]
    size = torch.cat([cut[1:], cut.new_full((1,), total)]) - cut
    owner = torch.searchsorted(firsts, cut, right=True) - 1
    middle = 1 << 15 if dtype == torch.int16 else 0
    base = indices[cut] + middle
    offsets = torch.empty(total + 1, dtype=dtype, device=device)  # the first one is nobody's
    offsets[0] = 0
    torch.sub(indices, torch.repeat_interleave(base, size, output_size=total), out=offsets[1:])

    all_counts = [0 if t in empty else numel for t, numel in enumerate(numels)]
    for t, count in zip(members, counts, strict=True):
        all_counts[t] = count
    starts = [0]
    for count in all_counts:
        starts.append(starts[-1] + count)
    where = torch.tensor([[t, starts[t]] for t in members], device=device)[owner]
    # Not from `base`, which wraps around where the middle of a span lies past 2^31.
    own = indices[cut].to(torch.int64) - first_bits[owner] + middle
    rows = torch.stack(
        [where[:, 0], own, where[:, 1] + cut - firsts[owner], size, cut + 1, torch.zeros_like(cut)], 1
    )  # fmt: skip
    per_tensor = [0] * len(numels)
    for t, number in zip(members, torch.bincount(owner, minlength=len(members)).tolist(), strict=True):
        per_tensor[t] = number
    whole = [t for t in range(len(numels)) if packed[t] is None]
    dense, each = _dense_rows(whole, [numels[t] for t in whole], [starts[t] for t in whole], CHUNK[dtype], device)
    for t, number in zip(whole, each, strict=True):
        per_tensor[t] = number
    chunks = torch.cat([rows, dense])
    chunks = chunks[chunks[:, 0].argsort(stable=True)] if whole else chunks
    first_chunk = [0]
    for number in per_tensor:
        first_chunk.append(first_chunk[-1] + number)
    return IndexPlan(
        tuple(numels), tuple(all_counts), tuple(starts), tuple(0 if mask is None else 1 for mask in packed),
        offsets, chunks, tuple(first_chunk),
    )  # fmt: skip


def _cuts(indices: Tensor, firsts: Tensor, counts: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Where chunks begin among all entries, as :func:`sparseopt.optim.plan._cuts` cuts each tensor."""
    most, device = CHUNK[dtype], indices.device
    chunks = [-(-count // most) for count in counts]
    number = torch.tensor(chunks, device=device)
    owner = torch.repeat_interleave(torch.arange(len(chunks), device=device), number, output_size=sum(chunks))
    before = torch.cumsum(number, 0) - number
    cut = firsts[owner] + (torch.arange(sum(chunks), device=device) - before[owner]) * most
    last = torch.minimum(cut + most, firsts[owner + 1]) - 1
    wide = (indices[last].to(torch.int64) - indices[cut].to(torch.int64)) >> SPAN_BITS[dtype] != 0
    if bool(wide.any()):
        segment = indices >> SPAN_BITS[dtype]
        changes = (segment[1:] != segment[:-1]).nonzero().view(-1) + 1
        chunk = torch.searchsorted(cut, changes, right=True) - 1
        cut = torch.cat([cut, changes[wide[chunk]]]).unique()
    return cut


def _dtype(cuts: dict[torch.dtype, Tensor], total: int, counts: Sequence[int]) -> torch.dtype:
    """As :func:`sparseopt.optim.plan._offset_dtype`."""
    nbytes = {dtype: dtype.itemsize * total + ROW_BYTES * cut.numel() for dtype, cut in cuts.items()}
    least = sum(-(-count // CHUNK[torch.int16]) for count in counts)
    narrow = nbytes[torch.int16] < 0.8 * nbytes[torch.int32] and cuts[torch.int16].numel() <= 2 * least
    return torch.int16 if narrow else torch.int32


def _dense_rows(
    tensors: Sequence[int], numels: Sequence[int], starts: Sequence[int], size: int, device: torch.device
) -> tuple[Tensor, list[int]]:
    """Rows of fully active tensors, as :func:`sparseopt.optim.plan.contiguous_rows` makes them; how many of each."""
    each = [-(-numel // size) for numel in numels]
    facts = torch.tensor([tensors, numels, starts, each], dtype=torch.int64).view(4, -1).to(device)
    row = torch.arange(sum(each), device=device)
    owner = torch.repeat_interleave(facts[3], output_size=len(row))
    number, numel, start = facts[:3, owner]
    base = (row - (facts[3].cumsum(0) - facts[3])[owner]) * size
    nothing = torch.zeros_like(base)
    shift = torch.full_like(base, size.bit_length() - 1)
    return torch.stack([number, base, start + base, (numel - base).clamp(max=size), nothing, shift], 1), each
