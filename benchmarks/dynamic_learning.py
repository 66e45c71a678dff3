"""What changing masks are worth on a real model: ``python -m sparseopt.benchmarks.dynamic_learning --output FOLDER``.

    python -m sparseopt.benchmarks.dynamic_learning --output OUT                     # smollm2, all policies, three seeds
    python -m sparseopt.benchmarks.dynamic_learning --output OUT --time_limit 540    # stops between runs; repeat to go on
    python -m sparseopt.benchmarks.dynamic_learning --output OUT --texts FOLDER      # a corpus of .txt files

A language model is pruned (by magnitude, or at random) to the sparsity asked for and trained on with ``target="weights"``: under
each seed all policies begin with the same masks, see the same windows in the same order, and differ in what their masks do. The
learning rate is the one that does best for static masks on the validation documents, under another seed; all policies use it. SET
and RigL then each choose how much they exchange, on the same documents under the same seed. Only the final runs see the held-out
documents.
The corpus is what the installed packages and Python tell about themselves, split by document.

A finished run is a line of ``OUT/runs.jsonl`` and is never run again under the same settings; ``dynamic_learning.json``, ``.md``
and ``.png`` tell what is there. The same command in several processes at once shares the runs (their step times then mean nothing).
"""

from __future__ import annotations

import argparse
import functools
import gc
import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import sparseopt as so
from sparseopt._files import atomic_write
from sparseopt.benchmarks import package_texts, train_results
from sparseopt.benchmarks.dynamic_report import summary, write_report
from sparseopt.benchmarks.run_book import Row, RunBook, add_arguments, exit_code, key_of, read_rows, today
from sparseopt.benchmarks.train_settings import positive
from sparseopt.masks.apply import zero_inactive
from sparseopt.optim.dynamic.engine import DynamicSparsity
from sparseopt.progress import announce_device

__all__ = ["Corpus", "main", "make_corpus", "part_of", "read_texts"]

POLICIES = ("static", "set", "rigl")
PARTS = ("train", "validation", "held_out")
EXTENSIONS = 2  # rates that a best rate at the edge may add to the grid


# ---- texts -----------------------------------------------------------------------------------------------------------
def part_of(name: str) -> str:
    """Which part a document belongs to, by its name alone: eight tenths train, a tenth each the others."""
    digit = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % 10
    return {0: "held_out", 1: "validation"}.get(digit, "train")


def read_texts(folder: Path | None) -> dict[str, str]:
    """Documents by name: the ``.txt`` files of a folder, or what the installed packages and Python ship.

    Raises:
        FileNotFoundError: the folder has no ``.txt`` file.
    """
    if folder is None:
        return {**package_texts.python_texts(), **package_texts.texts()}
    found = {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt"))}
    if not found:
        raise FileNotFoundError(f"Folder {str(folder)!r} holds no .txt file.")
    return found


@dataclass(frozen=True)
class Corpus:
    """Windows of tokens.

    Attributes:
        windows: part -> int64[windows, seq] on the device; documents one after the other, each closed by an end-of-text token.
        documents: part -> how many documents.
        fingerprint: of all tokens.
    """

    windows: dict[str, Tensor]
    documents: dict[str, int]
    fingerprint: str

    def about(self) -> dict[str, Any]:
        return {
            "documents": self.documents,
            "tokens": {part: windows.numel() for part, windows in self.windows.items()},
            "fingerprint": self.fingerprint,
        }


def make_corpus(
    texts: Mapping[str, str], tokenizer: Any, seq: int, evaluation_windows: int, device: torch.device
) -> Corpus:
    """Tokenises documents and cuts each part into windows of ``seq`` tokens; of the parts that are evaluated,
    ``evaluation_windows`` at even distances stay.

    Raises:
        ValueError: a part has not one window.
    """
    windows: dict[str, Tensor] = {}
    documents = dict.fromkeys(PARTS, 0)
    digest = hashlib.sha256()
    for part in PARTS:
        tokens: list[int] = []
        for name, text in texts.items():
            if part_of(name) == part:
                documents[part] += 1
                tokens += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
                tokens.append(tokenizer.eos_token_id)
        count = len(tokens) // seq
        if not count:
            raise ValueError(f"the {part} documents have {len(tokens)} tokens, fewer than a window of {seq}.")
        table = torch.tensor(tokens[: count * seq]).view(count, seq)
        if part != "train" and count > evaluation_windows:
            table = table[torch.arange(evaluation_windows) * count // evaluation_windows]
        digest.update(table.numpy().tobytes())
        windows[part] = table.to(device)
    return Corpus(windows, documents, digest.hexdigest()[:16])


# ---- training --------------------------------------------------------------------------------------------------------
class Trial:
    """Trains one model again and again from the same weights.

    Args:
        name: of the model.
        corpus: what it reads.
        settings: those of the command line.
        device: where.
    """

    def __init__(self, name: str, corpus: Corpus, settings: Mapping[str, Any], device: torch.device) -> None:
        from sparseopt.models import load_model

        self.model: Any = load_model(name, settings["dtype"], device)
        self.begin = {key: value.cpu().clone() for key, value in self.model.state_dict().items()}
        self.corpus, self.settings, self.device = corpus, settings, device

    def loss(self, ids: Tensor) -> Tensor:
        """Mean over the predicted tokens, in fp32: int64[rows, seq] -> fp32[]."""
        logits = self.model(input_ids=ids, use_cache=False).logits[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())

    @torch.no_grad()
    def evaluate(self, part: str) -> float:
        """Mean loss over the windows of a part."""
        self.model.eval()
        batches = self.corpus.windows[part].split(self.settings["batch"])
        total = sum(float(self.loss(ids)) * len(ids) for ids in batches)
        return total / sum(map(len, batches))

    def before(self) -> dict[str, Any]:
        """Held-out loss of the model as it is, and once it is pruned."""
        self._restore()
        dense = self.evaluate("held_out")
        engine = self._engine("static", 0.0, 0, 1)
        for layer in engine.layers:
            zero_inactive(layer.param, engine.masks.packed(layer.name))
        return {"held_out_dense": dense, "held_out_pruned": self.evaluate("held_out"), "sparsity": engine.sparsity}

    def run(self, policy: str, rate: float, fraction: float, seed: int, steps: int, part: str) -> dict[str, Any]:
        """One training.

        Returns:
            ``curve`` ([step, loss on ``part``], from before the first step to the last one), ``loss`` (its end; None where
            the training diverged), ``train`` (mean loss of the last tenth), ``history`` of the masks, ``first_masks`` and
            ``order`` (fingerprints), ``step_ms``.
        """
        self._restore()
        engine = self._engine(policy, fraction, seed, steps)
        first = engine.masks.fingerprint
        optimizer = so.SparseAdamW(
            self.model.named_parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0, masks=engine.masks,
            unmasked="dense", max_grad_norm=1.0,
        )  # fmt: skip
        engine.start(optimizer)
        order = self._order(seed, steps)
        curve = [[0, self.evaluate(part)]]
        seen: list[Tensor] = []
        spent = 0.0
        for step in range(1, steps + 1):
            self.model.train()
            began = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = rate * schedule(step, steps)
            engine.begin_step(step)
            loss = self.loss(self.corpus.windows["train"][order[step - 1]])
            loss.backward()
            optimizer.step()
            self.model.zero_grad(set_to_none=True)
            engine.update(step)
            seen.append(loss.detach())
            del loss
            spent += time.perf_counter() - began
            if step % self.settings["evaluate_every"] == 0 or step == steps:
                curve.append([step, self.evaluate(part)])
        self._check(engine)
        train = float(torch.stack(seen[-max(1, steps // 10) :]).mean())
        finite = math.isfinite(train) and all(math.isfinite(value) for _, value in curve)
        digest = hashlib.sha256(order.cpu().numpy().tobytes()).hexdigest()[:16]
        engine.close()
        return {
            "curve": curve if finite else [], "loss": curve[-1][1] if finite else None, "train": train if finite else None,
            "history": engine.history, "first_masks": first, "order": digest, "step_ms": round(1e3 * spent / steps, 2),
        }  # fmt: skip

    def _engine(self, policy: str, fraction: float, seed: int, steps: int) -> DynamicSparsity:
        s = self.settings
        return DynamicSparsity(
            self.model, total_steps=steps, sparsity=s["sparsity"], policy=policy, interval=s["interval"],
            fraction=fraction, target="weights", distribution=s["distribution"], initial=s["initial"], seed=seed,
        )  # fmt: skip

    def _restore(self) -> None:
        self.model.load_state_dict(self.begin)
        self.model.zero_grad(set_to_none=True)
        gc.collect()  # the state of the training before

    def _order(self, seed: int, steps: int) -> Tensor:
        """int64[steps, batch]: windows of every step, each once before any comes again."""
        count, batch = len(self.corpus.windows["train"]), self.settings["batch"]
        generator = torch.Generator().manual_seed(seed)
        epochs = -(-steps * batch // count)
        drawn = torch.cat([torch.randperm(count, generator=generator) for _ in range(epochs)])
        return drawn[: steps * batch].view(steps, batch).to(self.device)

    def _check(self, engine: DynamicSparsity) -> None:
        """Inactive weights are 0, and as many are active as were asked for: otherwise no loss means anything."""
        wanted = round((1 - self.settings["sparsity"]) * sum(layer.numel for layer in engine.layers))
        if engine.masks.active_parameters != wanted:
            raise RuntimeError(f"{engine.masks.active_parameters:,} weights are active, expected {wanted:,}.")
        for layer in engine.layers:
            mask = engine.masks[layer.name].to(layer.param.device)
            if bool(layer.param.detach()[~mask].any()):
                raise RuntimeError(f"an inactive weight of {layer.name!r} is not 0.")


def schedule(step: int, steps: int) -> float:
    """Factor of the learning rate: linear warm-up over a twentieth, then a cosine down to a tenth; steps from 1."""
    warmup = max(1, steps // 20)
    if step <= warmup:
        return step / warmup
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


# ---- all runs --------------------------------------------------------------------------------------------------------
class Runner:
    """Runs what the book does not have yet: see :class:`sparseopt.benchmarks.run_book.RunBook`."""

    def __init__(self, book: RunBook, trial: Trial) -> None:
        self.book, self.trial, self.settings = book, trial, book.about["settings"]

    def finish(self, phase: str, runs: Sequence[tuple[str, float, float, int, int]]) -> bool:
        """Makes sure that runs of a phase, each (policy, rate, fraction, seed, steps), are done; False where time is up."""

        part = "held_out" if phase == "final" else "validation"

        def task(policy: str, rate: float, fraction: float, seed: int, steps: int) -> Callable[[], Row]:
            about = {"phase": phase, "arm": policy, "rate": rate, "fraction": fraction, "seed": seed, "steps": steps}
            if phase == "before":
                return lambda: {**about, **self.trial.before()}
            return lambda: {**about, **self.trial.run(policy, rate, fraction, seed, steps, part)}

        key = functools.partial(key_of, self.settings, phase, sort_keys=True)
        return self.book.finish_all({key(*each): task(*each) for each in runs})

    def everything(
        self, rates: Sequence[float], fractions: Sequence[float], policies: Sequence[str], seeds: Sequence[int]
    ) -> bool:
        """The rate, the fractions, then all policies seed by seed; False where time was up before the end."""
        steps, grid_seed = self.settings["steps"], self.settings["grid_seed"]
        if not self.finish("before", [("none", 0.0, 0.0, 0, 0)]):
            return False
        tried, rate = list(rates), rates[0]
        for _ in range(1 + EXTENSIONS) if len(rates) > 1 else ():
            if not self.finish("rates", [("static", r, 0.0, grid_seed, self.settings["grid_steps"]) for r in tried]):
                return False
            rate = self._best("rates", "static", "rate")
            if min(tried) < rate < max(tried):
                break
            # A best rate at the edge: the next one beyond it is tried too.
            tried.append(rate * 3 if rate == max(tried) else rate / 3)
        changing = [policy for policy in policies if policy != "static"]
        if len(fractions) > 1 and not self.finish(
            "fractions", [(p, rate, f, grid_seed, steps) for p in changing for f in fractions]
        ):
            return False
        chosen = dict.fromkeys(policies, fractions[0]) | {"static": 0.0}
        if len(fractions) > 1:
            chosen |= {policy: self._best("fractions", policy, "fraction") for policy in changing}
        # Seed by seed, so that a run cut short compares policies on the same ones.
        return self.finish("final", [(p, rate, chosen[p], seed, steps) for seed in seeds for p in policies])

    def _best(self, phase: str, policy: str, key: str) -> float:
        """The rate or fraction of least validation loss; the smaller one of two that are equal."""
        grid = [row for row in self.book.rows.values() if row["phase"] == phase and row["arm"] == policy]
        if finite := [row for row in grid if row["loss"] is not None]:
            return min(finite, key=lambda row: (row["loss"], row[key]))[key]
        raise RuntimeError(f"every run of {policy} that was to choose its {key} diverged: give lower --rates.")


def _line(row: Row) -> str:
    shown = row.get("loss", row.get("held_out_pruned"))
    return (
        f"{row['phase']}: {row['arm']}, rate {row['rate']:g}, fraction {row['fraction']:g}, seed {row['seed']}: loss {shown} "
        f"({row['seconds']:.1f} s)"
    )


def run(options: argparse.Namespace) -> bool:
    """Runs, or goes on with, what the options ask for; returns whether it is complete."""
    from sparseopt.models import load_tokenizer

    began = time.monotonic()
    device = announce_device(options.device)
    corpus = make_corpus(
        read_texts(options.texts), load_tokenizer(options.model), options.seq, options.evaluation_windows, device
    )
    folder = Path(options.model)
    keys = ("dtype", "steps", "grid_steps", "grid_seed", "batch", "seq", "sparsity", "interval", "distribution", "initial",
            "evaluate_every", "evaluation_windows")  # fmt: skip
    settings = {
        "model": folder.resolve().name if folder.is_dir() else options.model, "corpus": corpus.about(),
        **{key: getattr(options, key) for key in keys}, "target": "weights", "betas": [0.9, 0.95],
        "weight_decay": 0.0, "max_grad_norm": 1.0, "schedule": "5% warm-up, cosine to a tenth",
    }  # fmt: skip
    about = {
        "settings": settings, "environment": train_results.environment(device),
        "date": today(), "commit": options.commit or train_results.commit(),
    }  # fmt: skip
    book = RunBook(options.output / "runs.jsonl", about, _line, time_limit=options.time_limit, began=began)
    return Runner(book, Trial(options.model, corpus, settings, device)).everything(
        options.rates, options.fractions, options.policies, options.seeds
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sparseopt.benchmarks.dynamic_learning", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="where runs and results go")
    parser.add_argument("--model", default="smollm2", help="smollm2, a local folder or a Hub name (%(default)s)")
    parser.add_argument("--texts", type=Path, metavar="FOLDER", help=".txt files in place of the packages' own texts")
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES), metavar="POLICY")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--rates", nargs="+", type=float, default=[3e-4, 1e-3, 3e-3], help="one: no grid")
    parser.add_argument("--grid_seed", type=int, default=0)
    parser.add_argument("--grid_steps", type=positive, default=200, help="of a run that chooses the rate (%(default)s)")
    parser.add_argument("--steps", type=positive, default=600, help="optimizer steps of a run (%(default)s)")
    parser.add_argument("--batch", type=positive, default=8, help="windows a step (%(default)s)")
    parser.add_argument("--seq", type=positive, default=512, help="tokens of a window (%(default)s)")
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--interval", type=positive, default=50, help="steps between mask updates (%(default)s)")
    parser.add_argument(
        "--fractions",
        nargs="+",
        type=float,
        default=[0.03, 0.1, 0.3],
        help="of the active weights, exchanged at first; one: no grid",
    )
    parser.add_argument("--distribution", default="uniform", choices=("uniform", "erk", "global"))
    parser.add_argument(
        "--initial", default="magnitude", choices=("magnitude", "random"), help="first masks (%(default)s)"
    )
    parser.add_argument("--evaluate_every", type=positive, default=100)
    parser.add_argument("--evaluation_windows", type=positive, default=96)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--device", default="auto")
    add_arguments(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code: 0 complete, 1 failed, 3 stopped at the time limit (repeat to go on)."""
    options = _parser().parse_args(arguments)

    def work() -> bool:
        options.output.mkdir(parents=True, exist_ok=True)
        complete = options.report or run(options)
        rows = read_rows(options.output / "runs.jsonl")
        if complete or any(row["phase"] == "final" for row in rows):
            found = summary(rows)
            atomic_write(options.output / "dynamic_learning.json", json.dumps(found, indent=1, allow_nan=False) + "\n")
            print(write_report(found, options.output, picture=not options.no_picture))
        return complete

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
