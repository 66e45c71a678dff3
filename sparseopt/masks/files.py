"""Mask files: ``.safetensors`` (packed bits, metadata, checksum) and ``.pt`` (a plain dict of bool tensors).

A damaged file never loads as another mask: the safetensors form carries a SHA-256 over names, shapes and bits, the
``.pt`` form the CRCs of its zip archive, which are checked before a byte of it is unpickled.

A compressed file may be stored against a parent: it then holds, for names whose bits differ, the coded difference, and in
its metadata ``parent``, the fingerprint and file name of the parent, which is looked for in its folder.
"""

from __future__ import annotations

import math
import os
import pickle
import shutil
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from sparseopt._files import FormatError, atomic_path
from sparseopt._safetensors import TensorFile
from sparseopt.masks import codec
from sparseopt.masks._header import FORMAT, VERSION, Header, chain, is_archive, read_header, write_header
from sparseopt.masks._names import name_problem
from sparseopt.masks.codec import CODEC
from sparseopt.masks.maskset import MaskSet

__all__ = ["CODEC", "FORMAT", "VERSION", "load", "parent_of", "save"]

SUFFIXES = {".safetensors": "safetensors", ".pt": "pt"}
SPOOL = 1 << 30  # a verified copy of a .pt file is kept in memory up to this size, then on disk


def save(
    masks: MaskSet,
    path: str | os.PathLike[str],
    format: str | None = None,
    compress: bool = False,
    parent: MaskSet | str | os.PathLike[str] | None = None,
) -> None:
    """Writes ``masks``; see :meth:`MaskSet.save`."""
    target = Path(path)
    kind = format or SUFFIXES.get(target.suffix)
    if kind not in SUFFIXES.values():
        given = f"format={format!r}" if format else f"the suffix of '{target}'"
        raise ValueError(f"mask files are 'safetensors' or 'pt', got {given}.")
    if parent is not None and not compress:
        raise ValueError("parent= needs compress=True: what is stored is the compressed difference.")
    if "__metadata__" in masks:
        raise ValueError("a parameter cannot be named '__metadata__' in a mask file.")
    problem = name_problem(masks)
    if problem:
        raise ValueError(f"the masks cannot be saved: {problem}.")
    if kind == "pt":
        if compress:
            raise ValueError("compress=True needs format='safetensors'; a .pt file is a plain dict of bool tensors.")
        # A file object, because torch names the archive's folder after a path, here the temporary one.
        with atomic_path(target) as temporary, open(temporary, "wb") as file:
            torch.save(dict(masks.items()), file)
        return
    base = None if parent is None else _base(target, parent)
    metadata = write_header(masks, CODEC if compress else "none", base)
    tensors = _compressed(masks, base[0] if base else None) if compress else {n: masks.packed(n) for n in masks}
    with atomic_path(target) as temporary:
        save_file(tensors, temporary, metadata)


def load(path: str | os.PathLike[str]) -> MaskSet:
    """Reads a mask file of either format, with its parents; see :meth:`MaskSet.load`."""
    source = Path(path)
    if not source.is_file():
        raise FileNotFoundError(f"there is no mask file '{source}'.")
    if is_archive(source):
        return _load_pt(source)
    headers, archive = chain(source)
    masks = None
    if archive is not None:
        masks = _load_pt(archive)
        told = headers[-1].parent
        if told is not None and told[0] != f"sha256:{masks.fingerprint}":
            raise FormatError(
                f"'{headers[-1].path}' is stored against a parent of fingerprint {told[0]}; "
                f"'{archive}' has fingerprint sha256:{masks.fingerprint}."
            )
    while headers:
        masks = _read(headers.pop(), masks)
    assert masks is not None
    return masks


def parent_of(path: str | os.PathLike[str]) -> tuple[str, str | None] | None:
    """What a safetensors mask file is stored against: (``sha256:..`` fingerprint, file name or None); None for nothing.

    Reads the header only.

    Raises:
        FileNotFoundError: there is no such file.
        sparseopt.FormatError: it is not a safetensors mask file, or damaged.
    """
    source = Path(path)
    if not source.is_file():
        raise FileNotFoundError(f"there is no mask file '{source}'.")
    return read_header(source).parent


# ---- safetensors -----------------------------------------------------------------------------------------------------
def _base(target: Path, parent: MaskSet | str | os.PathLike[str]) -> tuple[MaskSet, str | None]:
    if isinstance(parent, MaskSet):
        return parent, None
    place = Path(parent)
    if target.exists() and place.exists() and target.samefile(place):
        raise ValueError(f"'{target}' cannot be its own parent: writing it would remove what it is stored against.")
    return load(place), place.name


def _compressed(masks: MaskSet, base: MaskSet | None) -> dict[str, Tensor]:
    def encode(name: str) -> Tensor | None:
        shape = masks.shapes[name]
        n = math.prod(shape)
        if base is not None and name in base and base.shapes[name] == shape:
            return codec.encode_difference(masks.packed(name), base.packed(name), n)
        return codec.encode(masks.packed(name), n)

    # Coding releases the interpreter. Half of the threads: training may go on beside. The largest first, since it may take
    # as long as all others.
    names = sorted(masks, key=lambda name: -masks.packed(name).numel())
    with ThreadPoolExecutor((torch.get_num_threads() + 1) // 2) as threads:
        coded = dict(zip(names, threads.map(encode, names), strict=True))
    return {name: stored for name in masks if (stored := coded[name]) is not None}


def _read(header: Header, base: MaskSet | None) -> MaskSet:
    """The masks of one file. ``base``, its parent, is used up: its bits are changed in place and belong to the result."""
    source = header.path
    packed = {}
    with TensorFile(source) as file:
        for name, shape in header.shapes.items():
            n = math.prod(shape)
            stored = None
            if name in header.stored:
                if file.dtypes.get(name) != torch.uint8 or len(file.shapes[name]) != 1:
                    raise FormatError(f"'{source}' is damaged: the mask of {name!r} is not a vector of bytes.")
                stored = file.read(name)
            if header.compression == "none" and stored is not None:
                packed[name] = stored
                continue
            if base is not None and name in base and base.shapes[name] == shape:
                packed[name] = base.packed(name)
            else:
                packed[name] = _zeros(source, name, (n + 7) // 8)
            if stored is not None:
                decode = codec.decode_ if header.compression == CODEC else codec.decode_legacy_
                try:
                    decode(stored, packed[name], n)
                except ValueError as error:
                    raise FormatError(
                        f"'{source}' is damaged: the compressed mask of {name!r} cannot be read ({error})."
                    ) from error
    try:
        masks = MaskSet(packed, header.shapes, header.metadata, copy_bits=False)
    except ValueError as error:
        raise FormatError(f"'{source}' is damaged: {error}") from error
    if header.fingerprint != f"sha256:{masks.fingerprint}":
        raise FormatError(f"'{source}' is damaged: names, shapes and bits do not match its checksum.")
    return masks


def _zeros(source: Path, name: str, size: int) -> Tensor:
    try:
        return torch.from_numpy(np.zeros(size, np.uint8))
    except MemoryError as error:
        raise FormatError(f"'{source}' declares {size} bytes for the mask of {name!r}: no such memory.") from error


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
        if mask.layout != torch.strided or mask.device.type != "cpu" or mask.numel() > mask.untyped_storage().nbytes():
            # A view that repeats a byte, for one, may declare any size.
            raise FormatError(f"'{source}' is refused: the mask of {name!a} is not stored entry by entry.")
        if mask.numel() and int(mask.view(torch.uint8).max()) > 1:
            raise FormatError(f"'{source}' is damaged: the mask of {name!r} holds bytes that are neither 0 nor 1.")
    problem = name_problem(loaded)
    if problem:
        raise FormatError(f"'{source}' is refused: {problem}.")
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
