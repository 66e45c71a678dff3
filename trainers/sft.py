"""``sparseopt train sft``: supervised fine-tuning with TRL's SFTTrainer, the cold start before preferences or rewards.

Each row is a conversation whose last answer is learned. The run folder is described in :mod:`sparseopt.trainers.run`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from transformers import Trainer
from trl import SFTConfig, SFTTrainer

from sparseopt import data, evaluate
from sparseopt.progress import Progress
from sparseopt.trainers.dpo import GYM_ROWS, greedy_answers, greedy_summary, gym_options, hold_out
from sparseopt.trainers.run import Config, Run

__all__ = ["SftRun", "run"]


def run(config: Config) -> Path:
    """Runs a whole fine-tuning job; returns its folder.

    Args:
        config: the sections of :data:`sparseopt.schemas.SFT`.

    Raises:
        KeyboardInterrupt: stopped by the user; a checkpoint was saved and ``training.resume`` continues from it.
    """
    return SftRun(config).execute()


class SftRun(Run):
    method = "sft"

    def load_data(self) -> str:
        settings, seed = self.config["data"], self.data_seed
        name = settings["name"]
        if name.startswith("reasoning_gym:"):
            options = gym_options(settings)
            self.rows, self.held_out = (
                [_split(dict(row)) for row in data.load_sft_dataset(name, split, size=size, seed=seed, **options)]
                for split, size in (("train", settings["n_train"] or GYM_ROWS), ("test", settings["n_eval"]))
            )
        else:
            rows = [_split(dict(row)) for row in data.load_sft_dataset(name)]
            self.rows, self.held_out = hold_out(rows, settings, seed)
        return f"Data: {len(self.rows):,} conversations to train on, {len(self.held_out):,} held out."

    def arguments(self) -> SFTConfig:
        settings = self.config["training"]
        return SFTConfig(**self.common_arguments(), max_length=settings["max_length"], packing=settings["packing"])

    def make_trainer(self, arguments: SFTConfig, **options: Any) -> Trainer:
        from datasets import Dataset

        rows = [{key: row[key] for key in ("prompt", "completion")} for row in self.rows]
        return SFTTrainer(model=self.model, args=arguments, train_dataset=Dataset.from_list(rows), **options)

    def evaluate(self, model: Any, when: str) -> dict[str, Any]:
        settings, rows = self.config["evaluation"], self.held_out
        with Progress(f"evaluate {when}", len(rows), unit="conversation") as progress:
            result = evaluate.completion_loss(
                model, self.tokenizer, rows, settings["batch_size"],
                progress=lambda done, total: progress.update(completed=done),
            )  # fmt: skip
        asked = [{**row, "chosen": row["completion"], "rejected": row["completion"]} for row in rows]
        result.update(greedy_answers(model, self.tokenizer, asked[: settings["n_generate"]], settings, when))
        return result

    def summary(self, before: dict[str, Any], after: dict[str, Any]) -> str:
        text = f"Held-out loss {before['loss']:.3f} -> {after['loss']:.3f}"
        text += f", perplexity {math.exp(before['loss']):.2f} -> {math.exp(after['loss']):.2f}"
        text += greedy_summary(before, after)
        return f"{text}. Entries outside the mask: bit-identical." if self.way == "sparse" else f"{text}."


def _split(row: dict[str, Any]) -> dict[str, Any]:
    """A row with ``prompt`` and ``completion``: of a conversation, everything before its last message, and that."""
    if "messages" not in row:
        return row
    *before, last = row["messages"]
    return {**{k: v for k, v in row.items() if k != "messages"}, "prompt": before, "completion": [last]}
