# mypy: disable-error-code="no-untyped-def, no-redef"
"""select_entries: of each tensor, the active entries of smallest |score|, or the inactive ones of largest; exact counts.

scores: T tensors of one dtype; packed: uint8[B], their masks one behind the other (:mod:`sparseopt._schema`); counts: int64[T].
Every score becomes a key, a whole number of 15 (16-bit scores), 31 or 24 (random) bits: the bits of |score|, subtracted from
their largest value where the smallest is wanted, so that the largest keys are chosen.

Radix selection, all tensors at once: a launch for every 5 bits counts, tensor by tensor, the digits of the keys that begin as the
last chosen one does; a few operations on [T, 32] numbers then tell its next digit. The last launch writes the chosen entries: keys
above that one, and of the equal ones the first by index, for which the counts of the last digit are also kept by chunk.

A program takes 32,768 entries, 4096 at a time, up to 16 bytes to a thread and load, with the bytes of the mask that belong to
them. 16-bit scores are read 4 times, fp32 ones 8 times: longer digits read less and count slower, since a warp finds each bin of
its lanes by votes and a population count, of which an H100 does 16 in a cycle and multiprocessor (8 bits: 4.5 ms for 973 M
entries, which take 0.9 ms to read). Counts are integer sums, squares are added in a fixed order within a chunk and over chunks:
deterministic.
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
BLOCK = 4096  # entries at a time
DIGIT = 5  # bits: a bin for each lane of a warp
BINS = 1 << DIGIT
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
    """(int32 keys, the larger the sooner chosen; bits of |score| as fp32; which are NaN, or with GROW not finite)."""
    if value.dtype == tl.float32 or value.dtype == tl.float64:
        bits = widen(value, tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
        INFINITY: tl.constexpr = 0x7F800000
        LARGEST: tl.constexpr = 0x7FFFFFFF
    else:
        bits = value.to(tl.int16, bitcast=True).to(tl.int32) & 0x7FFF
        INFINITY: tl.constexpr = 0x7F80 if value.dtype == tl.bfloat16 else 0x7C00
        LARGEST: tl.constexpr = 0x7FFF
    if GROW:
        odd = bits >= INFINITY
        key = tl.where(odd, 0, bits)
    else:
        odd = bits > INFINITY
        if LARGEST == 0x7FFFFFFF:  # infinities tie with fp32's largest number, which no 16-bit one is
            bits = tl.minimum(bits, INFINITY - 1)
        key = LARGEST - bits
    return key, odd


@triton.jit
def _block(
    source, packed, seed, start, count, b, GROW: tl.constexpr, RANDOM: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Block ``b`` of a chunk whose mask begins at ``packed``: keys, eligible, odd, scores, each [BLOCK / 8, 8]."""
    byte = b * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
    bit = tl.arange(0, 8)
    i = byte[:, None] * 8 + bit[None, :]
    valid = i < count
    held = tl.load(packed + byte, mask=byte * 8 < count, other=0).to(tl.int32)
    active = ((held[:, None] >> bit[None, :]) & 1) != 0
    eligible = valid & ((active == 0) if GROW else active)
    if RANDOM:
        key = _random_keys(seed, start + i)
        value = i
        odd = i < 0
    else:
        if (b + 1) * BLOCK <= count:  # a mask would make the loads narrow
            value = tl.load(source + i)
        else:
            value = tl.load(source + i, mask=valid, other=0)
        key, odd = _keys(value, GROW)
        if not GROW:
            odd = odd & eligible
    return key, eligible, odd, value


@triton.jit(do_not_specialize=["shift", "width"])
def _count_kernel(
    scores,  # int64 [T], addresses
    seeds,  # int64 [T] or None
    packed,  # uint8 [B]
    begins,  # int64 [T + 1], bytes
    ranges,  # int64 [C, 3]
    prefixes,  # int64 [T], what the key begins with
    bins,  # int64 [T, BINS], added to
    rows,  # int32 [C, BINS], counts of each chunk (LAST)
    odd,  # int64 [T], added to (FIRST)
    squares,  # fp32 [C] (FIRST)
    shift,  # of the digit
    width,  # its bits, at most log2(BINS)
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    GROW: tl.constexpr,
    RANDOM: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    BINS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    tensor = tl.load(ranges + program * 3)
    start = tl.load(ranges + program * 3 + 1) * CHUNK
    count = tl.load(ranges + program * 3 + 2).to(tl.int32)
    source = address_of(scores, tensor, DTYPE, 1)
    if ALIGNED:
        source = tl.multiple_of(source, 16)
    source = source + start
    bits = packed + tl.load(begins + tensor) + start // 8
    seed = tl.load(seeds + tensor) if RANDOM else 0
    prefix = tl.load(prefixes + tensor).to(tl.int32)
    digits = tl.arange(0, BINS)
    total = tl.zeros([BINS], tl.int32)
    strange = tl.zeros([BLOCK // 8, 8], tl.int32)
    power = tl.zeros([BLOCK // 8, 8], tl.float32)
    for b in range(0, tl.cdiv(count, BLOCK)):
        key, eligible, wrong, value = _block(source, bits, seed, start, count, b, GROW, RANDOM, BLOCK)
        lead = key >> shift
        counted = eligible & ((lead >> width) == prefix)
        digit = lead & ((1 << width) - 1)
        total += tl.histogram(tl.reshape(digit, [BLOCK]), BINS, mask=tl.reshape(counted, [BLOCK]))
        if FIRST and not RANDOM:
            strange += wrong.to(tl.int32)
            if GROW:
                wide = tl.where(eligible & (wrong == 0), widen(value, tl.float32), 0.0)
                power += wide * wide
    tl.atomic_add(bins + tensor * BINS + digits, total.to(tl.int64), mask=total != 0, sem="relaxed")
    if LAST:
        tl.store(rows + program * BINS + digits, total)
    if FIRST and not RANDOM:
        number = tl.sum(tl.sum(strange, axis=1), axis=0)
        if number != 0:
            tl.atomic_add(odd + tensor, number.to(tl.int64), sem="relaxed")
        if GROW:
            tl.store(squares + program, tl.sum(tl.sum(power, axis=1), axis=0))


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
    program = tl.program_id(0).to(tl.int64)
    tensor = tl.load(ranges + program * 3)
    start = tl.load(ranges + program * 3 + 1) * CHUNK
    count = tl.load(ranges + program * 3 + 2).to(tl.int32)
    source = address_of(scores, tensor, DTYPE, 1)
    if ALIGNED:
        source = tl.multiple_of(source, 16)
    source = source + start
    place = tl.load(begins + tensor) + start // 8
    seed = tl.load(seeds + tensor) if RANDOM else 0
    threshold = tl.load(thresholds + tensor).to(tl.int32)
    quota = tl.load(quotas + program).to(tl.int32)
    bit = tl.arange(0, 8)
    # In all chunks of a tensor but one, all ties are chosen or none.
    some = (quota > 0) & (quota < CHUNK)
    left = quota
    for b in range(0, tl.cdiv(count, BLOCK)):
        key, eligible, _, _ = _block(source, packed + place, seed, start, count, b, GROW, RANDOM, BLOCK)
        taken = (eligible & ((key > threshold) | ((key == threshold) & (quota != 0)))).to(tl.int32)
        if some:
            tied = (eligible & (key == threshold)).to(tl.int32)
            per_byte = tl.sum(tied, axis=1)
            before = (tl.cumsum(per_byte, axis=0) - per_byte)[:, None] + (tl.cumsum(tied, axis=1) - tied)
            taken = tl.where((tied != 0) & (before >= left), 0, taken)
            left -= tl.sum(per_byte, axis=0)
        byte = b * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
        result = tl.sum(taken << bit[None, :], axis=1)
        tl.store(chosen + place + byte, result.to(tl.uint8), mask=byte * 8 < count)


def select_entries(
    scores: Sequence[Tensor], packed: Tensor, counts: Tensor, grow: bool, seeds: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches the selection; arguments and results as in :mod:`sparseopt._schema`. Nothing waits for the device."""
    device, sizes = packed.device, tuple(tensor.numel() for tensor in scores)
    begins, random = mask_begins(sizes), seeds is not None
    if packed.numel() != begins[-1] or packed.dtype != torch.uint8 or not packed.is_contiguous():
        raise ValueError(f"the masks of these tensors take {begins[-1]} bytes of one vector, got {packed.numel()}.")
    for vector in (counts, seeds):
        if vector is not None and (
            vector.shape != (len(sizes),) or vector.dtype != torch.int64 or vector.device != device
        ):
            raise ValueError(f"counts and seeds must be int64[{len(sizes)}] on {device}, got {vector.dtype}.")
    chosen, odd = torch.zeros_like(packed), torch.zeros_like(counts)
    found = describe("scores", scores, device)
    if found is None:
        return chosen, odd, torch.zeros((), dtype=torch.float64, device=device)
    ranges = kept_table(("ranges", CHUNK, sizes), device, lambda: ranges_of(sizes, CHUNK))
    table = kept_table(("masks", sizes), device, lambda: torch.tensor(begins, dtype=torch.int64))
    programs, tensors = len(ranges), len(sizes)
    rows = torch.empty((programs, BINS), dtype=torch.int32, device=device)
    squares = torch.zeros(programs, device=device)
    prefix, left = torch.zeros_like(counts), counts
    digit = prefix
    key_bits = 24 if random else 15 if found.dtype.itemsize == 2 else 31
    constants = {
        "DTYPE": TL_DTYPES[found.dtype], "ALIGNED": found.aligned, "GROW": grow, "RANDOM": random, "CHUNK": CHUNK,
        "BLOCK": BLOCK, "num_warps": 8,
    }  # fmt: skip
    with torch.cuda.device_of(packed):
        shift = key_bits
        while shift:
            width, first = min(DIGIT, shift), shift == key_bits
            shift -= width
            bins = torch.zeros((tensors, BINS), dtype=torch.int64, device=device)
            _count_kernel[(programs,)](
                found.table, seeds, packed, table, ranges, prefix, bins, rows, odd, squares, shift, width,
                FIRST=first, LAST=shift == 0, BINS=BINS, **constants,
            )  # fmt: skip
            # How many keys have at least this digit: the digit is the largest for which they suffice.
            reached = bins.flip(1).cumsum(1).flip(1)
            digit = ((reached >= left[:, None]).sum(1) - 1).clamp_(min=0)
            above = torch.cat([reached, reached.new_zeros(tensors, 1)], 1).gather(1, digit[:, None] + 1)[:, 0]
            left = left - above
            # Where nothing is chosen every digit is the largest; no key is above it.
            prefix = ((prefix << width) + digit).clamp_(max=HIGHEST)
        owner, block = ranges[:, 0], ranges[:, 1]
        ties = rows.gather(1, digit[owner][:, None])[:, 0].to(torch.int64)
        before = ties.cumsum(0) - ties
        before = before - before[torch.arange(programs, device=device) - block]
        wanted = left[owner] - before
        quotas = torch.where((wanted > 0) & (wanted >= ties), CHUNK, wanted.clamp(min=0))
        _pick_kernel[(programs,)](found.table, seeds, packed, table, ranges, prefix, quotas, chosen, **constants)
        return chosen, odd, squares.sum(dtype=torch.float64)
