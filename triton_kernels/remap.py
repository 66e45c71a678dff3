# mypy: disable-error-code="no-untyped-def"
"""remap_entries_: target[new place of an entry] = source[its old place], for every entry that both plans have.

targets, sources: K pairs of vectors of one dtype each, [N] in the new arena order and [M] in the old one; entries that the old
plan lacks keep what their target holds. All tensors and all pairs in one launch.

One program takes up to 1024 entries of a row of the new chunk table. The launcher finds, for every new row, the old rows that
overlap it (a binary search over rows, of which there is one per 1024 or 4096 entries): mostly one or two. In each the program
looks its entries up by binary search over the row's stored offsets, 10 or 12 loads of a few KiB that stay in the L1 cache;
neighbouring entries read neighbouring offsets. Neither plan's mask is needed, and nothing is sorted. Values are moved as
integers of the same size. Each entry has one writer: deterministic.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseopt.triton_kernels.common import CHUNK, entry_positions

__all__ = ["remap_entries_"]

BLOCK = 1024
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
TENSOR_SHIFT = 40  # a row's key is (tensor, first flat element): tensors of up to 2^40 entries
MOST_PAIRS = 4  # in one launch


@triton.jit
def _remap_kernel(
    target0, source0, target1, source1, target2, source2, target3, source3,
    indices, chunks, old_indices, old_chunks,
    first_rows,  # int64 [C]: of the old rows that may hold a new row's entries
    last_rows,  # int64 [C], one past
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,  # per row of the chunk table
    STEPS: tl.constexpr,  # of the binary search: 2^STEPS offsets in an old row
):  # fmt: skip
    program = tl.program_id(0)
    which = (program // BLOCKS).to(tl.int64)
    row = chunks + which * 6
    tensor = tl.load(row)
    start = tl.load(row + 2)
    count = tl.load(row + 3).to(tl.int32)
    k = (program % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    valid = k < count
    positions = entry_positions(tl.load(row + 1), indices + tl.load(row + 4), tl.load(row + 5).to(tl.int32), k, count)
    place = tl.full([BLOCK], -1, tl.int64)
    for r in range(tl.load(first_rows + which), tl.load(last_rows + which)):
        old = old_chunks + r * 6
        if tl.load(old) == tensor:
            old_count = tl.load(old + 3)
            shift = tl.load(old + 5)
            first = old_indices + tl.load(old + 4)
            stored = ((old_count + (1 << shift) - 1) >> shift).to(tl.int32)
            wanted = positions - tl.load(old + 1)
            found = tl.zeros([BLOCK], tl.int32)
            for bit in tl.static_range(STEPS):
                middle = found + (1 << (STEPS - 1 - bit))
                offset = tl.load(first + middle, mask=valid & (middle < stored), other=0).to(tl.int64)
                found = tl.where((middle < stored) & (offset <= wanted), middle, found)
            within = wanted - tl.load(first + found, mask=valid, other=0).to(tl.int64)
            entry = (found.to(tl.int64) << shift) + within
            # Negative where the row begins later: a shift keeps the sign.
            hit = ((within >> shift) == 0) & (entry < old_count)
            place = tl.where(hit, tl.load(old + 2) + entry, place)
    known = valid & (place >= 0)
    tl.store(target0 + start + k, tl.load(source0 + place, mask=known, other=0), mask=known)
    if PAIRS > 1:
        tl.store(target1 + start + k, tl.load(source1 + place, mask=known, other=0), mask=known)
    if PAIRS > 2:
        tl.store(target2 + start + k, tl.load(source2 + place, mask=known, other=0), mask=known)
    if PAIRS > 3:
        tl.store(target3 + start + k, tl.load(source3 + place, mask=known, other=0), mask=known)


def _keys(indices: Tensor, chunks: Tensor) -> Tensor:
    """int64[C], ascending: the tensor and first flat element of each row."""
    return (chunks[:, 0] << TENSOR_SHIFT) + chunks[:, 1] + indices[chunks[:, 4]].to(torch.int64)


def remap_entries_(
    targets: Sequence[Tensor], sources: Sequence[Tensor], indices: Tensor, chunks: Tensor, old_indices: Tensor,
    old_chunks: Tensor,
) -> None:  # fmt: skip
    """Launches the move; arguments as in :mod:`sparseopt._schema`. More than four pairs take more launches."""
    if len(targets) != len(sources):
        raise ValueError(f"expected as many sources as targets, {len(targets)}, got {len(sources)}.")
    for target, source in zip(targets, sources, strict=True):
        for tensor in (target, source):
            if tensor.dtype != target.dtype or tensor.device != indices.device or not tensor.is_contiguous():
                raise ValueError(
                    f"sources and targets must be contiguous on {indices.device} and pairwise of one dtype, got "
                    f"{tensor.dtype} beside {target.dtype} on {tensor.device}."
                )
    if not targets or not len(chunks) or not len(old_chunks):
        return
    with torch.cuda.device_of(indices):
        old, new = _keys(old_indices, old_chunks), _keys(indices, chunks)
        after = torch.searchsorted(old, new, right=True)  # the row before it may hold the first entry
        # A new row ends before the next one begins, the last one at the end of everything.
        last = torch.searchsorted(old, torch.cat([new[1:], new[-1:].new_full((1,), torch.iinfo(torch.int64).max)]))
        blocks = CHUNK[indices.dtype] // BLOCK
        for begin in range(0, len(targets), MOST_PAIRS):
            pairs = list(zip(targets[begin : begin + MOST_PAIRS], sources[begin : begin + MOST_PAIRS], strict=True))
            given = pairs + pairs[:1] * (MOST_PAIRS - len(pairs))  # the rest is not touched
            _remap_kernel[(len(chunks) * blocks,)](
                *(tensor.view(BITS[tensor.element_size()]) for pair in given for tensor in pair),
                indices,
                chunks,
                old_indices,
                old_chunks,
                (after - 1).clamp_(min=0),
                last,
                PAIRS=len(pairs),
                BLOCK=BLOCK,
                BLOCKS=blocks,
                STEPS=CHUNK[old_indices.dtype].bit_length() - 1,
                num_warps=8,
            )
