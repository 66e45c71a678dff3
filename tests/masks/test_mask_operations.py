"""merge and compare."""

import pytest
import torch

import sparseopt as so
from sparseopt.masks import operations


def sets(count, seed=0, density=0.4):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (13, 7), "b": (5,), "empty": (0,)}
    return [
        {name: torch.rand(shape, generator=generator) < density for name, shape in shapes.items()} for _ in range(count)
    ]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_merge(count, monkeypatch):
    monkeypatch.setattr(operations, "VOTE_BYTES", 4)
    bools = sets(count)
    masks = [so.MaskSet.from_bool(b) for b in bools]
    votes = {name: sum(b[name].int() for b in bools) for name in bools[0]}
    for how, needed in (("union", 1), ("intersection", count), ("majority", count // 2 + 1)):
        merged = so.merge(masks, how=how)
        assert merged == so.MaskSet.from_bool({name: v >= needed for name, v in votes.items()})
        assert merged.metadata["how"] == how
    assert [m == so.MaskSet.from_bool(b) for m, b in zip(masks, bools, strict=True)] == [True] * count


def test_merge_errors():
    m = so.MaskSet.from_bool(sets(1)[0])
    with pytest.raises(ValueError, match="at least one"):
        so.merge([])
    with pytest.raises(ValueError, match="'xor'"):
        so.merge([m], how="xor")
    with pytest.raises(ValueError, match="'b' is only in the left"):
        so.merge([m, m.select(["a", "empty"])])


def test_compare():
    left, right = sets(2)
    result = so.compare(so.MaskSet.from_bool(left), so.MaskSet.from_bool(right))
    assert set(result) == {"jaccard", "chance_jaccard", "overlap", "hamming", "per_layer"}
    flat_left = torch.cat([mask.view(-1) for mask in left.values()])
    flat_right = torch.cat([mask.view(-1) for mask in right.values()])
    for values, a, b in [(result, flat_left, flat_right), (result["per_layer"]["a"], left["a"], right["a"])]:
        both, either = (a & b).sum().item(), (a | b).sum().item()
        assert values["jaccard"] == both / either
        assert values["overlap"] == both / min(a.sum().item(), b.sum().item())
        assert values["hamming"] == (a ^ b).sum().item() / a.numel()
    assert list(result["per_layer"]) == ["a", "b", "empty"]


def test_chance_is_what_random_masks_give():
    model = {"a": torch.zeros(200, 500), "b": torch.zeros(50_000)}
    first, second = (so.MaskSet.random(model, 0.1, seed=seed) for seed in (1, 2))
    result = so.compare(first, second)
    assert result["chance_jaccard"] == pytest.approx(0.01 / 0.19)
    assert result["jaccard"] == pytest.approx(result["chance_jaccard"], rel=0.05)
    same = so.compare(first, first)
    assert (same["jaccard"], same["overlap"], same["hamming"]) == (1.0, 1.0, 0.0)


def test_compare_of_empty_sets():
    nothing = so.MaskSet.from_bool({"a": torch.zeros(9, dtype=torch.bool)})
    assert so.compare(nothing, nothing)["jaccard"] == 1.0
    assert so.compare(nothing, nothing)["overlap"] == 1.0
    result = so.compare(nothing, ~nothing)
    assert (result["jaccard"], result["overlap"], result["hamming"]) == (0.0, 0.0, 1.0)
    with pytest.raises(ValueError, match="'a' has shape"):
        so.compare(nothing, so.MaskSet.from_bool({"a": torch.zeros(3, 3, dtype=torch.bool)}))
