"""``sparseopt train grpo``: group relative policy optimization with TRL's GRPOTrainer and verifiable rewards.

With ``training.beta`` above 0 the reference costs no memory under a mask: its log-probabilities come from the policy's own
weights with the active entries swapped back (:mod:`sparseopt.trainers.reference`). ``completions.jsonl`` keeps a sample of
what was generated, with its rewards. The rest of the run folder is described in :mod:`sparseopt.trainers.run`.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import math
import statistics
from collections.abc import Awaitable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

from transformers import Trainer
from trl import GRPOConfig, GRPOTrainer

from sparseopt import data, rewards
from sparseopt.trainers.dpo import GYM_ROWS, greedy_answers, gym_options, hold_out
from sparseopt.trainers.reference import share_reference
from sparseopt.trainers.run import Config, Run

__all__ = ["GrpoRun", "run"]


def run(config: Config) -> Path:
    """Runs a whole GRPO job; returns its folder.

    Args:
        config: the sections of :data:`sparseopt.schemas.GRPO`.

    Raises:
        KeyboardInterrupt: stopped by the user; a checkpoint was saved and ``training.resume`` continues from it.
    """
    return GrpoRun(config).execute()


class GrpoRun(Run):
    method = "grpo"
    least: ClassVar[dict[str, dict[str, int]]] = {
        **Run.least,
        "rewards": {"completions": 0},
        "training": {**Run.least["training"], "num_generations": 2, "max_completion_length": 1, "num_iterations": 1},
    }

    def load_data(self) -> str:
        settings, seed = self.config["data"], self.data_seed
        self.functions, self.weights, self.names = rewards.load_rewards(self.config["rewards"]["functions"])
        name = settings["name"]
        if name.startswith("reasoning_gym:"):
            options = gym_options(settings)
            self.rows, self.held_out = (
                [dict(row) for row in data.load_prompt_dataset(name, split, size=size, seed=seed, **options)]
                for split, size in (("train", settings["n_train"] or GYM_ROWS), ("test", settings["n_eval"]))
            )
        else:
            rows = [dict(row) for row in data.load_prompt_dataset(name)]
            self.rows, self.held_out = hold_out(rows, settings, seed)
        return f"Data: {len(self.rows):,} prompts to train on, {len(self.held_out):,} held out."

    def arguments(self) -> GRPOConfig:
        settings, common = self.config["training"], self.common_arguments()
        # A micro-batch is counted in prompts here, in completions by TRL.
        common["per_device_train_batch_size"] = settings["batch_size"] * settings["num_generations"]
        return GRPOConfig(
            **common,
            num_generations=settings["num_generations"],
            max_completion_length=settings["max_completion_length"],
            temperature=settings["temperature"],
            top_p=settings["top_p"],
            num_iterations=settings["num_iterations"],
            # Under a mask TRL must not load a second model: the swap takes its place (prepare).
            beta=0.0 if self.way == "sparse" else settings["beta"],
            loss_type=settings["loss_type"],
            scale_rewards=settings["scale_rewards"],
            reward_weights=self.weights,
            # The table of completions is for trackers. TRL prints it too, on stdout, where the command's result goes: of a
            # negative number (0 would be an empty table now and then) it prints nothing, and the trackers get all of it.
            log_completions=bool(self.config["tracking"]["report_to"]),
            num_completions_to_print=-1,
        )

    def make_trainer(self, arguments: GRPOConfig, **options: Any) -> Trainer:
        from datasets import Dataset

        self.recorded = rewards.RecordedRewards(
            self.functions, self.names, self.folder.path / "completions.jsonl", self.config["rewards"]["completions"],
        )  # fmt: skip
        return GRPOTrainer(
            model=self.model, args=arguments, train_dataset=Dataset.from_list(self.rows),
            reward_funcs=self.recorded.functions, **options,
        )  # fmt: skip

    def prepare(self, trainer: Trainer) -> None:
        beta = self.config["training"]["beta"]
        if self.way == "sparse" and beta:
            share_reference(trainer, beta)

    def evaluate(self, model: Any, when: str) -> dict[str, Any]:
        """Rewards of greedy answers to the held-out prompts."""
        settings, rows = self.config["evaluation"], self.held_out
        asked = [
            {
                "prompt": row["prompt"],
                **{side: [{"role": "assistant", "content": row["answer"]}] for side in ("chosen", "rejected")},
                **({"entry": json.loads(row["entry"])} if row.get("entry") else {}),
            }
            for row in rows
        ]
        if isinstance(rows[0]["prompt"], str):
            asked = [
                {**pair, "chosen": row["answer"], "rejected": row["answer"]}
                for pair, row in zip(asked, rows, strict=True)
            ]
        tokens = self.config["training"]["max_completion_length"]
        result = greedy_answers(model, self.tokenizer, asked, settings, when, tokens)
        said = result["_answers"]
        completions = (
            said if isinstance(rows[0]["prompt"], str) else [[{"role": "assistant", "content": t}] for t in said]
        )
        columns = {key: [row[key] for row in rows] for key in rows[0] if key != "prompt"}
        given = _call(self.functions, prompts=[row["prompt"] for row in rows], completions=completions, **columns)
        each = dict(zip(self.names, given, strict=True))
        sums = [
            sum(w * (r if r is not None else 0.0) for w, r in zip(self.weights, values, strict=True))
            for values in zip(*each.values(), strict=True)
        ]
        mean, half = statistics.fmean(sums), 1.96 * statistics.stdev(sums) / math.sqrt(len(sums))
        result.update(reward=mean, reward_ci=(mean - half, mean + half), n=len(rows))
        result["rewards"] = {
            name: statistics.fmean([v for v in values if v is not None] or [0.0]) for name, values in each.items()
        }
        return result

    def summary(self, before: dict[str, Any], after: dict[str, Any]) -> str:
        text = f"Held-out reward of greedy answers {before['reward']:.3f} -> {after['reward']:.3f}"
        return f"{text}. Entries outside the mask: bit-identical." if self.way == "sparse" else f"{text}."


def _call(functions: Sequence[Any], **inputs: Any) -> list[Sequence[float | None]]:
    """What each reward function returns; coroutines run beside one another, as in TRL."""

    async def finish(waiting: dict[int, Awaitable[Any]]) -> list[Any]:
        return await asyncio.gather(*waiting.values())

    results = [function(**inputs) for function in functions]
    waiting = {i: result for i, result in enumerate(results) if inspect.isawaitable(result)}
    if waiting:
        # In a thread of its own: the caller's may have a running event loop already (notebooks).
        with ThreadPoolExecutor(1) as thread:
            finished = thread.submit(asyncio.run, finish(waiting)).result()
        for i, result in zip(waiting, finished, strict=True):
            results[i] = result
    return results
