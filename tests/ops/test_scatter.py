"""scatter_values_: bit-exact, on the grid; plans of flat indices, absent tensors, what it refuses."""

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


def odd_values(n: int, dtype: torch.dtype) -> Tensor:
    """Random bits: NaNs of every payload, infinities, subnormals and -0 among them."""
    return torch.randint(0, 256, (n * dtype.itemsize,), dtype=torch.uint8).view(dtype)


def check(
    masks: list[Tensor], dtype: torch.dtype, device: torch.device, place: Callable[[Tensor], Tensor], same: Callable
) -> None:
    plan = plan_of(masks)
    before = [odd_values(mask.numel(), dtype) for mask in masks]
    values = odd_values(plan.active, dtype)
    params = [place(tensor.to(device)) for tensor in before]
    on_device = plan.to(device)
    functional.scatter_values_(params, values.to(device), on_device.indices, on_device.chunks, run=plan.run)
    for tensor, (mask, old, new) in enumerate(zip(masks, before, params, strict=True)):
        expected = old.clone()
        expected[mask] = values[plan.arena(tensor)]
        assert same(new.cpu(), expected)


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", SIZES)
def test_grid(
    device: torch.device, n: int, dtype: torch.dtype, density: float | str, mask_of: Callable, same_bits: Callable
) -> None:
    check([mask_of(n, density)], dtype, device, lambda t: t, same_bits)


@pytest.mark.parametrize("run", [1, 8, 64])
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_runs_and_misaligned(
    device: torch.device,
    dtype: torch.dtype,
    offset: int,
    run: int,
    mask_of: Callable,
    shift: Callable,
    same_bits: Callable,
) -> None:
    masks = [mask_of(8192, 0.3, run), mask_of(64 * 100, 0.02, run), mask_of(1024, "all")]
    check(masks, dtype, device, lambda t: shift(t, offset), same_bits)


def test_large(device: torch.device, native_only: None, mask_of: Callable, same_bits: Callable) -> None:
    check([mask_of(20_000_003, 0.01)], torch.bfloat16, device, lambda t: t, same_bits)


def test_flat_indices_without_a_plan(device: torch.device, same_bits: Callable) -> None:
    """Base 0 and offsets that are the flat indices themselves: what a delta has."""
    param, indices = torch.zeros(3, 7, device=device), torch.tensor([0, 5, 20], dtype=torch.int32, device=device)
    chunks = torch.tensor([[0, 0, 0, 3, 0, 0]], device=device)
    values = torch.tensor([1.0, -0.0, float("nan")], device=device)
    functional.scatter_values_([param], values, indices, chunks)
    assert same_bits(param.view(-1)[indices.long()], values)
    assert int((param != 0).sum()) == 2


def test_absent_tensors_are_left_out(device: torch.device) -> None:
    plan = plan_of([torch.ones(50, dtype=torch.bool), torch.ones(40, dtype=torch.bool)]).to(device)
    params = [torch.zeros(50, device=device), torch.zeros(0, device=device)]
    functional.scatter_values_(params, torch.arange(90.0, device=device), plan.indices, plan.chunks)
    assert torch.equal(params[0].cpu(), torch.arange(50.0))


def test_wrong_arguments_are_named(device: torch.device) -> None:
    plan = plan_of([torch.ones(50, dtype=torch.bool)]).to(device)
    param, values = torch.zeros(50, device=device), torch.ones(50, device=device)
    scatter = functional.scatter_values_
    with pytest.raises(TypeError, match="one dtype"):
        scatter([param, param.half()], values, plan.indices, plan.chunks)
    with pytest.raises(TypeError, match="one dtype"):
        scatter([param.int()], values, plan.indices, plan.chunks)
    with pytest.raises(ValueError, match=r"values must be a contiguous vector of torch\.float32, got float16\[50\]"):
        scatter([param], values.half(), plan.indices, plan.chunks)
    with pytest.raises(ValueError, match="parameter 0 must be contiguous"):
        scatter([torch.zeros(100, device=device)[::2]], values, plan.indices, plan.chunks)
    with pytest.raises(ValueError, match="indices must be an int16 or int32 vector"):
        scatter([param], values, plan.indices.long(), plan.chunks)
    with pytest.raises(ValueError, match=r"chunks must be int64\[C, 6\]"):
        scatter([param], values, plan.indices, plan.chunks[:, :5])
    assert not param.any()
