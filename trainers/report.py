"""The report of a run: a picture of loss and margin, and a page that says what was done and what came out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sparseopt._files import atomic_path, atomic_write

__all__ = ["plot_training", "write_report"]

SMOOTHING = 0.8  # weight of the past in the exponential mean that is drawn over the single steps


def write_report(folder: Path, config: dict[str, dict[str, Any]], results: dict[str, Any]) -> None:
    """Writes ``training.png`` and ``report.md`` from ``metrics.jsonl`` and the results."""
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    plot_training(entries, folder / "training.png")
    atomic_write(folder / "report.md", _page(config, results))


def plot_training(entries: list[dict[str, float]], path: Path) -> None:
    """Loss (left) and reward margin with accuracy (right) by step."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    _curve(left, entries, "loss", "tab:blue", "loss")
    left.set(xlabel="step", ylabel="loss", title="Training loss")
    left.set_ylim(bottom=min(0.0, left.get_ylim()[0]))  # some of DPO's losses are negative
    _curve(right, entries, "rewards/margins", "tab:green", "margin")
    right.set(xlabel="step", ylabel="reward margin (nats x beta)", title="Chosen minus rejected reward")
    right.axhline(0, color="0.7", linewidth=0.8)
    accuracy = right.twinx()
    _curve(accuracy, entries, "rewards/accuracies", "tab:orange", "accuracy")
    accuracy.set_ylabel("reward accuracy of the batch")
    accuracy.set_ylim(0, 1.02)
    handles = [line for axis in (right, accuracy) for line in axis.get_lines() if not line.get_label().startswith("_")]
    right.legend(handles=handles, loc="lower right", frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)


def _curve(axis: Any, entries: list[dict[str, float]], key: str, color: str, label: str) -> None:
    points = [(entry["step"], entry[key]) for entry in entries if key in entry]
    if not points:
        return
    steps, values = zip(*points, strict=True)
    smooth, mean, weight = [], 0.0, 0.0
    for value in values:
        mean, weight = SMOOTHING * mean + (1 - SMOOTHING) * value, SMOOTHING * weight + (1 - SMOOTHING)
        smooth.append(mean / weight)
    axis.plot(steps, values, color=color, alpha=0.3, linewidth=1, label="_single steps")
    axis.plot(steps, smooth, color=color, linewidth=2, label=label)


def _page(config: dict[str, dict[str, Any]], results: dict[str, Any]) -> str:
    before, after = results["before"], results["after"]
    active, total = results["active_parameters"], results["total_parameters"]
    rows = [
        ("reward accuracy", _interval(before, "reward_accuracy"), _interval(after, "reward_accuracy")),
        ("reward margin", _interval(before, "margin"), _interval(after, "margin")),
    ]
    if "greedy" in after:
        rows.append(
            (
                "greedy exact match",
                _interval(before["greedy"], "exact_match"),
                _interval(after["greedy"], "exact_match"),
            )
        )
    table = "\n".join(f"| {name} | {old} | {new} |" for name, old, new in rows)
    state = results["optimizer_state_bytes"]
    mask = "\n".join(f"- {key}: {value}" for key, value in sorted(results["mask"].items()))
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    asked = ", ".join(f"`{answer}`" for answer in after.get("answers", [])) or "none asked for"
    eligible = results["mask"].get("eligible_parameters", total)
    training = config["training"]
    weights = training["loss_weights"] or [1.0] * len(training["loss_type"])
    loss = " + ".join(f"{w:g} x {name}" for name, w in zip(training["loss_type"], weights, strict=True))
    pairs = training["batch_size"] * training["gradient_accumulation_steps"]
    return f"""# Sparse DPO of {config["model"]["name"]}

- trained: {active:,} weights, {100 * active / eligible:.2f}% of the {eligible:,} that a mask could choose from
  ({100 * active / total:.2f}% of all {total:,})
- everything else is **bit-identical** to the start, compared by SHA-256 parameter by parameter
- {results["steps"]} steps of {pairs} pairs from `{config["data"]["name"]}`; loss: {loss}

On {after["n"]} held-out pairs, with 95% intervals:

| | before | after |
|---|---|---|
{table}

Accuracy counts a tie as one half, so a policy that equals its reference scores 0.5. Greedy exact match is there because
pushing margins can destroy generation. First answers after training: {asked}.

![Loss and margin](training.png)

## Cost
- whole run {results["seconds"]} s, of which training {results["train_seconds"]} s
- optimizer state {state / 2**20:.1f} MiB (AdamW's two fp32 moments for every weight: {8 * total / 2**20:.0f} MiB);
  gradient buffer {results["gradient_bytes"] / 2**20:.1f} MiB; skipped steps {results["skipped_steps"]}

## Mask
{mask}
- fingerprint: `{results["mask_fingerprint"]}`

## Files
- `mask.safetensors`: which weights
- `trained_entries.safetensors`: their values, a delta that turns the base model into this one
- `metrics.jsonl`, `results.json`, `config.json`

{versions}
"""


def _interval(result: dict[str, Any], key: str) -> str:
    low, high = result[f"{key}_ci"]
    return f"{result[key]:.3f} ({low:.3f} to {high:.3f})"
