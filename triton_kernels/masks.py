# mypy: disable-error-code="no-untyped-def"
"""Bit-packed masks: pack, unpack, popcount, overlap, packed -> sorted indices.

packed: uint8[ceil(n/8)], little bit order (entry i is bit i % 8 of byte i // 8), unused bits zero.

Memory bounds packing, unpacking and counting: 1 byte per bool, 1/8 byte per entry. Whole blocks are moved as 32-bit words:
4 bools become 4 bits (and back) by one multiplication, bits are counted in parallel. The last block goes by bytes.
Indices take two passes: counts per block with a prefix sum, then every word writes its bits out, lowest first, as many
times as the fullest word of the block has bits; that loop bounds it, not memory. Counts are integer sums, and each output
has one writer: deterministic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["mask_indices", "mask_overlap", "pack_mask", "popcount", "unpack_mask"]

PACK_BYTES = 512  # packed bytes of a program: 4096 entries, 32 per thread at 4 warps
COUNT_WORDS = 1024  # 8 words per thread at 4 warps
INDEX_WORDS = 256  # 8 words per thread at 1 warp: fewer words make the fullest one emptier
INT32_NUMEL = 2**31


@triton.jit
def _bit_counts(x):
    """Set bits of int32 words."""
    pairs = x - ((x >> 1) & 0x55555555)
    nibbles = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    return (((nibbles + (nibbles >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24


@triton.jit
def _load_words(packed, first, size, WORDS: tl.constexpr):
    """Words first .. first + WORDS of ``size`` packed bytes, int32[WORDS], zero past the end."""
    i = tl.arange(0, WORDS)
    if (first + WORDS) * 4 <= size:
        words = tl.load(packed.to(tl.pointer_type(tl.int32)) + first + i)
    else:
        j = tl.arange(0, 4)
        at = (first + i)[:, None] * 4 + j[None, :]
        byte = tl.load(packed + at, mask=at < size, other=0).to(tl.int32)
        words = tl.sum(byte << (8 * j)[None, :], axis=1)
    return words


@triton.jit(do_not_specialize=["numel"])
def _pack_kernel(bools, packed, numel, BYTES: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BYTES
    i = tl.arange(0, BYTES)
    if (first + BYTES) * 8 <= numel:
        half = tl.arange(0, 2)
        words = bools.to(tl.pointer_type(tl.int32)) + first * 2
        x = tl.load(words + (i[:, None] * 2 + half[None, :]))  # 4 bools each
        # 0x80 in every byte that is not 0, whatever it holds; then bits 7, 15, 23, 31 move to 28, 29, 30, 31.
        marks = (((x & 0x7F7F7F7F) + 0x7F7F7F7F) | x) & -0x7F7F7F80
        nibble = ((marks * 0x00204081) >> 28) & 0x0F
        byte = tl.sum(nibble << (4 * half)[None, :], axis=1)
        tl.store(packed + first + i, byte.to(tl.uint8))
    else:
        bit = tl.arange(0, 8)
        entry = first * 8 + (i[:, None] * 8 + bit[None, :])
        value = (tl.load(bools + entry, mask=entry < numel, other=0) != 0).to(tl.int32)
        byte = tl.sum(value << bit[None, :], axis=1)
        tl.store(packed + first + i, byte.to(tl.uint8), mask=(first + i) * 8 < numel)


@triton.jit(do_not_specialize=["numel"])
def _unpack_kernel(packed, bools, numel, BYTES: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BYTES
    i = tl.arange(0, BYTES)
    byte = tl.load(packed + first + i, mask=(first + i) * 8 < numel, other=0).to(tl.int32)
    if (first + BYTES) * 8 <= numel:
        half = tl.arange(0, 2)
        nibble = (byte[:, None] >> (4 * half)[None, :]) & 0x0F
        words = bools.to(tl.pointer_type(tl.int32)) + first * 2
        tl.store(words + (i[:, None] * 2 + half[None, :]), (nibble * 0x00204081) & 0x01010101)
    else:
        bit = tl.arange(0, 8)
        entry = first * 8 + (i[:, None] * 8 + bit[None, :])
        value = ((byte[:, None] >> bit[None, :]) & 1).to(tl.uint8)
        tl.store(bools + entry, value, mask=entry < numel)


@triton.jit(do_not_specialize=["size", "blocks"])
def _count_kernel(packed, counts, size, blocks, WORDS: tl.constexpr, ROWS: tl.constexpr):
    """Set bits of each block of WORDS words; a program takes ROWS blocks."""
    program = tl.program_id(0).to(tl.int64)
    count = _bit_counts(_load_words(packed, program * (WORDS * ROWS), size, WORDS * ROWS))
    row = program * ROWS + tl.arange(0, ROWS)
    tl.store(counts + row, tl.sum(tl.reshape(count, [ROWS, WORDS]), axis=1).to(tl.int64), mask=row < blocks)


@triton.jit(do_not_specialize=["size", "programs"])
def _overlap_kernel(a, b, counts, size, programs, WORDS: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    x = _load_words(a, program * WORDS, size, WORDS)
    y = _load_words(b, program * WORDS, size, WORDS)
    tl.store(counts + program, tl.sum(_bit_counts(x & y), axis=0).to(tl.int64))
    tl.store(counts + programs + program, tl.sum(_bit_counts(x | y), axis=0).to(tl.int64))


@triton.jit(do_not_specialize=["size"])
def _indices_kernel(packed, ends, indices, size, WORDS: tl.constexpr):
    """Second pass: a bit's place is the count before its block (``ends``: counts up to and with each block), plus the
    count before its word (a scan over the block), plus the bits below it."""
    program = tl.program_id(0).to(tl.int64)
    x = _load_words(packed, program * WORDS, size, WORDS)
    count = _bit_counts(x)
    before_block = tl.load(ends + program) - tl.sum(count, axis=0)
    target = indices + before_block + (tl.cumsum(count, axis=0) - count)
    # The place of a bit is the exponent of its power of two, which is biased by 127.
    first_entry = ((program * WORDS + tl.arange(0, WORDS)) * 32 - 127).to(indices.dtype.element_ty)
    fullest = tl.max(count, axis=0)
    for n in range(0, fullest):
        lowest = x & -x
        exponent = lowest.to(tl.uint32, bitcast=True).to(tl.float32).to(tl.int32, bitcast=True) >> 23
        tl.store(target + n, first_entry + exponent, mask=x != 0)
        x = x ^ lowest


# ---- launchers -------------------------------------------------------------------------------------------------------
def _aligned(tensor: Tensor) -> Tensor:
    """Contiguous, from a 4-byte boundary on: kernels read words."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 4 == 0 else tensor.clone()


def pack_mask(mask: Tensor) -> Tensor:
    """bool (any shape, n entries) -> uint8[ceil(n/8)]."""
    bools = _aligned(mask)
    numel = bools.numel()
    packed = bools.new_empty(((numel + 7) // 8,), dtype=torch.uint8)
    if numel:
        with torch.cuda.device_of(bools):
            grid = (triton.cdiv(packed.numel(), PACK_BYTES),)
            _pack_kernel[grid](bools.view(torch.uint8), packed, numel, BYTES=PACK_BYTES)
    return packed


def unpack_mask(packed: Tensor, numel: int) -> Tensor:
    """uint8[ceil(n/8)] -> bool[n]."""
    packed = packed.contiguous()
    bools = packed.new_empty((numel,), dtype=torch.bool)
    if numel:
        with torch.cuda.device_of(packed):
            grid = (triton.cdiv(packed.numel(), PACK_BYTES),)
            _unpack_kernel[grid](packed, bools.view(torch.uint8), numel, BYTES=PACK_BYTES)
    return bools


def _block_counts(packed: Tensor, words: int) -> Tensor:
    """Set bits of each block of ``words`` words -> int64[blocks]."""
    blocks, rows = triton.cdiv(packed.numel(), 4 * words), COUNT_WORDS // words
    counts = packed.new_empty((blocks,), dtype=torch.int64)
    if blocks:
        _count_kernel[(triton.cdiv(blocks, rows),)](packed, counts, packed.numel(), blocks, WORDS=words, ROWS=rows)
    return counts


def popcount(packed: Tensor) -> Tensor:
    """uint8[...] -> int64[], the number of set bits."""
    packed = _aligned(packed)
    with torch.cuda.device_of(packed):
        return _block_counts(packed, COUNT_WORDS).sum()


def mask_overlap(a: Tensor, b: Tensor) -> Tensor:
    """Two packed masks of one length -> int64[2]: sizes of the intersection and of the union."""
    a, b = _aligned(a), _aligned(b)
    programs = triton.cdiv(a.numel(), 4 * COUNT_WORDS)
    counts = a.new_empty((2, programs), dtype=torch.int64)
    with torch.cuda.device_of(a):
        if programs:
            _overlap_kernel[(programs,)](a, b, counts, a.numel(), programs, WORDS=COUNT_WORDS)
        return counts.sum(dim=1)


def mask_indices(packed: Tensor, numel: int) -> Tensor:
    """Packed mask of ``numel`` entries -> sorted flat indices, int32 (int64 when numel > 2^31).

    Waits for the device once: the size of the output depends on the data.
    """
    packed = _aligned(packed)
    dtype = torch.int32 if numel <= INT32_NUMEL else torch.int64
    with torch.cuda.device_of(packed):
        ends = _block_counts(packed, INDEX_WORDS).cumsum(0)
        indices = packed.new_empty((int(ends[-1]) if numel else 0,), dtype=dtype)
        if indices.numel():
            _indices_kernel[(ends.numel(),)](packed, ends, indices, packed.numel(), WORDS=INDEX_WORDS, num_warps=1)
    return indices
