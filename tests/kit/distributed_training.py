"""Training on several processes, and the same on one: what each rank of a test does."""

from __future__ import annotations

from typing import Any

import torch
from captured_model import VOCAB, Model, make_masks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import sparseopt as so

ROWS = 2  # of each rank's micro-batch
STEPS = 20


def make_model(seed: int = 0, **kwargs: Any) -> Model:
    torch.manual_seed(seed)
    model = Model(**kwargs)
    del model.unused  # DDP refuses a parameter that takes no part
    return model


def batch(step: int, micro: int, total_rows: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + micro)
    return torch.randint(0, VOCAB, (total_rows, 5), generator=generator)


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(tokens).float().flatten(0, 1), tokens.roll(1, 1).flatten())


def make_optimizer(model: nn.Module, **kwargs: Any) -> so.SparseAdamW:
    plain: Any = getattr(model, "module", model)
    options = {"lr": 1e-3, "masks": make_masks(plain), "max_grad_norm": 0.5, **kwargs}
    return so.SparseAdamW(model.named_parameters(), **options)


def train(
    model: nn.Module, optimizer: Any, rank: int, world: int, everyone: int, *, steps: range = range(STEPS),
    accumulate: int = 1, no_sync: bool = False,
) -> list[float]:  # fmt: skip
    """Each of ``world`` processes takes its rows of batches made for ``everyone`` (so that one can do all); the norms."""
    norms = []
    per = ROWS * everyone // world
    for step in steps:
        for micro in range(accumulate):
            tokens = batch(step, micro, ROWS * everyone)[rank * per : (rank + 1) * per]
            wait = no_sync and micro + 1 < accumulate
            if wait and hasattr(model, "no_sync"):
                with model.no_sync():
                    (loss_of(model, tokens) / accumulate).backward()
            else:
                if hasattr(model, "set_requires_gradient_sync"):
                    model.set_requires_gradient_sync(not wait)
                (loss_of(model, tokens) / accumulate).backward()
        optimizer.step()
        if getattr(optimizer, "max_grad_norm", None) is not None:
            norms.append(float(optimizer.grad_norm()))
        optimizer.zero_grad()
    return norms


def weights(model: nn.Module) -> dict[str, Tensor]:
    plain: Any = getattr(model, "module", model)
    return {n: p.detach().clone() for n, p in plain.named_parameters()}


def alone(everyone: int, accumulate: int = 1, capture: bool = False, **kwargs: Any) -> tuple[dict[str, Tensor], list[float]]:
    model = make_model(**kwargs)
    norms = train(model, make_optimizer(model, capture_gradients=capture), 0, 1, everyone, accumulate=accumulate)
    return weights(model), norms


# ---- DDP -----------------------------------------------------------------------------------------------------------------
def under_ddp(rank: int, world: int, when: str, accumulate: int, no_sync: bool, options: dict[str, Any],
              ddp_options: dict[str, Any], model_options: dict[str, Any]) -> Any:  # fmt: skip
    """Weights, norms and bytes of gradient that DDP still reduces, after training; ``when`` the optimizer is made."""
    model = make_model(seed=rank, **model_options)  # of different weights: DDP gives all of them rank 0's
    wrapped: nn.Module
    if when == "before":
        optimizer = make_optimizer(model, **options)
        wrapped = DistributedDataParallel(model, **ddp_options)
    else:
        wrapped = DistributedDataParallel(model, **ddp_options)
        optimizer = make_optimizer(wrapped, **options)
    norms = train(wrapped, optimizer, rank, world, world, accumulate=accumulate, no_sync=no_sync)
    reduced = [p.numel() for p in wrapped._build_params_for_reducer()[0]]  # type: ignore[operator]
    return weights(model), norms, reduced
