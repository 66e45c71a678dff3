"""What every model folder that is written here needs: small files copied, weights in shards, and sizes as people say them."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparseopt._files import atomic_write
from sparseopt._safetensors import write_tensors
from sparseopt.progress import Progress

__all__ = ["MARKER", "copy_configs", "parse_size", "write_shards"]

MARKER = "reconstruction.json"  # tells a folder that may be replaced
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
# Of a model folder, all small files but weights and their index: configs, tokenizer, chat template, custom code.
COPIED = ("*.json", "*.jinja", "*.model", "*.txt", "*.py", "*.tiktoken")
LEFT_OUT = ("*.safetensors.index.json", "*.bin.index.json", MARKER)


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


def copy_configs(origin: str, revision: str | None, folder: Path) -> None:
    """Copies the small files of a model folder or of a Hub repository that are not there yet.

    Raises:
        FileNotFoundError: no such model.
    """
    from sparseopt import models

    place, options = models._locate(origin, revision)
    if not os.path.isdir(place):
        from huggingface_hub import snapshot_download

        place = snapshot_download(place, allow_patterns=list(COPIED), ignore_patterns=list(LEFT_OUT), **options)
    for pattern in COPIED:
        for path in Path(place).glob(pattern):
            if not any(path.match(left) for left in LEFT_OUT) and not (folder / path.name).exists():
                shutil.copyfile(path, folder / path.name)


def write_shards(
    folder: Path,
    specs: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    pieces: Callable[[str], Iterable[Tensor]],
    limit: int,
) -> dict[str, Any]:
    """Writes the weights of a model folder: one file or several, filled in order, and then their index.

    Args:
        folder: where to.
        specs: tensor name -> (shape, dtype), in order.
        pieces: gives a named tensor's entries in flat pieces, one after the other.
        limit: bytes of a file; a larger tensor has a file of its own.

    Returns:
        ``files`` (names, sorted) and ``bytes`` (of all tensors).
    """
    sizes = {name: math.prod(shape) * dtype.itemsize for name, (shape, dtype) in specs.items()}
    shards = _split(sizes, limit)
    places: dict[str, str] = {}
    with Progress("weights", len(sizes), unit="tensor") as progress:

        def stream(names: list[str]) -> Iterable[Tensor]:
            for name in names:
                yield from pieces(name)
                progress.update()

        for number, names in enumerate(shards, 1):
            single = len(shards) == 1
            file = "model.safetensors" if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            # Wide dtypes first, so that each tensor is aligned for its dtype.
            names = sorted(names, key=lambda name: -specs[name][1].itemsize)
            write_tensors(folder / file, {name: specs[name] for name in names}, stream(names), {"format": "pt"})
            places.update(dict.fromkeys(names, file))
    total = sum(sizes.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": {name: places[name] for name in specs}}
        atomic_write(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
    return {"files": sorted(set(places.values())), "bytes": total}


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
