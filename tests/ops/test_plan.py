"""IndexPlan: positions are the mask's, in the layout that kernels expect, also past 2^31 elements."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sparseopt import functional, reference
from sparseopt.optim import plan_on_device
from sparseopt.optim.plan import CHUNK, IndexPlan

PAST = 2**31  # first flat index that int32 cannot hold


def plan_of(masks: list[Tensor]) -> IndexPlan:
    return IndexPlan.build([functional.pack_mask(mask) for mask in masks], [mask.numel() for mask in masks])


def check_layout(plan: IndexPlan) -> None:
    tensor, base, start, count, index_start, shift = plan.chunks.unbind(1)
    assert (count > 0).all()
    assert (count <= CHUNK[plan.indices.dtype]).all()
    assert torch.equal(start, torch.cumsum(count, 0) - count)  # rows in arena order, without gaps
    assert (tensor.diff() >= 0).all()
    stored = (count + (1 << shift) - 1) >> shift
    assert (index_start + stored <= plan.indices.numel()).all()
    assert (base >= 0).all()
    assert plan.indices.dtype == torch.int16 or (plan.indices >= 0).all()
    assert plan.starts[-1] == int(count.sum()) == plan.active


@pytest.mark.parametrize("density", ["none", "one", 0.01, 0.5, "all"])
@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 31, 32, 33, 1023, 1025, 65535, 65536, 65537])
def test_grid(n: int, density: float | str, mask_of: Callable) -> None:
    masks = [mask_of(n, density), mask_of(100, 0.5), mask_of(n, density)]
    plan = plan_of(masks)
    check_layout(plan)
    assert plan.counts == tuple(int(mask.sum()) for mask in masks)
    for tensor, mask in enumerate(masks):
        assert torch.equal(plan.positions(tensor), mask.nonzero().view(-1))


@pytest.mark.parametrize("run", [8, 16, 32, 64])
def test_runs_store_one_offset_each(run: int, mask_of: Callable) -> None:
    mask = mask_of(64 * 1000, 0.3, run)
    plan = plan_of([mask])
    check_layout(plan)
    assert plan.runs == (run,)
    assert plan.indices.numel() == 1 + int(mask.sum()) // run
    assert torch.equal(plan.positions(0), mask.nonzero().view(-1))


def test_fully_active_stores_no_offsets(mask_of: Callable) -> None:
    plan = IndexPlan.build([None, functional.pack_mask(mask_of(10_000, "all"))], [9000, 10_000])
    check_layout(plan)
    assert plan.runs == (0, 0)
    assert plan.indices.tolist() == [0]
    assert torch.equal(plan.positions(1), torch.arange(10_000))


@pytest.mark.parametrize(
    ("densities", "dtype"),
    [
        ((0.025,), torch.int16),
        ((0.1, 0.05), torch.int16),
        ((0.0025,), torch.int32),  # 1024 entries span 400,000 elements
        ((0.025, 0.001), torch.int16),  # chunks of few entries in some tensors
        ((), torch.int32),
    ],
)
def test_narrow_offsets_where_they_save(densities: tuple[float, ...], dtype: torch.dtype, mask_of: Callable) -> None:
    masks = [mask_of(2_000_000, density) for density in densities]
    masks.append(mask_of(5000, "all"))
    plan = plan_of(masks)
    check_layout(plan)
    assert plan.indices.dtype == dtype
    for tensor, mask in enumerate(masks):
        assert torch.equal(plan.positions(tensor), mask.nonzero().view(-1))


def test_narrow_offsets_across_gaps(mask_of: Callable) -> None:
    """Dense stretches far apart: a chunk is cut where its entries span 2^16 elements or more."""
    mask = torch.zeros(3_000_000, dtype=torch.bool)
    for first in (0, 70_001, 1_000_000, 2_900_000):
        mask[first : first + 20_500 : 2] = True
    plan = plan_of([mask])
    check_layout(plan)
    assert plan.indices.dtype == torch.int16
    assert torch.equal(plan.positions(0), mask.nonzero().view(-1))


@pytest.mark.parametrize(
    ("kinds", "run"), [(((0.3, 16), (0.3, 64)), 16), (((0.3, 16), ("all", 1)), 16), (((0.3, 16), (0.3, 1)), 1)]
)
def test_common_run(kinds: tuple[tuple[float | str, int], ...], run: int, mask_of: Callable) -> None:
    plan = plan_of([mask_of(64 * 300, density, length) for density, length in kinds])
    assert plan.run == run


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 16], ids=["entries", "runs"])
def test_mask_past_two_to_the_31(step: int, native_only: None) -> None:
    """A real packed mask of 2^31 + 64 bits: 256 MiB of bytes."""
    numel = PAST + 64
    packed = torch.zeros(numel // 8, dtype=torch.uint8)
    firsts = torch.tensor([0, 48, 2**30, PAST - 32, PAST - 16, PAST, PAST + 16, PAST + 48])
    expected = (firsts[:, None] + torch.arange(step)).view(-1)
    for index in expected.tolist():
        packed[index // 8] |= 1 << (index % 8)
    assert torch.equal(functional.mask_indices(packed, numel), expected)  # int64
    plan = IndexPlan.build([packed], [numel])
    check_layout(plan)
    assert plan.runs == (step,)
    assert torch.equal(plan.positions(0), expected)
    assert int(functional.popcount(packed)) == expected.numel()


# ---- kernels past 2^31 elements: real tensors whose untouched pages are never committed ------------------------------
def far_plan(shift: int) -> IndexPlan:
    """Entries at the front and beyond 2^31 of a tensor of 2^31 + 10,000 elements; the far chunk has its own base."""
    run = 1 << shift
    if shift == 12:
        offsets, counts = [0], (100, 4096)
        rows = [[0, 0, 0, counts[0], 0, shift], [0, PAST + 5, counts[0], counts[1], 0, shift]]
    else:
        offsets = [0, 3 * run, 7 * run, 0, 2 * run, 9000 // run * run - run]
        counts = (3 * run, 3 * run)
        rows = [[0, 0, 0, counts[0], 0, shift], [0, PAST, counts[0], counts[1], 3, shift]]
    active = sum(counts)
    return IndexPlan(
        numels=(PAST + 10_000,),
        counts=(active,),
        starts=(0, active),
        runs=(run if shift < 12 else 0,),
        indices=torch.tensor(offsets, dtype=torch.int32),
        chunks=torch.tensor(rows),
        first_chunk=(0, 2),
        run={0: 1, 3: 8, 6: 64, 12: 64}[shift],
    )


@pytest.fixture
def unpoisoned(device: torch.device) -> None:
    """Poisoning would commit every page."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    yield
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.mark.parametrize("shift", [0, 3, 6, 12])
def test_kernels_address_past_two_to_the_31(device: torch.device, shift: int, unpoisoned: None) -> None:
    plan = far_plan(shift)
    positions = plan.positions(0)
    assert int(positions[-1]) > PAST
    param = torch.empty(plan.numels[0], dtype=torch.bfloat16, device=device)
    grad = torch.empty(plan.numels[0], dtype=torch.bfloat16, device=device)
    weights, gradients = (torch.randn(plan.active).bfloat16() for _ in range(2))
    around = torch.tensor([1, PAST - 1, PAST + 9999], device=device)  # written, then expected to stay
    param[around] = 5.0
    param[positions.to(device)], grad[positions.to(device)] = weights.to(device), gradients.to(device)

    on_device = plan.to(device)
    compact = torch.zeros(plan.active, device=device)
    functional.gather_grads_(compact, [grad], on_device)
    assert torch.equal(compact.cpu(), gradients.float())

    frozen = around[~torch.isin(around.cpu(), positions).to(device)]
    hyper = torch.tensor([[1e-2, 0.9, 0.999, 1e-8, 0.1, 0, 1, 0]], dtype=torch.float64)
    state = [torch.zeros(1), torch.zeros(plan.active), torch.zeros(plan.active)]
    groups = torch.zeros(1, dtype=torch.int32)
    for gradient in ([grad], compact):
        steps, m, v = (t.to(device, copy=True) for t in state)
        param[positions.to(device)] = weights.to(device)
        functional.sparse_adamw_(
            [param], gradient, on_device, groups=groups.to(device), hyper=hyper.to(device),
            steps=steps, exp_avg=m, exp_avg_sq=v,
        )  # fmt: skip
        small = weights.clone()
        ones = torch.ones(plan.active, dtype=torch.bool)
        near = plan_of([ones])
        reference.sparse_adamw_(
            [small], [gradients], None, near.indices, near.chunks, groups, hyper, torch.zeros(1),
            torch.zeros(plan.active), torch.zeros(plan.active), *(None,) * 7,
        )  # fmt: skip
        torch.testing.assert_close(param[positions.to(device)].cpu(), small, rtol=2**-7, atol=0)
        assert not torch.equal(small, weights)
        assert (param[frozen] == 5.0).all()


@pytest.mark.gpu
def test_mask_ops_past_two_to_the_31_on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    numel = PAST + 1001
    mask = torch.zeros(numel, dtype=torch.bool, device="cuda")
    expected = torch.tensor([0, 7, 2**30, PAST - 1, PAST, PAST + 1, numel - 1], device="cuda")
    mask[expected] = True
    packed = functional.pack_mask(mask)
    assert int(functional.popcount(packed)) == expected.numel()
    assert torch.equal(functional.mask_indices(packed, numel), expected)
    assert functional.mask_overlap(packed, torch.zeros_like(packed)).tolist() == [0, expected.numel()]
    assert torch.equal(functional.unpack_mask(packed, numel), mask)
    plan = IndexPlan.build([packed.cpu()], [numel])
    assert torch.equal(plan.positions(0), expected.cpu())


def assert_equal_plans(a: IndexPlan, b: IndexPlan) -> None:
    for name in ("numels", "counts", "starts", "first_chunk", "run"):
        assert getattr(a, name) == getattr(b, name), name
    for name in ("indices", "chunks"):
        mine, theirs = getattr(a, name).cpu(), getattr(b, name).cpu()
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs), name


@pytest.mark.parametrize("densities", [
    (0.2, 0.2, None, "none", 0.2, None), (0.025, 0.3, "none"), (0.002, 0.001), (0.02, 0.06, None), (0.001, 0.5), (None, 0.9),
])  # fmt: skip
def test_all_tensors_at_once_give_the_same_plan(device: torch.device, densities: tuple, mask_of: Callable) -> None:
    sizes = (200_000, 70_001, 9, 300_003, 1_000_000, 65_536)[: len(densities)]
    masks = [None if density is None else mask_of(n, density) for n, density in zip(sizes, densities, strict=True)]
    if densities[0] == 0.02:
        masks[0][:150_000] = False  # and chunks that span too much
        masks[0][:150_000:60_000] = True
    packed = [None if mask is None else functional.pack_mask(mask) for mask in masks]
    assert plan_on_device._together(packed, sizes, device, ()) is not None
    assert_equal_plans(plan_on_device.build_on_device(packed, sizes, device), IndexPlan.build(packed, sizes))


@pytest.mark.parametrize("kind", ["runs", "all", "none"])
def test_other_masks_are_left_to_the_other_way(device: torch.device, kind: str, mask_of: Callable) -> None:
    masks = [mask_of(6400, 0.3), mask_of(6400, 0.3, 64) if kind == "runs" else mask_of(6400, kind)]
    packed = [functional.pack_mask(mask) for mask in masks[kind == "none" :]]
    sizes = [6400] * len(packed)
    assert plan_on_device._together(packed, sizes, device, ()) is None
    assert_equal_plans(plan_on_device.build_on_device(packed, sizes, device), IndexPlan.build(packed, sizes))


def test_tensors_known_to_be_empty_need_no_bits(device: torch.device, mask_of: Callable) -> None:
    sizes = [5000, 9000, 70_000, 800]
    packed = [functional.pack_mask(mask_of(size, 0.02)) for size in sizes]
    packed[1], packed[3] = torch.zeros_like(packed[1]), None
    expected = plan_on_device.build_on_device(packed, sizes, device)
    wrong = [*packed]
    wrong[1] = torch.full_like(packed[1], 255)  # nobody looks
    assert_equal_plans(plan_on_device.build_on_device(wrong, sizes, device, {1}), expected)
    assert expected.counts[1] == 0
