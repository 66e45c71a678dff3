"""ProjectionStore: the projections of samples in a folder, by sample id.

``metadata.json`` says what was projected and how; ``shards/shard_NNNNNN.bin`` hold the rows (raw, little endian, memory-
mapped for reading) and ``shards/shard_NNNNNN.done`` one byte per row: 1 once the row is whole and on the disk.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from sparseopt.projection import _store_files as files
from sparseopt.projection._store_export import export
from sparseopt.projection._store_files import Ids
from sparseopt.projection._store_writer import Writer, split, stage

__all__ = ["ProjectionStore"]


class ProjectionStore:
    """Rows of ``total_proj_dim`` entries, one for each sample, read and written in any order.

    Ids are integers from 0 on and need not be dense: what lies between takes no space. Rows are written in a thread;
    a row counts as finished once its bytes are on the disk, so that a killed process leaves whole rows only. Any number of
    processes may write one store (each its own rows) and read it meanwhile.

    Attributes:
        path: the folder.
        metadata: as given by the projector: at least ``total_proj_dim`` and ``proj_dtype``.
        mode: ``r`` or ``a``.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        metadata: Mapping[str, Any] | None = None,
        *,
        mode: Literal["r", "a"] | None = None,
        shard_rows: int = 4096,
    ) -> None:
        """Opens a store, and with ``mode="a"`` makes it where there is none.

        Args:
            path: the folder.
            metadata: what the rows are. Needed for a new store; compared with an existing one's.
            mode: ``r`` to read; ``a`` to create or continue. Default: ``a`` with metadata, ``r`` without.
            shard_rows: rows of a file of a new store; an existing one keeps its own.

        Raises:
            FileNotFoundError: nothing there to read or, without metadata, to continue.
            FormatError: the folder is not a projection store, or damaged.
            ValueError: other metadata than the store's (the first difference is named), or metadata without the keys.
        """
        self.mode = mode if mode is not None else "r" if metadata is None else "a"
        if self.mode not in ("r", "a"):
            raise ValueError(f"mode must be 'r' or 'a', got {mode!r}.")
        if not isinstance(shard_rows, int) or isinstance(shard_rows, bool) or shard_rows < 1:
            raise ValueError(f"shard_rows must be a positive integer, got {shard_rows!r}.")
        self.path = Path(path)
        given = None if metadata is None else files.as_json(metadata)
        if self.mode == "a" and not (self.path / files.METADATA_FILE).exists():
            if given is None:
                raise FileNotFoundError(
                    f"'{self.path}' holds no projection store to continue; a new one needs metadata."
                )
            files.create(self.path, given, shard_rows)
        self.metadata, self._layout = files.open_layout(self.path)
        found = None if given is None else files.difference(self.metadata, given)
        if found:
            raise ValueError(
                f"'{self.path}' holds other projections (there: the store, here: the metadata given): {found}."
            )
        self._writer: Writer | None = None
        self._closed = False

    @property
    def total_dim(self) -> int:
        """Entries of a row."""
        return self._layout.columns

    @property
    def dtype(self) -> torch.dtype:
        """Of the rows."""
        return self._layout.dtype

    @property
    def shard_rows(self) -> int:
        """Rows of a shard."""
        return self._layout.shard_rows

    def __repr__(self) -> str:
        return f"ProjectionStore('{self.path}', {len(self)} rows of {self.total_dim} {self.metadata['proj_dtype']})"

    # ---- writing -----------------------------------------------------------------------------------------------------
    def write(self, ids: Ids, rows: Tensor) -> None:
        """Queues rows; they are finished after :meth:`flush` or :meth:`close` at the latest.

        The rows are copied: the caller may change them at once. Waits while 256 MiB are queued. A row that was finished
        before is replaced.

        Args:
            ids: n sample ids, each once.
            rows: [n, total_dim] of the store's dtype, on any device.

        Raises:
            ValueError: another shape, another dtype, an id twice or negative, a store opened to read or closed.
            OSError: an earlier write failed; the store takes nothing more.
        """
        if self.mode != "a":
            raise ValueError(f"'{self.path}' was opened to read; open it with mode='a' to write.")
        if self._closed:
            raise ValueError(f"'{self.path}' is closed.")
        numbers = files.as_ids(ids)
        if not isinstance(rows, Tensor):
            raise TypeError(f"rows must be a tensor, got {type(rows).__name__}.")
        if rows.shape != (len(numbers), self.total_dim):
            raise ValueError(f"rows must be [{len(numbers)}, {self.total_dim}] for these ids, got {list(rows.shape)}.")
        if rows.dtype != self.dtype:
            raise ValueError(f"rows must be {self.dtype}, as the store's are, got {rows.dtype}.")
        if len(np.unique(numbers)) < len(numbers):
            unique, counts = np.unique(numbers, return_counts=True)
            raise ValueError(f"sample {unique[counts > 1][0]} is given twice.")
        if self._writer is None:
            self._writer = Writer(self._layout)
            # Rows of a store that nobody closed are still written when it is collected or the program ends.
            self._finalizer = weakref.finalize(self, self._writer.close)
        if len(numbers):
            self._writer.put(stage(numbers, rows))

    def flush(self) -> None:
        """Waits until every row written so far is finished.

        Raises:
            OSError: a row could not be written (the disk is full, for one); nothing incomplete is marked finished.
        """
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Flushes and takes no more rows; reading goes on to work. Raises as :meth:`flush`, each error once."""
        self._closed = True
        if self._writer is not None:
            writer, self._writer = self._writer, None
            self._finalizer.detach()
            writer.close()

    def __enter__(self) -> ProjectionStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # ---- reading -----------------------------------------------------------------------------------------------------
    @property
    def completed(self) -> Tensor:
        """Ids of the finished rows (of all processes, now), ascending, int64."""
        found = [self._layout.marks(shard) + shard * self.shard_rows for shard in self._layout.shards()]
        return torch.from_numpy(np.concatenate(found) if found else np.empty(0, np.int64))

    def __len__(self) -> int:
        return sum(len(self._layout.marks(shard)) for shard in self._layout.shards())

    def done(self, ids: Ids) -> bool:
        """Whether the rows of all these ids (or of one id) are finished."""
        return self._missing(files.as_ids(ids)) is None

    def _missing(self, ids: np.ndarray) -> int | None:
        for shard, places in split(ids, self.shard_rows):
            rows = ids[places]
            lacking = ~np.isin(rows - shard * self.shard_rows, self._layout.marks(shard))
            if lacking.any():
                return int(rows[lacking][0])
        return None

    def rows(self, ids: Ids) -> Tensor:
        """Rows by id.

        Args:
            ids: n ids, in any order, also repeated; one id is a vector of one.

        Returns:
            [n, total_dim] of the store's dtype, a copy on the CPU.

        Raises:
            ValueError: an id whose row is not finished.
        """
        numbers = files.as_ids(ids)
        missing = self._missing(numbers)
        if missing is not None:
            raise ValueError(f"'{self.path}' holds no finished row of sample {missing}.")
        result = torch.empty(len(numbers), self.total_dim, dtype=self.dtype)
        bits = self._layout.integers(result).numpy()
        for shard, places in split(numbers, self.shard_rows):
            self._layout.read(shard, numbers[places] - shard * self.shard_rows, bits, places)
        return result

    def blocks(self, rows: int = 4096) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields (ids int64 [n], rows [n, total_dim]) with ascending ids and n = ``rows`` but for the last.

        Only one block is in memory. Rows that another process finishes meanwhile may or may not be among them.
        """
        if rows < 1:
            raise ValueError(f"rows must be positive, got {rows}.")
        waiting = np.empty(0, np.int64)
        for shard in self._layout.shards():
            waiting = np.concatenate([waiting, self._layout.marks(shard) + shard * self.shard_rows])
            while len(waiting) >= rows:
                yield torch.from_numpy(waiting[:rows].copy()), self.rows(waiting[:rows])
                waiting = waiting[rows:]
        if len(waiting):
            yield torch.from_numpy(waiting), self.rows(waiting)

    def export_pt(
        self,
        dir: str | os.PathLike[str],
        batch_size: int | None = None,
        *,
        incomplete: Literal["error", "skip"] = "error",
    ) -> int:
        """Writes ``proj_iter_000001.pt`` ... and ``metadata.json`` for plain ``torch.load``.

        File i holds the samples (i-1) * batch_size to i * batch_size - 1: ``proj`` [n, total_dim], ``iter`` = i,
        ``batch_size`` = n, ``batch_idx`` the ids. The last file may be shorter. Each file appears whole; a folder with
        files of another export is refused.

        Args:
            dir: folder; it may be the store's own.
            batch_size: samples of a file, default ``shard_rows``.
            incomplete: a batch that lacks samples although later ones exist: ``error`` (nothing is written), or ``skip``
                (those files are left out, which one sentence on stderr says).

        Returns:
            Number of files written.

        Raises:
            ValueError: such a batch, no rows at all, or files of another export.
        """
        return export(self, Path(dir), self.shard_rows if batch_size is None else batch_size, incomplete)
