"""The report of a chain: what each run cost and reached, how far the masks agree, what a step's delta weighs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sparseopt._files import atomic_path, atomic_write
from sparseopt.trainers.report import WAYS, draw_curve

__all__ = ["write_chain_report"]

RUNS = {"dense_dpo": "dense DPO", "sparse_dpo": "sparse DPO", "dense_grpo": "dense GRPO", "sparse_grpo": "sparse GRPO"}
COLORS = {"dense_dpo": "tab:gray", "sparse_dpo": "tab:green", "dense_grpo": "tab:gray", "sparse_grpo": "tab:green"}


def write_chain_report(folder: Path, found: dict[str, Any]) -> None:
    """Writes ``curves.png``, ``jaccard.png``, ``timing.png`` and ``report.md`` from the runs and ``chain.json``."""
    runs = {name: _read(folder / name / "results.json") for name in RUNS if (folder / name / "results.json").is_file()}
    _curves(folder, list(runs), folder / "curves.png")
    _jaccard(found["jaccard"], folder / "jaccard.png")
    if "timing" in found:
        _timing(found["timing"], folder / "timing.png")
    atomic_write(folder / "report.md", _page(runs, found))


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


# ---- pictures ----------------------------------------------------------------------------------------------------------
def _figure(columns: int, width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns)


def _save(figure: Any, path: Path) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)


def _curves(folder: Path, runs: list[str], path: Path) -> None:
    figure, axes = _figure(3, 14, 3.8)
    parts = (
        ("_dpo", "loss", "DPO loss", "loss"),
        ("_dpo", "rewards/margins", "DPO: chosen minus rejected reward", "reward margin (nats x beta)"),
        ("_grpo", "reward", "GRPO: reward of sampled completions", "mean reward"),
    )
    for axis, (ending, key, title, unit) in zip(axes, parts, strict=True):
        for run in (run for run in runs if run.endswith(ending)):
            entries = [json.loads(line) for line in (folder / run / "metrics.jsonl").read_text().splitlines()]
            draw_curve(axis, entries, key, COLORS[run], RUNS[run])
        axis.set(xlabel="step", ylabel=unit, title=title)
        if axis.get_lines():
            axis.legend(frameon=False)
    _save(figure, path)


def _jaccard(found: dict[str, Any], path: Path) -> None:
    methods, matrix = found["methods"], found["jaccard"]
    figure, axis = _figure(1, 1.0 + 0.85 * len(methods), 0.8 + 0.7 * len(methods))
    image = axis.imshow(matrix, vmin=0, vmax=1, cmap="viridis")
    axis.set_xticks(range(len(methods)), methods, rotation=35, ha="right")
    axis.set_yticks(range(len(methods)), methods)
    for i, row in enumerate(matrix):
        for j, value in enumerate(row):
            axis.text(j, i, f"{value:.2f}", ha="center", va="center", color="white" if value < 0.6 else "black")
    axis.set_title(f"Jaccard index of masks (by chance {found['chance']:.3f})")
    figure.colorbar(image, shrink=0.85)
    _save(figure, path)


def _timing(timing: dict[str, Any], path: Path) -> None:
    arms = {name: arm for name, arm in timing["arms"].items() if "phases" in arm}
    figure, axis = _figure(1, 8, 0.9 + 0.5 * len(arms))
    left = dict.fromkeys(arms, 0.0)
    for phase, color in (("forward", "tab:blue"), ("backward", "tab:orange"), ("optimizer", "tab:red")):
        seconds = [arm["phases"][phase]["median"] / 1000 for arm in arms.values()]
        axis.barh(list(arms), seconds, left=list(left.values()), color=color, label=phase)
        left = {name: start + more for (name, start), more in zip(left.items(), seconds, strict=True)}
    axis.invert_yaxis()
    axis.set(xlabel="seconds a step (medians)", title=f"A DPO step on {timing['device']}")
    axis.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.25 - 0.3 / len(arms)))
    _save(figure, path)


# ---- the page ----------------------------------------------------------------------------------------------------------
def _page(runs: dict[str, dict[str, Any]], found: dict[str, Any]) -> str:
    settings = found["config"]["chain"]
    rebuilt = found["reconstruction"]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    stages = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in found["stage_seconds"].items())
    timing = (
        "\n## Timing baseline\n\n![Timing](timing.png)\n\n" + _timing_table(found["timing"]) + "\n"
        if "timing" in found
        else ""
    )
    return f"""# From full training to a sparse one

Sparsity {100 * settings["sparsity"]:g}%; the sparse runs train under the mask of `{settings["train_with"]}`.

{_run_table(runs)}

![Curves](curves.png)

## Masks
{_mask_table(found)}

![Agreement of the masks](jaccard.png)
{timing}
## Deltas
{_delta_table(runs, found)}

The model of step {rebuilt["step"]} was rebuilt from the base and the delta log: all {rebuilt["tensors"]} tensors are
**bit-identical** to the trained model.

Stages: {stages}. Whole chain: {found["seconds"]:.0f} s.

{found["date"]}, commit {found.get("timing", {}).get("commit", "unknown")}; {versions}
"""


def _run_table(runs: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| run | trained weights | step (s) | optimizer (s) | optimizer state (MiB) | held out, before | after |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, run in runs.items():
        key, label = {"dpo": ("reward_accuracy", "accuracy"), "grpo": ("reward", "reward")}[run["method"]]
        step, update = run.get("step_seconds"), run.get("optimizer_seconds")
        figures = [f"{label} {run[when][key]:.3f}" for when in ("before", "after")]
        exact = [run[when].get("greedy", {}).get("exact_match") for when in ("before", "after")]
        figures = [text + ("" if e is None else f", exact {e:.2f}") for text, e in zip(figures, exact, strict=True)]
        lines.append(
            f"| {RUNS[name]} ({WAYS[run['way']].lower()}) | {run['active_parameters']:,} | "
            f"{'-' if not step else format(step['median'], '.3f')} | "
            f"{'-' if not update else format(update['median'], '.4f')} | "
            f"{run['optimizer_state_bytes'] / 2**20:.1f} | {figures[0]} | {figures[1]} |"
        )
    return "\n".join(lines)


def _mask_table(found: dict[str, Any]) -> str:
    methods = found["jaccard"]["methods"]
    truth = methods.index("ground_truth") if "ground_truth" in methods else None
    lines = [
        "| method | active | kept score | zero scores picked | Jaccard with ground truth |",
        "|---|---|---|---|---|",
    ]
    for i, method in enumerate(methods):
        mask = found["masks"][method]
        kept = f"{mask['kept_score']:.3f}" if "kept_score" in mask else "-"
        agreed = "-" if truth is None else f"{found['jaccard']['jaccard'][i][truth]:.3f}"
        lines.append(
            f"| {method} | {mask['active_parameters']:,} | {kept} | {mask.get('zero_score_share', 0):.2%} | {agreed} |"
        )
    return "\n".join([*lines, "", f"Two random masks of this density agree by {found['jaccard']['chance']:.3f}."])


def _timing_table(timing: dict[str, Any]) -> str:
    lines = ["| arm | step (ms) | forward | backward | optimizer | state (MiB) |", "|---|---|---|---|---|---|"]
    for name, arm in timing["arms"].items():
        if "phases" not in arm:
            lines.append(f"| {name} | {arm.get('unavailable', 'not measured')} | | | | |")
            continue
        phases = " | ".join(f"{arm['phases'][phase]['median']:.1f}" for phase in ("forward", "backward", "optimizer"))
        lines.append(f"| {name} | {arm['total']['median']:.1f} | {phases} | {arm['state_bytes'] / 2**20:.1f} |")
    return "\n".join(lines)


def _delta_table(runs: dict[str, dict[str, Any]], found: dict[str, Any]) -> str:
    whole = 2 * runs["dense_dpo"]["total_parameters"]
    lines = ["| log | step | MiB | of a bf16 checkpoint |", "|---|---|---|---|"]
    for log, steps in found["delta_bytes"].items():
        lines += [f"| {log} | {step} | {size / 2**20:.1f} | {size / whole:.1%} |" for step, size in steps.items()]
    return "\n".join(lines)
