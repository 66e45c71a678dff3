"""safetensors files read and written in pieces, with memory for a piece only.

The library maps files into memory: pages of a file that was read count as the process's own, and a tensor is written
only when all of its file is in memory. Here every read is a ``pread`` into a buffer of the size asked for, and a file is
written tensor by tensor from an iterator. The layout: 8 bytes (little-endian length of the header), the header (JSON:
name -> dtype, shape, data_offsets from the end of the header; ``__metadata__``), the data.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from sparseopt._files import FormatError, atomic_path

__all__ = ["TensorFile", "write_tensors"]

DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "U16": torch.uint16, "U32": torch.uint32,
    "U64": torch.uint64,
}  # fmt: skip
CODES = {dtype: code for code, dtype in DTYPES.items()}
HEADER_LIMIT = 100_000_000  # bytes; the library's own limit
READ_LIMIT = 1 << 30  # bytes of one system call


class TensorFile:
    """A safetensors file, opened for reading slices.

    Attributes:
        path: where it is.
        metadata: text by key.
        shapes, dtypes: by tensor name, in the file's order. Unknown dtypes are an error of :meth:`read`, not of opening.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Opens a file.

        Raises:
            FileNotFoundError: there is no such file.
            sparseopt.FormatError: it is not a safetensors file, or damaged or truncated.
        """
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"there is no file '{self.path}'.")
        self._file = open(self.path, "rb", buffering=0)  # noqa: SIM115 - closed by close() or with the object
        size = os.fstat(self._file.fileno()).st_size
        length = int.from_bytes(self._bytes(0, min(8, size)), "little")
        if size < 8 or length > min(HEADER_LIMIT, size - 8):
            raise self._damaged("its header is longer than the file")
        try:
            header = json.loads(self._bytes(8, length))
        except (ValueError, RecursionError) as error:
            raise self._damaged("its header is not JSON") from error
        if not isinstance(header, dict):
            raise self._damaged("its header is not a table of tensors")
        metadata = header.pop("__metadata__", None) or {}
        if not isinstance(metadata, dict):
            raise self._damaged("its metadata is not a table")
        self.metadata: dict[str, str] = {str(key): str(value) for key, value in metadata.items()}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._codes: dict[str, str] = {}
        self._starts: dict[str, int] = {}
        for name, entry in header.items():
            self._add(name, entry, 8 + length, size)

    def _add(self, name: str, entry: Any, data: int, size: int) -> None:
        try:
            code, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            whole = all(type(number) is int and number >= 0 for number in (*shape, begin, end))
        except (KeyError, TypeError, ValueError):
            whole = False
        if not whole or data + end > size:
            raise self._damaged(f"the entry of {name!r} does not fit the file")
        if code in DTYPES and end - begin != math.prod(shape) * DTYPES[code].itemsize:
            raise self._damaged(f"{name!r} has {end - begin} bytes, which is not {code}{list(shape)}")
        self.shapes[name], self._codes[name], self._starts[name] = tuple(shape), code, data + begin

    def _damaged(self, reason: str) -> FormatError:
        self.close()
        return FormatError(f"'{self.path}' is not a safetensors file, or it is damaged or truncated ({reason}).")

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Those that torch has, by name."""
        return {name: DTYPES[code] for name, code in self._codes.items() if code in DTYPES}

    def numel(self, name: str) -> int:
        return math.prod(self.shapes[name])

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Flat entries ``start <= i < stop`` of a tensor, in memory of their own.

        Raises:
            KeyError: no such tensor.
            sparseopt.FormatError: a dtype that torch lacks, or the file became shorter.
        """
        if name not in self.shapes:
            raise KeyError(f"'{self.path}' has no tensor {name!r}.")
        code = self._codes[name]
        if code not in DTYPES:
            raise FormatError(f"'{self.path}' stores {name!r} as {code}, which this release cannot read.")
        n = self.numel(name)
        stop = n if stop is None else min(stop, n)
        out = torch.empty(max(0, stop - start), dtype=DTYPES[code])
        if out.numel():
            self._into(out.view(torch.uint8).numpy().data, self._starts[name] + start * out.itemsize)
        return out

    def _bytes(self, offset: int, count: int) -> bytearray:
        data = bytearray(count)
        self._into(memoryview(data), offset)
        return data

    def _into(self, view: memoryview, offset: int) -> None:
        done = 0
        while done < len(view):
            count = os.preadv(self._file.fileno(), [view[done : done + READ_LIMIT]], offset + done)
            if not count:
                raise self._damaged("it ends before its data does")
            done += count

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def write_tensors(
    path: str | os.PathLike[str],
    specs: Mapping[str, tuple[Sequence[int], torch.dtype]],
    pieces: Iterable[Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a safetensors file, whole or not at all.

    Args:
        path: target.
        specs: name -> (shape, dtype), in the order in which the data comes.
        pieces: CPU tensors that are, one after the other and flattened, the data of all tensors; of the dtypes said.
        metadata: text by key.

    Raises:
        ValueError: the pieces are more or fewer than the specs say; nothing is written then.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (shape, dtype) in specs.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        written = sum(_write(file, piece) for piece in pieces)
        if written != end:
            raise ValueError(f"'{path}' should hold {end} bytes of tensors, got {written}.")


def _write(file: BinaryIO, piece: Tensor) -> int:
    flat = piece.detach().contiguous().view(-1)
    return file.write(flat.view(torch.uint8).numpy().data) if flat.numel() else 0
