"""LogReader: any range of any tensor at any step of a delta log, with memory for that range only."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparseopt.deltas._chain import check_chain, check_delta, delta_path, require_step
from sparseopt.deltas._file import DeltaFile
from sparseopt.deltas.base import Base, open_base

__all__ = ["LogReader", "Source", "list_steps", "path_of"]

Source = torch.nn.Module | Mapping[str, Tensor] | str | os.PathLike[str] | None

STEP_FILE = re.compile(r"delta_step_(\d+)\.safetensors")
PIECE = 1 << 20  # entries of a piece


def path_of(log: Any) -> Path:
    """The folder of a log, given as such or as an object with a ``path``."""
    return Path(getattr(log, "path", log))


def list_steps(log: Any) -> list[int]:
    """Steps of which the log's folder has a file, ascending; nothing is opened.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    folder = path_of(log)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no delta log folder '{folder}'.")
    matches = (STEP_FILE.fullmatch(entry.name) for entry in folder.iterdir())
    return sorted(int(match[1]) for match in matches if match)


class LogReader:
    """Reads a delta log in pieces.

    Attributes:
        path: the log's folder.
        base: where the chain begins (:class:`sparseopt.deltas.base.Base`).
        steps: steps that were logged, ascending.
        names: tensors of the base, tied ones once.
        shapes, dtypes: of them.
        tied: further names of tied tensors -> the name in ``names``.
    """

    def __init__(self, path: Any, source: Source = None) -> None:
        """Opens a log; its files are checked when they are used.

        Args:
            path: folder, or a :class:`sparseopt.DeltaLog`.
            source: where the base is: None = what the log says; a model's name or folder, a module or a state dict.

        Raises:
            FileNotFoundError: no such folder, no log in it, or its base cannot be found.
            sparseopt.FormatError: a damaged ``base.json`` or base.
            ValueError: the source is another model.
        """
        self.path = path_of(path)
        self.steps = list_steps(self.path)
        self.base: Base = open_base(self.path, source)
        self.names = list(self.base.names)
        self.shapes, self.dtypes, self.tied = self.base.shapes, self.base.dtypes, self.base.tied
        self._files: dict[int, DeltaFile] = {}

    @property
    def parameters(self) -> list[str]:
        """The names that are floating-point parameters, as far as the log knows: no buffers."""
        return [n for n in self.names if n not in self.base.buffers and self.dtypes[n].is_floating_point]

    # ---- the chain ---------------------------------------------------------------------------------------------------
    def resolve(self, step: int | None = None) -> int:
        """The step asked for; None = the last one.

        Raises:
            ValueError: the log has no steps, or not this one (those that it has are listed).
        """
        if not self.steps:
            raise ValueError(f"the delta log '{self.path}' has no steps yet.")
        if step is None:
            return self.steps[-1]
        return require_step(self.path, self.steps, step)

    def check(self, step: int | None = None) -> list[int]:
        """Checks everything that the model at a step depends on, each file once.

        Returns:
            The chain: the logged steps up to and with ``step``.

        Raises:
            ValueError: no such step, a gap in the chain, a delta of another base or of other parameters.
            sparseopt.FormatError: a damaged file.
        """
        chain = check_chain(self.path, self.steps, self.resolve(step), self.file)
        for current in chain:
            self.file(current).verify()
        return chain

    def file(self, step: int) -> DeltaFile:
        """The file of one logged step, with its header checked.

        Raises:
            ValueError: no such step, or it is of another base or of other parameters.
            sparseopt.FormatError: a damaged file.
        """
        step = self.resolve(step)
        if step not in self._files:
            file = DeltaFile(delta_path(self.path, step))
            check_delta(file.path, step, file, self.base)
            self._files[step] = file
        return self._files[step]

    # ---- reading -----------------------------------------------------------------------------------------------------
    def pieces(self, name: str, steps: Sequence[int], size: int = PIECE) -> Iterator[tuple[int, Tensor, list[Tensor]]]:
        """A tensor at several steps, piece by piece: memory is ``(len(steps) + 2) * size`` entries at most.

        Args:
            name: of the tensor; a tied name stands for its tensor.
            steps: logged steps, in any order.
            size: entries of a piece.

        Yields:
            (start, flat piece of the base, the same piece at each wanted step), in the logged dtype, on the CPU.

        Raises:
            ValueError, sparseopt.FormatError: as :meth:`check`.
        """
        name = self.base.canonical(name)
        wanted = [self.resolve(step) for step in steps]
        chain = self.check(max(wanted)) if wanted else []
        n = math.prod(self.shapes[name])
        for start in range(0, n, size):
            stop = min(start + size, n)
            base = self.base.piece(name, start, stop)
            current = base.clone()
            at: dict[int, Tensor] = {}
            for step in chain:
                positions, values = self.file(step).entries(name, start, stop)
                if positions.numel():
                    current[positions] = values
                if step in wanted:
                    at[step] = current if step == chain[-1] else current.clone()
            yield start, base, [at[step] for step in wanted]
