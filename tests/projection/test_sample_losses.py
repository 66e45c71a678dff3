"""One loss per sample of a model, against all its logits: padding, labels, heads of several families, a projected head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparseopt.projection.losses import HeadSlice, per_sample_losses

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def tiny(family: str, **more: Any) -> Any:
    """A random model of two layers."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    if family == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32}
        config = transformers.GPT2Config(vocab_size=150, bos_token_id=0, eos_token_id=0, **sizes, **more)
    else:
        name = {"llama": "Llama", "gemma2": "Gemma2", "cohere": "Cohere", "granite": "Granite"}[family]
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
        if family == "gemma2":
            sizes["head_dim"] = 16
        config = getattr(transformers, f"{name}Config")(
            vocab_size=150, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2, **sizes, **more
        )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)  # logits far from uniform
    return model.requires_grad_(False)


def batch() -> tuple[Tensor, Tensor]:
    ids, mask = torch.randint(3, 150, (4, 11)), torch.ones(4, 11, dtype=torch.int64)
    mask[1, 6:] = 0
    mask[2, 2:] = 0
    mask[3, 1:] = 0  # nothing to predict
    return ids, mask


def from_logits(model: Any, ids: Tensor, mask: Tensor, labels: Tensor, reduction: str) -> Tensor:
    """Each sample by itself, from all its logits."""
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].double()
    losses = [F.cross_entropy(x, y, reduction="sum") for x, y in zip(logits, labels[:, 1:], strict=True)]
    counts = (labels[:, 1:] != -100).sum(1)
    return torch.stack(losses) / (counts.clamp(min=1) if reduction == "mean" else 1)


FAMILIES = {
    "gpt2": {},
    "llama": {},
    "gemma2": {"final_logit_softcapping": 3.0},
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 3.0},
}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("family", FAMILIES)
def test_models(family: str, reduction: str) -> None:
    model, (ids, mask) = tiny(family, **FAMILIES[family]), batch()
    inside = next(p for name, p in model.named_parameters() if "layers.0" in name or "h.0" in name).requires_grad_()
    losses = per_sample_losses(model, ids, mask, reduction=reduction)
    expected = from_logits(model, ids, mask, ids.masked_fill(mask == 0, -100), reduction)
    assert losses.dtype == torch.float32
    assert losses[3] == 0
    torch.testing.assert_close(losses.double(), expected, rtol=2e-6, atol=1e-6)
    upstream = torch.randn(4)
    gradients = [
        torch.autograd.grad((x * upstream.to(x.dtype)).sum(), inside, retain_graph=True)[0] for x in (losses, expected)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5 * float(gradients[1].abs().max()))


def test_batch_and_padding_change_nothing() -> None:
    model, (ids, mask) = tiny("llama"), batch()
    together = per_sample_losses(model, ids, mask)
    alone = torch.cat([per_sample_losses(model, i[None, : m.sum()]) for i, m in zip(ids, mask, strict=True)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


def test_left_padding_predicts_nothing_from_padding() -> None:
    model, ids = tiny("llama"), torch.randint(3, 150, (1, 8))
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.int64), ids], 1)
    losses = per_sample_losses(model, padded, (padded != 0).long(), reduction="sum")
    torch.testing.assert_close(losses, per_sample_losses(model, ids, reduction="sum"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_labels(reduction: str) -> None:
    model, (ids, mask) = tiny("gpt2"), batch()
    labels = torch.randint(0, 150, (4, 11))
    labels[0, :7] = labels[2] = -100
    losses = per_sample_losses(model, ids, mask, labels, reduction)
    torch.testing.assert_close(losses.double(), from_logits(model, ids, mask, labels, reduction), rtol=2e-6, atol=1e-6)
    assert losses[2] == 0


def test_head_with_bias() -> None:
    model, (ids, mask) = tiny("gpt2"), batch()
    biased = nn.Linear(32, 150).requires_grad_(False)
    model.set_output_embeddings(biased)
    assert biased.bias.abs().max() > 0.1
    expected = from_logits(model, ids, mask, ids.masked_fill(mask == 0, -100), "mean")
    torch.testing.assert_close(per_sample_losses(model, ids, mask).double(), expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize(("dtype", "autocast"), [*((d, False) for d in DTYPES), (torch.float32, True)], ids=str)
def test_dtypes_and_autocast(dtype: torch.dtype, autocast: bool) -> None:
    model, (ids, mask) = tiny("llama"), batch()
    expected = from_logits(model, ids, mask, ids.masked_fill(mask == 0, -100), "mean")
    model.to(dtype)
    inside = model.model.layers[0].mlp.down_proj.weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        losses = per_sample_losses(model, ids, mask)
    assert losses.dtype == torch.float32
    tolerance = 0.05 if autocast else {torch.float32: 2e-6, torch.bfloat16: 0.05, torch.float16: 0.01}[dtype]
    torch.testing.assert_close(losses.double(), expected, rtol=tolerance, atol=tolerance)
    gradient = torch.autograd.grad(losses.sum(), inside)[0]
    assert gradient.dtype == dtype
    assert gradient.isfinite().all()
    assert gradient.any()


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_models_compile_as_one_graph(family: str) -> None:
    model, (ids, mask) = tiny(family, **FAMILIES[family]), batch()
    inside = next(p for name, p in model.named_parameters() if "layers.0" in name or "h.0" in name).requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(lambda i, m: per_sample_losses(model, i, m), fullgraph=True, backend="aot_eager")
    results = []
    for losses in (per_sample_losses(model, ids, mask), compiled(ids, mask)):
        results.append([losses, torch.autograd.grad(losses.sum(), inside)[0]])
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager, rtol=1e-5, atol=1e-6)


def test_projected_tied_head_of_a_model() -> None:
    """The head's use of GPT-2's tied weight: its slice, from the model's own losses."""
    model, (ids, mask) = tiny("gpt2"), batch()
    untied = nn.Linear(32, 150, bias=False)
    untied.weight.data = model.transformer.wte.weight.data.clone()
    output, inputs = torch.randn(8, 150), torch.randn(8, 32)
    leaf = torch.zeros(4, 8, 8, requires_grad=True)
    per_sample_losses(model, ids, mask, project=[HeadSlice(leaf, output, inputs)]).sum().backward()
    model.set_output_embeddings(untied.requires_grad_())
    losses = from_logits(model, ids, mask, ids.masked_fill(mask == 0, -100), "mean")
    assert leaf.grad is not None
    for sample in range(4):
        exact = torch.autograd.grad(losses[sample], untied.weight, retain_graph=True)[0]
        torch.testing.assert_close(leaf.grad[sample], output @ exact @ inputs.t(), rtol=1e-4, atol=1e-5)


def test_refused_models_and_arguments() -> None:
    transformers = pytest.importorskip("transformers")
    model, (ids, mask) = tiny("llama"), batch()
    with pytest.raises(ValueError, match="reduction must be 'mean' or 'sum', got 'none'"):
        per_sample_losses(model, ids, mask, reduction="none")
    with pytest.raises(ValueError, match=r"labels must have the shape of input_ids \[4, 11\], got int64\[4, 10\]"):
        per_sample_losses(model, ids, mask, ids[:, 1:])
    with pytest.raises(ValueError, match=r"input_ids must be \[B, T\], got int64\[11\]"):
        per_sample_losses(model, ids[0])
    with pytest.raises(ValueError, match="needs a causal language model with a linear head, got LlamaModel"):
        per_sample_losses(model.model, ids, mask)
    with pytest.raises(ValueError, match="needs a causal language model with a linear head, got Linear"):
        per_sample_losses(nn.Linear(3, 3), ids, mask)
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=150, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )
    with pytest.raises(ValueError, match="needs a decoder that `base_model` holds without its head, got T5"):
        per_sample_losses(t5, ids, mask)
    for name, value in (("logits_scaling", 2.0), ("output_multiplier", 0.5), ("logit_scale", "inv_sqrt_d_model")):
        model = tiny("llama")
        setattr(model.config, name, value)
        with pytest.raises(ValueError, match=f"does not know how LlamaForCausalLM changes its logits: {name} is "):
            per_sample_losses(model, ids, mask)
        setattr(model.config, name, 1.0)
        assert per_sample_losses(model, ids, mask).isfinite().all()
    model.lm_head.weight.requires_grad_()
    with pytest.raises(ValueError, match="the weight of linear_cross_entropy gets no gradient"):
        per_sample_losses(model, ids, mask)
