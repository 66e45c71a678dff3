"""Progress of long work, always on stderr: a bar on a terminal, a plain line every few seconds elsewhere.

Of several processes that a launcher started, the first one shows its own.

with Progress("train", total=100, unit="step") as progress:
    for batch in batches:
        progress.update(loss=train(batch))
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

from sparseopt._processes import is_first

if TYPE_CHECKING:
    import torch
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

__all__ = ["Progress", "announce_device", "track"]

T = TypeVar("T")

# Seconds between two plain lines: a log stays readable, and a silent job is noticed soon.
PLAIN_INTERVAL = 5.0


def format_seconds(seconds: float) -> str:
    """Seconds as ``m:ss`` or ``h:mm:ss``."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def format_values(values: dict[str, Any]) -> str:
    """``loss 0.6931, accuracy 0.85``: floats with four significant digits."""
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())


def plural(unit: str) -> str:
    return unit + ("es" if unit.endswith(("ch", "sh", "s", "x")) else "s")


def is_terminal(stream: TextIO) -> bool:
    return stream.isatty()


class Progress:
    """Progress of one job; a context manager.

    Args:
        description: what is being done, one or two words.
        total: number of units, None where it is unknown (no percentage and no remaining time then).
        unit: what is counted, singular.
        completed: units done before this process started (a resumed run): not part of the rate.
        stream: where to write, default ``sys.stderr`` at the time of entry.
        interval: least seconds between two plain lines.
    """

    # The one live display of this process: a job started within another adds its bar to it.
    _live: RichProgress | None = None

    def __init__(
        self,
        description: str,
        total: int | None = None,
        *,
        unit: str = "step",
        completed: int = 0,
        stream: TextIO | None = None,
        interval: float = PLAIN_INTERVAL,
    ) -> None:
        self.description = description
        self.total = total
        self.unit = unit
        self.completed = completed
        self.values: dict[str, Any] = {}
        self._initial = completed
        self._stream = stream
        self._interval = interval
        self._start = self._last_line = time.monotonic()
        self._owner = False
        self._task: TaskID | None = None

    def __enter__(self) -> Progress:
        # Of several processes the first one shows what it does.
        self._stream = (self._stream or sys.stderr) if is_first() else None
        self._start = time.monotonic()
        # Some libraries announce their own start right away; the first plain line comes with the first unit done.
        self._last_line = self._start - self._interval
        if self._stream is not None and is_terminal(self._stream):
            self._open_bar(self._stream)
        return self

    def update(self, advance: int = 1, *, completed: int | None = None, **values: Any) -> None:
        """Counts ``advance`` units (or sets the count) and shows ``values``, such as ``loss=0.3``, beside the count."""
        self.completed = self.completed + advance if completed is None else completed
        self.values.update(values)
        if self._task is not None and Progress._live is not None:
            Progress._live.update(self._task, completed=self.completed, values=format_values(self.values))
        elif self._stream is not None and time.monotonic() - self._last_line >= self._interval:
            self._print_line(self._status())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        elapsed = time.monotonic() - self._start
        if self._task is not None and Progress._live is not None:
            Progress._live.stop_task(self._task)
            if self._owner:
                live, Progress._live = Progress._live, None
                live.stop()
            else:
                Progress._live.remove_task(self._task)
            self._task = None
            return
        if self._stream is None:
            return
        word = "done" if kind is None else "stopped"
        self._print_line(f"{self._count()} {word} in {format_seconds(elapsed)}{self._rate_text()}{self._values_text()}")

    # ---- text --------------------------------------------------------------------------------------------------------
    @property
    def rate(self) -> float | None:
        """Units per second of this process, None before the first."""
        done, elapsed = self.completed - self._initial, time.monotonic() - self._start
        return done / elapsed if done > 0 and elapsed > 0 else None

    def _count(self) -> str:
        if self.total is None:
            return f"{self.completed} {self.unit if self.completed == 1 else plural(self.unit)}"
        percent = 100 * self.completed / self.total if self.total else 100.0
        return f"{self.completed}/{self.total} {self.unit if self.total == 1 else plural(self.unit)} ({percent:.0f}%)"

    def _rate_text(self) -> str:
        rate = self.rate
        if rate is None:
            return ""
        return f", {rate:.3g} {plural(self.unit)}/s" if rate >= 1 else f", {1 / rate:.3g} s/{self.unit}"

    def _values_text(self) -> str:
        return f", {format_values(self.values)}" if self.values else ""

    def _status(self) -> str:
        rate = self.rate
        remaining = ""
        if rate and self.total is not None:
            remaining = f", {format_seconds(max(0, self.total - self.completed) / rate)} left"
        return f"{self._count()}{self._rate_text()}{remaining}{self._values_text()}"

    def _print_line(self, text: str) -> None:
        print(f"{self.description}: {text}", file=self._stream, flush=True)
        self._last_line = time.monotonic()

    # ---- bar ---------------------------------------------------------------------------------------------------------
    def _open_bar(self, stream: TextIO) -> None:
        if Progress._live is None:
            Progress._live = _rich_progress(stream)
            Progress._live.start()
            self._owner = True
        self._task = Progress._live.add_task(
            self.description, total=self.total, completed=self.completed, values="", unit=self.unit
        )


def _rich_progress(stream: TextIO) -> RichProgress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    return Bars(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("<"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[values]}", markup=False),
        console=Console(file=stream),
        # Lines printed to a terminal appear above the bar; output that goes to a file or a pipe is left alone.
        redirect_stdout=sys.stdout.isatty(),
        redirect_stderr=True,
        refresh_per_second=4,
    )


def track(items: Iterable[T], description: str, total: int | None = None, *, unit: str = "step") -> Iterator[T]:
    """Yields ``items`` under a :class:`Progress`; ``total`` defaults to ``len(items)`` where there is one."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with Progress(description, total, unit=unit) as progress:
        for item in items:
            yield item
            progress.update()


def announce_device(device: str | torch.device = "auto") -> torch.device:
    """Resolves ``device`` and says on stderr what will be used and with which kernels.

    Args:
        device: ``auto`` (CUDA where there is one, else the CPU) or what ``torch.device`` takes.

    Raises:
        ValueError: no such device here, or not a device name.
    """
    import torch

    from sparseopt import _backend

    asked = str(device)
    if asked == "auto":
        resolved = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    else:
        try:
            resolved = torch.device(device)
        except RuntimeError as error:
            raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {asked!r}.") from error
    name = str(resolved)
    if resolved.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (resolved.index or 0) >= count:
            raise ValueError(
                f"device {asked!r} was asked for, but torch {torch.__version__} sees {count} CUDA devices."
            )
        name = f"{resolved} ({torch.cuda.get_device_name(resolved)})"
    elif resolved.type == "cpu":
        name = f"cpu ({torch.get_num_threads()} threads)"
    why = "" if asked != "auto" else ", chosen automatically" if resolved.type == "cuda" else ", no CUDA device found"
    kernels = _backend.selection(resolved).backend  # an error on every process, if it is one
    if is_first():
        print(f"Device: {name}{why}; kernels: {kernels}", file=sys.stderr, flush=True)
    return resolved
