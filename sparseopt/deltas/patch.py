"""Weight patches: what changed between two steps, as one delta, and its way into a model folder.

A patch is an ordinary delta file. A trainer sends it to whoever holds the weights of the earlier step: an inference
engine (:meth:`Delta.to_weight_patches`), another process (:meth:`Delta.apply_`), or a folder on disk (here).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from sparseopt._files import FormatError, atomic_folder, atomic_write
from sparseopt._safetensors import TensorFile, write_tensors
from sparseopt.deltas.delta import Delta, model_digest, update_bytes, update_head
from sparseopt.masks.maskset import normalize_name
from sparseopt.progress import Progress

__all__ = ["RECORD", "apply_to_folder", "between", "combine", "patch_bytes"]

RECORD = "sparseopt_patch.json"  # in a patched folder: the step that its weights belong to
INDEX = "model.safetensors.index.json"
PIECE = 1 << 22  # entries read at a time
# What belongs to a model beside its weights; optimizer states and weights in other formats do not.
BESIDE = {".json", ".txt", ".model", ".jinja", ".py", ".md", ".tiktoken", ""}
NOT_BESIDE = {"trainer_state.json", RECORD}


class Log(Protocol):
    """What is needed of a delta log."""

    def steps(self) -> Sequence[int]: ...
    def load(self, step: int) -> Delta: ...


# ---- making patches --------------------------------------------------------------------------------------------------
def combine(deltas: Sequence[Delta]) -> Delta:
    """One delta that does what ``deltas`` do one after the other: the union of their entries, the last value wins.

    Args:
        deltas: at least one; each is applied to the model of the step before it (``parent_step``).

    Returns:
        A delta from the first's parent to the last's step.

    Raises:
        ValueError: nothing to combine, a gap in the chain, different bases, or a parameter whose shape or dtype changes.
    """
    if not deltas:
        raise ValueError("there are no deltas to combine.")
    first, last = deltas[0], deltas[-1]
    for before, after in itertools.pairwise(deltas):
        if after.parent_step != before.step:
            parent = "the base" if after.parent_step is None else f"step {after.parent_step}"
            raise ValueError(
                f"the delta of step {after.step} follows {parent}, not step {before.step}: there is a gap."
            )
        if after.base_fingerprint != before.base_fingerprint:
            raise ValueError(f"the deltas of steps {before.step} and {after.step} are of different bases.")
    entries: dict[str, tuple[Tensor, Tensor]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for delta in deltas:
        for name, shape in delta.shapes.items():
            indices, values = delta.indices(name), delta.values(name)
            if name in entries:
                known, old = entries[name]
                if shapes[name] != shape or old.dtype != values.dtype:
                    raise ValueError(
                        f"parameter {name!r} is {old.dtype}{list(shapes[name])} before step {delta.step} and "
                        f"{values.dtype}{list(shape)} in it."
                    )
                indices, values = _merge(known, old, indices, values)
            entries[name], shapes[name] = (indices, values), shape
    return Delta.from_dict(
        entries, shapes, step=last.step, parent_step=first.parent_step, base_fingerprint=last.base_fingerprint
    )


def _merge(known: Tensor, old: Tensor, indices: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Union of two sorted sets of entries; the second's values win."""
    together, order = torch.cat([known, indices]).sort(stable=True)
    latest = torch.ones_like(together, dtype=torch.bool)
    latest[:-1] = together[1:] != together[:-1]
    return together[latest], torch.cat([old, values])[order[latest]]


def between(log: Log, from_step: int | None, to_step: int) -> Delta:
    """The patch between two steps of a delta log, read step by step.

    Args:
        log: the delta log.
        from_step: step of the weights that the patch will be applied to; None or 0 = the base.
        to_step: step that it leads to.

    Raises:
        ValueError: a step that was not logged (the logged ones are named), or steps in the wrong order.
    """
    steps = sorted(log.steps())
    start = from_step or 0
    for step in (start, to_step):
        if step and step not in steps:
            listed = ", ".join(map(str, steps)) or "none"
            raise ValueError(f"step {step} is not in the delta log: its steps are {listed}.")
    if start >= to_step:
        raise ValueError(f"a patch leads from a step to a later one, got from {start} to {to_step}.")
    patch: Delta | None = None
    with Progress("patch", total=sum(start < step <= to_step for step in steps), unit="step") as progress:
        for step in steps:
            if start < step <= to_step:
                delta = log.load(step)
                if patch is None and delta.parent_step != (start or None):
                    raise ValueError(
                        f"the delta of step {step} follows "
                        f"{'the base' if delta.parent_step is None else f'step {delta.parent_step}'}, "
                        f"not {f'step {start}' if start else 'the base'}: there is a gap."
                    )
                patch = delta if patch is None else combine([patch, delta])
                progress.update()
    assert patch is not None
    return patch


def patch_bytes(patch: Delta) -> int:
    """Bytes of a patch's indices and values: what has to be sent, without the file's header."""
    return sum(patch.indices(name).nbytes + patch.values(name).nbytes for name in patch.names)


# ---- applying them to a folder ---------------------------------------------------------------------------------------
def apply_to_folder(
    patch: Delta,
    model_dir: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    check_base: bool = True,
) -> dict[str, int]:
    """Writes a copy of a model folder with the patch applied; needs memory for pieces of tensors only.

    Args:
        patch: of the folder's parameters, in the dtypes that the folder stores.
        model_dir: a folder as ``save_pretrained`` writes it (safetensors, one file or shards). Its configuration and
            tokenizer are copied too.
        output_dir: must be absent or empty; whole or not made at all.
        check_base: a patch of the base is refused on another model (by the base's fingerprint), and a patch of a later
            step on a folder that an earlier patch brought to another step.

    Returns:
        ``changed_parameters`` (entries written), ``tensors``, ``shards``, ``patch_bytes``, ``checkpoint_bytes`` (of the
        folder's weight files) and ``bf16_bytes`` (of the same tensors in bf16).

    Raises:
        FileNotFoundError: no such folder, or no safetensors weights in it.
        ValueError: a parameter is missing, or of another shape or dtype; another base or step; a target in use.
    """
    source, target = Path(model_dir), Path(output_dir)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"the output '{target}' exists and is not empty: choose another folder.")
    with contextlib.ExitStack() as stack:
        shards = {path: stack.enter_context(TensorFile(path)) for path in _shards(source)}
        where = {normalize_name(name): (file, name) for file in shards.values() for name in file.shapes}
        _check_fits(patch, source, where)
        if check_base:
            _check_parent(patch, source, where)
        with atomic_folder(target) as temporary:
            numel = sum(file.numel(name) for file, name in where.values())
            with Progress("patching", total=numel, unit="entry") as progress:
                for path, file in shards.items():
                    if any(normalize_name(name) in patch for name in file.shapes):
                        specs = {name: (shape, _dtype(file, name)) for name, shape in file.shapes.items()}
                        write_tensors(temporary / path.name, specs, _pieces(file, patch, progress), file.metadata)
                    else:
                        shutil.copyfile(path, temporary / path.name)
                        progress.update(sum(map(file.numel, file.shapes)))
            for beside in source.iterdir():
                if beside.is_file() and beside.suffix in BESIDE and beside.name not in NOT_BESIDE:
                    shutil.copy(beside, temporary / beside.name)
            record = {"step": patch.step, "base_fingerprint": patch.base_fingerprint}
            atomic_write(temporary / RECORD, json.dumps(record) + "\n")
    return {
        "changed_parameters": patch.changed_parameters,
        "tensors": len(patch),
        "shards": len(shards),
        "patch_bytes": patch_bytes(patch),
        "checkpoint_bytes": sum(path.stat().st_size for path in shards),
        "bf16_bytes": 2 * numel,
    }


def _dtype(file: TensorFile, name: str) -> torch.dtype:
    if name not in file.dtypes:
        raise FormatError(f"'{file.path}' stores {name!r} in a dtype that this release cannot copy.")
    return file.dtypes[name]


def _shards(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no model folder '{folder}'.")
    index = folder / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise FormatError(f"'{index}' is damaged: it has no readable weight_map.") from error
        if any(Path(name).name != name for name in names):
            raise FormatError(f"'{index}' lists files outside its folder.")
        return [folder / name for name in names]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    raise FileNotFoundError(f"'{folder}' holds no safetensors weights (model.safetensors or {INDEX}).")


def _check_fits(patch: Delta, folder: Path, where: Mapping[str, tuple[TensorFile, str]]) -> None:
    dtypes = patch.dtypes
    for name, shape in patch.shapes.items():
        if name not in where:
            raise ValueError(f"'{folder}' has no parameter {name!r}, which the patch to step {patch.step} changes.")
        file, stored = where[name]
        found = file.dtypes.get(stored)
        if file.shapes[stored] != shape or found != dtypes[name]:
            raise ValueError(
                f"parameter {name!r} of '{folder}' must be {dtypes[name]}{list(shape)}, "
                f"got {found}{list(file.shapes[stored])}."
            )


def _check_parent(patch: Delta, folder: Path, where: Mapping[str, tuple[TensorFile, str]]) -> None:
    record: dict[str, Any] = {"step": None, "base_fingerprint": None}
    if (folder / RECORD).is_file():
        try:
            record.update(json.loads((folder / RECORD).read_text()))
        except (ValueError, TypeError) as error:
            raise FormatError(f"'{folder / RECORD}' is damaged: it cannot be read.") from error
        if record["step"] not in (patch.parent_step, patch.step):
            parent = "the base" if patch.parent_step is None else f"step {patch.parent_step}"
            raise ValueError(
                f"the patch to step {patch.step} is for {parent}, but '{folder}' is at step {record['step']}."
            )
        if record["base_fingerprint"] and patch.base_fingerprint not in (None, record["base_fingerprint"]):
            raise ValueError(f"the patch to step {patch.step} is of another base than '{folder}'.")
    elif patch.parent_step is None and patch.base_fingerprint is not None:
        names = {name: name for name in where}
        tied = [name for name in where if name.endswith(("embed_tokens.weight", "wte.weight"))]
        # Files leave out the output layer where it is the embedding, which fingerprints count.
        views = [names, *({**names, "lm_head.weight": name} for name in tied if "lm_head.weight" not in names)]
        if all(_fingerprint(view, where) != patch.base_fingerprint for view in views):
            raise ValueError(
                f"the patch to step {patch.step} is for another base model than '{folder}' (its fingerprint differs)."
            )


def _fingerprint(view: Mapping[str, str], where: Mapping[str, tuple[TensorFile, str]]) -> str:
    """:func:`sparseopt.deltas.delta.model_fingerprint` of stored tensors; ``view``: name -> name in the files."""
    digest = model_digest()
    for name, stored_as in sorted(view.items()):
        file, stored = where[stored_as]
        update_head(digest, name, file.shapes[stored], file.dtypes[stored])
        for start in range(0, file.numel(stored), PIECE):
            update_bytes(digest, file.read(stored, start, start + PIECE))
    return str(digest.hexdigest())


def _pieces(file: TensorFile, patch: Delta, progress: Progress) -> Iterator[Tensor]:
    """The tensors of a file one after the other in pieces, with the patch's entries replaced."""
    for stored in file.shapes:
        name, numel = normalize_name(stored), math.prod(file.shapes[stored])
        indices, values = (patch.indices(name), patch.values(name)) if name in patch else (None, None)
        for start in range(0, numel, PIECE):
            piece = file.read(stored, start, min(start + PIECE, numel))
            if indices is not None and values is not None:
                stop = start + piece.numel()
                begin = int(torch.searchsorted(indices, start))
                end = int(torch.searchsorted(indices, stop)) if stop < numel else indices.numel()
                piece[indices[begin:end].long() - start] = values[begin:end]
            progress.update(piece.numel())
            yield piece
