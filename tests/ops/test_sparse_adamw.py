"""sparse_adamw_ against the reference on the grid, and against torch.optim.AdamW; frozen entries keep their bits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sparseopt import functional

SIZES = (0, 1, 7, 8, 9, 31, 32, 33, 1023, 1025, 65535, 65536, 65537)
DENSITIES = ("none", "one", 0.01, 0.5, "all")
# (dtype, master weights)
KINDS = [
    pytest.param(torch.float32, False, id="fp32"),
    pytest.param(torch.bfloat16, True, id="bf16-master"),
    pytest.param(torch.bfloat16, False, id="bf16"),
    pytest.param(torch.float16, True, id="fp16-master"),
    pytest.param(torch.float16, False, id="fp16"),
]
ALL_KINDS = [*KINDS, pytest.param(torch.float64, False, id="fp64")]

# Names of what `build_problem` takes; cohorts and the like are made in `masks_and_fields`.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "amsgrad": {"amsgrad": True},
    "maximize": {"maximize": True},
    "no-bias-correction": {"correct_bias": False},
    "no-decay": {"weight_decay": 0.0},
    "groups": {"groups": 3},
    "late": {"first_step": 1000.0},
    "compact": {"compact": True},
    "misaligned": {"offset": 1},
    "fp32-copy": {"master": True},
    "fp32-copy-behind": {"master": True, "follow": True, "steps": 3},
    "fp32-copy-amsgrad-compact": {"master": True, "amsgrad": True, "compact": True},
    "multiplier": {"multiplier": torch.tensor(0.37)},
    "not-skipped": {"skip": torch.tensor(0.0)},
    "skipped": {"skip": torch.tensor(1.0)},
    "absent": {"absent": frozenset({0, 2})},
    "all-absent": {"absent": frozenset(range(7))},
    "everything": {
        "amsgrad": True,
        "maximize": True,
        "groups": 2,
        "compact": True,
        "offset": 1,
        "multiplier": torch.tensor(1.7),
        "skip": torch.tensor(0.0),
        "absent": frozenset({1}),
        "steps": 3,
    },
}


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize(("dtype", "master"), KINDS)
@pytest.mark.parametrize("n", SIZES)
def test_grid(
    device: torch.device, n: int, dtype: torch.dtype, master: bool, density: float | str,
    problem: Callable, check: Callable, mask_of: Callable,
) -> None:  # fmt: skip
    check(problem(dtype, [mask_of(n, density)], residual=master), device)


@pytest.mark.parametrize("density", [0.01, 0.5])
def test_twenty_million(
    device: torch.device, density: float, problem: Callable, check: Callable, mask_of: Callable, native_only: None
) -> None:
    check(problem(torch.bfloat16, [mask_of(20_000_003, density)], residual=True, steps=1), device)


def several_masks(mask_of: Callable) -> list[Tensor]:
    sizes = ((5000, 0.3), (100, "none"), (33, "all"), (9000, 0.02), (1, "one"), (0, "none"), (8192, "all"))
    return [mask_of(n, density) for n, density in sizes]


@pytest.mark.parametrize("with_cohorts", [False, True], ids=["", "cohorts"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("dtype", "master"), ALL_KINDS)
def test_variants(
    device: torch.device, dtype: torch.dtype, master: bool, variant: str, with_cohorts: bool,
    problem: Callable, check: Callable, mask_of: Callable, same_bits: Callable,
) -> None:  # fmt: skip
    made = problem(dtype, several_masks(mask_of), residual=master, **VARIANTS[variant])
    if with_cohorts:
        # One cohort older than the tensor's steps, one of this step, one not born yet (its age counts as 1).
        births = made.first_step + torch.tensor([-5.0, 0.0, 2.0]).repeat(len(made.masks), 1)
        made = made.changed(cohorts=torch.randint(0, 3, (made.plan.active,)).to(torch.uint8), births=births)
    outcome = check(made, device)
    if made.follow:
        return  # weights change without a step
    if variant in ("skipped", "all-absent"):
        assert all(same_bits(a, b) for a, b in zip(outcome.params, made.params, strict=True))
        assert not outcome.exp_avg.any()
        assert not outcome.exp_avg_sq.any()
    else:
        for tensor, (mask, before, after) in enumerate(zip(made.masks, made.params, outcome.params, strict=True)):
            due = bool(mask.any()) and tensor not in made.absent
            # A single 16-bit weight may round back to itself.
            assert same_bits(before, after) != due or mask.sum() == 1


@pytest.mark.parametrize("variant", ["plain", "misaligned", "compact", "fp32-copy", "everything"])
@pytest.mark.parametrize("run", [8, 16, 32, 64])
@pytest.mark.parametrize(("dtype", "master"), ALL_KINDS)
def test_runs(
    device: torch.device, dtype: torch.dtype, master: bool, run: int, variant: str,
    problem: Callable, check: Callable, mask_of: Callable,
) -> None:  # fmt: skip
    masks = [mask_of(64 * 333, 0.3, run), mask_of(64 * 10, 0.5, run), mask_of(64 * 100, "all")]
    made = problem(dtype, masks, residual=master, **VARIANTS[variant])
    assert made.plan.runs == (run, run, 0)
    assert made.plan.run == run
    check(made, device)


def test_many_small_tensors(device: torch.device, problem: Callable, check: Callable, mask_of: Callable) -> None:
    masks = [mask_of(1 + 37 * t % 300, 0.5) for t in range(300)]
    check(problem(torch.bfloat16, masks, residual=True, groups=4, absent=frozenset(range(0, 300, 7))), device)


@pytest.mark.parametrize("flags", [{}, {"amsgrad": True}, {"maximize": True}, {"weight_decay": 0.0}], ids=str)
@pytest.mark.parametrize("density", [0.3, "all"])
def test_equals_dense_adamw_on_the_active_entries(
    device: torch.device, flags: dict[str, Any], density: float | str, problem: Callable, mask_of: Callable
) -> None:
    """The reference itself is checked here: p[mask] as a stand-alone parameter of torch.optim.AdamW, 20 steps."""
    made = problem(torch.float32, [mask_of(3000, density), mask_of(100, density)], steps=20, **flags)
    outcome = made.run(device)
    lr, beta1, beta2, eps, decay = made.hyper[0, :5].tolist()
    for mask, before, after, grads in zip(
        made.masks, made.params, outcome.params, zip(*made.grads, strict=True), strict=True
    ):
        dense = torch.nn.Parameter(before[mask].clone())
        optimizer = torch.optim.AdamW([dense], lr=lr, betas=(beta1, beta2), eps=eps, **{"weight_decay": decay} | flags)
        for grad in grads:
            dense.grad = grad[mask].clone()
            optimizer.step()
        torch.testing.assert_close(after[mask], dense.detach(), rtol=2e-6, atol=1e-6)  # 20 steps of 1e-7


def test_masters_keep_what_bf16_loses(device: torch.device, problem: Callable, mask_of: Callable) -> None:
    """Updates far below a bf16 unit in the last place add up in the residual, and only there."""
    made = problem(torch.bfloat16, [mask_of(1000, "all")], steps=100, residual=True, lr=3e-5, weight_decay=0.0)
    grad = torch.ones(1000, dtype=torch.bfloat16)
    made = made.changed(grads=[[grad]] * 100, params=[grad.clone()])
    moved = made.run(device).params[0]
    stuck = made.changed(residual=False).run(device).params[0]
    assert torch.equal(stuck, grad)
    # 100 steps of Adam under a constant gradient move 100 x lr = 0.003; below 1 the unit of bf16 is 2^-8.
    assert torch.equal(moved, torch.full_like(moved, 1 - 2**-8))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("dtype", "master"), ALL_KINDS)
def test_non_finite_gradients_stay_where_they_are(
    device: torch.device, dtype: torch.dtype, master: bool, value: float,
    problem: Callable, mask_of: Callable, same_bits: Callable,
) -> None:  # fmt: skip
    made = problem(dtype, [mask_of(1000, "all")], residual=master, amsgrad=True, steps=1)
    clean = made.run(device)
    hurt = [made.grads[0][0].clone()]
    hurt[0][500] = value
    outcome = made.changed(grads=[hurt]).run(device)
    oracle = made.changed(grads=[hurt]).run("cpu", oracle=True)
    assert bool(outcome.params[0][500].isnan()) == bool(oracle.params[0][500].isnan())
    assert bool(outcome.max_exp_avg_sq[500].isnan()) == bool(oracle.max_exp_avg_sq[500].isnan())
    elsewhere = torch.arange(1000) != 500
    assert same_bits(outcome.params[0][elsewhere], clean.params[0][elsewhere])


def test_bit_identical_when_repeated(
    device: torch.device, problem: Callable, mask_of: Callable, same_bits: Callable
) -> None:
    made = problem(torch.bfloat16, several_masks(mask_of), residual=True, amsgrad=True, steps=3)
    first, second = made.run(device), made.run(device)
    assert all(same_bits(a, b) for a, b in zip(first.tensors, second.tensors, strict=True))


def test_bit_identical_whatever_the_threads(
    problem: Callable, mask_of: Callable, same_bits: Callable, native_only: None
) -> None:
    made = problem(torch.float32, [mask_of(300_007, 0.2), mask_of(50_000, "all")], compact=True)
    mask = mask_of(3_000_001, 0.3)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            packed = functional.pack_mask(mask)
            indices = functional.mask_indices(packed, mask.numel())
            counts = functional.mask_overlap(packed, packed)
            unpacked = functional.unpack_mask(packed, mask.numel())
            results.append([*made.run("cpu").tensors, packed, indices, counts, functional.popcount(packed), unpacked])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


def test_refuses_what_does_not_fit(device: torch.device, problem: Callable, mask_of: Callable) -> None:
    made = problem(torch.float32, [mask_of(100, 0.5)])
    plan, params, grads = made.plan.to(device), [made.params[0].to(device)], [made.grads[0][0].to(device)]
    state = {
        "groups": made.groups.to(device),
        "hyper": made.hyper.to(device),
        "steps": torch.zeros(1, device=device),
        "exp_avg": torch.zeros(plan.active, device=device),
        "exp_avg_sq": torch.zeros(plan.active, device=device),
    }

    def step(**changes: Any) -> None:
        arguments = {"params": params, "grads": grads, "plan": plan, **state, **changes}
        functional.sparse_adamw_(**arguments)

    with pytest.raises(ValueError, match="2 parameters for a plan of 1"):
        step(params=params * 2)
    with pytest.raises(ValueError, match="2 gradients for 1 parameters"):
        step(grads=grads * 2)
    with pytest.raises(ValueError, match="gradient 0 must be contiguous with 100 entries"):
        step(grads=[torch.zeros(200, device=device)[::2]])
    with pytest.raises(ValueError, match="parameter 0 must be contiguous"):
        step(params=[torch.zeros(200, device=device)[::2]])
    with pytest.raises(TypeError, match="one dtype"):
        step(params=[params[0].to(torch.int32)])
    with pytest.raises(ValueError, match=r"exp_avg must be a contiguous torch\.float32"):
        step(exp_avg=state["exp_avg"].double())
    with pytest.raises(ValueError, match="steps must be"):
        step(steps=state["steps"].double())
    with pytest.raises(ValueError, match="groups must be"):
        step(groups=state["groups"].long())
    with pytest.raises(ValueError, match="hyper must be"):
        step(hyper=state["hyper"].float())
    with pytest.raises(ValueError, match="come together"):
        step(cohorts=torch.zeros(plan.active, dtype=torch.uint8, device=device))
    with pytest.raises(ValueError, match="master weights of bf16 and fp16"):
        step(residual=torch.zeros(plan.active, dtype=torch.int16, device=device))
