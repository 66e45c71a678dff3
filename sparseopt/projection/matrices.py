"""Random projection matrices from a counter-based generator: rebuilt anywhere from (seed, key, side) alone.

Philox4x32-10 (Salmon et al., SC 2011, doi:10.1145/2063384.2063405) in int64 tensor arithmetic: its 64-bit key is
``blake2b(f"{seed}/{key}/{side}")``, its counter the number of a block of entries. An entry depends on nothing else, so a
matrix does not depend on which other matrices were made, or on the device.

    gaussian         entry e from word e % 4 of block e // 4:  Phi^-1((w + 1/2) / 2^32)
    rademacher       entry e from bit e % 32 of word e // 32 % 4 of block e // 128
    row_orthonormal  the Q factor of the Gaussian matrix's transpose

The normal quantile is Wichura's algorithm AS 241 (Applied Statistics 37, 1988) with a logarithm of its own, in float64 and
one IEEE operation (+ - * / sqrt) per kernel: no fused multiply-add and no library function whose last bit differs between
devices or releases. The QR factorisation runs on the CPU in float64; its last bits before the rounding to fp32 are LAPACK's.
"""

from __future__ import annotations

import hashlib
import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "KINDS",
    "SketchPlan",
    "count_sketch",
    "fold",
    "philox4x32",
    "projection_matrix",
    "sketch_plan",
    "unscaled_matrix",
]

KINDS = ("gaussian", "rademacher", "row_orthonormal")
CHUNK = 1 << 20  # entries made at a time: bounds the float64 temporaries to a few tens of MiB

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


# ---- the generator ---------------------------------------------------------------------------------------------------
def _multiply(constant: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of ``constant * x`` for 32-bit numbers in int64, by halves: nothing overflows."""
    low = (x & 0xFFFF) * constant
    middle = (x >> 16) * constant + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four 32-bit counter words (int64 tensors) and a key of two 32-bit words -> four words (int64)."""
    a, b, c, d = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(_MULTIPLIERS[0], a)
        high1, low1 = _multiply(_MULTIPLIERS[1], c)
        a, b, c, d = high1 ^ b ^ k0, low1, high0 ^ d ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return a, b, c, d


def _key(seed: int, key: str, side: str) -> tuple[int, int]:
    digest = hashlib.blake2b(f"{seed}/{key}/{side}".encode(), digest_size=8).digest()
    number = int.from_bytes(digest, "little")
    return number & _MASK, number >> 32


def _words(first: int, last: int, key: tuple[int, int], device: torch.device | str) -> Tensor:
    """Words of the blocks ``first .. last - 1`` in order -> int64 [4 * (last - first)]."""
    block = torch.arange(first, last, dtype=torch.int64, device=device)
    zero = torch.zeros_like(block)
    return torch.stack(philox4x32((block & _MASK, block >> 32, zero, zero), key), dim=1).flatten()


# ---- the normal quantile ---------------------------------------------------------------------------------------------
# AS 241, PPND16: numerator and denominator for the centre (|p - 1/2| <= 0.425) and for the tail, highest power first.
_CENTRE = (
    (2509.0809287301226727, 33430.575583588128105, 67265.770927008700853, 45921.953931549871457, 13731.693765509461125,
     1971.5909503065514427, 133.14166789178437745, 3.3871328727963666080),
    (5226.4952788528545610, 28729.085735721942674, 39307.895800092710610, 21213.794301586595867, 5394.1960214247511077,
     687.18700749205790830, 42.313330701600911252, 1.0),
)  # fmt: skip
_TAIL = (
    (7.74545014278341407640e-4, 2.27238449892691845833e-2, 2.41780725177450611770e-1, 1.27045825245236838258,
     3.64784832476320460504, 5.76949722146069140550, 4.63033784615654529590, 1.42343711074968357734),
    (1.05075007164441684324e-9, 5.47593808499534494600e-4, 1.51986665636164571966e-2, 1.48103976427480074590e-1,
     6.89767334985100004550e-1, 1.67638483018380384940, 2.05319162663775882187, 1.0),
)  # fmt: skip


def _polynomial(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    result = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        result = result * x
        result = result + coefficient
    return result


def _log(x: Tensor) -> Tensor:
    """Natural logarithm of positive float64 numbers to about 1 ulp: 2 atanh((m - 1) / (m + 1)) + e log 2 for x = m 2^e."""
    mantissa, exponent = torch.frexp(x)  # exact
    small = mantissa < math.sqrt(0.5)
    mantissa = torch.where(small, mantissa * 2.0, mantissa)  # exact; now in [sqrt(1/2), sqrt(2))
    exponent = (exponent - small.to(exponent.dtype)).to(torch.float64)
    s = (mantissa - 1.0) / (mantissa + 1.0)  # |s| < 0.172: the first term left out is below 1e-18
    series = _polynomial(tuple(1.0 / n for n in range(23, 0, -2)), s * s)
    series = (series * s) * 2.0
    return exponent * math.log(2.0) + series


def _normal(words: Tensor) -> Tensor:
    """32-bit words (int64) -> standard normal numbers, float64: the quantile of (w + 1/2) / 2^32, symmetric about 0."""
    odd = 2 * words - _MASK  # odd integers, so that p - 1/2 = odd / 2^33 is exact
    q = odd.to(torch.float64) * 2.0**-33
    r = 0.180625 - q * q
    result = (_polynomial(_CENTRE[0], r) * q) / _polynomial(_CENTRE[1], r)
    tail = q.abs() > 0.425
    if bool(tail.any()):
        side = q[tail]
        p = 0.5 - side.abs()  # exact, at least 2^-33: AS 241's far tail (p < 1e-11) is never reached
        r = torch.sqrt(-_log(p)) - 1.6
        value = _polynomial(_TAIL[0], r) / _polynomial(_TAIL[1], r)
        result[tail] = torch.where(side < 0, -value, value)
    return result


# ---- matrices --------------------------------------------------------------------------------------------------------
def unscaled_matrix(
    kind: str, rows: int, columns: int, seed: int, key: str, side: str, device: torch.device | str = "cpu"
) -> tuple[Tensor, float]:
    """The matrix of :func:`projection_matrix` before its scale.

    Returns:
        (fp32 [rows, columns], scale): entries N(0, 1), +-1, or rows orthonormal; scale 1/sqrt(rows), or
        sqrt(columns/rows) for orthonormal rows, so that E[P^T P] = I for P = scale * matrix.

    Raises:
        ValueError: unknown kind or side, sizes below 1, or more orthonormal rows than columns.
    """
    if kind not in KINDS:
        raise ValueError(f"Unknown kind of projection matrix {kind!r}: expected one of {', '.join(KINDS)}.")
    if side not in ("i", "o"):
        raise ValueError(f"Unknown side {side!r} of a projection: expected 'i' (input) or 'o' (output).")
    if rows < 1 or columns < 1:
        raise ValueError(f"A projection matrix needs at least one row and one column, got {rows} x {columns}.")
    if kind == "row_orthonormal":
        if rows > columns:
            raise ValueError(f"{rows} orthonormal rows do not fit into {columns} dimensions.")
        gaussian = _entries("gaussian", rows * columns, _key(seed, key, side), "cpu").view(rows, columns)
        q, r = torch.linalg.qr(gaussian.double().T)
        # The factorisation is unique once R's diagonal is positive.
        q = q * torch.where(r.diagonal() < 0, -1.0, 1.0)
        return q.T.to(torch.float32).contiguous().to(device), math.sqrt(columns / rows)
    entries = _entries(kind, rows * columns, _key(seed, key, side), device)
    return entries.view(rows, columns), 1.0 / math.sqrt(rows)


def projection_matrix(
    kind: str, rows: int, columns: int, seed: int, key: str, side: str, device: torch.device | str = "cpu"
) -> Tensor:
    """One side of a layer's projection, with E[P^T P] = I.

    Args:
        kind: "gaussian" (entries N(0, 1/rows)), "rademacher" (+-1/sqrt(rows)) or "row_orthonormal" (orthogonal rows of
            length sqrt(columns/rows)).
        rows: the projected dimension k.
        columns: the layer's dimension on this side.
        seed: of the whole projection.
        key: the layer's name; for side "i" the name of the layers' input.
        side: "i" for the input, "o" for the output.
        device: where the matrix goes. Values do not depend on it.

    Returns:
        fp32 [rows, columns].

    Raises:
        ValueError: as :func:`unscaled_matrix`.
    """
    matrix, scale = unscaled_matrix(kind, rows, columns, seed, key, side, device)
    return matrix * scale


def _entries(kind: str, count: int, key: tuple[int, int], device: torch.device | str) -> Tensor:
    result = torch.empty(count, dtype=torch.float32, device=device)
    per_block = 4 if kind == "gaussian" else 128
    bits = torch.arange(32, dtype=torch.int64, device=device)
    for start in range(0, count, CHUNK):
        end = min(start + CHUNK, count)
        words = _words(start // per_block, -(-end // per_block), key, device)
        values = _normal(words) if kind == "gaussian" else 1 - 2 * ((words[:, None] >> bits) & 1).flatten()
        result[start:end] = values[: end - start]  # CHUNK is a multiple of both block sizes
    return result


# ---- count sketch ----------------------------------------------------------------------------------------------------
def count_sketch(
    n: int, buckets: int, seed: int, key: str, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Where each of ``n`` values goes, and its sign: dot products of folded vectors are unbiased (Charikar et al., 2002).

    Returns:
        (int64 [n] in [0, buckets), fp32 [n] of +-1).
    """
    words = _words(0, n, _key(seed, key, "sketch"), device).view(n, 4)
    # The upper bits of w * buckets: uniform up to buckets / 2^32.
    return (words[:, 0] * buckets) >> 32, (1 - 2 * (words[:, 1] & 1)).to(torch.float32)


class SketchPlan(NamedTuple):
    """A count sketch as a gather, so that sums have a fixed order on every device (an ``index_add`` has none on GPUs).

    Attributes:
        members: int64 [buckets, m], the values of each bucket; n where a bucket has fewer than m.
        signs: fp32 [n].
    """

    members: Tensor
    signs: Tensor


def sketch_plan(bucket: Tensor, signs: Tensor, buckets: int) -> SketchPlan:
    """Arranges the result of :func:`count_sketch` for :func:`fold`."""
    n = bucket.numel()
    order = torch.argsort(bucket, stable=True)
    counts = torch.bincount(bucket, minlength=buckets)
    first = torch.cumsum(counts, 0) - counts
    index = torch.full((buckets, int(counts.max())), n, dtype=torch.int64, device=bucket.device)
    index[bucket[order], torch.arange(n, device=bucket.device) - first[bucket[order]]] = order
    return SketchPlan(index, signs)


def fold(values: Tensor, plan: SketchPlan) -> Tensor:
    """[..., n] -> fp32 [..., buckets]: the signed sum of each bucket's values."""
    signed = torch.nn.functional.pad(values.to(torch.float32) * plan.signs, (0, 1))
    return signed[..., plan.members].sum(-1)
