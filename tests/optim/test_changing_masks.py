"""State under changing masks: every value follows its entry, whatever the plans, counts and batches of launches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparseopt as so
from sparseopt.optim import remapping

SIZES = {"norm": 40, "a": 5000, "head": 300, "b": 7001, "small": 3, "c": 20_000, "last": 64}
CHANGING = ("a", "b", "c", "small")


def make_params(dtype: torch.dtype) -> dict[str, nn.Parameter]:
    drawn = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(n, generator=drawn).to(dtype)) for name, n in SIZES.items()}


def draw(counts: dict[str, int], seed: int, run: int = 1) -> dict[str, Tensor]:
    drawn = torch.Generator().manual_seed(seed)
    masks = {}
    for name, count in counts.items():
        groups = -(-SIZES[name] // run)
        mask = torch.zeros(groups, dtype=torch.bool)
        mask[torch.randperm(groups, generator=drawn)[:count]] = True
        masks[name] = mask.repeat_interleave(run)[: SIZES[name]]
    return masks


def dense(optimizer: so.SparseAdamW, params: dict[str, nn.Parameter]) -> dict[str, dict[str, Tensor]]:
    """Every kind of state at every element; NaN (integers: -9) where there is none. Ages as births."""
    result = {}
    for name, param in params.items():
        mask = optimizer.masks[name].reshape(-1)
        entries = dict(optimizer.state[param])
        births = entries.pop("births", torch.zeros(1))
        entries["born"] = births[entries.pop("cohorts", torch.zeros(int(mask.sum()))).long()]
        result[name] = {}
        for kind, values in entries.items():
            if values.dim():
                nothing = float("nan") if values.dtype.is_floating_point else -9
                result[name][kind] = torch.full(mask.shape, nothing, dtype=values.dtype)
                result[name][kind][mask] = values
    return result


@pytest.mark.parametrize("at_once", [1, 4000, 1 << 20])
@pytest.mark.parametrize("counts_change", [False, True])
@pytest.mark.parametrize(("dtype", "options"), [
    (torch.bfloat16, {}), (torch.bfloat16, {"master_weights": "fp32", "amsgrad": True}), (torch.float64, {}),
])  # fmt: skip
def test_values_follow_their_entries(
    dtype: torch.dtype, options: dict[str, Any], counts_change: bool, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remapping, "ENTRIES_AT_ONCE", {"cpu": at_once})
    params = make_params(dtype)
    start = {name: param.detach().clone() for name, param in params.items()}
    counts = {"a": 900, "b": 3000, "c": 100, "small": 1}
    optimizer = so.SparseAdamW(params.items(), masks=draw(counts, 0), unmasked="dense", lr=1e-2, **options)
    with optimizer.base_weights():
        pass
    for step in range(1, 5):
        for name, param in params.items():
            drawn = torch.Generator().manual_seed(step)
            param.grad = torch.randn(SIZES[name], generator=drawn).to(dtype)
        optimizer.step()
        before, old = dense(optimizer, params), optimizer.masks
        if counts_change:
            counts = {name: counts[name] + (step if name != "small" else 0) * (-1) ** step for name in CHANGING}
        new = draw(counts, step)
        if step == 3:
            del new["b"]  # keeps its mask
        optimizer.update_masks(new)
        after = dense(optimizer, params)
        for name in SIZES:
            was, now = old[name], optimizer.masks[name]
            assert torch.equal(now, new.get(name, was))
            assert optimizer.state[params[name]]["step"] == step
            for kind, values in after[name].items():
                assert torch.equal(values[was & now], before[name][kind][was & now]), (name, kind)
                grown = values[now & ~was]
                expected: Tensor = {
                    "born": torch.full_like(grown, step), "base": start[name][now & ~was],
                    "master": params[name].detach()[now & ~was].float(),
                }.get(kind, torch.zeros_like(grown))  # fmt: skip
                assert torch.equal(grown, expected), (name, kind)
        with optimizer.base_weights():
            assert all(torch.equal(param, start[name]) for name, param in params.items())
    assert {"born", "base", "exp_avg"} <= after["a"].keys()


def test_masks_of_runs_become_masks_of_entries() -> None:
    params = make_params(torch.float32)
    optimizer = so.SparseAdamW(params.items(), masks=draw({"c": 100}, 0, run=16), unmasked="freeze", lr=1e-2)
    for step, run in enumerate([8, 1, 64]):
        for param in params.values():
            param.grad = torch.ones_like(param) * (1 + step)
        optimizer.step()
        before, old = dense(optimizer, params), optimizer.masks
        optimizer.update_masks(draw({"c": 60}, 0, run=run))
        both = old["c"] & optimizer.masks["c"]
        assert both.any()
        assert torch.equal(dense(optimizer, params)["c"]["exp_avg"][both], before["c"]["exp_avg"][both])


def test_masks_that_only_shrink_start_no_cohort() -> None:
    params = make_params(torch.float32)
    full = {name: torch.ones(SIZES[name], dtype=torch.bool) for name in CHANGING}
    optimizer = so.SparseAdamW(params.items(), masks=full, unmasked="freeze")
    for keep in (0.9, 0.5):
        for param in params.values():
            param.grad = torch.ones_like(param)
        optimizer.step()
        full = {name: mask & (torch.arange(mask.numel()) < keep * mask.numel()) for name, mask in full.items()}
        optimizer.update_masks(full)
        assert "cohorts" not in optimizer.state[params["a"]]


def test_more_cohorts_than_a_byte_numbers() -> None:
    """The two oldest become one; the newest keep their ages."""
    param = nn.Parameter(torch.zeros(600))
    optimizer = so.SparseAdamW([("p", param)], masks={"p": torch.arange(600) < 10})
    for step in range(1, 301):
        param.grad = torch.ones(600)
        optimizer.step()
        # Entry 10 + step is new; all others stay.
        optimizer.update_masks({"p": torch.arange(600) < 10 + step})
    state = optimizer.state[param]
    assert state["births"].numel() == remapping.MAX_COHORTS
    born = state["births"][state["cohorts"].long()]
    assert torch.equal(born[-200:], torch.arange(101.0, 301.0))
    assert born[:10].tolist() == [0.0] * 10
