"""Writes rows of a projection store in a thread.

Order on the disk: rows, fsync, then their marks. A process that is killed at any moment, or a machine that loses power,
leaves whole rows marked and nothing else. What waits is written together, so that a slow fsync is shared.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sparseopt.projection._store_files import Layout

__all__ = ["Batch", "Writer", "stage"]

WAITING = 256 << 20  # bytes of rows that may wait for the disk; one larger batch may, too
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Batch:
    """Rows on their way: ``rows`` is a copy on the CPU, complete once ``ready`` has happened."""

    ids: np.ndarray
    rows: Tensor
    ready: torch.cuda.Event | None


def stage(ids: np.ndarray, rows: Tensor) -> Batch:
    """A copy of ``rows`` that the caller can no longer change; from a GPU it is made beside further work."""
    if not rows.is_cuda:
        return Batch(ids, rows.detach().to("cpu", copy=True, memory_format=torch.contiguous_format), None)
    copy = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
    copy.copy_(rows.detach(), non_blocking=True)
    ready = torch.cuda.Event()
    ready.record(torch.cuda.current_stream(rows.device))
    return Batch(ids, copy, ready)


class Writer:
    """The thread and its queue. An error stops it for good: every later :meth:`put` and :meth:`flush` raises it."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._changed = threading.Condition()
        self._waiting: list[Batch] = []
        self._bytes = 0  # waiting and being written
        self._running = False
        self._result: Future[None] | None = None
        self._reported = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="projection-store")
        self._process = os.getpid()

    def put(self, batch: Batch) -> None:
        """Queues a batch; waits while too much is queued."""
        self._own()
        size = batch.rows.numel() * batch.rows.element_size()
        with self._changed:
            self._changed.wait_for(lambda: not self._running or not self._bytes or self._bytes + size <= WAITING)
            if not self._running:
                self._check()
            self._waiting.append(batch)
            self._bytes += size
            if not self._running:
                self._running = True
                self._result = self._thread.submit(self._work)

    def flush(self) -> None:
        """Returns once everything queued is on the disk and marked."""
        self._own()
        with self._changed:
            self._changed.wait_for(lambda: not self._running)
            self._check()

    def close(self) -> None:
        """Flushes and ends the thread; raises the thread's error unless an earlier call did."""
        self._own()
        with self._changed:
            self._changed.wait_for(lambda: not self._running)
        self._thread.shutdown()
        if not self._reported:
            self._check()

    def _own(self) -> None:
        if os.getpid() != self._process:
            raise RuntimeError(
                "a projection store that was opened before a fork cannot be written after it: its thread stayed "
                "behind; open the store in the process that writes."
            )

    def _check(self) -> None:
        if self._result is not None and self._result.exception() is not None:
            self._reported = True
            self._result.result()

    # ---- in the thread -----------------------------------------------------------------------------------------------
    def _work(self) -> None:
        # Whoever sees that the thread does not run may wait for its result while holding the condition: from there on
        # the thread must not ask for it.
        try:
            while batches := self._next():
                _store(self._layout, batches)
        except BaseException:
            with self._changed:
                self._running = False
                self._changed.notify_all()
            raise

    def _next(self) -> list[Batch]:
        """All that waits; what was taken before is done."""
        with self._changed:
            batches, self._waiting = self._waiting, []
            self._bytes = sum(batch.rows.numel() * batch.rows.element_size() for batch in batches)
            self._running = bool(batches)
            self._changed.notify_all()
            return batches


def _store(layout: Layout, batches: list[Batch]) -> None:
    ids = np.concatenate([batch.ids for batch in batches])
    try:
        shards: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
        for batch in batches:
            if batch.ready is not None:
                batch.ready.synchronize()
            bits = layout.integers(batch.rows).numpy().astype(layout.words, copy=False)
            for shard, places in split(batch.ids, layout.shard_rows):
                shards.setdefault(shard, []).append((batch.ids[places] % layout.shard_rows, bits[places]))
        for shard, parts in shards.items():
            _store_shard(layout, shard, parts)
    except OSError as error:
        which = f"sample {ids.min()}" if len(ids) == 1 else f"{len(ids)} samples ({ids.min()} to {ids.max()})"
        why = "there is no space left" if error.errno in FULL else error.strerror or str(error)
        told = OSError(
            f"'{layout.folder}' could not be written: {why}; {which} may not be stored, nor what was queued after; "
            "finished rows stay."
        )
        told.errno = error.errno
        raise told from error


def split(ids: np.ndarray, shard_rows: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (shard, places in ``ids``) with the places sorted by id."""
    if not len(ids):
        return
    order = np.argsort(ids, kind="stable")
    shards, starts = np.unique(ids[order] // shard_rows, return_index=True)
    for shard, places in zip(shards, np.split(order, starts[1:]), strict=True):
        yield int(shard), places


def _store_shard(layout: Layout, shard: int, parts: list[tuple[np.ndarray, np.ndarray]]) -> None:
    data, done = layout.file(shard, "bin"), layout.file(shard, "done")
    fresh = not (data.exists() and done.exists())
    rows = np.unique(np.concatenate([part[0] for part in parts]))
    with _opened(data) as data_file, _opened(done) as done_file:
        if fresh:
            _sync_folder(layout.folder)
        again = np.intersect1d(layout.marks(shard), rows)
        if len(again):
            # Finished rows written once more: until they are whole they are not finished.
            _mark(done_file, again, b"\0")
            os.fsync(done_file)
        for numbers, bits in parts:
            for start, end in runs(numbers):
                _write(data_file, np.ascontiguousarray(bits[start:end]).data.cast("B"),
                       int(numbers[start]) * layout.row_bytes)  # fmt: skip
        os.fsync(data_file)
        _mark(done_file, rows, b"\1")
        os.fsync(done_file)


def runs(numbers: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yields (start, end) of each stretch of consecutive numbers in a sorted vector."""
    cuts = np.flatnonzero(np.diff(numbers) != 1) + 1
    yield from zip([0, *cuts.tolist()], [*cuts.tolist(), len(numbers)], strict=True)


def _mark(number: int, rows: np.ndarray, mark: bytes) -> None:
    for start, end in runs(rows):
        _write(number, memoryview(mark * (end - start)), int(rows[start]))


def _write(number: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(number, data, offset)
        data, offset = data[written:], offset + written


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    """A file for positioned writing, made when missing. pwrite past the end grows it: no process cuts another's rows."""
    number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        yield number
    finally:
        os.close(number)


def _sync_folder(folder: Path) -> None:
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
