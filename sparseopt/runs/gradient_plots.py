"""Pictures of what :func:`sparseopt.runs.gradients.analyse` finds; each is one PNG."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparseopt._files import atomic_path
from sparseopt.masks.plot import STYLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["PICTURES", "draw"]

WRITTEN = 120  # cells up to which each one's number is written into it
NAN = float("nan")


def draw(found: Mapping[str, Any], folder: Path, title: str = "") -> list[Path]:
    """Draws every picture that has something to show, and returns their paths.

    Args:
        found: what :func:`sparseopt.runs.gradients.analyse` returns.
        folder: where ``norms.png``, ``directions.png``, ``variance.png``, ``correlation.png`` go.
        title: of each.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    import matplotlib

    paths = []
    with matplotlib.rc_context(STYLE):
        for name, make in PICTURES.items():
            figure = make(found)
            if figure is None:
                continue
            if title:
                figure.suptitle(title, x=0.01, ha="left", fontsize=11)
            path = folder / f"{name}.png"
            with atomic_path(path) as temporary:
                figure.savefig(temporary, format="png", dpi=130)
            paths.append(path)
    return paths


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _height(rows: int) -> float:
    return 1.9 + 0.24 * min(max(rows, 6), 60)


def _number(value: float | None) -> float:
    """For drawing: what is not there, or not finite, is a gap."""
    return value if value is not None and math.isfinite(value) else NAN


def _heat(
    figure: Figure, axes: Axes, rows: Sequence[str], steps: Sequence[int], cells: Sequence[Sequence[float | None]],
    label: str, *, log: bool = False, around_zero: bool = False, cross: Sequence[tuple[int, int]] = (),
) -> None:  # fmt: skip
    """A map of rows by steps; ``cross`` marks cells (row, column)."""
    import matplotlib
    from matplotlib.colors import LogNorm, Normalize

    values = [[_number(value) for value in row] for row in cells]
    there = [value for row in values for value in row if value == value and (value > 0 or not log)]
    if around_zero:  # of cosines
        scale: Normalize = Normalize(-1, 1)
    elif log:
        low, high = (min(there), max(there)) if there else (1.0, 1.0)
        scale = LogNorm(low, high if high > low else 2 * low)
    else:
        scale = Normalize(0, max(there, default=1.0) or 1.0)
    colors = matplotlib.colormaps["RdBu_r" if around_zero else "viridis"].with_extremes(bad="0.9", under="0.9")
    image = axes.imshow(values, cmap=colors, norm=scale, aspect="auto")
    every = -(-len(rows) // 40)
    axes.set_yticks(range(0, len(rows), every), list(rows)[::every])
    every = -(-len(steps) // 12)
    axes.set_xticks(range(0, len(steps), every), [str(step) for step in steps[::every]])
    axes.set_xlabel("checkpoint (training step)")
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    if len(rows) * len(steps) <= WRITTEN:
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                if value == value:
                    red, green, blue, _ = colors(scale(value))
                    dark = 0.3 * red + 0.6 * green + 0.1 * blue < 0.5
                    axes.text(x, y, _short(value), ha="center", va="center", fontsize=7, color="w" if dark else "k")
    for y, x in cross:
        axes.plot(x, y, "x", color="red", markersize=14, markeredgewidth=2)
    figure.colorbar(image, ax=axes, label=label, pad=0.02)


def _short(value: float) -> str:
    return f"{value:.2g}" if 0.01 <= abs(value) < 1000 or value == 0 else f"{value:.1e}".replace("e-0", "e-")


def _norms(found: Mapping[str, Any]) -> Figure:
    steps, labels, checkpoints = found["steps"], found["layers"], found["checkpoints"]
    figure = _figure(11.5, _height(len(labels)))
    left, right = figure.subplots(1, 2, width_ratios=[1.15, 1])
    flagged = {(f["layer"], f["step"]) for f in found["flags"] if f["layer"] != "all"}
    _heat(
        figure, left, labels, steps, [[c["layers"][label]["rms"] for c in checkpoints] for label in labels],
        "rms of the layer's gradient", log=True,
        cross=[(labels.index(layer), steps.index(step)) for layer, step in flagged],
    )  # fmt: skip
    limits = found["thresholds"]
    left.set_title(
        f"Gradient by layer (red cross: under {limits['vanishing_below']:g} or over {limits['exploding_above']:g} "
        "times the median layer's, or not finite)",
        fontsize=8,
    )
    left.set_ylabel("layer")
    right.plot(steps, [_number(c["total_norm"]) for c in checkpoints], "o-", color="black", markersize=4, label="all")
    import matplotlib

    colors = matplotlib.colormaps["viridis"]
    for position, label in enumerate(labels):
        values = [_number(c["layers"][label]["norm"]) for c in checkpoints]
        color = colors(position / max(len(labels) - 1, 1))
        right.plot(steps, values, ".-", color=color, linewidth=1, label=label if len(labels) <= 16 else None)
    right.set(
        title="Norms over training (layers from dark to light)", xlabel="training step", ylabel="norm of gradient"
    )
    if any(c["total_norm"] > 0 for c in checkpoints):
        right.set_yscale("log")
    else:
        right.set_yticks([])  # an axis without a point has no numbers
    right.grid(axis="y", color="0.9")
    _loss_axis(right, found)
    right.legend(fontsize=7, ncols=2, loc="upper left", bbox_to_anchor=(1.22, 1.0))
    return figure


def _loss_axis(axes: Axes, found: Mapping[str, Any]) -> None:
    """The validation loss on an axis of its own."""
    points = [(c["step"], _number(c["eval_loss"])) for c in found["checkpoints"]]
    if not any(value == value for _, value in points):
        return
    other = axes.twinx()
    other.plot(*zip(*points, strict=True), "s--", color="tab:red", markersize=4)
    other.set_ylabel("validation loss (dashed)", color="tab:red")
    other.tick_params(axis="y", colors="tab:red")


def _directions(found: Mapping[str, Any]) -> Figure | None:
    checkpoints, labels, steps = found["checkpoints"], found["layers"], found["steps"]
    pairs = list(dict.fromkeys(tuple(pair["layers"]) for c in checkpoints for pair in c["next"]))
    many = len(steps) > 1
    if not pairs and not many:
        return None
    figure = _figure(11.5, _height(max(len(labels), len(pairs))))
    axes = list(figure.subplots(1, 2 if pairs and many else 1, squeeze=False)[0])
    if pairs:
        cosines = [{tuple(pair["layers"]): pair["cosine"] for pair in c["next"]} for c in checkpoints]
        _heat(figure, axes[0], [f"{a} and {b}" for a, b in pairs], steps, [[c.get(p) for c in cosines] for p in pairs],
              "cosine", around_zero=True)  # fmt: skip
        axes[0].set_title("Neighbouring layers: cosine over parameters of one name and shape")
    if many:
        rows = ["all", *labels]
        cells = [[(c["previous"] or {}).get(label) for c in checkpoints[1:]] for label in rows]
        _heat(figure, axes[-1], rows, steps[1:], cells, "cosine", around_zero=True)
        axes[-1].set_title("The same layer: cosine with the previous checkpoint")
    return figure


def _variance(found: Mapping[str, Any]) -> Figure | None:
    measured = [c for c in found["checkpoints"] if c["variance"]]
    if not measured:
        return None
    labels, steps = found["layers"], [c["step"] for c in measured]
    figure = _figure(11.5, _height(len(labels) + 1))
    left, right = figure.subplots(1, 2, width_ratios=[1.15, 1])
    rows = ["all", *labels]
    cells = [
        [(c["variance"]["all"] if row == "all" else c["variance"]["layers"][row])["noise"] for c in measured]
        for row in rows
    ]
    _heat(figure, left, rows, steps, cells, "noise")
    batches = sorted({c["variance"]["batches"] for c in measured})
    left.set_title(f"Noise of a micro-batch: standard deviation / norm of the mean, over {batches[-1]} micro-batches")
    left.set_ylabel("layer")
    whole = [c["variance"]["all"] for c in measured]
    scales = [_number(value["noise_scale"]) for value in whole]
    right.plot(steps, scales, "o-", markersize=4)
    right.set(title="Noise scale: the batch at which noise equals signal\n(no point: no signal seen in so few micro-batches)",
              xlabel="training step", ylabel="micro-batches")  # fmt: skip
    if any(value == value for value in scales):
        right.set_yscale("log")
    right.grid(axis="y", color="0.9")
    _loss_axis(right, found)
    return figure


def _correlation(found: Mapping[str, Any]) -> Figure | None:
    known = [entry for entry in found["correlations"] if entry["spearman"] is not None]
    if not known:
        return None
    figure = _figure(8.5, 1.2 + 0.26 * len(known))
    axes = figure.subplots()
    rows = range(len(known))
    axes.barh(rows, [entry["spearman"] for entry in known], height=0.7, color="tab:blue", label="Spearman (ranks)")
    axes.plot(
        [_number(entry["pearson"]) for entry in known], rows, "D", color="tab:orange", markersize=5, label="Pearson"
    )
    axes.set_yticks(rows, [f"{entry['statistic']} ({entry['points']})" for entry in known])
    axes.set(xlim=(-1.02, 1.02), xlabel="correlation with the validation loss (in parentheses: checkpoints)")
    axes.axvline(0, color="0.4", linewidth=1)
    axes.invert_yaxis()
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8)
    axes.set_title("What goes with the validation loss\n(both change with time: few checkpoints prove nothing)")
    return figure


PICTURES: dict[str, Callable[[Mapping[str, Any]], Figure | None]] = {
    "norms": _norms, "directions": _directions, "variance": _variance, "correlation": _correlation,
}  # fmt: skip
