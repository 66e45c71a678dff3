"""Real rows for :mod:`sparseopt.benchmarks.train_step`: batches of preference pairs, sampled completions.

Sequences are padded behind, to the longest of their micro-batch: under causal attention no token sees the padding, so
that no attention mask is needed and every arm runs the kernels it would run without padding. Where layers are compiled,
all micro-batches get one shape: nothing is compiled within the timed steps. What depends on the starting weights only
(DPO's reference, GRPO's completions) is computed once, before any arm is timed.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparseopt.benchmarks import train_results
from sparseopt.benchmarks.train_arms import CheckError
from sparseopt.benchmarks.train_settings import DATA, Settings
from sparseopt.benchmarks.train_weights import load_tokenizer, without_dropout
from sparseopt.benchmarks.train_work import log_probs, policy_loss, preference_loss
from sparseopt.progress import Progress

__all__ = ["MicroBatch", "Work", "prepare"]

SEED = 0
TEMPERATURE = 1.0
Tokens = list[int]


# ---- work ------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class MicroBatch:
    """Sequences of one forward pass.

    Attributes:
        ids: int64[rows, length]; of pairs all chosen sequences, then all rejected ones.
        inside: bool[rows, count], which of the last ``count`` positions are an answer's.
        values: reference log-probabilities fp32[rows] (dpo), or advantages fp32[rows, 1] (grpo).
        tokens: without padding.
    """

    ids: Tensor
    inside: Tensor
    values: Tensor
    tokens: int

    def summed(self, model: nn.Module) -> Tensor:
        """Log-probability of each answer: fp32[rows]."""
        return (log_probs(model, self.ids, self.inside.shape[1]) * self.inside).sum(1)


@dataclass(frozen=True)
class Work:
    """All micro-batches, in the order of their rows; steps go round them.

    Attributes:
        workload: "dpo" or "grpo".
        accumulation: micro-batches of a step.
        about: facts on the data, for the results.
        generation: on the completions (grpo), else None.
    """

    workload: str
    accumulation: int
    micro_batches: Sequence[MicroBatch]
    about: dict[str, Any]
    generation: dict[str, Any] | None

    def batches(self, step: int) -> list[MicroBatch]:
        """Those of a step; steps may be negative (what comes before the first)."""
        return [self.micro_batches[i] for i in _turn(step, self.accumulation, len(self.micro_batches))]

    def losses(self, model: nn.Module, step: int) -> list[Callable[[], Tensor]]:
        """The loss of each micro-batch of a step, divided by their number."""
        return [lambda batch=batch: self._loss(model, batch) for batch in self.batches(step)]  # type: ignore[misc]

    def _loss(self, model: nn.Module, batch: MicroBatch) -> Tensor:
        if self.workload == "dpo":
            loss = preference_loss(batch.summed(model), batch.values)
        else:
            loss = policy_loss(log_probs(model, batch.ids, batch.inside.shape[1]), batch.values, batch.inside)
        return loss / self.accumulation

    def tokens(self, step: int) -> int:
        return sum(batch.tokens for batch in self.batches(step))

    def moves(self, steps: range) -> bool:
        """Whether any of these steps has a gradient: equal rewards in every group give none."""
        return self.workload == "dpo" or any(bool(b.values.any()) for step in steps for b in self.batches(step))

    def check_first(self, loss: Tensor) -> None:
        """Raises CheckError unless the loss of an untrained policy is DPO's: ln 2, policy and reference being equal."""
        value = float(loss) * self.accumulation
        if self.workload == "dpo" and not abs(value - math.log(2)) < 0.05:
            raise CheckError(f"the first DPO loss is {value:.4f}, not ln 2: the reference differs from the policy")


def _turn(step: int, accumulation: int, count: int) -> list[int]:
    return [(step * accumulation + i) % count for i in range(accumulation)]


def prepare(settings: Settings, model: Any, device: torch.device, fixed: bool) -> Work:
    """Loads and tokenises the rows and computes what depends on the starting weights.

    Args:
        settings: with ``data``.
        model: with the starting weights.
        device: where it is.
        fixed: give all micro-batches one shape.

    Raises:
        FileNotFoundError, FormatError: as :mod:`sparseopt.data`.
        ValueError: no rows, fewer than asked for or than a batch, columns are missing, no chat template.
    """
    tokenizer = load_tokenizer(settings)
    rows = _load_rows(settings)
    subset = len(rows)
    # No more of them than all steps see: warm-up, the step whose gradients are counted, and the timed ones.
    rows = rows[: settings.batch * settings.accumulation * (settings.warmup + 1 + settings.rounds)]
    _check_template(tokenizer, rows, settings)
    groups = [
        [rows[(start + i) % len(rows)] for i in range(settings.batch)] for start in range(0, len(rows), settings.batch)
    ]
    model.eval()
    without_dropout(model)
    generation: dict[str, Any] | None = None
    cut = [0]
    with torch.no_grad():
        if settings.workload == "dpo":
            sequences = [_pairs(tokenizer, group, settings, cut) for group in groups]
            values = None
        else:
            sequences, values, generation = _sample(model, tokenizer, groups, settings, device, cut)
        _check_vocabulary(model, sequences, settings)
        micro_batches = _batches(sequences, values, _pad(tokenizer), device, fixed)
        if values is None:
            micro_batches = _with_reference(model, micro_batches)
    lengths = [len(prompt) + len(answer) for group in sequences for prompt, answer in group]
    tokens = {"min": min(lengths), "median": int(statistics.median(lengths)), "max": max(lengths)}
    padded = "the longest sequence" if fixed else "the longest sequence of a micro-batch"
    about = {"subset": subset, "rows": len(rows), "cut": cut[0], "tokens": tokens, "padded_to": padded}
    return Work(settings.workload, settings.accumulation, micro_batches, about, generation)


# ---- rows ------------------------------------------------------------------------------------------------------------
def _load_rows(settings: Settings) -> list[dict[str, Any]]:
    from sparseopt import data

    source, usual = settings.data, DATA[settings.workload][1]
    assert source is not None
    load = data.load_preference_dataset if settings.workload == "dpo" else data.load_prompt_dataset
    # Tables give what they have; a generated task has no end.
    size = settings.subset
    if size is None and source.startswith("reasoning_gym:"):
        size = max(usual, settings.batch)
    rows = load(source, "train", size=size, seed=SEED)
    rows = [dict(row) for row in rows.select(range(min(len(rows), size or max(usual, settings.batch))))]
    if not rows:
        raise ValueError(f"Dataset {source!r} has no rows.")
    if len(rows) < settings.batch:
        raise ValueError(f"Dataset {source!r} has {len(rows)} rows, less than one batch of {settings.batch}.")
    return rows


def _check_template(tokenizer: Any, rows: list[dict[str, Any]], settings: Settings) -> None:
    if not isinstance(rows[0]["prompt"], str) and getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            f"The tokenizer of {settings.model!r} has no chat template, which the conversations of {settings.data!r} need."
        )


def _check_vocabulary(model: Any, sequences: list[list[tuple[Tokens, Tokens]]], settings: Settings) -> None:
    largest = max(max(prompt + answer) for group in sequences for prompt, answer in group)
    size = model.get_input_embeddings().num_embeddings
    if largest >= size:
        raise ValueError(
            f"The tokenizer of {settings.model!r} gives token {largest}, but the model has {size}: they do not belong "
            "together."
        )


def _pad(tokenizer: Any) -> int:
    return int(tokenizer.pad_token_id or 0)


def _pairs(
    tokenizer: Any, group: list[dict[str, Any]], settings: Settings, cut: list[int]
) -> list[tuple[Tokens, Tokens]]:
    """(prompt, answer) of all chosen, then all rejected, each of at most ``seq`` tokens: prompts lose their beginning."""
    from sparseopt.evaluate import tokenize_pair

    sides: tuple[list[tuple[Tokens, Tokens]], ...] = ([], [])
    for row in group:
        prompt, *answers = tokenize_pair(tokenizer, row)
        if not prompt or not all(answers):
            raise ValueError(f"Dataset {settings.data!r} has a row with an empty prompt or answer: {str(row)[:80]!r}.")
        longest = max(map(len, answers))
        cut[0] += len(prompt) + longest > settings.seq
        kept = min(longest, settings.seq - 1)
        prompt = prompt[-(settings.seq - kept) :]
        for side, answer in zip(sides, answers, strict=True):
            side.append((prompt, answer[:kept]))
    return [*sides[0], *sides[1]]


def _batches(
    sequences: list[list[tuple[Tokens, Tokens]]],
    values: list[Tensor] | None,
    pad: int,
    device: torch.device,
    fixed: bool,
) -> list[MicroBatch]:
    whole = [row for group in sequences for row in group]
    result = []
    for number, group in enumerate(sequences):
        span = whole if fixed else group
        length = max(len(prompt) + len(answer) for prompt, answer in span)
        start = min(len(prompt) for prompt, _ in span)  # all that is predicted lies behind it
        ids = torch.full((len(group), length), pad)
        inside = torch.zeros(len(group), length, dtype=torch.bool)
        for row, (prompt, answer) in enumerate(group):
            end = len(prompt) + len(answer)
            ids[row, :end] = torch.tensor(prompt + answer)
            inside[row, len(prompt) : end] = True
        own = torch.zeros(len(group)) if values is None else values[number]
        count = sum(len(prompt) + len(answer) for prompt, answer in group)
        result.append(MicroBatch(ids.to(device), inside[:, start:].to(device), own.to(device), count))
    return result


def _with_reference(model: nn.Module, micro_batches: list[MicroBatch]) -> list[MicroBatch]:
    result = []
    with Progress("reference", len(micro_batches), unit="batch") as progress:
        for batch in micro_batches:
            result.append(MicroBatch(batch.ids, batch.inside, batch.summed(model), batch.tokens))
            progress.update()
    return result


# ---- completions -----------------------------------------------------------------------------------------------------
def _sample(
    model: Any,
    tokenizer: Any,
    groups: list[list[dict[str, Any]]],
    settings: Settings,
    device: torch.device,
    cut: list[int],
) -> tuple[list[list[tuple[Tokens, Tokens]]], list[Tensor], dict[str, Any]]:
    """(prompt, completion) of each micro-batch, its advantages fp32[rows, 1], and facts on generation."""
    sequences, advantages, rewards, milliseconds, counts = [], [], [], [], []
    most = settings.max_completion_length
    with Progress("generation", len(groups), unit="batch") as progress:
        for number, group in enumerate(groups):
            prompts = [_prompt_ids(tokenizer, row["prompt"]) for row in group]
            if not all(prompts):
                raise ValueError(f"Dataset {settings.data!r} has an empty prompt.")
            cut[0] += sum(len(prompt) > settings.seq - most for prompt in prompts)
            prompts = [prompt[-(settings.seq - most) :] for prompt in prompts]
            if number == 0:
                _generate(model, tokenizer, prompts, settings, device, min(most, 4))  # warm-up
            start = time.perf_counter()
            completions = _generate(model, tokenizer, prompts, settings, device, most, SEED + number)
            milliseconds.append(1e3 * (time.perf_counter() - start))
            counts.append(sum(map(len, completions)))
            repeated = [i for i in range(len(group)) for _ in range(settings.num_generations)]
            given = _rewards(tokenizer, [group[i] for i in repeated], completions)
            grouped = given.view(len(group), -1)
            spread = grouped.std(1, keepdim=True)
            advantages.append(((grouped - grouped.mean(1, keepdim=True)) / (spread + 1e-4)).view(-1, 1))
            rewards.append(grouped)
            sequences.append([(prompts[i], completion) for i, completion in zip(repeated, completions, strict=True)])
            progress.update(reward=float(given.mean()))
    every = torch.cat(rewards)
    steps = [_turn(step, settings.accumulation, len(groups)) for step in range(settings.rounds)]
    seen = [sum(milliseconds[i] for i in step) for step in steps]
    tokens = sum(counts[i] for step in steps for i in step)
    facts = {
        "step": train_results.quantiles(seen),
        "completions": settings.batch * settings.accumulation * settings.num_generations,
        "tokens_per_completion": round(sum(counts) / every.numel(), 2),
        "tokens_per_second": round(1e3 * tokens / sum(seen), 2),
        "mean_reward": round(float(every.mean()), 4),
        "groups_with_gradient": round(float((every.amax(1) > every.amin(1)).float().mean()), 4),
        "temperature": TEMPERATURE,
    }
    return sequences, advantages, facts


def _prompt_ids(tokenizer: Any, prompt: Any) -> Tokens:
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    encoded = tokenizer.apply_chat_template(prompt, tokenize=True, return_dict=True, add_generation_prompt=True)
    return list(encoded["input_ids"])


def _generate(
    model: Any,
    tokenizer: Any,
    prompts: list[Tokens],
    settings: Settings,
    device: torch.device,
    most: int,
    seed: int = SEED,
) -> list[Tokens]:
    """``num_generations`` samples of each prompt, end-of-sequence token included; the caller's random state is kept."""
    longest, pad = max(map(len, prompts)), _pad(tokenizer)
    ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [tokenizer.eos_token_id if ends is None else ends]
    with torch.random.fork_rng(devices=[device.index or 0] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        said = model.generate(
            input_ids=ids, attention_mask=mask, do_sample=True, temperature=TEMPERATURE, top_p=1.0, top_k=0,
            max_new_tokens=most, num_return_sequences=settings.num_generations, pad_token_id=pad,
        )  # fmt: skip
    result = []
    for row in said[:, longest:].tolist():  # waits for the device
        stop = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
        result.append(row[:stop])
    return result


def _rewards(tokenizer: Any, rows: list[dict[str, Any]], completions: list[Tokens]) -> Tensor:
    """Verifiable rewards: fp32[completions]."""
    from sparseopt.rewards import verifiable_reward

    texts = [tokenizer.decode(completion, skip_special_tokens=True) for completion in completions]
    columns = {key: [row[key] for row in rows] for key in rows[0] if key not in ("prompt", "completions")}
    return torch.tensor(verifiable_reward(texts, **columns), dtype=torch.float32)
