"""Shapes of well-known language models, to be built with random weights: speed and memory without a download.

The figures are those of the published configurations. Nothing trained is in a model that comes from here: whoever shows a
result of one says "random weights" beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = [
    "SHAPES",
    "Shape",
    "build_shape",
    "get_shape",
    "linear_shapes",
    "parameter_count",
    "parameter_shapes",
    "shape_config",
]


@dataclass(frozen=True)
class Shape:
    """Architecture of a causal language model.

    Attributes:
        family: "llama", "qwen2" or "gpt2".
        hidden: width of the residual stream.
        layers: decoder layers.
        heads, kv_heads, head_dim: attention heads, heads of keys and values, width of a head.
        intermediate: width of the feed-forward network.
        vocabulary: tokens.
        tied: whether the output head is the embedding (one parameter, counted once).
        rope_theta: base of the rotary embedding; None: learned positions.
        positions: the longest sequence.
        norm_eps: epsilon of the norms.
    """

    family: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool
    rope_theta: float | None
    positions: int
    norm_eps: float = 1e-5


SHAPES: dict[str, Shape] = {
    "llama-3.2-1b": Shape("llama", 2048, 16, 32, 8, 64, 8192, 128256, True, 500_000.0, 131_072),
    "llama-3.2-3b": Shape("llama", 3072, 28, 24, 8, 128, 8192, 128256, True, 500_000.0, 131_072),
    "llama-3.1-8b": Shape("llama", 4096, 32, 32, 8, 128, 14336, 128256, False, 500_000.0, 131_072),
    "qwen2.5-0.5b": Shape("qwen2", 896, 24, 14, 2, 64, 4864, 151936, True, 1_000_000.0, 32_768, 1e-6),
    "gpt2": Shape("gpt2", 768, 12, 12, 12, 64, 3072, 50257, True, None, 1024),
    "gpt2-medium": Shape("gpt2", 1024, 24, 16, 16, 64, 4096, 50257, True, None, 1024),
    "gpt2-large": Shape("gpt2", 1280, 36, 20, 20, 64, 5120, 50257, True, None, 1024),
    # Not a published model: small enough for tests.
    "tiny": Shape("llama", 64, 2, 4, 2, 16, 128, 256, True, 10_000.0, 512),
}


def get_shape(name: str) -> Shape:
    """The shape called ``name``, in any case.

    Raises:
        ValueError: no such shape.
    """
    shape = SHAPES.get(name.lower())
    if shape is None:
        raise ValueError(f"unknown shape {name!r}: expected one of {', '.join(SHAPES)}.")
    return shape


def shape_config(name: str) -> PretrainedConfig:
    """The transformers configuration of a shape (plain rotary embedding: scaling for long texts is left out).

    Raises:
        ValueError: no such shape.
    """
    import transformers

    shape = get_shape(name)
    if shape.family == "gpt2":
        return transformers.GPT2Config(
            n_embd=shape.hidden, n_layer=shape.layers, n_head=shape.heads, n_inner=shape.intermediate,
            vocab_size=shape.vocabulary, n_positions=shape.positions, layer_norm_epsilon=shape.norm_eps,
            tie_word_embeddings=shape.tied, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
    cls = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config}[shape.family]
    return cls(
        hidden_size=shape.hidden, num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim, intermediate_size=shape.intermediate,
        vocab_size=shape.vocabulary, tie_word_embeddings=shape.tied, max_position_embeddings=shape.positions,
        rms_norm_eps=shape.norm_eps, rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        bos_token_id=0, eos_token_id=1, pad_token_id=None,
    )  # fmt: skip


def build_shape(
    name: str,
    *,
    device: str | torch.device,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    attention: str = "sdpa",
) -> PreTrainedModel:
    """A model of a shape with random weights, made on the device itself, in evaluation mode.

    Args:
        name: a key of ``SHAPES``.
        device: where the weights are made; "meta" for none.
        dtype: of the weights, bf16 unless said.
        seed: of the weights; the caller's random state is left alone.
        attention: transformers' name of the attention implementation.

    Raises:
        ValueError: no such shape.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = shape_config(name)
    target = torch.device(device)
    forked = [target.index or 0] if target.type == "cuda" else []
    with torch.random.fork_rng(devices=forked), target:
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype or torch.bfloat16, attn_implementation=attention)
    return model.eval()


def linear_shapes(name: str) -> dict[str, tuple[int, int]]:
    """Module name -> (outputs, inputs) of every linear layer but the head: what LoRA's "all-linear" adapts.

    Raises:
        ValueError: no such shape.
    """
    shape = get_shape(name)
    h, f = shape.hidden, shape.intermediate
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    if shape.family == "gpt2":
        prefix = "transformer.h"
        layer = {"attn.c_attn": (3 * h, h), "attn.c_proj": (h, h), "mlp.c_fc": (f, h), "mlp.c_proj": (h, f)}
    else:
        prefix = "model.layers"
        layer = {
            "self_attn.q_proj": (q, h), "self_attn.k_proj": (kv, h), "self_attn.v_proj": (kv, h),
            "self_attn.o_proj": (h, q), "mlp.gate_proj": (f, h), "mlp.up_proj": (f, h), "mlp.down_proj": (h, f),
        }  # fmt: skip
    return {f"{prefix}.{i}.{module}": size for i in range(shape.layers) for module, size in layer.items()}


def parameter_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Parameter name -> shape, as ``named_parameters()`` of the built model gives them (order aside); nothing is built.

    Raises:
        ValueError: no such shape.
    """
    shape = get_shape(name)
    h = shape.hidden
    result: dict[str, tuple[int, ...]] = {}
    if shape.family == "gpt2":
        result = {"transformer.wte.weight": (shape.vocabulary, h), "transformer.wpe.weight": (shape.positions, h)}
        for module, (outputs, inputs) in linear_shapes(name).items():
            result |= {f"{module}.weight": (inputs, outputs), f"{module}.bias": (outputs,)}  # Conv1D: [inputs, outputs]
        norms = [f"transformer.h.{i}.{norm}" for i in range(shape.layers) for norm in ("ln_1", "ln_2")]
        for norm in (*norms, "transformer.ln_f"):
            result |= {f"{norm}.weight": (h,), f"{norm}.bias": (h,)}
    else:
        result = {"model.embed_tokens.weight": (shape.vocabulary, h)}
        for module, size in linear_shapes(name).items():
            result[f"{module}.weight"] = size
            if shape.family == "qwen2" and module.endswith(("q_proj", "k_proj", "v_proj")):
                result[f"{module}.bias"] = size[:1]
        for i in range(shape.layers):
            result |= {f"model.layers.{i}.{n}.weight": (h,) for n in ("input_layernorm", "post_attention_layernorm")}
        result["model.norm.weight"] = (h,)
    if not shape.tied:
        result["lm_head.weight"] = (shape.vocabulary, h)
    return result


def parameter_count(name: str) -> int:
    """Parameters of a shape, tied weights counted once.

    Raises:
        ValueError: no such shape.
    """
    return sum(prod(size) for size in parameter_shapes(name).values())
