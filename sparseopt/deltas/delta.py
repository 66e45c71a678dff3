"""Delta: the entries of a model that changed, with their new values, and its file.

Values replace what was there; they are never differences, because bf16 sums do not round-trip. Applying a delta is
therefore bit-exact, and applying it twice changes nothing more.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparseopt._files import FormatError
from sparseopt._safetensors import write_tensors
from sparseopt.deltas._apply import write_entries
from sparseopt.masks.maskset import normalize_name

__all__ = ["Delta", "model_fingerprint"]

FORMAT = "sparseopt.delta"
VERSION = 1
INT32_NUMEL = 2**31  # tensors of more entries than this have int64 indices
REQUIRED = ("format", "version", "step", "parent_step", "base_fingerprint", "shapes", "dtypes", "checksum")


class Delta:
    """Replacement values of some entries of some parameters, at one step of a chain that begins at a base model.

    Attributes:
        step: training step that the values belong to.
        parent_step: step of the model that this delta is applied to; None = the base itself.
        base_fingerprint: :func:`model_fingerprint` of the base; None = unknown.
    """

    def __init__(
        self,
        entries: Mapping[str, tuple[Tensor, Tensor]],
        shapes: Mapping[str, Sequence[int]],
        *,
        step: int = 0,
        parent_step: int | None = None,
        base_fingerprint: str | None = None,
    ) -> None:
        """See :meth:`from_dict`."""
        if not isinstance(step, int) or not (parent_step is None or isinstance(parent_step, int)):
            raise TypeError(f"step and parent_step must be whole numbers, got {step!r} and {parent_step!r}.")
        self.step = step
        self.parent_step = parent_step
        self.base_fingerprint = base_fingerprint
        self._entries: dict[str, tuple[Tensor, Tensor]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for raw, (indices, values) in entries.items():
            name = normalize_name(raw)
            if raw not in shapes:
                raise ValueError(f"entries of {raw!r} came without its shape.")
            if name in self._entries:
                raise ValueError(f"two entries are named {name!r} (the second came as {raw!r}).")
            shape = tuple(int(size) for size in shapes[raw])
            self._entries[name] = _check_entries(name, indices, values, math.prod(shape))
            self._shapes[name] = shape

    @classmethod
    def from_dict(
        cls,
        entries: Mapping[str, tuple[Tensor, Tensor]],
        shapes: Mapping[str, Sequence[int]],
        *,
        step: int = 0,
        parent_step: int | None = None,
        base_fingerprint: str | None = None,
    ) -> Delta:
        """From ``{name: (indices, values)}``.

        Args:
            entries: name -> (int tensor [k], sorted distinct flat (row-major) indices; tensor [k], the new values in
                the parameter's dtype). Moved to the CPU; not copied if there already.
            shapes: name -> the parameter's shape (further names are ignored).
            step, parent_step, base_fingerprint: see the class.

        Raises:
            ValueError: indices unsorted, repeated or out of range, lengths that differ, a missing shape.
            TypeError: indices that are not int32 or int64.
        """
        return cls(entries, shapes, step=step, parent_step=parent_step, base_fingerprint=base_fingerprint)

    # ---- reading it --------------------------------------------------------------------------------------------------
    @property
    def names(self) -> list[str]:
        return list(self._entries)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(self._shapes)

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        return {name: values.dtype for name, (_, values) in self._entries.items()}

    @property
    def changed_parameters(self) -> int:
        """Number of entries over all parameters."""
        return sum(indices.numel() for indices, _ in self._entries.values())

    def indices(self, name: str) -> Tensor:
        """Sorted flat indices: int32[k], int64[k] for tensors past 2^31 entries. Do not write to them."""
        return self._entry(name)[0]

    def values(self, name: str) -> Tensor:
        """New values, [k] in the parameter's dtype. Do not write to them."""
        return self._entry(name)[1]

    def _entry(self, name: str) -> tuple[Tensor, Tensor]:
        try:
            return self._entries[normalize_name(name)]
        except KeyError:
            raise KeyError(f"this delta has no parameter {name!r}; it has {len(self._entries)}.") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and normalize_name(name) in self._entries

    @property
    def fingerprint(self) -> str:
        """SHA-256 over step, parent, base, names, shapes, dtypes, indices and values, in any order of names."""
        head = json.dumps([FORMAT, VERSION, self.step, self.parent_step, self.base_fingerprint])
        digest = hashlib.sha256(head.encode())
        for name in sorted(self._entries):
            indices, values = self._entries[name]
            update_head(digest, name, self._shapes[name], values.dtype, indices.dtype)
            update_bytes(digest, values, indices)
        return digest.hexdigest()

    def __eq__(self, other: object) -> bool:
        return self.fingerprint == other.fingerprint if isinstance(other, Delta) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __repr__(self) -> str:
        parent = "the base" if self.parent_step is None else f"step {self.parent_step}"
        total = sum(math.prod(shape) for shape in self._shapes.values())
        return (
            f"Delta: step {self.step} after {parent}, {len(self)} parameters, "
            f"{self.changed_parameters:,} of {total:,} entries"
        )

    # ---- using it ----------------------------------------------------------------------------------------------------
    def apply_(self, target: torch.nn.Module | Mapping[str, Tensor]) -> None:
        """Writes the values into a model or a state dict, in place; nothing is written if anything does not fit.

        One kernel for all contiguous tensors of a device and dtype; version counters are bumped.

        Raises:
            ValueError: a parameter is missing, or its shape or dtype differs (it is named).
        """
        tensors = _tensors_of(target)
        for name, (_, values) in self._entries.items():
            tensor = tensors.get(name)
            if tensor is None:
                raise ValueError(f"the target has no parameter {name!r}, which the delta of step {self.step} changes.")
            if tuple(tensor.shape) != self._shapes[name] or tensor.dtype != values.dtype:
                raise ValueError(
                    f"parameter {name!r} must be {_text(values.dtype)}{list(self._shapes[name])}, "
                    f"got {_text(tensor.dtype)}{list(tensor.shape)}."
                )
        write_entries(tensors, self._entries)

    def to_weight_patches(self) -> list[tuple[str, Tensor, Tensor, tuple[int, ...]]]:
        """[(name, flat indices, values, full shape)], the sparse patches that inference engines take.

        Indices are int32, int64 for tensors past 2^31 entries.
        """
        return [(name, *entry, self._shapes[name]) for name, entry in self._entries.items()]

    # ---- files -------------------------------------------------------------------------------------------------------
    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a ``.safetensors`` file with ``NAME::indices`` and ``NAME::values``, whole or not at all."""
        target = Path(path)
        if target.suffix != ".safetensors":
            raise ValueError(f"delta files end in .safetensors, got '{target}'.")
        tensors = {}
        for name, (indices, values) in self._entries.items():
            tensors[f"{name}::indices"], tensors[f"{name}::values"] = indices, values
        # Wide dtypes first, so that each tensor is aligned for its dtype.
        keys = sorted(tensors, key=lambda key: -tensors[key].element_size())
        metadata = {
            "format": FORMAT,
            "version": str(VERSION),
            "step": str(self.step),
            "parent_step": json.dumps(self.parent_step),
            "base_fingerprint": self.base_fingerprint or "",
            "shapes": json.dumps({name: list(shape) for name, shape in self._shapes.items()}),
            "dtypes": json.dumps({name: _text(dtype) for name, dtype in self.dtypes.items()}),
            "checksum": f"sha256:{self.fingerprint}",
        }
        specs = {key: (tuple(tensors[key].shape), tensors[key].dtype) for key in keys}
        write_tensors(target, specs, (tensors[key] for key in keys), metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Delta:
        """Reads a delta file.

        Raises:
            FileNotFoundError: there is no such file.
            sparseopt.FormatError: it is damaged, truncated, something else, or of another version.
        """
        source = Path(path)
        if not source.is_file():
            raise FileNotFoundError(f"there is no delta file '{source}'.")
        try:
            with safe_open(source, framework="pt") as file:
                metadata = dict(file.metadata() or {})
                header = _read_header(source, metadata, set(file.keys()))
                entries = {
                    name: (file.get_tensor(f"{name}::indices").clone(), file.get_tensor(f"{name}::values").clone())
                    for name in header["shapes"]
                }
        except (SafetensorError, UnicodeDecodeError, OverflowError) as error:
            raise FormatError(f"'{source}' is not a safetensors file, or damaged or truncated ({error}).") from error
        dtypes = header.pop("dtypes")
        try:
            delta = cls(entries, header.pop("shapes"), **header)
        except (TypeError, ValueError) as error:
            raise FormatError(f"'{source}' is damaged: {error}") from error
        if {name: _text(dtype) for name, dtype in delta.dtypes.items()} != dtypes:
            raise FormatError(f"'{source}' is damaged: values are not of the dtypes that it says.")
        if metadata["checksum"] != f"sha256:{delta.fingerprint}":
            raise FormatError(f"'{source}' is damaged: its content does not match its checksum.")
        return delta


def model_fingerprint(model: torch.nn.Module | Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes, dtypes and bytes of a model's state dict, whatever the order and the device."""
    digest = model_digest()
    for name, tensor in sorted(_tensors_of(model).items()):
        update_head(digest, name, tensor.shape, tensor.dtype)
        update_bytes(digest, tensor)
    return digest.hexdigest()


def model_digest() -> Any:
    """The empty digest that model fingerprints begin with."""
    return hashlib.sha256(b"sparseopt.model/1")


def _text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _tensors_of(target: torch.nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Normalised name -> tensor. A module's state dict is used, because it lists tied parameters under every name."""
    state = target.state_dict(keep_vars=True) if isinstance(target, torch.nn.Module) else target
    return {normalize_name(name): tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}


def update_head(digest: Any, name: str, shape: Sequence[int], *dtypes: torch.dtype) -> None:
    """What precedes the bytes of a tensor, or of several, in a fingerprint."""
    head = json.dumps([name, list(shape), *map(_text, dtypes)]).encode()
    digest.update(len(head).to_bytes(8, "little") + head)


def update_bytes(digest: Any, *tensors: Tensor) -> None:
    """The bytes of tensors in a fingerprint; a tensor may come in several pieces."""
    for tensor in tensors:
        flat = tensor.detach().to("cpu").contiguous().view(-1)
        digest.update(flat.view(torch.uint8).numpy().data)


def _check_entries(name: str, indices: Tensor, values: Tensor, n: int) -> tuple[Tensor, Tensor]:
    if indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"indices of {name!r} must be int32 or int64, got {_text(indices.dtype)}.")
    if indices.dim() != 1 or values.shape != indices.shape:
        raise ValueError(
            f"indices and values of {name!r} must be vectors of one length, "
            f"got {list(indices.shape)} and {list(values.shape)}."
        )
    indices = indices.detach().cpu()
    if indices.numel():
        first, last = int(indices[0]), int(indices[-1])
        if bool((indices[1:] <= indices[:-1]).any()):
            raise ValueError(f"indices of {name!r} must be sorted and distinct.")
        if first < 0 or last >= n:
            raise ValueError(f"indices of {name!r} must lie in 0..{n - 1}, got {first}..{last}.")
    dtype = torch.int32 if n <= INT32_NUMEL else torch.int64
    return indices.to(dtype).contiguous(), values.detach().cpu().contiguous()


def _read_header(source: Path, metadata: Mapping[str, str], keys: set[str]) -> dict[str, Any]:
    if metadata.get("format") != FORMAT:
        raise FormatError(f"'{source}' is not a delta file: its format is {metadata.get('format')!r}, not {FORMAT!r}.")
    if metadata.get("version") != str(VERSION):
        raise FormatError(
            f"'{source}' is a delta file of version {metadata.get('version')!r}; this release reads version {VERSION}."
        )
    for key in REQUIRED:
        if key not in metadata:
            raise FormatError(f"'{source}' is damaged: its metadata lacks {key!r}.")
    header: dict[str, Any] = {"base_fingerprint": metadata["base_fingerprint"] or None}
    for key, kind in (("step", int), ("parent_step", (int, type(None))), ("shapes", dict), ("dtypes", dict)):
        try:
            header[key] = json.loads(metadata[key])
        except (ValueError, RecursionError) as error:
            raise FormatError(f"'{source}' is damaged: its {key} cannot be read.") from error
        if not isinstance(header[key], kind):
            raise FormatError(f"'{source}' is damaged: its {key} cannot be read.")
    shapes = header["shapes"]
    if not all(isinstance(s, list) and all(type(d) is int and 0 <= d < 2**48 for d in s) for s in shapes.values()):
        raise FormatError(f"'{source}' is damaged: its shapes cannot be read.")
    expected = {f"{name}::{part}" for name in shapes for part in ("indices", "values")}
    for key in sorted(expected ^ keys):
        what = "lacks" if key in expected else "has an unexpected tensor"
        raise FormatError(f"'{source}' is damaged or incomplete: it {what} {key!r}.")
    return header
