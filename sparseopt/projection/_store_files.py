"""The files of a projection store: ``metadata.json``, ``shards/shard_NNNNNN.bin`` (rows, raw little endian) and
``shards/shard_NNNNNN.done`` (one byte per row, 1 = finished).

Row ``id`` is row ``id % shard_rows`` of shard ``id // shard_rows``. Files grow by writing past their end, which several
processes may do at once without a lock and which leaves holes that take no space.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from sparseopt._files import FormatError, atomic_write

__all__ = [
    "DTYPES",
    "METADATA_FILE",
    "Layout",
    "as_ids",
    "as_json",
    "create",
    "difference",
    "is_store",
    "layers_problem",
    "open_layout",
    "without",
]

FORMAT = "sparseopt.projections"
VERSION = 1
METADATA_FILE = "metadata.json"
STORE_KEY = "store"  # what only the store needs to know; not part of what two stores must agree on
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}

Ids = int | Sequence[int] | np.ndarray | Tensor

_SHARD = re.compile(r"shard_(\d{6,})\.(bin|done)")


@dataclass(frozen=True)
class Layout:
    """Where the rows of a store are.

    Attributes:
        folder: of the shards.
        columns: length of a row, in entries.
        dtype: of a row.
        shard_rows: rows of a shard.
    """

    folder: Path
    columns: int
    dtype: torch.dtype
    shard_rows: int

    @property
    def row_bytes(self) -> int:
        return self.columns * self.dtype.itemsize

    @property
    def words(self) -> np.dtype[Any]:
        """The numpy type of an entry's bits on the disk (numpy has no bfloat16)."""
        return np.dtype("<i2" if self.dtype.itemsize == 2 else "<i4")

    def file(self, shard: int, kind: str) -> Path:
        return self.folder / f"shard_{shard:06d}.{kind}"

    def shards(self) -> list[int]:
        """Numbers of the shards that may hold finished rows, ascending."""
        found = []
        try:
            entries = list(os.scandir(self.folder))
        except FileNotFoundError:
            return []  # nothing written yet
        for entry in entries:
            match = _SHARD.fullmatch(entry.name)
            if match is None or self.file(int(match[1]), match[2]).name != entry.name:
                raise FormatError(f"'{entry.path}' does not belong to a projection store.")
            if match[2] == "done":
                found.append(int(match[1]))
        return sorted(found)

    def marks(self, shard: int) -> np.ndarray:
        """Finished rows of a shard: their numbers within it, ascending, int64.

        Raises:
            FormatError: marks that cannot be, or rows marked finished that are not there.
        """
        path = self.file(shard, "done")
        try:
            marks = np.frombuffer(path.read_bytes(), np.uint8)
        except FileNotFoundError:
            return np.empty(0, np.int64)
        if len(marks) > self.shard_rows or (len(marks) and marks.max() > 1):
            raise FormatError(f"'{path}' is damaged: expected at most {self.shard_rows} bytes that are 0 or 1.")
        rows = np.flatnonzero(marks).astype(np.int64)
        if len(rows):
            # Looked at after the marks: another process may add rows, and then their marks, meanwhile.
            self._require(shard, int(rows[-1]))
        return rows

    def _require(self, shard: int, row: int) -> int:
        """The whole rows of a shard's file, of which ``row`` must be one."""
        path = self.file(shard, "bin")
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            size = 0
        if size < (row + 1) * self.row_bytes:
            raise FormatError(
                f"'{path}' is damaged: row {row} is marked finished and ends at byte {(row + 1) * self.row_bytes}, "
                f"but the file has {size} bytes."
            )
        return size // self.row_bytes

    def read(self, shard: int, rows: np.ndarray, out: np.ndarray, places: np.ndarray) -> None:
        """Copies ``rows`` of a shard to ``out[places]``; ``out`` has the bits as integers of the machine."""
        count = self._require(shard, int(rows.max()))
        mapped = np.memmap(self.file(shard, "bin"), self.words, mode="r", shape=(count, self.columns))
        if rows[-1] - rows[0] == len(rows) - 1 and (np.diff(rows) == 1).all():
            out[places] = mapped[rows[0] : rows[-1] + 1]
        else:
            out[places] = mapped[rows]

    def integers(self, rows: Tensor) -> Tensor:
        """The bits of ``rows`` as integers of the same size (a view)."""
        return rows.view(torch.int16 if self.dtype.itemsize == 2 else torch.int32)


def as_ids(ids: Ids) -> np.ndarray:
    """Sample ids as an int64 vector.

    Raises:
        TypeError: not integers.
        ValueError: negative, or not a vector.
    """
    array = ids.detach().cpu().numpy() if isinstance(ids, Tensor) else np.asarray(ids)
    if array.size == 0 and array.ndim == 1:
        return np.empty(0, np.int64)
    if array.dtype.kind not in "iu":
        raise TypeError(f"sample ids must be integers, got {array.dtype}.")
    array = np.atleast_1d(array).astype(np.int64)
    if array.ndim != 1:
        raise ValueError(f"sample ids must be a vector, got the shape {array.shape}.")
    if array.min() < 0:
        raise ValueError(f"sample ids must not be negative, got {array.min()}.")
    return array


# ---- metadata --------------------------------------------------------------------------------------------------------
def as_json(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """``metadata`` as it will be read again (tuples are lists), with format and version.

    Raises:
        ValueError: it lacks what the store needs, or JSON cannot hold it.
    """
    try:
        result: dict[str, Any] = json.loads(json.dumps(dict(metadata), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"the metadata of a projection store must be JSON: {error}.") from error
    result.pop(STORE_KEY, None)
    result = {**result, "format": result.get("format", FORMAT), "version": result.get("version", VERSION)}
    problem = _problem(result)
    if problem:
        raise ValueError(f"the metadata of a projection store {problem}.")
    return result


def _problem(metadata: Mapping[str, Any]) -> str | None:
    if metadata.get("format") != FORMAT or metadata.get("version") != VERSION:
        return (
            f"must have the format {FORMAT!r} and the version {VERSION}, "
            f"got {metadata.get('format')!r} and {metadata.get('version')!r}"
        )
    columns = metadata.get("total_proj_dim")
    if not isinstance(columns, int) or isinstance(columns, bool) or columns < 1:
        return f"needs total_proj_dim, a positive integer, got {columns!r}"
    if metadata.get("proj_dtype") not in DTYPES:
        return f"needs proj_dtype, one of {', '.join(DTYPES)}, got {metadata.get('proj_dtype')!r}"
    return layers_problem(metadata.get("layers", []), columns)


def layers_problem(layers: Any, columns: int) -> str | None:
    """What is wrong with the ``layers`` of metadata, as the end of a sentence; None where nothing is."""
    if not isinstance(layers, list) or not all(isinstance(layer, dict) for layer in layers):
        return "needs layers, a list of objects"
    for number, layer in enumerate(layers):
        name, start, end, shape = (layer.get(key) for key in ("name", "slice_start", "slice_end", "original_shape"))
        if not isinstance(name, str):
            return f"needs a name in layers[{number}], got {name!r}"
        if not isinstance(start, int) or not isinstance(end, int) or not 0 <= start <= end <= columns:
            return f"has the slice {start!r} to {end!r} for {name!r}, of {columns} columns"
        if not isinstance(shape, list) or not all(isinstance(size, int) and size >= 0 for size in shape):
            return f"needs original_shape, a list of sizes, for {name!r}, got {shape!r}"
    return None


def difference(stored: Any, given: Any, name: str = "") -> str | None:
    """The first place where two JSON values differ, as ``layers[2].k_i is 16 there and 8 here``; None where none does."""
    if isinstance(stored, Mapping) and isinstance(given, Mapping):
        for key in [*given, *(key for key in stored if key not in given)]:
            place = f"{name}.{key}" if name else key
            if key not in stored or key not in given:
                return f"{place} is missing {'there' if key in given else 'here'}"
            found = difference(stored[key], given[key], place)
            if found:
                return found
        return None
    if isinstance(stored, list) and isinstance(given, list):
        for i, (one, other) in enumerate(zip(stored, given, strict=False)):
            found = difference(one, other, f"{name}[{i}]")
            if found:
                return found
        return f"{name} has {len(stored)} entries there and {len(given)} here" if len(stored) != len(given) else None
    return None if stored == given else f"{name} is {stored!r} there and {given!r} here"


def without(value: Any, key: str) -> Any:
    """A JSON value less one key of its objects, at any depth."""
    if isinstance(value, Mapping):
        return {name: without(inner, key) for name, inner in value.items() if name != key}
    return [without(inner, key) for inner in value] if isinstance(value, list) else value


# ---- opening ---------------------------------------------------------------------------------------------------------
def create(path: Path, metadata: Mapping[str, Any], shard_rows: int) -> None:
    """Makes a store in ``path`` unless there is one; of several processes that try, one does."""
    path.mkdir(parents=True, exist_ok=True)
    with FileLock(path / ".lock"):
        if (path / METADATA_FILE).exists():
            return
        if (path / "shards").is_dir() and any((path / "shards").iterdir()):
            raise FormatError(f"'{path}' is damaged: it has shards, but no {METADATA_FILE} that says what they hold.")
        (path / "shards").mkdir(exist_ok=True)
        contents = {**metadata, STORE_KEY: {"shard_rows": shard_rows}}
        atomic_write(path / METADATA_FILE, json.dumps(contents, indent=2, allow_nan=False) + "\n")


def is_store(path: Path) -> bool:
    """Whether ``path`` is a folder with the metadata of a store, as opposed to exported ``.pt`` files."""
    try:
        return isinstance(_read(path).get(STORE_KEY), dict)
    except (FileNotFoundError, FormatError):
        return False


def _read(path: Path) -> dict[str, Any]:
    place = path / METADATA_FILE
    try:
        contents = json.loads(place.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        if not path.exists():
            raise FileNotFoundError(f"'{path}' does not exist.") from None
        raise FormatError(f"'{path}' is not a projection store: it has no {METADATA_FILE}.") from None
    except ValueError as error:  # JSON and UTF-8 errors
        raise FormatError(f"'{place}' is damaged: {error}.") from error
    except RecursionError as error:
        raise FormatError(f"'{place}' is damaged: it is nested too deeply.") from error
    if not isinstance(contents, dict):
        raise FormatError(f"'{place}' is not the metadata of projections: expected an object.")
    return contents


def open_layout(path: Path) -> tuple[dict[str, Any], Layout]:
    """The metadata of the store in ``path`` and where its rows are; every shard's marks are checked.

    Raises:
        FileNotFoundError: no such folder.
        FormatError: not a store, or a damaged one.
    """
    metadata = _read(path)
    own = metadata.pop(STORE_KEY, None)
    if own is None and metadata.get("format", FORMAT) == FORMAT:
        raise FormatError(f"'{path}' is not a projection store: its {METADATA_FILE} belongs to exported .pt files.")
    problem = _problem(metadata)
    if problem:
        raise FormatError(f"'{path / METADATA_FILE}' is not the metadata of a projection store: it {problem}.")
    shard_rows = own.get("shard_rows") if isinstance(own, dict) else None
    if not isinstance(shard_rows, int) or isinstance(shard_rows, bool) or shard_rows < 1:
        raise FormatError(
            f"'{path / METADATA_FILE}' is damaged: store.shard_rows must be positive, got {shard_rows!r}."
        )
    layout = Layout(path / "shards", metadata["total_proj_dim"], DTYPES[metadata["proj_dtype"]], shard_rows)
    for shard in layout.shards():
        layout.marks(shard)
    return metadata, layout
