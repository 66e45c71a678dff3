# mypy: disable-error-code="no-untyped-def, no-redef"
"""select_entries: of each tensor, the active entries of smallest |score|, or the inactive ones of largest; exact counts.

scores: T tensors of one dtype; packed: uint8[B], their masks one behind the other (:mod:`sparseopt._schema`); counts: int64[T].
Every score becomes a key, a whole number of 15 (16-bit scores), 31 or 24 (random) bits: the bits of |score|, subtracted from
their largest value where the smallest is wanted, so that the largest keys are chosen.

All tensors at once narrow down where the last chosen key lies: a launch counts, tensor by tensor, the keys in 16 bins of 2^shift
keys from some lowest one on (keys below in the first, above in the last), and a small one then sets lowest and shift to the bin
that has the wanted one, until a bin is a single key. It begins with every 16th entry (a few bytes in every part of a tensor), which
leave a window as wide as they are uncertain; nearly always the first launch over all entries finds the wanted key in it, so that
16-bit scores are read once to three times. Otherwise the tensor begins anew with all keys: what a sample says never matters to the
result. Tensors that are settled cost the launches that follow next to nothing.

The last launch writes the chosen entries: keys above the last one, and of the equal ones the first by index, for which the counts
of the last bins are also kept by chunk. A program takes 32,768 entries, 2048 at a time. A thread counts the 8 entries of a byte of
the mask in the 16 fields of a 64-bit word: no votes, no shared memory, and no comparisons, of which a GPU does few in a cycle.
Counts are integer sums, squares are added in a fixed order within a chunk and over chunks: deterministic.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseopt._schema import mask_begins
from sparseopt.triton_kernels.common import TL_DTYPES, address_of, describe, kept_table, ranges_of, widen

__all__ = ["select_entries"]

CHUNK = 32768  # entries of a program
BLOCK = 2048  # entries at a time
SAMPLE = 16  # one entry in so many is looked at first,
PIECE = CHUNK // SAMPLE**2  # in pieces of so many, one in each part of a chunk,
SAMPLED = 1 << 22  # where there are so many entries
BINS = 16
HIGHEST = torch.iinfo(torch.int32).max


@triton.jit
def _finalise(x):
    """MurmurHash3's finaliser of uint32."""
    x = x ^ (x >> 16)
    x = x * tl.full((), 0x85EBCA6B, tl.uint32)
    x = x ^ (x >> 13)
    x = x * tl.full((), 0xC2B2AE35, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def _random_keys(seed, index):
    """24 bits of a 63-bit seed (int64) and int64 indices, as :func:`sparseopt.reference.random_keys`."""
    low, high = index.to(tl.uint32), (index >> 32).to(tl.uint32)
    x = low * tl.full((), 0x9E3779B1, tl.uint32) + high * tl.full((), 0x85EBCA77, tl.uint32) + seed.to(tl.uint32)
    x = _finalise(_finalise(x) + (seed >> 32).to(tl.uint32))
    return (x >> 8).to(tl.int32)


@triton.jit
def _keys(value, GROW: tl.constexpr):
    """(int32 keys, the larger the sooner chosen; bits of |score|; -1 for NaN, or with GROW what is not finite, else 0)."""
    if value.dtype == tl.float32 or value.dtype == tl.float64:
        bits = widen(value, tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
        INFINITY: tl.constexpr = 0x7F800000
        LARGEST: tl.constexpr = 0x7FFFFFFF
    else:
        bits = value.to(tl.int16, bitcast=True).to(tl.int32) & 0x7FFF
        INFINITY: tl.constexpr = 0x7F80 if value.dtype == tl.bfloat16 else 0x7C00
        LARGEST: tl.constexpr = 0x7FFF
    if GROW:
        odd = (INFINITY - 1 - bits) >> 31
        bits = bits & ~odd
        key = bits
    else:
        odd = (INFINITY - bits) >> 31
        key = bits
        if LARGEST == 0x7FFFFFFF:  # infinities tie with fp32's largest number, which no 16-bit one is
            key = tl.minimum(key, INFINITY - 1)
        key = LARGEST - key
    return key, bits, odd


@triton.jit
def _load(source, packed, count, b, RANDOM: tl.constexpr, BLOCK: tl.constexpr, SAMPLE: tl.constexpr):
    """Bytes of the mask of block ``b`` of a chunk, their place in the chunk, and the scores [BLOCK / 8, 8].

    ``b`` is the block; of a sample, which piece of each SAMPLE-th part.
    """
    byte = tl.arange(0, BLOCK // 8)
    if SAMPLE > 1:
        PIECE: tl.constexpr = BLOCK // 8 // SAMPLE
        byte = byte // PIECE * (BLOCK // 8) + b * PIECE + byte % PIECE
        whole = count >= BLOCK * SAMPLE
    else:
        byte = b * (BLOCK // 8) + byte
        whole = count >= (b + 1) * BLOCK
    i = byte[:, None] * 8 + tl.arange(0, 8)[None, :]
    held = tl.load(packed + byte, mask=byte * 8 < count, other=0)
    if RANDOM:
        value = i
    elif whole:  # a mask would make the loads narrow
        value = tl.load(source + i)
    else:
        value = tl.load(source + i, mask=i < count, other=0)
    return byte, held, value


@triton.jit
def _block(byte, held, value, seed, start, count, GROW: tl.constexpr, RANDOM: tl.constexpr):
    """Keys, bits of |score|, odd, eligible (1 or 0), each int32[BLOCK / 8, 8]; the eligible ones as int32[BLOCK / 8]."""
    inside = (1 << tl.minimum(tl.maximum(count - byte * 8, 0), 8)) - 1
    allowed = (held.to(tl.int32) ^ 0xFF if GROW else held.to(tl.int32)) & inside
    eligible = (allowed[:, None] >> tl.arange(0, 8)[None, :]) & 1
    if RANDOM:
        key = _random_keys(seed, start + value)
        bits, odd = key, key & 0
    else:
        key, bits, odd = _keys(value, GROW)
    return key, bits, odd, eligible, allowed


@triton.jit
def _place(scores, packed, begins, ranges, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr):
    """This program's chunk: its tensor, first entry, how many entries, and where its scores and its mask begin."""
    row = ranges + tl.program_id(0).to(tl.int64) * 3
    tensor = tl.load(row)
    start = tl.load(row + 1) * CHUNK
    source = address_of(scores, tensor, DTYPE, 1)
    if ALIGNED:
        source = tl.multiple_of(source, 16)
    return tensor, start, tl.load(row + 2).to(tl.int32), source + start, packed + tl.load(begins + tensor) + start // 8


@triton.jit
def _magnitude(bits, DTYPE: tl.constexpr):
    """fp32 |score| of its bits."""
    if DTYPE == tl.float16:  # noqa: SIM300
        result = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    elif DTYPE == tl.bfloat16:  # noqa: SIM300
        result = (bits << 16).to(tl.float32, bitcast=True)
    else:
        result = bits.to(tl.float32, bitcast=True)
    return result


@triton.jit
def _count_kernel(
    scores,  # int64 [T], addresses
    seeds,  # int64 [T] or None
    packed,  # uint8 [B]
    begins,  # int64 [T + 1], bytes
    ranges,  # int64 [C, 3]
    lowest,  # int64 [T], the first key of the bins
    shifts,  # int64 [T], log2 of a bin's keys
    settled,  # uint8 [T], of these nothing is counted
    bins,  # int64 [T, BINS], added to
    rows,  # int32 [C, BINS], counts of each chunk (not of samples)
    odd,  # int64 [T], added to (ALL)
    squares,  # fp32 [C] (ALL)
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    GROW: tl.constexpr,
    RANDOM: tl.constexpr,
    ALL: tl.constexpr,  # every tensor; also counts what is odd, and adds up squares
    SAMPLE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    BINS: tl.constexpr,
):
    tensor, start, count, source, bits = _place(scores, packed, begins, ranges, DTYPE, ALIGNED, CHUNK)
    if not ALL and tl.load(settled + tensor) != 0:
        return
    program = tl.program_id(0).to(tl.int64)
    seed = tl.load(seeds + tensor) if RANDOM else 0
    low, shift = tl.load(lowest + tensor).to(tl.int32), tl.load(shifts + tensor).to(tl.int32)
    even = tl.zeros([BLOCK // 8], tl.int64)  # 8 fields of 8 bits: 8 more in each block
    uneven = tl.zeros([BLOCK // 8], tl.int64)
    strange = tl.zeros([BLOCK // 8], tl.int32)
    power = tl.zeros([BLOCK // 8], tl.float32)
    BYTES: tl.constexpr = 0x0F0F0F0F0F0F0F0F
    SHORTS: tl.constexpr = 0x00FF00FF00FF00FF
    first, end = 0, tl.cdiv(count, BLOCK)
    if SAMPLE > 1:  # another piece of every chunk
        first = (program % SAMPLE).to(tl.int32) % tl.cdiv(count, BLOCK // SAMPLE)
        end = first + 1
    byte, held, value = _load(source, bits, count, first, RANDOM, BLOCK, SAMPLE)
    for b in range(first, end):
        now, mask, score = byte, held, value
        if SAMPLE == 1:  # the next block arrives while this one is counted
            byte, held, value = _load(source, bits, count, tl.minimum(b + 1, end - 1), RANDOM, BLOCK, SAMPLE)
        key, magnitude, wrong, eligible, _ = _block(now, mask, score, seed, start, count, GROW, RANDOM)
        digit = tl.minimum(tl.maximum((key - low) >> shift, 0), BINS - 1)
        fields = tl.sum(eligible.to(tl.int64) << (digit * 4).to(tl.int64), axis=1)
        even += fields & BYTES
        uneven += (fields >> 4) & BYTES
        if ALL and not RANDOM:
            if GROW:
                strange -= tl.sum(wrong, axis=1)
                wide = _magnitude(magnitude & -eligible, DTYPE)
                power += tl.sum(wide * wide, axis=1)
            else:
                strange -= tl.sum(wrong & -eligible, axis=1)
    # Fields of 16 bits hold what a chunk has.
    word0, word1 = tl.sum(even & SHORTS, axis=0), tl.sum(uneven & SHORTS, axis=0)
    word2, word3 = tl.sum((even >> 8) & SHORTS, axis=0), tl.sum((uneven >> 8) & SHORTS, axis=0)
    digits = tl.arange(0, BINS)
    low_byte, high_byte = tl.where(digits % 2 == 0, word0, word1), tl.where(digits % 2 == 0, word2, word3)
    total = (tl.where(digits // 2 % 2 == 0, low_byte, high_byte) >> (digits // 4 * 16).to(tl.int64)) & 0xFFFF
    tl.atomic_add(bins + tensor * BINS + digits, total, mask=total != 0, sem="relaxed")
    if SAMPLE == 1:
        tl.store(rows + program * BINS + digits, total.to(tl.int32))
    if ALL and not RANDOM:
        number = tl.sum(strange, axis=0)
        if number != 0:
            tl.atomic_add(odd + tensor, number.to(tl.int64), sem="relaxed")
        if GROW:
            tl.store(squares + program, tl.sum(power, axis=0))


@triton.jit
def _narrow_kernel(
    bins,  # int64 [T, BINS], zeros again afterwards
    wanted,  # int64 [T], how many of the largest keys
    slack,  # int64 [T], how far from that a sample may be (SAMPLE)
    lowest, shifts, settled,  # as of the counting, changed
    thresholds,  # int64 [T], the last chosen key, once settled
    digits,  # int64 [T], its bin
    left,  # int64 [T], how many keys are above the bins; once settled, how many equal to the last one are chosen
    BITS: tl.constexpr,  # of keys
    WINDOW: tl.constexpr,  # a sample's: the wanted key may be outside
    SAMPLE: tl.constexpr,
    BINS: tl.constexpr,
):  # fmt: skip
    tensor = tl.program_id(0).to(tl.int64)
    if tl.load(settled + tensor) != 0:
        return
    bin = tl.arange(0, BINS)
    held = tl.load(bins + tensor * BINS + bin)
    tl.store(bins + tensor * BINS + bin, tl.zeros([BINS], tl.int64))
    reached = tl.cumsum(held, axis=0, reverse=True)
    low, shift, number = tl.load(lowest + tensor), tl.load(shifts + tensor), tl.load(wanted + tensor)
    if SAMPLE:
        room = tl.load(slack + tensor)
        first = tl.maximum(tl.sum((reached >= number + room).to(tl.int32), axis=0) - 1, 0)
        last = tl.maximum(tl.sum((reached >= tl.maximum(number - room, 1)).to(tl.int32), axis=0) - 1, first)
        size = (last - first + 1).to(tl.int64)
        down = tl.where(size == 1, 3, tl.where(size <= 3, 2, tl.where(size <= 7, 1, 0)))  # a bin is left on both sides
        narrower = tl.maximum(shift - down, 0)
        spare = ((tl.full((), BINS, tl.int64) << narrower) - (size << shift)) // 2
        tl.store(lowest + tensor, tl.maximum(low + (first.to(tl.int64) << shift) - spare, 0))
        tl.store(shifts + tensor, narrower)
    else:
        digit = (tl.sum((reached >= number).to(tl.int32), axis=0) - 1).to(tl.int64)
        if WINDOW and ((digit == 0) | (digit == BINS - 1)):
            tl.store(lowest + tensor, 0)
            tl.store(shifts + tensor, BITS - 4)
        elif digit >= 0:  # else more are wanted than there are
            above = tl.sum(tl.where(bin == digit + 1, reached, 0), axis=0)
            if digit == BINS - 1:
                above = tl.load(left + tensor)
            key = low + (digit << shift)
            if shift == 0:
                tl.store(settled + tensor, 1)
                tl.store(thresholds + tensor, key)
                tl.store(digits + tensor, digit)
                tl.store(left + tensor, number - above)
            else:
                # Single keys are never the first or the last of the bins, which have others as well. Else the new bins end
                # where this one does: what is above it is above them.
                narrower, one = tl.where(shift <= 3, 0, tl.maximum(shift - 4, 1)), tl.full((), 1, tl.int64)
                begin = key + (one << shift) - (BINS * one << narrower)
                tl.store(lowest + tensor, tl.maximum(tl.where(shift <= 3, key - 4, begin), 0))
                tl.store(shifts + tensor, narrower)
                tl.store(left + tensor, above)


def _rounds(shift: int) -> int:
    """Launches from bins of 2^shift keys down to single ones."""
    return 1 if shift == 0 else 1 + _rounds(0 if shift <= 3 else max(shift - 4, 1))


@triton.jit
def _pick_kernel(
    scores, seeds, packed, begins, ranges,
    thresholds,  # int64 [T], the last chosen key
    quotas,  # int64 [C], how many keys equal to it are chosen in each chunk; CHUNK: all
    chosen,  # uint8 [B]
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    GROW: tl.constexpr,
    RANDOM: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    tensor, start, count, source, bits = _place(scores, packed, begins, ranges, DTYPE, ALIGNED, CHUNK)
    place = chosen + tl.load(begins + tensor) + start // 8
    seed = tl.load(seeds + tensor) if RANDOM else 0
    threshold = tl.load(thresholds + tensor).to(tl.int32)
    quota = tl.load(quotas + tl.program_id(0)).to(tl.int32)
    bit = tl.arange(0, 8)
    # In all chunks of a tensor but one, all ties are chosen or none.
    some = (quota > 0) & (quota < CHUNK)
    least = threshold - (quota != 0).to(tl.int32)  # keys above this
    left = quota
    end = tl.cdiv(count, BLOCK)
    byte, held, value = _load(source, bits, count, 0, RANDOM, BLOCK, 1)
    for b in range(0, end):
        now, mask, score = byte, held, value
        byte, held, value = _load(source, bits, count, tl.minimum(b + 1, end - 1), RANDOM, BLOCK, 1)
        key, _, _, eligible, allowed = _block(now, mask, score, seed, start, count, GROW, RANDOM)
        result = tl.sum(((least - key) >> 31) & (1 << bit)[None, :], axis=1) & allowed
        if some:
            tied = eligible & (key == threshold).to(tl.int32)
            per_byte = tl.sum(tied, axis=1)
            before = (tl.cumsum(per_byte, axis=0) - per_byte)[:, None] + (tl.cumsum(tied, axis=1) - tied)
            result -= tl.sum((tied & (before >= left).to(tl.int32)) << bit[None, :], axis=1)
            left -= tl.sum(per_byte, axis=0)
        tl.store(place + now, result.to(tl.uint8), mask=now * 8 < count)


def _share_in_sample(sizes: Sequence[int]) -> Tensor:
    """fp64[T] on the CPU: the share of a tensor's entries that a sample has."""
    ranges = ranges_of(sizes, CHUNK)
    count = ranges[:, 2]
    piece = torch.arange(len(ranges)) % SAMPLE % ((count + PIECE - 1) // PIECE)
    begins = torch.arange(SAMPLE) * (CHUNK // SAMPLE) + piece[:, None] * PIECE
    looked = (count[:, None] - begins).clamp(0, PIECE).sum(1)
    found = torch.zeros(len(sizes), dtype=torch.int64).index_add_(0, ranges[:, 0], looked)
    return found.double() / torch.tensor(sizes, dtype=torch.int64).clamp(min=1)


def select_entries(
    scores: Sequence[Tensor], packed: Tensor, counts: Tensor, grow: bool, seeds: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches the selection; arguments and results as in :mod:`sparseopt._schema`. Nothing waits for the device."""
    device, sizes = packed.device, tuple(tensor.numel() for tensor in scores)
    begins, random = mask_begins(sizes), seeds is not None
    if packed.numel() != begins[-1] or packed.dtype != torch.uint8 or not packed.is_contiguous():
        raise ValueError(f"the masks of these tensors take {begins[-1]} bytes of one vector, got {packed.numel()}.")
    for vector in (counts,) if seeds is None else (counts, seeds):
        if vector.shape != (len(sizes),) or vector.dtype != torch.int64 or vector.device != device:
            raise ValueError(f"counts and seeds must be int64[{len(sizes)}] on {device}, got {vector.dtype}.")
    chosen, odd = torch.zeros_like(packed), torch.zeros_like(counts)
    found = describe("scores", scores, device)
    if found is None:
        return chosen, odd, torch.zeros((), dtype=torch.float64, device=device)
    ranges = kept_table(("ranges", CHUNK, sizes), device, lambda: ranges_of(sizes, CHUNK))
    table = kept_table(("masks", sizes), device, lambda: torch.tensor(begins, dtype=torch.int64))
    share = kept_table(("sampled", SAMPLE, sizes), device, lambda: _share_in_sample(sizes))
    programs, tensors, sampled = len(ranges), len(sizes), sum(sizes) >= SAMPLED
    rows = torch.empty((programs, BINS), dtype=torch.int32, device=device)
    squares = torch.zeros(programs, device=device)
    key_bits = 24 if random else 15 if found.dtype.itemsize == 2 else 31
    constants = {
        "DTYPE": TL_DTYPES[found.dtype], "ALIGNED": found.aligned, "GROW": grow, "RANDOM": random, "CHUNK": CHUNK,
    }  # fmt: skip
    bins = torch.zeros((tensors, BINS), dtype=torch.int64, device=device)
    lowest, digits, left = (torch.zeros_like(counts) for _ in range(3))
    shifts = torch.full_like(counts, key_bits - 4)
    nothing = counts == 0
    settled = nothing.to(torch.uint8)
    # Above the highest key there is none; all are above -1, should more be wanted than there are.
    thresholds = torch.where(nothing, HIGHEST, -1)

    def narrowed(wanted: Tensor, slack: Tensor | None, window: bool, everything: bool = False) -> None:
        sample = 1 if slack is None else SAMPLE
        _count_kernel[(programs,)](
            found.table, seeds, packed, table, ranges, lowest, shifts, settled, bins, rows, odd, squares,
            ALL=everything, SAMPLE=sample, BLOCK=BLOCK if sample == 1 else CHUNK // SAMPLE, BINS=BINS,
            num_warps=8, **constants,
        )  # fmt: skip
        _narrow_kernel[(tensors,)](
            bins, wanted, slack, lowest, shifts, settled, thresholds, digits, left, BITS=key_bits, WINDOW=window,
            SAMPLE=sample > 1, BINS=BINS, num_warps=1,
        )  # fmt: skip

    with torch.cuda.device_of(packed):
        if sampled:
            guess = (counts * share).round().clamp_(min=1)
            # A tensor outside of it costs its own entries some launches more, a wider window all of them.
            slack = (2.5 * guess.sqrt() + guess / 256).to(torch.int64)
            for _ in range(key_bits // 3):
                narrowed(guess.to(torch.int64), slack, window=True)
            narrowed(counts, None, window=True, everything=True)
        for number in range(max(_rounds(shift) for shift in range(key_bits - 3))):
            narrowed(counts, None, window=False, everything=number == 0 and not sampled)
        owner, block = ranges[:, 0], ranges[:, 1]
        ties = rows.gather(1, digits[owner][:, None])[:, 0].to(torch.int64)
        before = ties.cumsum(0) - ties
        before = before - before[torch.arange(programs, device=device) - block]
        wanted = left[owner] - before
        quotas = torch.where((wanted > 0) & (wanted >= ties), CHUNK, wanted.clamp(min=0))
        _pick_kernel[(programs,)](
            found.table, seeds, packed, table, ranges, thresholds, quotas, chosen, BLOCK=BLOCK, num_warps=4, **constants
        )  # fmt: skip
        return chosen, odd, squares.sum(dtype=torch.float64)
