"""DPO on a real model, arm against arm: ``python -m sparseopt.benchmarks.study``.

    python -m sparseopt.benchmarks.study OUT                                  # smollm2, all arms, tables and picture
    python -m sparseopt.benchmarks.study OUT --time_limit 540                 # stops between runs; repeat to go on
    python -m sparseopt.benchmarks.study --prepare FOLDER                     # pairs only (needs reasoning-gym)
    python -m sparseopt.benchmarks.study OUT --data FOLDER                    # on a machine without reasoning-gym
    python -m sparseopt.benchmarks.study OUT --report                         # tables and picture of what is there

Every arm tries its learning rates on one seed and keeps the one that does best on validation pairs (a best rate at the
edge of the grid extends the grid); then all seeds run at that rate, and only they see the held-out pairs. A finished run
is a line of ``OUT/study.jsonl`` and is never run again under the same settings.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sparseopt._files import FormatError, atomic_write
from sparseopt.benchmarks import study_report, train_results
from sparseopt.benchmarks.run_book import Row, RunBook, add_arguments, exit_code, key_of, today
from sparseopt.benchmarks.study_training import Arm, Study
from sparseopt.progress import announce_device

__all__ = ["ARMS", "SIZES", "TASKS", "load_pairs", "main", "prepare", "run"]

_BF16, _FP32 = torch.bfloat16, torch.float32
ARMS = {
    "dense-bf16": Arm("dense AdamW, bf16", "dense", _BF16, (1e-5, 3e-5, 1e-4)),
    "dense-fp32": Arm("dense AdamW, fp32", "dense", _FP32, (3e-6, 1e-5, 3e-5)),
    "lora": Arm("LoRA r=16, all linear", "lora", _BF16, (5e-5, 1e-4, 2e-4)),
    "sparse": Arm("sparse 2.5%", "sparse", _BF16, (5e-5, 1e-4, 2e-4), 0.975),
    "sparse-16": Arm("sparse 2.5%, runs of 16", "sparse", _BF16, (5e-5, 1e-4, 2e-4), 0.975, 16),
    "sparse-row": Arm("sparse 2.5%, rows", "sparse", _BF16, (1e-4, 2e-4, 4e-4), 0.975, "row"),
    "sparse-column": Arm("sparse 2.5%, columns", "sparse", _BF16, (1e-4, 2e-4, 4e-4), 0.975, "column"),
    "sparse-0.25": Arm("sparse 0.25%", "sparse", _BF16, (2e-4, 5e-4, 1e-3), 0.9975),
}
# How a task is put; the first is the quickstart's.
TASKS: dict[str, dict[str, Any]] = {
    "word_sequence_reversal": {
        "options": {"min_words": 2, "max_words": 4},
        "style": {
            "system": "Reply with the list only.",
            "last_line": True,
            "example": ("Reverse this list of words: red, blue, green", "green, blue, red"),
        },
    },
    "chain_sum": {"options": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2}, "style": {}},
}
SIZES = {"train": 2400, "validation": 200, "held_out": 400}
DATA_SEED = 0
EXTENSIONS = 2  # rates that a best rate at the edge may add to an arm's grid
Pairs = dict[str, list[dict[str, Any]]]


def prepare(folder: Path, task: str = "word_sequence_reversal", sizes: dict[str, int] | None = None) -> Path:
    """Writes ``train.jsonl``, ``validation.jsonl``, ``held_out.jsonl`` and, last, ``task.json``; returns ``folder``.

    No prompt is in two of them.

    Raises:
        ValueError: unknown task, or more pairs than it has.
    """
    from sparseopt import data

    if task not in TASKS:
        raise ValueError(f"the study has no task {task!r}: expected one of {', '.join(TASKS)}.")
    sizes = sizes or SIZES
    how: dict[str, Any] = {"task_config": TASKS[task]["options"], "style": data.PromptStyle(**TASKS[task]["style"])}
    known = data.preference_pairs(task, sizes["train"] + sizes["validation"], DATA_SEED, "train", **how)
    pairs = {
        "train": known[: sizes["train"]],
        "validation": known[sizes["train"] :],
        "held_out": data.preference_pairs(task, sizes["held_out"], DATA_SEED, "test", **how),
    }
    for split, rows in pairs.items():
        # Without the task's entry an answer counts where its text is the right one: no scorer is needed to evaluate.
        lines = (json.dumps({key: row[key] for key in ("prompt", "chosen", "rejected")}) for row in rows)
        atomic_write(folder / f"{split}.jsonl", "".join(f"{line}\n" for line in lines))
    atomic_write(folder / "task.json", json.dumps({"task": task, "seed": DATA_SEED, **TASKS[task]}))
    return folder


def load_pairs(folder: Path) -> tuple[str, Pairs]:
    """(name of the task, pairs of each split) of a prepared folder.

    Raises:
        FileNotFoundError: the folder was not prepared.
        FormatError: a file in it cannot be parsed, or is empty.
    """
    if not (folder / "task.json").is_file():
        raise FileNotFoundError(f"Folder {str(folder)!r} holds no prepared pairs: make them with --prepare.")
    pairs: Pairs = {}
    path = folder / "task.json"
    try:
        task = json.loads(path.read_text())["task"]
        for split in SIZES:
            path = folder / f"{split}.jsonl"
            pairs[split] = [json.loads(line) for line in path.read_text().splitlines()]
    except (json.JSONDecodeError, KeyError) as error:
        raise FormatError(f"{str(path)!r} is not a file of prepared pairs: {error!r}.") from error
    for split, rows in pairs.items():
        if not rows:
            raise FormatError(f"{str(folder / f'{split}.jsonl')!r} holds no pairs.")
    return task, pairs


class Runner:
    """Runs what the study's book does not have yet: see :class:`sparseopt.benchmarks.run_book.RunBook`."""

    def __init__(self, book: RunBook, study: Study) -> None:
        self.book, self.study = book, study

    def finish(self, phase: str, arm: Arm, rate: float | None, seed: int | None) -> bool:
        """Makes sure that a run is done; False where time is up."""

        def run() -> Row:
            if rate is None or seed is None:
                model = self.study.restored(arm.dtype)
                found: Row = {s: self.study.evaluate(model, arm.dtype, s) for s in ("validation", "held_out")}
            else:
                splits = ("validation",) if phase == "grid" else ("validation", "held_out")
                found = {"held_out": None, **self.study.run(arm, rate, seed, splits)}
            return {"phase": phase, "arm": arm.name, "rate": rate, "seed": seed, **found}

        return self.book.finish(key_of(self.book.about["settings"], phase, arm.name, rate, seed), run)

    def everything(self, arms: Sequence[Arm], grid_seed: int, seeds: Sequence[int]) -> bool:
        """Runs the whole study; False where time was up before its end."""
        for dtype in dict.fromkeys(arm.dtype for arm in arms):
            if not self.finish("before", Arm(f"before, {str(dtype)[6:]}", "none", dtype, ()), None, None):
                return False
        chosen: dict[str, float] = {}
        for arm in arms:
            rate = self._search(arm, grid_seed)
            if rate is None:
                return False
            chosen[arm.name] = rate
        return all(self.finish("final", arm, chosen[arm.name], seed) for seed in seeds for arm in arms)

    def _search(self, arm: Arm, seed: int) -> float | None:
        """The arm's best rate on validation pairs; None where time was up."""
        rates = list(arm.rates)
        for extension in range(EXTENSIONS + 1):
            if not all(self.finish("grid", arm, rate, seed) for rate in rates):
                return None
            best = study_report.choose(list(self.book.rows.values()), arm.name)
            assert best is not None
            if extension == EXTENSIONS or len(rates) < 2 or best not in (rates[0], rates[-1]):
                return best
            if best == rates[0]:
                rates.insert(0, _rounded(rates[0] ** 2 / rates[1]))
            else:
                rates.append(_rounded(rates[-1] ** 2 / rates[-2]))
        return None


def _rounded(rate: float) -> float:
    return float(f"{rate:.2g}")


def _line(row: dict[str, Any]) -> str:
    found = row["held_out"] or row["validation"]
    where = "held out" if row["held_out"] else "validation"
    what = f"{row['arm']}" + (f", rate {row['rate']:g}, seed {row['seed']}" if row["rate"] is not None else "")
    if found is None:
        return f"{row['phase']}: {what}: diverged ({row['seconds']:.1f} s)"
    return (
        f"{row['phase']}: {what}: {where} accuracy {found['reward_accuracy']:.3f}, margin {found['margin']:.2f}, "
        f"exact match {found['exact_match']:.3f} ({row['seconds']:.1f} s)"
    )


def run(options: argparse.Namespace, command: str) -> bool:
    """Runs, or goes on with, the study of parsed options; returns whether it is complete."""
    began = time.monotonic()
    device = announce_device(options.device)
    data_folder = options.data or options.out / "pairs"
    if options.data is None and not (data_folder / "task.json").is_file():
        prepare(data_folder, options.task)
    task, pairs = load_pairs(data_folder)
    folder = Path(options.model)
    settings = {
        "model": folder.resolve().name if folder.is_dir() else options.model, "task": task,
        "pairs": {split: len(rows) for split, rows in pairs.items()},
        "steps": options.steps, "batch_size": options.batch_size, "beta": options.beta,
        "sft_weight": options.sft_weight, "warmup": options.steps // 10, "max_grad_norm": 1.0, "mask_batches": 8,
        "rank": 16, "lora_alpha": 32, "grid_seed": options.grid_seed,
    }  # fmt: skip
    graphs = device.type == "cuda" and not options.no_graphs
    study = Study(options.model, pairs, settings, device, graphs=graphs)
    about = {
        "settings": settings, "environment": _environment(device, graphs), "date": today(),
        "commit": options.commit or train_results.commit(), "command": command,
    }  # fmt: skip
    book = RunBook(options.out / "study.jsonl", about, _line, time_limit=options.time_limit, began=began)
    return Runner(book, study).everything([ARMS[name] for name in options.arms], options.grid_seed, options.seeds)


def _environment(device: torch.device, graphs: bool) -> dict[str, str]:
    import peft
    import transformers

    import sparseopt

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    return {
        "device": name, "torch": torch.__version__, "transformers": transformers.__version__,
        "peft": peft.__version__, "sparseopt": sparseopt.__version__, "python": sys.version.split()[0],
        "CUDA graphs": "yes" if graphs else "no",
    }  # fmt: skip


def _told(given: Sequence[str], options: argparse.Namespace) -> str:
    """The command as it is recorded: folders by their last part, since paths of one machine mean nothing elsewhere."""
    folders = {str(path): path.name for path in (options.out, options.data, Path(options.model)) if path is not None}
    return shlex.join(["python", "-m", "sparseopt.benchmarks.study", *(folders.get(word, word) for word in given)])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sparseopt.benchmarks.study", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("out", nargs="?", type=Path, help="folder of study.jsonl, study.json, study.md and study.png")
    parser.add_argument("--prepare", type=Path, metavar="FOLDER", help="write the pairs into a folder, and stop")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="prepared pairs (default: made in OUT/pairs)")
    parser.add_argument("--task", choices=TASKS, default="word_sequence_reversal", help="pairs to make (%(default)s)")
    parser.add_argument("--model", default="smollm2", help="smollm2, a local folder or a Hub name (%(default)s)")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help=", ".join(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="seeds of the final runs (1 2 3)")
    parser.add_argument("--grid_seed", type=int, default=0, help="seed of the runs that choose rates (%(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of a run (%(default)s)")
    parser.add_argument("--batch_size", type=int, default=8, help="pairs a step (%(default)s)")
    parser.add_argument("--beta", type=float, default=0.1, help="DPO's temperature (%(default)s)")
    parser.add_argument("--sft_weight", type=float, default=0.0, help="weight of the chosen answers' likelihood (0)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (%(default)s)")
    parser.add_argument("--no_graphs", action="store_true", help="launch kernels one by one, without CUDA graphs")
    add_arguments(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code: 0 complete, 1 failed, 3 stopped at the time limit (repeat to go on)."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    options = parser.parse_args(given)
    if options.prepare is None and options.out is None:
        parser.error("give the folder OUT, or --prepare FOLDER")

    def work() -> bool:
        if options.prepare is not None:
            print(f"Pairs: {prepare(options.prepare, options.task)}")
            return True
        complete = options.report or run(options, _told(given, options))
        study_report.write_report(options.out, picture=not options.no_picture)
        print((options.out / "study.md").read_text())
        return complete

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
