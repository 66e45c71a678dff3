"""Small models under the engine of dynamic masks, and a training step by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparseopt as so
from sparseopt.optim.dynamic.engine import DynamicSparsity

STEPS = 24


def make_model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), Conv1D(8, 24), nn.Tanh(), nn.Linear(8, 4))
    nn.init.normal_(model[2].weight, std=0.2)
    return model.to(dtype)


def batch(step: int, size: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(size, 16, generator=generator)
    return x, torch.stack([x[:, :4].sum(1), x[:, 4:8].prod(1), x[:, 8], x[:, 9:].mean(1)], 1)


def make(dtype: torch.dtype = torch.float32, capture: bool = True, **options: Any) -> tuple[Any, Any, DynamicSparsity]:
    model = make_model(dtype)
    engine = DynamicSparsity(model, **{"total_steps": STEPS, "interval": 4, "seed": 5, **options})
    optimizer = so.SparseAdamW(
        model.named_parameters(), lr=1e-2, masks=engine.masks, unmasked="dense", capture_gradients=capture
    )
    return model, optimizer, engine


def train_step(model: nn.Module, optimizer: Any, engine: DynamicSparsity, step: int, micro: int = 1) -> Any:
    engine.begin_step(step)
    x, y = batch(step)
    dtype = next(model.parameters()).dtype
    for part_x, part_y in zip(x.chunk(micro), y.chunk(micro), strict=True):
        (F.mse_loss(model(part_x.to(dtype)), part_y.to(dtype)) / micro).backward()
    optimizer.step()
    optimizer.zero_grad()
    return engine.update(step)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def groups_hold(engine: DynamicSparsity, n: int, m: int) -> bool:
    for layer in engine.layers:
        mask = engine.masks[layer.name]
        rows = mask.T if layer.transposed else mask
        if any((row[i : i + m].sum() != n) for row in rows for i in range(0, len(row), m)):
            return False
    return True
