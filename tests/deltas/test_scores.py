"""Scores of a delta log beside a dense implementation of the formulas in fp64; random and weight scores."""

import itertools

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import sparseopt as so
from sparseopt.deltas.base import write_base
from sparseopt.deltas.model_scores import RandomScores, WeightScores, weight_scores
from sparseopt.deltas.reader import LogReader
from sparseopt.deltas.scores import METHODS, LogScores, scores
from sparseopt.masks import _pieces, _select
from sparseopt.masks.gradient_stats import GradientScores, save_gradient_stats

STEPS = [5, 10, 30, 50]
SHAPES = {"h.0.mlp.weight": (64, 48), "h.0.attn.weight": (40, 40), "norm.weight": (33,), "still.weight": (8, 8)}


def write(folder, steps=STEPS, dtype=torch.bfloat16, share=0.2):
    """A log from `Delta` alone -> its state dicts by step, 0 being the base. Tensors change at different densities."""
    generator = torch.Generator().manual_seed(3)
    state = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
    base = write_base(folder, state, save_base=True)
    states, parent = {0: state}, None
    for step in steps:
        new = {name: tensor.clone() for name, tensor in state.items()}
        entries = {}
        for name, tensor in new.items():
            chance = {"norm.weight": 0.9, "still.weight": 0.0}.get(name, share)
            where = (torch.rand(tensor.numel(), generator=generator) < chance).nonzero().view(-1)
            tensor.view(-1)[where] += (0.05 * torch.randn(where.numel(), generator=generator)).to(dtype)
            entries[name] = (where, tensor.view(-1)[where])
        delta = so.Delta.from_dict(entries, SHAPES, step=step, parent_step=parent, base_fingerprint=base.fingerprint)
        delta.save(folder / f"delta_step_{step}.safetensors")
        states[step], state, parent = new, new, step
    return states


def naive(states, method, target, window=None):
    """The formulas on whole tensors in fp64, with deltas as they are written down."""
    result = {}
    steps = [s for s in sorted(states) if 0 < s <= target]
    for name in SHAPES:
        value = {s: states[s][name].double().numpy() for s in states}
        delta = {s: value[s] - value[0] for s in states}
        if method == "magnitude":
            found = sum(np.abs(delta[s]) for s in steps)
        elif method == "ground_truth":
            found = np.abs(delta[target])
        elif method == "fisher":
            pairs = list(itertools.pairwise([0, *steps]))
            found = np.mean([(value[b] - value[a]) ** 2 / (b - a) for a, b in pairs], axis=0)
        else:
            points = [s for s in [0, *steps] if window is None or s >= target - window]
            v = np.stack([delta[b] - delta[a] for a, b in itertools.pairwise(points)])
            mean, std = np.abs(v.mean(0)), v.std(0)
            found = mean * (1 + mean / (std + 1e-8))
        result[name] = torch.from_numpy(found)
    return result


@pytest.mark.parametrize("share", [0.01, 0.2, 0.8])  # few entries are worked on alone, many together with all
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("target", [5, 30, 50])
def test_formulas(tmp_path, method, target, dtype, share):
    states = write(tmp_path, dtype=dtype, share=share)
    for window in [None, 20, 25, 49, 1000] if method == "momentum" and target == 50 else [None]:
        found = scores(tmp_path, method, target, window)
        assert list(found) == list(SHAPES)
        expected = naive(states, method, target, window)
        for name, tensor in found.items():
            assert (tensor.dtype, tensor.shape) == (torch.float32, torch.Size(SHAPES[name]))
            torch.testing.assert_close(
                tensor.double(), expected[name], rtol=2e-3 if method == "momentum" else 1e-5, atol=1e-9
            )
        assert not found["still.weight"].any()
        assert found["norm.weight"].count_nonzero() > 15


def test_the_default_step_is_the_last_and_provenance_says_it_all(tmp_path):
    write(tmp_path)
    fingerprint = LogReader(tmp_path).base.fingerprint
    found = scores(tmp_path, "momentum", momentum_window=25)
    assert found.target_step == 50
    about = so.find_masks(found, 0.9, allow_zero_scores=True).metadata
    assert about["method"] == "momentum"
    assert (about["target_step"], about["momentum_window"], about["steps"]) == (50, 25, [30, 50])
    assert about["log_fingerprint"] == fingerprint
    assert scores(tmp_path, "fisher").provenance["steps"] == STEPS
    assert scores(tmp_path, "momentum", 30).provenance["steps"] == [0, 5, 10, 30]


def test_pieces_do_not_depend_on_how_they_are_cut(tmp_path, monkeypatch):
    write(tmp_path)
    for method in METHODS:
        found = scores(tmp_path, method)
        for name in SHAPES:
            whole = found[name].view(-1)
            cut = [found.piece(name, start, min(start + 101, whole.numel())) for start in range(0, whole.numel(), 101)]
            assert torch.equal(torch.cat(cut), whole)
            assert torch.equal(found.piece(name, 5, 17), whole[5:17])


@pytest.mark.filterwarnings("ignore:.*have score zero")
@pytest.mark.parametrize("scope", ["global", "per_tensor"])
@pytest.mark.parametrize("granularity", [1, 8, "row", "column"])
def test_masks_are_those_of_the_whole_tensors_and_counts_exact(tmp_path, granularity, scope, monkeypatch):
    write(tmp_path / "log", share=0.8)
    monkeypatch.setattr(_select, "PIECE", 1 << 8)
    monkeypatch.setattr(_pieces, "SPOOL_PIECE", 1 << 9)
    lazy = scores(tmp_path / "log", "fisher")
    options = {
        "sparsity": 0.9,
        "scope": scope,
        "granularity": granularity,
        "exclude": "norm",
        "allow_zero_scores": True,
    }
    whole = so.find_masks(dict(lazy.items()), **options)
    found = so.find_masks(lazy, **options)
    with lazy.spool(tmp_path / "scratch") as spooled:
        assert so.find_masks(spooled, **options) == found == whole
        assert not list((tmp_path / "scratch").iterdir())  # it has no name
        assert all(torch.equal(spooled[name], lazy[name]) for name in lazy)
    assert found.count("norm.weight") == 0
    if granularity == 1 and scope == "global":
        n = sum(torch.Size(s).numel() for name, s in SHAPES.items() if name != "norm.weight")
        assert found.active_parameters == round(0.1 * n)


def test_the_base_given_is_not_written_to(tmp_path):
    states = write(tmp_path, dtype=torch.float32, share=0.9)
    before = {name: tensor.clone() for name, tensor in states[0].items()}
    for method in METHODS:
        dict(scores(tmp_path, method, base=states[0]).items())
    dict(WeightScores(SHAPES, lambda name, a, b: states[0][name].view(-1)[a:b]).items())
    assert all(torch.equal(states[0][name], before[name]) for name in before)


def test_a_diverged_run_is_named(tmp_path):
    states = write(tmp_path, [5])
    fingerprint = LogReader(tmp_path).base.fingerprint
    bad = (torch.tensor([3]), torch.tensor([float("nan")], dtype=torch.bfloat16))
    delta = so.Delta.from_dict({"h.0.mlp.weight": bad}, SHAPES, step=6, parent_step=5, base_fingerprint=fingerprint)
    delta.save(tmp_path / "delta_step_6.safetensors")
    assert states
    with pytest.raises(ValueError, match=r"scores of 'h.0.mlp.weight' contain NaN"):
        so.find_masks(scores(tmp_path, "fisher"))
    so.find_masks(scores(tmp_path, "fisher", 5), 0.99)


def test_bad_arguments(tmp_path):
    write(tmp_path)
    with pytest.raises(ValueError, match=r"method must be one of magnitude, .* got 'var'"):
        scores(tmp_path, "var")
    with pytest.raises(ValueError, match=r"no step 20; it has steps 5, 10, 30, 50\."):
        scores(tmp_path, "fisher", 20)
    with pytest.raises(ValueError, match=r"momentum needs two .* only 50 lies in 40..50; widen momentum_window=10"):
        scores(tmp_path, "momentum", 50, 10)
    with pytest.raises(ValueError, match="momentum_window must be at least 1"):
        scores(tmp_path, "momentum", 50, 0)
    (tmp_path / "delta_step_10.safetensors").unlink()
    with pytest.raises(ValueError, match="gap: step 30 follows step 10"):
        scores(tmp_path, "fisher")


def test_no_space_for_a_scratch_file(tmp_path, monkeypatch):
    write(tmp_path / "log")
    monkeypatch.setattr(_pieces.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1000})())
    with pytest.raises(ValueError, match=r"scratch file .* needs 0.0 GB, '.*' has 0.0 GB left"):
        scores(tmp_path / "log", "fisher").spool(tmp_path)


# ---- scores without training -----------------------------------------------------------------------------------------
def test_random_scores_depend_on_seed_name_and_index_only():
    shapes = {"a": (300_000,), "b": (70_000, 3)}
    one, other = RandomScores(shapes, 7), RandomScores({"b": (70_000, 3), "c": (4,), "a": (300_000,)}, 7)
    assert torch.equal(one["a"], other["a"])
    assert torch.equal(one["b"], other["b"])
    assert torch.equal(one.piece("b", 65_000, 140_000), one["b"].view(-1)[65_000:140_000])
    assert not torch.equal(one["a"], RandomScores(shapes, 8)["a"])
    assert 0 < float(one["a"].min()) <= float(one["a"].max()) <= 1
    assert abs(float(one["a"].mean()) - 0.5) < 0.005
    masks = so.find_masks(one, 0.9)
    assert masks.active_parameters == 51_000
    assert abs(masks.count("a") - 30_000) < 500  # uniform over tensors: 6 standard deviations are 400
    assert (masks.metadata["method"], masks.metadata["seed"]) == ("random", 7)


def test_weight_scores_of_a_log_and_of_a_folder(tmp_path):
    states = write(tmp_path / "log")
    found = weight_scores(LogReader(tmp_path / "log").base)
    for name in SHAPES:
        assert torch.equal(found[name], states[0][name].float().abs())
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=True,
        )
    )
    model.save_pretrained(tmp_path / "model")
    found = weight_scores(str(tmp_path / "model"))
    parameters = dict(model.named_parameters())
    assert list(found) == list(parameters)  # the tied head once
    assert all(torch.equal(found[name], parameter.detach().abs()) for name, parameter in parameters.items())
    save_file({"model.norm.weight": torch.ones(3)}, tmp_path / "model" / "model.safetensors")
    with pytest.raises(ValueError, match=r"should store 'model.embed_tokens.weight' .* no such tensor"):
        weight_scores(str(tmp_path / "model"))


def test_gradient_statistics(tmp_path):
    squares = {"module.a": torch.rand(10, 4), "b": torch.rand(7).bfloat16()}
    for kind, said in [("per_sample", "empirical Fisher diagonal"), ("batch", "no Fisher diagonal")]:
        path = tmp_path / f"{kind}.safetensors"
        save_gradient_stats(path, squares, kind, 32)
        found = GradientScores(path, "fisher")
        assert list(found) == ["a", "b"]
        assert torch.equal(found["a"], squares["module.a"])
        assert torch.equal(found["b"], squares["b"].float())
        about = so.find_masks(found, 0.5).metadata
        assert about["method"] == "fisher"
        assert said in about["formula"]
        assert about["gradient_count"] == "32"
    save_file({"a": torch.rand(5)}, tmp_path / "plain.safetensors")
    assert "does not say" in GradientScores(tmp_path / "plain.safetensors").provenance["formula"]
    with pytest.raises(ValueError, match="kind must be"):
        save_gradient_stats(tmp_path / "x.safetensors", squares, "fisher", 1)


def test_files_that_are_no_gradient_statistics(tmp_path):
    path = tmp_path / "x.safetensors"
    for tensors, about, message in [
        ({"a": torch.zeros(3, dtype=torch.uint8)}, {"format": "sparseopt.masks"}, "format is 'sparseopt.masks'"),
        ({"a": torch.zeros(3, dtype=torch.int32)}, None, "'a' is not floating-point"),
        ({"a": torch.zeros(3)}, {"format": "sparseopt.gradient_statistics", "version": "9"}, "version '9'"),
        ({}, None, "no tensors"),
    ]:
        save_file(tensors, path, about)
        with pytest.raises(so.FormatError, match=message):
            GradientScores(path)
    save_file({"a": torch.tensor([1.0, -1.0])}, path)
    with pytest.raises(ValueError, match=r"squared gradients of 'a' in '.*' hold negative"):
        so.find_masks(GradientScores(path), 0.5)
    path.write_bytes(b"rubbish that is long enough")
    with pytest.raises(so.FormatError, match="not a safetensors file"):
        GradientScores(path)
    with pytest.raises(FileNotFoundError, match=r"no file '.*absent"):
        GradientScores(tmp_path / "absent.safetensors")


def test_log_scores_accept_an_open_reader(tmp_path):
    write(tmp_path)
    reader = LogReader(tmp_path)
    assert isinstance(scores(reader, "fisher"), LogScores)
    assert scores(reader, "fisher").reader is reader
