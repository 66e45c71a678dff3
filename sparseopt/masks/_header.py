"""What a mask file says about itself, checked before anything of the size it declares is allocated; and its parents."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from sparseopt._files import FormatError
from sparseopt.masks._names import name_problem
from sparseopt.masks.codec import CODEC, LEGACY
from sparseopt.masks.maskset import DERIVED_METADATA, MaskSet

__all__ = ["FORMAT", "RESERVED", "VERSION", "Header", "chain", "read_header", "write_header"]

FORMAT = "sparseopt.masks"
VERSION = 1
REQUIRED = ("format", "version", "shapes", "compression", "checksum")
RESERVED = (*REQUIRED, "parent")
SIZE_LIMIT = 2**48  # entries
DIMENSIONS = 64


@dataclass(frozen=True)
class Header:
    """One safetensors mask file.

    Attributes:
        path: the file.
        shapes: of all masks, by name as written.
        stored: names of which something is stored; the others are as in the parent.
        compression: ``none`` or the codec's name.
        fingerprint: of the masks, as ``sha256:..``.
        parent: fingerprint of the set that this one is stored against, and the name of its file if it had one.
        metadata: what the maker of the masks said about them.
    """

    path: Path
    shapes: dict[str, tuple[int, ...]]
    stored: frozenset[str]
    compression: str
    fingerprint: str
    parent: tuple[str, str | None] | None
    metadata: dict[str, Any]


# ---- writing ---------------------------------------------------------------------------------------------------------
def write_header(masks: MaskSet, compression: str, parent: tuple[MaskSet, str | None] | None) -> dict[str, str]:
    """The metadata of a file of ``masks``; ValueError or TypeError for what no file can hold."""
    metadata = masks.metadata
    for key in RESERVED:
        if key in metadata:
            raise ValueError(f"metadata key {key!r} belongs to the file format; choose another.")
    header = {
        **{str(key): _to_text(str(key), value) for key, value in metadata.items()},
        "format": FORMAT,
        "version": str(VERSION),
        "shapes": json.dumps({name: list(shape) for name, shape in masks.shapes.items()}),
        "compression": compression,
        "checksum": f"sha256:{masks.fingerprint}",
    }
    if parent is not None:
        header["parent"] = json.dumps({"fingerprint": f"sha256:{parent[0].fingerprint}", "file": parent[1]})
    return header


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


# ---- reading ---------------------------------------------------------------------------------------------------------
def read_header(source: Path) -> Header:
    """Reads and checks the header of a safetensors mask file; FormatError for anything else."""
    metadata, keys = _raw_header(source)
    if metadata.get("format") != FORMAT:
        raise FormatError(f"'{source}' is not a mask file: its format is {metadata.get('format')!r}, not {FORMAT!r}.")
    if metadata.get("version") != str(VERSION):
        raise FormatError(
            f"'{source}' is a mask file of version {metadata.get('version')!r}; this release reads version {VERSION}."
        )
    for key in REQUIRED:
        if key not in metadata:
            raise FormatError(f"'{source}' is damaged: its metadata lacks {key!r}.")
    compression = metadata["compression"]
    if compression not in ("none", CODEC, LEGACY):
        raise FormatError(
            f"'{source}' is compressed with {compression!r}; this release knows {CODEC!r} and {LEGACY!r}."
        )
    shapes = _shapes(source, metadata["shapes"])
    parent = _parent(source, metadata["parent"]) if "parent" in metadata else None
    if parent is not None and compression != CODEC:
        raise FormatError(
            f"'{source}' is damaged: only files of codec {CODEC!r} have a parent, this is {compression!r}."
        )
    for name in sorted(shapes.keys() ^ keys if parent is None else keys - shapes.keys()):
        what = "the mask is missing" if name in shapes else "the shape is missing"
        raise FormatError(f"'{source}' is damaged or incomplete: {what} for parameter {name!a}.")
    problem = name_problem(shapes)
    if problem:
        raise FormatError(f"'{source}' is refused: {problem}.")
    _check_size(source, shapes, metadata if compression != "none" else None)
    described = {key: _from_text(v) for key, v in metadata.items() if key not in RESERVED + DERIVED_METADATA}
    return Header(source, shapes, frozenset(keys), compression, metadata["checksum"], parent, described)


def _raw_header(source: Path) -> tuple[dict[str, str], set[str]]:
    try:
        # Bytes that are not UTF-8 surface as UnicodeDecodeError, absurd sizes as OverflowError.
        with safe_open(source, framework="pt") as file:
            return dict(file.metadata() or {}), set(file.keys())
    except (SafetensorError, UnicodeDecodeError, OverflowError) as error:
        raise FormatError(f"'{source}' is not a safetensors file, or it is damaged or truncated ({error}).") from error


def _shapes(source: Path, text: str) -> dict[str, tuple[int, ...]]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError
        return dict(pairs)

    try:
        shapes = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError):
        shapes = None
    if not isinstance(shapes, dict) or not all(
        isinstance(shape, list)
        and len(shape) <= DIMENSIONS
        and all(type(size) is int and 0 <= size < SIZE_LIMIT for size in shape)
        for shape in shapes.values()
    ):
        raise FormatError(f"'{source}' is damaged: its shapes cannot be read.")
    return {name: tuple(shape) for name, shape in shapes.items()}


def _parent(source: Path, text: str) -> tuple[str, str | None]:
    found = _from_text(text)
    if isinstance(found, dict) and found.keys() == {"fingerprint", "file"}:
        fingerprint, file = found["fingerprint"], found["file"]
        if file is not None and not _is_plain(file):
            raise FormatError(f"'{source}' is refused: its parent {file!a} is not the name of a file beside it.")
        if isinstance(fingerprint, str):
            return fingerprint, file
    raise FormatError(f"'{source}' is damaged: what it says of its parent cannot be read.")


def _is_plain(name: object) -> bool:
    return isinstance(name, str) and 0 < len(name) <= 255 and name.isprintable() and name.strip(".") != "" and (
        not any(part in name for part in ("/", "\\", ":"))
    )  # fmt: skip


def _check_size(source: Path, shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str] | None) -> None:
    """Bounds what reading may allocate: compressed bits say nothing about their size (``metadata``: theirs)."""
    total = 0
    for name, shape in shapes.items():
        n = math.prod(shape)
        if n >= SIZE_LIMIT:
            raise FormatError(f"'{source}' is refused: {name!a} is said to have 2^48 entries or more.")
        total += n
    if metadata is not None and metadata.get("total_parameters") != str(total):
        told = metadata.get("total_parameters")
        raise FormatError(f"'{source}' is damaged: its shapes have {total} entries, its metadata says {told!r}.")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if total // 8 > memory:
        raise FormatError(f"'{source}' is refused: it declares {total // 8} bytes of masks, the memory has {memory}.")


# ---- parents ---------------------------------------------------------------------------------------------------------
def chain(source: Path) -> tuple[list[Header], Path | None]:
    """The headers of a file and of all it is stored against, itself first; and the last parent, if it is a .pt file.

    Raises:
        FormatError: a file is damaged, a parent is missing or another one, or the chain comes back to itself.
    """
    headers = [read_header(source)]
    while (parent := headers[-1].parent) is not None:
        found = _find(headers[-1].path, *parent, [header.path for header in headers])
        if isinstance(found, Path):
            return headers, found
        headers.append(found)
    return headers, None


def _find(child: Path, fingerprint: str, file: str | None, seen: list[Path]) -> Header | Path:
    """The parent's header, or its path for a .pt file (which has none), looked for by name, then by fingerprint."""
    told = f"'{file}' of fingerprint {fingerprint}" if file else f"fingerprint {fingerprint}"
    named = child.parent / file if file else None
    other = ""
    if named is not None and named.is_file():
        if any(named.samefile(path) for path in seen):
            raise FormatError(f"'{child}' is damaged: its parent is {told}, which is stored against it.")
        if is_archive(named):
            return named
        header = read_header(named)
        if header.fingerprint == fingerprint:
            return header
        other = f"; '{named}' has fingerprint {header.fingerprint}"
    for header in _beside(child, seen):
        if header.fingerprint == fingerprint:
            return header
    raise FormatError(f"'{child}' is stored against its parent {told}, which is not in its folder{other}.")


def _beside(child: Path, seen: list[Path]) -> Iterator[Header]:
    for path in sorted(child.parent.glob("*.safetensors")):
        if path.is_file() and not any(path.samefile(one) for one in seen):
            try:
                yield read_header(path)
            except FormatError:  # not a mask file, or a damaged one: no parent of anything
                continue


def is_archive(path: Path) -> bool:
    """Whether a file is to be read as .pt: by its suffix, else by its content."""
    if path.suffix in (".pt", ".safetensors"):
        return path.suffix == ".pt"
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"
