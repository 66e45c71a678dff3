"""gather_grads_: exact, on the grid; accumulation, absent tensors, parts of a plan."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sparseopt import functional
from sparseopt.optim.plan import IndexPlan

SIZES = (0, 1, 7, 8, 9, 31, 32, 33, 1023, 1025, 65535, 65536, 65537)
DENSITIES = ("none", "one", 0.01, 0.5, "all")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def plan_of(masks: list[Tensor]) -> IndexPlan:
    return IndexPlan.build([functional.pack_mask(mask) for mask in masks], [mask.numel() for mask in masks])


def expected_of(masks: list[Tensor], grads: list[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat([grad[mask].to(dtype) for mask, grad in zip(masks, grads, strict=True)])


def check(masks: list[Tensor], dtype: torch.dtype, device: torch.device, place: Callable[[Tensor], Tensor]) -> None:
    plan = plan_of(masks)
    accumulated = torch.float64 if dtype == torch.float64 else torch.float32
    grads = [torch.randn(mask.numel()).to(dtype) for mask in masks]
    expected = expected_of(masks, grads, accumulated)
    compact = torch.empty(plan.active, dtype=accumulated, device=device)
    squares = torch.rand(len(plan.chunks) * plan.squares_per_chunk, dtype=accumulated, device=device)
    placed = [place(grad.to(device)) for grad in grads]
    functional.gather_grads_(compact, placed, plan.to(device))
    assert torch.equal(compact.cpu(), expected)
    functional.gather_grads_(compact, placed, plan.to(device), accumulate=True, squares=squares)
    assert torch.equal(compact.cpu(), expected + expected)
    rows = [(2 * expected[s : s + c]).double().square().sum() for s, c in plan.chunks[:, 2:4].tolist()]
    torch.testing.assert_close(
        squares.cpu().double().view(len(rows), plan.squares_per_chunk).sum(1),
        torch.stack(rows) if rows else torch.zeros(0).double(),
        rtol=1e-5,
        atol=0,
    )
    assert all(torch.equal(p.cpu(), g) for p, g in zip(placed, grads, strict=True))


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", SIZES)
def test_grid(device: torch.device, n: int, dtype: torch.dtype, density: float | str, mask_of: Callable) -> None:
    check([mask_of(n, density)], dtype, device, lambda t: t)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("density", [0.01, 0.5, "all"])
def test_misaligned(
    device: torch.device, dtype: torch.dtype, density: float | str, mask_of: Callable, shift: Callable
) -> None:
    check([mask_of(10_001, density), mask_of(4097, density)], dtype, device, lambda t: shift(t, 1))


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("run", [8, 16, 32, 64])
def test_runs(
    device: torch.device, dtype: torch.dtype, run: int, offset: int, mask_of: Callable, shift: Callable
) -> None:
    masks = [mask_of(64 * 333, 0.3, run), mask_of(64 * 100, 0.9, run), mask_of(64 * 100, "all")]
    assert plan_of(masks).runs == (run, run, 0)
    check(masks, dtype, device, lambda t: shift(t, offset))


@pytest.mark.parametrize("density", [0.01, 0.5, "all"])
def test_twenty_million(device: torch.device, density: float | str, mask_of: Callable, native_only: None) -> None:
    check([mask_of(20_000_003, density)], torch.bfloat16, device, lambda t: t)


def test_absent_tensors_and_parts_of_a_plan(device: torch.device, mask_of: Callable) -> None:
    masks = [mask_of(n, d) for n, d in ((5000, 0.3), (100, "none"), (33, "all"), (9000, 0.01), (1, "one"))]
    plan = plan_of(masks)
    grads = [torch.randn(mask.numel()) for mask in masks]
    expected = expected_of(masks, grads, torch.float32)
    on_device = [grad.to(device) for grad in grads]

    absent = list(on_device)
    absent[2] = absent[2].new_empty(0)
    compact = torch.full((plan.active,), 7.0, device=device)
    functional.gather_grads_(compact, absent, plan.to(device))
    untouched = expected.clone()
    untouched[plan.arena(2)] = 7.0
    assert torch.equal(compact.cpu(), untouched)

    compact.fill_(7.0)
    functional.gather_grads_(compact, [], plan.to(device), first_tensor=2)
    assert torch.equal(compact.cpu(), torch.full_like(expected, 7.0))
    for first, last in ((0, 2), (2, 4), (4, 5)):
        functional.gather_grads_(compact, on_device[first:last], plan.to(device), first_tensor=first)
    assert torch.equal(compact.cpu(), expected)


def test_many_tensors_in_one_call(device: torch.device, mask_of: Callable) -> None:
    check([mask_of(1 + 37 * t % 300, 0.5) for t in range(300)], torch.bfloat16, device, lambda t: t)


def test_special_values_survive(device: torch.device) -> None:
    values = torch.tensor(
        [float("nan"), float("inf"), -float("inf"), -0.0, 1e-40, -1e-40, 3.0e38], dtype=torch.bfloat16
    )
    plan = plan_of([torch.ones(values.numel(), dtype=torch.bool)])
    compact = torch.zeros(values.numel(), device=device)
    functional.gather_grads_(compact, [values.to(device)], plan.to(device))
    torch.testing.assert_close(compact.cpu(), values.float(), rtol=0, atol=0, equal_nan=True)
    assert torch.signbit(compact[3])


def test_refuses_what_does_not_fit(device: torch.device, mask_of: Callable) -> None:
    plan = plan_of([mask_of(100, 0.5), mask_of(50, 0.5)])
    on_device = plan.to(device)
    compact = torch.zeros(plan.active, device=device)
    grads = [torch.zeros(100, device=device), torch.zeros(50, device=device)]
    with pytest.raises(ValueError, match=r"tensors 1\.\.3 of a plan of 2"):
        functional.gather_grads_(compact, grads, on_device, first_tensor=1)
    with pytest.raises(ValueError, match="contiguous vector"):
        functional.gather_grads_(compact[1:], grads, on_device)
    with pytest.raises(ValueError, match="gradient 1 must be contiguous with 50 entries"):
        functional.gather_grads_(compact, [grads[0], torch.zeros(49, device=device)], on_device)
    with pytest.raises(ValueError, match="gradient 0 must be contiguous"):
        functional.gather_grads_(compact, [torch.zeros(200, device=device)[::2], grads[1]], on_device)
    with pytest.raises(TypeError, match="one dtype"):
        functional.gather_grads_(compact, [grads[0], grads[1].half()], on_device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [0, 1, 1000, 20_000])
@pytest.mark.parametrize("max_norm", [1e-3, 1e3, float("inf")])
@pytest.mark.parametrize("scaled", [False, True])
def test_clip_coefficient(device: torch.device, dtype: torch.dtype, size: int, max_norm: float, scaled: bool) -> None:
    squares = torch.rand(size, dtype=dtype)
    scale = torch.tensor(1 / 512.0) if scaled else None
    norm, multiplier, skip = (torch.full((), float("nan"), device=device) for _ in range(3))
    functional.clip_coefficient_(
        squares.to(device), max_norm, norm=norm, multiplier=multiplier, skip=skip,
        inverse_scale=None if scale is None else scale.to(device), found_inf=torch.zeros((), device=device),
    )  # fmt: skip
    expected = squares.double().sum().sqrt() * (scale if scaled else 1)
    factor = min(1.0, max_norm / (float(expected) + 1e-6)) * (1 / 512 if scaled else 1)
    torch.testing.assert_close(norm.cpu().double(), expected.double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(float(multiplier), factor, rtol=1e-6, atol=0)
    assert float(skip) == 0


@pytest.mark.parametrize(("value", "found", "skipped"), [("inf", 0, 1), ("nan", 0, 1), ("1", 1, 1), ("1", 0, 0)])
def test_clip_coefficient_tells_overflow(device: torch.device, value: str, found: float, skipped: float) -> None:
    squares = torch.tensor([1.0, float(value), 2.0], device=device)
    norm, multiplier, skip = (torch.empty((), device=device) for _ in range(3))
    functional.clip_coefficient_(
        squares, 1.0, norm=norm, multiplier=multiplier, skip=skip, found_inf=torch.tensor(float(found), device=device)
    )
    assert float(skip) == skipped
