"""One delta file, read in pieces: its header, its checksum, and the entries of a range of a tensor."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from sparseopt._files import FormatError
from sparseopt._safetensors import TensorFile
from sparseopt.deltas.delta import FORMAT, INT32_NUMEL, VERSION, _read_header, update_bytes, update_head

__all__ = ["DeltaFile"]

CHUNK = 1 << 20  # entries read at a time where everything is read


class DeltaFile:
    """A delta on disk. Ranges that follow one another are found without searching.

    Attributes:
        step, parent_step, base_fingerprint, shapes: as those of :class:`sparseopt.Delta`.
        dtypes: of the values, by parameter name.
        size: bytes of the file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Opens the file and reads its header.

        Raises:
            FileNotFoundError, sparseopt.FormatError: as :meth:`sparseopt.Delta.load`; content is checked by
                :meth:`verify` only.
        """
        self._file = TensorFile(path)
        self.path = self._file.path
        header = _read_header(self.path, self._file.metadata, set(self._file.shapes))
        self.step: int = header["step"]
        self.parent_step: int | None = header["parent_step"]
        self.base_fingerprint: str | None = header["base_fingerprint"]
        self.shapes: dict[str, tuple[int, ...]] = {name: tuple(shape) for name, shape in header["shapes"].items()}
        self.dtypes: dict[str, torch.dtype] = {}
        self.size = self.path.stat().st_size
        self._verified = False
        self._cursor: tuple[str, int, int] = ("", 0, 0)  # of this parameter, entries before `stop` number `position`
        stored = self._file.dtypes
        for name, shape in self.shapes.items():
            indices, values = f"{name}::indices", f"{name}::values"
            wide = torch.int32 if math.prod(shape) <= INT32_NUMEL else torch.int64
            if len(self._file.shapes[indices]) != 1 or self._file.shapes[indices] != self._file.shapes[values]:
                raise FormatError(f"'{self.path}' is damaged: indices and values of {name!r} differ in length.")
            if stored.get(indices) != wide or values not in stored:
                raise FormatError(f"'{self.path}' is damaged: indices or values of {name!r} have another dtype.")
            self.dtypes[name] = stored[values]
        said = {name: str(dtype).removeprefix("torch.") for name, dtype in self.dtypes.items()}
        if said != header["dtypes"]:
            raise FormatError(f"'{self.path}' is damaged: values are not of the dtypes that it says.")

    def count(self, name: str) -> int:
        """Entries of one parameter; 0 for one that the file does not hold."""
        return self._file.numel(f"{name}::indices") if name in self.shapes else 0

    @property
    def changed_parameters(self) -> int:
        return sum(map(self.count, self.shapes))

    def verify(self) -> None:
        """Checks the content against the checksum, and that indices are sorted and in range; once, a piece at a time.

        Raises:
            sparseopt.FormatError: it is damaged.
        """
        if self._verified:
            return
        head = json.dumps([FORMAT, VERSION, self.step, self.parent_step, self.base_fingerprint])
        digest = hashlib.sha256(head.encode())
        for name in sorted(self.shapes):
            values, indices = f"{name}::values", f"{name}::indices"
            update_head(digest, name, self.shapes[name], self.dtypes[name], self._file.dtypes[indices])
            for piece in self._chunks(values):
                update_bytes(digest, piece)
            last, n = -1, math.prod(self.shapes[name])
            for piece in self._chunks(indices):
                update_bytes(digest, piece)
                if int(piece[0]) <= last or bool((piece[1:] <= piece[:-1]).any()) or int(piece[-1]) >= n:
                    raise FormatError(f"'{self.path}' is damaged: indices of {name!r} are unsorted or out of range.")
                last = int(piece[-1])
        if self._file.metadata["checksum"] != f"sha256:{digest.hexdigest()}":
            raise FormatError(f"'{self.path}' is damaged: its content does not match its checksum.")
        self._verified = True

    def _chunks(self, key: str) -> Iterator[Tensor]:
        n = self._file.numel(key)
        return (self._file.read(key, start, min(start + CHUNK, n)) for start in range(0, n, CHUNK))

    def entries(self, name: str, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Entries of the flat range ``start <= i < stop``.

        Returns:
            (int64[k] positions counted from ``start``, sorted; [k] their values).
        """
        total, key = self.count(name), f"{name}::indices"
        if not total or stop <= start:
            return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=self.dtypes.get(name, torch.float32))
        known, end, position = self._cursor
        if (known, end) != (name, start):
            position = self._search(key, start, total) if start else 0
        first = position
        # As many as an even spread would put there, and half as many again.
        size = min(stop - start, 64 + math.ceil(1.5 * total * (stop - start) / math.prod(self.shapes[name])))
        found: list[Tensor] = []
        last = first
        while not found or last < total:
            piece = self._file.read(key, last, min(last + size, total))
            inside = int(np.searchsorted(piece.numpy(), stop - 1, side="right"))  # stop itself may not fit int32
            found.append(piece[:inside])
            last += inside
            if inside < piece.numel():
                break
        self._cursor = (name, stop, last)
        indices = torch.cat(found) if len(found) != 1 else found[0]
        return indices.to(torch.int64) - start, self._file.read(f"{name}::values", first, last)

    def _search(self, key: str, index: int, total: int) -> int:
        """Position of the first entry that is not below ``index``."""
        low, high = 0, total
        while low < high:
            middle = (low + high) // 2
            if int(self._file.read(key, middle, middle + 1)) < index:
                low = middle + 1
            else:
                high = middle
        return low
