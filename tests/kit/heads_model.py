"""Tiny models of several families, whose attention heads are dropped by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparseopt.topk_attention import TopKHeads

KINDS = ["llama", "gpt2", "qwen2", "qwen3"]


def tiny(kind: str, **options: Any) -> Any:
    """2 layers of 4 query heads (2 of keys and values in all but GPT-2); Qwen3's heads are wider than hidden / heads."""
    import transformers

    torch.manual_seed(0)
    common: dict[str, Any] = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **options}
    if kind == "gpt2":
        gpt2 = {
            "n_positions": 32,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        }
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**gpt2, **common))
    sizes: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 32, "initializer_range": 0.2,
    }  # fmt: skip
    if kind == "qwen3":
        sizes["head_dim"] = 12
    name = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[kind]
    config = getattr(transformers, f"{name}Config")(**sizes, **common)
    return getattr(transformers, f"{name}ForCausalLM")(config)


def tokens(seed: int = 1, size: int = 3) -> Tensor:
    return torch.randint(3, 64, (size, 12), generator=torch.Generator().manual_seed(seed))


def loss_of(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids).loss


def drop(top: TopKHeads, *patterns: str) -> None:
    """ "1010": the second and the last head of a layer are dropped."""
    for name, pattern in zip(top.heads, patterns, strict=True):
        top.heads[name] = torch.tensor([flag == "1" for flag in pattern])
