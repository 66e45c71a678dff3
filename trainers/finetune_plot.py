"""The picture of a run: loss, sparsity, how masks changed and how much they explored, gradients outside, layers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparseopt._files import atomic_path
from sparseopt.masks.kinds import kind_of

__all__ = ["explored", "plot_run"]

COLORS = {
    "attention": "tab:blue",
    "mlp": "tab:orange",
    "other": "tab:gray",
    "embedding": "tab:green",
    "norm": "tab:red",
}


def explored(history: Sequence[dict[str, Any]], active: int) -> list[int]:
    """Entries that were active at some time, by the end of each update, beginning with the first masks.

    Args:
        history: records of updates.
        active: entries of the first masks.
    """
    seen = [active]
    for record in history:
        seen.append(seen[-1] + record["grown"] - round(record["regrown"] * record["grown"]))
    return seen


def plot_run(log: Sequence[dict[str, Any]], engine: Any, results: dict[str, Any], path: Path, name: str) -> None:
    """Draws the picture.

    Args:
        log: the trainer's log history.
        engine: the engine of the masks, with its history.
        results: of the run.
        path: a .png file.
        name: of the model.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    history, steps = engine.history, results["steps"]
    figure = Figure(figsize=(13.5, 6.8) if history else (9.5, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(2, 3).flat) if history else list(figure.subplots(1, 2))
    _loss(axes[0], log, results)
    if history:
        first = explored(history, 0)  # only the new ones
        start = results["active_entries"] - sum(record["grown"] - record["dropped"] for record in history)
        _sparsity(axes[1], history, 1 - start / results["layer_entries"], steps)
        _changes(axes[2], history)
        _gradients(axes[3], history, log)
        _exploration(axes[4], history, [(start + new) / results["layer_entries"] for new in first], results)
        for axis in axes[:5]:
            axis.set_xlim(0, steps)
            axis.set_xlabel("optimizer step")
            axis.xaxis.get_major_locator().set_params(integer=True)
            if engine.plan.last_exchange < steps and engine.plan.policy != "static":
                axis.axvline(engine.plan.last_exchange, color="0.6", linewidth=0.8, linestyle=":")
        axes[1].annotate("last exchange", (engine.plan.last_exchange, 0.03), xytext=(-3, 0), textcoords="offset points",
                         ha="right", fontsize=8, color="0.4")  # fmt: skip
    _layers(axes[-1], engine)
    figure.suptitle(_title(results, name), fontsize=10.5)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)


def _title(results: dict[str, Any], name: str) -> str:
    what = "weights" if results["target"] == "weights" else "updates"
    step, update = results["step_seconds"], results["mask_update_seconds"]
    lines = [
        f"{Path(name).name}: {results['sparsity']:.1%} sparse {what}, {results['policy']}, {results['pattern']}, "
        f"{results['distribution']}; {results['active_entries']:,} of {results['layer_entries']:,} entries of "
        f"{results['layers']} layers active",
        f"{results['versions']['device']}; optimizer state {results['optimizer_state_bytes'] / 2**20:,.1f} MiB",
    ]
    if step is not None:
        lines[1] += f"; median step {step['median']:.3g} s"
    if update is not None:
        lines[1] += f", mask update {update['median']:.3g} s"
    return "\n".join(lines)


def _loss(axis: Any, log: Sequence[dict[str, Any]], results: dict[str, Any]) -> None:
    training = [(entry["step"], entry["loss"]) for entry in log if "loss" in entry]
    if training:
        steps, values = zip(*training, strict=True)
        half = len(values) // 50
        axis.plot(steps, values, color="tab:blue", alpha=0.35 if half else 1, linewidth=1, label="training")
        if half:  # a centred mean: a trailing one would lie above a falling curve
            windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
            axis.plot(steps, [sum(w) / len(w) for w in windows], color="tab:blue", label=f"mean of {2 * half + 1}")
    held_out = {entry["step"]: entry["eval_loss"] for entry in log if "eval_loss" in entry}
    if held_out:
        axis.plot(*zip(*sorted(held_out.items()), strict=True), "o-", color="tab:red", markersize=3.5, label="held out")
    stages = (("dense", "before"), ("first masks", "first_masks"), ("trained", "after"))
    found = [f"{results[key]['loss']:.3f} {stage}" for stage, key in stages if results[key]]
    if results["before"]:
        axis.axhline(results["before"]["loss"], color="0.4", linestyle="--", linewidth=1, label="held out, dense model")
    axis.set_title("Loss" + (f" (held out: {', '.join(found)})" if found else ""), fontsize=9 if found else None)
    axis.set(
        xlabel="optimizer step", ylabel="cross-entropy" if "accuracy" in (results["after"] or {}) else "nats per token"
    )
    axis.legend(frameon=False, fontsize=8)


def _sparsity(axis: Any, history: Sequence[dict[str, Any]], first: float, steps: int) -> None:
    at = [0, *(record["step"] for record in history), steps]
    values = [first, *(record["sparsity"] for record in history)]
    axis.step(at, [*values, values[-1]], where="post", color="tab:purple")
    axis.plot(at[1:-1], values[1:], ".", color="tab:purple")
    axis.set(
        title=f"Sparsity of the layers ({values[-1]:.1%} at the end)",
        ylabel="share of inactive entries",
        ylim=(0, 1.02),
    )


def _changes(axis: Any, history: Sequence[dict[str, Any]]) -> None:
    churn = [(record["step"], record["churn"]) for record in history]
    grown = [(record["step"], record["regrown"]) for record in history if record["grown"]]
    axis.plot(
        *zip(*churn, strict=True), "o-", color="tab:green", markersize=4, label="churn: of the active entries, changed"
    )
    if grown:
        label = "regrown: of the grown entries, active before"
        axis.plot(*zip(*grown, strict=True), "s--", color="tab:brown", markersize=4, label=label)
    axis.set(title="Mask changes per update", ylabel="share")
    # Room for the legend above the curves.
    axis.set_ylim(0, 1.25 * max(0.01, *(value for _, value in (*churn, *grown))))
    axis.legend(frameon=False, fontsize=8, loc="upper left")


def _gradients(axis: Any, history: Sequence[dict[str, Any]], log: Sequence[dict[str, Any]]) -> None:
    trained = [(entry["step"], entry["grad_norm"]) for entry in log if "grad_norm" in entry]
    outside = [(r["step"], r["inactive_grad_norm"]) for r in history if r["inactive_grad_norm"] is not None]
    if trained:
        axis.plot(*zip(*trained, strict=True), color="0.6", linewidth=1, label="trained entries")
    if outside:
        axis.plot(*zip(*outside, strict=True), "o-", color="tab:red", markersize=4, label="inactive entries")
    axis.set(title="Gradient norm", ylabel="L2 norm, before clipping")
    values = [value for _, value in (*trained, *outside)]
    if values and min(values) > 0 and max(values) > 20 * min(values):
        from matplotlib.ticker import LogFormatter

        axis.set_yscale("log")
        for ticks in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            ticks(LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.5)))
    else:
        axis.set_ylim(bottom=0)
    axis.legend(frameon=False, fontsize=8)


def _exploration(
    axis: Any, history: Sequence[dict[str, Any]], shares: Sequence[float], results: dict[str, Any]
) -> None:
    at = [0, *(record["step"] for record in history), results["steps"]]
    axis.step(at, [*shares, shares[-1]], where="post", color="tab:cyan", label="active at some time")
    axis.axhline(1 - results["sparsity"], color="0.4", linestyle="--", linewidth=1, label="active at the end")
    axis.set(title="Explored", ylabel="share of the layers' entries", ylim=(0, 1.02))
    axis.legend(frameon=False, fontsize=8)


def _layers(axis: Any, engine: Any) -> None:
    kinds: dict[str, list[tuple[int, float]]] = {}
    for i, layer in enumerate(engine.layers):
        density = engine.masks.count(layer.name) / layer.numel
        kinds.setdefault(kind_of(layer.name), []).append((i, 1 - density))
    for kind, points in kinds.items():
        axis.plot(*zip(*points, strict=True), ".", color=COLORS[kind], label=kind)
    axis.set(title="Sparsity by layer, at the end", xlabel="layer, in the model's order", ylim=(0, 1.02))
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend(frameon=False, fontsize=8)
