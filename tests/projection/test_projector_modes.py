"""GradientProjector under torch.compile and checkpointing, what it saves, and how it leaves the model."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import sparseopt as so
from sparseopt.projection import _engine

FP32 = 1e-5
EVERYTHING: dict[str, Any] = {"include_embeddings": True, "include_biases": True, "dtype": "float32"}


@pytest.fixture
def compiler() -> Iterator[Any]:
    """A backend without code generation that counts the graphs it gets."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    yield CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()


def state(model: nn.Module) -> Any:
    """What must be on exit as it was on entry."""
    hooks = [(len(m._forward_pre_hooks), len(m._forward_hooks), "forward" in m.__dict__) for m in model.modules()]
    return hooks, [(p.requires_grad, p.grad) for p in model.parameters()]


# ---- torch.compile ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "given"), [("gpt2", "plain"), ("gpt2", "in place"), ("llama", "compiled")])
def test_compiled_fullgraph(name: str, given: str, tools: Any, compiler: Any) -> None:
    """The compiled model equals the plain one; its names have no ``_orig_mod``."""
    model, batch = tools.models[name](layers=1), tools.padded_batch(4)
    p = so.GradientProjector(model, **EVERYTHING)
    expected = tools.exact_rows(model, p.metadata, batch)
    if given == "in place":
        compiled: Any = model
        model.compile(backend=compiler, fullgraph=True)
    else:
        compiled = torch.compile(model, backend=compiler, fullgraph=True)
    if given == "compiled":
        p = so.GradientProjector(compiled, **EVERYTHING)
    assert not any("_orig_mod" in layer.name for layer in p.layers)
    before = state(model)
    with p:
        tools.sample_losses(compiled, batch).sum().backward()
        tools.assert_same(p.collect(), expected, p.metadata, FP32)
    assert compiler.frame_count == 1
    assert state(model) == before


@pytest.mark.slow
def test_compiled_with_changing_batches(tools: Any, compiler: Any) -> None:
    model, batch = tools.tiny_gpt2(layers=1), tools.padded_batch(5)
    compiled = torch.compile(model, backend=compiler, fullgraph=True)
    p = so.GradientProjector(compiled, **EVERYTHING)
    expected = tools.exact_rows(model, p.metadata, batch)
    with p:
        for samples in (5, 2, 4, 1):
            tools.sample_losses(compiled, {k: v[:samples] for k, v in batch.items()}).sum().backward()
            tools.assert_same(p.collect(), expected[:samples], p.metadata, FP32)


def test_compiled_before_and_used_after(tools: Any, compiler: Any) -> None:
    """A graph from before ``with`` is not taken inside it, nor the other way round, though all weights are frozen."""
    model, batch = tools.tiny_gpt2(layers=1).requires_grad_(False), tools.padded_batch()
    p = so.GradientProjector(model, dtype="float32")
    compiled = torch.compile(model, backend=compiler, fullgraph=True)
    plain = tools.sample_losses(compiled, batch)
    assert not plain.requires_grad
    with p:
        tools.sample_losses(compiled, batch).sum().backward()
    rows = p.collect()
    assert not tools.sample_losses(compiled, batch).requires_grad
    model.requires_grad_(True)
    tools.assert_same(rows, tools.exact_rows(model, p.metadata, batch), p.metadata, FP32)
    model.requires_grad_(False)
    graphs = compiler.frame_count
    assert graphs > 1
    for _ in range(3):
        with p:
            tools.sample_losses(compiled, batch).sum().backward()
        p.collect()
    assert compiler.frame_count == graphs  # found again, not compiled again


def test_prepare_for_a_larger_compiled_function(tools: Any, compiler: Any) -> None:
    model, batch = tools.tiny_gpt2(layers=1), tools.padded_batch()
    p = so.GradientProjector(model, **EVERYTHING)
    expected = tools.exact_rows(model, p.metadata, batch)

    @torch.compile(backend=compiler, fullgraph=True)
    def step(ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        return tools.sample_losses(model, {"input_ids": ids, "attention_mask": mask, "labels": labels}).sum()

    with p:
        p.prepare(3)
        step(*batch.values()).backward()
    tools.assert_same(p.collect(), expected, p.metadata, FP32)


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
def test_compiled_with_inductor(tools: Any) -> None:
    model, batch = tools.tiny_llama(layers=1), tools.padded_batch()
    p = so.GradientProjector(model, **EVERYTHING)
    expected = tools.exact_rows(model, p.metadata, batch)
    with p:
        tools.sample_losses(torch.compile(model, fullgraph=True), batch).sum().backward()
    tools.assert_same(p.collect(), expected, p.metadata, FP32)


# ---- checkpointing ---------------------------------------------------------------------------------------------------
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("embeddings", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_gradient_checkpointing(name: str, reentrant: bool, embeddings: bool, tools: Any) -> None:
    model, batch = tools.models[name](), tools.padded_batch()
    p = so.GradientProjector(model, dtype="float32", include_embeddings=embeddings)
    expected = tools.exact_rows(model, p.metadata, batch)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.disable_input_require_grads()  # recent transformers enable this by themselves, older ones do not
    model.train()  # transformers checkpoints in training mode only; these models have no dropout
    before = state(model)
    with p:
        tools.sample_losses(model, batch).sum().backward()
    assert state(model) == before
    assert model.training
    tools.assert_same(p.collect(), expected, p.metadata, FP32)


def test_reentrant_checkpointing_by_hand_is_an_error_not_a_loss() -> None:
    """Where nobody makes the checkpoint's input require a gradient, its layers get none: collect() names them."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.utils.checkpoint.checkpoint(self.first, x, use_reentrant=True)
            return self.second(x)

    model = Model()
    p = so.GradientProjector(model, "first,second", rank_total=4, rank_min=2)
    with p, pytest.warns(UserWarning, match="None of the inputs have requires_grad"):
        model(torch.randn(2, 3, 4)).sum().backward()
    with pytest.raises(ValueError, match=r"No gradient reached 1 projected layer\(s\), first"):
        p.collect()


# ---- what is saved and computed --------------------------------------------------------------------------------------
def test_inputs_are_projected_once_per_group_and_not_kept(tools: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tools.tiny_llama(layers=1), tools.padded_batch()
    p = so.GradientProjector(model, dtype="float32")
    made: list[Any] = []
    inputs: list[Any] = []
    original = _engine.Engine.project_input

    def spy(self: Any, x: Tensor, entry: Any) -> Tensor:
        inputs.append(weakref.ref(x))
        projected = original(self, x, entry)
        made.append(projected.data_ptr())
        return projected

    monkeypatch.setattr(_engine.Engine, "project_input", spy)
    with p:
        losses = tools.sample_losses(model, batch)
        assert len(made) == 7
        assert len(set(made)) == 4  # q/k/v, o, gate/up, down
        # The attention's input and the MLP's are wanted by norms only, o_proj's by nobody: it is gone.
        assert inputs[3]() is None
        assert inputs[-1]() is None
        losses.sum().backward()
    assert p._engine._last is not None
    p.collect()
    assert p._engine._last is None


def test_a_changed_input_is_projected_again() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            y = self.q_proj(x)
            x.mul_(2)
            return y + self.k_proj(x)

    model, x = Model(), torch.randn(3, 2, 4)
    p = so.GradientProjector(model, "q_proj,k_proj", rank_total=4, rank_min=2, dtype="float32")
    assert p.layers[0].input_key == p.layers[1].input_key == "q_proj"
    with p:
        model(x).square().sum().backward()
    rows = p.collect()
    (model.q_proj(x) + model.k_proj(x * 2)).square().sum().backward()
    for layer in p.layers:
        exact = p.project(layer.name, model.get_submodule(layer.name).weight.grad)
        torch.testing.assert_close(rows[:, layer.slice_start : layer.slice_end].sum(0), exact, rtol=1e-4, atol=1e-4)


def test_backward_ends_at_the_lowest_projected_layer_and_no_weight_gradient_exists(tools: Any) -> None:
    model, batch = tools.tiny_gpt2(), tools.padded_batch()
    reached = []
    p = so.GradientProjector(model, "transformer.h.1")
    with p:
        block: Any = model.get_submodule("transformer.h.0")
        handle = block.register_forward_hook(lambda _, __, output: reached.append(output.requires_grad))
        tools.sample_losses(model, batch).sum().backward()
        handle.remove()
        assert all(parameter.grad is None for parameter in model.parameters())
    assert reached == [False]
    assert p.collect().isfinite().all()


def test_the_lowest_layer_makes_no_gradient_of_its_input() -> None:
    """Multiplications of a pass over [2, 5] tokens: 2 n per product, of 16 x 32 weights and of the projection."""
    model = nn.Sequential(nn.Linear(16, 32, bias=False), nn.Tanh(), nn.Linear(32, 16, bias=False))
    p = so.GradientProjector(model, "0,2", rank_total=16, rank_min=4, dtype="float32")
    counter = FlopCounterMode(display=False)
    with p:
        losses = model(torch.randn(2, 5, 16)).square().sum()
        with counter:
            losses.backward()
    counts = counter.get_flop_counts()["Global"]
    dense = 2 * 10 * 16 * 32  # one dx; the dW would be two more, the other dx one
    assert dense <= sum(counts.values()) < 1.5 * dense


def test_without_gradients_the_model_is_its_own(tools: Any) -> None:
    model, batch = tools.tiny_gpt2(), tools.padded_batch()
    with torch.no_grad():
        expected = tools.sample_losses(model, batch)
    with so.GradientProjector(model) as p:
        with torch.no_grad():
            assert torch.equal(tools.sample_losses(model, batch), expected)
        assert torch.equal(tools.sample_losses(model, batch), expected)
        with torch.inference_mode():
            assert torch.equal(tools.sample_losses(model, batch), expected)
    with pytest.raises(ValueError, match="Nothing to collect"):
        p.collect()


# ---- leaving no trace ------------------------------------------------------------------------------------------------
def test_the_model_is_restored_also_after_an_exception(tools: Any) -> None:
    model, batch = tools.tiny_gpt2(), tools.padded_batch()
    model.get_parameter("transformer.wpe.weight").requires_grad_(False)
    before = state(model)
    p = so.GradientProjector(model, **EVERYTHING)
    assert state(model) == before
    with p:
        assert not any(parameter.requires_grad for parameter in model.parameters())
        tools.sample_losses(model, batch).sum().backward()
    rows = p.collect()
    assert state(model) == before

    def fail() -> None:
        tools.sample_losses(model, batch)[0].backward()
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"), p:
        fail()
    assert state(model) == before
    with p:  # what the failed block left is not mixed in
        tools.sample_losses(model, batch).sum().backward()
    assert torch.equal(p.collect(), rows)


def test_two_projectors_do_not_mix(tools: Any) -> None:
    model = tools.tiny_gpt2()
    before = state(model)
    p, q = so.GradientProjector(model), so.GradientProjector(model, "mlp")
    with p:
        with pytest.raises(ValueError, match="patched forward"):
            q.__enter__()
        with pytest.raises(ValueError, match="active already"):
            p.__enter__()
    assert state(model) == before


def test_the_model_may_move_between_uses(tools: Any) -> None:
    model, batch = tools.tiny_llama(), tools.padded_batch()
    p = so.GradientProjector(model, **EVERYTHING)
    with p:
        tools.sample_losses(model, batch).sum().backward()
    rows = p.collect()
    model.double()
    with p:
        tools.sample_losses(model, batch).sum().backward()
    tools.assert_same(p.collect(), rows, p.metadata, 1e-4)


# ---- errors ----------------------------------------------------------------------------------------------------------
def test_every_batch_must_be_collected(tools: Any) -> None:
    model, batch = tools.tiny_gpt2(), tools.padded_batch()
    p = so.GradientProjector(model)
    with pytest.raises(ValueError, match="Nothing to collect"):
        p.collect()
    with p:
        tools.sample_losses(model, batch).sum().backward()
        with pytest.raises(ValueError, match="not collected"):
            tools.sample_losses(model, batch)
        assert p.collect().shape == (3, p.total_dim)
        with pytest.raises(ValueError, match="Nothing to collect"):
            p.collect()


def test_batches_of_two_sizes_in_one_backward_are_refused(tools: Any) -> None:
    model, batch = tools.tiny_gpt2(), tools.padded_batch()
    p = so.GradientProjector(model)
    with p:
        tools.sample_losses(model, {k: v[:2] for k, v in batch.items()})  # a forward alone does no harm
        tools.sample_losses(model, batch).sum().backward()
        assert p.collect().shape == (3, p.total_dim)
        first = tools.sample_losses(model, {k: v[:2] for k, v in batch.items()})
        (first.sum() + tools.sample_losses(model, batch).sum()).backward()
        with pytest.raises(ValueError, match="batches of different sizes"):
            p.collect()


def test_an_unused_layer_is_named() -> None:
    model = nn.ModuleDict({"used": nn.Linear(3, 3), "idle": nn.Linear(3, 3)})
    p = so.GradientProjector(model, "used,idle", rank_total=4, rank_min=2)
    with p:
        model["used"](torch.randn(2, 3)).sum().backward()
    with pytest.raises(ValueError, match=r"No gradient reached 1 projected layer\(s\), idle"):
        p.collect()


def test_inputs_without_the_sample_first_are_refused() -> None:
    class Flattens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.expert = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.expert(x.flatten(0, 1))

    model = Flattens()
    p = so.GradientProjector(model, "expert", rank_total=4, rank_min=2)
    with (
        p,
        pytest.raises(ValueError, match=r"'expert' got an input whose first dimension is 10, expected the batch of 2"),
    ):
        model(torch.randn(2, 5, 3))
    plain = nn.Sequential(nn.Linear(3, 3))
    with (
        so.GradientProjector(plain, "0"),
        pytest.raises(ValueError, match=r"'0' got an input of shape \(3,\): expected at least two"),
    ):
        plain(torch.randn(3))


def test_arguments_are_checked(tools: Any) -> None:
    model = tools.tiny_gpt2()
    with pytest.raises(ValueError, match="Unknown dtype 'int8'"):
        so.GradientProjector(model, dtype="int8")
    with pytest.raises(ValueError, match="Unknown projection method 'sparse'"):
        so.GradientProjector(model, method="sparse")
    with pytest.raises(ValueError, match="row_orthonormal=True cannot go with"):
        so.GradientProjector(model, method="rademacher", row_orthonormal=True)
    with pytest.raises(TypeError, match=r"torch\.nn\.Module, got dict"):
        so.GradientProjector({})  # type: ignore[arg-type]
    p = so.GradientProjector(model, dtype=torch.float16)
    assert p.dtype == torch.float16
    with pytest.raises(ValueError, match="inside `with projector:` only"):
        p.prepare(2)
    with pytest.raises(ValueError, match="No projected layer 'nobody'"):
        p.projection_matrices("nobody")
    with pytest.raises(ValueError, match=r"must end in shape \(32, 96\)"):
        p.project("transformer.h.0.attn.c_attn", torch.zeros(96, 32))
