"""What the engine of dynamic masks counts and records, its schedules, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dynamic_training import STEPS, batch, make, make_model, train_step
from torch import Tensor, nn
from torch.nn import functional as F

import sparseopt as so
from sparseopt.optim.dynamic.engine import DynamicSparsity


def test_regrown_entries_are_counted() -> None:
    model, optimizer, engine = make(sparsity=0.5, policy="set", fraction=0.8)
    engine.start(optimizer)
    masks = [engine.masks]
    for step in range(1, STEPS + 1):
        if train_step(model, optimizer, engine, step) is not None:
            masks.append(engine.masks)
    assert len(engine.history) == len(masks) - 1 == 4
    for k, record in enumerate(engine.history, start=1):
        grown = masks[k] & ~masks[k - 1]
        earlier = masks[0]
        for mask in masks[1:k]:
            earlier = earlier | mask
        assert record["grown"] == grown.active_parameters
        assert record["regrown"] == pytest.approx((grown & earlier).active_parameters / grown.active_parameters)
        changed = (masks[k] ^ masks[k - 1]).active_parameters
        assert record["churn"] == pytest.approx(changed / (2 * masks[k].active_parameters))
    assert engine.history[-1]["regrown"] > 0


def test_the_inactive_gradient_norm() -> None:
    model, optimizer, engine = make(sparsity=0.8, capture=False, policy="set", watch_gradients=True)
    engine.start(optimizer)
    for step in range(1, 5):
        engine.begin_step(step)
        x, y = batch(step)
        F.mse_loss(model(x), y).backward()
        squares = sum((p.grad[~engine.masks[n]] ** 2).sum() for n, p in model.named_parameters() if n in engine.masks)
        optimizer.step()
        optimizer.zero_grad()
        record = engine.update(step)
    assert record is not None
    assert record["inactive_grad_norm"] == pytest.approx(float(squares) ** 0.5, rel=1e-5)


def test_state_is_proportional_to_active_entries() -> None:
    torch.manual_seed(0)
    sizes = {}
    for sparsity in (0.5, 0.9):
        model = nn.Sequential(nn.Linear(256, 512, bias=False), nn.Linear(512, 256, bias=False))
        engine = DynamicSparsity(model, total_steps=8, interval=2, sparsity=sparsity)
        optimizer = so.SparseAdamW(model.named_parameters(), masks=engine.masks, capture_gradients=True)
        engine.start(optimizer)
        for step in range(1, 9):
            engine.begin_step(step)
            model(torch.randn(4, 256)).square().mean().backward()
            optimizer.step()
            engine.update(step)
        sizes[sparsity] = optimizer.state_bytes() / engine.masks.active_parameters
    assert sizes[0.9] == pytest.approx(sizes[0.5], rel=0.1)
    assert sizes[0.9] < 13, "two fp32 moments, an index of 2 or 4 bytes, an age of 1"


def test_schedules_and_criteria_take_part() -> None:
    seen = []

    def score(name: str, weight: Tensor, gradient: Tensor | None) -> Tensor:
        assert gradient is not None
        seen.append(name)
        return (weight * gradient).abs()

    model, optimizer, engine = make(sparsity_schedule=lambda step, total: 0.3 + 0.5 * step / total, criterion=score)
    assert engine.sparsity == pytest.approx(0.3, abs=1e-3)
    engine.start(optimizer)
    for step in range(1, STEPS + 1):
        train_step(model, optimizer, engine, step)
        assert engine.sparsity == pytest.approx(0.3 + 0.5 * (step // 4 * 4) / STEPS, abs=2e-3)
    assert len(seen) == 3 * 6
    assert engine.sparsity == pytest.approx(0.8, abs=1e-3)


@pytest.mark.parametrize("distribution", ["uniform", "global"])
def test_a_schedule_may_fall(distribution: str) -> None:
    model, optimizer, engine = make(
        sparsity_schedule=lambda step, total: 0.8 - 0.5 * step / total, distribution=distribution, policy="gradual"
    )
    engine.start(optimizer)
    for step in range(1, STEPS + 1):
        train_step(model, optimizer, engine, step)
    assert engine.sparsity == pytest.approx(0.3, abs=1e-3)


def test_gradients_that_are_not_finite_count_as_zero() -> None:
    model, optimizer, engine = make(sparsity=0.8, capture=False)
    engine.start(optimizer)
    engine.begin_step(4)
    x, y = batch(4)
    (F.mse_loss(model(x), y) * float("inf")).backward()
    optimizer.zero_grad()
    with pytest.warns(UserWarning, match="not finite"):
        record = engine.update(4)
    assert record is not None
    assert record["dropped"] == record["grown"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, r"\[0, 1\), got 1.0"),
        ({"sparsity": -0.5}, r"\[0, 1\), got -0.5"),
        ({"pattern": "blocks"}, "'unstructured' or 'N:M'"),
        ({"pattern": "2:3"}, r"divisible by 3; '0.weight' has 16"),
        ({"pattern": "1:16"}, r"divisible by 16; '2.weight' has 24"),  # a Conv1D of 24 inputs
        ({"pattern": "2:4", "sparsity": 0.8}, r"2:4 means a sparsity of 0.5, got 0.8"),
        ({"pattern": "2:4", "distribution": "erk"}, "uniform by itself"),
        ({"policy": "magic"}, "the policy must be"),
        ({"target": "gradients"}, "'weights' or 'updates'"),
        ({"target": "updates", "dropped": "zero"}, "'keep' or 'rewind'"),
        ({"dropped": "rewind"}, "target='updates'"),
        ({"distribution": "even"}, "uniform, erk, global"),
        ({"initial": "best"}, "'magnitude', 'random', 'criterion' or a MaskSet"),
        ({"initial": "criterion"}, "needs a criterion"),
        ({"policy": "static", "criterion": lambda n, w, g: w}, "initial='criterion'"),
        ({"sparsity_schedule": lambda step, total: float("nan")}, r"\[0, 1\), got nan"),
        ({"criterion": lambda n, w, g: w[0], "initial": "criterion"}, r"shape \(16,\) for '0.weight', expected \(24, 16\)"),
    ],
)  # fmt: skip
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_given_masks() -> None:
    masks = so.MaskSet.random(make_model(), 0.3, seed=4)
    model, optimizer, engine = make(initial=masks)
    counts = engine.masks.counts
    engine.start(optimizer)
    for step in range(1, STEPS + 1):
        train_step(model, optimizer, engine, step)
    assert engine.masks.counts == counts
    assert engine.masks != masks.select(engine.masks.names)
    with pytest.raises(ValueError, match=r"'0.weight' is not 2:4"):
        make(initial=masks, pattern="2:4")
    with pytest.raises(ValueError, match=r"have none for '2.weight'"):
        make(initial=masks.select(["0.weight"]))


def test_misuse_is_said() -> None:
    model, optimizer, engine = make(sparsity=0.8)
    with pytest.raises(RuntimeError, match="before start"):
        engine.update(4)
    engine.start(optimizer)
    with pytest.raises(RuntimeError, match=r"call begin_step\(4\)"):
        engine.update(4)
    state = engine.state_dict()
    with pytest.raises(ValueError, match="had pattern='unstructured', this one has '2:4'"):
        make(pattern="2:4")[2].load_state_dict(state)
    with pytest.raises(ValueError, match=r"sparse layers: '0.weight'"):
        make(sparsity=0.8, exclude="0.weight")[2].load_state_dict(state)
    _, other, second = make(sparsity=0.8, initial="random")
    second.load_state_dict(state)
    with pytest.raises(ValueError, match="not those that the state"):
        second.start(other, resume=True)
    frozen = so.SparseAdamW([("0.weight", model[0].weight)], masks={"0.weight": engine.masks["0.weight"]})
    with pytest.raises(ValueError, match=r"'2.weight' is not trained"):
        engine.start(frozen)
