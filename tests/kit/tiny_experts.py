"""Tiny random mixtures of experts of three classes, and masks of uneven rows and columns of their experts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GptOssConfig, MixtralConfig, Qwen3MoeConfig
from transformers.integrations import moe

import sparseopt as so

KINDS = ("mixtral", "qwen3_moe", "gpt_oss")  # gpt_oss holds its matrices the other way round, and has biases
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
VOCAB, EXPERTS = 64, 4


def make_moe(
    kind: str, implementation: str, dtype: torch.dtype = torch.float32, checkpointing: str | None = None
) -> Any:
    common: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "head_dim": 8, "num_experts_per_tok": 2, "intermediate_size": 24, "tie_word_embeddings": False,
    }  # fmt: skip
    config: Any
    if kind == "mixtral":
        config = MixtralConfig(**common, num_local_experts=EXPERTS)
    elif kind == "qwen3_moe":
        config = Qwen3MoeConfig(**common, moe_intermediate_size=24, num_experts=EXPERTS)
    else:
        config = GptOssConfig(**common, num_local_experts=EXPERTS)
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config, experts_implementation=implementation)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "experts" in name:
                param.normal_(0, 0.3)
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
        model.enable_input_require_grads()
    return model.to(dtype)


def expert_mask(shape: tuple[int, ...], grain: str, counts: list[int], generator: torch.Generator) -> Tensor:
    """``counts[e]`` random rows or columns of each expert."""
    mask = torch.zeros(shape, dtype=torch.bool)
    dim = 0 if grain == "row" else 1
    for matrix, count in zip(mask, counts, strict=True):
        matrix.index_fill_(dim, torch.randperm(matrix.shape[dim], generator=generator)[:count], True)
    return mask


def expert_masks(model: nn.Module, grain: str, even: bool = False) -> dict[str, Tensor]:
    """Rows or columns of the experts: three of each, or 5, none, 1 and all of them. All else is all active."""
    generator = torch.Generator().manual_seed(1)
    masks = {}
    for name, param in model.named_parameters():
        shape = tuple(param.shape)
        if param.dim() == 3:
            counts = [3] * EXPERTS if even else [5, 0, 1, shape[1 if grain == "row" else 2]]
            masks[name] = expert_mask(shape, grain, counts, generator)
        else:
            masks[name] = torch.ones(shape, dtype=torch.bool)
    return masks


def loss_of(model: Any, seed: int, tokens: int = 7) -> Tensor:
    ids = torch.randint(0, VOCAB, (2, tokens), generator=torch.Generator().manual_seed(seed))
    return F.cross_entropy(model(ids, use_cache=False).logits.float().flatten(0, 1), ids.roll(1, 1).flatten())


def grouped_mm_stays() -> Iterator[None]:
    """For a fixture: what is patched while experts are structured is as it was at the end of a test."""
    before = moe._grouped_mm
    yield
    assert moe._grouped_mm is before


def optimizer_for(model: nn.Module, masks: Any, **options: Any) -> so.SparseAdamW:
    return so.SparseAdamW(model.named_parameters(), lr=0.02, masks=masks, capture_gradients=True, **options)


def captured(opt: so.SparseAdamW) -> dict[str, Tensor]:
    assert opt._capture is not None
    return {name: values.clone() for name, values in opt._capture.pending().items()}


def experts_of(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: param for name, param in model.named_parameters() if param.dim() == 3}


def compare(values: dict[str, Tensor], dense: nn.Module, masks: Any, tolerance: float) -> None:
    """Relative to the gradient's norm: what each parameter's entries have captured, and the dense gradients there."""
    for name, param in dense.named_parameters():
        assert param.grad is not None, name
        expected = param.grad[masks[name]].float()
        error = (values[name].float() - expected).norm()
        assert error <= tolerance * expected.norm(), f"{name}: {error / expected.norm()}"
