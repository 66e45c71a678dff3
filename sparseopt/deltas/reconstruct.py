"""The model at a logged step, bit by bit: as a state dict, or as a folder that ``from_pretrained`` loads."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparseopt._files import atomic_folder, atomic_write
from sparseopt._safetensors import write_tensors
from sparseopt.deltas.reader import LogReader, Source
from sparseopt.progress import Progress

__all__ = ["MARKER", "parse_size", "reconstruct", "write_checkpoint"]

MARKER = "reconstruction.json"  # tells a folder that may be replaced
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
# Of a model folder, all small files but weights and their index: configs, tokenizer, chat template, custom code.
COPIED = ("*.json", "*.jinja", "*.model", "*.txt", "*.py", "*.tiktoken")
LEFT_OUT = ("*.safetensors.index.json", "*.bin.index.json", MARKER)


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


def parse_size(size: int | str) -> int:
    """Bytes of ``"5GB"``, ``"200 MiB"`` or a number.

    Raises:
        ValueError: anything else, or nothing above 0.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", str(size).strip(), re.IGNORECASE)
    bytes_ = int(float(match[1]) * UNITS[match[2].upper()]) if match and match[2].upper() in UNITS else 0
    if bytes_ < 1:
        raise ValueError(f"a size is a number of bytes, or such as '5GB' or '200MiB', got {size!r}.")
    return bytes_


# ---- the folder ------------------------------------------------------------------------------------------------------
def _check_target(target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"'{target}' is a file; a reconstruction is a folder.")
    if target.is_dir() and any(target.iterdir()) and not (target / MARKER).is_file():
        raise FileExistsError(f"'{target}' is not empty and no earlier reconstruction: name another folder.")


# ---- weights ---------------------------------------------------------------------------------------------------------
def _write_weights(reader: LogReader, step: int, folder: Path, limit: int) -> dict[str, Any]:
    sizes = {name: math.prod(reader.shapes[name]) * reader.dtypes[name].itemsize for name in reader.names}
    shards = _split(sizes, limit)
    total = sum(sizes.values())
    files = {}
    with Progress("weights", len(sizes), unit="tensor") as progress:
        for number, names in enumerate(shards, 1):
            single = len(shards) == 1
            file = "model.safetensors" if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            # Wide dtypes first, so that each tensor is aligned for its dtype.
            names = sorted(names, key=lambda name: -reader.dtypes[name].itemsize)
            specs = {name: (reader.shapes[name], reader.dtypes[name]) for name in names}
            write_tensors(folder / file, specs, _pieces(reader, step, names, progress), {"format": "pt"})
            files.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": {name: files[name] for name in reader.names}}
        atomic_write(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
    return {"files": sorted(set(files.values())), "bytes": total}


def _split(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if shards[-1] and used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def _pieces(reader: LogReader, step: int, names: Sequence[str], progress: Progress) -> Iterator[Tensor]:
    for name in names:
        for _, _, (values,) in reader.pieces(name, [step]):
            yield values
        progress.update()


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
            _copy_configs(origin, reader.base.revision if origin == name else None, folder)
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


def _copy_configs(origin: str, revision: str | None, folder: Path) -> None:
    """Copies the small files of a model folder or of a Hub repository that are not there yet."""
    from sparseopt import models

    place, options = models._locate(origin, revision)
    if not os.path.isdir(place):
        from huggingface_hub import snapshot_download

        place = snapshot_download(place, allow_patterns=list(COPIED), ignore_patterns=list(LEFT_OUT), **options)
    for pattern in COPIED:
        for path in Path(place).glob(pattern):
            if not any(path.match(left) for left in LEFT_OUT) and not (folder / path.name).exists():
                shutil.copyfile(path, folder / path.name)


def _main_dtype(reader: LogReader) -> str:
    """The floating-point dtype that most entries have."""
    counts: Counter[torch.dtype] = Counter()
    for name in reader.names:
        if reader.dtypes[name].is_floating_point:
            counts[reader.dtypes[name]] += math.prod(reader.shapes[name])
    return str(counts.most_common(1)[0][0] if counts else torch.float32).removeprefix("torch.")
