# mypy: disable-error-code="no-untyped-def"
"""Bit-packed masks: pack, unpack, popcount, overlap, packed -> sorted indices.

packed: uint8[ceil(n/8)], little bit order (entry i is bit i % 8 of byte i // 8), unused bits zero.

One program takes a block of consecutive packed bytes, seen as a [BYTES, 8] tile of entries, so that the 8 entries of a
byte belong to one thread and its load of them is one 8-byte word. Memory bounds them all: 1 byte per bool when packing,
1/8 byte per entry when counting. A mask on a load keeps the compiler from widening it: only the last program has one.
Counts are integer sums of one partial count per program, and each output has one writer: deterministic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["mask_indices", "mask_overlap", "pack_mask", "popcount", "unpack_mask"]

PACK_BYTES = 1024  # packed bytes of a program: 8192 entries, 64 per thread at 4 warps
COUNT_BYTES = 4096  # 32 bytes per thread
INT32_NUMEL = 2**31


@triton.jit
def _bit_counts(byte):
    """Set bits of each byte (int32, 0..255)."""
    pairs = byte - ((byte >> 1) & 0x55)
    nibbles = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return (nibbles + (nibbles >> 4)) & 0x0F


@triton.jit
def _load_bytes(packed, first, i, size, BYTES: tl.constexpr):
    """Packed bytes first + i as int32[BYTES], zero past ``size``."""
    if first + BYTES <= size:
        byte = tl.load(packed + first + i)
    else:
        byte = tl.load(packed + first + i, mask=first + i < size, other=0)
    return byte.to(tl.int32)


@triton.jit(do_not_specialize=["numel"])
def _pack_kernel(bools, packed, numel, BYTES: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BYTES
    i = tl.arange(0, BYTES)
    bit = tl.arange(0, 8)
    entry = i[:, None] * 8 + bit[None, :]  # [BYTES, 8]
    source = bools + first * 8 + entry
    if (first + BYTES) * 8 <= numel:
        value = (tl.load(source) != 0).to(tl.int32)
        byte = tl.sum(value << bit[None, :], axis=1)
        tl.store(packed + first + i, byte.to(tl.uint8))
    else:
        value = (tl.load(source, mask=first * 8 + entry < numel, other=0) != 0).to(tl.int32)
        byte = tl.sum(value << bit[None, :], axis=1)
        tl.store(packed + first + i, byte.to(tl.uint8), mask=(first + i) * 8 < numel)


@triton.jit(do_not_specialize=["numel"])
def _unpack_kernel(packed, bools, numel, BYTES: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BYTES
    i = tl.arange(0, BYTES)
    bit = tl.arange(0, 8)
    entry = i[:, None] * 8 + bit[None, :]  # [BYTES, 8]
    byte = _load_bytes(packed, first, i, (numel + 7) // 8, BYTES)
    value = ((byte[:, None] >> bit[None, :]) & 1).to(tl.uint8)
    target = bools + first * 8 + entry
    if (first + BYTES) * 8 <= numel:
        tl.store(target, value)
    else:
        tl.store(target, value, mask=first * 8 + entry < numel)


@triton.jit(do_not_specialize=["size"])
def _count_kernel(packed, counts, size, BYTES: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    byte = _load_bytes(packed, program * BYTES, tl.arange(0, BYTES), size, BYTES)
    tl.store(counts + program, tl.sum(_bit_counts(byte), axis=0).to(tl.int64))


@triton.jit(do_not_specialize=["size", "programs"])
def _overlap_kernel(a, b, counts, size, programs, BYTES: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BYTES)
    x = _load_bytes(a, program * BYTES, i, size, BYTES)
    y = _load_bytes(b, program * BYTES, i, size, BYTES)
    tl.store(counts + program, tl.sum(_bit_counts(x & y), axis=0).to(tl.int64))
    tl.store(counts + programs + program, tl.sum(_bit_counts(x | y), axis=0).to(tl.int64))


@triton.jit(do_not_specialize=["size"])
def _indices_kernel(packed, ends, indices, size, BYTES: tl.constexpr):
    """Second pass: an entry's place is the count before its block (``ends``: counts up to and with each block), plus
    the count before its byte (a scan over the block's bytes), plus the set bits below it in its byte."""
    program = tl.program_id(0).to(tl.int64)
    first = program * BYTES
    i = tl.arange(0, BYTES)
    bit = tl.arange(0, 8)
    byte = _load_bytes(packed, first, i, size, BYTES)
    count = _bit_counts(byte)
    before_byte = tl.cumsum(count, axis=0) - count
    before_block = tl.load(ends + program) - tl.sum(count, axis=0)
    below = _bit_counts(byte[:, None] & ((1 << bit) - 1)[None, :])  # [BYTES, 8]
    place = before_byte[:, None] + below
    index = (first + i.to(tl.int64))[:, None] * 8 + bit[None, :]
    is_set = ((byte[:, None] >> bit[None, :]) & 1) != 0
    tl.store(indices + before_block + place, index.to(indices.dtype.element_ty), mask=is_set)


# ---- launchers -------------------------------------------------------------------------------------------------------
def pack_mask(mask: Tensor) -> Tensor:
    """bool (any shape, n entries) -> uint8[ceil(n/8)]."""
    bools = mask.contiguous()
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


def _block_counts(packed: Tensor, size: int) -> Tensor:
    """Set bits of each block of ``size`` bytes -> int64[blocks]."""
    counts = packed.new_empty((triton.cdiv(packed.numel(), size),), dtype=torch.int64)
    if counts.numel():
        _count_kernel[(counts.numel(),)](packed, counts, packed.numel(), BYTES=size)
    return counts


def popcount(packed: Tensor) -> Tensor:
    """uint8[...] -> int64[], the number of set bits."""
    packed = packed.contiguous()
    with torch.cuda.device_of(packed):
        return _block_counts(packed, COUNT_BYTES).sum()


def mask_overlap(a: Tensor, b: Tensor) -> Tensor:
    """Two packed masks of one length -> int64[2]: sizes of the intersection and of the union."""
    a, b = a.contiguous(), b.contiguous()
    programs = triton.cdiv(a.numel(), COUNT_BYTES)
    counts = a.new_empty((2, programs), dtype=torch.int64)
    with torch.cuda.device_of(a):
        if programs:
            _overlap_kernel[(programs,)](a, b, counts, a.numel(), programs, BYTES=COUNT_BYTES)
        return counts.sum(dim=1)


def mask_indices(packed: Tensor, numel: int) -> Tensor:
    """Packed mask of ``numel`` entries -> sorted flat indices, int32 (int64 when numel > 2^31).

    Waits for the device once: the size of the output depends on the data.
    """
    packed = packed.contiguous()
    dtype = torch.int32 if numel <= INT32_NUMEL else torch.int64
    with torch.cuda.device_of(packed):
        ends = _block_counts(packed, PACK_BYTES).cumsum(0)
        indices = packed.new_empty((int(ends[-1]) if numel else 0,), dtype=dtype)
        if indices.numel():
            _indices_kernel[(ends.numel(),)](packed, ends, indices, packed.numel(), BYTES=PACK_BYTES)
    return indices
