"""The table of all runs: read from the run.json files through an index, written as ``runs.csv``.

The index saves parsing, never looking: every run.json is stat'ed each time, and an entry is used only where time, size
and inode are those of the file it was read from (a run.json is replaced whole, so a new content is a new inode).
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparseopt._files import FormatError, atomic_write
from sparseopt.runs._record import RESERVED, parse_record, row_of

__all__ = ["columns_of", "scan", "write_csv"]

RECORD, CSV, INDEX = "run.json", "runs.csv", ".runs.index.json"
INDEX_FORMAT = "sparseopt.runs.index/1"
# So many files are read anew each time before the index is written: small folders have none.
INDEX_AFTER = 64
# What is kept of a run beside its row: whether its process is there must be asked each time.
_OWNER = ("machine", "started")

Entry = tuple[list[int], dict[str, Any], dict[str, Any]]  # stamp, row, owner


def scan(base: Path, *, write_index: bool = True) -> tuple[list[tuple[dict[str, Any], dict[str, Any]]], list[str]]:
    """All runs as pairs of row and owner, by run id, and one sentence about each damaged run.json.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    if not base.is_dir():
        raise FileNotFoundError(f"There is no folder of runs {str(base)!r}.")
    known = _read_index(base)
    entries: dict[str, Entry] = {}
    damaged, fresh = [], 0
    prefix = f"{base}{os.sep}"
    for name in sorted(os.listdir(base)):
        path = f"{prefix}{name}{os.sep}{RECORD}"
        if name.startswith("."):
            continue
        try:
            found = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            continue
        entry = known.get(name)
        if entry is None or entry[0] != _stamp(found):
            try:
                entry = _read_entry(path)
            except FormatError as error:
                damaged.append(str(error))
                continue
            except FileNotFoundError:  # deleted meanwhile
                continue
            fresh += 1
        entries[name] = entry
    if write_index and fresh + len(known.keys() - entries.keys()) > INDEX_AFTER:
        _write_index(base, entries)
    return [(row, owner) for _, row, owner in entries.values()], damaged


def _stamp(found: os.stat_result) -> list[int]:
    return [found.st_mtime_ns, found.st_size, found.st_ino]


def _read_entry(path: str) -> Entry:
    with open(path, "rb") as file:
        stamp = _stamp(os.fstat(file.fileno()))  # of what is read, whatever replaces it meanwhile
        record = parse_record(file.read(), Path(path))
    return stamp, row_of(record), {key: record.get(key) for key in _OWNER}


def _read_index(base: Path) -> dict[str, Entry]:
    try:
        content = json.loads((base / INDEX).read_bytes())
        if content["format"] != INDEX_FORMAT:
            return {}
        return {name: (entry[0], entry[1], entry[2]) for name, entry in content["runs"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):  # none, damaged or foreign
        return {}


def _write_index(base: Path, entries: Mapping[str, Entry]) -> None:
    # NaN in rows is Python's own JSON here: nobody else reads this file.
    text = json.dumps({"format": INDEX_FORMAT, "runs": entries}, separators=(",", ":"))
    try:
        atomic_write(base / INDEX, text)
    except OSError:  # somebody else's folder, read only: only slower
        return


def columns_of(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Every column that some row has: the reserved ones, then in the order of their first appearance."""
    columns = dict.fromkeys(RESERVED)
    for row in rows:
        columns.update(dict.fromkeys(row))
    return list(columns)


def csv_text(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Rows as CSV: None and what is missing are empty, lists and dicts are JSON, numbers keep every digit."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        values = [row.get(column) for column in columns]
        writer.writerow([json.dumps(v) if isinstance(v, (list, dict)) else "" if v is None else v for v in values])
    return buffer.getvalue()


def write_csv(base: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Replaces ``runs.csv``: who reads it at any moment reads a whole table."""
    atomic_write(base / CSV, csv_text(rows, columns_of(rows)))
