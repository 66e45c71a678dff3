"""What :mod:`sparseopt.benchmarks.train_step` measured, as JSON for the report, a Markdown table and a picture."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import sparseopt
from sparseopt._files import FormatError, atomic_path, atomic_write

__all__ = [
    "commit",
    "environment",
    "markdown",
    "picture",
    "quantiles",
    "slug",
    "store",
    "suite",
    "timing_info",
    "write_run",
]

PHASES = ("forward", "backward", "optimizer")
# Least ratios, on an H100, of the 2.5% element-wise arm at Llama-3.2-3B's and Llama-3.1-8B's shapes:
# (shape, mode, batch x sequence, gradient checkpointing) -> baseline or fact -> at least.
BARS: dict[tuple[str, str, str, bool], dict[str, float]] = {
    ("llama-3.2-3b", "eager", "1 x 512", False): {"dense-fused": 1.3, "lora": 1.7, "peak memory of lora": 1.0},
    ("llama-3.2-3b", "eager", "1 x 512", True): {"peak memory of lora": 1 / 1.15},
    ("llama-3.2-3b", "compiled", "1 x 512", False): {"dense-fused": 1.5},
    ("llama-3.2-3b", "eager", "2 x 1024", False): {"dense-fused": 1.2, "lora": 1.4},
    ("llama-3.1-8b", "eager", "1 x 512", True): {"21 GiB reserved": 1.0},
}
# The same for the arm whose masks are 2.5% of the columns.
_COLUMNS_3B = {"dense-fused": 2.2, "lora": 2.5, "peak memory of lora": 1.0}
_COLUMNS_1B = {"dense-fused": 1.4, "lora": 1.7}
COLUMN_BARS: dict[tuple[str, str, str, bool], dict[str, float]] = {
    ("llama-3.2-3b", "eager", "1 x 512", False): {"dense-fused": 1.6, "lora": 2.0},
    ("llama-3.2-3b", "compiled", "1 x 512", False): _COLUMNS_3B,
    ("llama-3.2-3b", "whole", "1 x 512", False): _COLUMNS_3B,
    ("llama-3.2-3b", "graphs", "1 x 512", False): _COLUMNS_3B,
    ("llama-3.2-1b", "compiled", "4 x 1024", False): _COLUMNS_1B,
    ("llama-3.2-1b", "whole", "4 x 1024", False): _COLUMNS_1B,
    ("llama-3.2-1b", "graphs", "4 x 1024", False): _COLUMNS_1B,
    ("llama-3.1-8b", "eager", "1 x 512", True): {"19 GiB reserved": 1.0},
}


def quantiles(milliseconds: Sequence[float]) -> dict[str, float]:
    """Median, 20% and 80% quantiles."""
    ordered = sorted(milliseconds)
    cuts = statistics.quantiles(ordered, n=5, method="inclusive") if len(ordered) > 1 else ordered * 4
    return {"median": round(statistics.median(ordered), 4), "p20": round(cuts[0], 4), "p80": round(cuts[3], 4)}


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def environment(device: torch.device) -> dict[str, str | int]:
    """What the numbers depend on; packages that are not installed are named as such."""
    values: dict[str, str | int] = {}
    if device.type == "cuda":
        values["device"] = torch.cuda.get_device_name(device)
    else:
        from sparseopt.benchmarks.interleaved import cpu_name

        values |= {"device": cpu_name(), "threads": torch.get_num_threads()}
    values["python"] = platform.python_version()
    values |= {"torch": torch.__version__, "sparseopt": sparseopt.__version__}
    for package in ("triton", "transformers", "peft"):
        try:
            values[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            values[package] = "not installed"
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        if name in os.environ:
            values[name] = os.environ[name]
    return values


def commit() -> str:
    """Commit of the source that runs, "with changes" where it has any; "unknown" outside of a checkout.

    ``SPARSEOPT_COMMIT`` names it where the tree came without its history.
    """
    if given := os.environ.get("SPARSEOPT_COMMIT"):
        return given

    def git(*arguments: str) -> str | None:
        try:
            here = Path(__file__).resolve().parent
            done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "--short", "HEAD")
    if not head:
        return "unknown"
    return f"{head} with changes" if git("status", "--porcelain", "--untracked-files=no") else head


def suite(
    arms: Mapping[str, Any],
    settings: Mapping[str, Any],
    about: Mapping[str, Any],
    rows: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """One entry of a result file, as :mod:`sparseopt.benchmarks.report` shows it: a case for each sparse arm.

    Args:
        arms: name -> what was measured, ``{"unavailable": why}`` for an arm that did not run.
        settings: what was asked for.
        about: ``date``, ``commit``, ``command``, ``environment``.
        rows: facts on real rows: ``data`` and ``generation``.

    Returns:
        ``about``, ``cases``, and ``train_step``: the settings, and everything measured of every arm. Each case's own
        ``train_step`` is its arm's. What did not run is named in the environment, so that tables tell it.
    """
    ran = {name: arm for name, arm in arms.items() if "unavailable" not in arm}
    baselines = [name for name in ran if not name.startswith("sparse@")]
    cases = {}
    for name, arm in ran.items():
        if name in baselines:
            continue
        facts = {}
        if arm["peak_allocated_bytes"] is not None:
            for other in baselines:
                facts[f"peak memory of {other}"] = ran[other]["peak_allocated_bytes"] / arm["peak_allocated_bytes"]
            for size in (19, 21):
                facts[f"{size} GiB reserved"] = size * 2**30 / arm["peak_reserved_bytes"]
        facts = {key: round(value, 3) for key, value in facts.items()}
        beside = {}
        for other in baselines:
            ratio = ran[other]["total"]["median"] / arm["total"]["median"]
            beside[other] = {**ran[other]["total"], "ratio": round(ratio, 3)}
        case = {"rounds": arm["rounds"], "sparseopt": arm["total"], "baselines": beside, "facts": facts}
        cases[name] = {**case, "bars": _bars(name, case, settings, about), "train_step": arm}
    missing = {name: arm["unavailable"] for name, arm in arms.items() if "unavailable" in arm}
    return {
        **about,
        "environment": {**about["environment"], **missing},
        "cases": cases,
        "train_step": {"settings": dict(settings), **(rows or {}), "arms": dict(arms)},
    }


def _bars(name: str, case: Mapping[str, Any], settings: Mapping[str, Any], about: Mapping[str, Any]) -> dict[str, Any]:
    size = f"{settings['batch']} x {settings['seq']}"
    bars_of = {"sparse@2.5%": BARS, "sparse@2.5%/columns": COLUMN_BARS}.get(name, {})
    if (
        settings["workload"] != "lm"
        or settings["accumulation"] != 1
        or "H100" not in str(about["environment"]["device"])
    ):
        return {}
    key = (str(settings["shape"]), settings["mode"], size, settings["gradient_checkpointing"])
    bars = {}
    for bar, at_least in bars_of.get(key, {}).items():
        measured = case["facts"].get(bar, case["baselines"].get(bar, {}).get("ratio"))
        if measured is not None:
            bars[bar] = {"at_least": round(at_least, 3), "measured": measured, "met": measured >= at_least}
    return bars


def store(entry: Mapping[str, Any], name: str, folder: Path) -> Path:
    """Puts a suite into ``folder/<device>.json`` in place of its earlier run; other suites stay.

    A run without a sparse arm goes under ``without_sparse``, which the report does not show: it compares with sparse arms.

    Raises:
        FormatError: the file is there but is no result file.
    """
    where = entry["environment"]
    device = where["device"] + (f" {where['threads']} threads" if "threads" in where else "")
    path = folder / f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.json"
    stored: dict[str, Any] = {"device": device, "suites": {}}
    if path.exists():
        try:
            stored = json.loads(path.read_text())
            stored.setdefault("suites", {})
        except (json.JSONDecodeError, AttributeError) as error:
            raise FormatError(f"{path} is not a file of benchmark results: {error}.") from error
    stored.setdefault("suites" if entry["cases"] else "without_sparse", {})[name] = entry
    atomic_write(path, json.dumps(stored, indent=1, allow_nan=False) + "\n")
    return path


# ---- for people ------------------------------------------------------------------------------------------------------
def _size(count: int | None) -> str:
    if count is None:
        return "-"
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.3g} MiB"


def markdown(entry: Mapping[str, Any], name: str) -> str:
    """The suite as a heading, its circumstances and a table: one row per arm, times in milliseconds."""
    arms, settings = entry["train_step"]["arms"], entry["train_step"]["settings"]
    dense = arms.get("dense-fused", {}).get("total", {}).get("median")
    where = ", ".join(f"{key} {value}" for key, value in entry["environment"].items() if key not in arms)
    head = ["arm", "step ms", "against dense-fused", "tokens/s", *(f"{p} ms" for p in PHASES), "peak allocated", "peak reserved",
            "optimizer state", "gradients", "trained"]  # fmt: skip
    lines = [head, ["---"] * len(head)]
    for arm, values in arms.items():
        if "unavailable" in values:
            lines.append([arm, values["unavailable"], *[""] * (len(head) - 2)])
            continue
        total = values["total"]
        span = f"{total['median']:.4g} ({total['p20']:.4g}-{total['p80']:.4g})"
        ratio = f"**{dense / total['median']:.3g}x**" if dense else "-"
        phases = [f"{values['phases'][p]['median']:.4g}" for p in PHASES]
        sizes = [_size(values[f"{key}_bytes"]) for key in ("peak_allocated", "peak_reserved", "state", "gradient")]
        speed = f"{values['tokens_per_second']:,.4g}" if "tokens_per_second" in values else "-"
        lines.append([arm, span, ratio, speed, *phases, *sizes, f"{values['trained']:,}"])
    notes = [f"{entry['date']}, commit `{entry['commit']}`, {where}; `{entry['command']}`", settings["note"]]
    rounds = [values["rounds"] for values in arms.values() if "rounds" in values]
    if rounds:
        notes.append(
            f"Median (20%-80% quantiles) of {min(rounds)} steps in {settings['passes']} passes over all arms, after "
            f"{settings['warmup']} of warm-up in each; phases are medians of their own."
        )
    notes += _facts(entry["train_step"], settings)
    if settings.get("interrupted"):
        notes.append("Interrupted: what had been measured by then.")
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"### {name}\n\n{' '.join(notes)}\n\n{table}\n"


def _facts(step: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """Sentences on real rows and on generation."""
    notes = []
    if data := step.get("data"):
        count = f"{data['rows']}" if data["rows"] == data["subset"] else f"{data['rows']} of {data['subset']}"
        tokens, cut = data["tokens"], f" ({data['cut']} cut to {settings['seq']} tokens)" if data["cut"] else ""
        notes.append(
            f"{count} rows of {settings['data']}{cut}: sequences of {tokens['min']} to {tokens['max']} tokens (median "
            f"{tokens['median']}), padded to {data['padded_to']}; tokens/s are without padding."
        )
    if made := step.get("generation"):
        notes.append(
            f"{_generation(made)}, {made['tokens_per_second']:.4g} tokens/s, {made['tokens_per_completion']:.3g} tokens each; "
            f"mean reward {made['mean_reward']:.3g}; rewards differed among the completions of "
            f"{made['groups_with_gradient']:.0%} of the prompts, the others give no gradient."
        )
    return notes


def _generation(made: Mapping[str, Any]) -> str:
    span = made["step"]
    return (
        f"Generation of a step's {made['completions']} completions by the starting model, once and not part of the step: "
        f"{span['median']:.4g} ms ({span['p20']:.4g}-{span['p80']:.4g})"
    )


def timing_info(entry: Mapping[str, Any], run: str) -> dict[str, Any]:
    """What ``timing_info.json`` holds: one run in one mode, flat, times in milliseconds, sizes in bytes.

    Returns:
        ``format``, ``version``, ``run``, ``date``, ``commit``, ``command``, ``device``, ``versions``, ``settings``, ``data``
        and ``generation`` (None on random tokens), and ``arms``: name -> ``rounds``, ``total`` and ``phases`` (``median``,
        ``p20``, ``p80``), ``tokens_per_second``, ``peak_allocated_bytes`` and ``peak_reserved_bytes`` (None on a CPU),
        ``state_bytes``, ``gradient_bytes``, ``trained``, ``loss``, ``speedup_over_dense_fused`` (None without that arm); or
        ``unavailable``.
    """
    step, versions = entry["train_step"], dict(entry["environment"])
    device = {key: versions.pop(key) for key in ("device", "threads") if key in versions}
    dense = step["arms"].get("dense-fused", {}).get("total", {}).get("median")
    arms = {}
    for name, values in step["arms"].items():
        versions.pop(name, None)
        arms[name] = dict(values)
        if "total" in values:
            arms[name]["speedup_over_dense_fused"] = dense and round(dense / values["total"]["median"], 4)
    return {
        "format": "sparseopt.timing", "version": 1, "run": run, **{key: entry[key] for key in ("date", "commit", "command")},
        "device": device.pop("device"), **device, "versions": versions, "settings": step["settings"],
        "data": step.get("data"), "generation": step.get("generation"), "arms": arms,
    }  # fmt: skip


def write_run(entry: Mapping[str, Any], name: str, folder: Path, run: str) -> None:
    """Writes ``timing_info.json``, ``report.md`` and ``timing.png`` (with matplotlib), each in place of an earlier one."""
    atomic_write(folder / "timing_info.json", json.dumps(timing_info(entry, run), indent=1, allow_nan=False) + "\n")
    image = picture(entry, name, folder / "timing.png")
    if not image:
        (folder / "timing.png").unlink(missing_ok=True)  # an earlier run's
    shown = "\n![Times of the phases](timing.png)\n" if image else ""
    atomic_write(folder / "report.md", markdown(entry, name) + shown)
    without = "" if image else " (no picture, because matplotlib is not installed)"
    print(f"stored in {folder}{without}", file=sys.stderr)


def picture(entry: Mapping[str, Any], name: str, path: Path) -> bool:
    """Draws a suite as PNG: stacked phases of each arm, and its peak memory beside it.

    Returns:
        False where matplotlib is not installed, and nothing was drawn.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure

    arms = {arm: values for arm, values in entry["train_step"]["arms"].items() if "unavailable" not in values}
    left_out = [f"{arm}: {v['unavailable']}" for arm, v in entry["train_step"]["arms"].items() if "unavailable" in v]
    memory = any(values["peak_allocated_bytes"] for values in arms.values())
    below = f"; not run: {', '.join(left_out)}" if left_out else ""
    made = entry["train_step"].get("generation")
    title = [name, f"{entry['environment']['device']}, {entry['date']}{below}", *([_generation(made)] if made else [])]
    title = [line for text in title for line in textwrap.wrap(text, 130 if memory else 92)]
    height = 1.55 + 0.17 * len(title) + 0.42 * max(len(arms), 2)
    figure = Figure(figsize=(11 if memory else 7.5, height), layout="constrained")
    axes = figure.subplots(1, 2 if memory else 1, sharey=True, squeeze=False, width_ratios=[3, 2] if memory else None)[
        0
    ]
    rows = list(range(len(arms)))
    left = [0.0] * len(arms)
    for phase, colour in zip(PHASES, ("#4c78a8", "#9ecae9", "#f58518"), strict=True):
        widths = [values["phases"][phase]["median"] for values in arms.values()]
        axes[0].barh(rows, widths, left=left, label=phase, color=colour)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for row, end, values in zip(rows, left, arms.values(), strict=True):
        axes[0].annotate(f" {values['total']['median']:.4g}", (end, row), va="center", fontsize=8)
    axes[0].set_yticks(rows, list(arms))
    axes[0].invert_yaxis()
    axes[0].margins(x=0.12)
    axes[0].set_xlabel("ms (bars: phases; number: whole step; medians)")
    axes[0].legend(loc="upper center", bbox_to_anchor=(0.5, 1.0 + 0.9 / (1 + len(arms))), ncols=3, frameon=False)
    if memory:
        for key, colour in (("peak_reserved_bytes", "#d9d9d9"), ("peak_allocated_bytes", "#54a24b")):
            widths = [values[key] / 2**30 for values in arms.values()]
            axes[1].barh(rows, widths, color=colour, label=key.split("_")[1])
        axes[1].set_xlabel("peak memory, GiB")
        axes[1].legend(loc="upper center", bbox_to_anchor=(0.5, 1.0 + 0.9 / (1 + len(arms))), ncols=2, frameon=False)
    figure.suptitle("\n".join(title), fontsize=10 if memory else 9)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    return True
