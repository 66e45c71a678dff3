"""find_masks(granularity="auto"): which structure a tensor gets, and the budgets."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import sparseopt as so
from sparseopt.masks._auto import TOKENS


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 1e-3


def scores() -> dict[str, Tensor]:
    by_column, by_row, single = noise(64, 80), noise(64, 80, seed=1), noise(64, 80, seed=2)
    by_column[:, [3, 40]] += 1
    by_row[[5, 60]] += 1
    generator = torch.Generator().manual_seed(3)
    single.view(-1)[torch.randperm(single.numel(), generator=generator)[:256]] += 1  # spread over rows and columns
    return {
        "a.weight": by_column,
        "b.weight": by_row,
        "c.weight": single,
        "c.bias": noise(40),
        "d.weight": noise(1, 3, 4, 5),
    }


def test_each_tensor_gets_what_its_scores_are_made_of() -> None:
    masks = so.find_masks(scores(), sparsity=0.97, granularity="auto")
    chosen = masks.metadata["granularities"]
    assert chosen == {"a.weight": "column", "b.weight": "row", "c.weight": 1, "c.bias": 1, "d.weight": 1}
    assert masks.metadata["granularity"] == "auto"
    assert masks["a.weight"][:, [3, 40]].all()
    assert masks["b.weight"][[5, 60]].all()
    assert (masks["a.weight"] == masks["a.weight"][:1]).all()
    assert (masks["b.weight"] == masks["b.weight"][:, :1]).all()
    assert masks.metadata["kept_score"] > so.find_masks(scores(), 0.97, granularity="row").metadata["kept_score"]


def test_experts_get_rows_and_columns_of_their_own() -> None:
    by_column, by_row = noise(4, 16, 24), noise(4, 16, 24, seed=1)
    by_column[[0, 0, 2], :, [1, 5, 23]] += 1  # none of the experts 1 and 3
    by_row[[1, 3], [0, 7]] += 1
    masks = so.find_masks({"a": by_column, "b": by_row}, sparsity=0.968, granularity="auto")
    assert masks.metadata["granularities"] == {"a": "column", "b": "row"}
    assert masks["a"][[0, 0, 2], :, [1, 5, 23]].all()
    assert masks["b"][[1, 3], [0, 7]].all()
    assert masks.active_parameters == 3 * 16 + 2 * 24


def test_the_structure_that_loses_least_per_number_spared() -> None:
    """Rows keep more by a factor; columns spare more, by the activations of ``TOKENS`` tokens."""
    room = round(0.1 * 64 * 80)
    spared = {"row": 64 * 80 - room, "column": 64 * 80 - room + TOKENS * (80 - room / 64)}
    seen = set()
    for factor in (1.0, 1.001, 1.01, 1.1, 1.15, 1.2, 1.3):
        values = torch.ones(64, 80)
        values[:7] *= factor
        best = min(room, 560) * factor
        kept = {"row": 6 * 80 * factor, "column": 8 * (7 * factor + 57)}
        want = min(kept, key=lambda kind: (best - kept[kind]) / spared[kind])
        assert so.find_masks({"w": values}, 0.9, granularity="auto").metadata["granularities"]["w"] == want
        seen.add(want)
    assert "column" in seen


@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.975, 0.999])
@pytest.mark.parametrize("scope", ["global", "per_tensor"])
@pytest.mark.parametrize("ratio", [0.0, 0.0005])
def test_budgets(sparsity: float, scope: str, ratio: float) -> None:
    given = scores()
    masks = so.find_masks(given, sparsity, scope=scope, granularity="auto", min_layer_keep_ratio=ratio)
    kinds = masks.metadata["granularities"]
    size = {"row": 80, "column": 64, 1: 1}
    if scope == "per_tensor":
        for name, tensor in given.items():
            budget = round((1 - sparsity) * tensor.numel())
            assert budget - size[kinds[name]] < masks.count(name) <= budget
        return
    budget = round((1 - sparsity) * sum(t.numel() for t in given.values()))
    assert any(kind == 1 for kind in kinds.values())
    assert masks.active_parameters == budget, "single entries fill up what whole groups leave"
    if ratio * 40 >= 1:
        assert all(masks.count(name) for name in given)


def test_only_groups_stay_within_one_group_of_the_budget() -> None:
    given = {name: scores()[name] for name in ("a.weight", "b.weight")}
    masks = so.find_masks(given, 0.95, granularity="auto")
    assert set(masks.metadata["granularities"].values()) == {"row", "column"}
    assert 512 - 80 < masks.active_parameters <= 512


def test_a_file_keeps_the_choice(tmp_path: Path) -> None:
    masks = so.find_masks(scores(), 0.97, granularity="auto")
    masks.save(tmp_path / "mask.safetensors")
    assert so.MaskSet.load(tmp_path / "mask.safetensors").metadata["granularities"] == masks.metadata["granularities"]


def test_random_masks_cannot_choose() -> None:
    with pytest.raises(ValueError, match="use find_masks"):
        so.MaskSet.random({"w": torch.zeros(4, 4)}, 0.5, granularity="auto")


def test_infinite_and_zero_scores() -> None:
    values = noise(16, 16)
    values[2, 3] = float("inf")
    masks = so.find_masks({"w": values}, 0.9, granularity="auto")
    assert masks.metadata["granularities"]["w"] == 1
    assert masks["w"][2, 3]
    with pytest.warns(UserWarning, match="score zero"):
        empty = so.find_masks({"w": torch.zeros(16, 16)}, 0.5, granularity="auto", allow_zero_scores=True)
    assert empty.active_parameters == 128
