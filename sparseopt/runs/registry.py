"""The registry of runs: ``{base_dir}/{run_id}/run.json`` is the truth, ``{base_dir}/runs.csv`` a view of all of them.

Any number of processes may work on one folder. A run.json changes under the run's lock and is replaced whole, so that
nobody's metrics are lost and whoever is killed leaves the old content or the new. A call returns when its change is in
run.json; in small tables it is in ``runs.csv``, too.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import secrets
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparseopt._files import atomic_write
from sparseopt.runs._process import alive
from sparseopt.runs._record import (
    RESERVED,
    as_dict,
    dump_record,
    new_record,
    now,
    parse_record,
    plain,
)
from sparseopt.runs._table import CSV, RECORD, columns_of, scan, write_csv

if TYPE_CHECKING:
    import pandas

__all__ = ["RunManager"]

UNFINISHED = ("created", "running")
# Above this size, metrics refresh a runs.csv only where it is older than this: a table of thousands of runs is not
# written a thousand times. What ends or registers a run always refreshes it.
LARGE_CSV_BYTES, LARGE_CSV_AGE_S = 1 << 18, 5.0
HEARTBEAT_S = 30.0
# What a sweep tells the processes it starts.
RUN_ID_VARIABLE, RUNS_DIR_VARIABLE = "SPARSEOPT_RUN_ID", "SPARSEOPT_RUNS_DIR"


class RunManager:
    """The runs of one folder.

    Args:
        base_dir: the folder; made when the first run is set up.
        stale_after: seconds without a heartbeat after which an unfinished run on another machine counts as crashed. On
            this machine its process is looked for instead.
    """

    def __init__(self, base_dir: str | os.PathLike[str] = "saved_models", *, stale_after: float = 900.0) -> None:
        if not stale_after > 0:
            raise ValueError(f"stale_after must be a positive number of seconds, got {stale_after!r}.")
        self.base_dir = Path(base_dir)
        self.stale_after = stale_after

    # ---- writing -----------------------------------------------------------------------------------------------------
    def setup_run(self, config: Mapping[str, Any], *, sweep_name: str | None = None) -> str:
        """Gives a run its id and folder, writes ``config.yaml`` and registers it.

        A process that ends without :meth:`finish_run` marks what it set up itself: ``finished`` at its normal end,
        ``failed`` after an uncaught exception; killed, it leaves a run that is seen as ``crashed``. In a process that a
        sweep started, the first run set up in the sweep's folder is the sweep's.

        Args:
            config: nested dict of plain values (OmegaConf's, too); any keys.
            sweep_name: the sweep it belongs to; default: the configuration's own ``sweep_name``, if any.

        Returns:
            The run id: time (UTC) and random digits, so that ids sort by time and never collide.

        Raises:
            TypeError: the configuration is no dict, or holds something other than numbers, text, bools, None, lists, dicts.
        """
        values = as_dict(config)
        given = self._given_id()
        run_id = given or self.new_run_id()
        self.register_run(run_id, values, sweep_name=sweep_name)
        if given is None:  # a sweep books itself how its runs end
            _close_at_exit(self, run_id)
        return run_id

    def new_run_id(self) -> str:
        """A new id, its folder made."""
        self.base_dir.mkdir(parents=True, exist_ok=True)
        while True:
            run_id = f"{datetime.now(UTC):%Y%m%d-%H%M%S-%f}-{secrets.token_hex(3)}"
            try:
                (self.base_dir / run_id).mkdir()  # whoever makes the folder has the id
                return run_id
            except FileExistsError:
                continue

    def _given_id(self) -> str | None:
        """The id of the run that a sweep started this process for, the first time it is asked for."""
        if os.environ.get(RUNS_DIR_VARIABLE) != os.path.abspath(self.base_dir):
            return None
        return os.environ.pop(RUN_ID_VARIABLE, None)

    def register_run(self, run_id: str, config: Mapping[str, Any], *, sweep_name: str | None = None) -> None:
        """Registers a run under a given id; a registered one gets this configuration and keeps everything else.

        Raises:
            ValueError: the id cannot be the name of a folder.
            TypeError: as :meth:`setup_run`.
        """
        from sparseopt._yaml import dump

        values = as_dict(config)
        folder = self._folder(run_id)
        folder.mkdir(parents=True, exist_ok=True)
        with self._lock(folder / ".lock"):
            atomic_write(folder / "config.yaml", dump(values))
            fresh = new_record(run_id, values, sweep_name)
            if (folder / RECORD).exists():
                kept = self._read(run_id)
                names = ("run_name", "config", "config_hash", "sweep_name")
                fresh = kept | {name: fresh[name] for name in names if fresh[name] is not None}
            atomic_write(folder / RECORD, dump_record(fresh))
        self._refresh()

    def start_run(self, run_id: str) -> None:
        """Marks a run as running, worked on by this process (which may be another than the one that set it up).

        Raises:
            FileNotFoundError: there is no such run.
        """
        from sparseopt.runs._process import identity
        from sparseopt.runs._record import git_commit, versions

        owner = {**identity(), "git_commit": git_commit(os.getcwd()), "versions": dict(versions())}
        self._change(run_id, lambda record: record.update(status="running", error=None, **owner))
        _close_at_exit(self, run_id)
        self._refresh()

    def update_metrics(self, run_id: str, metrics: Mapping[str, Any]) -> None:
        """Adds metrics to a run, or replaces those of the same names; each becomes a column of the table.

        The final loss and perplexity are named ``final_valid_loss`` and ``final_valid_perplexity``. NaN and infinities
        are kept as such.

        Raises:
            FileNotFoundError: there is no such run.
            TypeError: a value is no number, text, bool, None or list of them; one-element tensors are numbers.
        """
        values = {str(name): plain(value, f"metric {name}") for name, value in metrics.items()}
        nested = [name for name, value in values.items() if isinstance(value, dict)]
        if nested:
            raise TypeError(f"metric {nested[0]} must be a number, text, bool, None or a list of them, got a dict.")
        self._change(run_id, lambda record: record["metrics"].update(values))
        self._refresh(metrics=True)

    def heartbeat(self, run_id: str) -> None:
        """Says that the run is alive; :meth:`update_metrics` does, too."""
        self._change(run_id, lambda record: None)

    def finish_run(self, run_id: str, status: str = "finished", error: str | None = None) -> None:
        """Marks the end of a run: ``finished``, ``failed`` or ``crashed``, with a sentence about what went wrong."""
        if status not in ("finished", "failed", "crashed"):
            raise ValueError(f"status must be finished, failed or crashed, got {status!r}.")
        self._change(run_id, lambda record: record.update(status=status, error=error))
        _OPEN.pop((os.path.abspath(self.base_dir), run_id), None)
        self._refresh()

    @contextlib.contextmanager
    def tracking(self, run_id: str, *, interval: float = HEARTBEAT_S) -> Iterator[None]:
        """Running inside the block, with a heartbeat every ``interval`` seconds; finished, or failed, after it."""
        self.start_run(run_id)
        try:
            with self.beating(run_id, interval):
                yield
        except BaseException as error:
            self.finish_run(run_id, "failed", _describe(error))
            raise
        self.finish_run(run_id)

    @contextlib.contextmanager
    def beating(self, run_id: str, interval: float = HEARTBEAT_S) -> Iterator[None]:
        """A heartbeat every ``interval`` seconds inside the block."""
        stop = threading.Event()

        def beat() -> None:
            while not stop.wait(interval):
                # A file system that is away for a moment must not end the heartbeat of a run of days.
                with contextlib.suppress(OSError):
                    self.heartbeat(run_id)

        thread = threading.Thread(target=beat, name=f"heartbeat {run_id}", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def refresh_csv(self) -> Path:
        """Writes ``runs.csv`` anew from the run.json files and returns its path."""
        self.base_dir.mkdir(parents=True, exist_ok=True)
        self._refresh()
        return self.base_dir / CSV

    # ---- reading -----------------------------------------------------------------------------------------------------
    def rows(self) -> list[dict[str, Any]]:
        """One flat dict per run, by run id: run_id, status, ..., the configuration by dotted keys, the metrics.

        An unfinished run whose process is gone has the status ``crashed``. Damaged run.json files warn and are left out.

        Raises:
            FileNotFoundError: there is no such folder.
        """
        found, damaged = scan(self.base_dir)
        for sentence in damaged:
            warnings.warn(sentence, stacklevel=2)
        return [self._seen(row, owner) for row, owner in found]

    def get_run(self, run_id: str) -> dict[str, Any]:
        """The record of a run as in its run.json, the status as in :meth:`rows`.

        Args:
            run_id: the id, or the beginning of exactly one.

        Raises:
            FileNotFoundError: there is no such run.
            ValueError: several ids begin so.
            FormatError: its run.json is damaged.
        """
        record = self._read(self.resolve(run_id))
        return self._seen(record, record)

    def get_run_config(self, run_id: str) -> dict[str, Any]:
        """The configuration of a run as a nested dict. Arguments and errors as :meth:`get_run`."""
        config: dict[str, Any] = self.get_run(run_id)["config"]
        return config

    def get_best_run(
        self, metric: str = "final_valid_loss", *, maximize: bool = False, sweep_name: str | None = None
    ) -> dict[str, Any]:
        """The row (as in :meth:`rows`) of the run with the smallest value of a column, or the largest.

        Args:
            metric: a column; runs without a number in it, and those with NaN, do not compete.
            maximize: the largest instead.
            sweep_name: only the runs of this sweep.

        Raises:
            ValueError: no run has a number there.
        """
        competing = [
            row
            for row in self.rows()
            if (sweep_name is None or row["sweep_name"] == sweep_name)
            and isinstance(row.get(metric), (int, float))
            and not isinstance(row[metric], bool)
            and row[metric] == row[metric]
        ]
        if not competing:
            where = "" if sweep_name is None else f" of the sweep {sweep_name!r}"
            raise ValueError(f"No run{where} in {str(self.base_dir)!r} has a number in the column {metric!r}.")
        return (max if maximize else min)(competing, key=lambda row: row[metric])

    def get_runs_df(self) -> pandas.DataFrame:
        """All runs as a pandas DataFrame, one row each, columns as in :meth:`rows`."""
        import pandas

        rows = self.rows()
        return pandas.DataFrame(rows, columns=columns_of(rows) if rows else list(RESERVED))

    def resolve(self, run_id: str) -> str:
        """The id of the one run whose id is, or begins with, ``run_id``; errors as :meth:`get_run`."""
        if (self._folder(run_id) / RECORD).is_file():
            return run_id
        if not self.base_dir.is_dir():
            raise FileNotFoundError(f"There is no folder of runs {str(self.base_dir)!r}.")
        matching = sorted(path.parent.name for path in self.base_dir.glob(f"[!.]*/{RECORD}"))
        matching = [name for name in matching if name.startswith(run_id)]
        if not matching:
            raise FileNotFoundError(f"There is no run {run_id!r} in {str(self.base_dir)!r}.")
        if len(matching) > 1:
            raise ValueError(f"{len(matching)} runs begin with {run_id!r}, among them {', '.join(matching[:3])}.")
        return matching[0]

    # ---- inside ------------------------------------------------------------------------------------------------------
    def _folder(self, run_id: str) -> Path:
        if not isinstance(run_id, str) or not run_id or run_id.startswith(".") or Path(run_id).name != run_id:
            raise ValueError(f"A run id must be the name of a folder, not beginning with a dot, got {run_id!r}.")
        return self.base_dir / run_id

    def _read(self, run_id: str) -> dict[str, Any]:
        path = self._folder(run_id) / RECORD
        try:
            return parse_record(path.read_bytes(), path)
        except FileNotFoundError:
            raise FileNotFoundError(f"There is no run {run_id!r} in {str(self.base_dir)!r}.") from None

    def _change(self, run_id: str, change: Callable[[dict[str, Any]], None]) -> None:
        """Reads, changes and replaces a run.json under the run's lock."""
        folder = self._folder(run_id)
        if not (folder / RECORD).is_file():
            raise FileNotFoundError(f"There is no run {run_id!r} in {str(self.base_dir)!r}.")
        with self._lock(folder / ".lock"):
            record = self._read(run_id)
            change(record)
            record["heartbeat"] = now()
            atomic_write(folder / RECORD, dump_record(record))

    def _refresh(self, *, metrics: bool = False) -> None:
        """Brings runs.csv up to date with what this process has written into a run.json.

        Many writers share one rebuild: each leaves a mark and waits for the lock, and who finds the marks gone was served
        by another. A mark is renamed for the time of the rebuild, so that a kill then leaves one, too.
        """
        mark, taken = self.base_dir / ".runs.stale", self.base_dir / ".runs.refreshing"
        mark.touch()
        if metrics and self._is_large_and_young():
            return
        with self._lock(self.base_dir / ".runs.lock"):
            if mark.exists():
                os.replace(mark, taken)
            elif not taken.exists():
                return
            found, _ = scan(self.base_dir)
            write_csv(self.base_dir, [self._seen(row, owner) for row, owner in found])
            taken.unlink(missing_ok=True)

    def _is_large_and_young(self) -> bool:
        try:
            found = (self.base_dir / CSV).stat()
        except FileNotFoundError:
            return False
        return found.st_size > LARGE_CSV_BYTES and time.time() - found.st_mtime < LARGE_CSV_AGE_S

    def _seen(self, row: dict[str, Any], owner: Mapping[str, Any]) -> dict[str, Any]:
        """The row with the status ``crashed`` where its process is gone."""
        if row["status"] in UNFINISHED and not alive({**owner, "pid": row["pid"]}, row["heartbeat"], self.stale_after):
            return row | {"status": "crashed"}
        return row

    @contextlib.contextmanager
    def _lock(self, path: Path) -> Iterator[None]:
        from filelock import FileLock

        lock = FileLock(path)
        lock.acquire(poll_interval=0.005)
        try:
            yield
        finally:
            lock.release()


# ---- runs that their process leaves open -----------------------------------------------------------------------------
# (folder, run id) -> (manager, process id): a forked child inherits this, but not the runs.
_OPEN: dict[tuple[str, str], tuple[RunManager, int]] = {}


def _close_at_exit(manager: RunManager, run_id: str) -> None:
    if not _OPEN:
        atexit.unregister(_close_open)
        atexit.register(_close_open)
    _OPEN[(os.path.abspath(manager.base_dir), run_id)] = (RunManager(os.path.abspath(manager.base_dir)), os.getpid())


def _close_open() -> None:
    error = getattr(sys, "last_value", None)  # set by Python where an exception ended the program
    for (_, run_id), (manager, pid) in list(_OPEN.items()):
        if pid != os.getpid():
            continue
        # The folder may be gone by now, or be read only.
        with contextlib.suppress(OSError, ValueError):
            if manager.get_run(run_id)["pid"] == pid:
                if error is None:
                    manager.finish_run(run_id)
                else:
                    manager.finish_run(run_id, "failed", _describe(error))


def _describe(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
