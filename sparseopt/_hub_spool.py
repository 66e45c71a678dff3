"""Uploads that wait on disk: a folder with one folder per upload, each of which says all that is needed to send it.

    DIR/step_N-XXXXXXXX/mask.safetensors      a hard link to the mask file, or a copy of it
                        entry.json            format, version, repo_id, step, private, file, bytes, metadata

``entry.json`` is written last: an entry without it was never complete and is ignored. Entries whose process was killed
are sent later, by the next run with the same folder or by ``sparseopt masks push --pending DIR``.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparseopt._files import FormatError
from sparseopt._hub_places import FORMATS, check_step

__all__ = ["LOCK", "Entry", "NoSpaceError", "finish", "link_or_open", "make_entry", "read_entries", "remove_entry"]

FORMAT = "sparseopt.upload"
VERSION = 1
LOCK = ".lock"
FILES = tuple(f"mask.{format}" for format in FORMATS)
MARGIN = 1 << 20  # bytes left free beside an entry


class NoSpaceError(OSError):
    """The spool folder's disk has no room for an entry."""


@dataclass(frozen=True)
class Entry:
    """One upload that waits."""

    folder: Path
    repo_id: str
    step: int
    private: bool
    file: Path
    bytes: int
    metadata: dict[str, Any]


def make_entry(
    spool: Path, repo_id: str, step: int, private: bool, mask_file: Path, metadata: Mapping[str, Any]
) -> tuple[Entry, Any]:
    """Begins an entry: (entry, None) when it is complete, (entry, open source file) when :func:`finish` has to copy.

    Nothing here takes long: a hard link, or an opened file, which stays readable whatever becomes of its name.

    Raises:
        NoSpaceError: the disk is too full.
        OSError: the mask file or the folder cannot be used.
        TypeError, ValueError: the metadata is not what JSON can hold, or the file is neither safetensors nor pt.
    """
    name = f"mask{mask_file.suffix}"
    if name not in FILES:
        raise ValueError(f"mask files end in .safetensors or .pt, got '{mask_file.name}'.")
    size = mask_file.stat().st_size
    folder = spool / f"step_{check_step(step)}-{secrets.token_hex(4)}"
    entry = Entry(folder, repo_id, step, private, folder / name, size, dict(metadata))
    json.dumps(entry.metadata, allow_nan=False)
    spool.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(spool).free
    if free < MARGIN:
        raise NoSpaceError(f"{free:,} bytes are free in '{spool}', expected {MARGIN:,}.")
    folder.mkdir()
    try:
        source = link_or_open(mask_file, entry.file)
        if source is not None and free < size + MARGIN:
            source.close()
            raise NoSpaceError(f"{free:,} bytes are free in '{spool}', expected {size + MARGIN:,}.")
        if source is None:
            _write(entry)
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return entry, source


def link_or_open(source: Path, target: Path) -> Any:
    """Hard-links; where the file system cannot do that, returns the opened source for a copy."""
    try:
        os.link(source, target)
    except OSError:
        return open(source, "rb")
    return None


def finish(entry: Entry, source: Any) -> None:
    """Copies the mask file into an entry, and completes it; removes the entry if that fails."""
    try:
        with source, open(entry.file, "wb") as file:
            shutil.copyfileobj(source, file, 1 << 20)
        _write(entry)
    except OSError:
        remove_entry(entry)
        raise


def _write(entry: Entry) -> None:
    about = {
        "format": FORMAT,
        "version": VERSION,
        "repo_id": entry.repo_id,
        "step": entry.step,
        "private": entry.private,
        "file": entry.file.name,
        "bytes": entry.bytes,
        "metadata": entry.metadata,
    }
    # Renamed, so never seen half; not fsynced, because a training step waits: a killed process loses nothing by that.
    temporary = entry.folder / "entry.json.tmp"
    temporary.write_text(json.dumps(about, allow_nan=False, indent=2), encoding="utf-8")
    temporary.replace(entry.folder / "entry.json")


def read_entries(spool: Path) -> tuple[list[Entry], list[FormatError]]:
    """Complete entries, by repository, step and age; and what is wrong with those that cannot be read.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    if not spool.is_dir():
        raise FileNotFoundError(f"there is no spool folder '{spool}'.")
    found, damaged = [], []
    for path in spool.glob("step_*/entry.json"):
        try:
            found.append((path.stat().st_mtime_ns, _read(path)))
        except FormatError as error:
            damaged.append(error)
    found.sort(key=lambda item: (item[1].repo_id, item[1].step, item[0]))
    return [entry for _, entry in found], damaged


def _read(path: Path) -> Entry:
    damaged = f"'{path}' is not a waiting upload"
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{damaged}: it is no JSON.") from error
    if not isinstance(about, dict) or about.get("format") != FORMAT or about.get("version") != VERSION:
        raise FormatError(f"{damaged} of version {VERSION}.")
    expected = {"repo_id": str, "step": int, "private": bool, "file": str, "bytes": int, "metadata": dict}
    for key, kind in expected.items():
        if type(about.get(key)) is not kind:
            raise FormatError(f"{damaged}: its {key} must be {kind.__name__}, got {about.get(key)!r}.")
    # A name from a file is never used as a path unchecked.
    if about["file"] not in FILES:
        raise FormatError(f"{damaged}: its file must be one of {', '.join(FILES)}, got {about['file']!r}.")
    try:
        check_step(about["step"])
    except ValueError as error:
        raise FormatError(f"{damaged}: {error}") from error
    file = path.parent / about["file"]
    size = file.stat().st_size if file.is_file() else None
    if size != about["bytes"]:
        raise FormatError(f"{damaged}: '{file.name}' must have {about['bytes']:,} bytes, got {size}.")
    keys = ("repo_id", "step", "private", "bytes", "metadata")
    return Entry(folder=path.parent, file=file, **{key: about[key] for key in keys})


def remove_entry(entry: Entry) -> None:
    """Removes an entry, its description first: what is left of it is then incomplete, and ignored."""
    (entry.folder / "entry.json").unlink(missing_ok=True)
    shutil.rmtree(entry.folder, ignore_errors=True)
