"""AdamW step of 50 M parameters on the CPU from dense gradients: SparseAdamW beside what PyTorch offers.

Baselines: ``torch.optim.AdamW(fused=True)``, the foreach implementation, and a gather/scatter optimizer written in
PyTorch. All arms take the same steps from the same weights; their active entries must agree, and inactive entries of
the sparse arms must not move. Clipping uses a threshold that is never reached: every arm does all of its work (norm,
coefficient, product) and results stay comparable.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparseopt as so
from sparseopt.benchmarks.interleaved import compare, scale

ROWS, COLUMNS = 6250, 8000
NEVER_REACHED = 1e6
FUSED, FOREACH = "torch fused", "torch foreach"
EAGER, TUNED = "eager p[idx]", "eager index_select/scatter_"


@dataclass(frozen=True)
class Case:
    """A row of the table; ``bars``: baseline (or "state") -> times better."""

    name: str
    density: float
    run: int = 1
    clip: bool = False
    dtype: torch.dtype = torch.float32
    bars: dict[str, float] = field(default_factory=dict)


CASES = [
    Case("90% sparse", 0.10, bars={FUSED: 1.6, EAGER: 4, TUNED: 4}),
    Case("97.5% sparse", 0.025, bars={FUSED: 3, EAGER: 4, TUNED: 4, "state": 20}),
    Case("99.75% sparse", 0.0025, bars={FUSED: 50, EAGER: 4, TUNED: 4}),
    Case("97.5% sparse, runs of 16", 0.025, run=16, bars={FUSED: 10, EAGER: 4, TUNED: 4}),
    Case("all active", 1.0),
    Case("97.5% sparse, clipping", 0.025, clip=True),
    Case("99.75% sparse, clipping", 0.0025, clip=True),
    Case("97.5% sparse, runs of 16, clipping", 0.025, run=16, clip=True),
    Case("97.5% sparse, bf16 with master weights", 0.025, dtype=torch.bfloat16),
]


class EagerSparseAdamW:
    """What one writes in PyTorch: gather, AdamW on compact vectors, scatter; fp32 master weights for bf16.

    With ``tuned``, ``index_select`` and ``scatter_``, the fastest of PyTorch's ways to gather and scatter on a CPU; else
    indexing with ``[]``, as one writes it first.
    """

    def __init__(self, param: Tensor, mask: Tensor, clip: bool, tuned: bool) -> None:
        self.param, self.clip, self.tuned = param, clip, tuned
        self.indices = mask.view(-1).nonzero().view(-1)
        self.exp_avg = torch.zeros(self.indices.numel())
        self.exp_avg_sq = torch.zeros(self.indices.numel())
        compact = param.detach().view(-1).index_select(0, self.indices)
        self.master = compact.float() if param.dtype != torch.float32 else None
        self.steps = 0

    @torch.no_grad()
    def step(self, lr: float = 1e-3, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8) -> None:
        assert self.param.grad is not None
        self.steps += 1
        flat = self.param.view(-1)
        grad = self._gather(self.param.grad.view(-1)).float()
        if self.clip:
            grad.mul_((NEVER_REACHED / (grad.norm() + 1e-6)).clamp(max=1.0))
        weight = self._gather(flat) if self.master is None else self.master
        weight.mul_(1 - lr * 1e-2)
        self.exp_avg.lerp_(grad, 1 - beta1)
        self.exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        denominator = self.exp_avg_sq.sqrt().div_((1 - beta2**self.steps) ** 0.5).add_(eps)
        weight.addcdiv_(self.exp_avg, denominator, value=-lr / (1 - beta1**self.steps))
        if self.tuned:
            flat.scatter_(0, self.indices, weight.to(flat.dtype))
        else:
            flat[self.indices] = weight.to(flat.dtype)

    def _gather(self, flat: Tensor) -> Tensor:
        return flat.index_select(0, self.indices) if self.tuned else flat[self.indices]


def make_mask(case: Case, rows: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if case.density == 1:
        return torch.ones(rows, COLUMNS, dtype=torch.bool)
    drawn = torch.rand(rows, COLUMNS // case.run, generator=generator) < case.density
    return drawn.repeat_interleave(case.run, dim=1)


def dense_step(param: nn.Parameter, clip: bool, *, fused: bool) -> tuple[torch.optim.AdamW, Callable[[], None]]:
    optimizer = torch.optim.AdamW([param], fused=fused, foreach=not fused)

    def step() -> None:
        if clip:
            torch.nn.utils.clip_grad_norm_([param], NEVER_REACHED)
        optimizer.step()

    return optimizer, step


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_step(benchmark: Any, case: Case) -> None:
    rows = max(1, round(ROWS * scale()))
    generator = torch.Generator().manual_seed(0)
    start = (0.02 * torch.randn(rows, COLUMNS, generator=generator)).to(case.dtype)
    gradient = torch.randn(rows, COLUMNS, generator=generator).to(case.dtype)
    mask = make_mask(case, rows)
    params = {name: nn.Parameter(start.clone()) for name in ("sparseopt", FUSED, FOREACH, EAGER, TUNED)}
    for param in params.values():
        param.grad = gradient

    ours = so.SparseAdamW(
        [("weight", params["sparseopt"])],
        masks=None if case.density == 1 else {"weight": mask},
        max_grad_norm=NEVER_REACHED if case.clip else None,
    )
    fused, fused_step = dense_step(params[FUSED], case.clip, fused=True)
    _, foreach_step = dense_step(params[FOREACH], case.clip, fused=False)
    eager = EagerSparseAdamW(params[EAGER], mask, case.clip, tuned=False)
    tuned = EagerSparseAdamW(params[TUNED], mask, case.clip, tuned=True)

    def check() -> None:
        with torch.no_grad():
            for name in ("sparseopt", EAGER, TUNED):
                moved = params[name] != start
                assert not (moved & ~mask).any(), f"{name} changed an inactive entry"
                assert (moved & mask).any(), f"{name} changed nothing"
            mine = params["sparseopt"][mask].float()
            for name in (FUSED, FOREACH, EAGER, TUNED):
                agree(mine, params[name][mask].float(), start[mask].float(), case.dtype, name)

    fused_step()  # creates torch's state, to be measured; all arms take one step here
    foreach_step()
    eager.step()
    tuned.step()
    ours.step()
    dense_bytes = sum(v.nbytes for v in fused.state[params[FUSED]].values())
    if case.dtype == torch.bfloat16:  # what keeps its precision: fp32 moments and an fp32 copy of the weights
        dense_bytes = 12 * start.numel()
    compare(
        benchmark,
        case.name,
        ours.step,
        {FUSED: fused_step, FOREACH: foreach_step, EAGER: eager.step, TUNED: tuned.step},
        check=check,
        bars=case.bars,
        state=dense_bytes / ours.state_bytes(),
    )


def agree(mine: Tensor, other: Tensor, start: Tensor, dtype: torch.dtype, name: str) -> None:
    """fp32: equal up to rounding. bf16: torch's dense arms round weights and moments every step, so the way they went
    is compared: it differs by less than a tenth of its length."""
    if dtype == torch.float32:
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6, msg=lambda m: f"sparseopt and {name}: {m}")
        return
    difference, length = (mine - other).norm(), (other - start).norm()
    assert difference < 0.1 * length, f"sparseopt and {name} differ by {difference / length:.3f} of the way"
