"""The price of masks in groups: how much of the gradient score groups of entries keep, beside what they buy in speed.

python -m sparseopt.benchmarks.granularity [CONFIG] [--output FILE]

Scores are sums of squared gradients of the loss that CONFIG (configs/quickstart.yaml unless given) trains with, on its own
model and pairs. Speeds are those stored in benchmarks/results for one step of 525 M bf16 weights at 2.5%.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sparseopt as so
from sparseopt._files import atomic_write
from sparseopt.masks.granularity import GRANULARITIES

__all__ = ["main", "prices", "table"]

HERE = Path(__file__).resolve().parent
SUITE = "optimizer, 525 M bf16 parameters"


def prices(scores: Mapping[str, Tensor], sparsity: float, **options: Any) -> dict[str, float]:
    """Granularity -> share of the whole score that the best mask of such groups keeps."""
    found = {}
    for granularity in GRANULARITIES:
        masks = so.find_masks(scores, sparsity, granularity=granularity, **options)
        found[str(granularity)] = float(masks.metadata["kept_score"])
    return found


def speeds(results: Path) -> dict[str, tuple[str, float]]:
    """Granularity -> (device, times faster than torch's fused AdamW), of the default master weights."""
    found: dict[str, tuple[str, float]] = {}
    for path in sorted(results.glob("*.json")):
        stored = json.loads(path.read_text())
        cases = stored.get("suites", {}).get(SUITE, {}).get("cases", {})
        for granularity in GRANULARITIES:
            label = "2.5%" if granularity == 1 else f"2.5%, runs of {granularity}"
            case = cases.get(f"{label}, residual, step")
            if case is not None:
                found[str(granularity)] = stored["device"], case["baselines"]["torch fused"]["ratio"]
    return found


def table(kept: Mapping[str, float], fast: Mapping[str, tuple[str, float]]) -> str:
    """Markdown, a row for each granularity."""
    rows = [
        "| groups of | score kept | against single entries | step against torch fused |",
        "| --- | --- | --- | --- |",
    ]
    for granularity, share in kept.items():
        name = {"1": "single entries"}.get(
            granularity, f"{granularity}s" if granularity in ("row", "column") else granularity
        )
        speed = f"{fast[granularity][1]:.3g}x ({fast[granularity][0]})" if granularity in fast else "not measured"
        rows.append(f"| {name} | {share:.1%} | {share / kept['1']:.1%} | {speed} |")
    return "\n".join(rows)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m sparseopt.benchmarks.granularity", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("config", nargs="?", default="configs/quickstart.yaml")
    parser.add_argument("--output", type=Path, help="write the table here too")
    options = parser.parse_args(arguments)

    from sparseopt import config as configuration
    from sparseopt.progress import announce_device
    from sparseopt.schemas import DPO
    from sparseopt.trainers.dpo import DpoRun
    from sparseopt.trainers.scoring import gradient_scores

    config = configuration.load(DPO, options.config, [], {})
    settings = config["mask"]
    with tempfile.TemporaryDirectory() as folder:
        config["output"]["dir"] = folder
        trainer = DpoRun(config).untrained(announce_device(config["training"]["device"]))
        exclude = settings["exclude"] or None
        scores = gradient_scores(trainer, settings["batches"], settings["include"] or None, exclude)
    kept = prices(scores, settings["sparsity"])
    text = (
        f"{config['model']['name']}, {settings['batches']} batches of {config['training']['batch_size']} pairs of "
        f"{config['data']['name']}, {1 - settings['sparsity']:.1%} of {sum(s.numel() for s in scores.values()):,} weights; "
        f"sparseopt {so.__version__}, torch {torch.__version__}\n\n{table(kept, speeds(HERE / 'results'))}\n"
    )
    print(text)
    if options.output is not None:
        atomic_write(options.output, text)


if __name__ == "__main__":
    main()
