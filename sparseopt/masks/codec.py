"""How the bits of one mask are stored: raw, deflated, or as Rice-coded gaps, whatever is smallest.

Of large masks, samples decide what is tried at all: random masks of 39% to 61% active entries are smallest raw, and deflating
them would take longest and gain 2%.

A stored mask is one byte that says how (``RAW``, ``ZLIB``, ``RICE``; with ``FRESH`` where a difference does not pay), then:

* ``RAW``: the packed bits; ``ZLIB``: the same, deflated: N:M masks and whole columns;
* ``RICE``: gaps or runs of groups as described in csrc/codec.cpp: random masks, rows, aligned runs; done by the extension, or
  by :mod:`sparseopt.masks._rice` where there is none.

Decoding flips bits of its target, which holds the parent's bits for a difference, else zeros. It never trusts a stream: it
writes within its target only and holds no more than a piece of decoded bytes beside it.
"""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparseopt import _backend, functional
from sparseopt.masks import _rice

__all__ = ["CODEC", "LEGACY", "decode_", "decode_legacy_", "encode", "encode_difference"]

CODEC = "rice"
LEGACY = "zlib-gap8"  # one byte a gap, deflated: written by earlier releases
RAW, ZLIB, RICE = 0, 1, 2
FRESH = 128  # flag: not against the parent
BITS, GAPS = 0, 1  # LEGACY's kinds

LEVEL = 6
PIECE = 1 << 16  # bytes inflated at a time
SAMPLE = 1 << 15  # bytes deflated to see whether the rest is worth it
SAMPLES = 4
LEAST_GAIN = 0.95  # a large mask is deflated where samples get below this share of what else there is
RICE_SAMPLE = 1 << 12  # bytes coded to see whether gaps can be shorter than the bits; groups stay aligned in it
RICE_SAMPLES = 16

Bytes = NDArray[np.uint8]


def _rice_functions() -> tuple[Callable[[Bytes, int, int], bytes], Callable[[Bytes, Bytes, int], None]]:
    if _backend.selection("cpu").backend == "cpp":
        compiled = importlib.import_module("sparseopt._C")
        return compiled.encode_mask, compiled.decode_mask_
    return _rice.encode_mask, _rice.decode_mask_


# ---- encoding --------------------------------------------------------------------------------------------------------
def encode(bits: Tensor, n: int, flag: int = 0) -> Tensor:
    """Stores a packed mask.

    Args:
        bits: uint8[ceil(n/8)], little bit order, unused bits zero.
        n: entries, below 2^48.
        flag: 0 or ``FRESH``, kept in the first byte.

    Returns:
        uint8[*], at most one byte longer than ``bits``.
    """
    raw = bits.contiguous().numpy()
    kind, best = RAW, raw.data
    coded = _rice_functions()[0](raw, n, raw.size) if _has_gaps(raw) else b""
    if coded:
        kind, best = RICE, memoryview(coded)
    if _deflates(raw, len(best)):
        deflated = zlib.compress(raw.data, LEVEL)
        if len(deflated) < len(best):
            kind, best = ZLIB, memoryview(deflated)
    stored = torch.empty(1 + len(best), dtype=torch.uint8)
    stored[0] = kind | flag
    stored.numpy()[1:] = np.frombuffer(best, np.uint8)
    return stored


def encode_difference(bits: Tensor, parent: Tensor, n: int) -> Tensor | None:
    """Stores a packed mask against another of its size, or afresh where that is smaller; None if they are equal."""
    difference = bits ^ parent
    changed = int(functional.popcount(difference))
    if not changed:
        return None
    stored = encode(difference, n)
    if 2 * changed < int(functional.popcount(bits)):
        return stored
    fresh = encode(bits, n, FRESH)
    return fresh if fresh.numel() < stored.numel() else stored


def _has_gaps(raw: Bytes) -> bool:
    """Whether Rice coding may get below the bits themselves: False where it fails on every sample of a large mask."""
    if raw.size < 8 * RICE_SAMPLES * RICE_SAMPLE:
        return True
    last, encode_mask = raw.size // RICE_SAMPLE - 1, _rice_functions()[0]
    starts = (i * last // (RICE_SAMPLES - 1) * RICE_SAMPLE for i in range(RICE_SAMPLES))
    return any(encode_mask(raw[at : at + RICE_SAMPLE], 8 * RICE_SAMPLE, RICE_SAMPLE) for at in starts)


def _deflates(raw: Bytes, size: int) -> bool:
    """Whether zlib may get below ``size`` bytes: judged by its fastest level, since the best one is slow; of a large mask
    on samples, and by the best level on them."""
    if raw.size <= SAMPLES * SAMPLE:
        return len(zlib.compress(raw.data, 1)) < 1.1 * size  # level 6 gains more than that where it gains at all
    step = (raw.size - SAMPLE) // (SAMPLES - 1)
    pieces = [raw[i * step : i * step + SAMPLE].data for i in range(SAMPLES)]

    def share(level: int) -> float:
        return sum(len(zlib.compress(piece, level)) for piece in pieces) / (SAMPLES * SAMPLE)

    return share(1) * raw.size < 1.1 * size and share(LEVEL) * raw.size < LEAST_GAIN * size


# ---- decoding --------------------------------------------------------------------------------------------------------
def decode_(stored: Tensor, bits: Tensor, n: int) -> None:
    """Applies a stored mask to ``bits`` in place.

    Args:
        stored: uint8[*], from :func:`encode` or :func:`encode_difference`, or anything else.
        bits: uint8[ceil(n/8)], the parent's mask or zeros; undefined after an error.
        n: entries.

    Raises:
        ValueError: ``stored`` is damaged.
    """
    data, target = stored.numpy(), bits.numpy()
    if not 1 <= data.size <= target.size + 1:
        raise ValueError(f"{data.size} bytes cannot hold a mask of {target.size}")
    kind, stream = int(data[0]) & ~FRESH, data[1:]
    if int(data[0]) & FRESH:
        target[:] = 0
    if kind == RICE:
        _rice_functions()[1](stream, target, n)
        return
    if kind not in (RAW, ZLIB):
        raise ValueError(f"kind {kind} is unknown")
    _flip(_inflate(stream) if kind == ZLIB else [stream], target)


def decode_legacy_(stored: Tensor, bits: Tensor, n: int) -> None:
    """As :func:`decode_`, for ``LEGACY``: gaps in bytes, 255 meaning "255 inactive entries and go on", or bits; deflated."""
    data, target = stored.numpy(), bits.numpy()
    if data.size == 0 or int(data[0]) not in (BITS, GAPS):
        raise ValueError("the kind of coding is unknown")
    if int(data[0]) == BITS:
        _flip(_inflate(data[1:]), target)
        return
    position = 0
    for piece in _inflate(data[1:]):
        ends = piece < 255
        after = position + np.cumsum(piece + ends.astype(np.int64))
        where = after[ends] - 1
        position = int(after[-1])
        if position > n + 255 or (where.size and int(where[-1]) >= n):
            raise ValueError("an entry lies outside of the mask")
        np.bitwise_xor.at(target, where >> 3, (1 << (where & 7)).astype(np.uint8))


def _flip(pieces: Iterable[Bytes], target: Bytes) -> None:
    at = 0
    for piece in pieces:
        if piece.size > target.size - at:
            raise ValueError("there are more bits than entries")
        target[at : at + piece.size] ^= piece
        at += piece.size
    if at < target.size:
        raise ValueError("there are fewer bits than entries")


def _inflate(stream: Bytes) -> Iterator[Bytes]:
    """Pieces of at most ``PIECE`` bytes of a zlib stream that has to end where ``stream`` ends."""
    inflater = zlib.decompressobj()
    try:
        for begin in range(0, stream.size, PIECE):
            left: bytes | memoryview = stream[begin : begin + PIECE].data
            while not inflater.eof:
                piece = inflater.decompress(left, PIECE)
                left = inflater.unconsumed_tail
                if piece:
                    yield np.frombuffer(piece, np.uint8)
                elif not left:
                    break
            if inflater.eof and (inflater.unused_data or begin + PIECE < stream.size):
                raise ValueError("something follows the deflated bytes")
    except zlib.error as error:
        raise ValueError(str(error)) from error
    if not inflater.eof:
        raise ValueError("the deflated bytes end too early")
