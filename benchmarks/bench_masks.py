"""Packing and reading masks of 100 M entries on the CPU, beside NumPy and PyTorch operations. All results are exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import sparseopt as so
from sparseopt import functional
from sparseopt.benchmarks.interleaved import compare, scale

ENTRIES = 100_000_000
BITS = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)


def entries() -> int:
    return max(1000, round(ENTRIES * scale()))


@pytest.fixture(scope="module")
def mask() -> Tensor:
    """bool[n], 2.5% active."""
    return torch.rand(entries(), generator=torch.Generator().manual_seed(0)) < 0.025


@pytest.fixture(scope="module")
def other() -> Tensor:
    return torch.rand(entries(), generator=torch.Generator().manual_seed(1)) < 0.025


def torch_pack(mask: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(mask, (0, -mask.numel() % 8)) if mask.numel() % 8 else mask
    return (padded.view(-1, 8).view(torch.uint8) * BITS).sum(1, dtype=torch.uint8)


def torch_unpack(packed: Tensor, numel: int) -> Tensor:
    return (packed.view(-1, 1) & BITS).ne(0).view(-1)[:numel]


def numpy_unpack(packed: np.ndarray, numel: int) -> np.ndarray:
    return np.unpackbits(packed, count=numel, bitorder="little").view(np.bool_)


def numpy_popcount(packed: np.ndarray) -> int:
    return int(np.bitwise_count(packed).sum(dtype=np.int64))


def same(*runs: Callable[[], Any]) -> Callable[[], None]:
    """A check that all give the same numbers."""

    def check() -> None:
        first, *rest = (torch.as_tensor(run()).long() for run in runs)
        for value in rest:
            assert torch.equal(first, value.view(first.shape))

    return check


def run(
    benchmark: Any,
    case: str,
    ours: Callable[[], Any],
    baselines: dict[str, Callable[[], Any]],
    bars: dict[str, float] | None = None,
) -> None:
    compare(benchmark, case, ours, baselines, check=same(ours, *baselines.values()), bars=bars)


def test_pack(benchmark: Any, mask: Tensor) -> None:
    array = mask.numpy()
    run(
        benchmark,
        "bool to bits",
        lambda: so.pack_mask(mask),
        {"numpy.packbits": lambda: np.packbits(array, bitorder="little"), "torch ops": lambda: torch_pack(mask)},
        bars={"numpy.packbits": 1.5},
    )


def test_unpack(benchmark: Any, mask: Tensor) -> None:
    packed = so.pack_mask(mask)
    array, numel = packed.numpy(), mask.numel()
    run(
        benchmark,
        "bits to bool",
        lambda: so.unpack_mask(packed, numel),
        {"numpy.unpackbits": lambda: numpy_unpack(array, numel), "torch ops": lambda: torch_unpack(packed, numel)},
    )


def test_indices(benchmark: Any, mask: Tensor) -> None:
    """The baselines start from bools, which is what they take."""
    packed = so.pack_mask(mask)
    array, numel = mask.numpy(), mask.numel()
    run(
        benchmark,
        "bits to indices, 2.5% active",
        lambda: functional.mask_indices(packed, numel),
        {"torch.nonzero": lambda: torch.nonzero(mask), "numpy.flatnonzero": lambda: np.flatnonzero(array)},
        bars={"torch.nonzero": 8},
    )


def test_popcount(benchmark: Any, mask: Tensor) -> None:
    packed = so.pack_mask(mask)
    array = packed.numpy()
    baselines: dict[str, Callable[[], Any]] = {"torch.count_nonzero of bools": lambda: torch.count_nonzero(mask)}
    if hasattr(np, "bitwise_count"):  # NumPy >= 2
        baselines["numpy.bitwise_count"] = lambda: numpy_popcount(array)
    run(benchmark, "count active", lambda: functional.popcount(packed), baselines)


def test_overlap(benchmark: Any, mask: Tensor, other: Tensor) -> None:
    a, b = so.pack_mask(mask), so.pack_mask(other)
    x, y = a.numpy(), b.numpy()
    baselines: dict[str, Callable[[], Any]] = {
        "torch ops on bools": lambda: torch.stack(
            [torch.count_nonzero(mask & other), torch.count_nonzero(mask | other)]
        )
    }
    if hasattr(np, "bitwise_count"):
        baselines["numpy.bitwise_count"] = lambda: np.array([numpy_popcount(x & y), numpy_popcount(x | y)])
    run(benchmark, "intersection and union of two", lambda: functional.mask_overlap(a, b), baselines)
