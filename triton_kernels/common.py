# mypy: disable-error-code="no-untyped-def"
"""Shared by the kernels: the chunk table, pointer tables, 16-bit conversions."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseopt._schema import TensorList

__all__ = [
    "CHUNK",
    "INTERPRET",
    "TL_DTYPES",
    "address_of",
    "block_of_entries",
    "describe",
    "entry_positions",
    "kept_table",
    "narrow",
    "ranges_of",
    "widen",
]

# Arena entries per row of the chunk table at most, by the dtype of the offsets (sparseopt.optim.plan.CHUNK).
CHUNK = {torch.int16: 1024, torch.int32: 4096}

# Triton reads the variable when it decorates a kernel, so this is fixed at import as well.
INTERPRET = bool(triton.knobs.runtime.interpret)

TL_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float64: tl.float64,
}


# ---- in kernels ------------------------------------------------------------------------------------------------------
@triton.jit
def entry_positions(base, first, shift, k, count):
    """Flat int64 elements of a chunk's entries ``k`` (int32, any shape): base + stored offset of the run + place in it."""
    run = k >> shift
    offset = tl.load(first + run, mask=k < count, other=0)
    # int64 before the addition: base may lie past 2^31.
    return base + offset.to(tl.int64) + (k - (run << shift)).to(tl.int64)


@triton.jit
def block_of_entries(sub, row, indices, RUN: tl.constexpr, BLOCK: tl.constexpr):
    """(entries of the arena, flat elements of the tensor, both int64; which of them exist) of block ``sub`` of a chunk.

    row: the chunk's row of the table. RUN = 1: [BLOCK]. Else [BLOCK / RUN, RUN]: every group of RUN entries is consecutive
    and aligned in the tensor and in the arena, and exists as a whole, so that a thread moves several at once.
    """
    # Hints belong on what is added and compared, not on the sums: that is where the compiler looks for them.
    count = tl.multiple_of(tl.load(row + 3).to(tl.int32), RUN)
    start = tl.multiple_of(tl.load(row + 2), RUN)
    base, first, shift = tl.load(row + 1), indices + tl.load(row + 4), tl.load(row + 5).to(tl.int32)
    if RUN == 1:
        k = sub * BLOCK + tl.arange(0, BLOCK)
        positions = entry_positions(base, first, shift, k, count)
    else:
        group = sub * BLOCK + tl.arange(0, BLOCK // RUN) * RUN
        place = tl.arange(0, RUN)
        k = group[:, None] + place[None, :]
        run = tl.multiple_of(entry_positions(base, first, shift, group, count), RUN)
        positions = run[:, None] + place[None, :].to(tl.int64)
    return start + k, positions, k < count


@triton.jit
def address_of(table, position, DTYPE: tl.constexpr, RUN: tl.constexpr):
    """Pointer to a tensor's data; with RUN the launcher has checked that it is aligned to 16 bytes."""
    pointer = tl.load(table + position).to(tl.pointer_type(DTYPE))
    if RUN > 1:
        pointer = tl.multiple_of(pointer, 16)  # the cast would lose a hint on the address
    return pointer


@triton.jit
def widen(value, ACC: tl.constexpr):
    """Any parameter dtype -> ACC, exactly. bf16 goes through its bits: the interpreter gets subnormals wrong."""
    if value.dtype == tl.bfloat16:
        bits = value.to(tl.int16, bitcast=True).to(tl.int32) << 16
        result = bits.to(tl.float32, bitcast=True).to(ACC)
    else:
        result = value.to(ACC)
    return result


@triton.jit
def narrow(value, DTYPE: tl.constexpr, BF16_BITS: tl.constexpr):
    """ACC -> parameter dtype, to nearest even; BF16_BITS does it on the bits: the interpreter truncates to bf16."""
    if BF16_BITS:
        bits = value.to(tl.int32, bitcast=True)
        high = bits >> 16
        rounded = (bits + 0x7FFF + (high & 1)) >> 16
        result = tl.where(value != value, high | 0x40, rounded).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        result = value.to(DTYPE)
    return result


# ---- in launchers ----------------------------------------------------------------------------------------------------
class Described(NamedTuple):
    """What kernels need to know of a list of tensors: addresses int64[T] on the device, dtype, 16-byte alignment."""

    table: Tensor
    dtype: torch.dtype
    aligned: bool


_TABLES_KEPT = 128
_tables: OrderedDict[tuple[torch.device, Hashable], tuple[int, Tensor]] = OrderedDict()
_captured: list[Tensor] = []
_lock = threading.Lock()


def describe(what: str, tensors: Sequence[Tensor], device: torch.device) -> Described | None:
    """Checks a list of tensors and sends their addresses (0 for an empty one) to ``device``; None if all are empty."""
    stream = _stream_on(device)
    kept = tensors if isinstance(tensors, TensorList) else None
    if kept is not None and kept.found is not None and kept.found[0] == stream:
        return kept.found[1]
    addresses = [t.data_ptr() if t.numel() else 0 for t in tensors]
    dtypes = {t.dtype for t, address in zip(tensors, addresses, strict=True) if address}
    if len(dtypes) > 1 or not dtypes <= TL_DTYPES.keys():
        raise TypeError(
            f"expected {what} of one dtype among fp32, bf16, fp16 and fp64, got {sorted(map(str, dtypes))}."
        )
    if not dtypes:
        return None
    for position, tensor in enumerate(tensors):
        # A kernel that follows a wrong address corrupts the process, so direct callers of the ops are checked as well.
        if addresses[position] and (tensor.device != device or not tensor.is_contiguous()):
            raise ValueError(
                f"tensor {position} must be contiguous on {device}, got strides {tensor.stride()} on {tensor.device}."
            )
    table = kept_table(tuple(addresses), device, lambda: torch.tensor(addresses, dtype=torch.int64))
    described = Described(table, dtypes.pop(), all(address % 16 == 0 for address in addresses))
    if kept is not None and not _capturing(device):
        kept.found = (stream, described)
    return described


def kept_table(about: Hashable, device: torch.device, make: Callable[[], Tensor]) -> Tensor:
    """``make()``, a table on the CPU that follows from ``about``, on ``device``.

    Tables are kept (addresses by themselves, so that steps over unmoved tensors copy nothing). A copy is ordered on the
    stream that made it; another stream makes its own. While a CUDA graph is captured nothing may be copied from
    pageable memory: the warm-up's table serves, whichever stream made it, and is kept for good, since the graph holds
    its address.
    """
    key, stream, capturing = (device, about), _stream_on(device), _capturing(device)
    with _lock:
        owner, table = _tables.get(key, (None, None))
        if table is None or not (owner == stream or capturing):
            if capturing:
                raise RuntimeError(
                    "sparseopt ops in a CUDA graph must have run on the same tensors before the capture: make a "
                    "warm-up step with the graph's own parameters and gradients first."
                )
            table = make().to(device, non_blocking=True)
        if capturing and not any(table is other for other in _captured):
            _captured.append(table)
        _tables[key] = (stream if owner is None or not capturing else owner, table)
        _tables.move_to_end(key)
        while len(_tables) > _TABLES_KEPT:
            _tables.popitem(last=False)
    return table


def ranges_of(sizes: Sequence[int], block: int) -> Tensor:
    """int64[C, 3] on the CPU, rows (tensor, range, entries): tensors of ``sizes`` entries in ranges of ``block``."""
    numels = torch.tensor(sizes, dtype=torch.int64)
    blocks = (numels + block - 1) // block
    tensor = torch.repeat_interleave(torch.arange(len(numels)), blocks)
    number = torch.arange(len(tensor)) - (torch.cumsum(blocks, 0) - blocks)[tensor]
    return torch.stack([tensor, number, (numels[tensor] - number * block).clamp(max=block)], dim=1)


def _stream_on(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
