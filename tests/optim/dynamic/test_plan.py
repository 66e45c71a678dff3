"""Counts per layer, schedules, criteria."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from sparseopt.optim.dynamic.criteria import check_criterion, keep_scores
from sparseopt.optim.dynamic.distribution import distribute, proportional_counts
from sparseopt.optim.dynamic.layers import Layer
from sparseopt.optim.dynamic.policy import Plan, random_scores

SHAPES = [(16, 64), (64, 64), (3, 5), (64, 8)]
LAYERS = [
    Layer(f"l{i}.weight", nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(i))))
    for i, shape in enumerate(SHAPES)
]
SIZES = [math.prod(shape) for shape in SHAPES]


@pytest.mark.parametrize("sparsity", [0.0, 0.37, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("how", ["uniform", "erk", "global"])
def test_counts_are_exact_in_total(how: str, sparsity: float) -> None:
    counts = distribute(LAYERS, sparsity, how, lambda i: LAYERS[i].param.detach().abs())
    assert sum(counts) == max(len(SIZES), round((1 - sparsity) * sum(SIZES)))
    assert all(1 <= count <= size for count, size in zip(counts, SIZES, strict=True))


def test_uniform_and_erk_densities() -> None:
    uniform = distribute(LAYERS, 0.7, "uniform")
    assert all(abs(count - 0.3 * size) <= 1 for count, size in zip(uniform, SIZES, strict=True))
    erk = distribute(LAYERS, 0.7, "erk")
    assert erk[2] == 15, "the small layer is dense"
    expected = [(a + b) / (a * b) for a, b in SHAPES]
    ratio = (erk[0] / SIZES[0]) / (erk[1] / SIZES[1])
    assert ratio == pytest.approx(expected[0] / expected[1], rel=0.02)


def test_global_counts_are_those_of_one_threshold() -> None:
    counts = distribute(LAYERS, 0.6, "global", lambda i: LAYERS[i].param.detach().abs())
    everything = torch.cat([layer.param.detach().abs().reshape(-1) for layer in LAYERS])
    threshold = everything.sort(descending=True).values[round(0.4 * sum(SIZES)) - 1]
    assert counts == [int((layer.param.detach().abs() >= threshold).sum()) for layer in LAYERS]


def test_every_layer_has_one_entry() -> None:
    assert proportional_counts([1000, 2, 2], 5, [1000.0, 2.0, 2.0]) == [3, 1, 1]
    far = [Layer("a", nn.Parameter(torch.full((4, 4), 9.0))), Layer("b", nn.Parameter(torch.zeros(4, 4)))]
    assert distribute(far, 0.5, "global", lambda i: far[i].param.detach()) == [15, 1]


def test_unknown_distribution() -> None:
    with pytest.raises(ValueError, match="uniform, erk, global"):
        distribute(LAYERS, 0.5, "layerwise")


def test_cosine_decay_ends_at_three_quarters() -> None:
    plan = Plan("rigl", total_steps=100, interval=10, fraction=0.3)
    assert [step for step in range(1, 101) if plan.updates(step)] == [10, 20, 30, 40, 50, 60, 70]
    assert plan.exchange(0) == pytest.approx(0.3)
    assert plan.exchange(75) == 0
    assert plan.exchange(37) == pytest.approx(0.15 * (1 + math.cos(math.pi * 37 / 75)))


def test_cubic_schedule_reaches_the_sparsity_at_its_last_update() -> None:
    plan = Plan("gradual", total_steps=100, interval=20, sparsity=0.8, initial_sparsity=0.2)
    assert plan.sparsity_at(0) == pytest.approx(0.2)
    assert plan.sparsity_at(30) == pytest.approx(0.8 - 0.6 * 0.125)
    assert plan.sparsity_at(60) == plan.sparsity_at(100) == pytest.approx(0.8)
    assert [step for step in range(1, 101) if plan.updates(step)] == [20, 40, 60]


def test_a_schedule_goes_on_to_the_end() -> None:
    plan = Plan("rigl", total_steps=100, interval=25, schedule=lambda step, total: 0.1 + 0.8 * min(1.0, step / total))
    assert [step for step in range(1, 101) if plan.updates(step)] == [25, 50, 75, 100]
    assert plan.sparsity_at(100) == pytest.approx(0.9)
    assert not Plan("static", total_steps=100, interval=10).updates(10)


@pytest.mark.parametrize("value", [float("nan"), 1.0, -0.1, 2, None, "0.5", True])
def test_bad_schedules_are_refused(value: float) -> None:
    plan = Plan("rigl", total_steps=10, interval=5, schedule=lambda step, total: value)
    with pytest.raises(ValueError, match=r"for step 5 of 10 must lie in \[0, 1\)"):
        plan.sparsity_at(5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, r"the sparsity must lie in \[0, 1\), got 1.0"),
        ({"sparsity": -0.1}, r"\[0, 1\)"),
        ({"sparsity": float("nan")}, r"\[0, 1\)"),
        ({"policy": "magic"}, "rigl, set, gradual, static, got 'magic'"),
        ({"interval": 0}, "interval must be a whole number"),
        ({"total_steps": 2.5}, "total_steps"),
        ({"fraction": 1.5}, r"0\.\.1, got 1.5"),
        ({"end": 0}, "end must lie"),
        ({"policy": "static", "schedule": lambda step, total: 0.5}, "another policy"),
    ],
)
def test_bad_plans_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Plan(**options)


def test_random_scores_depend_on_seed_step_and_name_only() -> None:
    torch.manual_seed(1)
    first = random_scores((4, 4), 0, 10, "a")
    torch.manual_seed(2)
    assert torch.equal(first, random_scores((4, 4), 0, 10, "a"))
    for other in ((1, 10, "a"), (0, 20, "a"), (0, 10, "b")):
        assert not torch.equal(first, random_scores((4, 4), *other))


class SeedExample(prune.BasePruningMethod):
    """The example of the usual documents: it sets amounts itself and prunes nothing that is active."""

    PRUNING_TYPE = "unstructured"

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        mask = default_mask.clone()
        keep = int(t.numel() * (1 - self.amount))
        if keep:
            mask.view(-1)[torch.topk(t.abs().view(-1), k=keep).indices] = 1
        return mask


class Smallest(prune.BasePruningMethod):
    """Keeps the smallest."""

    PRUNING_TYPE = "unstructured"

    def __init__(self, amount: float) -> None:
        self.amount = amount

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        mask = default_mask.clone()
        mask[torch.topk(t.abs(), k=round(self.amount * t.numel())).indices] = 0
        return mask


def lowest(scores: Tensor, active: Tensor, count: int) -> Tensor:
    return torch.where(active, scores, torch.inf).reshape(-1).argsort()[:count].sort().values


def test_pruning_methods_decide_what_leaves() -> None:
    layer = LAYERS[0]
    magnitude = layer.param.detach().abs()
    active = magnitude > 0.3
    by_magnitude = lowest(magnitude, active, 50)
    for method in (SeedExample, prune.L1Unstructured(amount=0.1), prune.L1Unstructured):
        assert torch.equal(lowest(keep_scores(method, layer, active, None, 50), active, 50), by_magnitude)
    largest = torch.where(active, magnitude, 0).reshape(-1).argsort(descending=True)[:50].sort().values
    assert torch.equal(lowest(keep_scores(Smallest, layer, active, None, 50), active, 50), largest)
    rows = keep_scores(prune.LnStructured(amount=0.5, n=1, dim=0), layer, None, None, layer.numel // 2)
    assert int((rows < 0).all(1).sum()) == 8, "half of the 16 rows leave whole"


def test_score_functions_are_checked() -> None:
    layer = LAYERS[0]
    scores = keep_scores(lambda name, weight, gradient: weight * gradient, layer, None, torch.ones(16, 64), 1)
    assert torch.equal(scores, layer.param.detach())
    with pytest.raises(ValueError, match=r"shape \(64,\) for 'l0.weight', expected \(16, 64\)"):
        keep_scores(lambda name, weight, gradient: weight.sum(0), layer, None, None, 1)
    with pytest.raises(TypeError, match=r"a tensor for 'l0.weight', got float"):
        keep_scores(lambda name, weight, gradient: 1.0, layer, None, None, 1)
    with pytest.raises(TypeError, match="score\\(name, weight, gradient\\)"):
        check_criterion("magnitude")
    with pytest.raises(TypeError, match="BasePruningMethod"):
        check_criterion(nn.Linear)
    with pytest.raises(ValueError, match="PRUNING_TYPE"):
        check_criterion(prune.PruningContainer)
