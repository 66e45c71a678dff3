"""The mask codec in numpy: the format of csrc/codec.cpp, where it is described, for installations without the extension.

Slower, and byte for byte the same. Decoding takes a block at a time; beside its target it needs at most one more mask.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

__all__ = ["ESCAPE", "decode_mask_", "encode_mask"]

Bits = NDArray[np.uint8]
Values = NDArray[np.int64]

BLOCK = 1024
ESCAPE = 16
MAX_SHIFT = 48
RUNS, INVERTED = 1, 2
PIECE = 1 << 20  # entries unpacked at a time
WIDE = 4096  # groups of this size are flipped one by one


# ---- decoding --------------------------------------------------------------------------------------------------------
class _Reader:
    def __init__(self, stream: memoryview) -> None:
        self.stream, self.at = stream, 0

    def take(self, size: int) -> memoryview:
        if size > len(self.stream) - self.at:
            raise ValueError("the stream ends too early")
        self.at += size
        return self.stream[self.at - size : self.at]

    def varint(self) -> int:
        value = 0
        for shift in range(0, 63, 7):
            byte = self.take(1)[0]
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError("a number is too long")

    def part(self, count: int, limit: int) -> Values:
        """``count`` values, none above ``limit`` by more than its last k bits."""
        k = self.take(1)[0]
        if k > MAX_SHIFT:
            raise ValueError("a shift is too large")
        high_size = self.varint()
        if high_size > (count * (ESCAPE + 1) + 7) // 8:
            raise ValueError("a unary number is too long")
        low = np.frombuffer(self.take((count * k + 7) // 8), np.uint8)
        high = np.frombuffer(self.take(high_size), np.uint8)
        stops = np.flatnonzero(np.unpackbits(high, bitorder="little"))
        if stops.size != count:
            raise ValueError("a block has too many or too few values")
        values: Values = np.diff(stops, prepend=-1).astype(np.int64) - 1
        for i in np.flatnonzero(values >= ESCAPE):
            if values[i] > ESCAPE:
                raise ValueError("a unary number is too long")
            values[i] += min(self.varint(), 1 << 62)
        if int(values.max()) > limit >> k:
            raise ValueError("a value is too large")
        if k:
            bits = np.unpackbits(low, count=count * k, bitorder="little").reshape(count, k)
            values = values << k | bits @ (1 << np.arange(k, dtype=np.int64))
        return values


def decode_mask_(stream: Bits, packed: Bits, n: int) -> None:
    """Flips the coded entries of ``packed``, uint8[ceil(n/8)]; ValueError for a damaged stream, its target then undefined."""
    reader = _Reader(np.ascontiguousarray(stream).data)
    flags, unit, count = reader.take(1)[0], reader.varint(), reader.varint()
    if flags > RUNS | INVERTED or not 1 <= unit <= max(n, 1):
        raise ValueError("the kind of coding is unknown")
    units = (n + unit - 1) // unit
    if count > units:
        raise ValueError("there are more values than entries")
    if flags & INVERTED:
        _flip(packed, 0, n)
    runs = bool(flags & RUNS)
    wide = unit >= WIDE
    # Gaps of single entries go straight to the target; else groups, or both ends of runs, are collected first.
    marks = packed if unit == 1 and not runs else np.zeros(0 if wide else units // 8 + 1, np.uint8)
    position = 0
    for done in range(0, count, BLOCK):
        size = min(BLOCK, count - done)
        steps = reader.part(size, units)
        if runs:
            steps = np.stack([steps, reader.part(size, units) + 1], axis=1).reshape(-1)
            where = position + np.cumsum(steps)
            position, outside = int(where[-1]), int(where.max()) > units
        else:
            where = position + np.cumsum(steps + 1) - 1
            position = int(where[-1]) + 1
            outside = position > units
        if outside:
            raise ValueError("an entry lies outside of the mask")
        if wide:
            for begin, end in where.reshape(-1, 2) if runs else ((at, at + 1) for at in where):
                _flip(packed, int(begin) * unit, min(int(end) * unit, n))
        else:
            np.bitwise_xor.at(marks, where >> 3, (1 << (where & 7)).astype(np.uint8))
    if reader.at < len(reader.stream):
        raise ValueError("something follows the last block")
    if marks is not packed and not wide:
        _spread(marks, packed, n, unit, runs)


def _flip(packed: Bits, begin: int, end: int) -> None:
    first, last = begin >> 3, end >> 3
    head, tail = 255 << (begin & 7) & 255, (1 << (end & 7)) - 1
    if begin >= end:
        return
    if first == last:
        packed[first] ^= head & tail
        return
    packed[first] ^= head
    packed[first + 1 : last] ^= 255
    if tail:
        packed[last] ^= tail


def _spread(marks: Bits, packed: Bits, n: int, unit: int, runs: bool) -> None:
    """Flips in ``packed`` the groups marked in ``marks``, or those between marks."""
    step = max(8, PIECE // unit // 8 * 8)  # groups; whole bytes on both sides
    inside = np.uint8(0)
    for start in range(0, (n + unit - 1) // unit, step):
        active = np.unpackbits(marks[start // 8 : (start + step) // 8], bitorder="little")
        if runs:
            active[0] ^= inside
            active = np.bitwise_xor.accumulate(active)
            inside = active[-1]
        entries = np.repeat(active, unit)[: n - start * unit]
        begin = start * unit // 8
        packed[begin : begin + (entries.size + 7) // 8] ^= np.packbits(entries, bitorder="little")


# ---- encoding --------------------------------------------------------------------------------------------------------
def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes(out + bytes([value]))


def _costs(values: Values, k: int) -> int:
    high = values >> k
    rest = high[high >= ESCAPE] - ESCAPE
    escapes = 8 * sum(int((rest >> shift > 0).sum()) for shift in range(7, 49, 7)) + 8 * rest.size
    return int(values.size * k + np.minimum(high, ESCAPE).sum()) + escapes


def _part(values: Values) -> bytes:
    last = min(int(int(values.sum()) // values.size).bit_length(), MAX_SHIFT)
    k = min(range(last + 1), key=lambda shift: _costs(values, shift))
    high = values >> k
    low = np.packbits((values[:, None] >> np.arange(k)) & 1, bitorder="little").tobytes() if k else b""
    stops = np.cumsum(np.minimum(high, ESCAPE) + 1) - 1
    unary = np.zeros(int(stops[-1]) + 1, np.uint8)
    unary[stops] = 1
    coded = np.packbits(unary, bitorder="little").tobytes()
    escapes = b"".join(_varint(int(value) - ESCAPE) for value in high[high >= ESCAPE])
    return bytes([k]) + _varint(len(coded)) + low + coded + escapes


def _stream(flags: int, unit: int, parts: list[Values], limit: int) -> bytes:
    out = bytearray(bytes([flags]) + _varint(unit) + _varint(parts[0].size))
    for begin in range(0, parts[0].size, BLOCK):
        for values in parts:
            out += _part(values[begin : begin + BLOCK])
        if len(out) >= limit:
            return b""
    return bytes(out) if len(out) < limit else b""


def _changes(packed: Bits, n: int) -> Iterator[Values]:
    """Entries that differ from the one before; entry 0 from an inactive one."""
    before = np.uint8(0)
    for start in range(0, n, PIECE):
        entries = np.unpackbits(packed[start // 8 : (start + PIECE) // 8], bitorder="little")[: n - start]
        yield np.flatnonzero(np.diff(entries, prepend=before)) + start
        before = entries[-1]


def encode_mask(packed: Bits, n: int, limit: int) -> bytes:
    """Codes a packed mask of ``n`` entries; empty if that takes ``limit`` bytes or more."""
    ends = np.concatenate([*_changes(packed, n), np.empty(0, np.int64)])
    unit = int(np.gcd.reduce(ends[ends > 0])) if np.any(ends > 0) else max(n, 1)
    if ends.size % 2:
        ends = np.append(ends, n)
    edges = -(-ends // unit).reshape(-1, 2)
    units = -(-n // unit)
    active = int((edges[:, 1] - edges[:, 0]).sum())
    chosen, runs = edges, len(edges)
    if 2 * active > units:
        inner = np.concatenate([[0], edges.reshape(-1), [units]]).reshape(-1, 2)
        chosen = inner[inner[:, 0] < inner[:, 1]]
    symbols = min(active, units - active)
    lengths = chosen[:, 1] - chosen[:, 0]
    gaps = np.zeros(symbols, np.int64)
    gaps[np.cumsum(lengths) - lengths] = chosen[:, 0] - np.append(0, chosen[:-1, 1])[: len(chosen)]
    best = _stream(0 if 2 * active <= units else INVERTED, unit, [gaps], limit)
    if 10 * runs <= 9 * symbols:
        before = edges[:, 0] - np.append(0, edges[:-1, 1])[:runs]
        coded = _stream(RUNS, unit, [before, edges[:, 1] - edges[:, 0] - 1], len(best) or limit)
        return coded or best
    return best
