# mypy: disable-error-code="no-untyped-def, no-redef"
"""select_entries: of each tensor, the active entries of smallest |score|, or the inactive ones of largest; exact counts.

scores: T tensors of one dtype; packed: uint8[B], their masks one behind the other (:mod:`sparseopt._schema`); counts: int64[T].
Every score becomes a key, a whole number of 15 (16-bit scores), 31 or 24 (random) bits: the bits of |score|, subtracted from
their largest value where the smallest is wanted, so that the largest keys are chosen.

Radix selection, all tensors at once: a launch for every 5 bits counts, tensor by tensor, the digits of the keys that begin as the
last chosen one does; a few operations on [T, 32] numbers then tell its next digit. The last launch writes the chosen entries: keys
above that one, and of the equal ones the first by index, for which the counts of the last digit are also kept by chunk.

Of 16-bit scores an eighth is looked at first: the last chosen key of these, found in the same way, is near the one that is sought,
and one launch over all entries counts each of the 30 keys around it. Where the sought key is not among them, as happens if scores
change along a tensor, the tensor goes the long way; the programs of all others end at once.

A program takes 32,768 entries, 4096 at a time, up to 16 bytes to a thread and load, with the bytes of the mask that belong to
them. 16-bit scores are read 2.4 times (the long way: 5.4), fp32 ones 8 times: longer digits read less and count slower, since a
warp finds each bin of its lanes by votes and a population count, of which an H100 does 16 in a cycle and multiprocessor. Counting
in packed bytes by threads was slower (benchmarks/README.md, changing masks). Counts are integer sums, squares are added in a fixed
order within a chunk and over chunks: deterministic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

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
SAMPLE = CHUNK // BLOCK  # one block in so many tells about where the last chosen key is
HIGHEST = torch.iinfo(torch.int32).max


class Chosen(NamedTuple):
    """Of each tensor, int64[T]: the last chosen key, its last digit, and how many equal to it are chosen."""

    key: Tensor
    digit: Tensor
    left: Tensor


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
    prefixes,  # int64 [T], what the key begins with; of NEAR: the first of the keys that are counted by themselves
    done,  # uint8 [T], of these nothing is counted (DONE)
    bins,  # int64 [T, BINS], added to
    rows,  # int32 [C, BINS], counts of each chunk (LAST)
    odd,  # int64 [T], added to (ALL)
    squares,  # fp32 [C] (ALL)
    shift,  # of the digit
    width,  # its bits, at most log2(BINS)
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    GROW: tl.constexpr,
    RANDOM: tl.constexpr,
    ALL: tl.constexpr,  # also counts what is odd, and adds up squares
    LAST: tl.constexpr,
    NEAR: tl.constexpr,  # bins are: none (keys below do not count), BINS - 2 keys, keys above
    SAMPLE: tl.constexpr,  # of the blocks one in so many
    DONE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    BINS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    tensor = tl.load(ranges + program * 3)
    if DONE and tl.load(done + tensor) != 0:
        return
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
    blocks = tl.cdiv(count, BLOCK)
    first = (program % SAMPLE).to(tl.int32) % blocks  # another block of every chunk
    for b in range(first, blocks, SAMPLE):
        key, eligible, wrong, value = _block(source, bits, seed, start, count, b, GROW, RANDOM, BLOCK)
        if NEAR:
            counted = eligible & (key >= prefix)
            digit = tl.minimum(key - prefix + 1, BINS - 1)
        else:
            lead = key >> shift
            counted = eligible & ((lead >> width) == prefix)
            digit = lead & ((1 << width) - 1)
        total += tl.histogram(tl.reshape(digit, [BLOCK]), BINS, mask=tl.reshape(counted, [BLOCK]))
        if ALL and not RANDOM:
            strange += wrong.to(tl.int32)
            if GROW:
                wide = tl.where(eligible & (wrong == 0), widen(value, tl.float32), 0.0)
                power += wide * wide
    tl.atomic_add(bins + tensor * BINS + digits, total.to(tl.int64), mask=total != 0, sem="relaxed")
    if LAST:
        tl.store(rows + program * BINS + digits, total)
    if ALL and not RANDOM:
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


def _last_digit(bins: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
    """The largest digit that ``left`` keys have or are above (the largest of all for none), and how many have it."""
    reached = bins.flip(1).cumsum(1).flip(1)
    digit = ((reached >= left[:, None]).sum(1) - 1).clamp_(min=0)
    above = torch.cat([reached, reached.new_zeros(len(bins), 1)], 1).gather(1, digit[:, None] + 1)[:, 0]
    return digit, left - above


def _share_in_sample(sizes: Sequence[int]) -> Tensor:
    """fp64[T] on the CPU: the share of a tensor's entries in the blocks that a sample has."""
    ranges = ranges_of(sizes, CHUNK)
    blocks = (ranges[:, 2] + BLOCK - 1) // BLOCK
    block = torch.arange(len(ranges)) % SAMPLE % blocks
    looked = (ranges[:, 2] - block * BLOCK).clamp(max=BLOCK)  # SAMPLE blocks at most, so that no chunk has a second one
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
    key_bits = 24 if random else 15 if found.dtype.itemsize == 2 else 31
    constants = {
        "DTYPE": TL_DTYPES[found.dtype], "ALIGNED": found.aligned, "GROW": grow, "RANDOM": random, "CHUNK": CHUNK,
        "BLOCK": BLOCK, "num_warps": 8,
    }  # fmt: skip

    def counted(prefix: Tensor, shift: int, width: int, done: Tensor | None = None, **how: bool | int) -> Tensor:
        bins = torch.zeros((tensors, BINS), dtype=torch.int64, device=device)
        flags = {"ALL": False, "LAST": False, "NEAR": False, "SAMPLE": 1, "DONE": done is not None, **how}
        _count_kernel[(programs,)](
            found.table, seeds, packed, table, ranges, prefix, done, bins, rows, odd, squares, shift, width, BINS=BINS, **flags,
            **constants,
        )  # fmt: skip
        return bins

    def search(left: Tensor, done: Tensor | None = None, sample: int = 1, everything: bool = False) -> Chosen:
        """The last of the ``left`` largest keys, digit by digit."""
        prefix, shift = torch.zeros_like(counts), key_bits
        chosen_by = Chosen(prefix, prefix, left)
        while shift:
            width, first = min(DIGIT, shift), shift == key_bits
            shift -= width
            last = shift == 0 and sample == 1
            bins = counted(prefix, shift, width, done, SAMPLE=sample, ALL=first and everything, LAST=last)
            digit, left = _last_digit(bins, left)
            # Where nothing is chosen every digit is the largest; no key is above it.
            prefix = ((prefix << width) + digit).clamp_(max=HIGHEST)
            chosen_by = Chosen(prefix, digit, left)
        return chosen_by

    with torch.cuda.device_of(packed):
        if key_bits == 15:
            share = kept_table(("sampled", sizes), device, lambda: _share_in_sample(sizes))
            guess = search((counts * share).round().clamp_(min=1).to(torch.int64), sample=SAMPLE).key
            near = (guess - (BINS - 2) // 2).clamp_(0, (1 << key_bits) - (BINS - 2))
            digit, left = _last_digit(counted(near, 0, 0, ALL=True, LAST=True, NEAR=True), counts)
            nothing = counts == 0
            done = nothing | ((digit > 0) & (digit < BINS - 1))
            long = search(counts, done.to(torch.uint8))
            threshold = torch.where(nothing, HIGHEST, torch.where(done, near + digit - 1, long.key))
            digit, left = torch.where(done, digit, long.digit), torch.where(done, left, long.left)
        else:
            threshold, digit, left = search(counts, everything=True)
        owner, block = ranges[:, 0], ranges[:, 1]
        ties = rows.gather(1, digit[owner][:, None])[:, 0].to(torch.int64)
        before = ties.cumsum(0) - ties
        before = before - before[torch.arange(programs, device=device) - block]
        wanted = left[owner] - before
        quotas = torch.where((wanted > 0) & (wanted >= ties), CHUNK, wanted.clamp(min=0))
        _pick_kernel[(programs,)](found.table, seeds, packed, table, ranges, threshold, quotas, chosen, **constants)
        return chosen, odd, squares.sum(dtype=torch.float64)
