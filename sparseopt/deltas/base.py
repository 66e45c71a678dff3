"""The base of a delta log: the model before training, read piece by piece from wherever it can be read again.

``base.json`` says what it is; ``base.safetensors`` holds its tensors only where the model's name or folder does not give
the same bits again. Nothing here ever holds a whole model in memory, except one that the caller holds already.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sparseopt._files import FormatError, atomic_write
from sparseopt._safetensors import CODES, TensorFile, write_tensors
from sparseopt.deltas._source import Read, TensorFiles, chunks, files_of, memory, names_of
from sparseopt.deltas.delta import model_digest, update_bytes, update_head
from sparseopt.masks.maskset import normalize_name

__all__ = ["Base", "Header", "SaveBase", "describe_model", "open_base", "read_header", "write_base"]

SaveBase = Literal["auto"] | bool

FORMAT = "sparseopt.delta_log"
VERSION = 1
JSON_FILE, TENSOR_FILE = "base.json", "base.safetensors"


@dataclass
class Header:
    """What ``base.json`` says; see :class:`Base` for the fields."""

    fingerprint: str
    name: str | None
    revision: str | None
    saved: bool
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    tied: dict[str, str]
    buffers: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.name or 'an unnamed model'!r} (fingerprint {self.fingerprint[:12]})"

    def to_json(self) -> str:
        parameters = {
            name: {"shape": list(shape), "dtype": _text(self.dtypes[name])} for name, shape in self.shapes.items()
        }
        content = {
            "format": FORMAT, "version": VERSION, "fingerprint": self.fingerprint, "name": self.name,
            "revision": self.revision, "saved": self.saved, "parameters": parameters, "tied": self.tied,
            "buffers": self.buffers,
        }  # fmt: skip
        return json.dumps(content, indent=1) + "\n"


class Base:
    """The model that a delta log begins at; read-only, its tensors are read when asked for.

    Attributes:
        fingerprint: :func:`sparseopt.deltas.delta.model_fingerprint` of its state dict.
        name: Hub name, folder, ``smollm2``, or None.
        revision: commit, branch or tag of a Hub name, or None.
        names: tensors of the state dict in its order, tied ones once, under the first of their names.
        shapes: name -> shape.
        dtypes: name -> dtype in the log, whatever the dtype that the source stores.
        tied: further names of tied tensors -> the name in ``names``.
        buffers: those of ``names`` that are buffers, as far as known: they are no parameters.
    """

    def __init__(self, header: Header, read: Read) -> None:
        """See :func:`open_base`; ``read`` gives entries start..stop of a tensor, by name, in any dtype."""
        self.fingerprint, self.name, self.revision = header.fingerprint, header.name, header.revision
        self.names = list(header.shapes)
        self.shapes, self.dtypes, self.tied = dict(header.shapes), dict(header.dtypes), dict(header.tied)
        self.buffers = frozenset(header.buffers)
        self._read = read

    def canonical(self, name: str) -> str:
        """The name in ``names`` of a tensor, which may be given by a tied name or with wrappers' prefixes."""
        name = normalize_name(name)
        name = self.tied.get(name, name)
        if name not in self.shapes:
            raise KeyError(f"the base has no tensor {name!r}; it has {len(self.names)}.")
        return name

    def piece(self, name: str, start: int, stop: int) -> Tensor:
        """Entries ``start`` to ``stop`` (exclusive) of the flat (row-major) tensor: [stop - start] on the CPU, in the
        logged dtype. Only these are read. Do not write to the result."""
        name = self.canonical(name)
        n = math.prod(self.shapes[name])
        if not 0 <= start <= stop <= n:
            raise ValueError(f"entries {start}..{stop} of {name!r} do not lie in 0..{n}.")
        return self._read(name, start, stop).to("cpu", self.dtypes[name])

    def tensor(self, name: str) -> Tensor:
        """The whole tensor, in its shape and the logged dtype, on the CPU. Do not write to the result."""
        name = self.canonical(name)
        return self.piece(name, 0, math.prod(self.shapes[name])).view(self.shapes[name])

    def compute_fingerprint(self) -> str:
        """The fingerprint of what is really read, a few million entries at a time."""
        digest = model_digest()
        for name in sorted([*self.names, *self.tied]):
            first = self.canonical(name)
            update_head(digest, name, self.shapes[first], self.dtypes[first])
            for start, stop in chunks(math.prod(self.shapes[first])):
                # Under its own name: a source may hold tied tensors twice, and differently.
                update_bytes(digest, self._read(name, start, stop).to("cpu", self.dtypes[first]))
        return digest.hexdigest()

    def __repr__(self) -> str:
        total = sum(math.prod(shape) for shape in self.shapes.values())
        return f"Base: {self.name or 'unnamed'}, {len(self.names)} tensors, {total:,} entries, {self.fingerprint[:12]}"


# ---- making and opening ----------------------------------------------------------------------------------------------
def write_base(
    folder: str | os.PathLike[str],
    model: torch.nn.Module | Mapping[str, Tensor],
    save_base: SaveBase = "auto",
    name: str | None = None,
    revision: str | None = None,
    module: torch.nn.Module | None = None,
) -> Base:
    """Makes ``model``, as it is now, the base of the log in ``folder``.

    Args:
        folder: is made if need be. A log of the same model there is kept as it is.
        model: a module, or its state dict.
        save_base: True writes ``base.safetensors``; False refuses where that would be needed; ``"auto"`` writes it only
            where ``name`` does not give every tensor again, bit by bit, in the model's dtypes.
        name: Hub name, folder or ``smollm2``; by default what the model's config says. A Hub name is looked up in the
            local cache only, since a model that was loaded by name is there.
        revision: of a Hub name.
        module: what a state dict is of: it tells the name and which tensors are buffers, as a module given itself does.

    Raises:
        ValueError: the folder holds a log of another model, or ``save_base=False`` and the model cannot be read again.
    """
    if save_base not in ("auto", True, False):
        raise ValueError(f"save_base must be 'auto', True or False, got {save_base!r}.")
    target = Path(folder)
    header = describe_model(model, name, revision, module=module)
    state = state_of(model)
    if (target / JSON_FILE).exists():
        known = read_header(target)
        if known.fingerprint != header.fingerprint:
            raise ValueError(f"'{target}' holds the delta log of {known}, not of {header}: use another folder.")
        if known.saved and (target / TENSOR_FILE).is_file():
            return open_base(target)
    here = Base(header, memory(state, header.tied))
    reason = "saving was asked for" if save_base is True else _why_unreadable(here)
    if reason is None:
        assert header.name is not None
        read: Read = files_of(header.name, header.revision, download=False).read(header.shapes, header.tied)
    elif save_base is False:
        raise ValueError(f"a delta log needs its base, which save_base=False does not keep: {reason}.")
    else:
        header.saved = True
        _save(target / TENSOR_FILE, here)
        read = TensorFiles([TensorFile(target / TENSOR_FILE)]).read(header.shapes, header.tied)
    atomic_write(target / JSON_FILE, header.to_json())
    return Base(header, read)


def open_base(
    folder: str | os.PathLike[str],
    source: torch.nn.Module | Mapping[str, Tensor] | str | os.PathLike[str] | None = None,
) -> Base:
    """The base of the log in ``folder``; every tensor is read once, to be sure that it is the right one.

    Args:
        folder: of the log.
        source: where the tensors are: None = where ``base.json`` says; a Hub name, a model folder or ``smollm2``; or a
            module or state dict, which must stay as it is while the base is in use.

    Raises:
        FileNotFoundError: no log there, or its base is nowhere to be found.
        sparseopt.FormatError: ``base.json`` or the tensors' file is damaged.
        ValueError: the source is another model.
    """
    header = read_header(folder)
    read: Read
    if isinstance(source, (torch.nn.Module, Mapping)):
        origin = f"the {type(source).__name__} given"
        tensors = state_of(source)
        read = memory(tensors, header.tied)
        problem = _mismatch(header, {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()})
    else:
        if source is None and header.saved:
            origin = f"'{Path(folder) / TENSOR_FILE}'"
            files = TensorFiles([TensorFile(Path(folder) / TENSOR_FILE)])
        else:
            name = header.name if source is None else os.fspath(source)
            if name is None:
                raise FileNotFoundError(f"the base of the log in '{folder}' was neither saved nor named: give it.")
            origin = repr(name)
            files = files_of(name, header.revision if source is None else None, download=True)
        read = files.read(header.shapes, header.tied)
        problem = _mismatch(header, files.contents)
    if problem is not None:
        raise ValueError(f"the log in '{folder}' began at {header}, but {origin} {problem}.")
    base = Base(header, read)
    found = base.compute_fingerprint()
    if found != header.fingerprint:
        raise ValueError(
            f"the log in '{folder}' began at {header}, but {origin} is another model (fingerprint {found[:12]})."
        )
    return base


def describe_model(
    model: torch.nn.Module | Mapping[str, Tensor],
    name: str | None = None,
    revision: str | None = None,
    fingerprint: bool = True,
    module: torch.nn.Module | None = None,
) -> Header:
    """What ``base.json`` would say about a model; hashes all its tensors unless ``fingerprint`` is False.

    ``module`` is what a state dict is of, if known.
    """
    state = state_of(model)
    if isinstance(model, torch.nn.Module):
        module = model
    config = getattr(module, "config", None)
    if name is None:
        name = _portable(getattr(config, "_name_or_path", None) or None)
        if revision is None and name is not None and not os.path.isdir(name):
            revision = getattr(config, "_commit_hash", None)  # main may have moved on when the log is read
    elif os.path.isdir(name):
        name = os.path.abspath(name)
    shapes: dict[str, tuple[int, ...]] = {}
    tied: dict[str, str] = {}
    owners: dict[Any, str] = {}
    for key, tensor in state.items():
        place = (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        # Memory alone tells tied tensors; tensors without any are all alike.
        owner = owners.setdefault(place, key) if tensor.numel() and tensor.data_ptr() else key
        if owner == key:
            shapes[key] = tuple(tensor.shape)
        else:
            tied[key] = owner
    dtypes = {key: state[key].dtype for key in shapes}
    buffers: list[str] = []
    if module is not None:
        parameters = {normalize_name(key) for key, _ in module.named_parameters(remove_duplicate=False)}
        buffers = [key for key in shapes if key not in parameters]
    header = Header("", name, revision, False, shapes, dtypes, tied, buffers)
    if fingerprint:
        header.fingerprint = Base(header, memory(state, header.tied)).compute_fingerprint()
    return header


def read_header(folder: str | os.PathLike[str]) -> Header:
    """Reads ``base.json``.

    Raises:
        FileNotFoundError: there is none.
        sparseopt.FormatError: it is damaged, something else, or of another version.
    """
    path = Path(folder) / JSON_FILE
    if not path.is_file():
        raise FileNotFoundError(f"'{folder}' holds no delta log: there is no {JSON_FILE}.")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise FormatError(f"'{path}' is damaged: it is no JSON.") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise FormatError(f"'{path}' does not describe a delta log: its format is not {FORMAT!r}.")
    if content.get("version") != VERSION:
        raise FormatError(f"'{path}' is of version {content.get('version')!r}; this release reads version {VERSION}.")
    try:
        parameters, tied = content["parameters"], content["tied"]
        shapes = {name: tuple(int(size) for size in entry["shape"]) for name, entry in parameters.items()}
        dtypes = {name: getattr(torch, entry["dtype"]) for name, entry in parameters.items()}
        header = Header(
            content["fingerprint"], content["name"], content["revision"], content["saved"], shapes, dtypes, dict(tied),
            list(content.get("buffers", [])),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FormatError(f"'{path}' is damaged: its entries are incomplete or of wrong kinds.") from error
    well_formed = (
        isinstance(header.fingerprint, str)
        and all(value is None or isinstance(value, str) for value in (header.name, header.revision))
        and isinstance(header.saved, bool)
        and all(isinstance(dtype, torch.dtype) for dtype in dtypes.values())
        and all(isinstance(owner, str) and owner in shapes for owner in header.tied.values())
    )
    if not well_formed:
        raise FormatError(f"'{path}' is damaged: its entries are incomplete or of wrong kinds.")
    return header


# ---- comparing and writing -------------------------------------------------------------------------------------------
def _why_unreadable(model: Base) -> str | None:
    """None if the model's name gives the same bits as the model in memory; else why not."""
    if model.name is None:
        return "the model has no name or folder to read it from again"
    try:
        files = files_of(model.name, model.revision, download=False)
    except (FileNotFoundError, FormatError) as error:
        return str(error).rstrip(".")
    header = Header("", None, None, False, model.shapes, model.dtypes, model.tied)
    problem = _mismatch(header, files.contents)
    if problem is not None:
        return f"{model.name!r} {problem}"
    read = files.read(model.shapes, model.tied)
    for name in (*model.names, *model.tied):
        first = model.canonical(name)
        for start, stop in chunks(math.prod(model.shapes[first])):
            ours, theirs = model.piece(first, start, stop), read(name, start, stop).to(model.dtypes[first])
            if not torch.equal(ours.contiguous().view(torch.uint8), theirs.view(torch.uint8)):
                return f"{name!r} differs from what {model.name!r} holds"
    return None


def _mismatch(header: Header, contents: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> str | None:
    """What keeps a source from giving every tensor of the log, or None."""
    for name, shape in header.shapes.items():
        found = next((contents[n] for n in names_of(name, header.tied) if n in contents), None)
        if found is None:
            return f"holds no tensor {name!r}"
        if found[0] != shape:
            return f"holds {name!r} with shape {list(found[0])}, not {list(shape)}"
        if found[1].is_floating_point != header.dtypes[name].is_floating_point:
            return f"holds {name!r} as {_text(found[1])}, not {_text(header.dtypes[name])}"
    return None


def _save(path: Path, base: Base) -> None:
    """A safetensors file of all tensors, tied ones once, without a second copy of the model in memory."""
    # Wide dtypes first, so that each tensor is aligned for its dtype.
    names = sorted(base.names, key=lambda name: -base.dtypes[name].itemsize)
    for name in names:
        if base.dtypes[name] not in CODES:
            raise ValueError(f"{name!r} is of {_text(base.dtypes[name])}, which safetensors files do not store.")
    pieces = (base.piece(name, *bounds) for name in names for bounds in chunks(math.prod(base.shapes[name])))
    write_tensors(path, {name: (base.shapes[name], base.dtypes[name]) for name in names}, pieces, {"format": "pt"})


def state_of(model: torch.nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Normalised name -> tensor, in the state dict's order."""
    state = model.state_dict(keep_vars=True) if isinstance(model, torch.nn.Module) else model
    return {normalize_name(name): tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}


def _portable(name: str | None) -> str | None:
    """A config's name of its model: folders absolute, the cache of a converted model by that model's name."""
    from sparseopt import models

    if name is None or not os.path.isdir(name):
        return name
    folder = Path(name).resolve()
    if folder.parent == models.cache_dir().resolve() and folder.name.startswith("smollm2"):
        return "smollm2"
    return str(folder)


def _text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
