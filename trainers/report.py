"""The report of a run: a picture of its training, and a page that says what was done and what came out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sparseopt._files import atomic_path, atomic_write

__all__ = ["WAYS", "draw_curve", "plot_training", "write_report"]

SMOOTHING = 0.8  # weight of the past in the exponential mean that is drawn over the single steps


def write_report(folder: Path, config: dict[str, dict[str, Any]], results: dict[str, Any]) -> None:
    """Writes ``training.png`` and ``report.md`` from ``metrics.jsonl``, ``completions.jsonl`` and the results."""
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    plot_training(entries, folder / "training.png", results["method"])
    atomic_write(folder / "report.md", _page(config, results, _completions(folder)))


def _completions(folder: Path) -> str:
    if not (folder / "completions.jsonl").is_file():
        return ""
    from sparseopt import rewards

    return f"\n## Sampled completions\n{rewards.completions_table(folder / 'completions.jsonl')}\n"


# method -> (logged key, color, label, title, unit) of the right-hand picture, and what is drawn on its second axis
_RIGHT = {
    "dpo": ("rewards/margins", "tab:green", "margin", "Chosen minus rejected reward", "reward margin (nats x beta)"),
    "grpo": ("reward", "tab:green", "reward", "Reward of sampled completions", "mean reward"),
    "sft": ("mean_token_accuracy", "tab:green", "accuracy", "Tokens predicted right", "share of tokens"),
}
_SECOND = {
    "dpo": ("rewards/accuracies", "accuracy", "reward accuracy of the batch"),
    "grpo": ("completions/mean_length", "length", "tokens per completion"),
}


def plot_training(entries: list[dict[str, float]], path: Path, method: str = "dpo") -> None:
    """Loss (left) and what the method is after (right: margin and accuracy, reward and length, accuracy) by step."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    draw_curve(left, entries, "loss", "tab:blue", "loss")
    left.set(xlabel="step", ylabel="loss", title="Training loss")
    left.set_ylim(bottom=min(0.0, left.get_ylim()[0]))  # some losses are negative
    key, color, label, title, unit = _RIGHT[method]
    draw_curve(right, entries, key, color, label)
    right.set(xlabel="step", ylabel=unit, title=title)
    right.axhline(0, color="0.7", linewidth=0.8)
    axes = [right]
    if method in _SECOND:
        key, label, unit = _SECOND[method]
        axes.append(right.twinx())
        draw_curve(axes[1], entries, key, "tab:orange", label)
        axes[1].set_ylabel(unit)
        axes[1].set_ylim(0, 1.02 if method == "dpo" else None)
    handles = [line for axis in axes for line in axis.get_lines() if not line.get_label().startswith("_")]
    right.legend(handles=handles, loc="lower right", frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)


def draw_curve(axis: Any, entries: list[dict[str, float]], key: str, color: str, label: str) -> None:
    points = [(entry["step"], entry[key]) for entry in entries if key in entry]
    if not points:
        return
    steps, values = zip(*points, strict=True)
    smooth, mean, weight = [], 0.0, 0.0
    for value in values:
        mean, weight = SMOOTHING * mean + (1 - SMOOTHING) * value, SMOOTHING * weight + (1 - SMOOTHING)
        smooth.append(mean / weight)
    axis.xaxis.get_major_locator().set_params(integer=True)  # there is no half a step
    axis.plot(steps, values, color=color, alpha=0.3, linewidth=1, label="_single steps")
    axis.plot(steps, smooth, color=color, linewidth=2, label=label)


WAYS = {"sparse": "Sparse", "lora": "LoRA", "dense": "Full"}
NAMES = {"dpo": "DPO", "grpo": "GRPO", "sft": "SFT"}
# method -> (label, key, unit of what is counted)
_FIGURES = {
    "dpo": [("reward accuracy", "reward_accuracy"), ("reward margin", "margin")],
    "grpo": [("reward of greedy answers", "reward")],
    "sft": [("loss (nats per token)", "loss")],
}
UNITS = {"dpo": "pairs", "grpo": "prompts", "sft": "conversations"}
_NOTES = {
    "dpo": """Accuracy counts a tie as one half, so a policy that equals its reference scores 0.5. Greedy exact match is
there because pushing margins can destroy generation.""",
    "grpo": "The reward is the weighted sum of the reward functions, over greedy answers to prompts that were never trained on.",
    "sft": "The loss is the negative log-likelihood of held-out answers.",
}


def _page(config: dict[str, dict[str, Any]], results: dict[str, Any], completions: str) -> str:
    before, after, method, way = results["before"], results["after"], results["method"], results["way"]
    rows = [(label, _interval(before, key), _interval(after, key)) for label, key in _FIGURES[method]]
    if "greedy" in after:
        rows.append(
            (
                "greedy exact match",
                _interval(before["greedy"], "exact_match"),
                _interval(after["greedy"], "exact_match"),
            )
        )
    rows += [
        (f"reward `{name}`", f"{before['rewards'][name]:.3f}", f"{value:.3f}")
        for name, value in after.get("rewards", {}).items()
    ]
    table = "\n".join(f"| {name} | {old} | {new} |" for name, old, new in rows)
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    asked = ", ".join(f"`{' '.join(answer.split())[:80]}`" for answer in after.get("answers", [])) or "none asked for"
    training, unit = config["training"], UNITS[method]
    each = training["batch_size"] * training["gradient_accumulation_steps"]
    return f"""# {WAYS[way]} {NAMES[method]} of {config["model"]["name"]}

{_trained(results)}
- {results["steps"]} steps of {each} {unit} from `{config["data"]["name"]}`; loss: {_loss(config, method)}

On {after["n"]} held-out {unit}, with 95% intervals:

| | before | after |
|---|---|---|
{table}

{_NOTES[method]} First answers after training: {asked}.

![Training](training.png)
{completions}
## Cost
{_cost(results)}
{_mask(results)}
## Files
{_files(way)}
- `metrics.jsonl`, `timing_info.json`, `results.json`, `config.json`

{versions}
"""


def _trained(results: dict[str, Any]) -> str:
    active, total, way = results["active_parameters"], results["total_parameters"], results["way"]
    if way == "dense":
        return f"- trained: all {active:,} weights"
    if way == "lora":
        return f"- trained: a LoRA adapter of {active:,} weights beside the {total - active:,} of the model"
    eligible = results["mask"].get("eligible_parameters", total)
    return (
        f"- trained: {active:,} weights, {100 * active / eligible:.2f}% of the {eligible:,} that a mask could choose from\n"
        f"  ({100 * active / total:.2f}% of all {total:,})\n"
        "- everything else is **bit-identical** to the start, compared by SHA-256 parameter by parameter"
    )


def _loss(config: dict[str, dict[str, Any]], method: str) -> str:
    training, rewards = config["training"], config.get("rewards", {})
    if method == "dpo":
        weights = training["loss_weights"] or [1.0] * len(training["loss_type"])
        return " + ".join(f"{w:g} x {name}" for name, w in zip(training["loss_type"], weights, strict=True))
    if method == "grpo":
        kl = f", KL weight {training['beta']:g}" if training["beta"] else ""
        return (
            f"{training['loss_type']}, {training['num_generations']} completions per prompt, "
            f"rewards {', '.join(rewards['functions'])}{kl}"
        )
    return "next token of the answer"


def _cost(results: dict[str, Any]) -> str:
    state, total = results["optimizer_state_bytes"], results["total_parameters"]
    step: dict[str, float] | None = results.get("step_seconds")
    lines = [f"- whole run {results['seconds']} s, of which training {results['train_seconds']} s"]
    if step:
        lines.append(
            f"- a step takes {step['median']:.3f} s (20% to 80%: {step['p20']:.3f} to {step['p80']:.3f}), of which the "
            f"optimizer {results['optimizer_seconds']['median']:.4f} s; first steps left out (`timing_info.json`)"
        )
    lines.append(
        f"- optimizer state {state / 2**20:.1f} MiB (AdamW's two fp32 moments for every weight: {8 * total / 2**20:.0f} MiB);\n"
        f"  gradient buffer {results['gradient_bytes'] / 2**20:.1f} MiB; skipped steps {results['skipped_steps']}"
    )
    if "base_values_bytes" in results:
        saved = results["second_model_bytes"] - results["base_values_bytes"]
        lines.append(
            f"- reference model: {results['base_values_bytes'] / 2**20:.1f} MiB of old values instead of a second copy of "
            f"{results['second_model_bytes'] / 2**20:.0f} MiB: {saved / 2**20:.0f} MiB saved"
        )
    return "\n".join(lines)


def _mask(results: dict[str, Any]) -> str:
    if "mask" not in results:
        return ""
    found = "\n".join(f"- {key}: {value}" for key, value in sorted(results["mask"].items()))
    return f"\n## Mask\n{found}\n- fingerprint: `{results['mask_fingerprint']}`\n"


def _files(way: str) -> str:
    return {
        "sparse": "- `mask.safetensors`: which weights\n"
        "- `trained_entries.safetensors`: their values, a delta that turns the base model into this one",
        "lora": "- `adapter/`: the LoRA adapter",
        "dense": "- `model/`: the trained model, where it was asked for",
    }[way]


def _interval(result: dict[str, Any], key: str) -> str:
    low, high = result[f"{key}_ci"]
    return f"{result[key]:.3f} ({low:.3f} to {high:.3f})"
