"""Shapes: the published parameter counts, and agreement of the arithmetic with what transformers builds."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparseopt.shapes import SHAPES, build_shape, linear_shapes, parameter_count, parameter_shapes, shape_config

# What the published models hold, tied weights counted once.
PUBLISHED = {
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.1-8b": 8_030_261_248,
    "qwen2.5-0.5b": 494_032_768,
    "gpt2": 124_439_808,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_counts(name: str) -> None:
    assert parameter_count(name) == PUBLISHED[name]


@pytest.mark.parametrize("name", SHAPES)
def test_arithmetic_agrees_with_the_model(name: str) -> None:
    model = build_shape(name, device="meta")
    assert {n: tuple(p.shape) for n, p in model.named_parameters()} == parameter_shapes(name)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"}
    linears.pop("lm_head")
    sizes = {}
    for module, layer in linears.items():
        weight = layer.weight.shape if isinstance(layer, nn.Linear) else layer.weight.shape[::-1]
        sizes[module] = tuple(weight)
    assert sizes == linear_shapes(name)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == SHAPES[name].tied
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())


def test_build_is_reproducible_and_leaves_the_random_state() -> None:
    before = torch.random.get_rng_state()
    first, again, other = (build_shape("tiny", device="cpu", seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    for name, param in first.named_parameters():
        assert torch.equal(param, again.get_parameter(name))
    name = "model.embed_tokens.weight"
    assert not torch.equal(first.get_parameter(name), other.get_parameter(name))
    assert first.config._attn_implementation == "sdpa"
    ids = torch.arange(16)[None]
    assert torch.isfinite(first(input_ids=ids).logits).all()
    assert torch.get_default_dtype() == torch.float32


def test_rope_theta_reaches_the_config() -> None:
    config = shape_config("llama-3.2-1b")
    assert config.rope_parameters["rope_theta"] == 500_000.0
    assert config.head_dim == 64


def test_unknown_shape_names_the_choices() -> None:
    with pytest.raises(ValueError, match=r"unknown shape 'gpt3'.*llama-3\.2-1b.*gpt2"):
        build_shape("gpt3", device="cpu")
