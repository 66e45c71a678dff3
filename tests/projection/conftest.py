"""Tiny models, batches with padding and ignored labels, and the slow way to a projection."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from sparseopt.projection.layers import project_gradient

VOCABULARY = 61
PAD = 3


def tiny_gpt2(dtype: torch.dtype = torch.float32, layers: int = 2, **options: Any) -> nn.Module:
    """Conv1D layers, positions learned, head tied to the embedding, biases."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=16, n_embd=32, n_layer=layers, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, pad_token_id=None, **options,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model


def tiny_llama(dtype: torch.dtype = torch.float32, layers: int = 2, **options: Any) -> nn.Module:
    """Linear layers, grouped key and value heads, a gated MLP, an untied head, a padding row in the embedding."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=16, **{"pad_token_id": PAD, "tie_word_embeddings": False} | options,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(dtype).eval()
    with torch.no_grad():  # the usual 0.02 leaves attention nearly uniform
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model


def padded_batch(samples: int = 3, length: int = 9) -> dict[str, Tensor]:
    """Right padding (never the whole of a sample), labels of the padding and of a few more tokens -100."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(4, VOCABULARY, (samples, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(samples):
        padding = (2 * row) % (length - 3)
        if padding:
            mask[row, -padding:] = 0
            ids[row, -padding:] = PAD
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, 1 : 1 + samples].fill_diagonal_(-100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def sample_losses(model: Callable[..., Any], batch: dict[str, Tensor]) -> Tensor:
    """Each sample's mean cross-entropy over its own targets."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    targets = batch["labels"][:, 1:]
    losses = nn.functional.cross_entropy(logits[:, :-1].float().transpose(1, 2), targets, reduction="none")
    return losses.sum(1) / (targets != -100).sum(1)


def exact_rows(
    model: nn.Module,
    metadata: dict[str, Any],
    batch: Any,
    losses: Callable[[nn.Module, Any], Tensor] = sample_losses,
    samples: int | None = None,
) -> Tensor:
    """Every sample's gradient by autograd, alone in its batch, projected by matrices rebuilt from metadata alone."""
    parameters = dict(model.named_parameters())
    rows = []
    for index in range(len(batch["input_ids"]) if samples is None else samples):
        one = {name: value[index : index + 1] for name, value in batch.items()}
        names = [e["name"] if e["name"] in parameters else f"{e['name']}.weight" for e in metadata["layers"]]
        gradients = torch.autograd.grad(losses(model, one).sum(), [parameters[name] for name in names])
        slices = [
            project_gradient(metadata, e["name"], g.float()) for e, g in zip(metadata["layers"], gradients, strict=True)
        ]
        rows.append(torch.cat(slices))
    return torch.stack(rows)


def assert_same(rows: Tensor, expected: Tensor, metadata: dict[str, Any], tolerance: float) -> None:
    """Element by element, relative to the root mean square of the slice's entries over the batch."""
    assert rows.shape == expected.shape
    for layer in metadata["layers"]:
        columns = slice(layer["slice_start"], layer["slice_end"])
        scale = expected[:, columns].square().mean().sqrt()
        assert scale > 0, layer["name"]
        error = (rows[:, columns].float() - expected[:, columns]).abs().max() / scale
        assert error < tolerance, (layer["name"], float(error))


class Tools:
    """What the test modules share (test files cannot import one another)."""

    tiny_gpt2 = staticmethod(tiny_gpt2)
    tiny_llama = staticmethod(tiny_llama)
    padded_batch = staticmethod(padded_batch)
    sample_losses = staticmethod(sample_losses)
    exact_rows = staticmethod(exact_rows)
    assert_same = staticmethod(assert_same)
    models: ClassVar[dict[str, Callable[..., nn.Module]]] = {"gpt2": tiny_gpt2, "llama": tiny_llama}


@pytest.fixture
def tools() -> type[Tools]:
    return Tools
