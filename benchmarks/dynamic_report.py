"""What the runs of :mod:`sparseopt.benchmarks.dynamic_learning` say together: figures, Markdown, picture."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparseopt._files import atomic_path, atomic_write

__all__ = ["summary", "write_report"]

COLORS = {"static": "#6b7280", "set": "#2563eb", "rigl": "#dc2626"}
FIRST = {"magnitude": "by magnitude", "random": "at random"}
NAMES = {"static": "static", "set": "SET", "rigl": "RigL"}


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All figures of the runs of one folder.

    Returns:
        ``date``, ``commit``, ``environment``, ``settings`` of the newest run; ``before``, ``grids``, ``rate``; ``arms``: name
        -> ``fraction``, ``held_out`` (mean, standard deviation, least, most), ``seeds``, ``curves``, ``train``, ``step_ms``,
        ``churn``; ``differences``: RigL less another arm, seed by seed; ``bars``.

    Raises:
        ValueError: no final run, a run that diverged, or runs of one seed that began differently.
    """
    final = [row for row in rows if row["phase"] == "final"]
    if not final:
        raise ValueError("no final run is there yet.")
    if diverged := [row for row in final if row["loss"] is None]:
        raise ValueError(
            f"{diverged[0]['arm']} diverged under seed {diverged[0]['seed']}: repeat with lower --rates elsewhere."
        )
    for seed in {row["seed"] for row in final}:
        if len({(row["first_masks"], row["order"]) for row in final if row["seed"] == seed}) != 1:
            raise ValueError(f"the runs of seed {seed} began with different masks or saw different windows.")
    arms: dict[str, Any] = {}
    for name in NAMES:
        mine = sorted((row for row in final if row["arm"] == name), key=lambda row: row["seed"])
        if mine:
            arms[name] = {
                "held_out": _spread([row["loss"] for row in mine]),
                "fraction": mine[0]["fraction"],
                "seeds": {str(row["seed"]): row["loss"] for row in mine},
                "curves": {str(row["seed"]): row["curve"] for row in mine},
                "train": _spread([row["train"] for row in mine]),
                "step_ms": statistics.median(row["step_ms"] for row in mine),
                "mask_updates": len(mine[0]["history"]),
                "churn": [record["churn"] for record in mine[0]["history"]],
                "regrown": [record["regrown"] for record in mine[0]["history"]],
            }
    newest = final[-1]
    return {
        **{key: newest[key] for key in ("date", "commit", "environment", "settings")},
        "before": next(
            ({k: row[k] for k in ("held_out_dense", "held_out_pruned")} for row in rows if row["phase"] == "before"),
            None,
        ),
        "grids": {
            phase: [
                {
                    "policy": row["arm"],
                    **{key: row[key] for key in ("rate", "fraction", "seed", "steps")},
                    "validation": row["loss"],
                }
                for row in rows
                if row["phase"] == phase
            ]
            for phase in ("rates", "fractions")
        },
        "rate": newest["rate"],
        "arms": arms,
        **_compare(arms),
    }


def _compare(arms: dict[str, Any]) -> dict[str, Any]:
    differences: dict[str, Any] = {}
    for other in ("static", "set"):
        if "rigl" in arms and other in arms:
            both = [seed for seed in arms["rigl"]["seeds"] if seed in arms[other]["seeds"]]
            values = [arms["rigl"]["seeds"][seed] - arms[other]["seeds"][seed] for seed in both]
            if values:
                differences[other] = {**_spread(values), "seeds": dict(zip(both, values, strict=True))}
    bars = {}
    if "static" in differences:
        mean = differences["static"]["mean"]
        bars["RigL below static"] = {"below": 0.0, "measured": mean, "met": mean < 0}
    if "set" in differences:
        mean = differences["set"]["mean"]
        bars["RigL not above SET"] = {"at_most": 0.0, "measured": mean, "met": mean <= 0}
    return {"differences": {f"rigl - {other}": found for other, found in differences.items()}, "bars": bars}


def _spread(values: Sequence[float]) -> dict[str, float]:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "deviation": deviation, "least": min(values), "most": max(values)}


def write_report(found: dict[str, Any], folder: Path, *, picture: bool) -> str:
    """Writes ``dynamic_learning.md`` and, if wanted, ``dynamic_learning.png``; returns the Markdown."""
    text = _markdown(found)
    if picture:
        _picture(found, folder / "dynamic_learning.png")
        text += "\n![Held-out loss by policy](dynamic_learning.png)\n"
    atomic_write(folder / "dynamic_learning.md", text)
    return text


def _markdown(found: dict[str, Any]) -> str:
    s, where = found["settings"], found["environment"]
    tokens = s["corpus"]["tokens"]
    versions = ", ".join(f"{k} {v}" for k, v in where.items() if k != "device")
    seeds = sorted({seed for arm in found["arms"].values() for seed in arm["seeds"]}, key=int)
    lines = [
        f"### {s['model']} at {s['sparsity']:.0%} sparsity: held-out loss by policy",
        "",
        f"{found['date']}, commit `{found['commit']}`, {where['device']} ({versions}).",
        f"{s['steps']} steps of {s['batch']} x {s['seq']} tokens, {s['dtype']}, masks every {s['interval']} steps "
        f"({s['distribution']}), target weights, first masks {FIRST[s['initial']]}; learning rate "
        f"{found['rate']:g}. Corpus: {tokens['train']:,} tokens to train on, {tokens['held_out']:,} held out "
        f"({s['corpus']['documents']['held_out']} documents that training never sees).",
    ]
    for phase, grid in found["grids"].items():
        for name in dict.fromkeys(row["policy"] for row in grid):
            mine = sorted((row for row in grid if row["policy"] == name), key=lambda row: row[phase[:-1]])
            tried = ", ".join(f"{row[phase[:-1]]:g}: {_number(row['validation'])}" for row in mine)
            lines.append(
                f"Validation loss by {phase[:-1]}, {NAMES[name]}, seed {s['grid_seed']}, {mine[0]['steps']} steps: {tried}."
            )
    if found["before"]:
        lines.append(
            f"Before training: {found['before']['held_out_dense']:.4f} dense, {found['before']['held_out_pruned']:.4f} pruned."
        )
    columns = " | ".join(f"seed {seed}" for seed in seeds)
    lines += ["", f"| policy | exchanged at first | held out, mean ± sd | {columns} | training | ms/step |",
              f"|---|---|---|{'---|' * len(seeds)}---|---|"]  # fmt: skip
    for name, arm in found["arms"].items():
        each = " | ".join(_number(arm["seeds"].get(seed)) for seed in seeds)
        spread = f"{arm['held_out']['mean']:.4f}"
        if len(arm["seeds"]) > 1:
            spread += f" ± {arm['held_out']['deviation']:.4f}"
        lines.append(
            f"| {NAMES[name]} | {arm['fraction']:.0%} | {spread} | {each} | {arm['train']['mean']:.4f} | {arm['step_ms']:.1f} |"
        )
    lines.append("")
    for name, difference in found["differences"].items():
        each = ", ".join(f"{value:+.4f}" for value in difference["seeds"].values())
        lines.append(f"- {name}, same seed: {difference['mean']:+.4f} on average ({each})")
    lines += [f"- bar: {name}: {'met' if bar['met'] else 'not met'}" for name, bar in found["bars"].items()]
    return "\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _picture(found: dict[str, Any], path: Path) -> None:
    """Held-out loss over steps: mean of the seeds, a band from least to most, its end larger beside it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    s = found["settings"]
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    whole, end = figure.subplots(1, 2, width_ratios=[3, 2])
    for name, arm in found["arms"].items():
        curves = list(arm["curves"].values())
        steps = [step for step, _ in curves[0]]
        table = [[curve[i][1] for curve in curves] for i in range(len(steps))]
        first = 1 if len(steps) > 3 else 0  # the pruned model's loss would flatten all the rest
        label = f"{NAMES[name]}, {len(curves)} seed{'s' if len(curves) > 1 else ''}"
        for axis, start in ((whole, first), (end, max(first, len(steps) // 2))):
            xs, rows = steps[start:], table[start:]
            axis.fill_between(xs, [min(row) for row in rows], [max(row) for row in rows], color=COLORS[name], alpha=0.2)
            axis.plot(xs, [statistics.fmean(row) for row in rows], color=COLORS[name], linewidth=2, marker="o",
                      markersize=3, label=label)  # fmt: skip
    for axis in (whole, end):
        axis.set(xlabel="step")
        axis.grid(alpha=0.3)
    whole.set(ylabel="held-out loss", title=f"{s['model']}, {s['sparsity']:.0%} sparse weights: mean, least to most")
    end.set(title="second half")
    whole.legend(frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)
