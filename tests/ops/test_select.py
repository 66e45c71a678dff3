"""select_entries: exact counts and ties, on the grid; NaN, infinities, zeros, random scores, what it refuses."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from sparseopt import _schema, functional, reference
from sparseopt.optim.dynamic.patterns import LARGEST, LOWEST, choose

SIZES = (0, 1, 7, 8, 9, 33, 1023, 1025, 32767, 32769)
DENSITIES = ("none", "one", 0.3, "all")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHARES = (0.0, 0.3, 1.0)


@pytest.fixture
def wide_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of the blocks in the interpreter, which takes as long for a large one as for a small one."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        monkeypatch.setattr("sparseopt.triton_kernels.select.BLOCK", 8192)


@pytest.fixture(params=[False, True], ids=["whole", "sampled"])
def sampling(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's kernels look at a sample first where there are many entries: here also where there are few."""
    if request.param:
        monkeypatch.setattr("sparseopt.triton_kernels.select.SAMPLED", 0)


def together(masks: Sequence[Tensor]) -> Tensor:
    begins = _schema.mask_begins([mask.numel() for mask in masks])
    packed = torch.zeros(begins[-1], dtype=torch.uint8)
    for begin, mask in zip(begins, masks, strict=False):
        bits = functional.pack_mask(mask)
        packed[begin : begin + bits.numel()] = bits
    return packed


def hard_scores(n: int, dtype: torch.dtype) -> Tensor:
    """Many ties, zeros of both signs, subnormals, infinities, the largest number: no NaN."""
    drawn = torch.randn(n, dtype=torch.float64)
    drawn = torch.where(torch.rand(n) < 0.5, (drawn * 2).round() / 2, drawn)
    special = torch.tensor(
        [0.0, -0.0, torch.inf, -torch.inf, torch.finfo(dtype).max, -torch.finfo(dtype).tiny / 4, 1e-30]
    )
    picked = special[torch.randint(0, len(special), (n,))].double()
    return torch.where(torch.rand(n) < 0.1, picked, drawn).to(dtype)


def by_choose(score: Tensor, mask: Tensor, count: int, grow: bool) -> Tensor:
    """As one tensor after the other is done with scores of a criterion."""
    magnitude = score.float().abs()
    if grow:
        return choose(torch.where(mask, LOWEST, magnitude.where(magnitude.isfinite(), 0)), count)
    return choose(torch.where(mask, -magnitude.clamp(-LARGEST, LARGEST), LOWEST), count)


def check(
    scores: list[Tensor], masks: list[Tensor], share: float | Sequence[float], grow: bool, device: torch.device,
    same: Callable,
) -> None:  # fmt: skip
    """``share``: of the entries that may be chosen, for all tensors or each."""
    shares = [share] * len(masks) if isinstance(share, float) else share
    counts = [round(share * int((mask ^ grow).sum())) for share, mask in zip(shares, masks, strict=True)]
    given = (together(masks), torch.tensor(counts))
    chosen, odd, squares = functional.select_entries(
        [score.to(device) for score in scores], *(tensor.to(device) for tensor in given), grow=grow
    )
    expected = reference.select_entries(scores, *given, grow, None)
    assert same(chosen.cpu(), expected[0])
    assert same(odd.cpu(), expected[1])
    if float(expected[2]) < 1e36:  # where sums overflow depends on their order
        torch.testing.assert_close(squares.cpu(), expected[2], rtol=1e-5, atol=0)
    begins = _schema.mask_begins([score.numel() for score in scores])
    for begin, score, mask, count in zip(begins, scores, masks, counts, strict=False):
        n = score.numel()
        found = functional.unpack_mask(chosen.cpu()[begin : begin + (n + 7) // 8], n)
        assert int(found.sum()) == count
        assert torch.equal(found, by_choose(score, mask, count, grow))


@pytest.mark.usefixtures("wide_blocks")
@pytest.mark.parametrize("grow", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("n", SIZES)
def test_grid(
    device: torch.device, n: int, density: float | str, dtype: torch.dtype, grow: bool, mask_of: Callable,
    same_bits: Callable,
) -> None:  # fmt: skip
    scores = [hard_scores(n, dtype) for _ in SHARES]
    check(scores, [mask_of(n, density) for _ in SHARES], SHARES, grow, device, same_bits)


@pytest.mark.usefixtures("wide_blocks")
@pytest.mark.parametrize("share", SHARES[1:])
@pytest.mark.parametrize("grow", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_tensors(
    device: torch.device, dtype: torch.dtype, grow: bool, share: float, mask_of: Callable, same_bits: Callable
) -> None:
    """Empty ones, an inactive and a full one, all equal, all zero; misaligned ones."""
    sizes = (40_000, 0, 1, 513, 8192, 70_001, 0, 64, 33_000, 0)
    densities = (0.2, "none", "all", 0.5, "none", 0.03, "all", "all", "one", "none")
    masks = [mask_of(n, d) for n, d in zip(sizes, densities, strict=True)]
    scores = [hard_scores(n, dtype) for n in sizes]
    scores[0].fill_(-2.0)
    scores[8].zero_()
    shifted = [torch.cat([score.new_zeros(1), score])[1:] for score in scores]
    check(shifted, masks, share, grow, device, same_bits)
    aligned = [torch.randn(n).to(dtype) for n in sizes]
    check(aligned, masks, share, grow, device, same_bits)


@pytest.mark.usefixtures("sampling")
@pytest.mark.parametrize("grow", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_neighbouring_numbers(
    device: torch.device, dtype: torch.dtype, grow: bool, mask_of: Callable, same_bits: Callable
) -> None:
    """Scores that differ in their last bits, around a carry to the next digit."""
    n, item = 3001, torch.finfo(dtype).bits
    integer = {16: torch.int16, 32: torch.int32, 64: torch.int64}[item]
    around = torch.tensor(1.0, dtype=dtype).view(integer)
    step = 1 << 29 if dtype == torch.float64 else 1  # neighbours in fp32, to which fp64 is rounded
    scores = (around + step * torch.randint(-40, 41, (n,))).to(integer).view(dtype)
    for share in SHARES:
        check([scores], [mask_of(n, 0.4)], share, grow, device, same_bits)


@pytest.mark.usefixtures("sampling", "wide_blocks")
@pytest.mark.parametrize("grow", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_that_change_along_a_tensor(
    device: torch.device, dtype: torch.dtype, grow: bool, mask_of: Callable, same_bits: Callable
) -> None:
    """Kernels look at some pieces of 128 first: here these are unlike all others, or the scores are sorted."""
    n = 2 * 32768 + 5000
    place = torch.arange(n)
    unlike = torch.randn(n) * torch.where(place // 128 % 16 == place // 32768, 100.0, 1.0)
    scores = [unlike.to(dtype), torch.randn(n).abs().sort().values.to(dtype), torch.randn(9000).to(dtype)]
    masks = [mask_of(score.numel(), 0.3) for score in scores]
    for share in (0.02, 0.4):
        check(scores, masks, share, grow, device, same_bits)


def test_each_count_by_itself(device: torch.device, mask_of: Callable, same_bits: Callable) -> None:
    """Every count of a tensor with ties, in tensors side by side."""
    score, mask = (torch.arange(48) % 5 - 2.0), mask_of(48, 0.5)
    for grow in (False, True):
        counts = torch.arange(int((mask ^ grow).sum()) + 1)
        packed = together([mask] * len(counts))
        chosen, _, _ = functional.select_entries(
            [score.to(device)] * len(counts), packed.to(device), counts.to(device), grow=grow
        )
        for i, bits in enumerate(chosen.cpu().view(len(counts), -1)):
            assert torch.equal(functional.unpack_mask(bits[:6], 48), by_choose(score, mask, i, grow))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_is_counted(device: torch.device, dtype: torch.dtype) -> None:
    score = torch.tensor(
        [1.0, torch.nan, torch.inf, -torch.inf, torch.nan, 2.0, torch.nan, 3.0], dtype=dtype, device=device
    )
    packed = together([torch.arange(8) < 5] * 2).to(device)
    counts = torch.tensor([1, 0], device=device)
    chosen, odd, squares = functional.select_entries([score, score], packed, counts, grow=True)
    assert odd.tolist() == [5, 5]
    assert float(squares) == 2 * (4 + 9)
    assert [chosen[0].item(), chosen[64].item()] == [128, 0]
    _, odd, squares = functional.select_entries([score, score], packed, counts, grow=False)
    assert odd.tolist() == [2, 2]
    assert not squares


@pytest.mark.usefixtures("wide_blocks")
@pytest.mark.parametrize("grow", [False, True])
def test_random_scores(device: torch.device, grow: bool, mask_of: Callable, same_bits: Callable) -> None:
    """The seed and the place decide, not the scores: about the same share everywhere."""
    sizes = (100_000, 1, 33_001)
    masks = [mask_of(n, 0.3) for n in sizes]
    counts = torch.tensor([int((mask ^ grow).sum()) // 3 for mask in masks])
    seeds = torch.tensor([3, 2**62 + 12345678901234567, 2**63 - 1])
    scores = [torch.full((n,), torch.nan) for n in sizes]
    given = [tensor.to(device) for tensor in (together(masks), counts)]
    on_device = [score.to(device) for score in scores]
    chosen, odd, squares = functional.select_entries(on_device, *given, grow=grow, seeds=seeds.to(device))
    expected = reference.select_entries(scores, together(masks), counts, grow, seeds)
    assert same_bits(chosen.cpu(), expected[0])
    assert not odd.any()
    assert not squares
    found = functional.unpack_mask(chosen.cpu()[:12_500], 100_000)
    assert int(found.sum()) == int(counts[0])
    shares = found.view(10, -1).sum(1) / (masks[0] ^ grow).view(10, -1).sum(1)
    assert ((shares - 1 / 3).abs() < 0.04).all()
    other = functional.select_entries(on_device, *given, grow=grow, seeds=(seeds ^ 1).to(device))[0]
    assert not torch.equal(other, chosen)


def test_random_keys_are_even() -> None:
    keys = reference.random_keys(7, torch.arange(1 << 20) + (1 << 40))
    assert ((torch.bincount(keys >> 20, minlength=16) / (1 << 16) - 1).abs() < 0.02).all()
    assert int(keys.min()) >= 0
    assert int(keys.max()) < 1 << 24
    assert len(keys.unique()) > 0.95 * (1 << 20)


def test_large(device: torch.device, native_only: None, mask_of: Callable, same_bits: Callable) -> None:
    n = 20_000_003
    for grow, dtype in ((False, torch.bfloat16), (True, torch.float32)):
        check([hard_scores(n, dtype)], [mask_of(n, 0.2)], 0.3, grow, device, same_bits)


def test_wrong_arguments_are_named(device: torch.device) -> None:
    score, packed = torch.ones(50, device=device), torch.zeros(64, dtype=torch.uint8, device=device)
    counts = torch.zeros(1, dtype=torch.int64, device=device)
    select = functional.select_entries
    with pytest.raises(TypeError, match=r"one dtype .* got \['torch\.float16', 'torch\.float32'\]"):
        select([score, score.half()], packed, counts, grow=True)
    with pytest.raises(ValueError, match="scores 0 must be contiguous"):
        select([score.view(10, 5).t()], packed, counts, grow=True)
    with pytest.raises(ValueError, match=r"packed must be a contiguous uint8\[64\], got uint8\[7\]"):
        select([score], packed[:7], counts, grow=True)
    with pytest.raises(ValueError, match=r"counts must be int64\[1\]"):
        select([score], packed, counts.int(), grow=True)
    with pytest.raises(ValueError, match=r"seeds must be int64\[1\]"):
        select([score], packed, counts, grow=True, seeds=torch.zeros(2, dtype=torch.int64, device=device))
