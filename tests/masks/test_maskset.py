"""MaskSet: construction, reading, operators, names."""

import copy
import pickle

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

import sparseopt as so
from sparseopt.masks.granularity import granularity_of
from sparseopt.masks.maskset import normalize_name

SHAPES = {"a.weight": (5, 7), "b.bias": (9,), "c.scalar": (), "d.empty": (0, 3), "e.cube": (2, 3, 4)}


def bools(seed=0, density=0.3, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(shape, generator=generator) < density for name, shape in shapes.items()}


@st.composite
def mask_dicts(draw):
    shapes = draw(st.lists(st.lists(st.integers(0, 9), max_size=3).map(tuple), min_size=0, max_size=4))
    seed, density = draw(st.integers(0, 2**31)), draw(st.sampled_from([0.0, 0.02, 0.5, 1.0]))
    return bools(seed, density, {f"p{i}": shape for i, shape in enumerate(shapes)})


@settings(max_examples=60, deadline=None)
@given(mask_dicts())
def test_bool_and_index_round_trips(masks):
    m = so.MaskSet.from_bool(masks, {"step": 3})
    assert m.names == list(masks) == list(m)
    for name, mask in masks.items():
        assert m[name].dtype == torch.bool
        assert torch.equal(m[name], mask)
        expected = np.packbits(mask.numpy().reshape(-1), bitorder="little")
        assert m.packed(name).numpy().tolist() == expected.tolist()
        assert m.indices(name).tolist() == mask.reshape(-1).nonzero().view(-1).tolist()
        assert m.counts[name] == int(mask.sum())
    again = so.MaskSet.from_indices({n: m.indices(n).flip(0) for n in m}, m.shapes)
    assert again == m
    assert again.fingerprint == m.fingerprint
    assert pickle.loads(pickle.dumps(m)) == m == copy.deepcopy(m)


@settings(max_examples=40, deadline=None)
@given(mask_dicts(), st.integers(0, 1000))
def test_operators_match_bool_operators(masks, seed):
    others = bools(seed, 0.5, {name: tuple(mask.shape) for name, mask in masks.items()})
    m, n = so.MaskSet.from_bool(masks), so.MaskSet.from_bool(others)
    for result, function in ((m & n, torch.logical_and), (m | n, torch.logical_or), (m ^ n, torch.logical_xor)):
        assert result == so.MaskSet.from_bool({k: function(masks[k], others[k]) for k in masks})
    assert ~m == so.MaskSet.from_bool({k: ~mask for k, mask in masks.items()})
    assert (~m).active_parameters == m.total_parameters - m.active_parameters
    assert ~~m == m


def test_counts_and_metadata():
    masks = bools()
    m = so.MaskSet.from_bool(masks, {"step": 10, "nested": {"x": [1]}})
    active, total = sum(int(v.sum()) for v in masks.values()), sum(v.numel() for v in masks.values())
    assert (m.active_parameters, m.total_parameters) == (active, total)
    assert m.density == active / total == 1 - m.sparsity
    assert m.metadata["active_parameters"] == active
    assert m.metadata["active_fraction"] == m.density
    m.metadata["nested"]["x"].append(2)
    m.shapes.clear()
    assert m.metadata["nested"] == {"x": [1]}
    assert m.shapes == SHAPES
    assert m.with_metadata(step=11).metadata["step"] == 11
    assert m.metadata["step"] == 10
    empty = so.MaskSet.from_bool({})
    assert (empty.density, empty.total_parameters, len(empty)) == (0.0, 0, 0)


def test_source_tensors_can_change_afterwards():
    mask = torch.tensor([True, False, True])
    packed = torch.tensor([5], dtype=torch.uint8)
    m, n = so.MaskSet.from_bool({"w": mask}), so.MaskSet({"w": packed}, {"w": (3,)})
    mask.zero_()
    packed.zero_()
    assert m == n
    assert m["w"].tolist() == [True, False, True]
    m["w"].zero_()
    assert m.active_parameters == 2
    assert m.packed("w").data_ptr() == m.packed("w").data_ptr()


def test_non_contiguous_bool_masks_are_read_in_logical_order():
    mask = (torch.arange(35).view(5, 7) % 3 == 0).t()
    assert not mask.is_contiguous()
    assert torch.equal(so.MaskSet.from_bool({"w": mask})["w"], mask)


def test_equality_and_fingerprint():
    masks = bools()
    m = so.MaskSet.from_bool(masks, {"step": 1})
    shuffled = so.MaskSet.from_bool(dict(reversed(masks.items())), {"step": 2})
    assert m == shuffled
    assert hash(m) == hash(shuffled)
    assert m.fingerprint == shuffled.fingerprint
    flipped = dict(masks)
    flipped["b.bias"] = masks["b.bias"].clone()
    flipped["b.bias"][8] ^= True
    reshaped = {**masks, "b.bias": masks["b.bias"].view(3, 3)}
    renamed = {("z" if name == "b.bias" else name): mask for name, mask in masks.items()}
    fewer = {name: mask for name, mask in masks.items() if name != "d.empty"}
    for other in (flipped, reshaped, renamed, fewer):
        changed = so.MaskSet.from_bool(other)
        assert changed != m
        assert changed.fingerprint != m.fingerprint
    assert m != "mask"


def test_mismatches_are_named():
    m = so.MaskSet.from_bool(bools())
    reshaped = so.MaskSet.from_bool({**bools(), "b.bias": torch.zeros(8, dtype=torch.bool)})
    fewer = m.select(["a.weight"])
    for operation in (lambda x: m & x, lambda x: m | x, lambda x: m ^ x):
        with pytest.raises(ValueError, match=r"'b\.bias' has shape \[9\] on the left, \[8\] on the right"):
            operation(reshaped)
        with pytest.raises(ValueError, match=r"'b\.bias' is only in the left"):
            operation(fewer)
    with pytest.raises(ValueError, match=r"'b\.bias' is only in the right"):
        fewer & m
    with pytest.raises(TypeError):
        m & {"a": 1}
    with pytest.raises(KeyError, match=r"nothing\.here"):
        m["nothing.here"]
    with pytest.raises(KeyError, match=r"nothing\.here"):
        m.select(["nothing.here"])


def test_constructor_errors():
    byte = torch.tensor([1], dtype=torch.uint8)
    with pytest.raises(TypeError, match="'w' must be a bool tensor, got float32"):
        so.MaskSet.from_bool({"w": torch.ones(3)})
    with pytest.raises(ValueError, match="'w'"):
        so.MaskSet({"w": byte}, {})
    with pytest.raises(ValueError, match="has 2 bytes, got 1"):
        so.MaskSet({"w": byte}, {"w": (9,)})
    with pytest.raises(ValueError, match="past its 3 entries"):
        so.MaskSet({"w": torch.tensor([8], dtype=torch.uint8)}, {"w": (3,)})
    with pytest.raises(TypeError, match="uint8"):
        so.MaskSet({"w": byte.int()}, {"w": (3,)})
    with pytest.raises(ValueError, match=r"0\.\.2, got 0\.\.3"):
        so.MaskSet.from_indices({"w": torch.tensor([0, 3])}, {"w": (3,)})
    with pytest.raises(ValueError, match="got -1"):
        so.MaskSet.from_indices({"w": torch.tensor([-1])}, {"w": (3,)})
    with pytest.raises(TypeError, match="integers"):
        so.MaskSet.from_indices({"w": torch.tensor([0.0])}, {"w": (3,)})
    with pytest.raises(ValueError, match="without its shape"):
        so.MaskSet.from_indices({"w": torch.tensor([0])}, {})
    assert so.MaskSet.from_indices({}, {"w": (3,)}).active_parameters == 0


def test_names_are_normalised():
    assert normalize_name("module._orig_mod.h.0._fsdp_wrapped_module.mlp._checkpoint_wrapped_module.w") == "h.0.mlp.w"
    assert normalize_name("_orig_mod.module.w") == "w"
    assert normalize_name("encoder.module.w") == "encoder.module.w"
    assert normalize_name("module") == "module"
    assert normalize_name("submodule.w") == "submodule.w"
    m = so.MaskSet.from_bool({"module.w": torch.tensor([True])})
    assert m.names == ["w"]
    assert "module.w" in m
    assert "_orig_mod.w" in m
    assert 3 not in m
    assert m["_orig_mod.w"].all()
    assert m.select(["module.w"]) == m
    with pytest.raises(ValueError, match=r"two masks are named 'w' .*'module\.w'"):
        so.MaskSet.from_bool({"w": torch.tensor([True]), "module.w": torch.tensor([True])})


def test_full_like_a_model_counts_tied_parameters_once():
    model = torch.nn.Module()
    model.embedding, model.head = torch.nn.Embedding(4, 3), torch.nn.Linear(3, 4)
    model.head.weight = model.embedding.weight
    m = so.MaskSet.full_like(model)
    assert m.names == ["embedding.weight", "head.bias"]
    assert m.active_parameters == m.total_parameters == 16
    assert so.MaskSet.full_like({"x": torch.zeros(3, 3, device="meta")})["x"].all()


@pytest.mark.parametrize("density", [0.0, 0.01, 0.3, 0.5, 0.9, 1.0])
def test_random_counts_are_exact(density):
    model = {name: torch.zeros(shape) for name, shape in {**SHAPES, "big": (1000, 13)}.items()}
    m = so.MaskSet.random(model, density, seed=5)
    for name, tensor in model.items():
        assert m.count(name) == round(density * tensor.numel())
    assert m == so.MaskSet.random(dict(reversed(model.items())), density, seed=5)
    if 0 < density < 1:
        assert m != so.MaskSet.random(model, density, seed=6)
        assert m["big"].float().mean(0).std() < 0.1  # spread over the columns


@pytest.mark.parametrize("grain", [8, 16, 32, "row", "column"])
@pytest.mark.parametrize("density", [0.1, 0.5, 0.93, 1.0])
def test_random_groups(grain, density):
    model = {"w": torch.zeros(37, 21), "v": torch.zeros(3, 5, 7), "b": torch.zeros(77)}
    m = so.MaskSet.random(model, density, seed=1, granularity=grain)
    for name, tensor in model.items():
        mask, budget = m[name], round(density * tensor.numel())
        if isinstance(grain, int):
            size, groups = grain, mask.view(-1).split(grain)
        elif tensor.dim() < 2:
            size, groups = 1, mask.split(1)
        else:  # three dimensions are matrices
            lines = mask if grain == "row" else mask.transpose(-1, -2)
            groups = lines.reshape(-1, lines.shape[-1]).unbind(0)
            size = groups[0].numel()
        assert all(bool(group.all()) or not bool(group.any()) for group in groups)
        assert budget - size < m.count(name) <= budget
    assert m.metadata["granularity"] == grain


def test_random_is_uniform():
    hits = torch.zeros(20)
    for seed in range(400):
        hits += so.MaskSet.random({"w": torch.zeros(20)}, 0.25, seed=seed)["w"]
    assert hits.sum() == 400 * 5
    assert (hits - 100).abs().max() < 40  # about 4.6 standard deviations


def test_random_and_granularity_errors():
    with pytest.raises(ValueError, match="density"):
        so.MaskSet.random({"w": torch.zeros(3)}, 1.5)
    for bad in (2, 1.0, True, "diagonal", None):
        with pytest.raises(ValueError, match="granularity"):
            granularity_of(bad)
    assert granularity_of("16") == 16


def test_repr_says_what_matters():
    m = so.MaskSet.from_bool({f"layer.{i}.w": torch.ones(10, dtype=torch.bool) for i in range(12)})
    text = repr(m)
    assert "12 parameters" in text
    assert "120 of 120" in text
    assert "layer.0.w" in text
    assert "2 more" in text
    assert repr(so.MaskSet.from_bool({})).startswith("MaskSet: 0 parameters")
