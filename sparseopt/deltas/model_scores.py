"""Scores that need a model but no training: the size of its weights, and chance."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sparseopt.deltas._source import Read, files_of
from sparseopt.deltas.base import Base
from sparseopt.masks._pieces import Scores

__all__ = ["RandomScores", "WeightScores", "model_parameters", "weight_scores"]

BLOCK = 1 << 16  # entries of one seeded stretch of random scores


def model_parameters(model_name: str) -> dict[str, tuple[int, ...]]:
    """Name -> shape of a causal language model's parameters, tied ones once; its weights are not read.

    Args:
        model_name: ``smollm2``, a model folder, or a Hub name.

    Raises:
        FileNotFoundError: there is no such model, or the Hub cannot be reached.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from sparseopt import models

    source, options = models._locate(model_name, None)
    with models._one_sentence(model_name), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source, **options))
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


class WeightScores(Scores):
    """|weight| in fp32, read piece by piece."""

    def __init__(
        self, shapes: Mapping[str, Sequence[int]], read: Read, provenance: Mapping[str, object] | None = None
    ) -> None:
        super().__init__(shapes, {"method": "weight_magnitude", "formula": "|weight|", **(provenance or {})})
        self._read = read

    def piece(self, name: str, start: int, stop: int) -> Tensor:
        return self._read(name, start, stop).to("cpu", torch.float32, copy=True).abs_()


def weight_scores(model: Base | str) -> WeightScores:
    """Scores by the size of the weights.

    Args:
        model: the base of a log, or ``smollm2``, a model folder with safetensors files, or a Hub name.

    Raises:
        FileNotFoundError: no such model.
        ValueError: its files lack a parameter of the model, or have it in another shape (it is named).
    """
    if isinstance(model, Base):
        return WeightScores(_parameters(model), model.piece, {"base_model": model.name})
    shapes = model_parameters(model)
    files = files_of(model, None, download=True)
    for name, shape in shapes.items():
        found = files.contents.get(name)
        if found is None or found[0] != shape:
            came = "no such tensor" if found is None else f"shape {list(found[0])}"
            raise ValueError(f"{model!r} should store {name!r} with shape {list(shape)}, its files have {came}.")
    return WeightScores(shapes, files.read(shapes, {}), {"base_model": model})


def _parameters(base: Base) -> dict[str, tuple[int, ...]]:
    return {n: base.shapes[n] for n in base.names if n not in base.buffers and base.dtypes[n].is_floating_point}


class RandomScores(Scores):
    """Uniform in (0, 1]; an entry's score depends on seed, name and flat index only."""

    def __init__(
        self, model: Base | Mapping[str, Sequence[int]], seed: int = 0, provenance: Mapping[str, object] | None = None
    ) -> None:
        """``model``: the base of a log, or name -> shape."""
        known = {"method": "random", "seed": seed, **({"base_model": model.name} if isinstance(model, Base) else {})}
        super().__init__(_parameters(model) if isinstance(model, Base) else model, {**known, **(provenance or {})})
        self.seed = seed

    def piece(self, name: str, start: int, stop: int) -> Tensor:
        first = start // BLOCK
        blocks = [self._block(name, block) for block in range(first, -(-stop // BLOCK))]
        return torch.cat([torch.empty(0), *blocks])[start - first * BLOCK : stop - first * BLOCK]

    def _block(self, name: str, block: int) -> Tensor:
        digest = hashlib.sha256(f"{self.seed}:{name}:{block}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return 1 - torch.rand(BLOCK, generator=generator)
