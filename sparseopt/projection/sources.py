"""Models to project: GPT-2 by architecture, with given or random weights, or any causal language model by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from sparseopt.projection.text import ByteTokenizer

__all__ = ["ARCHITECTURES", "LoadedModel", "load"]

# The names of the command line: (Hub name of the published weights, shape).
ARCHITECTURES = {
    "GPT2-Small": ("openai-community/gpt2", "gpt2"),
    "GPT2-Medium": ("openai-community/gpt2-medium", "gpt2-medium"),
    "GPT2-Large": ("openai-community/gpt2-large", "gpt2-large"),
}


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode, its tokenizer, and what they are called.

    Attributes:
        weights: where the weights come from: a name, or ``random (seed N)``.
    """

    model: Any
    tokenizer: Any
    name: str
    weights: str


def load(
    architecture: str = "GPT2-Small",
    model: str | None = None,
    *,
    weights: str | None = None,
    random_weights: bool = False,
    tokenizer: str | None = None,
    dtype: str = "bfloat16",
    device: str | torch.device = "cpu",
    seed: int = 42,
) -> LoadedModel:
    """Loads what is to be projected.

    Args:
        architecture: a key of :data:`ARCHITECTURES`; its published weights are taken from the Hub or its cache.
        model: instead: ``smollm2``, a folder, a Hub name, or with ``random_weights`` the name of a shape.
        weights: folder or Hub name of other weights of the architecture.
        random_weights: draw the weights, by ``seed``: for speed and tests; projections of them say nothing about text.
        tokenizer: folder or name; default: the model's own, bytes where the weights are random.
        dtype: "float32", "bfloat16" or "float16".
        device: where the model goes.
        seed: of random weights.

    Raises:
        ValueError: an unknown architecture or shape, or options that exclude each other.
        FileNotFoundError: the weights or the tokenizer are not to be had.
    """
    from sparseopt import models
    from sparseopt.shapes import build_shape

    if model is None and architecture not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {architecture!r}: expected one of {', '.join(ARCHITECTURES)}.")
    if random_weights and weights is not None:
        raise ValueError("give weights or random_weights, not both.")
    if model is not None and weights is not None:
        raise ValueError("weights belong to an architecture; a model comes with its own.")
    published, shape = ARCHITECTURES.get(architecture, ("", ""))
    name = model or architecture
    if random_weights:
        built = build_shape(model or shape, device=device, dtype=getattr(torch, dtype), seed=seed).eval()
        read = models.load_tokenizer(tokenizer) if tokenizer else ByteTokenizer()
        return LoadedModel(built, read, name, f"random (seed {seed})")
    source = model or weights or published
    try:
        loaded = models.load_model(source, dtype, device)
    except FileNotFoundError as error:
        if model is None and weights is None:
            raise FileNotFoundError(f"{error} Or name a folder with --weights, or take --random_weights.") from error
        raise
    return LoadedModel(loaded, models.load_tokenizer(tokenizer or source), name, source)
