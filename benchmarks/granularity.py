"""Which mask to choose: single entries, runs, columns or rows at one budget, by score kept, learning, speed and memory.

    python -m sparseopt.benchmarks.granularity                      # the page and picture from the committed results
    python -m sparseopt.benchmarks.granularity --measure [CONFIG]   # scores kept too, anew

Kept scores are shares of summed squared gradients of the loss that CONFIG (configs/quickstart.yaml unless given) trains with, on
its own model and pairs; they are stored in ``granularity.json``. Learning is the study's (:mod:`sparseopt.benchmarks.study`),
speed and memory are those of training steps (:mod:`sparseopt.benchmarks.train_step`) and of the optimizer's step alone
(:mod:`sparseopt.benchmarks.gpu_optimizer`), as stored in ``benchmarks/results``. What was not measured is said so.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

import sparseopt as so
from sparseopt._files import atomic_write
from sparseopt.benchmarks.granularity_report import write_report
from sparseopt.masks.granularity import AUTO, GRANULARITIES

__all__ = ["main", "measure", "prices"]

RESULTS = Path(__file__).resolve().parent / "results"


def prices(scores: Mapping[str, Tensor], sparsity: float, **options: Any) -> dict[str, float]:
    """Granularity -> share of the whole score that the best mask of such groups keeps."""
    found = {}
    for granularity in (*GRANULARITIES, AUTO):
        masks = so.find_masks(scores, sparsity, granularity=granularity, **options)
        found[str(granularity)] = float(masks.metadata["kept_score"])
    return found


def measure(path: str) -> dict[str, Any]:
    """Scores the weights that a configuration of ``sparseopt train dpo`` trains, and finds masks of each granularity.

    Returns:
        ``kept``: as :func:`prices`; ``about``: one sentence on model, data and versions.
    """
    import torch

    from sparseopt import config as configuration
    from sparseopt.progress import announce_device
    from sparseopt.schemas import DPO
    from sparseopt.trainers.dpo import DpoRun
    from sparseopt.trainers.scoring import gradient_scores

    config = configuration.load(DPO, path, [], {})
    settings = config["mask"]
    with tempfile.TemporaryDirectory() as folder:
        config["output"]["dir"] = folder
        trainer = DpoRun(config).untrained(announce_device(config["training"]["device"]))
        exclude = settings["exclude"] or None
        scores = gradient_scores(trainer, settings["batches"], settings["include"] or None, exclude)
    kept = prices(scores, settings["sparsity"])
    about = (
        f"{config['model']['name']}, {settings['batches']} batches of {config['training']['batch_size']} pairs of "
        f"{config['data']['name']}, {1 - settings['sparsity']:.1%} of {sum(s.numel() for s in scores.values()):,} weights; "
        f"sparseopt {so.__version__}, torch {torch.__version__}"
    )
    return {"about": about, "kept": kept}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m sparseopt.benchmarks.granularity", description=__doc__.partition("\n")[0]
    )
    parser.add_argument(
        "--measure",
        nargs="?",
        const="configs/quickstart.yaml",
        metavar="CONFIG",
        help="find out which scores masks keep",
    )
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="what was measured; page and picture go there too"
    )
    parser.add_argument("--study", type=Path, help="folder with study.jsonl; study-h100 of the results unless given")
    parser.add_argument("--no_picture", action="store_true", help="for machines without matplotlib")
    options = parser.parse_args(arguments)
    if not options.results.is_dir():
        parser.error(f"--results must be a folder of benchmark results, but {options.results} is not there.")
    if options.measure is not None:
        text = json.dumps(measure(options.measure), indent=1, allow_nan=False) + "\n"
        atomic_write(options.results / "granularity.json", text)
    study = options.study or options.results / "study-h100"
    print(write_report(options.results, study, picture=not options.no_picture))
    print(f"stored in {options.results / 'granularity.md'}", file=sys.stderr)


if __name__ == "__main__":
    main()
