"""Pictures of masks: how they evolve over steps, where they are active, attention against MLP.

Each picture (PNG or SVG) has its numbers beside it, as JSON under the same name.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparseopt._files import atomic_path, atomic_write
from sparseopt.masks.operations import opened
from sparseopt.masks.statistics import Source, density_by_layer, evolution, shares_by_kind

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["FORMATS", "plot_evolution", "plot_kinds", "plot_layers"]

FORMATS = ("png", "svg")
STYLE: dict[Any, Any] = {"font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left", "axes.spines.top": False,
         "axes.spines.right": False, "legend.frameon": False, "svg.hashsalt": "sparseopt"}  # fmt: skip
COLORS = {"attention": "tab:blue", "mlp": "tab:orange", "embedding": "tab:green", "norm": "tab:purple",
          "other": "tab:gray"}  # fmt: skip
LABELS = {"mlp": "MLP"}
AGAINST = {"previous": ("tab:blue", "previous step"), "first": ("tab:orange", "first step"),
           "last": ("tab:green", "last step")}  # fmt: skip
FAR_APART = 8  # ratio of densities from which their axis is logarithmic
WRITTEN = 40  # layers up to which each cell's number is written into it


def plot_evolution(
    masks_by_step: Mapping[int, Source], path: str | os.PathLike[str], title: str = ""
) -> dict[str, Any]:
    """Draws density and overlap over steps; the overlap that chance gives is dashed.

    Args:
        masks_by_step: step -> MaskSet or mask file, two steps or more.
        path: ``.png`` or ``.svg``; the numbers go beside it, as ``.json``.
        title: of the picture.

    Returns:
        The numbers, see :func:`sparseopt.masks.statistics.evolution`.

    Raises:
        ValueError: another suffix, fewer than two steps, or a parameter that differs.
        ModuleNotFoundError: matplotlib is missing.
    """
    _check(path)
    numbers = evolution(masks_by_step)
    _draw(path, numbers, _evolution_figure, title)
    return numbers


def plot_layers(masks: Source, path: str | os.PathLike[str], title: str = "") -> dict[str, Any]:
    """Draws the density of each projection in each layer as a heat map. Arguments and errors as :func:`plot_evolution`;
    also a ValueError where no parameter belongs to a numbered layer. Returns the numbers, see
    :func:`sparseopt.masks.statistics.density_by_layer`."""
    _check(path)
    numbers = density_by_layer(opened(masks))
    if not numbers["layers"]:
        raise ValueError("no parameter name holds the number of a layer: there is no heat map to draw.")
    _draw(path, numbers, _layers_figure, title)
    return numbers


def plot_kinds(masks_by_step: Mapping[int, Source], path: str | os.PathLike[str], title: str = "") -> dict[str, Any]:
    """Draws which kinds of modules the active entries are in, attention against MLP above all, and how dense each kind is.
    Arguments and errors as :func:`plot_evolution`, from one step on. Returns the numbers, see
    :func:`sparseopt.masks.statistics.shares_by_kind`."""
    _check(path)
    numbers = shares_by_kind(masks_by_step)
    _draw(path, numbers, _kinds_figure, title)
    return numbers


def _check(path: str | os.PathLike[str]) -> None:
    if Path(path).suffix.removeprefix(".") not in FORMATS:
        raise ValueError(f"a picture's name ends in .png or .svg, got '{os.fspath(path)}'.")
    import matplotlib  # noqa: F401 - missing: say so before the work


def _draw(
    path: str | os.PathLike[str], numbers: Mapping[str, Any], make: Callable[[Mapping[str, Any]], Figure], title: str
) -> None:
    import matplotlib

    target = Path(path)
    kind = target.suffix.removeprefix(".")
    with matplotlib.rc_context(STYLE):
        figure = make(numbers)
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        with atomic_path(target) as temporary:
            figure.savefig(temporary, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    atomic_write(target.with_suffix(".json"), json.dumps(numbers, indent=1, allow_nan=False) + "\n")


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _percent(axis: Any) -> None:
    axis.set_major_formatter(lambda value, _: f"{100 * value:.4g}%")


def _steps_axis(axes: Axes, steps: Sequence[int]) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("training step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    apart = min((b - a for a, b in itertools.pairwise(steps)), default=1)
    if 18 * apart >= steps[-1] - steps[0]:  # labels of the steps themselves have room
        axes.set_xticks(steps)


def _evolution_figure(numbers: Mapping[str, Any]) -> Figure:
    figure = _figure(10.5, 3.9)
    left, right = figure.subplots(1, 2)
    steps, total = numbers["steps"], numbers["total_parameters"]
    left.plot(steps, numbers["density"], "o-", color="tab:blue", markersize=4)
    left.set(title=f"Active share of {total:,} entries", ylabel="density")
    left.set_ylim(0, 1.15 * max(numbers["density"]) or 1.0)
    _percent(left.yaxis)
    left.grid(axis="y", color="0.9")
    _steps_axis(left, steps)
    for key, (color, label) in AGAINST.items():
        for measure, style, alpha in (("jaccard", "o-", 1.0), ("chance_jaccard", "--", 0.7)):
            # A step beside itself says nothing.
            itself = {"first": 0, "last": len(steps) - 1}.get(key)
            points = [
                (step, value)
                for i, (step, value) in enumerate(zip(steps, numbers[key][measure], strict=True))
                if value is not None and i != itself
            ]
            right.plot(*zip(*points, strict=True), style, color=color, alpha=alpha, markersize=4,
                       label=f"with the {label}" if measure == "jaccard" else "_by chance")  # fmt: skip
    right.plot([], [], "--", color="0.4", label="by chance, in its color")
    right.set(title="Overlap of masks", ylabel="Jaccard index", ylim=(0, 1.02))
    right.grid(axis="y", color="0.9")
    _steps_axis(right, steps)
    right.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def _layers_figure(numbers: Mapping[str, Any]) -> Figure:
    import matplotlib

    names, at, top = numbers["projections"], numbers["layers"], numbers["scale"]
    rows, columns = len(names), len(at)
    width, height = max(0.34 * columns, 3.0), max(0.32 * rows, 1.2)
    figure = _figure(width + 4.2, height + 2.3)
    grid = figure.subplots(2, 2, width_ratios=[width, 1.6], height_ratios=[0.9, height], squeeze=False)
    above, nothing, cells, beside = grid[0][0], grid[0][1], grid[1][0], grid[1][1]
    nothing.axis("off")
    values = [[float("nan") if value is None else value for value in row] for row in numbers["cells"]]
    colors = matplotlib.colormaps["viridis"].with_extremes(bad="0.93")
    image = cells.imshow(values, vmin=0, vmax=top, cmap=colors, aspect="auto")
    if columns <= WRITTEN:
        _write(cells, values, top)
    every = next(n for n in (1, 2, 4, 8, 16, 32, 64, 128, 256, columns) if columns / n <= 40)
    cells.set_xticks(range(0, columns, every), [str(layer) for layer in at[::every]])
    cells.set_yticks(range(rows), names)
    cells.set_xlabel("layer (numbers: density in %)" if columns <= WRITTEN else "layer")
    for side in ("left", "bottom"):
        cells.spines[side].set_visible(False)
    highest = max(max(row) if (row := [v for v in r if v is not None]) else 0.0 for r in numbers["cells"])
    bar = figure.colorbar(image, ax=grid[:, 1], label="density", extend="max" if highest > top else "neither", pad=0.02)
    _percent(bar.ax.yaxis)
    above.bar(range(columns), numbers["by_layer"], color="0.75")
    above.set(xlim=(-0.5, columns - 0.5), xticks=[], ylabel="of layer")
    _percent(above.yaxis)
    beside.barh(range(rows), [min(value, top) for value in numbers["by_projection"]], color="0.75")
    for y, value in enumerate(numbers["by_projection"]):
        beside.text(0.03 * top, y, f"{value:.2%}", va="center", fontsize=8)
    beside.set(ylim=(rows - 0.5, -0.5), yticks=[], xlabel="of projection", xlim=(0, top))
    _percent(beside.xaxis)
    for axis, line in ((above, above.axhline), (beside, beside.axvline)):
        line(numbers["density"], color="tab:red", linewidth=1, linestyle="--")
        axis.tick_params(labelsize=8)
    outside = ", ".join(f"{name} {value:.3%}" for name, value in numbers["outside"].items())
    above.set_title(
        f"Density by layer and projection: {numbers['density']:.3%} over all (dashed)"
        + (f"\noutside layers: {outside}" if outside else "")
    )
    return figure


def _write(axes: Axes, rows: Sequence[Sequence[float]], top: float) -> None:
    for y, row in enumerate(rows):
        for x, value in enumerate(row):
            if value == value:  # no NaN
                color = "black" if value > 0.6 * top else "white"
                axes.text(x, y, _short(100 * value), ha="center", va="center", fontsize=6.5, color=color)


def _short(percent: float) -> str:
    """At most four characters: 41, 2.5, .31, <.01, 0."""
    if not percent:
        return "0"
    if percent < 0.005:
        return "<.01"
    if percent < 0.995:
        return f"{percent:.2f}"[1:]
    return f"{percent:.1f}" if percent < 9.95 else f"{percent:.0f}"


def _kinds_figure(numbers: Mapping[str, Any]) -> Figure:
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = _figure(10.5, 3.9)
    left, right = figure.subplots(1, 2)
    steps, found = numbers["steps"], numbers["kinds"]
    if len(steps) == 1:
        _kinds_bars(left, right, found)
    else:
        for kind, values in found.items():
            label, color = LABELS.get(kind, kind), COLORS[kind]
            left.plot(steps, values["share_of_active"], "o-", color=color, label=label, markersize=4)
            left.axhline(values["share_of_entries"], color=color, linestyle="--", linewidth=1, alpha=0.7)
            right.plot(steps, values["density"], "o-", color=color, markersize=4)
        left.plot([], [], "--", color="0.4", label="share of all entries\n(what chance gives)")
        for axes in (left, right):
            _steps_axis(axes, steps)
            axes.grid(axis="y", color="0.9")
        left.set(ylabel="share of active entries", ylim=(0, 1))
        right.set(ylabel="density", ylim=(0, None))
        some = [value for values in found.values() for value in values["density"] if value]
        if some and max(some) > FAR_APART * min(some):  # norms beside matrices
            right.set(ylabel="density (log; 0 is not shown)", ylim=(0.6 * min(some), min(1.1, 1.7 * max(some))))
            right.set_yscale("log")
            right.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            right.yaxis.set_minor_formatter(NullFormatter())
        for axes in (left, right):
            _percent(axes.yaxis)
        figure.legend(*left.get_legend_handles_labels(), loc="outside right upper")
    left.set_title("Where the active entries are")
    right.set_title("Active share of each kind of module")
    return figure


def _kinds_bars(left: Axes, right: Axes, found: Mapping[str, Any]) -> None:
    names = [LABELS.get(kind, kind) for kind in found]
    rows = range(len(names))
    for axes, key, label in ((left, "share_of_active", "share of active entries"), (right, "density", "density")):
        values = [value[key][0] for value in found.values()]
        # Numbers stand to the right of both the bar and the mark of chance.
        ends = [max(value[key][0], value["share_of_entries"] if axes is left else 0.0) for value in found.values()]
        limit = 1.25 * max(*ends, 1e-9)
        axes.barh(rows, values, color=[COLORS[kind] for kind in found], height=0.6)
        for y, (end, value) in enumerate(zip(ends, values, strict=True)):
            axes.text(end + 0.02 * limit, y, f"{value:.2%}", va="center", fontsize=8)
        axes.set(yticks=rows, yticklabels=names, xlabel=label, xlim=(0, limit))
        axes.invert_yaxis()
        _percent(axes.xaxis)
    shares = [value["share_of_entries"] for value in found.values()]
    left.vlines(shares, [r - 0.4 for r in rows], [r + 0.4 for r in rows], color="black", linestyle="--",
                label="share of all entries (what chance gives)")  # fmt: skip
    left.legend(loc="lower right", fontsize=8)
