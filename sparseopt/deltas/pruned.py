"""A pruned model as a folder that ``from_pretrained`` loads: weights outside a mask are 0, written piece by piece."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparseopt import models
from sparseopt._files import atomic_folder, atomic_write
from sparseopt._safetensors import CODES
from sparseopt.deltas._model_folder import copy_configs, parse_size, write_shards
from sparseopt.deltas._source import Read, TensorFiles, chunks, files_of
from sparseopt.masks._bits import unpack_range
from sparseopt.masks.maskset import MaskSet, normalize_name

__all__ = ["ABOUT", "write_pruned"]

ABOUT = "pruning.json"
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def write_pruned(
    model_name: str | os.PathLike[str],
    masks: MaskSet,
    output_dir: str | os.PathLike[str],
    *,
    keep_unmasked: bool = True,
    max_shard_size: int | str = "5GB",
) -> dict[str, Any]:
    """Writes a model folder in which inactive weights are 0, in the dtype that the model is stored in.

    Memory is the mask and some 100 MB, whatever the model. Config, tokenizer and the like are copied.

    Args:
        model_name: ``smollm2``, a model folder with safetensors files, or a Hub name.
        masks: masks of its parameters. Tensors without a mask keep their weights.
        output_dir: new or empty; written whole or not at all.
        keep_unmasked: parameters whose mask has nothing active keep their weights too: a mask that was found without
            embeddings must not erase them. False sets them to 0 throughout.
        max_shard_size: bytes of a weight file, as a number or such as ``"5GB"``; a larger tensor has a file of its own.

    Returns:
        What ``pruning.json`` in the folder says: model, fingerprint of the masks, ``total_parameters`` (floating-point
        entries of the files), ``zeroed_parameters`` (inactive ones among them, whatever they were), ``zero_parameters``
        and ``zero_share`` (entries that are 0 in the result), ``kept`` (names that kept all weights), files, bytes.

    Raises:
        FileExistsError: ``output_dir`` is a file, or holds something.
        FileNotFoundError: no such model.
        ValueError: a mask fits no tensor of the model, or not its shape (it is named).
        sparseopt.FormatError: a damaged file.
    """
    target = Path(os.path.abspath(output_dir))
    limit = parse_size(max_shard_size)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"'{target}' exists already and is no empty folder: name another one.")
    name = os.fspath(model_name)
    files = files_of(name, None, download=True)
    plan = _plan(name, files, masks, keep_unmasked)
    with atomic_folder(target) as temporary:  # fails if somebody has filled it meanwhile
        copy_configs(name, None, temporary)
        about: dict[str, Any] = {
            "format": "sparseopt.pruning",
            "base_model": name,
            "mask_fingerprint": masks.fingerprint,
            "keep_unmasked": keep_unmasked,
            **_write_weights(files, plan, masks, temporary, limit),
        }
        atomic_write(temporary / ABOUT, json.dumps(about, indent=1) + "\n")
    return about


# ---- which mask for which tensor -------------------------------------------------------------------------------------
def _plan(model: str, files: TensorFiles, masks: MaskSet, keep_unmasked: bool) -> dict[str, str | None]:
    """Name of each tensor in the files -> name of the mask that prunes it, or None."""
    chosen = [name for name in masks if masks.count(name) or not keep_unmasked]
    plan: dict[str, str | None] = dict.fromkeys(files.contents)
    plan.update((name, name) for name in chosen if name in plan)
    # Files may hold a tied tensor under another of its names, or under both: only the model knows. It is made (without
    # weights) only where that can matter.
    missing = [name for name in masks if name not in plan]
    shapes = {masks.shapes[name] for name in chosen}
    if missing or any(mask is None and files.contents[name][0] in shapes for name, mask in plan.items()):
        tied = _tied(model)
        for name in masks:
            for alias in tied.get(name, ()):
                if alias in plan and alias not in masks:
                    plan[alias] = name if name in chosen else None
        missing = [name for name in missing if not any(alias in plan for alias in tied.get(name, ()))]
    if missing:
        raise ValueError(f"the mask of {missing[0]!r} fits no tensor of {model!r}, whose files hold {len(plan)}.")
    for name, mask in plan.items():
        shape, dtype = files.contents[name]
        if name in masks and shape != masks.shapes[name]:
            raise ValueError(
                f"{model!r} stores {name!r} with shape {list(shape)}, its mask has {list(masks.shapes[name])}."
            )
        if mask is not None and not dtype.is_floating_point:
            raise ValueError(
                f"{model!r} stores {name!r} as {str(dtype).removeprefix('torch.')}: only floats are pruned."
            )
    return plan


def _tied(model_name: str) -> dict[str, list[str]]:
    """Parameter -> the other names of the same parameter; the model is made without weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    source, options = models._locate(model_name, None)
    with models._one_sentence(model_name), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source, **options))
    groups: dict[int, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(param), []).append(normalize_name(name))
    return {name: [other for other in group if other != name] for group in groups.values() for name in group}


# ---- writing ---------------------------------------------------------------------------------------------------------
def _write_weights(
    files: TensorFiles, plan: Mapping[str, str | None], masks: MaskSet, folder: Path, limit: int
) -> dict[str, Any]:
    for name in plan:
        if files.contents[name][1] not in CODES:
            raise ValueError(f"{name!r} is stored as {files.contents[name][1]}, which cannot be written.")
    counts = {"total_parameters": 0, "zeroed_parameters": 0, "zero_parameters": 0}
    read = files.read(plan, {})

    def pieces(name: str) -> Iterator[Tensor]:
        return _pruned(name, plan[name], read, files, masks, counts)

    written = write_shards(folder, {name: files.contents[name] for name in plan}, pieces, limit)
    return {
        **counts,
        "zero_share": counts["zero_parameters"] / max(1, counts["total_parameters"]),
        "kept": [name for name, mask in plan.items() if mask is None],
        **written,
    }


def _pruned(
    name: str,
    mask: str | None,
    read: Read,
    files: TensorFiles,
    masks: MaskSet,
    counts: dict[str, int],
) -> Iterator[Tensor]:
    shape, dtype = files.contents[name]
    for start, stop in chunks(math.prod(shape)):
        values = read(name, start, stop)  # a buffer of its own
        if mask is not None:
            inactive = ~unpack_range(masks.packed(mask), start, stop)
            values.view(INTEGERS[dtype.itemsize]).masked_fill_(inactive, 0)  # eight-bit floats have no masked_fill
            counts["zeroed_parameters"] += int(inactive.count_nonzero())
        if dtype.is_floating_point:
            comparable = values.float() if dtype.itemsize == 1 else values
            counts["total_parameters"] += values.numel()
            counts["zero_parameters"] += values.numel() - int(comparable.count_nonzero())
        yield values
