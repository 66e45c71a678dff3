"""Parameters of several shapes with gradients and masks, all from seeds."""

from __future__ import annotations

import torch
from torch import nn

SHAPES = {"a.weight": (33, 17), "a.bias": (33,), "b.weight": (5, 3, 7), "scalar": (), "empty": (0, 4)}


def make_params(dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {n: nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for n, s in SHAPES.items()}


def set_grads(params: dict[str, nn.Parameter], step: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for param in params.values():
        param.grad = (scale * torch.randn(param.shape, generator=generator)).to(param.dtype)


def random_masks(density: float, seed: int = 5) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.rand(s, generator=generator) < density for n, s in SHAPES.items()}
