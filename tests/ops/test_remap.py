"""remap_entries_: bit-exact, on the grid; plans with other offsets and runs, several pairs, what it refuses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sparseopt import functional
from sparseopt.optim.plan import IndexPlan

SIZES = (0, 1, 7, 8, 9, 31, 32, 33, 1023, 1025, 65535, 65536, 65537)
DENSITIES = ("none", "one", 0.01, 0.5, "all")
DTYPES = (torch.float32, torch.int16, torch.bfloat16, torch.uint8, torch.float64)


def plan_of(masks: list[Tensor]) -> IndexPlan:
    return IndexPlan.build([functional.pack_mask(mask) for mask in masks], [mask.numel() for mask in masks])


def odd_values(n: int, dtype: torch.dtype) -> Tensor:
    """Random bits: NaNs of every payload, infinities, subnormals and -0 among them."""
    return torch.randint(0, 256, (n * dtype.itemsize,), dtype=torch.uint8).view(dtype)


def check(
    before: list[Tensor], after: list[Tensor], dtypes: tuple[torch.dtype, ...], device: torch.device, same: Callable
) -> None:
    old, new = plan_of(before), plan_of(after)
    sources = [odd_values(old.active, dtype) for dtype in dtypes]
    targets = [odd_values(new.active, dtype) for dtype in dtypes]
    moved = [target.to(device) for target in targets]
    functional.remap_entries_(moved, [source.to(device) for source in sources], new.to(device), old.to(device))
    for target, source, found in zip(targets, sources, moved, strict=True):
        for t, (mine, theirs) in enumerate(zip(after, before, strict=True)):
            dense = torch.zeros(mine.numel(), dtype=source.dtype)
            dense[theirs] = source[old.arena(t)]
            expected = torch.where(theirs[mine], dense[mine], target[new.arena(t)])
            assert same(found.cpu()[new.arena(t)], expected)


@pytest.mark.parametrize("after", DENSITIES)
@pytest.mark.parametrize("before", DENSITIES)
@pytest.mark.parametrize("n", SIZES)
def test_grid(
    device: torch.device, n: int, before: float | str, after: float | str, mask_of: Callable, same_bits: Callable
) -> None:
    check([mask_of(n, before)], [mask_of(n, after)], (torch.float32,), device, same_bits)


@pytest.mark.parametrize("kept", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("runs", [(1, 1), (8, 64), (1, 16), (32, 1)])
def test_many_tensors_and_pairs(
    device: torch.device, runs: tuple[int, int], kept: float, mask_of: Callable, same_bits: Callable
) -> None:
    """An empty tensor, an inactive one and a full one among them; five pairs of all sizes; 2- and 4-byte offsets."""
    sizes = (8192, 0, 64 * 100, 1024, 40_000, 3 * 64)
    before = [mask_of(n, d, runs[0]) for n, d in zip(sizes, (0.3, "none", 0.02, "all", 0.2, "none"), strict=True)]
    drawn = [mask_of(n, d, runs[1]) for n, d in zip(sizes, (0.3, "none", 0.5, 0.9, 0.01, "all"), strict=True)]
    after = [torch.where(torch.rand(m.numel()) < kept, m, x) for m, x in zip(before, drawn, strict=True)]
    check(before, after, DTYPES, device, same_bits)
    check(after, before, DTYPES[:1], device, same_bits)


def test_offsets_of_different_sizes(device: torch.device, mask_of: Callable, same_bits: Callable) -> None:
    wide, narrow = [mask_of(400_000, 0.002)], [mask_of(400_000, 0.1)]
    assert {plan_of(masks).indices.dtype for masks in (wide, narrow)} == {torch.int16, torch.int32}
    wide[0] |= narrow[0] & (torch.rand(400_000) < 0.01)
    check(wide, narrow, (torch.float32,), device, same_bits)
    check(narrow, wide, (torch.float32,), device, same_bits)


def test_large(device: torch.device, native_only: None, mask_of: Callable, same_bits: Callable) -> None:
    before = mask_of(20_000_003, 0.05)
    check([before], [before ^ mask_of(20_000_003, 0.01)], (torch.float32, torch.uint8), device, same_bits)


def test_wrong_arguments_are_named(device: torch.device) -> None:
    old = plan_of([torch.arange(50) % 2 == 0]).to(device)
    new = plan_of([torch.arange(50) % 5 == 0]).to(device)
    source, target = torch.ones(25, device=device), torch.zeros(10, device=device)
    remap = functional.remap_entries_
    with pytest.raises(ValueError, match="as many sources as targets, 1, got 0"):
        remap([target], [], new, old)
    with pytest.raises(ValueError, match="of the same tensors"):
        remap([target], [source], new, plan_of([torch.ones(51, dtype=torch.bool)]).to(device))
    with pytest.raises(ValueError, match=r"source 0 must be a contiguous vector of 25 values .* float32\[10\]"):
        remap([target], [target], new, old)
    with pytest.raises(ValueError, match="target 0 must be a contiguous vector of 10 values"):
        remap([torch.zeros(20, device=device)[::2]], [source], new, old)
    with pytest.raises(TypeError, match=r"target's dtype torch\.float32, got torch\.float16"):
        remap([target], [source.half()], new, old)
    assert not target.any()
    remap([target], [source], new, old)
    assert target.tolist() == [1, 0] * 5
