"""Delta: the type, applying it, and its file."""

import json

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sparseopt as so
from sparseopt.deltas.delta import model_fingerprint

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def model(seed=0, dtype=torch.bfloat16):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 4)).to(dtype)


def difference(before, after, **chain):
    entries, shapes = {}, {}
    for name, old in before.items():
        indices = (old != after[name]).view(-1).nonzero().view(-1)
        entries[name], shapes[name] = (indices, after[name].reshape(-1)[indices]), old.shape
    return so.Delta.from_dict(entries, shapes, **chain)


def example(dtype=torch.bfloat16, **chain):
    before, after = model(0, dtype).state_dict(), model(0, dtype).state_dict()
    generator = torch.Generator().manual_seed(1)
    for tensor in after.values():
        tensor[torch.rand(tensor.shape, generator=generator) < 0.3] += 1
    return before, after, difference(before, after, **chain)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(DTYPES), st.integers(0, 300), st.floats(0, 1))
def test_round_trip(tmp_path_factory, seed, dtype, n, density):
    generator = torch.Generator().manual_seed(seed)
    indices = (torch.rand(n, generator=generator) < density).nonzero().view(-1)
    values = torch.randn(indices.numel(), generator=generator).to(dtype)
    delta = so.Delta.from_dict({"w": (indices, values)}, {"w": (n,)}, step=5, parent_step=3, base_fingerprint="abc")
    path = tmp_path_factory.mktemp("delta") / "d.safetensors"
    delta.save(path)
    again = so.Delta.load(path)
    assert again == delta
    assert (again.step, again.parent_step, again.base_fingerprint) == (5, 3, "abc")
    assert again.indices("w").dtype == torch.int32
    assert torch.equal(again.indices("w").long(), indices)
    assert again.values("w").dtype == dtype
    assert torch.equal(again.values("w"), values)
    assert again.shapes == {"w": (n,)}
    assert again.dtypes == {"w": dtype}


@pytest.mark.parametrize("dtype", DTYPES)
def test_apply_is_bit_exact_in_place_and_repeatable(dtype):
    before, after, delta = example(dtype)
    target = model(0, dtype)
    addresses = [p.data_ptr() for p in target.parameters()]
    versions = [p._version for p in target.parameters()]
    for _ in range(2):
        delta.apply_(target)
        assert model_fingerprint(target) == model_fingerprint(after)
    assert [p.data_ptr() for p in target.parameters()] == addresses
    assert all(p._version > version for p, version in zip(target.parameters(), versions, strict=True))
    assert all(p.requires_grad and p.is_leaf for p in target.parameters())
    delta.apply_(before)
    assert all(torch.equal(before[name], after[name]) for name in after)


def test_apply_to_other_layouts_and_wrapped_names():
    _, after, delta = example()
    strided = {f"module.{n}": t.t().contiguous().t() if t.dim() == 2 else t for n, t in model().state_dict().items()}
    assert not strided["module.0.weight"].is_contiguous()
    delta.apply_(strided)
    assert model_fingerprint(strided) == model_fingerprint(after)


def test_tied_parameters_are_found_under_every_name():
    tied = torch.nn.Module()
    tied.a, tied.b = torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2, bias=False)
    tied.b.weight = tied.a.weight
    so.Delta.from_dict({"b.weight": (torch.tensor([3]), torch.tensor([9.0]))}, {"b.weight": (2, 2)}).apply_(tied)
    assert tied.a.weight[1, 1] == 9


def test_apply_checks_everything_before_it_writes():
    _, _, delta = example()
    last = delta.names[-1]
    for change, message in (
        (lambda s: s.pop(last), f"no parameter '{last}'"),
        (lambda s: s.update({last: s[last].float()}), rf"'{last}' must be bfloat16\[4\], got float32\[4\]"),
        (lambda s: s.update({last: s[last].view(2, 2)}), rf"'{last}' must be bfloat16\[4\], got bfloat16\[2, 2\]"),
    ):
        target = {name: tensor.clone() for name, tensor in model().state_dict().items()}
        change(target)
        untouched = model_fingerprint(target)
        with pytest.raises(ValueError, match=message):
            delta.apply_(target)
        assert model_fingerprint(target) == untouched


def test_weight_patches():
    _, after, delta = example()
    patches = delta.to_weight_patches()
    assert [name for name, *_ in patches] == list(after)
    for name, indices, values, shape in patches:
        assert indices.dtype == torch.int32
        assert shape == tuple(after[name].shape)
        assert torch.equal(after[name].view(-1)[indices], values)


def test_indices_past_int32_are_int64():
    n = 2**31 + 8
    delta = so.Delta.from_dict({"w": (torch.tensor([5, n - 1]), torch.tensor([1.0, 2.0]))}, {"w": (n,)})
    assert delta.indices("w").dtype == torch.int64
    assert delta.indices("w").tolist() == [5, n - 1]


def test_properties():
    _, _, delta = example(step=20, parent_step=10)
    assert "0.weight" in delta
    assert "module.0.weight" in delta
    assert len(delta) == 4 == len(list(delta))
    assert delta.changed_parameters == sum(delta.indices(name).numel() for name in delta.names)
    assert "step 20 after step 10" in repr(delta)
    assert delta != example(step=20)[2]
    assert delta == example(step=20, parent_step=10)[2]
    with pytest.raises(KeyError, match="nothing"):
        delta.indices("nothing")


@pytest.mark.parametrize(
    ("indices", "values", "error", "message"),
    [
        ([1, 0], [1.0, 2.0], ValueError, "sorted and distinct"),
        ([1, 1], [1.0, 2.0], ValueError, "sorted and distinct"),
        ([-1, 1], [1.0, 2.0], ValueError, r"0\.\.3, got -1"),
        ([1, 4], [1.0, 2.0], ValueError, r"0\.\.3, got 1\.\.4"),
        ([1], [1.0, 2.0], ValueError, "one length"),
        ([1.0], [1.0], TypeError, "int32 or int64"),
    ],
)
def test_wrong_entries(indices, values, error, message):
    with pytest.raises(error, match=f"'w' .*{message}"):
        so.Delta.from_dict({"w": (torch.tensor(indices), torch.tensor(values))}, {"w": (4,)})


def test_wrong_names_and_steps():
    entry = (torch.tensor([0]), torch.tensor([1.0]))
    with pytest.raises(ValueError, match="without its shape"):
        so.Delta.from_dict({"w": entry}, {})
    with pytest.raises(ValueError, match="two entries are named 'w'"):
        so.Delta.from_dict({"w": entry, "module.w": entry}, {"w": (1,), "module.w": (1,)})
    with pytest.raises(TypeError, match="step"):
        so.Delta.from_dict({"w": entry}, {"w": (1,)}, step="3")


def test_file_layout(tmp_path):
    _, _, delta = example(step=20, parent_step=None, base_fingerprint="f")
    delta.save(tmp_path / "d.safetensors")
    tensors = load_file(tmp_path / "d.safetensors")
    assert set(tensors) == {f"{name}::{part}" for name in delta.names for part in ("indices", "values")}
    assert tensors["0.weight::indices"].dtype == torch.int32
    assert tensors["0.weight::values"].dtype == torch.bfloat16
    with safe_open(tmp_path / "d.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "sparseopt.delta"
    assert (metadata["version"], metadata["step"], metadata["base_fingerprint"]) == ("1", "20", "f")
    assert json.loads(metadata["parent_step"]) is None
    assert json.loads(metadata["dtypes"])["0.weight"] == "bfloat16"
    assert json.loads(metadata["shapes"])["0.weight"] == [5, 6]
    assert so.Delta.load(tmp_path / "d.safetensors").parent_step is None


def test_any_flipped_byte_is_refused_or_harmless(tmp_path):
    path = tmp_path / "d.safetensors"
    entries = {
        "a.w": (torch.tensor([1, 4, 7]), torch.tensor([1.0, -2.0, 3.0])),
        "b": (torch.tensor([0]), torch.ones(1)),
    }
    delta = so.Delta.from_dict(entries, {"a.w": (3, 3), "b": (2,)}, step=3, base_fingerprint="abc")
    delta.save(path)
    good = path.read_bytes()
    generator = np.random.default_rng(0)
    refused = 0
    for position in range(len(good)):
        damaged = bytearray(good)
        damaged[position] ^= int(generator.integers(1, 256)) if position % 2 else 1 << int(generator.integers(8))
        path.write_bytes(damaged)
        try:
            again = so.Delta.load(path)
        except so.FormatError as error:
            refused += str(path) in str(error)
        else:
            assert again == delta, f"byte {position} made another delta"
    assert refused > 0.8 * len(good)


def test_truncated_and_foreign_files(tmp_path):
    path = tmp_path / "d.safetensors"
    example()[2].save(path)
    good = path.read_bytes()
    for content in [good[:0], good[:7], good[:100], good[:-1], b"hello world, no delta", b"\xff" * 99]:
        path.write_bytes(content)
        with pytest.raises(so.FormatError, match=r"d\.safetensors"):
            so.Delta.load(path)
    so.MaskSet.from_bool({"w": torch.ones(3, dtype=torch.bool)}).save(path)
    with pytest.raises(so.FormatError, match=r"'sparseopt\.masks'"):
        so.Delta.load(path)
    with pytest.raises(FileNotFoundError, match="absent"):
        so.Delta.load(tmp_path / "absent.safetensors")
    with pytest.raises(ValueError, match=r"d\.pt"):
        example()[2].save(tmp_path / "d.pt")


@pytest.mark.parametrize(
    ("change_metadata", "change_tensors", "message"),
    [
        (lambda m: m.update(version="9"), None, "version '9'"),
        (lambda m: m.pop("step"), None, "lacks 'step'"),
        (lambda m: m.update(step="21"), None, "checksum"),
        (lambda m: m.update(step="x"), None, "its step cannot be read"),
        (lambda m: m.update(parent_step="[]"), None, "its parent_step cannot be read"),
        (lambda m: m.update(base_fingerprint="other"), None, "checksum"),
        (lambda m: m.update(shapes='{"0.weight": 3}'), None, "its shapes cannot be read"),
        (lambda m: m.update(shapes=m["shapes"].replace("[5, 6]", "[6, 5]")), None, "checksum"),
        (lambda m: m.update(dtypes=m["dtypes"].replace("bfloat16", "float16", 1)), None, "dtypes"),
        (None, lambda t: t.pop("0.bias::values"), r"lacks '0\.bias::values'"),
        (None, lambda t: t.update(x=torch.ones(1)), "unexpected tensor 'x'"),
        (None, lambda t: t["0.bias::values"].neg_(), "checksum"),
        (None, lambda t: t["0.weight::indices"].zero_(), "sorted and distinct"),
    ],
)
def test_wrong_contents(tmp_path, change_metadata, change_tensors, message):
    path = tmp_path / "d.safetensors"
    example(step=20)[2].save(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    (change_metadata or (lambda m: None))(metadata)
    (change_tensors or (lambda t: None))(tensors)
    save_file(tensors, path, metadata)
    with pytest.raises(so.FormatError, match=message):
        so.Delta.load(path)


def test_model_fingerprint():
    state = model().state_dict()
    assert model_fingerprint(model()) == model_fingerprint(dict(reversed(state.items())))
    assert model_fingerprint({f"module.{n}": t for n, t in state.items()}) == model_fingerprint(state)
    assert model_fingerprint(model(1)) != model_fingerprint(state)
    assert model_fingerprint({**state, "0.bias": state["0.bias"].float()}) != model_fingerprint(state)
