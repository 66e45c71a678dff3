"""Mask files: ``.safetensors`` (packed bits, metadata, checksum) and ``.pt`` (a plain dict of bool tensors).

A damaged file never loads as another mask: the safetensors form carries a SHA-256 over names, shapes and bits, the
``.pt`` form the CRCs of its zip archive, which are checked before a byte of it is unpickled.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sparseopt import functional
from sparseopt._files import FormatError, atomic_path
from sparseopt.masks.maskset import DERIVED_METADATA, MaskSet

__all__ = ["CODEC", "FORMAT", "VERSION", "load", "save"]

FORMAT = "sparseopt.masks"
VERSION = 1
RESERVED = ("format", "version", "shapes", "compression", "checksum")
SUFFIXES = {".safetensors": "safetensors", ".pt": "pt"}

# One tag byte per tensor, then a zlib stream: GAPS, the distances between active entries minus one in bytes (255 means
# "255 inactive entries and go on"), or BITS, the packed mask itself. Measured at 2.5% random: gaps take 1.01 times the
# entropy (5.9 times less than the bits), zlib over the bits 1.4 times; whole rows shrink some 600 times either way.
CODEC = "zlib-gap8"
BITS, GAPS = 0, 1
SPOOL = 1 << 30  # a verified copy of a .pt file is kept in memory up to this size, then on disk
GAPS_BELOW = 1 / 8  # denser masks have more gap bytes than bit bytes


def save(masks: MaskSet, path: str | os.PathLike[str], format: str | None = None, compress: bool = False) -> None:
    """Writes ``masks``; see :meth:`MaskSet.save`."""
    target = Path(path)
    kind = format or SUFFIXES.get(target.suffix)
    if kind not in SUFFIXES.values():
        given = f"format={format!r}" if format else f"the suffix of '{target}'"
        raise ValueError(f"mask files are 'safetensors' or 'pt', got {given}.")
    if kind == "pt":
        if compress:
            raise ValueError("compress=True needs format='safetensors'; a .pt file is a plain dict of bool tensors.")
        # A file object, because torch names the archive's folder after a path, here the temporary one.
        with atomic_path(target) as temporary, open(temporary, "wb") as file:
            torch.save(dict(masks.items()), file)
        return
    metadata = _header(masks, CODEC if compress else "none")
    tensors = {name: _compress(masks, name) if compress else masks.packed(name) for name in masks}
    with atomic_path(target) as temporary:
        save_file(tensors, temporary, metadata)


def load(path: str | os.PathLike[str]) -> MaskSet:
    """Reads a mask file of either format; see :meth:`MaskSet.load`."""
    source = Path(path)
    if not source.is_file():
        raise FileNotFoundError(f"there is no mask file '{source}'.")
    kind = SUFFIXES.get(source.suffix)
    if kind is None:
        with open(source, "rb") as file:
            kind = "pt" if file.read(4) == b"PK\x03\x04" else "safetensors"
    return _load_pt(source) if kind == "pt" else _load_safetensors(source)


# ---- safetensors -----------------------------------------------------------------------------------------------------
def _header(masks: MaskSet, compression: str) -> dict[str, str]:
    metadata = masks.metadata
    for key in RESERVED:
        if key in metadata:
            raise ValueError(f"metadata key {key!r} belongs to the file format; choose another.")
    if "__metadata__" in masks:
        raise ValueError("a parameter cannot be named '__metadata__' in a safetensors file.")
    return {
        **{str(key): _to_text(str(key), value) for key, value in metadata.items()},
        "format": FORMAT,
        "version": str(VERSION),
        "shapes": json.dumps({name: list(shape) for name, shape in masks.shapes.items()}),
        "compression": compression,
        "checksum": f"sha256:{masks.fingerprint}",
    }


def _to_text(key: str, value: Any) -> str:
    """Strings as they are, all else (and strings that look like it) as JSON: readable by others, and reversible."""
    if isinstance(value, str) and _from_text(value) == value:
        return value
    try:
        return json.dumps(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"metadata {key!r} must be something JSON can hold, got {type(value).__name__}.") from error


def _from_text(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _load_safetensors(source: Path) -> MaskSet:
    try:
        # Bytes that are not UTF-8 surface as UnicodeDecodeError, absurd sizes as OverflowError.
        with safe_open(source, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            shapes, compression = _check_header(source, metadata, list(file.keys()))
            packed = {}
            for name, shape in shapes.items():
                stored = file.get_tensor(name)
                if stored.dtype != torch.uint8 or stored.dim() != 1:
                    raise FormatError(f"'{source}' is damaged: the mask of {name!r} is not a vector of bytes.")
                packed[name] = _decompress(source, name, stored, math.prod(shape)) if compression else stored.clone()
    except (SafetensorError, UnicodeDecodeError, OverflowError) as error:
        raise FormatError(f"'{source}' is not a safetensors file, or it is damaged or truncated ({error}).") from error
    checksum = metadata["checksum"]
    described = {key: _from_text(v) for key, v in metadata.items() if key not in RESERVED + DERIVED_METADATA}
    try:
        masks = MaskSet(packed, shapes, described, copy_bits=False)
    except ValueError as error:
        raise FormatError(f"'{source}' is damaged: {error}") from error
    if checksum != f"sha256:{masks.fingerprint}":
        raise FormatError(f"'{source}' is damaged: names, shapes and bits do not match its checksum.")
    return masks


def _check_header(
    source: Path, metadata: Mapping[str, str], keys: list[str]
) -> tuple[dict[str, tuple[int, ...]], bool]:
    """-> (shapes, whether the bits are compressed)."""
    if metadata.get("format") != FORMAT:
        raise FormatError(f"'{source}' is not a mask file: its format is {metadata.get('format')!r}, not {FORMAT!r}.")
    if metadata.get("version") != str(VERSION):
        raise FormatError(
            f"'{source}' is a mask file of version {metadata.get('version')!r}; this release reads version {VERSION}."
        )
    for key in RESERVED:
        if key not in metadata:
            raise FormatError(f"'{source}' is damaged: its metadata lacks {key!r}.")
    if metadata["compression"] not in ("none", CODEC):
        raise FormatError(f"'{source}' is compressed with {metadata['compression']!r}; this release knows {CODEC!r}.")
    shapes = _from_text(metadata["shapes"])
    if not isinstance(shapes, dict) or not all(
        isinstance(shape, list) and all(type(size) is int and 0 <= size < 2**48 for size in shape)
        for shape in shapes.values()
    ):
        raise FormatError(f"'{source}' is damaged: its shapes cannot be read.")
    for name in sorted(shapes.keys() ^ set(keys)):
        what = "the mask is missing" if name in shapes else "the shape is missing"
        raise FormatError(f"'{source}' is damaged or incomplete: {what} for parameter {name!r}.")
    return {name: tuple(shape) for name, shape in shapes.items()}, metadata["compression"] == CODEC


# ---- compression -----------------------------------------------------------------------------------------------------
def _compress(masks: MaskSet, name: str) -> Tensor:
    bits = masks.packed(name)
    n = math.prod(masks.shapes[name])
    if masks.count(name) < GAPS_BELOW * n:
        indices = functional.mask_indices(bits, n).numpy().astype(np.int64)
        long, rest = np.divmod(np.diff(indices, prepend=-1) - 1, 255)
        ends = np.cumsum(long + 1) - 1
        data = np.full(int(ends[-1]) + 1 if ends.size else 0, 255, dtype=np.uint8)
        data[ends] = rest
        tag = GAPS
    else:
        data, tag = bits.numpy(), BITS
    stored = bytes([tag]) + zlib.compress(data.tobytes(), 6)
    return torch.frombuffer(bytearray(stored), dtype=torch.uint8)


def _decompress(source: Path, name: str, stored: Tensor, n: int) -> Tensor:
    damaged = FormatError(f"'{source}' is damaged: the compressed mask of {name!r} cannot be read.")
    if stored.numel() == 0 or int(stored[0]) not in (BITS, GAPS):
        raise damaged
    gaps = int(stored[0]) == GAPS
    # A damaged stream must not fill the memory: nothing valid is longer than this.
    limit = max(1, n if gaps else (n + 7) // 8)
    stream = zlib.decompressobj()
    try:
        data = stream.decompress(stored[1:].numpy().tobytes(), limit + 1)
    except zlib.error as error:
        raise damaged from error
    if not stream.eof or stream.unused_data or len(data) > limit:
        raise damaged
    values = np.frombuffer(bytearray(data), dtype=np.uint8)
    if not gaps:
        return torch.from_numpy(values)
    last = values < 255
    indices = (np.cumsum(values, dtype=np.int64) + np.cumsum(last, dtype=np.int64))[last] - 1
    if indices.size and int(indices[-1]) >= n:
        raise damaged
    mask = np.zeros(n, dtype=np.bool_)
    mask[indices] = True
    return torch.from_numpy(np.packbits(mask, bitorder="little"))


# ---- pt --------------------------------------------------------------------------------------------------------------
def _load_pt(source: Path) -> MaskSet:
    try:
        with tempfile.SpooledTemporaryFile(SPOOL) as copy:
            _copy_verified(source, copy)
            loaded = torch.load(copy, map_location="cpu", weights_only=True)
    except FormatError:
        raise
    except (
        zipfile.BadZipFile, zlib.error, struct.error, pickle.UnpicklingError, RuntimeError, ValueError, EOFError,
        OSError, KeyError, OverflowError, NotImplementedError, TypeError, AttributeError, IndexError, UnicodeError,
    ) as error:  # fmt: skip
        # Whatever zipfile, torch or pickle stumble over in a damaged or foreign file.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FormatError(f"'{source}' is not a .pt mask file, or it is damaged or truncated ({reason}).") from error
    if not isinstance(loaded, Mapping) or not all(
        isinstance(name, str) and isinstance(mask, Tensor) and mask.dtype == torch.bool for name, mask in loaded.items()
    ):
        raise FormatError(f"'{source}' is not a mask file: expected a dict of parameter name -> bool tensor.")
    for name, mask in loaded.items():
        if mask.numel() and int(mask.view(torch.uint8).max()) > 1:
            raise FormatError(f"'{source}' is damaged: the mask of {name!r} holds bytes that are neither 0 nor 1.")
    try:
        return MaskSet.from_bool(loaded)
    except ValueError as error:
        raise FormatError(f"'{source}' is not a usable mask file: {error}") from error


def _copy_verified(source: Path, copy: IO[bytes]) -> None:
    """Rewrites the archive from its parts while zipfile checks their CRCs.

    zipfile and torch do not read the same fields: a flipped bit in a local header can pass the CRCs and still move
    torch to other bytes. What torch gets to read is therefore only what was checked.
    """
    with zipfile.ZipFile(source) as archive, zipfile.ZipFile(copy, "w") as clean:
        parts = archive.infolist()
        if len({part.filename for part in parts}) < len(parts):
            raise FormatError(f"'{source}' is damaged: two of its parts have one name.")
        for part in parts:
            if part.compress_type != zipfile.ZIP_STORED:
                raise FormatError(f"'{source}' was not written by torch.save, or it is damaged: a part is compressed.")
            if part.file_size and not part.CRC:
                raise FormatError(f"'{source}' has no checksums: a damaged file could not be told from a good one.")
            with archive.open(part) as read, clean.open(part.filename, "w", force_zip64=True) as write:
                shutil.copyfileobj(read, write, 1 << 20)
    copy.seek(0)
