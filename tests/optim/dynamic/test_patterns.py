"""Exact choices, N:M groups, moves within them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sparseopt.optim.dynamic import patterns
from sparseopt.optim.dynamic.layers import Layer, find_layers
from sparseopt.optim.dynamic.patterns import Pattern, choose, parse_pattern


def scores_of(shape: tuple[int, ...], seed: int = 0, levels: int | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if levels is not None:  # many ties
        return torch.randint(-levels, levels, shape, generator=generator).float()
    return torch.randn(shape, generator=generator)


def layer_of(outputs: int, inputs: int, transposed: bool = False) -> Layer:
    weight = scores_of((inputs, outputs) if transposed else (outputs, inputs), seed=outputs + inputs)
    return Layer("layer.weight", nn.Parameter(weight), transposed)


def stable_choice(scores: Tensor, count: int) -> Tensor:
    chosen = torch.zeros(scores.numel(), dtype=torch.bool)
    chosen[scores.reshape(-1).sort(descending=True, stable=True).indices[:count]] = True
    return chosen.view(scores.shape)


@pytest.mark.parametrize("levels", [None, 3])
@pytest.mark.parametrize("count", [0, 1, 7, 100, 209, 210])
def test_choose_is_exact_and_ties_go_to_the_lower_index(count: int, levels: int | None) -> None:
    scores = scores_of((14, 15), levels=levels)
    chosen = choose(scores, count)
    assert int(chosen.sum()) == count
    assert torch.equal(chosen, stable_choice(scores, count))


def test_choose_refuses_nan_and_impossible_counts() -> None:
    with pytest.raises(ValueError, match=r"'a.weight' contain NaN"):
        choose(torch.tensor([1.0, float("nan")]), 1, "a.weight")
    with pytest.raises(ValueError, match="3 of the 2 entries"):
        choose(torch.ones(2), 3)


@pytest.mark.parametrize("text", ["2:4", "4:8", "1:3", "7:16"])
def test_patterns_are_read(text: str) -> None:
    assert str(parse_pattern(text)) == text
    assert str(parse_pattern("unstructured")) == "unstructured"


@pytest.mark.parametrize("text", ["4:2", "0:4", "4:4", "2-4", "blocks", "2:4:8", "", None, 2])
def test_unknown_patterns_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="'unstructured' or 'N:M'"):
        parse_pattern(text)


def test_a_dimension_that_m_does_not_divide_names_the_layer() -> None:
    with pytest.raises(ValueError, match=r"divisible by 4; 'layer.weight' has 10"):
        Pattern(2, 4).check(layer_of(8, 10))
    Pattern(2, 4).check(layer_of(10, 8))
    with pytest.raises(ValueError, match=r"'layer.weight' has 10"):
        Pattern(2, 4).check(layer_of(8, 10, transposed=True))


def groups_of(mask: Tensor, m: int, transposed: bool) -> Tensor:
    """Independent of Pattern: slices of M inputs of every output."""
    rows = mask.T if transposed else mask
    return torch.stack([row[i : i + m] for row in rows for i in range(0, rows.shape[1], m)])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 3), (3, 4)])
def test_selection_takes_the_best_of_every_group(n: int, m: int, transposed: bool) -> None:
    layer, pattern = layer_of(5, 24, transposed), Pattern(n, m)
    scores = scores_of(layer.shape, seed=3)
    mask = pattern.select(layer, scores, layer.numel // m * n)
    groups, values = groups_of(mask, m, transposed), groups_of(scores, m, transposed)
    assert (groups.sum(1) == n).all()
    for group, value in zip(groups, values, strict=True):
        assert value[group].min() >= value[~group].max()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("n", "m"), [(0, 0), (2, 4), (4, 8), (1, 3), (3, 4)])
@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_moves_are_exact(n: int, m: int, transposed: bool, fraction: float) -> None:
    layer, pattern = layer_of(6, 24, transposed), Pattern(n, m)
    active = layer.numel * n // m if m else 50
    mask = pattern.select(layer, scores_of(layer.shape, 1), active)
    keep, grow = layer.param.detach().abs(), scores_of(layer.shape, 2).abs()
    swaps = pattern.swaps(layer, fraction, active, active)
    assert swaps == min(round(fraction * active), layer.numel - active)
    dropped, grown = pattern.move(layer, mask, keep, grow, swaps, active)
    assert int(dropped.sum()) == int(grown.sum()) == swaps
    assert not (dropped & ~mask).any()
    assert not (grown & mask).any(), "what grows was not active, so it was not dropped either"
    after = (mask & ~dropped) | grown
    assert int(after.sum()) == active
    if m:
        assert (groups_of(after, m, transposed).sum(1) == n).all()
        for was, came, value in zip(
            groups_of(mask, m, transposed), groups_of(grown, m, transposed), groups_of(grow, m, transposed), strict=True
        ):
            rest = ~was & ~came
            if came.any() and rest.any():
                assert value[came].min() >= value[rest].max()
    else:
        assert torch.equal(dropped, stable_choice(torch.where(mask, -keep, -torch.inf), swaps))
        assert torch.equal(grown, stable_choice(torch.where(mask, -torch.inf, grow), swaps))


def moved_by_hand(
    rows: Tensor, keep: Tensor, grow: Tensor, n: int, m: int, swaps: int
) -> tuple[set[tuple[int, int]], set[tuple[int, int]]]:
    """(output, input) of what leaves and comes; rows: bool[outputs, inputs]. Ties go to the lower (output, input)."""
    room, leaving, came = m - n, [], set()
    groups = [(o, i) for o in range(rows.shape[0]) for i in range(0, rows.shape[1], m)]
    for o, i in groups:  # no more can leave a group than it has inactive entries to come
        active = [(float(keep[o, j]), o, j) for j in range(i, i + m) if rows[o, j]]
        leaving += sorted(active)[:room]
    left = {(o, j) for _, o, j in sorted(leaving)[:swaps]}
    for o, i in groups:
        count = sum(place in left for place in ((o, j) for j in range(i, i + m)))
        inactive = [(-float(grow[o, j]), o, j) for j in range(i, i + m) if not rows[o, j]]
        came |= {(o, j) for _, o, j in sorted(inactive)[:count]}
    return left, came


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("levels", [None, 3])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 4), (3, 4)])
def test_moves_inside_groups_are_those_made_by_hand(n: int, m: int, levels: int | None, transposed: bool) -> None:
    layer, pattern = layer_of(6, 24, transposed), Pattern(n, m)
    active = layer.numel * n // m
    mask = pattern.select(layer, scores_of(layer.shape, 1), active)
    keep, grow = (scores_of(layer.shape, seed, levels).abs() for seed in (2, 3))
    swaps = pattern.swaps(layer, 0.3, active, active)
    moved = pattern.move(layer, mask, keep, grow, swaps, active)
    rows = [tensor.T if transposed else tensor for tensor in (mask, keep, grow, *moved)]
    left, came = moved_by_hand(*rows[:3], n, m, swaps)
    assert len(left) == len(came) == swaps > 0
    assert {tuple(place) for place in rows[3].nonzero().tolist()} == left
    assert {tuple(place) for place in rows[4].nonzero().tolist()} == came


@pytest.mark.parametrize(("n", "m"), [(0, 0), (2, 4)])
@pytest.mark.parametrize("direction", ["fewer", "more"])
def test_moves_that_change_the_density(n: int, m: int, direction: str) -> None:
    layer, pattern = layer_of(4, 16), Pattern(n, m)
    few, many = (16 * 2, 16 * 3) if m else (20, 45)
    before, after = (many, few) if direction == "fewer" else (few, many)
    mask = pattern.select(layer, scores_of(layer.shape, 1), before)
    swaps = pattern.swaps(layer, 0.2, before, after)
    dropped, grown = pattern.move(layer, mask, layer.param.detach().abs(), scores_of(layer.shape, 2), swaps, after)
    assert int(((mask & ~dropped) | grown).sum()) == after
    assert not (grown & mask).any()
    assert int(dropped.sum()) == swaps + max(0, before - after)
    if m:
        assert (groups_of((mask & ~dropped) | grown, m, False).sum(1) == after // 16).all()


def test_sparsity_on_the_way_to_n_of_m() -> None:
    pattern = Pattern(2, 4)
    assert [pattern.per_group(s) for s in (0.0, 0.1, 0.25, 0.26, 0.5, 0.9)] == [4, 4, 3, 3, 2, 2]


def test_linear_layers_are_found_and_tied_ones_once() -> None:
    from transformers.pytorch_utils import Conv1D

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(10, 8)
            self.c_fc = Conv1D(16, 8)
            self.first = nn.Linear(8, 8)
            self.second = nn.Linear(8, 8)
            self.second.weight = self.first.weight
            self.norm = nn.LayerNorm(8)
            self.lm_head = nn.Linear(8, 10, bias=False)
            self.lm_head.weight = self.embed.weight

    found = find_layers(Model())
    assert [(layer.name, layer.transposed) for layer in found] == [("c_fc.weight", True), ("first.weight", False)]
    assert (found[0].inputs, found[0].outputs) == (8, 16)
    assert [layer.name for layer in find_layers(Model(), exclude="first")] == ["c_fc.weight"]
    assert [layer.name for layer in find_layers(Model(), exclude=["lm_head", "second"])] == ["c_fc.weight"]
    with pytest.raises(ValueError, match=r"'third' fits no parameter"):
        find_layers(Model(), exclude="third")
    with pytest.raises(ValueError, match="no linear layer"):
        find_layers(nn.Sequential(nn.Embedding(4, 4)))


@pytest.mark.parametrize("kind", ["random", "ties", "zeros of both signs", "infinite"])
@pytest.mark.parametrize("n", [1, 7, 1000, 70_001])
def test_the_selection_of_gpus_is_that_of_cpus(n: int, kind: str) -> None:
    scores = torch.randn(n, generator=torch.Generator().manual_seed(n))
    if kind == "ties":
        scores = scores.round()
    elif kind == "zeros of both signs":
        scores = torch.where(scores > 0.5, scores, torch.where(scores < 0, -0.0, 0.0))
    elif kind == "infinite":
        scores = torch.where(scores > 0, scores, -torch.inf)
    for count in sorted({0, 1, n // 3, n - 1, n}):
        assert torch.equal(patterns._above_cut(scores, count, "x"), choose(scores, count)), count
    scores[n // 2] = torch.nan
    for count in (0, 1, n):
        with pytest.raises(ValueError, match="scores of 'x' contain NaN"):
            patterns._above_cut(scores, count, "x")
