"""Scores that exist only piece by piece, and tensors seen the same way.

Finding masks makes several passes over the scores (:mod:`sparseopt.masks._select`). :class:`Scores` computes a piece
whenever it is asked for one; :meth:`Scores.spool` computes everything once, into a scratch file that has no name and
goes away with the process.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol

import torch
from torch import Tensor

from sparseopt.progress import Progress

__all__ = ["Part", "Scores", "SelectedScores", "SpooledScores", "TensorPart"]

SPOOL_PIECE = 1 << 18  # entries computed at a time while a scratch file is written
Reader = Callable[[int, int], Tensor]


class Part(Protocol):
    """The scores of one parameter."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def numel(self) -> int: ...

    def open(self) -> Reader:
        """Starts a pass: a function (start, stop) -> flat entries."""
        ...


class TensorPart:
    """A tensor as a :class:`Part`."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor.detach()
        self.shape, self.dtype = tuple(tensor.shape), tensor.dtype

    def numel(self) -> int:
        return self._tensor.numel()

    def open(self) -> Reader:
        flat = self._tensor.reshape(-1)  # a copy, for the time of a pass, only where the tensor is not contiguous
        return lambda start, stop: flat[start:stop]


class _ScoresPart:
    def __init__(self, scores: Scores, name: str) -> None:
        self._scores, self._name = scores, name
        self.shape, self.dtype = scores.shapes[name], torch.float32

    def numel(self) -> int:
        return math.prod(self.shape)

    def open(self) -> Reader:
        return lambda start, stop: self._scores.piece(self._name, start, stop)


class Scores(Mapping[str, Tensor]):
    """Scores of parameters by name, fp32, delivered in pieces; a mapping whose values are computed when asked for.

    A subclass gives ``shapes`` and :meth:`piece`.

    Attributes:
        shapes: by parameter name.
        provenance: what a mask found from them says about them in its metadata.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]], provenance: Mapping[str, object] | None = None) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {name: tuple(shape) for name, shape in shapes.items()}
        self.provenance: dict[str, object] = dict(provenance or {})

    def piece(self, name: str, start: int, stop: int) -> Tensor:
        """fp32[stop - start] on the CPU: the scores of flat (row-major) entries ``start <= i < stop``."""
        raise NotImplementedError

    def part(self, name: str) -> Part:
        return _ScoresPart(self, name)

    def __getitem__(self, name: str) -> Tensor:
        shape = self.shapes[name]
        return self.piece(name, 0, math.prod(shape)).view(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def spool(self, folder: str | os.PathLike[str], progress: bool = True) -> SpooledScores:
        """Computes all scores once, into a scratch file in ``folder``: 4 bytes an entry.

        Args:
            folder: is made if need be.
            progress: show it on stderr.

        Raises:
            ValueError: the folder has less space left than that.
        """
        return SpooledScores(self, folder, progress)


class SpooledScores(Scores):
    """A copy of other scores in an unnamed scratch file (stretches of zeros take no space); closing it frees the disk."""

    def __init__(self, scores: Scores, folder: str | os.PathLike[str], progress: bool = True) -> None:
        super().__init__(scores.shapes, scores.provenance)
        self._starts: dict[str, int] = {}
        end = 0
        for name, shape in self.shapes.items():
            self._starts[name], end = end, end + math.prod(shape)
        Path(folder).mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if 4 * end > free:
            raise ValueError(
                f"the scratch file of the scores needs {4 * end / 1e9:.1f} GB, '{folder}' has {free / 1e9:.1f} GB left; "
                "name another folder, or do without one."
            )
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - lives as long as the object
        try:
            self._fill(scores, end, progress)
        except BaseException:
            self.close()
            raise

    def _fill(self, scores: Scores, entries: int, progress: bool) -> None:
        self._file.truncate(4 * entries)
        count = sum(-(-math.prod(shape) // SPOOL_PIECE) for shape in self.shapes.values())
        with Progress("scores", count, unit="piece") if progress else contextlib.nullcontext() as bar:
            for name, shape in self.shapes.items():
                n = math.prod(shape)
                for start in range(0, n, SPOOL_PIECE):
                    self._write(scores.piece(name, start, min(start + SPOOL_PIECE, n)), self._starts[name] + start)
                    if bar is not None:
                        bar.update()

    def _write(self, piece: Tensor, start: int) -> None:
        if not bool(piece.any()):
            return  # the file reads as zeros there
        view, offset = piece.view(torch.uint8).numpy().data, 4 * start
        while len(view):
            done = os.pwrite(self._file.fileno(), view, offset)
            view, offset = view[done:], offset + done

    def piece(self, name: str, start: int, stop: int) -> Tensor:
        out = torch.empty(max(0, stop - start), dtype=torch.float32)
        view = out.view(torch.uint8).numpy().data if out.numel() else memoryview(b"")
        offset = 4 * (self._starts[name] + start)
        while len(view):
            done = os.preadv(self._file.fileno(), [view], offset)
            if not done:
                raise OSError(f"the scratch file of the scores ends within those of {name!r}.")
            view, offset = view[done:], offset + done
        return out

    def close(self) -> None:
        """Frees the disk; nothing can be read afterwards."""
        self._file.close()

    def __enter__(self) -> SpooledScores:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class SelectedScores(Scores):
    """Some of the parameters of other scores."""

    def __init__(self, scores: Scores, names: Iterable[str]) -> None:
        super().__init__({name: scores.shapes[name] for name in names}, scores.provenance)
        self._scores = scores

    def piece(self, name: str, start: int, stop: int) -> Tensor:
        return self._scores.piece(name, start, stop)
