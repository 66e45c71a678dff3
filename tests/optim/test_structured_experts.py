"""Experts in 3-D weights under masks of rows or columns of each matrix: gradients, training, memory, what is left."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_experts import (
    EXPERTS,
    IMPLEMENTATIONS,
    KINDS,
    captured,
    compare,
    expert_mask,
    expert_masks,
    experts_of,
    grouped_mm_stays,
    loss_of,
    make_moe,
    optimizer_for,
)
from torch import Tensor, nn

import sparseopt as so
from sparseopt.optim import structured

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2}

nothing_is_left = pytest.fixture(autouse=True)(grouped_mm_stays)


def inputs_for(dtype: torch.dtype, tokens: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, their two experts each, and the weights of those, for a module of experts alone."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.rand(tokens, EXPERTS, generator=generator).argsort(1)[:, :2]
    shares = torch.full((tokens, 2), 0.5, dtype=dtype)
    return torch.randn(tokens, 16, generator=generator).to(dtype).requires_grad_(), ids, shares


# ---- gradients -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("even", [True, False], ids=["even", "uneven"])
@pytest.mark.parametrize("grain", ["row", "column"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_captured_gradients_equal_dense_ones(
    kind: str, implementation: str, dtype: torch.dtype, grain: str, even: bool
) -> None:
    """Those of all other parameters too: the experts' inputs get theirs. Every forward is the module's, bit for bit."""
    model, dense = make_moe(kind, implementation, dtype), make_moe(kind, implementation, dtype)
    masks = expert_masks(model, grain, even)
    opt = optimizer_for(model, masks)
    with so.sparse_linear(model, masks) as found:
        assert found.layers == dict.fromkeys(experts_of(model), grain)
        losses = [loss_of(m, 0) for m in (model, dense)]
        assert torch.equal(*losses)
        for loss in losses:
            loss.backward()
    compare(captured(opt), dense, masks, TOLERANCE[dtype])
    assert all(param.grad is None for param in model.parameters())


@pytest.mark.parametrize("checkpointing", ["reentrant", "non-reentrant"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_checkpointing_and_micro_batches(implementation: str, checkpointing: str) -> None:
    model = make_moe("mixtral", implementation, checkpointing=checkpointing).train()
    dense = make_moe("mixtral", implementation)
    masks = expert_masks(model, "column")
    opt = optimizer_for(model, masks)
    with so.sparse_linear(model, masks):
        for seed in (0, 1, 2):
            loss_of(model, seed).backward()
            loss_of(dense, seed).backward()
    compare(captured(opt), dense, masks, 2e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind: str, implementation: str) -> None:
    model, dense = make_moe(kind, implementation), make_moe(kind, implementation)
    masks = expert_masks(model, "column")
    opt = optimizer_for(model, masks)
    with so.sparse_linear(model, masks):
        with torch.autocast("cpu", torch.bfloat16):
            losses = [loss_of(m, 0) for m in (model, dense)]
        for loss in losses:
            loss.backward()
    compare(captured(opt), dense, masks, 1e-2)


@pytest.mark.parametrize("grain", ["row", "column"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_experts_without_tokens(implementation: str, grain: str) -> None:
    """One sequence of one token goes to two of four experts: the others' gradients are 0."""
    model = make_moe("gpt_oss", implementation)
    masks = expert_masks(model, grain, even=True)
    opt = optimizer_for(model, masks)
    ids = torch.tensor([[3]])
    with so.sparse_linear(model, masks):
        model(ids, use_cache=False).logits.square().sum().backward()
    dense = make_moe("gpt_oss", implementation)
    dense(ids, use_cache=False).logits.square().sum().backward()
    values = captured(opt)
    for name, param in experts_of(dense).items():
        assert param.grad is not None
        assert (param.grad != 0).any((1, 2)).sum() == 2
        assert torch.equal(values[name] != 0, param.grad[masks[name]] != 0)
        torch.testing.assert_close(values[name], param.grad[masks[name]], rtol=1e-5, atol=1e-6)


def test_filled_up_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where numbers of rows or columns are filled up to a multiple of 8; without an optimizer."""
    monkeypatch.setitem(structured.ALIGNMENT, "cpu", 8)
    for implementation in IMPLEMENTATIONS:
        for grain in ("row", "column"):
            for even in (True, False):
                model, dense = make_moe("qwen3_moe", implementation), make_moe("qwen3_moe", implementation)
                masks = expert_masks(model, grain, even)
                with so.sparse_linear(model, masks):
                    for m in (model, dense):
                        loss_of(m, 0).backward()
                for name, param in experts_of(dense).items():
                    expected = torch.where(masks[name], param.grad, 0)
                    torch.testing.assert_close(experts_of(model)[name].grad, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled(dtype: torch.dtype, implementation: str, backend: str) -> None:
    """In one graph where transformers' own can be: a loop over the experts breaks it. Even and uneven numbers share it."""
    torch._dynamo.reset()
    modules = [make_moe("mixtral", implementation, dtype).model.layers[0].mlp.experts for _ in range(2)]
    inputs = inputs_for(dtype)
    runs = [torch.compile(m, backend=backend, fullgraph=implementation != "eager") for m in modules]
    for grain in ("row", "column"):
        masks = expert_masks(modules[0], grain)
        opt = optimizer_for(modules[0], masks)
        with so.sparse_linear(modules[0], masks):
            for module, run in zip(modules, runs, strict=True):
                module.zero_grad()
                run(*inputs).float().square().sum().backward()
        compare(captured(opt), modules[1], masks, TOLERANCE[dtype])
        assert all(param.grad is None for param in modules[0].parameters())
        opt._capture.disarm()
    torch._dynamo.reset()


def test_the_operator_is_one() -> None:
    from sparseopt.optim.expert_products import _grouped_outer

    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(9, 3, generator=generator), torch.randn(9, 5, generator=generator)
    ends = torch.tensor([0, 4, 4, 8], dtype=torch.int32)  # the first and third without rows, one row of nobody
    torch.library.opcheck(_grouped_outer, (left, right, ends))
    expected = torch.zeros(4, 3, 5)
    expected[1], expected[3] = left[:4].T @ right[:4], left[4:8].T @ right[4:8]
    torch.testing.assert_close(_grouped_outer(left, right, ends), expected)


# ---- what it spares --------------------------------------------------------------------------------------------------
class Kept:
    """Bytes that a forward keeps for the backward, weights apart, each storage once."""

    def __init__(self, model: nn.Module) -> None:
        self.weights = {param.untyped_storage().data_ptr() for param in model.parameters()}

    def __call__(self, module: nn.Module, x: Tensor, ids: Tensor, shares: Tensor) -> int:
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self.weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            assert module(x, ids, shares).requires_grad
        return sum(kept.values())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bytes_kept_under_columns(implementation: str) -> None:
    """Of both weights' inputs, 16 and 24 features wide, two columns are kept; batched products keep no copy of weights."""
    model = make_moe("mixtral", implementation)
    experts = model.model.layers[0].mlp.experts
    inputs = inputs_for(torch.float32)
    generator = torch.Generator().manual_seed(2)
    masks = {
        name: expert_mask(tuple(param.shape), "column", [2] * EXPERTS, generator)
        for name, param in experts.named_parameters()
    }
    dense = Kept(model)(experts, *inputs)
    with so.sparse_linear(experts, masks):
        ours = Kept(model)(experts, *inputs)
    rows = inputs[1].numel()
    spared = 4 * rows * (16 - 2 + 24 - 2)
    if implementation == "batched_mm":
        spared += 4 * rows * (48 * 16 + 16 * 24)  # each token's matrices
    indices = 8 * rows  # each product keeps its own at most
    assert spared - 2 * indices <= dense - ours <= spared + 2 * indices


def test_no_gradient_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    take = structured._Deliver.__call__

    def seen(self: Any, leaf: Tensor) -> None:
        assert leaf.grad is not None
        sizes.append(leaf.grad.numel())
        take(self, leaf)

    monkeypatch.setattr(structured._Deliver, "__call__", seen)
    for implementation in IMPLEMENTATIONS:
        model = make_moe("mixtral", implementation)
        masks = expert_masks(model, "column")
        sizes.clear()
        opt = optimizer_for(model, masks)
        with so.sparse_linear(model, masks):
            assert all(structured.use_of(p).leaf.untyped_storage().nbytes() == 4 for p in experts_of(model).values())
            loss_of(model, 0).backward()
        assert sorted(sizes) == sorted(int(masks[name].sum()) for name in experts_of(model))
        opt.step()


# ---- training --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("grain", ["row", "column"])
@pytest.mark.parametrize("kind", KINDS)
def test_trains_as_with_whole_gradients(kind: str, grain: str) -> None:
    for implementation in IMPLEMENTATIONS:
        models = [make_moe(kind, implementation) for _ in range(2)]
        start = copy.deepcopy(models[0])
        masks = expert_masks(start, grain)
        found = so.sparse_linear(models[0], masks)
        opts = [optimizer_for(model, masks, max_grad_norm=1.0) for model in models]
        for step in range(4):
            for model, opt in zip(models, opts, strict=True):
                loss_of(model, step).backward()
                opt.step()
        found.remove()
        for (name, ours), theirs in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
            before = start.get_parameter(name)
            assert torch.equal(ours[~masks[name]], before[~masks[name]]), name
            assert not torch.equal(ours, before), name
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_masks_that_change_are_followed() -> None:
    model, dense = make_moe("mixtral", "grouped_mm"), make_moe("mixtral", "grouped_mm")
    masks = expert_masks(model, "column")
    opt = optimizer_for(model, masks)
    found = so.sparse_linear(model, masks)
    name = next(iter(experts_of(model)))
    shape = tuple(model.get_parameter(name).shape)
    generator = torch.Generator().manual_seed(7)
    changes = [
        expert_mask(shape, "row", [1, 2, 3, 0], generator), torch.rand(shape, generator=generator) < 0.2,
        expert_mask(shape, "column", [0, 0, 4, 4], generator), torch.ones(shape, dtype=torch.bool), masks[name],
    ]  # fmt: skip
    for step, (mask, kind) in enumerate(zip(changes, ["row", None, "column", None, "column"], strict=True)):
        opt.update_masks({name: mask})
        assert structured.use_of(model.get_parameter(name)).kind == kind
        dense.load_state_dict(model.state_dict())
        dense.zero_grad()
        for m in (model, dense):
            loss_of(m, step).backward()
        compare(captured(opt), dense, {**masks, name: mask}, 1e-6)
        opt.step()
    found.remove()
