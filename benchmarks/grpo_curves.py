"""Does sparse GRPO raise the reward as dense GRPO does? Curves of arms over seeds, on a verifiable task.

    python -m sparseopt.benchmarks.grpo_curves FOLDER [--config configs/grpo_curves.yaml] [--seeds 0,1,2]

Every run is an ordinary ``sparseopt train grpo`` in ``FOLDER/{arm}-seed{n}``; what is finished is not run again, and one
that was stopped goes on. ``FOLDER/grpo_curves.json`` and ``.png`` are written after every run.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparseopt._files import atomic_path, atomic_write
from sparseopt.benchmarks import train_results

__all__ = ["ARMS", "collect", "main", "picture"]

Config = dict[str, dict[str, Any]]

# arm -> settings over the file's; learning rates are the arms' own, as such updates need them
ARMS: dict[str, dict[str, dict[str, Any]]] = {
    "dense": {},
    "lora": {"lora": {"enabled": True}},
    "sparse": {"mask": {"method": "gradient", "sparsity": 0.975}},
}
RATES = {"dense": 3e-5, "lora": 1e-4, "sparse": 1e-4}  # dense and sparse: the best of a grid on a seed of its own
COLORS = {"dense": "tab:gray", "lora": "tab:orange", "sparse": "tab:green"}
SMOOTHING = 10  # steps of the running mean that is drawn


def collect(folder: Path, runs: Sequence[tuple[str, int, Path]], about: dict[str, Any]) -> dict[str, Any]:
    """Curves and held-out figures of the finished runs, and their mean and spread by arm."""
    found: dict[str, Any] = {**about, "runs": {}, "arms": {}}
    for arm, seed, path in runs:
        if not (path / "results.json").is_file():
            continue
        results = json.loads((path / "results.json").read_text())
        entries = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        found["runs"][f"{arm}-seed{seed}"] = {
            "arm": arm,
            "seed": seed,
            "reward": [entry["reward"] for entry in entries],
            "before": results["before"]["reward"],
            "after": results["after"]["reward"],
            "step_seconds": results["step_seconds"],
            "optimizer_seconds": results["optimizer_seconds"],
            "optimizer_state_bytes": results["optimizer_state_bytes"],
            "versions": results["versions"],
        }
    for arm in dict.fromkeys(arm for arm, _, _ in runs):
        mine = [run for run in found["runs"].values() if run["arm"] == arm]
        if not mine:
            continue
        ends = [statistics.fmean(run["reward"][-SMOOTHING:]) for run in mine]
        begins = [statistics.fmean(run["reward"][:SMOOTHING]) for run in mine]
        found["arms"][arm] = {
            "seeds": [run["seed"] for run in mine],
            "held_out_before": statistics.fmean(run["before"] for run in mine),
            "held_out_after": _spread([run["after"] for run in mine]),
            "sampled_first": _spread(begins),
            "sampled_last": _spread(ends),
        }
    atomic_write(folder / "grpo_curves.json", json.dumps(found, indent=1, allow_nan=False))
    return found


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"mean": statistics.fmean(values), "least": min(values), "most": max(values)}


def picture(found: dict[str, Any], path: Path) -> None:
    """Running means of the sampled completions' reward: thin lines are seeds, thick ones their mean."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for arm in found["arms"]:
        curves = [_running(run["reward"]) for run in found["runs"].values() if run["arm"] == arm]
        for curve in curves:
            axis.plot(range(1, len(curve) + 1), curve, color=COLORS[arm], alpha=0.35, linewidth=1)
        shortest = min(len(curve) for curve in curves)
        mean = [statistics.fmean(curve[i] for curve in curves) for i in range(shortest)]
        label = f"{arm}, {len(curves)} seed" + ("s" if len(curves) > 1 else "")
        axis.plot(range(1, shortest + 1), mean, color=COLORS[arm], linewidth=2.5, label=label)
    axis.set(
        xlabel="step", ylabel=f"mean reward, running mean of {SMOOTHING} steps",
        title=f"GRPO of {found['model']} on {found['task']}",
    )  # fmt: skip
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)


def _running(values: Sequence[float]) -> list[float]:
    return [statistics.fmean(values[max(0, i + 1 - SMOOTHING) : i + 1]) for i in range(len(values))]


def _settings(file: Config, way: Config, seed: int, folder: Path, device: str) -> Config:
    from sparseopt import config, schemas

    own: dict[str, dict[str, Any]] = {
        "training": {"seed": seed, "device": device},
        "output": {"dir": str(folder)},
        "delta_log": {"schedule": "none"},
    }
    return config.compose(schemas.GRPO, file, way, own)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code: 3 when the time limit came before the last run."""
    parser = argparse.ArgumentParser(prog="python -m sparseopt.benchmarks.grpo_curves", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folder", type=Path, help="where runs and results go")
    parser.add_argument("--config", default="configs/grpo_curves.yaml", help="settings of every run (%(default)s)")
    parser.add_argument("--set", nargs="*", default=[], metavar="SECTION.KEY=VALUE", help="override some")
    parser.add_argument("--arms", default="dense,sparse", help=f"of {','.join(ARMS)} (%(default)s)")
    parser.add_argument(
        "--rates", nargs="*", default=[], metavar="ARM=RATE", help="learning rates other than the arms' own"
    )
    parser.add_argument("--seeds", default="0,1,2", help="(%(default)s)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--time_limit", type=float, help="start no run after this many seconds")
    parser.add_argument("--commit", help="recorded with the results (default: what git says)")
    options = parser.parse_args(arguments)
    arms, seeds = options.arms.split(","), [int(seed) for seed in options.seeds.split(",")]
    unknown = [arm for arm in arms if arm not in ARMS]
    if unknown:
        parser.error(f"unknown arm {unknown[0]!r}: expected some of {', '.join(ARMS)}.")

    try:
        rates = {arm: float(rate) for arm, _, rate in (given.partition("=") for given in options.rates)}
    except ValueError as error:
        parser.error(f"--rates expects ARM=RATE: {error}.")
    unknown = [arm for arm in rates if arm not in arms]
    if unknown:
        parser.error(f"--rates names {unknown[0]!r}, which is not among --arms.")

    from sparseopt import config, schemas
    from sparseopt.trainers import grpo

    ways = {arm: {**ARMS[arm], "optimizer": {"learning_rate": rates.get(arm, RATES[arm])}} for arm in arms}
    file = config.load(schemas.GRPO, options.config, options.set)
    began = time.monotonic()
    # Seed by seed, so that a run cut short compares arms on the same ones.
    runs = [(arm, seed, options.folder / f"{arm}-seed{seed}") for seed in seeds for arm in arms]
    about = {
        "date": datetime.date.today().isoformat(),
        "commit": options.commit or train_results.commit(),
        "model": file["model"]["name"],
        "task": file["data"]["name"].partition(":")[2] or file["data"]["name"],
        "settings": {"training": file["training"], "data": file["data"], "arms": ways},
    }
    options.folder.mkdir(parents=True, exist_ok=True)
    for arm, seed, path in runs:
        if not (path / "results.json").is_file():
            if options.time_limit is not None and time.monotonic() - began > options.time_limit:
                print("The time limit is reached: the same command goes on.", file=sys.stderr)
                return 3
            print(f"--- {arm}, seed {seed}", file=sys.stderr, flush=True)
            settings = _settings(file, ways[arm], seed, path, options.device)
            settings["training"]["resume"] = (path / "config.json").is_file()
            grpo.run(settings)
        found = collect(options.folder, runs, about)
        picture(found, options.folder / "grpo_curves.png")
    for arm, figures in collect(options.folder, runs, about)["arms"].items():
        last, after = figures["sampled_last"], figures["held_out_after"]
        print(
            f"{arm}: sampled reward {figures['sampled_first']['mean']:.3f} -> {last['mean']:.3f} "
            f"({last['least']:.3f} to {last['most']:.3f}), held out {figures['held_out_before']:.3f} -> {after['mean']:.3f} "
            f"({after['least']:.3f} to {after['most']:.3f}), {len(figures['seeds'])} seeds"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
