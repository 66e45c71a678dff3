"""The pictures of the error analysis, PDF."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparseopt._files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw"]

STYLE: dict[Any, Any] = {"font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left", "axes.spines.top": False,
         "axes.spines.right": False, "legend.frameon": False, "pdf.fonttype": 42}  # fmt: skip
RMSE, RELATIVE = "tab:blue", "tab:green"


def draw(result: Mapping[str, Any], target: Path, stem: str) -> list[str]:
    """Draws the three pictures; returns their paths."""
    import matplotlib

    figures: dict[str, Callable[[Mapping[str, Any]], Figure]] = {
        "rmse_vs_dimension": _rmse_figure,
        "relative_error_vs_dimension": _relative_figure,
        "error_analysis_loglog": _loglog_figure,
    }
    paths = []
    for name, make in figures.items():
        path = target / f"{stem}__{name}.pdf"
        with matplotlib.rc_context(STYLE), atomic_path(path) as temporary:
            make(result).savefig(temporary, format="pdf", metadata={"CreationDate": None})
        paths.append(str(path))
    return paths


def _figure(width: float, result: Mapping[str, Any]) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    text = f"{result['num_ref_samples']} reference samples, each with {result['num_test_samples']} others; "
    figure.suptitle(f"Dot products of gradients: {text}reference {result['reference']}", x=0.01, ha="left", fontsize=9)
    return figure


def _ranks_axis(axes: Axes, result: Mapping[str, Any]) -> None:
    from matplotlib.ticker import NullLocator

    axes.set_xscale("log", base=2)
    axes.set_xticks(result["ranks"], [str(rank) for rank in result["ranks"]])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("projection dimension (rank_total of a layer)")
    axes.grid(color="0.9")


def _rmse(axes: Axes, result: Mapping[str, Any]) -> None:
    axes.errorbar(result["ranks"], result["rmse_values"], yerr=result["rmse_std"], fmt="o-", color=RMSE, markersize=5,
                  capsize=3, label="mean; bars: standard deviation over reference samples")  # fmt: skip
    axes.set_ylabel("RMSE of dot products")
    _ranks_axis(axes, result)


def _relative(axes: Axes, result: Mapping[str, Any]) -> None:
    axes.plot(result["ranks"], result["relative_errors_percent"], "s-", color=RELATIVE, markersize=5)
    axes.set_ylabel("RMSE / RMS of the reference (%)")
    _ranks_axis(axes, result)


def _rmse_figure(result: Mapping[str, Any]) -> Figure:
    figure = _figure(6.4, result)
    axes = figure.subplots()
    _rmse(axes, result)
    axes.set_ylim(bottom=0)
    axes.legend()
    return figure


def _relative_figure(result: Mapping[str, Any]) -> Figure:
    figure = _figure(6.4, result)
    axes = figure.subplots()
    _relative(axes, result)
    axes.set_ylim(bottom=0)
    return figure


def _loglog_figure(result: Mapping[str, Any]) -> Figure:
    figure = _figure(10.5, result)
    left, right = figure.subplots(1, 2)
    left.plot(result["ranks"], result["rmse_values"], "o-", color=RMSE, markersize=5, label="measured")
    left.set_ylabel("RMSE of dot products")
    right.plot(result["ranks"], result["relative_errors_percent"], "s-", color=RELATIVE, markersize=5, label="measured")
    right.set_ylabel("RMSE / RMS of the reference (%)")
    for axes, values in ((left, result["rmse_values"]), (right, result["relative_errors_percent"])):
        _ranks_axis(axes, result)
        if min(values) <= 0:
            continue  # a rank that equals the reference has no place on a logarithmic axis
        axes.set_yscale("log")
        if len(values) > 1:
            guide = [values[0] * (result["ranks"][0] / rank) ** 0.5 for rank in result["ranks"]]
            axes.plot(
                result["ranks"], guide, "--", color="0.5", label=r"$1/\sqrt{\mathrm{dimension}}$, from the first point"
            )
            axes.legend()
    return figure
