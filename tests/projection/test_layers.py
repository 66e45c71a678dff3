"""Which layers a pattern selects, their sizes and slices, and what the metadata holds."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

import sparseopt as so
from sparseopt.projection.layers import matrices_of, metadata, project_gradient, select_layers


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.ModuleDict({"query": nn.Linear(8, 8), "key": nn.Linear(8, 8), "value": nn.Linear(8, 4)})
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(8, 16), "c_proj": nn.Linear(16, 8)})
        self.mlp_norm = nn.LayerNorm(8)


class Model(nn.Module):
    """Twelve blocks, so that names with h.10 and h.11 exist."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.h = nn.ModuleList(Block() for _ in range(12))
        self.head = nn.Linear(8, 20, bias=False)


def names(model: nn.Module, patterns: Any, **options: Any) -> list[str]:
    return [layer.name for layer in select_layers(model, patterns, rank_total=16, rank_min=2, **options)]


# ---- patterns --------------------------------------------------------------------------------------------------------
def test_whole_components_only() -> None:
    model = Model()
    assert names(model, "h.1.mlp") == ["h.1.mlp.c_fc", "h.1.mlp.c_proj"]
    assert all(name.startswith("h.1.") for name in names(model, "h.1"))
    assert len(names(model, "h.1")) == 5
    assert names(model, "mlp.c_fc") == [f"h.{i}.mlp.c_fc" for i in range(12)]  # in module order: 2 before 10
    assert names(model, ["c_fc", "head"]) == [f"h.{i}.mlp.c_fc" for i in range(12)] + ["head"]
    assert names(model, " h.2.mlp , h.10.mlp,") == [f"h.{i}.mlp.{n}" for i in (2, 10) for n in ("c_fc", "c_proj")]


def test_attn_means_every_spelling(tools: Any) -> None:
    assert names(Model(), "attn") == [f"h.{i}.attention.{n}" for i in range(12) for n in ("query", "key", "value")]
    assert names(tools.tiny_gpt2(), "attn")[:2] == ["transformer.h.0.attn.c_attn", "transformer.h.0.attn.c_proj"]
    assert len(names(tools.tiny_gpt2(layers=12), "transformer.h.1")) == 4
    assert names(tools.tiny_llama(layers=1), "attn") == [f"model.layers.0.self_attn.{n}_proj" for n in "qkvo"]
    assert names(tools.tiny_llama(layers=1), "mlp")[0] == "model.layers.0.mlp.gate_proj"


@pytest.mark.parametrize("pattern", ["ml", "h.12", "mlp.query", "c_fc.mlp", "mlp_norm", "h.1.attn.query.x"])
def test_unmatched_pattern_lists_what_there_is(pattern: str) -> None:
    with pytest.raises(ValueError) as caught:
        names(Model(), f"head,{pattern}")
    message = str(caught.value)
    assert message.startswith(f"Pattern {pattern!r} matches no layer; this model has h.*.attention.query, ")
    assert "h.*.mlp.c_fc" in message
    assert "h.1." not in message.partition("; this model has ")[2]


def test_embeddings_are_a_choice_of_their_own() -> None:
    model = Model()
    assert names(model, "head", include_embeddings=True) == ["embed", "head"]
    assert names(model, "", include_embeddings=True) == ["embed"]
    assert names(model, "embed", include_embeddings=True) == ["embed"]
    with pytest.raises(ValueError, match="'embed' matches embeddings only: pass include_embeddings=True"):
        names(model, "embed")
    with pytest.raises(ValueError, match="expected at least one pattern"):
        names(model, " , ")
    with pytest.raises(ValueError, match="the model has no embedding"):
        names(nn.Sequential(nn.Linear(3, 3)), "", include_embeddings=True)


def test_tied_weights_are_one_entry_under_the_first_name() -> None:
    model = Model()
    model.head.weight = model.embed.weight
    for options in ({"patterns": "head"}, {"patterns": "head", "include_embeddings": True}):
        (layer,) = select_layers(model, **options)  # type: ignore[arg-type]
        assert (layer.name, layer.type, layer.modules) == ("embed", "Embedding", ("embed", "head"))
        assert layer.shape == (20, 8)
    assert "embed" not in names(model, "mlp")


def test_names_do_not_show_wrappers() -> None:
    model = Model()
    compiled = torch.compile(model)
    assert names(compiled, "h.3.mlp") == names(model, "h.3.mlp")  # type: ignore[arg-type]
    model.h[3] = torch.compile(model.h[3])  # type: ignore[call-overload]
    assert names(model, "h.3.mlp") == ["h.3.mlp.c_fc", "h.3.mlp.c_proj"]


def test_what_would_lose_a_term_is_refused() -> None:
    class Scaled(nn.Embedding):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) * 2

    model = Model()
    model.embed = Scaled(20, 8)
    assert names(model, "head") == ["head"]
    with pytest.raises(ValueError, match=r"Embedding 'embed' \(Scaled\) cannot be projected"):
        names(model, "head", include_embeddings=True)
    model.head.weight = model.embed.weight
    with pytest.raises(ValueError, match=r"its weight is also used by 'embed' \(Scaled\)"):
        names(model, "head")
    model = Model()
    model.embed.max_norm = 1.0
    with pytest.raises(ValueError, match="max_norm"):
        names(model, "", include_embeddings=True)


# ---- sizes -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("rank_total", "rank_min", "d_in", "d_out", "k_i", "k_o"),
    [
        (256, 8, 768, 3072, 16, 16),
        (200, 8, 768, 3072, 14, 14),
        (16, 8, 768, 768, 8, 8),
        (256, 8, 5, 768, 5, 16),
        (256, 8, 3, 2, 3, 2),
    ],
)
def test_square_rule(rank_total: int, rank_min: int, d_in: int, d_out: int, k_i: int, k_o: int) -> None:
    model = nn.Sequential(nn.Linear(d_in, d_out))
    (layer,) = select_layers(model, "0", rank_total=rank_total, rank_min=rank_min)
    assert (layer.k_i, layer.k_o) == (k_i, k_o)
    assert (layer.slice_start, layer.slice_end) == (0, k_i * k_o)


@pytest.mark.parametrize(
    ("rank_total", "rank_min", "d_in", "d_out", "k_i", "k_o"),
    [
        (256, 4, 768, 3072, 32, 8),  # k_i / k_o = d_out / d_in
        (256, 4, 3072, 768, 8, 32),
        (256, 4, 768, 768, 16, 16),
        (256, 8, 768, 50257, 32, 8),  # the limit on k_o gives back to k_i
        (256, 8, 50257, 768, 8, 32),
        (256, 8, 4, 3072, 4, 64),
    ],
)
def test_aspect_rule(rank_total: int, rank_min: int, d_in: int, d_out: int, k_i: int, k_o: int) -> None:
    model = nn.Sequential(nn.Linear(d_in, d_out))
    (layer,) = select_layers(model, "0", rank_total=rank_total, rank_min=rank_min, shape_rule="aspect")
    assert (layer.k_i, layer.k_o) == (k_i, k_o)


def test_sketch_folds_to_rank_total() -> None:
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 2))
    first, bias, second, second_bias = select_layers(model, "0,1", rank_total=64, sketch=20, include_biases=True)
    assert (first.k_i, first.k_o, first.slice_end - first.slice_start, first.folded) == (20, 20, 64, True)
    assert (second.k_i, second.k_o, second.slice_end - second.slice_start, second.folded) == (20, 2, 40, False)
    assert [(b.name, b.k_i, b.k_o, b.folded) for b in (bias, second_bias)] == [
        ("0.bias", 1, 30, False),
        ("1.bias", 1, 2, False),
    ]


def test_slices_follow_one_another(tools: Any) -> None:
    for model in (tools.tiny_gpt2(), tools.tiny_llama()):
        for sketch in (None, 12):
            layers = select_layers(
                model, "mlp,attn", include_embeddings=True, include_biases=True, rank_total=100, sketch=sketch
            )
            assert layers[0].slice_start == 0
            for one, other in pairwise(layers):
                assert one.slice_end == other.slice_start


def test_numbers_are_checked() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    for options, message in (
        ({"rank_total": 0}, "at least 1, got 0 and 8"),
        ({"rank_min": 0}, "at least 1, got 256 and 0"),
        ({"shape_rule": "round"}, "Unknown shape rule 'round'"),
        ({"sketch": 10}, "sketch=10 gives 10\\^2 values, fewer than rank_total=256"),
    ):
        with pytest.raises(ValueError, match=message):
            select_layers(model, "0", **options)  # type: ignore[arg-type]


# ---- shared inputs ---------------------------------------------------------------------------------------------------
def test_layers_with_one_input_share_its_matrix(tools: Any) -> None:
    p = so.GradientProjector(tools.tiny_llama(layers=1), "mlp,attn", rank_total=16)
    keys = {layer.name.rsplit(".", 1)[1]: layer.input_key.rsplit(".", 1)[1] for layer in p.layers}
    assert keys == {
        "q_proj": "q_proj", "k_proj": "q_proj", "v_proj": "q_proj", "o_proj": "o_proj",
        "gate_proj": "gate_proj", "up_proj": "gate_proj", "down_proj": "down_proj",
    }  # fmt: skip
    q, k = (p.projection_matrices(f"model.layers.0.self_attn.{n}_proj") for n in "qk")
    assert torch.equal(q[0], k[0])
    assert not torch.equal(q[1][:, :8], k[1][:, :8])


def test_a_layers_matrices_do_not_depend_on_what_else_is_selected(tools: Any) -> None:
    model = tools.tiny_llama(layers=1)
    alone = so.GradientProjector(model, "v_proj")
    among = so.GradientProjector(model, "mlp,attn")
    name = "model.layers.0.self_attn.v_proj"
    for one, other in zip(alone.projection_matrices(name), among.projection_matrices(name), strict=True):
        assert torch.equal(one, other)


def test_inputs_projected_to_different_sizes_share_nothing(tools: Any) -> None:
    layers = select_layers(tools.tiny_llama(layers=1), "attn", rank_total=64, rank_min=2, shape_rule="aspect")
    q, k, v, _ = layers  # keys and values have half the rows
    assert q.k_i != k.k_i
    assert (q.input_key, k.input_key, v.input_key) == (q.name, k.name, k.name)


# ---- metadata --------------------------------------------------------------------------------------------------------
def test_metadata_is_json_and_rebuilds_everything(tools: Any) -> None:
    model = tools.tiny_gpt2()
    p = so.GradientProjector(
        model, rank_total=36, rank_min=2, seed=9, include_embeddings=True, include_biases=True, sketch=8
    )
    data = json.loads(json.dumps(p.metadata))
    assert data == p.metadata
    seeds = {"proj_rank_total": 36, "proj_seed": 9, "proj_method": "gaussian", "total_proj_dim": p.total_dim}
    assert seeds.items() <= data.items()
    assert data["total_proj_dim"] == data["layers"][-1]["slice_end"]
    required = {"name", "type", "original_shape", "k_i", "k_o", "slice_start", "slice_end", "d_in", "d_out"}
    parameters = dict(model.named_parameters())
    for layer in data["layers"]:
        assert required <= layer.keys()
        parameter = parameters.get(layer["name"] + ".weight", parameters.get(layer["name"]))
        assert list(parameter.shape) == layer["original_shape"]
        inner, outer = matrices_of(data, layer["name"])
        assert (inner.shape, outer.shape) == ((layer["k_i"], layer["d_in"]), (layer["k_o"], layer["d_out"]))
        for one, other in zip((inner, outer), p.projection_matrices(layer["name"]), strict=True):
            assert torch.equal(one, other)
        gradient = torch.randn(2, *layer["original_shape"])
        assert project_gradient(data, layer["name"], gradient).shape == (2, layer["slice_end"] - layer["slice_start"])
        assert torch.equal(project_gradient(data, layer["name"], gradient), p.project(layer["name"], gradient))


def test_changing_the_metadata_one_gets_changes_nothing(tools: Any) -> None:
    p = so.GradientProjector(tools.tiny_gpt2())
    p.metadata["layers"].clear()
    assert len(p.metadata["layers"]) == 8


def test_coverage(tools: Any) -> None:
    model = tools.tiny_gpt2()
    total = sum(parameter.numel() for parameter in model.parameters())
    p = so.GradientProjector(model, "mlp")
    weights = 2 * (32 * 128 * 2)
    assert p.metadata["coverage"] == {
        "projected_parameters": weights,
        "total_parameters": total,
        "share": weights / total,
    }
    assert p.coverage == weights / total
    assert p.summary() == (
        f"Projecting 4 layers with {weights:,} of {total:,} parameters ({weights / total:.1%}) to 1,024 values per sample."
    )
    everything = so.GradientProjector(model, "mlp,attn", include_embeddings=True, include_biases=True)
    norms = sum(p.numel() for n, p in model.named_parameters() if ".ln_" in n)
    assert everything.metadata["coverage"]["projected_parameters"] == total - norms


def test_unknown_method() -> None:
    layers = select_layers(nn.Sequential(nn.Linear(4, 4)), "0")
    with pytest.raises(ValueError, match="Unknown projection method 'hadamard'"):
        metadata(
            layers, patterns="0", rank_total=4, rank_min=1, seed=0, dtype="float32", kind="hadamard",
            include_embeddings=False, include_biases=False, shape_rule="square", sketch=None, total_parameters=20,
        )  # fmt: skip
