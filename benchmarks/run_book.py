"""Benchmarks of many runs: a finished run is a line of a file and is never run again, a time limit stops between runs.

The same command in several processes shares the work (:meth:`RunBook.finish_all`): a process claims a run by a file lock, which
the system releases however the process ends.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from sparseopt._files import FormatError, atomic_write

__all__ = ["STOPPED", "Row", "RunBook", "add_arguments", "append_row", "exit_code", "key_of", "read_rows", "today"]

Row = dict[str, Any]
STOPPED = 3  # exit code of a command that stopped at its time limit
MARGIN = 1.2  # a run is expected to take as long as the longest so far, times this


class RunBook:
    """Runs what its file does not have yet.

    Args:
        path: of the rows, JSON lines.
        about: recorded with every row; ``about["settings"]`` are those that all rows share.
        tell: one line about a new row, for stderr.
        time_limit: seconds after which no run is begun that would, by the longest so far, end later.
        began: ``time.monotonic()`` from which the limit counts (default: now).

    Attributes:
        rows: by their keys.

    Raises:
        ValueError: the file holds runs under other settings.
        FormatError: a line is not a finished run.
    """

    def __init__(
        self,
        path: Path,
        about: Mapping[str, Any],
        tell: Callable[[Row], str],
        *,
        time_limit: float | None = None,
        began: float | None = None,
    ) -> None:
        self.path, self.about, self.time_limit = path, dict(about), time_limit
        self._tell, self._longest = tell, 0.0
        self._began = time.monotonic() if began is None else began
        rows = read_rows(path)
        if other := [row for row in rows if row["settings"] != about["settings"]]:
            differ = _difference(other[0]["settings"], about["settings"])
            raise ValueError(f"{str(path)!r} holds runs under other settings ({differ}): give another folder.")
        self.rows = {row["key"]: row for row in rows}

    def finish(self, key: str, run: Callable[[], Row]) -> bool:
        """Makes sure that a run is done; False where time is up.

        Args:
            key: of the run, see :func:`key_of`.
            run: what the row is to hold besides ``key``, ``seconds`` and ``about``.
        """
        if key in self.rows:
            return True
        began = time.monotonic()
        if self.time_limit is not None and began - self._began + MARGIN * self._longest > self.time_limit:
            return False
        found = run()
        seconds = time.monotonic() - began
        self._longest = max(self._longest, seconds)
        row = {"key": key, **found, "seconds": round(seconds, 2), **self.about}
        append_row(self.path, row)
        self.rows[key] = row
        print(self._tell(row), file=sys.stderr, flush=True)
        return True

    def finish_all(self, runs: Mapping[str, Callable[[], Row]]) -> bool:
        """Makes sure that all these runs are done, by this process or by others with the same file; False where time is up.

        Args:
            runs: key -> what :meth:`finish` is given. They must not need one another.
        """
        while True:
            self._read()
            waiting = [key for key in runs if key not in self.rows]
            if not waiting:
                return True
            idle = True
            for key in waiting:
                with self._claim(key) as mine:
                    if not mine:
                        continue
                    idle = False
                    self._read()  # another process may have finished it since
                    if not self.finish(key, runs[key]):
                        return False
            if idle:
                if self.time_limit is not None and time.monotonic() - self._began > self.time_limit:
                    return False
                time.sleep(0.5)

    def _read(self) -> None:
        self.rows = {row["key"]: row for row in read_rows(self.path)}

    @contextlib.contextmanager
    def _claim(self, key: str) -> Iterator[bool]:
        """Whether the run is this process's to do, for as long as the block lasts."""
        path = self.path.with_suffix(".claims") / key
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()


def key_of(*parts: Any, sort_keys: bool = False) -> str:
    """A run's key: 16 hexadecimal digits of what tells it from the others, all of it JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=sort_keys).encode()).hexdigest()[:16]


def read_rows(path: Path) -> list[Row]:
    """The rows of a file; none where there is no file.

    Raises:
        FormatError: a line is not a JSON object of a run.
    """
    if not path.is_file():
        return []
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
            rows.append({**row, "phase": row["phase"], "arm": row["arm"], "key": row["key"]})
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise FormatError(f"line {number} of {path} is not a finished run: {error!r}.") from error
    return rows


def append_row(path: Path, row: Row) -> None:
    """Adds a row; the file is replaced as a whole, so that a kill leaves the rows before it."""
    with FileLock(path.with_suffix(".lock")):
        text = path.read_text() if path.is_file() else ""
        atomic_write(path, f"{text}{json.dumps(row, allow_nan=False)}\n")


def _difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return ", ".join(f"{key} {old.get(key)!r} there, {new.get(key)!r} here" for key in keys)


def today() -> str:
    """The date in UTC, year-month-day."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")


# ---- the command line ------------------------------------------------------------------------------------------------
def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``--report``, ``--no_picture``, ``--time_limit`` and ``--commit``."""
    parser.add_argument("--report", action="store_true", help="only rewrite the tables and the picture")
    parser.add_argument("--no_picture", action="store_true", help="no picture (it needs matplotlib)")
    parser.add_argument("--time_limit", type=float, metavar="SECONDS", help="begin no run that would end later")
    parser.add_argument("--commit", help="recorded where the source is not a git checkout")


def exit_code(work: Callable[[], bool]) -> int:
    """Does the work of a command: 0 where it says that all is complete, 1 with the error where it failed, 3 otherwise."""
    try:
        complete = work()
    except (RuntimeError, ValueError, OSError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if not complete:
        print("stopped at the time limit: the same command goes on.", file=sys.stderr)
        return STOPPED
    return 0
