"""How well a mask meets the ground truth, and how masks agree across steps: numbers, and a picture of them.

Jaccard index: entries active in both over entries active in either. Beside each stands what independent random masks
with the same counts per tensor would give: an index means something above that.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparseopt._files import atomic_path
from sparseopt.masks.maskset import MaskSet
from sparseopt.masks.operations import compare

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

__all__ = ["across_steps", "against", "place", "plot"]

# What a name is made of besides the module that it belongs to.
PARTS = ("weight", "bias", "base_layer", "default")


def against(found: MaskSet, truth: MaskSet) -> dict[str, Any]:
    """A mask beside another of the same parameters.

    Returns:
        ``jaccard``, ``chance_jaccard``, ``overlap`` over all entries; ``mean``, ``min``, ``max`` over parameters;
        ``per_layer``: the same three by parameter name. Parameters with nothing active in both are left out of the latter.
    """
    result = compare(found, truth)
    layers = {
        name: {key: values[key] for key in ("jaccard", "chance_jaccard", "overlap")}
        for name, values in result["per_layer"].items()
        if found.count(name) or truth.count(name)
    }
    return {
        **{key: result[key] for key in ("jaccard", "chance_jaccard", "overlap")},
        **_spread([values["jaccard"] for values in layers.values()]),
        "per_layer": layers,
    }


def across_steps(
    make: Callable[[int], MaskSet], steps: Sequence[int], truth: MaskSet, folder: str | os.PathLike[str]
) -> dict[str, Any]:
    """Masks of one method at several steps, in pairs and beside the ground truth.

    Two masks are in memory at a time; the others wait in ``folder``.

    Args:
        make: step -> mask; a ValueError from it leaves the step out.
        steps: ascending.
        truth: the mask that training ended with.
        folder: for temporary mask files, one a step.

    Returns:
        ``steps``; ``jaccard`` and ``chance_jaccard``: matrices, step by step; ``mean``, ``min``, ``max`` of the pairs of
        different steps; ``ground_truth`` and ``ground_truth_chance``: each step's mask beside ``truth``;
        ``zero_score_share`` by step; ``left_out``: step -> why there is no mask.
    """
    paths: dict[int, Path] = {}
    zeros, hits, hits_by_chance = [], [], []
    left_out: dict[str, str] = {}
    for step in steps:
        try:
            masks = make(step)
        except ValueError as error:
            left_out[str(step)] = str(error)
            continue
        paths[step] = Path(folder) / f"step_{step}.safetensors"
        masks.save(paths[step])
        zeros.append(masks.metadata.get("zero_score_share", 0.0))
        measured = compare(masks, truth)
        hits.append(measured["jaccard"])
        hits_by_chance.append(measured["chance_jaccard"])
        del masks
    size = len(paths)
    matrix = [[1.0] * size for _ in range(size)]
    chance = [[1.0] * size for _ in range(size)]
    for row, left in enumerate(paths.values()):
        masks = MaskSet.load(left)
        for column, right in list(enumerate(paths.values()))[row:]:
            other = masks if row == column else MaskSet.load(right)
            measured = compare(masks, other)
            matrix[row][column] = matrix[column][row] = measured["jaccard"]
            chance[row][column] = chance[column][row] = measured["chance_jaccard"]
    return {
        "steps": list(paths),
        "jaccard": matrix,
        "chance_jaccard": chance,
        **_spread([matrix[row][column] for row in range(size) for column in range(row)]),
        "ground_truth": hits,
        "ground_truth_chance": hits_by_chance,
        "zero_score_share": zeros,
        "left_out": left_out,
    }


def _spread(values: Sequence[float]) -> dict[str, float | None]:
    if not values:
        return {"mean": None, "min": None, "max": None}
    return {"mean": sum(values) / len(values), "min": min(values), "max": max(values)}


def place(name: str) -> tuple[int | None, str]:
    """-> (number of the layer, kind of module) of a parameter: ``model.layers.3.mlp.up_proj.weight`` -> (3, "up_proj")."""
    match = re.search(r"(?:^|\.)(\d+)\.", name)
    layer = int(match[1]) if match else None
    rest = name[match.end() :] if match else name
    parts = [part for part in rest.split(".") if part not in PARTS and not part.isdecimal()]
    kind = parts[-1] if parts else rest
    return layer, f"{kind}.bias" if name.endswith(".bias") else kind


# ---- picture ---------------------------------------------------------------------------------------------------------
def plot(report: Mapping[str, Any], path: str | os.PathLike[str], title: str = "") -> None:
    """Draws a report: the matrix of steps, and the mask beside the ground truth by layer and kind of module.

    Args:
        report: ``ground_truth`` as :func:`against` gives it and, where there is one, ``steps`` as :func:`across_steps`.
        path: PNG file.
        title: of the picture.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    import matplotlib

    with matplotlib.rc_context({"font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left"}):
        figure = _figure(report, title)
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="png", dpi=150)


def _figure(report: Mapping[str, Any], title: str) -> Figure:
    import matplotlib
    from matplotlib.figure import Figure

    truth, steps = report["ground_truth"], report.get("steps") or {"steps": []}
    values, kinds, layers = _grid(truth["per_layer"])
    count = len(steps["steps"])
    left = max(1.6 + 0.52 * count, 4.2) if count else 0.0
    right = 2.6 + max(0.3 * len(layers), 3.0)
    height = 1.9 + max(0.52 * count, 0.3 * len(kinds), 2.2)
    figure = Figure(figsize=(left + right, height), layout="constrained")
    colors = matplotlib.colormaps["viridis"].with_extremes(bad="0.93")
    top = _top(values, steps)
    if count:
        axes = figure.subplots(1, 2, width_ratios=[left, right])
        _draw_steps(axes[0], steps, colors, top)
        _draw_layers(axes[1], truth, values, kinds, layers, colors, top)
    else:
        _draw_layers(figure.subplots(), truth, values, kinds, layers, colors, top)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return figure


def _draw_steps(axes: Axes, steps: Mapping[str, Any], colors: Colormap, top: float) -> None:
    """The matrix, and below it each step's mask beside the ground truth."""
    labels = [str(step) for step in steps["steps"]]
    rows = [*steps["jaccard"], steps["ground_truth"]]
    ticks = [*labels, "ground\ntruth"]
    axes.imshow(rows, vmin=0, vmax=top, cmap=colors, aspect="auto")
    _write_values(axes, rows, top)
    axes.axhline(len(labels) - 0.5, color="white", linewidth=3)
    axes.set_xticks(range(len(labels)), labels)
    axes.set_yticks(range(len(ticks)), ticks)
    axes.set_xlabel("mask found at step")
    axes.set_ylabel("and at step")
    size = range(len(labels))
    apart = [steps["chance_jaccard"][i][j] for i in size for j in range(i)] + list(steps["ground_truth_chance"])
    axes.set_title(f"Across steps (by chance {_range(apart)})")


def _draw_layers(
    axes: Axes,
    truth: Mapping[str, Any],
    values: Sequence[Sequence[float]],
    kinds: Sequence[str],
    layers: Sequence[int | None],
    colors: Colormap,
    top: float,
) -> None:
    image = axes.imshow(values, vmin=0, vmax=top, cmap=colors, aspect="auto")
    if len(layers) <= 16:
        _write_values(axes, values, top)
    every = 1 if len(layers) <= 24 else 4
    shown = [i for i, layer in enumerate(layers) if layer is None or layer % every == 0]
    axes.set_xticks(shown, ["none" if layers[i] is None else str(layers[i]) for i in shown])
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set_xlabel("layer")
    axes.set_title(
        f"Against the ground truth: {truth['jaccard']:.3f} over all entries (by chance {truth['chance_jaccard']:.3f})\n"
        f"parameters: mean {_text(truth['mean'])}, min {_text(truth['min'])}, max {_text(truth['max'])}"
    )
    bar = axes.figure.colorbar(
        image, ax=axes, label="Jaccard index", shrink=0.9, extend="max" if top < 1 else "neither"
    )
    bar.ax.axhline(truth["chance_jaccard"], color="red", linewidth=1.5)
    bar.ax.text(-0.25, truth["chance_jaccard"], "chance", color="red", ha="right", va="center", fontsize=8)


def _grid(per_layer: Mapping[str, Mapping[str, float]]) -> tuple[list[list[float]], list[str], list[int | None]]:
    """-> (rows of kinds, columns of layers; NaN where there is no such parameter), kinds, layers."""
    cells: dict[tuple[str, int | None], list[float]] = {}
    for name, values in per_layer.items():
        layer, kind = place(name)
        cells.setdefault((kind, layer), []).append(values["jaccard"])
    kinds = list(dict.fromkeys(kind for kind, _ in cells))
    numbers = sorted({layer for _, layer in cells if layer is not None})
    layers: list[int | None] = [*([None] if any(layer is None for _, layer in cells) else []), *numbers]
    rows = []
    for kind in kinds:
        found = [cells.get((kind, layer)) for layer in layers]
        rows.append([sum(cell) / len(cell) if cell else float("nan") for cell in found])
    return rows, kinds, layers


def _top(values: Sequence[Sequence[float]], steps: Mapping[str, Any]) -> float:
    """Where the colours end: the largest index of two different masks, rounded up; all that is above looks alike."""
    found = [value for row in values for value in row if value == value]  # no NaN
    if steps["steps"]:
        rows = steps["jaccard"]
        found += [*steps["ground_truth"], *(rows[i][j] for i in range(len(rows)) for j in range(i))]
    return min(1.0, max(0.1, math.ceil(10 * max(found, default=1.0)) / 10))


def _write_values(axes: Axes, rows: Sequence[Sequence[float]], top: float) -> None:
    size = 8 if max(len(rows), len(rows[0]) if rows else 0) <= 12 else 6
    for y, row in enumerate(rows):
        for x, value in enumerate(row):
            if value == value:  # no NaN
                color = "black" if value > 0.6 * top else "white"
                axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=size, color=color)


def _range(values: Sequence[float]) -> str:
    if not values:
        return "unknown"
    low, high = f"{min(values):.3f}", f"{max(values):.3f}"
    return low if low == high else f"{low} to {high}"


def _text(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"
