"""Layers whose masks are whole rows or columns: gradients and training equal those of whole gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from structured_model import group_mask, loss_of, make_masks, make_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import sparseopt as so
from sparseopt.optim import structured

CHECKPOINTING = [None, "reentrant", "non-reentrant"]
TOLERANCE = {
    torch.float32: {"rtol": 1e-6, "atol": 1e-7},
    torch.bfloat16: {"rtol": 1e-2, "atol": 1e-4},
    torch.float64: {"rtol": 1e-12, "atol": 1e-14},
}


def optimizer_for(model: nn.Module, masks: Any, capture: bool = True, **options: Any) -> so.SparseAdamW:
    return so.SparseAdamW(model.named_parameters(), lr=0.02, masks=masks, capture_gradients=capture, **options)


def captured(opt: so.SparseAdamW) -> dict[str, Tensor]:
    assert opt._capture is not None
    return {name: values.clone() for name, values in opt._capture.pending().items()}


# ---- gradients -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("grain", [None, "row", "column"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_captured_gradients_equal_dense_ones(dtype: torch.dtype, grain: str | None, checkpointing: str | None) -> None:
    model, dense = make_model(dtype, checkpointing=checkpointing), make_model(dtype)
    masks = make_masks(model, grain)
    opt = optimizer_for(model, masks)
    with so.sparse_linear(model, masks) as found:
        assert len(found.layers) == (8 if grain is None else 10)
        loss_of(model, 0).backward()
    loss_of(dense, 0).backward()
    values = captured(opt)
    for name, param in dense.named_parameters():
        if masks[name].any():
            assert param.grad is not None
            torch.testing.assert_close(values[name], param.grad[masks[name]].float(), **TOLERANCE[dtype])
    assert all(param.grad is None for param in model.parameters())


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("grain", ["row", "column"])
@pytest.mark.parametrize("shape", [(12,), (5, 12), (2, 5, 12), (2, 3, 5, 12)], ids=["1-D", "2-D", "3-D", "4-D"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("count", [1, 3, "all but one"])
def test_one_layer(kind: str, grain: str, shape: tuple[int, ...], bias: bool, count: int | str) -> None:
    """All gradients, the input's and the bias's too, without an optimizer: then .grad is dense, and 0 elsewhere."""
    torch.manual_seed(0)
    layer: Any = nn.Linear(12, 10, bias=bias) if kind == "linear" else Conv1D(10, 12)
    if kind == "conv1d" and not bias:
        layer.bias.requires_grad_(False)
    layer = layer.double()
    dense = copy.deepcopy(layer)
    size = layer.weight.shape[0 if grain == "row" else 1]
    indices = list(range(1, size)) if count == "all but one" else list(range(1, 2 * int(count), 2))
    mask = group_mask(tuple(layer.weight.shape), grain, indices)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    with so.sparse_linear(layer, {"weight": mask}) as found:
        assert found.layers == {"weight": grain}
        ours, theirs = layer(x), dense(y)
        assert torch.equal(ours, theirs)
        direction = torch.randn_like(ours)
        ours.backward(direction)
    theirs.backward(direction)
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.weight.grad, torch.where(mask, dense.weight.grad, 0), rtol=1e-12, atol=1e-12)
    if layer.bias is not None and layer.bias.requires_grad:
        torch.testing.assert_close(layer.bias.grad, dense.bias.grad, rtol=1e-12, atol=1e-12)
    ours = layer(x.detach()).sum()
    ours.backward()
    assert layer.weight.grad.ne(0)[~mask].any(), "afterwards all of it is computed"


def test_double_precision_and_filled_up_indices(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where the number of rows or columns is filled up to a multiple of 8."""
    monkeypatch.setitem(structured.ALIGNMENT, "cpu", 8)
    model, dense = make_model(torch.float64), make_model(torch.float64)
    masks = make_masks(model)
    opt = optimizer_for(model, masks)
    with so.sparse_linear(model, masks):
        assert all(structured.use_of(p).where.numel() % 8 == 0 for p in model.parameters() if structured.use_of(p))
        loss_of(model, 0).backward()
    loss_of(dense, 0).backward()
    for name, values in captured(opt).items():
        expected = dense.get_parameter(name).grad
        assert expected is not None
        torch.testing.assert_close(values, expected[masks[name]], rtol=1e-12, atol=1e-14)


def test_every_use_counts() -> None:
    """One block used three times, two micro-batches, a retained graph, and a direct use of a weight beside its layer."""
    for checkpointing in CHECKPOINTING:
        model = make_model(shared=True, checkpointing=checkpointing)
        dense = make_model(shared=True)
        masks = make_masks(model)
        opt = optimizer_for(model, masks)
        with so.sparse_linear(model, masks):
            for seed in (0, 1):
                for m in (model, dense):
                    loss = loss_of(m, seed) + 0.1 * m.blocks[0].fused.weight.square().sum()
                    loss.backward(retain_graph=checkpointing is None)
                    if checkpointing is None:
                        loss.backward()
        values = captured(opt)
        for name, param in dense.named_parameters():
            if param.grad is not None and masks[name].any():
                torch.testing.assert_close(values[name], param.grad[masks[name]], rtol=1e-5, atol=1e-7)
        assert "blocks.0.fused.weight" in values


def test_autocast_keeps_and_computes_in_its_dtype() -> None:
    kept: list[torch.dtype] = []
    models = [make_model(), make_model()]
    masks = make_masks(models[0])
    opt = optimizer_for(models[0], masks)
    with so.sparse_linear(models[0], masks), torch.autocast("cpu", torch.bfloat16):

        def pack(tensor: Tensor) -> Tensor:
            if tensor.dim() == 3 and tensor.shape[-1] == 3:  # the columns 1, 5, 15 of the first layer
                kept.append(tensor.dtype)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            losses = [loss_of(model, 0) for model in models]
        with torch.autocast("cpu", enabled=False):
            for loss in losses:
                loss.backward()
    assert kept == [torch.bfloat16]
    for name, values in captured(opt).items():
        expected = models[1].get_parameter(name).grad
        assert expected is not None
        torch.testing.assert_close(values, expected[masks[name]], rtol=1e-2, atol=1e-4)


# ---- training --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.1}, {"master_weights": "fp32", "amsgrad": True}])
def test_trains_as_with_whole_gradients(options: dict[str, Any], dtype: torch.dtype, checkpointing: str | None) -> None:
    models = [make_model(dtype, checkpointing=checkpointing) for _ in range(2)]
    start = copy.deepcopy(models[0])
    masks = make_masks(start)
    found = so.sparse_linear(models[0], masks)
    for model in models:
        model.embedding.requires_grad_(False)
    opts = [optimizer_for(model, masks, **options) for model in models]
    for step in range(4):
        for model, opt in zip(models, opts, strict=True):
            for micro in (0, 1):
                (loss_of(model, 2 * step + micro) / 2).backward()
            opt.step()
            model.zero_grad()
        if "max_grad_norm" in options:
            torch.testing.assert_close(opts[0].grad_norm(), opts[1].grad_norm(), rtol=1e-2, atol=0)
    found.remove()
    for (name, ours), theirs in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        before = start.get_parameter(name)
        assert torch.equal(ours[~masks[name]], before[~masks[name]]), name
        if masks[name].any():
            assert not torch.equal(ours, before), name
        tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 4e-3}
        torch.testing.assert_close(ours, theirs, **tolerance)


def test_bit_for_bit_where_no_sum_is_ordered_otherwise() -> None:
    """One token: each entry of dW is one product, and training under columns equals training with whole gradients exactly."""
    layers = []
    mask = group_mask((6, 16), "column", [0, 7, 15])
    for part in (True, False):
        torch.manual_seed(1)
        layer = nn.Linear(16, 6, bias=False)
        if part:
            so.sparse_linear(layer, {"weight": mask})
        opt = so.SparseAdamW([("weight", layer.weight)], lr=0.1, masks={"weight": mask}, capture_gradients=True)
        for step in range(5):
            x = torch.randn(1, 16, generator=torch.Generator().manual_seed(step))
            layer(x).square().sum().backward()
            opt.step()
        layers.append(layer.weight.detach())
    assert torch.equal(*layers)


def test_the_optimizer_may_come_first_or_last_and_state_moves_on(tmp_path: Any) -> None:
    model = make_model()
    masks = make_masks(model)
    opt = optimizer_for(model, masks)
    loss_of(model, 0).backward()
    opt.step()  # its state is laid out, and its last gradients were whole
    found = so.sparse_linear(model, masks)
    loss_of(model, 1).backward()
    torch.save(opt.state_dict(), tmp_path / "state.pt")
    opt.step()
    again = optimizer_for(model, masks)  # another optimizer takes over: gradients go to it
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    loss_of(model, 2).backward()
    assert set(captured(again)) >= set(found.layers)
    again.step()
    assert found.layers
    found.remove()


@pytest.mark.parametrize("capture", [True, False])
def test_masks_that_change_are_followed(capture: bool) -> None:
    model, dense = make_model(), make_model()
    masks = make_masks(model)
    opt = optimizer_for(model, masks, capture, unmasked="freeze")
    found = so.sparse_linear(model, masks)
    for change in range(4):
        new = dict(masks)
        new["head.weight"] = group_mask((13, 16), "row", [change, 5])
        new["blocks.0.fused.weight"] = torch.rand((48, 16), generator=torch.Generator().manual_seed(change)) < 0.3
        new["blocks.1.fused.weight"] = torch.ones(48, 16, dtype=torch.bool)
        new["blocks.2.fused.weight"] = group_mask((48, 16), "row", [3])  # was frozen
        opt.update_masks(new if change % 2 == 0 else masks)
        now = new if change % 2 == 0 else masks
        dense.load_state_dict(model.state_dict())
        dense.zero_grad()
        for m in (model, dense):
            loss_of(m, change).backward()
        params = dict(model.named_parameters())
        values = captured(opt) if capture else {n: p.grad[now[n]] for n, p in params.items() if p.grad is not None}
        for name, param in dense.named_parameters():
            if now[name].any():
                assert param.grad is not None
                torch.testing.assert_close(values[name], param.grad[now[name]], rtol=1e-5, atol=1e-7)
        opt.step()
        model.zero_grad()
    found.remove()


def test_other_masks_than_the_optimizers_are_refused() -> None:
    model = make_model()
    masks = make_masks(model)
    other = {**masks, "head.weight": group_mask((13, 16), "column", [1, 2])}
    opt = optimizer_for(model, masks)
    so.sparse_linear(model, other)
    with pytest.raises(ValueError, match=r"'head\.weight' is not the one that sparse_linear\(\) was given"):
        opt.initialize_state()
    model = make_model()
    opt = optimizer_for(model, masks)
    opt.initialize_state()
    with pytest.raises(ValueError, match=r"'head\.weight' is not the one"):
        so.sparse_linear(model, other)
    loss_of(model, 0).backward()
    assert not any(structured.is_structured(module) for module in model.modules()), "nothing was left changed"


def test_an_observer_sees_whole_gradients() -> None:
    model, dense = make_model(), make_model()
    masks = make_masks(model)
    opt = optimizer_for(model, masks)
    seen: dict[int, Tensor] = {}
    with so.sparse_linear(model, masks):
        opt.observe_gradients(lambda param, gradient: seen.update({id(param): gradient.clone()}))
        loss_of(model, 0).backward()
        loss_of(dense, 0).backward()
        torch.testing.assert_close(seen[id(model.head.weight)], dense.head.weight.grad)
        opt.observe_gradients(None)
        seen.clear()
        loss_of(model, 0).backward()
        assert not seen


def test_masks_may_not_change_between_forward_and_backward() -> None:
    model = make_model()
    masks = make_masks(model)
    found = so.sparse_linear(model, masks)
    loss = loss_of(model, 0)
    found.remove()
    with pytest.raises(RuntimeError, match="between forward and backward"):
        loss.backward()
