"""find_masks against a full sort of everything, and its contract."""

import math
import warnings

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

import sparseopt as so
from sparseopt.masks import _select
from sparseopt.masks.find import matches

pytestmark = pytest.mark.filterwarnings("ignore:.*of the picked entries have score zero")


def split_groups(tensor, grain):
    """Flat indices of each group, in group order."""
    flat = torch.arange(tensor.numel())
    if isinstance(grain, int):
        return list(flat.split(grain)) if tensor.numel() else []
    if tensor.numel() == 0:
        return []
    if tensor.dim() < 2:
        return list(flat.split(1))
    index = flat.view(tensor.shape)
    if tensor.dim() == 3:  # matrix by matrix
        groups = [group for matrix in index for group in (matrix if grain == "row" else matrix.T)]
    else:
        groups = index.unbind(0) if grain == "row" else index.unbind(-1)
    return [group.reshape(-1) for group in groups]


def oracle(scores, budget, grain=1, minimum=None):
    """Sorts everything in Python: {name: bool mask}. ``minimum``: groups of each tensor that are taken first."""
    masks = {name: torch.zeros(t.numel(), dtype=torch.bool) for name, t in scores.items()}
    ranked = []
    for name, tensor in scores.items():
        flat = tensor.double().reshape(-1)
        for index, group in enumerate(split_groups(tensor, grain)):
            ranked.append((-math.fsum(flat[group].tolist()), name, index, group))
    ranked.sort(key=lambda item: item[:3])
    left = dict(minimum or {})
    rest = []
    for item in ranked:
        if left.get(item[1], 0) > 0:
            left[item[1]] -= 1
            masks[item[1]][item[3]] = True
            budget -= len(item[3])
        else:
            rest.append(item)
    for _, name, _, group in rest:
        if isinstance(grain, int) and len(group) > budget:
            break
        if len(group) <= budget:
            masks[name][group] = True
            budget -= len(group)
    return {name: mask.view(scores[name].shape) for name, mask in masks.items()}


@st.composite
def score_dicts(draw, max_dim=40):
    count = draw(st.integers(1, 4))
    kind = draw(st.sampled_from(["normal", "ties", "zeros", "constant", "signed ties", "inf", "tiny"]))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scores = {}
    for i in range(count):
        shape = tuple(draw(st.lists(st.integers(0, max_dim), min_size=0, max_size=2)))
        if draw(st.integers(0, 4)) == 4:
            shape = tuple(draw(st.lists(st.integers(0, 8), min_size=3, max_size=3)))
        x = torch.randn(shape, generator=generator)
        if kind == "ties":
            x = (x * 2).round().abs()
        elif kind == "signed ties":
            x = (x * 2).round()  # has -0.0 too
        elif kind == "zeros":
            x = x.clamp(min=1.0) - 1.0
        elif kind == "constant":
            x = torch.full(shape, 3.0)
        elif kind == "tiny":
            x = x * 1e-42 if dtype != torch.float16 else x * 1e-7
        elif kind == "inf" and dtype != torch.int32:
            x = torch.where(x > 1, torch.inf, x)
        scores[f"layer.{i}"] = x.to(dtype)
    names = draw(st.permutations(list(scores)))
    return {name: scores[name] for name in names}


def check(found, expected):
    for name, mask in expected.items():
        assert torch.equal(found[name], mask), name


@settings(max_examples=120, deadline=None)
@given(score_dicts(), st.floats(0, 1), st.sampled_from(["global", "per_tensor"]))
def test_single_entries_match_a_full_sort(scores, sparsity, scope):
    found = so.find_masks(scores, sparsity, scope, allow_zero_scores=True)
    total = sum(t.numel() for t in scores.values())
    if scope == "global":
        assert found.active_parameters == round((1 - sparsity) * total)
        check(found, oracle(scores, found.active_parameters))
    else:
        for name, tensor in scores.items():
            budget = round((1 - sparsity) * tensor.numel())
            assert found.count(name) == budget
            check(found.select([name]), oracle({name: tensor}, budget))
    assert found.names == list(scores)


@settings(max_examples=80, deadline=None)
@given(score_dicts(), st.floats(0, 1), st.floats(0, 1))
def test_minimums_match_a_full_sort(scores, sparsity, fraction):
    ratio = fraction * (1 - sparsity)
    found = so.find_masks(scores, sparsity, min_layer_keep_ratio=ratio, allow_zero_scores=True)
    sizes = {name: tensor.numel() for name, tensor in scores.items()}
    budget = round((1 - sparsity) * sum(sizes.values()))
    assert found.active_parameters == budget
    minimum = {name: math.ceil(ratio * n - 1e-9) for name, n in sizes.items()}
    if sum(minimum.values()) > budget:
        minimum = {name: math.floor(ratio * n + 1e-9) for name, n in sizes.items()}
    check(found, oracle(scores, budget, minimum=minimum))
    for name, least in minimum.items():
        assert found.count(name) >= least


@settings(max_examples=120, deadline=None)
@given(score_dicts(70), st.floats(0, 1), st.sampled_from(["global", "per_tensor"]), st.sampled_from([8, 16, 32]))
def test_runs_match_a_full_sort(scores, sparsity, scope, grain):
    found = so.find_masks(scores, sparsity, scope, grain, allow_zero_scores=True)
    parts = [scores] if scope == "global" else [{name: tensor} for name, tensor in scores.items()]
    for part in parts:
        budget = round((1 - sparsity) * sum(t.numel() for t in part.values()))
        chosen = found.select(part)
        assert budget - grain < chosen.active_parameters <= budget
        for name, tensor in part.items():
            for group in split_groups(tensor, grain):
                assert chosen[name].view(-1)[group].unique().numel() == 1
        check(chosen, prefix_oracle(part, budget, grain))


def prefix_oracle(scores, budget, grain):
    """As many best groups as fit, where a shorter last group leaves room for a further one."""
    count = budget // grain
    while True:
        ranked = sorted(
            (-math.fsum(t.double().reshape(-1)[g].tolist()), name, index, len(g))
            for name, t in scores.items()
            for index, g in enumerate(split_groups(t, grain))
        )
        room = budget - sum(item[3] for item in ranked[:count])
        if room < grain or count >= len(ranked):
            break
        count = min(len(ranked), count + room // grain)
    masks = {name: torch.zeros(t.numel(), dtype=torch.bool) for name, t in scores.items()}
    for _, name, index, size in ranked[:count]:
        masks[name][index * grain : index * grain + size] = True
    return {name: mask.view(scores[name].shape) for name, mask in masks.items()}


@settings(max_examples=80, deadline=None)
@given(score_dicts(20), st.floats(0, 1), st.sampled_from(["row", "column"]), st.floats(0, 1))
def test_rows_and_columns_match_a_full_sort(scores, sparsity, grain, fraction):
    ratio = fraction * (1 - sparsity)
    found = so.find_masks(scores, sparsity, granularity=grain, min_layer_keep_ratio=ratio, allow_zero_scores=True)
    budget = round((1 - sparsity) * sum(t.numel() for t in scores.values()))
    assert found.active_parameters <= budget
    groups = {name: split_groups(tensor, grain) for name, tensor in scores.items()}
    left_out = [len(g) for name, gs in groups.items() for g in gs if not found[name].view(-1)[g].all()]
    if left_out:
        assert budget - found.active_parameters < min(left_out)
    if ratio == 0:
        check(found, oracle(scores, budget, grain))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_tensors_of_many_pieces(monkeypatch, dtype):
    monkeypatch.setattr(_select, "PIECE", 1 << 7)
    generator = torch.Generator().manual_seed(0)
    scores = {"b": torch.randn(7_001, generator=generator), "a": torch.randn(30, 171, generator=generator)}
    scores = {name: (t * 50).round().to(dtype) for name, t in scores.items()}
    for grain in (1, 8, 32):
        found = so.find_masks(scores, 0.9, granularity=grain)
        check(found, prefix_oracle(scores, round((1 - 0.9) * (7_001 + 30 * 171)), grain))


def test_fp64_scores_are_compared_exactly():
    scores = {"w": 1 + torch.arange(64, dtype=torch.float64) * 2**-50}
    assert so.find_masks(scores, 0.75)["w"].nonzero().view(-1).tolist() == list(range(48, 64))


def test_ties_go_to_the_lower_name_then_index():
    scores = {"b": torch.ones(4), "a": torch.ones(2, 3), "h.2": torch.zeros(4), "h.10": torch.full((4,), 2.0)}
    found = so.find_masks(scores, 0.5)  # 9 of 18: h.10, then 5 of a
    assert found["h.10"].all()
    assert found["a"].view(-1).tolist() == [True] * 5 + [False]
    assert not found["b"].any()
    assert found.metadata["tie_share"] == 5 / 9
    signed = {"w": torch.tensor([-0.0, 0.0, -0.0, 0.0])}
    assert so.find_masks(signed, 0.5, allow_zero_scores=True)["w"].tolist() == [True, True, False, False]


def test_non_contiguous_scores_and_gradients():
    base = torch.randn(6, 50, requires_grad=True)
    found = so.find_masks({"w": base.t()}, 0.9)
    assert torch.equal(found["w"], so.find_masks({"w": base.detach().t().contiguous()}, 0.9)["w"])


@pytest.mark.parametrize("grain", [1, 8, "row", "column"])
def test_nan_is_refused_and_named(grain):
    scores = {"good": torch.ones(3, 40), "bad": torch.ones(3, 40)}
    scores["bad"][2, 39] = torch.nan
    for sparsity in (0.5, 1.0):
        with pytest.raises(ValueError, match="'bad' contain NaN"):
            so.find_masks(scores, sparsity, granularity=grain)
    assert so.find_masks(scores, 0.5, exclude="bad").active_parameters == 60


@pytest.mark.parametrize("grain", [8, "row"])
def test_infinities_that_cancel_are_refused(grain):
    scores = {"w": torch.tensor([[torch.inf, -torch.inf] + [0.0] * 6])}
    with pytest.raises(ValueError, match="'w' hold infinities of both signs"):
        so.find_masks(scores, 0.0, granularity=grain)


def test_negative_scores_are_ordered_by_value():
    scores = {"w": torch.tensor([-3.0, -1.0, -torch.inf, -2.0, torch.inf, 1.0])}
    assert so.find_masks(scores, 0.5)["w"].tolist() == [False, True, False, False, True, True]


def test_include_and_exclude():
    names = ["t.h.1.mlp.w", "t.h.10.mlp.w", "t.h.1.norm_in.w", "t.h.10.norm_in.w", "embed.w"]
    scores = {name: torch.rand(20) for name in names}
    found = so.find_masks(scores, 0.5, include=["h.1"])
    assert {name for name in found if found.count(name)} <= {names[0], names[2]}
    assert found.active_parameters == 20
    assert found.metadata["eligible_parameters"] == 40
    assert found.names == names
    found = so.find_masks(scores, 0.0, exclude=("norm", "embed"))
    assert [name for name in found if found.count(name)] == names[:2]
    with pytest.warns(UserWarning, match="'h.3' fits none"):
        so.find_masks(scores, 0.5, exclude=["h.3"])
    with pytest.raises(ValueError, match="no parameter is left"):
        so.find_masks(scores, 0.5, exclude=["*"])
    with pytest.raises(ValueError, match="no parameter is left"):
        so.find_masks(scores, 0.5, include=[])
    with pytest.raises(ValueError, match="patterns"):
        so.find_masks(scores, 0.5, include=[""])


@pytest.mark.parametrize(
    ("name", "pattern", "expected"),
    [
        ("h.1.w", "h.1", True),
        ("h.10.w", "h.1", False),
        ("batch.1.w", "h.1", False),
        ("h.10.w", "1", False),
        ("layer1.w", "1", True),
        ("model.input_layernorm.weight", "norm", True),
        ("model.input_layernorm.weight", "norm.weight", False),
        ("model.input_layernorm.weight", "*norm.weight", True),
        ("model.norm.weight", "norm.weight", True),
        ("model.layers.3.mlp.up_proj.weight", "*.mlp.*", True),
        ("model.layers.3.mlp.up_proj.weight", "*.layers.[0-2].*", False),
        ("w", "w", True),
        ("a+b", "a+", True),
    ],
)
def test_patterns(name, pattern, expected):
    assert matches(name, pattern) is expected


def test_zero_scores_warn_and_are_refused():
    few, many = torch.zeros(1000), torch.zeros(1000)
    few[:96], many[:30] = 1.0, 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=r"4\.0% of the picked"):
            so.find_masks({"w": few}, 0.9)
        few[96:100] = 0.5
        so.find_masks({"w": few}, 0.9)
    with pytest.raises(ValueError, match=r"70\.0% of the picked .*allow_zero_scores"):
        so.find_masks({"w": many}, 0.9)
    found = so.find_masks({"w": many}, 0.9, allow_zero_scores=True)
    assert found.metadata["zero_score_share"] == pytest.approx(0.7)
    assert found.metadata["tie_share"] == pytest.approx(0.7)
    for grain in (16, "row"):
        with pytest.raises(ValueError, match="allow_zero_scores"):
            so.find_masks({"w": many.view(50, 20)}, 0.5, granularity=grain)


def test_metadata():
    scores = {"w": torch.tensor([4.0, 3.0, 2.0, 1.0]), "v": torch.tensor([0.0])}
    found = so.find_masks(scores, 0.6, method="fisher", metadata={"step": 50})
    metadata = found.metadata
    assert metadata["method"] == "fisher"
    assert metadata["scope"] == "global"
    assert metadata["granularity"] == 1
    assert metadata["target_sparsity"] == 0.6
    assert metadata["sparsity"] == found.sparsity == pytest.approx(0.6)
    assert metadata["step"] == 50
    assert metadata["kept_score"] == pytest.approx(0.7)
    assert metadata["zero_score_share"] == metadata["tie_share"] == 0
    assert "kept_score" not in so.find_masks({"w": torch.tensor([1.0, -1.0])}, 0.5).metadata
    assert "kept_score" not in so.find_masks({"w": torch.tensor([1.0, torch.inf])}, 0.5).metadata


def test_the_metadata_of_a_found_mask_survives_its_file(tmp_path):
    found = so.find_masks({"w": torch.rand(100)}, 0.9, method="gradient", granularity=8)
    found.save(tmp_path / "m.safetensors")
    assert so.MaskSet.load(tmp_path / "m.safetensors").metadata == found.metadata


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 1.5}, "sparsity"),
        ({"sparsity": -0.1}, "sparsity"),
        ({"sparsity": float("nan")}, "sparsity"),
        ({"scope": "layer"}, "scope"),
        ({"granularity": 4}, "granularity"),
        ({"min_layer_keep_ratio": 0.2, "sparsity": 0.9}, "min_layer_keep_ratio"),
        ({"min_layer_keep_ratio": -1}, "min_layer_keep_ratio"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        so.find_masks({"w": torch.rand(10)}, **arguments)


def test_wrong_scores():
    with pytest.raises(ValueError, match="at least one"):
        so.find_masks({})
    with pytest.raises(TypeError, match="'w' must be a real tensor, got list"):
        so.find_masks({"w": [1.0]})
    with pytest.raises(TypeError, match="complex64"):
        so.find_masks({"w": torch.ones(3, dtype=torch.complex64)})
    with pytest.raises(ValueError, match="two score tensors are named 'w'"):
        so.find_masks({"w": torch.ones(3), "module.w": torch.ones(3)})
    assert so.find_masks({"w": torch.ones(0, 3)}, 0.5).active_parameters == 0


@pytest.mark.parametrize("piece", [1, 7, 16, 40, 64, 100, 1 << 22])
def test_matrices_in_three_dimensions_have_rows_and_columns_of_their_own(monkeypatch, piece):
    """Read in pieces of a matrix, of whole ones, of several."""
    from sparseopt.masks import _structured

    monkeypatch.setattr(_structured, "PIECE", piece)
    values = torch.rand(5, 6, 7, generator=torch.Generator().manual_seed(0))
    for grain, dim in (("row", 2), ("column", 1)):
        sums = values.double().sum(dim).view(-1)
        size = values.shape[dim]
        best = torch.zeros(sums.numel(), dtype=torch.bool)
        best[sums.argsort(descending=True)[: round(0.3 * values.numel()) // size]] = True
        mask = so.find_masks({"w": values}, 0.7, granularity=grain)["w"]
        assert torch.equal(mask, best.view(5, -1).unsqueeze(dim).expand_as(mask))
