"""The books of :mod:`sparseopt.benchmarks.study`: its rows on disk, which rate an arm gets, tables and picture.

A row is one finished run. Rates are chosen from rows of phase ``grid``, which hold validation figures only; held-out
figures are in rows of phase ``final`` (one per arm and seed) and ``before`` (the untrained model, once per dtype).
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparseopt._files import atomic_write
from sparseopt.benchmarks.run_book import Row, read_rows

__all__ = ["choose", "score", "summarize", "write_report"]

METRICS = {"reward_accuracy": "reward accuracy", "margin": "margin", "exact_match": "exact match"}


def score(row: Row) -> tuple[float, float]:
    """What rates are chosen by, from validation pairs: mean of reward accuracy and exact match, then the margin.

    Both, because a rate that pushes margins far enough to destroy generation still wins on accuracy. A run that
    diverged loses to every other.
    """
    found = row["validation"]
    if found is None:
        return (-math.inf, -math.inf)
    return ((found["reward_accuracy"] + found["exact_match"]) / 2, found["margin"])


def choose(rows: Sequence[Row], arm: str) -> float | None:
    """The rate of the arm's best grid run by :func:`score`, the lower rate on ties; None where there is no grid run."""
    grid = sorted((row for row in rows if row["phase"] == "grid" and row["arm"] == arm), key=lambda row: row["rate"])
    return max(grid, key=score)["rate"] if grid else None


def summarize(rows: Sequence[Row]) -> dict[str, Any]:
    """The study as one document.

    Returns:
        ``settings``, ``environment``, ``date``, ``commit``, ``command``; ``before``: held-out figures per dtype;
        ``arms``: per arm its ``grid`` (rate -> validation figures, None if diverged), ``rate``, ``edge`` (the chosen
        rate is the lowest or highest that was tried), ``seeds`` (held-out figures), ``mean`` and ``std`` over them
        (sample standard deviation, None for one seed), ``trained_parameters`` and ``state_bytes``.

    Raises:
        ValueError: no rows, or rows of different settings.
    """
    if not rows:
        raise ValueError("the study has no finished run to report.")
    if any(row["settings"] != rows[0]["settings"] for row in rows):
        raise ValueError("the rows come from studies with different settings: report one study at a time.")
    arms = {}
    for name in dict.fromkeys(row["arm"] for row in rows if row["phase"] != "before"):
        arms[name] = _arm([row for row in rows if row["arm"] == name], choose(rows, name))
    last = rows[-1]
    return {
        "study": "DPO, dense against LoRA against sparse",
        "settings": last["settings"],
        "environment": last["environment"],
        "date": last["date"],
        "commit": last["commit"],
        "command": last["command"],
        "before": {row["arm"]: row["held_out"] for row in rows if row["phase"] == "before"},
        "arms": arms,
    }


def _arm(rows: Sequence[Row], rate: float | None) -> dict[str, Any]:
    grid = {row["rate"]: row["validation"] for row in rows if row["phase"] == "grid"}
    final = sorted(
        (row for row in rows if row["phase"] == "final" and row["rate"] == rate), key=lambda row: row["seed"]
    )
    seeds = [{"seed": row["seed"], **row["held_out"]} for row in final if row["held_out"] is not None]
    mean = {m: statistics.fmean(s[m] for s in seeds) for m in METRICS} if seeds else None
    std = {m: statistics.stdev(s[m] for s in seeds) for m in METRICS} if len(seeds) > 1 else None
    return {
        "grid": {f"{r:g}": grid[r] for r in sorted(grid)},
        "rate": rate,
        "edge": rate is not None and rate in (min(grid), max(grid)),
        "seeds": seeds,
        "diverged": sum(row["held_out"] is None for row in final),
        "mean": mean,
        "std": std,
        "trained_parameters": rows[-1]["trained_parameters"],
        "state_bytes": rows[-1]["state_bytes"],
        "seconds": statistics.median(row["train_seconds"] for row in rows),
    }


def write_report(folder: Path, *, picture: bool = True) -> dict[str, Any]:
    """Writes ``study.json``, ``study.md`` and ``study.png`` beside ``folder/study.jsonl``; returns the summary.

    Raises:
        ValueError: as :func:`summarize`.
        ModuleNotFoundError: a picture is asked for and matplotlib is missing.
    """
    summary = summarize(read_rows(folder / "study.jsonl"))
    atomic_write(folder / "study.json", json.dumps(summary, indent=1, allow_nan=False) + "\n")
    atomic_write(folder / "study.md", _page(summary))
    if picture:
        _draw(summary, folder / "study.png")
    return summary


def _page(summary: Mapping[str, Any]) -> str:
    settings, arms = summary["settings"], summary["arms"]
    sizes = settings["pairs"]
    seeds = max((len(arm["seeds"]) for arm in arms.values()), default=0)
    lines = [
        "| arm | rate | reward accuracy | margin | exact match | weights trained | optimizer state | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, found in summary["before"].items():
        cells = " | ".join(f"{found[metric]:.3f}" for metric in METRICS)
        lines.append(f"| {name} | | {cells} | | | |")
    for name, arm in arms.items():
        star = r"\*" if arm["edge"] else ""
        rate = "" if arm["rate"] is None else f"{arm['rate']:g}{star}"
        cells = " | ".join(_cell(arm, metric) for metric in METRICS)
        lines.append(
            f"| {name} | {rate} | {cells} | {arm['trained_parameters']:,} | {arm['state_bytes'] / 2**20:.1f} MiB "
            f"| {arm['seconds']:.1f} |"
        )
    tried = "; ".join(f"{name}: {', '.join(_tried(arm))}" for name, arm in arms.items())
    environment = ", ".join(f"{key} {value}" for key, value in summary["environment"].items())
    edge = any(arm["edge"] for arm in arms.values())
    note = "\n\\* the lowest or highest rate that was tried: a better one may lie beyond.\n" if edge else ""
    diverged = [f"{name} {arm['diverged']}" for name, arm in arms.items() if arm["diverged"]]
    lost = f"\nRuns that diverged and are in no mean: {', '.join(diverged)}.\n" if diverged else ""
    table = "\n".join(lines)
    return f"""# DPO on a real model: {settings["model"]}

{settings["steps"]} steps of {settings["batch_size"]} pairs of `{settings["task"]}`, beta {settings["beta"]:g}, \
{_loss(settings)}, clipping at {settings["max_grad_norm"]:g}, no weight decay,
linear decay after {settings["warmup"]} steps of warm-up. Figures are from {sizes["held_out"]} held-out pairs; \
"±" is the sample standard deviation over {seeds} seeds
(data order, and what depends on it: the masks; and LoRA's start). Each arm's rate was chosen on seed \
{settings["grid_seed"]} by the mean of reward accuracy and exact match on
{sizes["validation"]} validation pairs, which share no prompt with the others. Masks: best sum of squared gradients over \
{settings["mask_batches"]} batches,
global budget, embedding (tied to the head) left out; LoRA \
(alpha {settings["lora_alpha"]}) leaves it out too, dense arms train it.

{table}
{note}{lost}
Accuracy counts a tie as one half. Exact match: the greedy answer equals the right one. Seconds: median of a run's training.

Mean of reward accuracy and exact match on validation pairs, by rate. {tried}.

![Held-out figures of every seed](study.png)

{summary["date"]}, commit `{summary["commit"]}`, {environment}; `{summary["command"]}`
"""


def _loss(settings: Mapping[str, Any]) -> str:
    return f"DPO + {settings['sft_weight']:g} x likelihood of the chosen answer" if settings["sft_weight"] else "DPO"


def _cell(arm: Mapping[str, Any], metric: str) -> str:
    if arm["mean"] is None:
        return ""
    spread = "" if arm["std"] is None else f" ± {arm['std'][metric]:.3f}"
    return f"{arm['mean'][metric]:.3f}{spread}"


def _tried(arm: Mapping[str, Any]) -> list[str]:
    return [
        f"{rate} {'diverged' if found is None else format((found['reward_accuracy'] + found['exact_match']) / 2, '.3f')}"
        for rate, found in arm["grid"].items()
    ]


def _draw(summary: Mapping[str, Any], path: Path) -> None:
    """One panel per figure: a dot per seed, a bar at their mean, a dashed line where the untrained model is."""
    import io

    from matplotlib.figure import Figure

    arms = {name: arm for name, arm in summary["arms"].items() if arm["seeds"]}
    figure = Figure(figsize=(11, 1.2 + 0.45 * max(len(arms), 1)), layout="constrained")
    axes = figure.subplots(1, len(METRICS), sharey=True)
    for axis, (metric, label) in zip(axes, METRICS.items(), strict=True):
        for row, arm in enumerate(arms.values()):
            values = [seed[metric] for seed in arm["seeds"]]
            axis.plot(values, [row] * len(values), "o", color="tab:blue", alpha=0.6)
            axis.plot([arm["mean"][metric]], [row], "|", color="black", markersize=16, markeredgewidth=2)
        for before in summary["before"].values():
            axis.axvline(before[metric], color="gray", linestyle="--", linewidth=0.8)
        axis.set_xlabel(label)
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(
        range(len(arms)), [f"{name}\n{arm['state_bytes'] / 2**20:.0f} MiB of state" for name, arm in arms.items()]
    )
    axes[0].invert_yaxis()
    settings = summary["settings"]
    figure.suptitle(
        f"{settings['model']}, {settings['task']}: held-out figures of each seed (dots), mean (bar), before (dashed)",
        fontsize=10,
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    atomic_write(path, buffer.getvalue())
