"""Structured layers under torch.compile: layer by layer and in one piece, without graph breaks, few graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from structured_model import group_mask, loss_of, make_masks, make_model
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import sparseopt as so


@pytest.fixture(autouse=True)
def fresh() -> Any:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def gradients(opt: so.SparseAdamW) -> dict[str, Tensor]:
    assert opt._capture is not None
    return {name: values.clone() for name, values in opt._capture.pending().items()}


def check(model: nn.Module, dense: nn.Module, opt: so.SparseAdamW, masks: dict[str, Tensor], run: Any) -> None:
    """Two steps of two micro-batches, weights that move in between."""
    for step in range(2):
        dense.load_state_dict(model.state_dict())
        dense.zero_grad()
        for micro in (0, 1):
            loss_of(run, 2 * step + micro).backward()
            loss_of(dense, 2 * step + micro).backward()
        assert all(param.grad is None for param in model.parameters()), "no dense gradient is left"
        values = gradients(opt)
        for name, param in dense.named_parameters():
            if masks[name].any():
                assert param.grad is not None
                torch.testing.assert_close(values[name], param.grad[masks[name]], rtol=1e-4, atol=1e-6)
        opt.step()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("checkpointing", [None, "non-reentrant"])
def test_in_one_piece(backend: str, checkpointing: str | None) -> None:
    model, dense = make_model(checkpointing=checkpointing), make_model()
    masks = make_masks(model)
    opt = so.SparseAdamW(model.named_parameters(), masks=masks, capture_gradients=True)
    counter = CompileCounterWithBackend(backend)
    with so.sparse_linear(model, masks):
        check(model, dense, opt, masks, torch.compile(model, backend=counter, fullgraph=True))
    assert counter.frame_count == 1
    assert not counters["graph_break"]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_layer_by_layer(backend: str) -> None:
    """Layers with another number of columns share a graph: the number becomes dynamic at the second of them."""
    model, dense = make_model(), make_model()
    model.blocks.extend(type(model.blocks[0])() for _ in range(9))
    dense.blocks.extend(type(model.blocks[0])() for _ in range(9))
    masks = make_masks(model, "column")
    generator = torch.Generator().manual_seed(0)
    for name, param in model.named_parameters():
        if "blocks" in name and param.dim() == 2:
            count = int(torch.randint(2, 9, (), generator=generator))
            chosen = torch.randperm(param.shape[1], generator=generator)[:count]
            masks[name] = group_mask(tuple(param.shape), "column", chosen.tolist())
    opt = so.SparseAdamW(model.named_parameters(), masks=masks, capture_gradients=True)
    counter = CompileCounterWithBackend(backend)
    with so.sparse_linear(model, masks):
        for block in model.blocks:
            block.compile(backend=counter, fullgraph=True)
        check(model, dense, opt, masks, model)
    assert counter.frame_count <= 4, "the first layer, whose input needs no gradient, and two or three for the others"


def test_removing_and_evaluating_need_no_new_model() -> None:
    model = make_model()
    masks = make_masks(model)
    compiled = torch.compile(model, backend="aot_eager")
    opt = so.SparseAdamW(model.named_parameters(), masks=masks, capture_gradients=True)
    tokens = torch.arange(8).view(2, 4)
    expected = model(tokens).detach()
    with so.sparse_linear(model, masks):
        torch.testing.assert_close(compiled(tokens), expected)
        with torch.no_grad():
            torch.testing.assert_close(compiled(tokens), expected)
    loss_of(compiled, 0).backward()
    assert set(gradients(opt)) >= {name for name, mask in masks.items() if mask.any()}
    torch.testing.assert_close(compiled(tokens), expected)


def test_a_model_that_moved_is_not_traced() -> None:
    model = make_model()
    masks = make_masks(model)
    so.sparse_linear(model, masks)
    model.double()
    with pytest.raises(Exception, match="sparse_linear\\(\\) when the model is where it trains"):
        loss_of(torch.compile(model, backend="aot_eager", fullgraph=True), 0)
