"""The page of :mod:`sparseopt.benchmarks.granularity`: stored results of each kind of mask side by side, verdict and picture.

The bar: the mean reward accuracy of a kind is within one standard error of the best of LoRA and single entries (standard error:
sample standard deviation over that arm's seeds / sqrt(seeds)).
"""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparseopt._files import FormatError, atomic_path, atomic_write
from sparseopt.benchmarks.study_report import read_rows, summarize

__all__ = [
    "KINDS",
    "Kind",
    "Step",
    "Verdict",
    "draw",
    "judge",
    "learned",
    "optimizer_speeds",
    "page",
    "steps",
    "write_report",
]

METRIC = "reward_accuracy"
SUITE = "optimizer, 525 M bf16 parameters"
MISSING = "not measured"
MODES = {
    "eager": "eager",
    "compiled": "compiled by layer",
    "whole": "compiled in one piece",
    "graphs": "compiled as CUDA graphs",
}


@dataclass(frozen=True)
class Kind:
    """One row of the page, and what its results are called.

    Attributes:
        name: of the row.
        grain: of ``find_masks``; None: no mask.
        study: arm of the study.
        step: arm of a training step; None: there is none.
        rival: whether the bar is the best of such kinds.
    """

    name: str
    grain: str | None
    study: str
    step: str | None
    rival: bool = False


KINDS = (
    Kind("single entries", "1", "sparse 2.5%", "sparse@2.5%", rival=True),
    *(Kind(f"runs of {n}", str(n), f"sparse 2.5%, runs of {n}", f"sparse@2.5%/runs{n}") for n in (8, 16, 32)),
    Kind("columns", "column", "sparse 2.5%, columns", "sparse@2.5%/columns"),
    Kind("rows", "row", "sparse 2.5%, rows", "sparse@2.5%/rows"),
    Kind("auto", "auto", "sparse 2.5%, auto", None),
    Kind("LoRA r=16", None, "LoRA r=16, all linear", "lora", rival=True),
    Kind("dense AdamW, bf16", None, "dense AdamW, bf16", "dense-fused"),
    Kind("dense AdamW, fp32", None, "dense AdamW, fp32", None),
)


@dataclass(frozen=True)
class Step:
    """Training steps under one setting.

    Attributes:
        title: model, size and mode.
        sources: date, commit and device of each measurement.
        arms: name -> ``ms`` (median), ``gib`` (peak allocated, None on CPUs), ``against_dense`` (times faster than dense-fused of
            the same measurement, None where that was not taken).
    """

    title: str
    sources: tuple[str, ...]
    arms: Mapping[str, Mapping[str, float | None]]

    def measured(self) -> list[Kind]:
        return [kind for kind in KINDS if kind.step in self.arms]


@dataclass(frozen=True)
class Verdict:
    """What the bar says of a kind of mask: ``gap`` is the best rival's mean less the kind's."""

    kind: Kind
    gap: float
    met: bool


# ---- reading ---------------------------------------------------------------------------------------------------------
def _stored(results: Path) -> list[dict[str, Any]]:
    """Files of suites in a folder and the folders in it; other JSON is left alone."""
    found = []
    for path in sorted([*results.glob("*.json"), *results.glob("*/*.json")]):
        try:
            content = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise FormatError(f"{path} is not a file of benchmark results: {error}.") from error
        if isinstance(content, dict) and "suites" in content and "device" in content:
            found.append(content)
    return found


def steps(results: Path) -> list[Step]:
    """Stored steps of language-model training in which a mask of groups was measured, or, where none was, any mask.

    Measurements of one name on one device are one setting; of an arm in several the newest counts.
    """
    settings: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for stored in _stored(results):
        for name, entry in stored["suites"].items():
            step = entry.get("train_step")
            if step is not None and step["settings"]["workload"] == "lm" and step["settings"]["random_weights"]:
                settings.setdefault((stored["device"], name), []).append(entry)
    found = [_step(device, entries) for (device, _), entries in settings.items()]
    groups = {kind.step for kind in KINDS if kind.grain not in (None, "1")}
    grouped = [step for step in found if groups & step.arms.keys()]
    return grouped or [step for step in found if any(kind.grain for kind in step.measured())]


def _step(device: str, entries: Sequence[dict[str, Any]]) -> Step:
    arms: dict[str, Mapping[str, float | None]] = {}
    sources = []
    asked = entries[0]["train_step"]["settings"]
    # What CUDA graphs keep for themselves does not count as allocated.
    memory = "peak_reserved_bytes" if asked["mode"] == "graphs" else "peak_allocated_bytes"
    for entry in sorted(entries, key=lambda entry: str(entry["date"])):
        ran = {name: arm for name, arm in entry["train_step"]["arms"].items() if "total" in arm}
        dense = ran["dense-fused"]["total"]["median"] if "dense-fused" in ran else None
        for name, arm in ran.items():
            ms, peak = arm["total"]["median"], arm[memory]
            ratio = dense / ms if dense and name != "dense-fused" else None
            arms[name] = {"ms": ms, "gib": peak and peak / 2**30, "against_dense": ratio}
        sources.append(f"{entry['date']}, commit `{entry['commit']}`, {device}")
    checkpointing = ", gradient checkpointing" if asked["gradient_checkpointing"] else ""
    title = (
        f"{asked['shape'] or asked['model']}, {asked['batch']} x {asked['seq']}, {MODES[asked['mode']]}{checkpointing}"
    )
    return Step(title, tuple(dict.fromkeys(sources)), arms)


def optimizer_speeds(results: Path) -> dict[str, tuple[str, float]]:
    """Granularity -> (device, times faster than torch's fused AdamW) of the step alone, with the default master weights."""
    found: dict[str, tuple[str, float]] = {}
    for stored in _stored(results):
        cases = stored["suites"].get(SUITE, {}).get("cases", {})
        for kind in KINDS:
            label = "2.5%" if kind.grain == "1" else f"2.5%, {kind.name}"
            case = cases.get(f"{label}, residual, step")
            if kind.grain is not None and case is not None:
                found[kind.grain] = stored["device"], case["baselines"]["torch fused"]["ratio"]
    return found


def learned(study: Path) -> dict[str, Any] | None:
    """The study's summary (:func:`sparseopt.benchmarks.study_report.summarize`); None where there is none."""
    rows = read_rows(study / "study.jsonl")
    return summarize(rows) if rows else None


# ---- judging ---------------------------------------------------------------------------------------------------------
def judge(arms: Mapping[str, Any]) -> tuple[Kind, float, list[Verdict]] | None:
    """The bar of each kind of mask that was trained.

    Args:
        arms: of the study's summary.

    Returns:
        The best rival, the standard error of its mean, and a verdict for each kind; None where a rival has no two seeds.
    """
    rivals = [kind for kind in KINDS if kind.rival]
    if any(len(arms.get(kind.study, {}).get("seeds", ())) < 2 for kind in rivals):
        return None
    best = max(rivals, key=lambda kind: arms[kind.study]["mean"][METRIC])
    reached, error = arms[best.study]["mean"][METRIC], _error(arms[best.study])
    verdicts = []
    for kind in KINDS:
        mean = arms.get(kind.study, {}).get("mean")
        if kind.grain is not None and mean is not None:
            gap = reached - mean[METRIC]
            verdicts.append(Verdict(kind, gap, gap <= error + 1e-12))
    return best, error, verdicts


def _error(arm: Mapping[str, Any]) -> float:
    return float(arm["std"][METRIC]) / math.sqrt(len(arm["seeds"]))


# ---- telling ---------------------------------------------------------------------------------------------------------
def page(
    kept: Mapping[str, Any] | None,
    study: Mapping[str, Any] | None,
    settings: Sequence[Step],
    fast: Mapping[str, tuple[str, float]],
) -> str:
    """Markdown: a row for each kind, and the verdict.

    Args:
        kept: ``about`` and ``kept`` (granularity -> share); None: not measured.
        study: as :func:`learned`.
        settings: as :func:`steps`, a column each.
        fast: as :func:`optimizer_speeds`.
    """
    arms = study["arms"] if study else {}
    judged = judge(arms)
    gaps = {verdict.kind.name: verdict for verdict in judged[2]} if judged else {}
    head = [
        "2.5% of the weights in",
        "score kept",
        "reward accuracy",
        "the bar",
        "state",
        "optimizer step against torch fused",
    ]
    lines = [[*head, *(step.title for step in settings)]]
    lines.append(["---"] * len(lines[0]))
    for kind in KINDS:
        arm = arms.get(kind.study)
        speed = fast.get(kind.grain or "")
        cells = [
            _kept(kept, kind),
            MISSING if arm is None or arm["mean"] is None else _accuracy(arm),
            _bar(gaps.get(kind.name)),
            MISSING if arm is None else f"{arm['state_bytes'] / 2**20:.1f} MiB",
            f"{speed[1]:.3g}x ({speed[0]})" if speed else MISSING if kind.grain else "",
        ]
        lines.append([kind.name, *cells, *(_cell(step.arms.get(kind.step or "")) for step in settings)])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    parts = [
        "# Which mask: groups of weights beside single ones",
        _sources(kept, study, settings),
        table,
        _sentence(arms),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _kept(kept: Mapping[str, Any] | None, kind: Kind) -> str:
    if kind.grain is None:
        return ""
    share = kept["kept"].get(kind.grain) if kept else None
    return MISSING if share is None else f"{share:.1%}"


def _accuracy(arm: Mapping[str, Any]) -> str:
    spread = "" if arm["std"] is None else f" ± {arm['std'][METRIC]:.3f}"
    return f"{arm['mean'][METRIC]:.3f}{spread}"


def _bar(verdict: Verdict | None) -> str:
    if verdict is None:
        return ""
    return "met" if verdict.met else f"{verdict.gap:.3f} below"


def _cell(arm: Mapping[str, float | None] | None) -> str:
    if arm is None:
        return MISSING
    ratio = f" ({arm['against_dense']:.3g}x)" if arm["against_dense"] else ""
    return f"{arm['ms']:.4g} ms{ratio}" + (f", {arm['gib']:.2f} GiB" if arm["gib"] else "")


def _sources(kept: Mapping[str, Any] | None, study: Mapping[str, Any] | None, settings: Sequence[Step]) -> str:
    lines = []
    if kept:
        lines.append(f"Score kept: share of the summed squared gradients under the best such mask; {kept['about']}.")
    if study:
        asked, sizes = study["settings"], study["settings"]["pairs"]
        seeds = max(len(arm["seeds"]) for arm in study["arms"].values())
        lines.append(
            f"Reward accuracy and optimizer state: DPO of {asked['model']}, {asked['steps']} steps of {asked['batch_size']} pairs, "
            f"{sizes['held_out']} held-out pairs, learning rates tuned for each arm, mean ± sample standard deviation over "
            f"{seeds} seeds ({study['date']}, commit `{study['commit']}`, {study['environment']['device']})."
        )
    if settings:
        titles: dict[tuple[str, ...], list[str]] = {}
        for step in settings:
            titles.setdefault(step.sources, []).append(step.title)
        told = " ".join(f"{'; '.join(same)} ({'; '.join(sources)})." for sources, same in titles.items())
        lines.append(
            "Training steps: random weights, median of a whole step (times faster than torch's fused AdamW beside it), peak of "
            f"allocated memory (of reserved memory under CUDA graphs). {told}"
        )
    return "\n".join(f"- {line}" for line in lines)


def _sentence(arms: Mapping[str, Any]) -> str:
    judged = judge(arms)
    if judged is None:
        return "The bar is not judged: LoRA or single entries were not trained with two seeds or more."
    best, error, verdicts = judged
    reached = arms[best.study]["mean"][METRIC]
    met = [f"{v.kind.name} ({arms[v.kind.study]['mean'][METRIC]:.3f})" for v in verdicts if v.met]
    short = [f"{v.kind.name} by {v.gap:.3f}" for v in verdicts if not v.met]
    text = (
        f"**The bar**, accuracy within one standard error ({error:.4f}) of the best of LoRA and single entries ({best.name}, "
        f"{reached:.3f}): met by {', '.join(met) or 'none'}"
    )
    return f"{text}; below that best: {', '.join(short)}." if short else f"{text}."


def draw(study: Mapping[str, Any], settings: Sequence[Step], path: Path) -> bool:
    """Accuracy of each seed against step time and peak memory, as PNG, under the setting in which most kinds were measured.

    Returns:
        False where no kind has both, and nothing was drawn.
    """
    from matplotlib.figure import Figure

    def both(step: Step) -> list[Kind]:
        return [kind for kind in step.measured() if study["arms"].get(kind.study, {}).get("seeds")]

    chosen = max(settings, key=lambda step: len(both(step)), default=None)
    if chosen is None or not both(chosen):
        return False
    missing = [kind.name for kind in KINDS if kind.step and kind not in both(chosen)]
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, (key, label) in zip(axes, (("ms", "step, ms"), ("gib", "peak memory, GiB")), strict=True):
        for number, kind in enumerate(both(chosen)):
            x, arm = chosen.arms[str(kind.step)][key], study["arms"][kind.study]
            if x is None:
                continue
            seeds = [seed[METRIC] for seed in arm["seeds"]]
            marker, spread = {"color": f"C{number}", "marker": "os^vD*PX"[number % 8]}, arm["std"]
            axis.plot([x] * len(seeds), seeds, linestyle="", alpha=0.35, markersize=4, **marker)
            axis.errorbar(
                [x], [arm["mean"][METRIC]], yerr=[spread[METRIC] if spread else 0.0], linestyle="", capsize=4, markersize=8,
                label=kind.name, **marker,
            )  # fmt: skip
        axis.set_xlabel(label)
        axis.set_xlim(0, 1.08 * axis.get_xlim()[1])
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("held-out reward accuracy")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    title = [
        f"Learning: DPO of {study['settings']['model']} (small: seeds; bars: standard deviation). Speed: {chosen.title}"
    ]
    if missing:
        title.append(f"left out, as one of both was {MISSING}: {', '.join(missing)}")
    figure.suptitle("\n".join(line for text in title for line in textwrap.wrap(text, 130)), fontsize=10)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)
    return True


def write_report(results: Path, study: Path, *, picture: bool = True) -> str:
    """Writes ``granularity.md`` and ``granularity.png`` into ``results`` and returns the page.

    Args:
        results: a folder of ``<device>.json`` files, as they are or a folder deeper, and ``granularity.json``.
        study: folder of a ``study.jsonl``.

    Raises:
        FormatError: a file that is not what its name says.
        ModuleNotFoundError: a picture is asked for and matplotlib is missing.
    """
    try:
        kept = json.loads((results / "granularity.json").read_text())
    except FileNotFoundError:
        kept = None
    summary, settings = learned(study), steps(results)
    text = page(kept, summary, settings, optimizer_speeds(results))
    image = results / "granularity.png"
    if picture and summary is not None and draw(summary, settings, image):
        text += "\n![Accuracy against step time and memory](granularity.png)\n"
    elif picture:
        image.unlink(missing_ok=True)  # an earlier run's
    atomic_write(results / "granularity.md", text)
    return text
