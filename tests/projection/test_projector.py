"""GradientProjector against each sample's exact gradient, projected by matrices rebuilt from metadata alone."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparseopt as so

FP32 = 1e-5
BF16 = 2e-2


def project(
    model: nn.Module, tools: Any, batch: Any, called: Any = None, **options: Any
) -> tuple[Tensor, dict[str, Any]]:
    p = so.GradientProjector(model, dtype="float32", **options)
    with p:
        tools.sample_losses(called or model, batch).sum().backward()
    return p.collect(), json.loads(json.dumps(p.metadata))


OPTIONS = {
    "default": {},
    "everything": {"include_embeddings": True, "include_biases": True},
    "rademacher": {"method": "rademacher", "include_embeddings": True, "include_biases": True},
    "row_orthonormal": {"row_orthonormal": True, "include_embeddings": True},
    "aspect": {"shape_rule": "aspect", "rank_total": 64, "rank_min": 2, "include_embeddings": True},
    "sketch": {"sketch": 20, "rank_total": 64, "include_embeddings": True, "include_biases": True},
    "one block": {"layers": "h.1,layers.1"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_equals_exact_gradients(name: str, options: dict[str, Any], tools: Any) -> None:
    if "layers" in options:
        options = {"layers": "h.1" if name == "gpt2" else "layers.1"}
    model, batch = tools.models[name](), tools.padded_batch()
    rows, metadata = project(model, tools, batch, **options)
    assert rows.dtype == torch.float32
    tools.assert_same(rows, tools.exact_rows(model, metadata, batch), metadata, FP32)


def test_equals_exact_gradients_of_a_part_of_a_group(tools: Any) -> None:
    """k_proj without q_proj, whose name its P_i is made from all the same."""
    model, batch = tools.tiny_llama(), tools.padded_batch()
    rows, metadata = project(model, tools, batch, layers="k_proj,up_proj")
    assert metadata["layers"][0]["input_key"] == "model.layers.0.self_attn.q_proj"
    tools.assert_same(rows, tools.exact_rows(model, metadata, batch), metadata, FP32)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_equals_torch_func(name: str, tools: Any) -> None:
    """Independently of this package's own reference: vmap(grad) and einsum."""
    model, batch = tools.models[name](attn_implementation="eager"), tools.padded_batch()
    p = so.GradientProjector(model, "mlp,attn", rank_total=36, rank_min=2, dtype="float32")

    def loss(parameters: dict[str, Tensor], ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        def call(**inputs: Any) -> Any:
            return torch.func.functional_call(model, parameters, kwargs=inputs)

        one = {"input_ids": ids[None], "attention_mask": mask[None], "labels": labels[None]}
        return tools.sample_losses(call, one)[0]

    parameters = {n: v.detach() for n, v in model.named_parameters()}
    # Without padding: the mask's shape then does not depend on its values, which vmap could not follow.
    batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    with p:
        tools.sample_losses(model, batch).sum().backward()
    rows = p.collect()
    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0, 0))(parameters, *batch.values())
    for layer in p.metadata["layers"]:
        inner, outer = p.projection_matrices(layer["name"])
        dw = gradients[layer["name"] + ".weight"]
        if layer["type"] == "Conv1D":
            dw = dw.transpose(1, 2)
        expected = torch.einsum("oa,nab,ib->noi", outer, dw, inner).flatten(1)
        got = rows[:, layer["slice_start"] : layer["slice_end"]]
        assert (got - expected).abs().max() < FP32 * expected.square().mean().sqrt()


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_bf16(name: str, tools: Any) -> None:
    """Against the fp32 gradients of the same weights: everything between is bf16."""
    model, batch = tools.models[name](torch.bfloat16), tools.padded_batch()
    rows, metadata = project(model, tools, batch, include_embeddings=True, include_biases=True)
    expected = tools.exact_rows(model, metadata, batch)  # bf16 gradients by autograd
    for layer in metadata["layers"]:
        columns = slice(layer["slice_start"], layer["slice_end"])
        error = (rows[:, columns] - expected[:, columns]).norm() / expected[:, columns].norm()
        assert error < BF16, (layer["name"], float(error))


def test_fp16(tools: Any) -> None:
    model, batch = tools.tiny_llama(torch.float16), tools.padded_batch()
    rows, metadata = project(model, tools, batch)
    expected = tools.exact_rows(model, metadata, batch)
    assert (rows - expected).norm() < 5e-3 * expected.norm()


def test_fp16_inputs_do_not_overflow() -> None:
    """|x| = 3000 in 4096 dimensions: A P^T with entries of variance 1 has a standard deviation of 192,000, past fp16."""
    model = nn.Sequential(nn.Linear(4096, 8, bias=False)).half()
    p = so.GradientProjector(model, "0", rank_total=64, dtype="float32", method="rademacher")
    x = torch.full((1, 4096), 3000.0, dtype=torch.float16)
    with p:
        (model(x).float() * 1e-3).sum().backward()
    assert p.collect().isfinite().all()


def test_autocast(tools: Any) -> None:
    model, batch = tools.tiny_gpt2(), tools.padded_batch()
    with torch.autocast("cpu", torch.bfloat16):
        rows, metadata = project(model, tools, batch, include_embeddings=True, include_biases=True)
    expected = tools.exact_rows(model, metadata, batch)
    assert (rows - expected).norm() < BF16 * expected.norm()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_of_the_rows(dtype: str, tools: Any) -> None:
    model, batch = tools.tiny_llama(), tools.padded_batch()
    p = so.GradientProjector(model, dtype=dtype)
    with p:
        tools.sample_losses(model, batch).sum().backward()
    rows = p.collect()
    assert rows.dtype == getattr(torch, dtype)
    assert rows.shape == (3, p.total_dim)
    assert p.metadata["proj_dtype"] == dtype


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_batch_equals_its_samples_alone(name: str, tools: Any) -> None:
    model, batch = tools.models[name](), tools.padded_batch(5)
    p = so.GradientProjector(model, include_embeddings=True, include_biases=True, dtype="float32")
    rows = []
    with p:
        tools.sample_losses(model, batch).sum().backward()
        together = p.collect()
        for index in range(5):
            tools.sample_losses(model, {k: v[index : index + 1] for k, v in batch.items()}).sum().backward()
            rows.append(p.collect())
    tools.assert_same(together, torch.cat(rows), p.metadata, FP32)


# ---- weights used more than once -------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("selected", ["head", "embedding"])
def test_tied_head_counts_both_terms(name: str, selected: str, tools: Any) -> None:
    model = tools.tiny_gpt2() if name == "gpt2" else tools.tiny_llama(tie_word_embeddings=True)
    batch = tools.padded_batch()
    options = {"layers": "lm_head"} if selected == "head" else {"layers": "", "include_embeddings": True}
    rows, metadata = project(model, tools, batch, **options)
    first = metadata["layers"][0]
    assert first["name"] == ("transformer.wte" if name == "gpt2" else "model.embed_tokens")
    assert len(metadata["layers"]) == (2 if name == "gpt2" and selected == "embedding" else 1)  # wpe
    tools.assert_same(rows, tools.exact_rows(model, metadata, batch), metadata, FP32)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 6)
        self.alias = self.body
        self.head = nn.Linear(6, 2, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = torch.tanh(self.body(input_ids))
        return self.head(torch.tanh(self.alias(x)) + self.body(x * 2))


def test_module_used_three_times_under_two_names(tools: Any) -> None:
    model, x = Twice(), torch.randn(4, 5, 6)

    def losses(model: nn.Module, batch: Any) -> Tensor:
        return model(batch["input_ids"]).square().sum((1, 2))

    p = so.GradientProjector(model, "alias,head", rank_total=9, rank_min=3, dtype="float32", include_biases=True)
    assert [layer.name for layer in p.layers] == ["body", "body.bias", "head"]
    with p:
        losses(model, {"input_ids": x}).sum().backward()
    tools.assert_same(p.collect(), tools.exact_rows(model, p.metadata, {"input_ids": x}, losses), p.metadata, FP32)


@pytest.mark.parametrize("inner", [(), (3,), (2, 3)])
def test_inputs_of_any_rank(inner: tuple[int, ...], tools: Any) -> None:
    model, x = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)), torch.randn(4, *inner, 5)

    def losses(model: nn.Module, batch: Any) -> Tensor:
        return model(batch["input_ids"]).square().flatten(1).sum(1)

    p = so.GradientProjector(model, "0,2", rank_total=9, rank_min=3, dtype="float32", include_biases=True)
    with p:
        losses(model, {"input_ids": x}).sum().backward()
    tools.assert_same(p.collect(), tools.exact_rows(model, p.metadata, {"input_ids": x}, losses), p.metadata, FP32)


def test_an_input_shared_by_all_samples(tools: Any) -> None:
    """First dimension 1, added to a batch: each sample's gradient is its own (as of position embeddings)."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = nn.Linear(3, 4)
            self.constant = nn.Parameter(torch.randn(1, 5, 3))

        def forward(self, input_ids: Tensor) -> Tensor:
            return torch.tanh(input_ids + self.shared(self.constant))

    model, x = Shared(), torch.randn(4, 5, 4)

    def losses(model: nn.Module, batch: Any) -> Tensor:
        return model(batch["input_ids"]).square().sum((1, 2))

    p = so.GradientProjector(model, "shared", rank_total=9, rank_min=3, dtype="float32")
    with p:
        losses(model, {"input_ids": x}).sum().backward()
    tools.assert_same(p.collect(), tools.exact_rows(model, p.metadata, {"input_ids": x}, losses), p.metadata, FP32)


def test_padding_row_of_an_embedding_gets_nothing(tools: Any) -> None:
    model, batch = tools.tiny_llama(), tools.padded_batch()
    assert model.get_input_embeddings().padding_idx == 3
    batch["attention_mask"] = torch.ones_like(batch["attention_mask"])  # so that the padding tokens do matter
    batch["labels"] = batch["input_ids"]
    rows, metadata = project(model, tools, batch, layers="", include_embeddings=True)
    tools.assert_same(rows, tools.exact_rows(model, metadata, batch), metadata, FP32)


# ---- statistics ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("options", [{}, {"method": "rademacher"}, {"row_orthonormal": True}, {"sketch": 6}], ids=str)
def test_dot_products_are_unbiased(options: dict[str, Any]) -> None:
    """E over seeds of <P a, P b> = <a, b>, and of |P a|^2 = |a|^2.

    200 independent seeds: the mean lies within 5 of its standard errors (estimated from the same 200 values) but for one case
    in 10^6, heavy tails of these products of Gaussians aside; a missing factor such as sqrt(d/k) is off by far more.
    The standard error must also be small enough for the test to say something.
    """
    model = nn.Sequential(nn.Linear(12, 10, bias=False))
    torch.manual_seed(3)
    a, b = torch.randn(2, 10, 12) + 0.5
    dots, norms = [], []
    for seed in range(200):
        p = so.GradientProjector(model, "0", rank_total=16, rank_min=2, seed=seed, **options)
        x, y = p.project("0", torch.stack([a, b]))
        dots.append(x @ y)
        norms.append(x @ x)
    for values, truth in ((torch.stack(dots), (a * b).sum()), (torch.stack(norms), (a * a).sum())):
        error = values.std() / len(values) ** 0.5
        assert error < 0.15 * a.norm() * b.norm()
        assert (values.mean() - truth).abs() < 5 * error


def test_sketch_beats_the_plain_projection_on_rank_one_gradients() -> None:
    """What the second stage is for: at 64 values, the squared norm of a rank-1 gradient is off by less."""
    model = nn.Sequential(nn.Linear(96, 80, bias=False))
    torch.manual_seed(4)
    gradient = torch.outer(torch.randn(80), torch.randn(96))
    errors = {}
    for sketch in (None, 48):
        projected = [
            so.GradientProjector(model, "0", rank_total=64, rank_min=2, seed=s, sketch=sketch).project("0", gradient)
            for s in range(100)
        ]
        norms = torch.stack([row.square().sum() for row in projected]) / gradient.square().sum()
        errors[sketch] = (norms - 1).square().mean().sqrt()
        assert projected[0].shape == (64,)
    assert errors[48] < 0.6 * errors[None]
