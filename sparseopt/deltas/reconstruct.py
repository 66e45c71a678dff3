"""The model at a logged step, bit by bit: as a state dict, or as a folder that ``from_pretrained`` loads."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparseopt._files import atomic_folder, atomic_write
from sparseopt.deltas._model_folder import MARKER, copy_configs, parse_size, write_shards
from sparseopt.deltas.reader import LogReader, Source

__all__ = ["reconstruct", "write_checkpoint"]


def reconstruct(base: Source, log: Any, step: int) -> dict[str, Tensor]:
    """The state dict of the model at a logged step.

    Args:
        base: where the base is: None = what the log says; a model's name or folder, a module or a state dict.
        log: the log's folder, or a :class:`sparseopt.DeltaLog`.
        step: a logged step.

    Returns:
        Name -> tensor on the CPU, in the dtype that was trained, bit-identical to the model then. Tied tensors are under
        all of their names, one tensor.

    Raises:
        ValueError: no such step, a gap in the chain, a delta or a base of another model.
        sparseopt.FormatError: a damaged file.
        FileNotFoundError: no log there, or no base.
    """
    reader = LogReader(log, base)
    reader.check(step)
    state = {}
    for name in reader.names:
        tensor = torch.empty(reader.shapes[name], dtype=reader.dtypes[name])
        flat = tensor.view(-1)
        for start, _, (values,) in reader.pieces(name, [step]):
            flat[start : start + values.numel()] = values
        state[name] = tensor
    return {**state, **{alias: state[name] for alias, name in reader.tied.items()}}


def write_checkpoint(
    log: Any,
    step: int | None,
    output_dir: str | os.PathLike[str],
    source: Source = None,
    max_shard_size: int | str = "5GB",
) -> dict[str, Any]:
    """Writes the model at a logged step as a folder that ``from_pretrained`` loads, piece by piece.

    Config, generation config, tokenizer and the like come from the base's folder (or the Hub), or from the module given;
    the config's dtype becomes the trained one. Tied tensors are stored once, under the first of their names.

    Args:
        log: the log's folder, or a :class:`sparseopt.DeltaLog`.
        step: a logged step; None = the last.
        output_dir: new, empty, or an earlier reconstruction, which is replaced once the new one is complete.
        source: see :func:`reconstruct`.
        max_shard_size: bytes of a weight file, as a number or such as ``"5GB"``; a larger tensor has a file of its own.

    Returns:
        What ``reconstruction.json`` in the folder says: step, base, log fingerprint, files, bytes.

    Raises:
        FileExistsError: ``output_dir`` holds something else.
        FileNotFoundError: as :func:`reconstruct`, or there is no config to be found.
        ValueError, sparseopt.FormatError: as :func:`reconstruct`.
    """
    target = Path(os.path.abspath(output_dir))
    limit = parse_size(max_shard_size)
    _check_target(target)
    reader = LogReader(log, source)
    step = reader.resolve(step)
    reader.check(step)
    with atomic_folder(target, replace=True) as temporary:
        _write_configs(reader, source, temporary)
        about: dict[str, Any] = {
            "format": "sparseopt.reconstruction",
            "step": step,
            "base_model": reader.base.name,
            "base_fingerprint": reader.base.fingerprint,
            **_write_weights(reader, step, temporary, limit),
        }
        atomic_write(temporary / MARKER, json.dumps(about, indent=1) + "\n")
        _check_target(target)  # somebody may have filled it meanwhile
    return about


# ---- the folder ------------------------------------------------------------------------------------------------------
def _check_target(target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"'{target}' is a file; a reconstruction is a folder.")
    if target.is_dir() and any(target.iterdir()) and not (target / MARKER).is_file():
        raise FileExistsError(f"'{target}' is not empty and no earlier reconstruction: name another folder.")


def _write_weights(reader: LogReader, step: int, folder: Path, limit: int) -> dict[str, Any]:
    def pieces(name: str) -> Iterator[Tensor]:
        return (values for _, _, (values,) in reader.pieces(name, [step]))

    return write_shards(
        folder, {name: (reader.shapes[name], reader.dtypes[name]) for name in reader.names}, pieces, limit
    )


# ---- config and tokenizer --------------------------------------------------------------------------------------------
def _write_configs(reader: LogReader, source: Source, folder: Path) -> None:
    """Everything but the weights, and the trained dtype in the config."""
    name = reader.base.name
    origin: str | None = os.fspath(source) if isinstance(source, (str, os.PathLike)) else name
    config = getattr(source, "config", None)
    if isinstance(source, torch.nn.Module) and hasattr(config, "save_pretrained"):
        assert config is not None
        config.save_pretrained(folder)
        generation = getattr(source, "generation_config", None)
        if generation is not None:
            generation.save_pretrained(folder)
    elif origin is None:
        raise FileNotFoundError(
            f"the log in '{reader.path}' does not say which model it began at, so that there is no config: name a model."
        )
    if origin is not None:
        try:
            copy_configs(origin, reader.base.revision if origin == name else None, folder)
        except FileNotFoundError:
            if not (folder / "config.json").is_file():
                raise
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"model {origin!r} has no config.json.")
    content = json.loads(path.read_bytes())
    dtype = _main_dtype(reader)
    # transformers 4 called it torch_dtype; both read either.
    content.pop("torch_dtype", None)
    content["dtype"] = dtype
    for part in content.values():  # configs of parts, such as text_config
        if isinstance(part, dict):
            part.update({key: dtype for key in ("dtype", "torch_dtype") if key in part})
    atomic_write(path, json.dumps(content, indent=2) + "\n")


def _main_dtype(reader: LogReader) -> str:
    """The floating-point dtype that most entries have."""
    counts: Counter[torch.dtype] = Counter()
    for name in reader.names:
        if reader.dtypes[name].is_floating_point:
            counts[reader.dtypes[name]] += math.prod(reader.shapes[name])
    return str(counts.most_common(1)[0][0] if counts else torch.float32).removeprefix("torch.")
