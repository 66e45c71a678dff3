"""Exact gradients of single samples, one file each: what projections are compared with.

A folder holds ``fullgrad_meta.json`` and ``fullgrad_iter_000001.pt`` ...: ``grad``, the fp32 gradients of all trainable
parameters one after another in the order of ``named_parameters``, ``iter`` and ``batch_size`` (1). File i is of sample
i - 1, as with exported projections of batch size 1.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparseopt._files import FormatError, atomic_write
from sparseopt.progress import Progress
from sparseopt.projection._store_export import load_tensors, save_tensors
from sparseopt.projection._store_files import Ids, as_ids, difference, without

__all__ = ["FullGradients", "folder_name", "write_full_gradients"]

METADATA_FILE = "fullgrad_meta.json"
FIRST = 1  # number of the file of sample 0
MARGIN = 64 << 20  # bytes of the disk that are left alone

_FILE = re.compile(r"fullgrad_iter_(\d{6,})\.pt")

Sample = Mapping[str, Tensor]


def folder_name(seed: int, architecture: str, train_dtype: str) -> str:
    """The folder's name beside the projections, where the error analysis finds it."""
    return f"fullgrads_seed_{seed}_arch_{architecture.replace('/', '_')}_dtype_{train_dtype}"


def write_full_gradients(
    model: nn.Module,
    samples: Iterable[Sample],
    folder: str | os.PathLike[str],
    *,
    ids: Ids,
    loss_fn: Callable[[nn.Module, Sample], Tensor],
    metadata: Mapping[str, Any] | None = None,
) -> int:
    """Writes the gradient of each sample's loss with respect to every trainable parameter.

    The model is used as it is (call ``eval()`` first where dropout would add noise); its ``.grad`` fields stay as they are.
    Samples whose file exists are skipped, so that a stopped run goes on; every file appears whole.

    Args:
        model: parameters with ``requires_grad`` count; a shared one once, with all its uses.
        samples: one dict of tensors [1, ...] for each id, in the same order. Finished ones are drawn and not used.
        folder: made if missing.
        ids: sample ids; known in advance, so that the space on the disk can be checked.
        loss_fn: (model, sample) -> scalar, the loss that the projections are of.
        metadata: kept in ``fullgrad_meta.json`` (seed, architecture, dtypes); another one there is refused.

    Returns:
        Number of files written.

    Raises:
        ValueError: no trainable parameter, a sample with more than one row, a loss that is no finite scalar, more or fewer
            samples than ids, an id twice, or a folder with gradients of another model.
        OSError: the disk lacks the space; nothing is written then.
    """
    place, numbers = Path(folder), as_ids(ids).tolist()
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"sample {next(i for i in numbers if numbers.count(i) > 1)} is listed twice.")
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError("the model has no trainable parameter: there is no gradient to write.")
    described = {**(metadata or {}), **_describe(parameters)}
    files = {number: place / f"fullgrad_iter_{number + FIRST:06d}.pt" for number in numbers}
    missing = {number for number in numbers if not files[number].exists()}
    _check_folder(place, described)
    _check_space(place, len(missing), described["total_param_dim"] * 4)
    place.mkdir(parents=True, exist_ok=True)
    if not (place / METADATA_FILE).exists():
        atomic_write(place / METADATA_FILE, json.dumps(described, indent=2, allow_nan=False) + "\n")
    vector = torch.empty(described["total_param_dim"], dtype=torch.float32)
    found = iter(samples)
    done = len(numbers) - len(missing)
    with Progress("full gradients", len(numbers), unit="sample", completed=done) as progress:
        for number in numbers:
            sample = next(found, None)
            if sample is None:
                raise ValueError(f"there are {len(numbers)} ids, but no sample for id {number}.")
            if number not in missing:
                continue
            loss = _gradient(model, parameters, sample, number, loss_fn, vector)
            save_tensors({"grad": vector, "iter": number + FIRST, "batch_size": 1}, files[number])
            progress.update(loss=loss)
    if next(found, None) is not None:
        raise ValueError(f"there are more samples than the {len(numbers)} ids; the gradients of those are written.")
    return len(missing)


def _describe(parameters: Mapping[str, nn.Parameter]) -> dict[str, Any]:
    slices, start = {}, 0
    for name, parameter in parameters.items():
        end = start + parameter.numel()
        slices[name] = {"start": start, "end": end, "numel": end - start, "shape": list(parameter.shape)}
        start = end
    return {"total_param_dim": start, "param_slices": slices}


def _check_folder(folder: Path, described: Mapping[str, Any]) -> None:
    if (folder / METADATA_FILE).exists():
        given = json.loads(json.dumps(described, allow_nan=False))
        # How many samples are wanted may grow from run to run.
        found = difference(without(_read_metadata(folder), "max_samples"), without(given, "max_samples"))
        if found:
            raise ValueError(f"'{folder}' holds gradients of something else (there; here: this model): {found}.")
    elif folder.is_dir() and any(_FILE.fullmatch(path.name) for path in folder.iterdir()):
        raise FormatError(f"'{folder}' is damaged: it has gradients, but no {METADATA_FILE}.")


def _check_space(folder: Path, count: int, size: int) -> None:
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    needed = count * (size + 4096)
    if needed and needed + MARGIN > free:
        error = OSError(
            f"the gradients of {count} samples take {needed / 2**30:.3g} GiB ({size / 2**20:.3g} MiB each), but "
            f"'{folder}' has {free / 2**30:.3g} GiB free."
        )
        error.errno = errno.ENOSPC
        raise error


def _gradient(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    sample: Sample,
    number: int,
    loss_fn: Callable[[nn.Module, Sample], Tensor],
    vector: Tensor,
) -> float:
    """Fills ``vector``; returns the loss."""
    for key, tensor in sample.items():
        if isinstance(tensor, Tensor) and (tensor.dim() == 0 or tensor.shape[0] != 1):
            raise ValueError(f"exact gradients need batches of 1: {key!r} of sample {number} is {list(tensor.shape)}.")
    with torch.enable_grad():
        loss = loss_fn(model, sample)
        if loss.numel() != 1:
            raise ValueError(f"the loss of sample {number} must be one number, got the shape {list(loss.shape)}.")
        value = float(loss.detach())
        if not torch.isfinite(loss.detach()):
            raise ValueError(f"the loss of sample {number} is {value}.")
        # A parameter that the loss does not use has the gradient 0.
        gradients = torch.autograd.grad(loss.reshape(()), list(parameters.values()), allow_unused=True)
    start = 0
    for parameter, gradient in zip(parameters.values(), gradients, strict=True):
        target = vector[start : start + parameter.numel()]
        if gradient is None:
            target.zero_()
        else:
            target.copy_(gradient.reshape(-1))
        start += parameter.numel()
    return value


class FullGradients:
    """A folder of exact gradients, to be read.

    Attributes:
        folder: the folder.
        metadata: with ``total_param_dim`` and ``param_slices``: name -> start, end, shape.
        ids: ids of the samples, ascending.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Opens a folder.

        Raises:
            FileNotFoundError: no such folder.
            FormatError: no gradients there, or damaged metadata.
        """
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(f"'{self.folder}' does not exist.")
        self.metadata = _read_metadata(self.folder)
        found = {int(m[1]): path for path in self.folder.iterdir() if (m := _FILE.fullmatch(path.name))}
        first = 0 if 0 in found else FIRST  # other tools count from 0
        self._files = {number - first: found[number] for number in sorted(found)}
        self.ids = list(self._files)

    def grad(self, id: int) -> Tensor:
        """fp32 [total_param_dim] of one sample, read from the file where it is used (memory-mapped).

        Raises:
            ValueError: no such sample.
            FormatError: a damaged file.
        """
        if id not in self._files:
            raise ValueError(f"'{self.folder}' holds no gradient of sample {id}.")
        path = self._files[id]
        grad = load_tensors(path, mmap=True).get("grad")
        size = self.metadata["total_param_dim"]
        if not isinstance(grad, Tensor) or grad.shape != (size,) or grad.dtype != torch.float32:
            raise FormatError(f"'{path}' is damaged: expected 'grad', {size} fp32 numbers.")
        return grad


def _read_metadata(folder: Path) -> dict[str, Any]:
    path = folder / METADATA_FILE
    try:
        contents = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise FormatError(f"'{folder}' holds no exact gradients: it has no {METADATA_FILE}.") from None
    except ValueError as error:
        raise FormatError(f"'{path}' is damaged: {error}.") from error
    slices = contents.get("param_slices") if isinstance(contents, dict) else None
    if not isinstance(slices, dict) or not isinstance(contents.get("total_param_dim"), int):
        raise FormatError(f"'{path}' is damaged: expected total_param_dim and param_slices.")
    _check_slices(path, slices, contents["total_param_dim"])
    return contents


def _check_slices(path: Path, slices: Mapping[str, Any], total: int) -> None:
    spans: Sequence[tuple[Any, Any]] = [
        (x.get("start"), x.get("end")) if isinstance(x, dict) else (None, None) for x in slices.values()
    ]
    for name, (start, end) in zip(slices, spans, strict=True):
        if not isinstance(start, int) or not isinstance(end, int) or not 0 <= start <= end <= total:
            raise FormatError(f"'{path}' is damaged: the slice of {name!r} is {start} to {end} of {total}.")
