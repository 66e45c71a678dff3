"""GradientProjector.losses: the same losses and rows as through the logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import sparseopt as so

pytest.importorskip("sparseopt.projection.losses")


@pytest.mark.parametrize("options", [{}, {"include_embeddings": True}, {"layers": "lm_head,mlp"}], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_losses_and_rows(name: str, reduction: str, options: dict[str, Any], tools: Any) -> None:
    model, batch = tools.models[name](), tools.padded_batch()
    p = so.GradientProjector(model, dtype="float32", **options)
    counts = (batch["labels"][:, 1:] != -100).sum(1) if reduction == "sum" else 1
    expected = tools.sample_losses(model, batch) * counts
    rows = tools.exact_rows(model, p.metadata, batch)
    if reduction == "sum":
        rows = rows * counts[:, None]
    with p:
        losses = p.losses(**batch, reduction=reduction)
        losses.sum().backward()
    torch.testing.assert_close(losses, expected.detach(), rtol=1e-5, atol=1e-5)
    tools.assert_same(p.collect(), rows, p.metadata, 1e-5)


def test_padding_is_no_target_by_default(tools: Any) -> None:
    model, batch = tools.tiny_gpt2(), tools.padded_batch()
    p = so.GradientProjector(model)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    with p:
        losses = p.losses(batch["input_ids"], batch["attention_mask"])
    torch.testing.assert_close(losses, tools.sample_losses(model, batch | {"labels": labels}), rtol=1e-5, atol=1e-5)


def test_only_inside_the_block(tools: Any) -> None:
    with pytest.raises(ValueError, match="inside `with projector:` only"):
        so.GradientProjector(tools.tiny_gpt2()).losses(torch.zeros(1, 4, dtype=torch.int64))
