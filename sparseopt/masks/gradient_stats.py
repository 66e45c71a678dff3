"""Gradient statistics: accumulated squared gradients of every parameter, in a safetensors file, and scores from them.

``__metadata__``: ``format=sparseopt.gradient_statistics``, ``version=1``, ``kind`` and ``count``. Squares of per-sample
gradients make, divided by their number, the diagonal of the empirical Fisher information; squares of batches' mean
gradients do not: ``kind`` tells them apart. Other files of name -> squares are read too, their kind being unknown.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from sparseopt._files import FormatError
from sparseopt._safetensors import TensorFile, write_tensors
from sparseopt.masks._pieces import Scores
from sparseopt.masks.maskset import normalize_name

__all__ = ["KINDS", "GradientScores", "save_gradient_stats", "write_gradient_stats"]

FORMAT = "sparseopt.gradient_statistics"
VERSION = 1
KINDS = {
    "per_sample": "empirical Fisher diagonal (mean squared per-sample gradient)",
    "batch": "mean squared gradient of batches (no Fisher diagonal)",
    "unknown": "mean squared gradient (the file does not say whether of samples or of batches)",
}


def save_gradient_stats(
    path: str | os.PathLike[str], squares: Mapping[str, Tensor], kind: str, count: int, **metadata: str
) -> None:
    """Writes a file of gradient statistics, whole or not at all.

    Args:
        path: target, ``.safetensors``.
        squares: parameter name -> sum of squared gradients, of the parameter's shape.
        kind: ``"per_sample"`` (each sample's own gradient was squared) or ``"batch"`` (the mean gradient of batches was).
        count: number of samples or batches summed.
        metadata: further text.

    Raises:
        ValueError: another kind, or a count below 1.
    """
    specs = {normalize_name(name): (tensor.shape, tensor.dtype) for name, tensor in squares.items()}
    write_gradient_stats(path, specs, squares.values(), kind, count, **metadata)


def write_gradient_stats(
    path: str | os.PathLike[str], specs: Mapping[str, tuple[Sequence[int], torch.dtype]], squares: Iterable[Tensor],
    kind: str, count: int, **metadata: str,
) -> None:  # fmt: skip
    """:func:`save_gradient_stats` of tensors that are made one after the other: ``specs`` has names, shapes and dtypes."""
    if kind not in ("per_sample", "batch") or count < 1:
        raise ValueError(f"kind must be 'per_sample' or 'batch' and count at least 1, got {kind!r} and {count}.")
    about = {**metadata, "format": FORMAT, "version": str(VERSION), "kind": kind, "count": str(count)}
    # One tensor of another device is copied at a time.
    write_tensors(path, specs, (tensor.detach().cpu() for tensor in squares), about)


class GradientScores(Scores):
    """Accumulated squared gradients as scores (fp32), read piece by piece."""

    def __init__(self, path: str | os.PathLike[str], method: str = "gradient") -> None:
        """Opens a file.

        Args:
            path: as :func:`save_gradient_stats` writes, or any safetensors file of name -> squared gradients.
            method: ``"gradient"`` or ``"fisher"``: the same scores; what the mask's metadata calls them.

        Raises:
            FileNotFoundError: there is no such file.
            sparseopt.FormatError: it is damaged, of another version, another kind of file, or holds no floats.
        """
        self._file = TensorFile(path)
        about = self._file.metadata
        known = about.get("format")
        if known is not None and known.startswith("sparseopt.") and known != FORMAT:
            raise FormatError(f"'{path}' holds no gradient statistics: its format is {known!r}, not {FORMAT!r}.")
        if known == FORMAT and about.get("version") != str(VERSION):
            raise FormatError(f"'{path}' is of version {about.get('version')!r}; this release reads version {VERSION}.")
        self.kind = about.get("kind", "unknown") if known == FORMAT else "unknown"
        if self.kind not in KINDS:
            raise FormatError(f"'{path}' is damaged: its kind is {self.kind!r}.")
        self._names: dict[str, str] = {}
        for raw in self._file.shapes:
            dtype = self._file.dtypes.get(raw)
            if dtype is None or not dtype.is_floating_point:
                raise FormatError(f"'{path}' holds no gradient statistics: {raw!r} is not floating-point.")
            self._names[normalize_name(raw)] = raw
        if not self._names:
            raise FormatError(f"'{path}' holds no gradient statistics: it has no tensors.")
        provenance = {"method": method, "formula": KINDS[self.kind], "gradient_stats": os.fspath(path)}
        if "count" in about:
            provenance["gradient_count"] = about["count"]
        super().__init__({name: self._file.shapes[raw] for name, raw in self._names.items()}, provenance)

    def piece(self, name: str, start: int, stop: int) -> Tensor:
        values = self._file.read(self._names[name], start, stop).float()
        if values.numel() and float(values.min()) < 0:
            raise ValueError(f"the squared gradients of {name!r} in '{self._file.path}' hold negative numbers.")
        return values
