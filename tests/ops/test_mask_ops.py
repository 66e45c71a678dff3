"""pack, unpack, popcount, overlap, indices: bit-exact against numpy, on the grid."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from sparseopt import functional

SIZES = (0, 1, 7, 8, 9, 31, 32, 33, 1023, 1025, 65535, 65536, 65537)
DENSITIES = ("none", "one", 0.01, 0.5, "all")
LARGE = 20_000_003


def numpy_packed(mask: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(mask.numpy().reshape(-1), bitorder="little"))


def check_mask(mask: Tensor, other: Tensor, device: torch.device, offset: int, shift: Callable[..., Tensor]) -> None:
    n = mask.numel()
    expected, second = numpy_packed(mask), numpy_packed(other)
    packed = functional.pack_mask(shift(mask.to(device), offset))
    assert packed.device.type == device.type
    assert torch.equal(packed.cpu(), expected)

    packed, second_packed = shift(expected.to(device), offset), shift(second.to(device), offset)
    assert torch.equal(functional.unpack_mask(packed, n).cpu(), mask)
    count = functional.popcount(packed)
    assert count.dtype == torch.int64
    assert count.shape == ()
    assert int(count) == int(np.count_nonzero(mask.numpy()))
    indices = functional.mask_indices(packed, n)
    assert indices.dtype == torch.int32
    assert torch.equal(indices.cpu().long(), torch.from_numpy(np.flatnonzero(mask.numpy())))
    overlap = functional.mask_overlap(packed, second_packed)
    assert overlap.tolist() == [int((mask & other).sum()), int((mask | other).sum())]


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("n", SIZES)
def test_grid(
    device: torch.device, n: int, density: float | str, offset: int, mask_of: Callable, shift: Callable
) -> None:
    check_mask(mask_of(n, density), mask_of(n, 0.3), device, offset, shift)


@pytest.mark.parametrize("density", DENSITIES)
def test_twenty_million(
    device: torch.device, density: float | str, mask_of: Callable, shift: Callable, native_only: None
) -> None:
    check_mask(mask_of(LARGE, density), mask_of(LARGE, 0.3), device, 0, shift)


@pytest.mark.parametrize("run", [8, 16, 32, 64])
def test_runs(device: torch.device, run: int, mask_of: Callable, shift: Callable) -> None:
    check_mask(mask_of(10_007, 0.3, run), mask_of(10_007, 0.3), device, 0, shift)


def test_shapes_and_strides(device: torch.device) -> None:
    mask = torch.rand(33, 57) < 0.4
    on_device = mask.to(device)
    assert torch.equal(functional.pack_mask(on_device.t()).cpu(), numpy_packed(mask.t().contiguous()))
    assert torch.equal(functional.pack_mask(on_device[::2, 3:]).cpu(), numpy_packed(mask[::2, 3:].contiguous()))
    assert torch.equal(functional.pack_mask(on_device[0, 0]).cpu(), numpy_packed(mask[0, :1]))
    packed = functional.pack_mask(on_device)
    assert torch.equal(functional.unpack_mask(packed, (33, 57)).cpu(), mask)

    spread = torch.stack([packed, ~packed], 1)[:, 0]
    assert not spread.is_contiguous()
    assert torch.equal(functional.unpack_mask(spread, mask.numel()).cpu(), mask.view(-1))
    assert int(functional.popcount(spread)) == int(mask.sum())
    assert torch.equal(functional.mask_indices(spread, mask.numel()).cpu().long(), mask.view(-1).nonzero().view(-1))
    assert functional.mask_overlap(spread, packed).tolist() == [int(mask.sum())] * 2


def test_expanded_mask(device: torch.device) -> None:
    mask = (torch.rand(1, 100) < 0.4).to(device).expand(7, 100)
    assert torch.equal(functional.pack_mask(mask).cpu(), numpy_packed(mask.cpu().contiguous()))


def test_refuses_what_it_cannot_pack(device: torch.device) -> None:
    packed = torch.zeros(4, dtype=torch.uint8, device=device)
    with pytest.raises(TypeError, match="bool tensor, got float32"):
        functional.pack_mask(torch.zeros(8, device=device))
    with pytest.raises(TypeError, match="packed mask"):
        functional.popcount(torch.zeros(4, device=device))
    with pytest.raises(ValueError, match="2 bytes for a mask of 9 entries, got 4 bytes"):
        functional.unpack_mask(packed, 9)
    with pytest.raises(ValueError, match="5 bytes for a mask of 33 entries"):
        functional.mask_indices(packed, 33)
    with pytest.raises(ValueError, match="one length"):
        functional.mask_overlap(packed, packed[:3])
