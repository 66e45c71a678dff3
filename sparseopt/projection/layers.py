"""Which weights are projected, to which sizes, and what a projection's metadata says.

For a weight used as y = x W^T with the per-sample gradient dW [d_out, d_in] a slice holds ``P_o dW P_i^T``, [k_o, k_i],
row-major, with P_i [k_i, d_in] and P_o [k_o, d_out] of :mod:`sparseopt.projection.matrices`.

    nn.Linear            dW as stored
    transformers Conv1D  stored [d_in, d_out]: dW is the stored gradient's transpose
    nn.Embedding         dW as stored: d_out = rows of the table, d_in = its width, so that a tied head adds to the same slice
    bias                 d_in = k_i = 1, P_i = [[1]]

Everything needed to rebuild the matrices is in the metadata; the model is not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparseopt.masks._names import normalize_name
from sparseopt.projection._weights import Weight, check_usable, find_weights
from sparseopt.projection.matrices import KINDS, SketchPlan, count_sketch, fold, projection_matrix, sketch_plan

__all__ = [
    "SHAPE_RULES",
    "Layer",
    "matrices_of",
    "metadata",
    "project_gradient",
    "select_layers",
    "sketch_of",
]

SHAPE_RULES = ("square", "aspect")
FORMAT, VERSION = "sparseopt.projections", 1

# A pattern's component also matches these components of a path.
_ALIASES = {"attn": ("self_attn", "attention", "self_attention")}
# Modules of one parent that get one input: they share P_i, so that the input is projected once. Where the inputs differ
# after all (cross-attention), every slice is still right.
_SAME_INPUT = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("to_q", "to_k", "to_v"),
    ("wq", "wk", "wv"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
)


@dataclass(frozen=True)
class Layer:
    """One projected weight or bias; several modules may use it.

    Attributes:
        name: the parameter's name as ``model.named_parameters()`` has it, without ``.weight``.
        type: "Linear", "Conv1D", "Embedding" or "bias".
        shape: (d_out, d_in).
        original_shape: as stored.
        k_i, k_o: rows of P_i and P_o.
        input_key, output_key: what P_i and P_o are made from, with the seed.
        slice_start, slice_end: the columns of a projection; fewer than k_o * k_i when the two-stage sketch folds them.
        modules: names of the modules that use it.
    """

    name: str
    type: str
    shape: tuple[int, int]
    original_shape: tuple[int, ...]
    k_i: int
    k_o: int
    input_key: str
    output_key: str
    slice_start: int
    slice_end: int
    modules: tuple[str, ...]

    @property
    def folded(self) -> bool:
        """Whether a count sketch folds the k_o * k_i values to the slice."""
        return self.slice_end - self.slice_start < self.k_o * self.k_i


# ---- choosing --------------------------------------------------------------------------------------------------------
def _matches(pattern: Sequence[str], path: Sequence[str]) -> bool:
    """Whether the pattern's components appear consecutively in the path."""

    def same(part: str, component: str) -> bool:
        return part == component or component in _ALIASES.get(part, ())

    width = len(pattern)
    return any(all(map(same, pattern, path[i : i + width])) for i in range(len(path) - width + 1))


def _split(patterns: str | Sequence[str]) -> list[str]:
    pieces = patterns.split(",") if isinstance(patterns, str) else [p for one in patterns for p in one.split(",")]
    return [piece.strip() for piece in pieces if piece.strip()]


def _candidates(names: Sequence[str]) -> str:
    """Names with the numbers of blocks as ``*``, each once, at most twenty."""
    short = dict.fromkeys(".".join("*" if part.isdigit() else part for part in name.split(".")) for name in names)
    shown = list(short)[:20]
    return ", ".join(shown) + (f" and {len(short) - 20} more" if len(short) > 20 else "")


def _chosen(weights: list[Weight], patterns: list[str], include_embeddings: bool) -> list[Weight]:
    names = [name for weight in weights for name in weight.names(embeddings=include_embeddings)]
    if not patterns and not include_embeddings:
        raise ValueError("No layers to project: expected at least one pattern, for example 'mlp,attn'.")
    for pattern in patterns:
        parts = pattern.split(".")
        if any(_matches(parts, name.split(".")) for name in names):
            continue
        embeddings = [name for weight in weights for name in weight.names(embeddings=True)]
        if any(_matches(parts, name.split(".")) for name in embeddings):
            raise ValueError(f"Pattern {pattern!r} matches embeddings only: pass include_embeddings=True.")
        raise ValueError(f"Pattern {pattern!r} matches no layer; this model has {_candidates(names) or 'none'}.")
    chosen = []
    for weight in weights:
        paths = [name.split(".") for name in weight.names(embeddings=include_embeddings)]
        embedding = include_embeddings and any(kind == "Embedding" for _, kind, _ in weight.modules)
        if embedding or any(_matches(pattern.split("."), path) for pattern in patterns for path in paths):
            chosen.append(weight)
    if not chosen:
        raise ValueError("No layers to project: include_embeddings=True, but the model has no embedding.")
    return chosen


# ---- sizes -----------------------------------------------------------------------------------------------------------
def _ranks(shape: tuple[int, int], rank_total: int, rank_min: int, rule: str, sketch: int | None) -> tuple[int, int]:
    """(k_i, k_o) of a weight."""
    d_out, d_in = shape
    if sketch is not None:
        return min(sketch, d_in), min(sketch, d_out)
    if rule == "square":
        k = max(rank_min, math.isqrt(rank_total))
        return min(k, d_in), min(k, d_out)

    # k_i / k_o = d_out / d_in makes d_in k_i + d_out k_o, the cost, smallest for a given product. What the limits of one
    # side take away goes to the other side.
    def clip(k: int, d: int) -> int:
        return min(max(k, rank_min, 1), d)

    k_i = clip(round(math.sqrt(rank_total * d_out / d_in)), d_in)
    k_o = clip(rank_total // k_i, d_out)
    return clip(rank_total // k_o, d_in), k_o


def _input_keys(weights: list[Weight], ranks: list[tuple[int, int]]) -> list[str]:
    """The name that P_i of each weight is made from: that of the first of the layers with the same input.

    Found among all layers of the model: what is selected does not change a layer's matrices.
    """
    first: dict[tuple[str, int, int, int], str] = {}
    keys = []
    for weight, (k_i, _) in zip(weights, ranks, strict=True):
        parent, _, leaf = weight.name.rpartition(".")
        group = next((number for number, names in enumerate(_SAME_INPUT) if leaf in names), None)
        if group is None or weight.kind == "Embedding" or len(weight.modules) > 1:
            keys.append(weight.name)
        else:
            keys.append(first.setdefault((parent, group, weight.shape[1], k_i), weight.name))
    return keys


def _check_numbers(rank_total: int, rank_min: int, shape_rule: str, sketch: int | None) -> None:
    if rank_total < 1 or rank_min < 1:
        raise ValueError(f"rank_total and rank_min must be at least 1, got {rank_total} and {rank_min}.")
    if shape_rule not in SHAPE_RULES:
        raise ValueError(f"Unknown shape rule {shape_rule!r}: expected one of {', '.join(SHAPE_RULES)}.")
    if sketch is not None and sketch * sketch < rank_total:
        raise ValueError(
            f"sketch={sketch} gives {sketch}^2 values, fewer than rank_total={rank_total}: nothing to fold."
        )


def select_layers(
    model: nn.Module,
    patterns: str | Sequence[str],
    *,
    include_embeddings: bool = False,
    include_biases: bool = False,
    rank_total: int = 256,
    rank_min: int = 8,
    shape_rule: str = "square",
    sketch: int | None = None,
) -> list[Layer]:
    """The weights (and biases) to project, in module order.

    A pattern is one or more components of a dotted path that follow one another: ``mlp``, ``mlp.c_fc``, and
    ``transformer.h.1``, which is not ``transformer.h.10``; ``attn`` also means ``self_attn`` and ``attention``. It matches
    Linear and Conv1D layers; ``include_embeddings`` adds every embedding. A weight that several modules share counts when
    one of them is selected, under its first name, with the gradients of all.

    Args:
        model: whose layers.
        patterns: comma-separated, or a sequence.
        include_embeddings: add embeddings (of tokens, of positions).
        include_biases: add the biases of the selected layers, as entries of their own of at most ``rank_total`` values.
        rank_total: values wanted per layer.
        rank_min: the least k_i and k_o (the layer's dimensions permitting).
        shape_rule: "square" (k_i = k_o) or "aspect" (k_i / k_o = d_out / d_in, the cheapest for a given product).
        sketch: K for the two-stage sketch: k_i = k_o = K, folded to ``rank_total`` values by a count sketch.

    Raises:
        ValueError: a pattern that matches nothing, numbers out of range, or a weight that something else uses too.
    """
    _check_numbers(rank_total, rank_min, shape_rule, sketch)
    weights = find_weights(model, include_embeddings=include_embeddings)
    ranks = [_ranks(weight.shape, rank_total, rank_min, shape_rule, sketch) for weight in weights]
    keys = _input_keys(weights, ranks)
    chosen = {id(weight) for weight in _chosen(weights, _split(patterns), include_embeddings)}
    biases = {id(p): normalize_name(name) for name, p in model.named_parameters()}
    layers: list[Layer] = []
    end = 0
    for weight, (k_i, k_o), key in zip(weights, ranks, keys, strict=True):
        if id(weight) not in chosen:
            continue
        check_usable(model, weight)
        modules = tuple(names[0] for _, _, names in weight.modules)
        start, end = end, end + (min(rank_total, k_i * k_o) if sketch is not None else k_i * k_o)
        stored = tuple(weight.parameter.shape)
        layers.append(
            Layer(weight.name, weight.kind, weight.shape, stored, k_i, k_o, key, weight.name, start, end, modules)
        )
        if not include_biases:
            continue
        found: dict[str, list[str]] = {}
        for module, _, names in weight.modules:
            bias = getattr(module, "bias", None)
            if id(bias) in biases:
                found.setdefault(biases[id(bias)], []).append(names[0])
        for name, users in found.items():
            if any(layer.name == name for layer in layers):
                raise ValueError(f"Bias {name!r} cannot be projected: layers with different weights share it.")
            d = weight.shape[0]
            start, end = end, end + min(rank_total, d)
            layers.append(Layer(name, "bias", (d, 1), (d,), 1, end - start, name, name, start, end, tuple(users)))
    return layers


# ---- metadata --------------------------------------------------------------------------------------------------------
def metadata(
    layers: Sequence[Layer],
    *,
    patterns: str | Sequence[str],
    rank_total: int,
    rank_min: int,
    seed: int,
    dtype: str,
    kind: str,
    include_embeddings: bool,
    include_biases: bool,
    shape_rule: str,
    sketch: int | None,
    total_parameters: int,
) -> dict[str, Any]:
    """What a store keeps beside projections: plain JSON values (lists, no tuples), enough to rebuild every matrix."""
    if kind not in KINDS:
        raise ValueError(f"Unknown projection method {kind!r}: expected one of {', '.join(KINDS)}.")
    projected = sum(math.prod(layer.original_shape) for layer in layers)
    return {
        "format": FORMAT,
        "version": VERSION,
        "proj_layers": ",".join(_split(patterns)),
        "proj_rank_total": rank_total,
        "proj_rank_min": rank_min,
        "proj_seed": seed,
        "proj_method": kind,
        "proj_row_orthonormal": kind == "row_orthonormal",
        "proj_dtype": dtype,
        "include_embeddings": include_embeddings,
        "include_biases": include_biases,
        "shape_rule": shape_rule,
        "sketch": sketch,
        "total_proj_dim": layers[-1].slice_end,
        "coverage": {
            "projected_parameters": projected,
            "total_parameters": total_parameters,
            "share": projected / total_parameters,
        },
        "layers": [
            {
                "name": layer.name,
                "type": layer.type,
                "original_shape": list(layer.original_shape),
                "k_i": layer.k_i,
                "k_o": layer.k_o,
                "slice_start": layer.slice_start,
                "slice_end": layer.slice_end,
                "d_in": layer.shape[1],
                "d_out": layer.shape[0],
                "input_key": layer.input_key,
                "output_key": layer.output_key,
            }
            for layer in layers
        ],
    }


def _entry(data: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    for layer in data["layers"]:
        if layer["name"] == name:
            return layer
    raise ValueError(f"No projected layer {name!r}; there are {_candidates([x['name'] for x in data['layers']])}.")


def matrices_of(data: Mapping[str, Any], layer_name: str, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Rebuilds a layer's matrices from metadata alone.

    Returns:
        (P_i [k_i, d_in], P_o [k_o, d_out]), fp32 and scaled; with a two-stage sketch the inner ones, before folding.

    Raises:
        ValueError: no such layer.
    """
    layer = _entry(data, layer_name)
    kind, seed = data["proj_method"], data["proj_seed"]
    if layer["type"] == "bias":
        inner = torch.ones(1, 1, device=device)
    else:
        inner = projection_matrix(kind, layer["k_i"], layer["d_in"], seed, layer["input_key"], "i", device)
    return inner, projection_matrix(kind, layer["k_o"], layer["d_out"], seed, layer["output_key"], "o", device)


def sketch_of(data: Mapping[str, Any], layer_name: str, device: torch.device | str = "cpu") -> SketchPlan | None:
    """The count sketch that folds a layer's k_o * k_i values to its slice (:func:`matrices.fold`); None without one."""
    layer = _entry(data, layer_name)
    size = layer["slice_end"] - layer["slice_start"]
    inner = layer["k_o"] * layer["k_i"]
    if size == inner:
        return None
    bucket, signs = count_sketch(inner, size, data["proj_seed"], layer["output_key"], device)
    return sketch_plan(bucket, signs, size)


def project_gradient(
    data: Mapping[str, Any],
    layer_name: str,
    gradient: Tensor,
    matrices: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Projects an exact gradient to its slice, two-stage sketch included.

    Args:
        data: metadata.
        layer_name: of the layer.
        gradient: [..., *original_shape], laid out as ``parameter.grad`` (a Conv1D's is [d_in, d_out]).
        matrices: (P_i, P_o) where they are at hand; else they are rebuilt.

    Returns:
        fp32 [..., slice_end - slice_start] on the gradient's device.

    Raises:
        ValueError: no such layer, or a gradient of another shape.
    """
    layer = _entry(data, layer_name)
    shape = tuple(layer["original_shape"])
    if tuple(gradient.shape[-len(shape) :]) != shape:
        raise ValueError(f"The gradient of {layer_name!r} must end in shape {shape}, got {tuple(gradient.shape)}.")
    dense = gradient.to(torch.float32)
    if layer["type"] == "bias":
        dense = dense.unsqueeze(-1)
    elif layer["type"] == "Conv1D":
        dense = dense.transpose(-1, -2)
    inner, outer = matrices if matrices is not None else matrices_of(data, layer_name, gradient.device)
    values = (outer.to(dense.device) @ (dense @ inner.to(dense.device).T)).flatten(-2)
    plan = sketch_of(data, layer_name, values.device)
    return values if plan is None else fold(values, plan)
