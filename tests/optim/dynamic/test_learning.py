"""What changing masks are for: a sparse network that finds its inputs."""

from __future__ import annotations

from statistics import mean

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparseopt as so
from sparseopt.optim.dynamic.engine import DynamicSparsity

INPUTS, RELEVANT, STEPS = 64, 8, 600


def data(seed: int, size: int) -> tuple[Tensor, Tensor]:
    """Labels depend on an eighth of the inputs, through a small network that is always the same."""
    teacher = torch.Generator().manual_seed(99)
    first = torch.randn(RELEVANT, 16, generator=teacher)
    second = torch.randn(16, 4, generator=teacher)
    x = torch.randn(size, INPUTS, generator=torch.Generator().manual_seed(seed))
    return x, (torch.tanh(x[:, ::RELEVANT] @ first) @ second).argmax(1)


def held_out_loss(policy: str, seed: int) -> float:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(INPUTS, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    engine = DynamicSparsity(
        model, total_steps=STEPS, sparsity=0.8, policy=policy, interval=20, initial="random", seed=seed
    )
    optimizer = so.SparseAdamW(
        model.named_parameters(), lr=3e-3, masks=engine.masks, unmasked="dense", capture_gradients=True
    )
    engine.start(optimizer)
    for step in range(1, STEPS + 1):
        engine.begin_step(step)
        x, y = data(1000 * (seed + 1) + step, 64)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        engine.update(step)
    assert engine.sparsity == pytest.approx(0.8, abs=1e-3)
    with torch.no_grad():
        x, y = data(7, 4000)
        return float(F.cross_entropy(model(x), y))


@pytest.mark.slow
def test_rigl_learns_more_than_static_masks_and_no_less_than_random_growth() -> None:
    losses = {policy: [held_out_loss(policy, seed) for seed in range(3)] for policy in ("rigl", "set", "static")}
    print({policy: [round(loss, 4) for loss in values] for policy, values in losses.items()})
    assert max(losses["rigl"]) < min(losses["static"])
    assert mean(losses["rigl"]) <= mean(losses["set"])
