"""``sparseopt train dpo``: direct preference optimization with TRL's DPOTrainer.

The reference costs no memory: under a mask its log-probabilities come from the policy's own weights with the active
entries swapped back (:mod:`sparseopt.trainers.reference`), or from one pass before training; LoRA switches its adapter off.
The run folder is described in :mod:`sparseopt.trainers.run`.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from transformers import Trainer
from trl import DPOConfig, DPOTrainer

from sparseopt import data, evaluate
from sparseopt.progress import Progress
from sparseopt.trainers import processes
from sparseopt.trainers.reference import share_reference
from sparseopt.trainers.run import Config, Run

__all__ = ["DpoRun", "run"]


def run(config: Config) -> Path:
    """Runs a whole DPO job; returns its folder.

    Args:
        config: the sections of :data:`sparseopt.schemas.DPO`.

    Raises:
        KeyboardInterrupt: stopped by the user; a checkpoint was saved and ``training.resume`` continues from it.
    """
    return DpoRun(config).execute()


class DpoRun(Run):
    method = "dpo"

    def load_data(self) -> str:
        self.pairs, self.held_out = load_pairs(self.config["data"], self.data_seed)
        return f"Data: {len(self.pairs):,} pairs to train on, {len(self.held_out):,} held out."

    @property
    def reference(self) -> str:
        """ "swap", "precompute", or "adapter" (LoRA: the model with its adapter switched off)."""
        wanted = self.config["training"]["reference"]
        if self.way == "lora":
            return "adapter"
        if wanted == "swap" and self.way == "dense":
            raise ValueError("training.reference=swap needs a mask: in full training the base is a whole second model.")
        return ("swap" if self.way == "sparse" else "precompute") if wanted == "auto" else wanted

    def arguments(self) -> DPOConfig:
        settings = self.config["training"]
        return DPOConfig(
            **self.common_arguments(),
            beta=settings["beta"],
            loss_type=list(settings["loss_type"]),
            loss_weights=list(settings["loss_weights"]) or None,
            max_length=settings["max_length"],
            # Also keeps TRL from loading a second model.
            precompute_ref_log_probs=self.reference != "adapter",
            precompute_ref_batch_size=self.config["evaluation"]["batch_size"],
        )

    def make_trainer(self, arguments: DPOConfig, **options: Any) -> Trainer:
        kinds: dict[str, Any] = {
            "swap": _MeasuredInTraining,
            "precompute": _reference_once(self.pairs),
            "adapter": DPOTrainer,
        }
        return kinds[self.reference](
            model=self.model, args=arguments, train_dataset=data.to_dataset(self.pairs), **options
        )

    def prepare(self, trainer: Trainer) -> None:
        if self.reference == "swap":
            share_reference(trainer)

    def evaluate(self, model: Any, when: str) -> dict[str, Any]:
        settings, pairs = self.config["evaluation"], self.held_out
        logps = None if when == "before" else self.before["_logps"]
        with Progress(f"evaluate {when}", len(pairs), unit="pair") as progress:
            result = evaluate.evaluate_preferences(
                model, self.tokenizer, pairs, self.config["training"]["beta"],
                None if logps is None else (torch.tensor(logps[0]), torch.tensor(logps[1])), settings["batch_size"],
                progress=lambda done, total: progress.update(completed=done),
            )  # fmt: skip
        result["_logps"] = [result.pop("chosen_logps").tolist(), result.pop("rejected_logps").tolist()]
        result.update(greedy_answers(model, self.tokenizer, pairs[: settings["n_generate"]], settings, when))
        return result

    def summary(self, before: dict[str, Any], after: dict[str, Any]) -> str:
        text = f"Held-out reward accuracy {before['reward_accuracy']:.3f} -> {after['reward_accuracy']:.3f}"
        text += f", margin {before['margin']:.2f} -> {after['margin']:.2f}"
        text += greedy_summary(before, after)
        return f"{text}. Entries outside the mask: bit-identical." if self.way == "sparse" else f"{text}."


# ---- what methods share about data and evaluation ------------------------------------------------------------------------
def gym_options(settings: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of :mod:`sparseopt.data` for a reasoning-gym task."""
    style = dict(settings["style"])
    if style.get("example"):
        style["example"] = tuple(style["example"])
    return {"task_config": settings["options"], "style": data.PromptStyle(**style)}


def hold_out(rows: Sequence[dict[str, Any]], settings: dict[str, Any], seed: int) -> tuple[list[Any], list[Any]]:
    """(rows to train on, held-out rows) of a table, shuffled; no prompt is in both."""
    n_train, n_eval, name = settings["n_train"], settings["n_eval"], settings["name"]
    unique = list({json.dumps(row["prompt"]): row for row in rows}.values())
    if len(unique) < n_eval + 1:
        raise ValueError(
            f"{name!r} has {len(unique)} different prompts, too few to hold out data.n_eval={n_eval} of them."
        )
    order = torch.randperm(len(unique), generator=torch.Generator().manual_seed(seed)).tolist()
    shuffled = [unique[i] for i in order]
    return shuffled[n_eval:][:n_train], shuffled[:n_eval]


GYM_ROWS = 1000  # of a reasoning-gym task, which has no end, unless data.n_train says another number


def load_pairs(settings: dict[str, Any], seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(training pairs, held-out pairs); no prompt is in both."""
    name = settings["name"]
    if name.startswith("reasoning_gym:"):
        task, options = name.removeprefix("reasoning_gym:"), gym_options(settings)
        return (
            data.preference_pairs(task, settings["n_train"] or GYM_ROWS, seed, "train", **options),
            data.preference_pairs(task, settings["n_eval"], seed, "test", **options),
        )
    return hold_out([dict(row) for row in data.load_preference_dataset(name)], settings, seed)


def greedy_answers(model: Any, tokenizer: Any, asked: list[dict[str, Any]], settings: dict[str, Any], when: str,
                   tokens: int | None = None) -> dict[str, Any]:  # fmt: skip
    """``greedy`` (exact match with its interval) and ``answers`` (the first few); nothing if nothing is asked."""
    if not asked:
        return {}
    with Progress(f"generate {when}", len(asked), unit="answer") as progress:
        greedy = evaluate.greedy_exact_match(
            model, tokenizer, asked, settings["max_new_tokens"] or tokens, settings["batch_size"],
            progress=lambda done, total: progress.update(completed=done),
        )  # fmt: skip
    answers = greedy.pop("answers")
    return {"greedy": greedy, "answers": answers[:5], "_answers": answers}


def greedy_summary(before: dict[str, Any], after: dict[str, Any]) -> str:
    if "greedy" not in after:
        return ""
    return f", greedy exact match {before['greedy']['exact_match']:.2f} -> {after['greedy']['exact_match']:.2f}"


# ---- trainers ------------------------------------------------------------------------------------------------------------
class _MeasuredInTraining(DPOTrainer):
    """DPOTrainer without a reference pass of its own: :func:`share_reference` measures each batch as it comes."""

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        return dataset


def _reference_once(pairs: list[dict[str, Any]]) -> type[DPOTrainer]:
    """DPOTrainer that measures the reference with :func:`sparseopt.evaluate.sequence_logps`: the same numbers, several
    times faster where prompts begin alike, since what they share is computed once. Only that one step is replaced, and
    TRL's own runs wherever rows were dropped or would be truncated."""

    class ReferenceOnce(DPOTrainer):
        def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
            model: Any = self.model
            tokenizer: Any = self.processing_class
            limit: int | None = cast(DPOConfig, self.args).max_length
            tokens = [evaluate.tokenize_pair(tokenizer, pair) for pair in pairs]
            longest = max(len(prompt) + max(len(chosen), len(rejected)) for prompt, chosen, rejected in tokens)
            if len(dataset) != len(pairs) or longest > (limit or longest):
                with _readable_by_all(dataset, Path(cast(str, self.args.output_dir)) / ".reference.tmp") as readable:
                    measured = super()._precompute_ref_logps(readable, name, batch_size)
                    columns = {key: list(measured[key]) for key in ("ref_chosen_logps", "ref_rejected_logps")}
                for key, values in columns.items():
                    dataset = dataset.add_column(key, values)
                return dataset
            own = processes.share_of(pairs)
            with Progress("reference", len(own), unit="pair") as progress:
                measured = evaluate.sequence_logps(
                    model, tokenizer, own, batch_size,
                    progress=lambda done, total: progress.update(completed=done),
                )  # fmt: skip
            chosen, rejected = processes.put_together(torch.stack(measured), len(pairs))
            with_chosen = dataset.add_column("ref_chosen_logps", chosen.tolist())
            return with_chosen.add_column("ref_rejected_logps", rejected.tolist())

    return ReferenceOnce


@contextlib.contextmanager
def _readable_by_all(dataset: Any, folder: Path) -> Iterator[Any]:
    """The dataset, of several processes one in files: there the first one leaves the others what TRL measures."""
    from datasets import load_from_disk

    if not processes.several():
        yield dataset
        return
    if processes.is_first():
        dataset.save_to_disk(folder)
    processes.wait()
    yield load_from_disk(folder)
    processes.wait()
    if processes.is_first():
        shutil.rmtree(folder)
