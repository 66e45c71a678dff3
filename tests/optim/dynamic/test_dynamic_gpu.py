"""Masks that change on a CUDA GPU: the same as on the CPU, exact, and resumable."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparseopt as so
from sparseopt.optim.dynamic.engine import DynamicSparsity
from sparseopt.optim.dynamic.selection import Move, choose_together

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DEVICE = "cuda"


def make_model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 504), nn.ReLU(), nn.Linear(504, 64)]
    return nn.Sequential(*layers).to(torch.bfloat16)


def loss_of(model: nn.Module, step: int) -> Tensor:
    x = torch.randn(32, 256, generator=torch.Generator().manual_seed(step))
    return model(x.to(DEVICE, torch.bfloat16)).float().square().mean()


def train(policy: str, target: str, steps: range, saved: dict[str, Any] | None = None) -> dict[str, Any]:
    """Weights, optimizer and engine after the steps, their masks and zeros checked after each."""
    model = make_model().to(DEVICE)
    engine = DynamicSparsity(
        model, total_steps=20, sparsity=0.8, policy=policy, interval=3, target=target, seed=3, initial="random",
        watch_gradients=True,
    )  # fmt: skip
    optimizer = so.SparseAdamW(
        model.named_parameters(), lr=1e-2, masks=engine.masks, unmasked="dense" if target == "weights" else "freeze",
        capture_gradients=True, max_grad_norm=1.0,
    )  # fmt: skip
    if saved is not None:
        model.load_state_dict(saved["model"])
        optimizer.adopt_masks = True
        optimizer.load_state_dict(saved["optimizer"])
        engine.load_state_dict(saved["engine"])
    engine.start(optimizer, resume=saved is not None)
    counts = {layer.name: engine.masks.count(layer.name) for layer in engine.layers}
    for step in steps:
        engine.begin_step(step)
        for micro in range(2):
            loss_of(model, 2 * step + micro).backward()
        optimizer.step()
        optimizer.zero_grad()
        record = engine.update(step)
        assert (record is not None) == (step % 3 == 0 and step <= 15 and policy != "static")
        assert {layer.name: engine.masks.count(layer.name) for layer in engine.layers} == counts
        if target == "weights":
            for layer in engine.layers:
                assert not bool(layer.param.detach()[~engine.masks[layer.name].to(DEVICE)].any())
    return copy.deepcopy(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "engine": engine.state_dict()}
    )


def assert_same(a: Any, b: Any, where: str = "") -> None:
    if isinstance(a, Tensor):
        assert a.dtype == b.dtype, where
        assert torch.equal(a.cpu(), b.cpu()), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}/{i}")
    else:
        assert a == b, where


@pytest.mark.parametrize("target", ["weights", "updates"])
@pytest.mark.parametrize("policy", ["rigl", "set"])
def test_a_killed_run_goes_on_to_the_same_bits(policy: str, target: str) -> None:
    whole = train(policy, target, range(1, 21))
    half = train(policy, target, range(1, 8))
    assert_same(train(policy, target, range(8, 21), half), whole)
    assert sum(record["grown"] for record in whole["engine"]["history"]) > 1000


@pytest.mark.parametrize("master", ["residual", "fp32", False])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_state_follows_as_on_the_cpu(master: Any, amsgrad: bool) -> None:
    """Twice, so that there are entries of three ages, some of which leave and come back."""
    model = make_model().to(DEVICE)
    drawn = torch.Generator().manual_seed(5)

    def masks(density: float) -> dict[str, Tensor]:
        return {
            name: torch.rand(p.shape, generator=drawn) < (1.0 if name == "2.bias" else density)
            for name, p in model.named_parameters()
        }

    options: dict[str, Any] = {"lr": 1e-2, "amsgrad": amsgrad, "master_weights": master}
    optimizer = so.SparseAdamW(model.named_parameters(), masks=masks(0.1), **options)
    with optimizer.base_weights():
        pass
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step in range(6):
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 2:
            twin = copy.deepcopy(model).cpu()
            other = so.SparseAdamW(twin.named_parameters(), masks=optimizer.masks, **options)
            with other.base_weights():
                pass
            other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            new = masks(0.1 * step)
            optimizer.update_masks(new)
            other.update_masks(new)
            state, expected = optimizer.state_dict(), other.state_dict()
            assert_same(state["state"], expected["state"])
    with optimizer.base_weights():
        for name, param in model.named_parameters():
            assert torch.equal(param, before[name]), name


def choose(policy: str, device: str) -> tuple[Any, DynamicSparsity]:
    model = make_model().to(device)
    engine = DynamicSparsity(model, total_steps=20, sparsity=0.8, policy=policy, interval=3, initial="random",
                             watch_gradients=True)  # fmt: skip
    optimizer = so.SparseAdamW(model.named_parameters(), masks=engine.masks, unmasked="dense")
    optimizer.initialize_state()
    engine.start(optimizer)
    drawn = torch.Generator().manual_seed(7)
    for step in (3, 6, 9, 12):
        engine.begin_step(step)
        for layer in engine.layers:
            for _ in range(1 + (step == 6)):
                engine.gradients.add(layer.name, torch.randn(layer.shape, generator=drawn).to(device, torch.bfloat16))
        engine.update(step)
    return optimizer, engine


@pytest.mark.parametrize("policy", ["rigl", "set", "gradual"])
def test_chooses_as_on_the_cpu(policy: str) -> None:
    (_, one), (there, other) = choose(policy, "cpu"), choose(policy, DEVICE)
    assert one.masks == other.masks
    assert there.masks.select(other.masks.names) == other.masks
    assert_same(other.state_dict()["left"], one.state_dict()["left"])
    for mine, theirs in zip(one.history, other.history, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)
    for layer in other.layers:
        assert not bool(layer.param.detach()[~other.masks[layer.name].to(DEVICE)].any())


def test_an_update_waits_for_the_device_a_few_times() -> None:
    """What is chosen takes one transfer, whatever the number of layers."""
    _, engine = choose("rigl", DEVICE)
    engine.begin_step(15)
    for layer in engine.layers:
        engine.gradients.add(layer.name, torch.randn(layer.shape).to(DEVICE, torch.bfloat16))
    moves = [Move(engine.masks.count(layer.name), 9, engine.masks.count(layer.name)) for layer in engine.layers]
    group = engine._groups[0]
    gradients = [engine.gradients.by_name[layer.name] for layer in group.layers]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        choose_together(group, gradients, moves, None)
    finally:
        torch.cuda.set_sync_debug_mode("default")
