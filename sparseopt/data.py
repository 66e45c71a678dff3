"""Preference pairs, verifiable prompts and examples: from reasoning-gym, local files (JSONL, Parquet, CSV), or the Hub.

Column layouts of files and of the Hub, ``Light-R1`` and ``OpenR1`` among them, are described in :mod:`sparseopt.columns`.

reasoning-gym makes tasks with a scorer from a seed, without a network. For DPO, chosen is the task's own answer and
rejected a near miss of the same shape: two neighbours of a list swapped, a number off by a little, another weekday.
"""

from __future__ import annotations

import json
import random
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparseopt.columns import MATH_SYSTEM, first_rows, load_table, preference_columns, prompt_columns, sft_columns
from sparseopt.rewards import extract_answer, score, verifiable_reward

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = [
    "PromptStyle",
    "extract_answer",
    "load_preference_dataset",
    "load_prompt_dataset",
    "load_sft_dataset",
    "near_miss",
    "preference_pairs",
    "score",
    "to_dataset",
    "verifiable_reward",
]

_GYM = "reasoning_gym:"
_WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_OPPOSITES = {"yes": "no", "no": "yes", "true": "false", "false": "true"}
# Questions drawn per one that is wanted, before a task counts as exhausted (small tasks repeat themselves).
_DRAWS = 400
# One question in eight, by its checksum, is held out: whatever the seeds and sizes, the splits share none.
_HELD_OUT = 8


@dataclass(frozen=True)
class PromptStyle:
    """How a question becomes a conversation.

    Attributes:
        system: system message; None leaves it to the chat template, which may bring its own.
        last_line: keep only the last line of the question, where a task puts the instance itself.
        example: (question, answer) shown as a turn of its own before the question.
    """

    system: str | None = "Answer with the result only."
    last_line: bool = False
    example: tuple[str, str] | None = None

    def messages(self, question: str) -> list[dict[str, str]]:
        """Returns the conversation up to and including the user's question."""
        question = question.strip()
        if self.last_line:
            question = question.splitlines()[-1]
        turns = [] if self.system is None else [("system", self.system)]
        if self.example is not None:
            turns += [("user", self.example[0]), ("assistant", self.example[1])]
        return [{"role": role, "content": content} for role, content in [*turns, ("user", question)]]


def near_miss(answer: str, rng: random.Random) -> str | None:
    """Returns a wrong answer of the same shape as ``answer``, or None where there is none.

    Yes/No and True/False flip; a weekday becomes another; an integer moves by 1, 2 or 10; the last digit of a decimal
    changes; in a list two different neighbours swap places, and so do words of a sentence or letters of a word.
    """
    if flipped := _OPPOSITES.get(answer.lower()):
        return flipped.capitalize() if answer[:1].isupper() else flipped
    if answer in _WEEKDAYS:
        return rng.choice([day for day in _WEEKDAYS if day != answer])
    if re.fullmatch(r"-?\d+", answer):
        return str(int(answer) + rng.choice((-10, -2, -1, 1, 2, 10)))
    if re.fullmatch(r"-?\d+\.\d+", answer):
        return answer[:-1] + rng.choice([digit for digit in "0123456789" if digit != answer[-1]])
    opening, inner, closing = re.fullmatch(r"(\[?)(.*?)(\]?)", answer, flags=re.DOTALL).groups()  # type: ignore[union-attr]
    for separator in (", ", ",", " ", ""):
        parts = inner.split(separator) if separator else list(inner)
        places = [i for i in range(len(parts) - 1) if parts[i] != parts[i + 1]]
        if len(parts) > 1:
            if not places:
                return None
            i = rng.choice(places)
            parts[i], parts[i + 1] = parts[i + 1], parts[i]
            return opening + separator.join(parts) + closing
    return None


def preference_pairs(
    task: str,
    size: int,
    seed: int,
    split: str = "train",
    *,
    task_config: dict[str, Any] | None = None,
    style: PromptStyle | None = None,
) -> list[dict[str, Any]]:
    """Makes ``size`` preference pairs of one reasoning-gym task, the same ones for the same arguments.

    Args:
        task: name of a reasoning-gym task, such as "word_sequence_reversal".
        size: number of pairs; no two share a prompt.
        seed: of the questions and the near misses.
        split: "train" or "test". A prompt belongs to one of them for good, so that they never overlap.
        task_config: the task's own options, such as ``{"min_words": 3}``.
        style: how questions are put; default ``PromptStyle()``.

    Returns:
        Dicts in TRL's conversational form: "prompt", "chosen", "rejected" (lists of messages) and "entry" (the
        reasoning-gym entry, for :func:`score`). Every chosen answer scores 1, every rejected one less.

    Raises:
        ValueError: unknown task or split, wrong options, or the task has too few questions with a near miss.
    """
    rng = random.Random(f"{seed}/{split}/near-miss")
    pairs: list[dict[str, Any]] = []
    for prompt, entry in _prompts(task, size, seed, split, task_config, style):
        answer = str(entry["answer"])
        wrong = near_miss(answer, rng)
        if wrong is None or score(wrong, entry) >= 1.0 or score(answer, entry) < 1.0:
            continue
        chosen, rejected = ([{"role": "assistant", "content": text}] for text in (answer, wrong))
        pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "entry": entry})
        if len(pairs) >= size:
            break
    _check_count("pairs", pairs, size, task)
    return pairs


def to_dataset(pairs: Sequence[dict[str, Any]]) -> Dataset:
    """Returns the columns prompt, chosen, rejected of ``pairs`` as a ``datasets.Dataset`` for TRL's DPOTrainer."""
    from datasets import Dataset

    return Dataset.from_list([{key: pair[key] for key in ("prompt", "chosen", "rejected")} for pair in pairs])


def load_preference_dataset(
    source: str, split: str = "train", *, size: int | None = None, seed: int = 0, **options: Any
) -> Dataset:
    """Loads preference pairs with the columns prompt, chosen, rejected: messages, or texts where all three are texts.

    Args:
        source: a .jsonl, .json, .parquet or .csv file, ``reasoning_gym:TASK``, ``Light-R1``, or the name of a Hub dataset.
        split: of a Hub dataset; for reasoning-gym "train" or "test", which share no prompt.
        size: number of rows, the first ones; needed for reasoning-gym, else all rows.
        seed: of reasoning-gym.
        options: for reasoning-gym, as in :func:`preference_pairs`.

    Raises:
        FileNotFoundError: no such file or dataset, or the Hub cannot be reached.
        FormatError: the file cannot be parsed.
        ValueError: columns are missing, there are no or too few rows, a row is empty, or the options make no sense.
    """
    if source.startswith(_GYM):
        task = source.removeprefix(_GYM)
        return to_dataset(preference_pairs(task, _gym_size(source, size), seed, split, **options))
    if options:
        raise ValueError(f"Options {sorted(options)} are for reasoning_gym sources, not for {source!r}.")
    return preference_columns(first_rows(load_table(source, split, "preference"), size), source)


def load_prompt_dataset(
    source: str,
    split: str = "train",
    *,
    size: int | None = None,
    seed: int = 0,
    task_config: dict[str, Any] | None = None,
    style: PromptStyle | None = None,
) -> Dataset:
    """Loads prompts with verifiable answers for GRPO: the columns prompt, answer, and from reasoning-gym also entry.

    Arguments and errors as in :func:`load_preference_dataset` (the alias is ``OpenR1``); ``entry`` is JSON text that
    :func:`verifiable_reward` reads. Of tables, ``style`` gives the system message before a question (a column
    ``question`` or ``problem``), by default that the final answer belongs into ``\\boxed{}``; plain columns, such as
    ``source``, stay, for reward functions. Rows of OpenR1 without a verifiable answer are left out, with a warning.
    """
    if not source.startswith(_GYM):
        if task_config:
            raise ValueError(f"Options ['task_config'] are for reasoning_gym sources, not for {source!r}.")
        system = MATH_SYSTEM if style is None else style.system
        return prompt_columns(load_table(source, split, "prompt"), source, size, system)
    from datasets import Dataset

    task, count = source.removeprefix(_GYM), _gym_size(source, size)
    rows: list[dict[str, Any]] = []
    for prompt, entry in _prompts(task, count, seed, split, task_config, style):
        rows.append({"prompt": prompt, "answer": str(entry["answer"]), "entry": json.dumps(entry, default=str)})
        if len(rows) >= count:
            break
    _check_count("prompts", rows, count, task)
    return Dataset.from_list(rows)


def load_sft_dataset(
    source: str,
    split: str = "train",
    *,
    size: int | None = None,
    seed: int = 0,
    task_config: dict[str, Any] | None = None,
    style: PromptStyle | None = None,
) -> Dataset:
    """Loads examples to learn from: the column messages (a conversation that ends with an assistant), or prompt and
    completion (messages, or texts where both are texts).

    Arguments and errors as in :func:`load_preference_dataset` (the aliases are ``OpenR1`` and ``Light-R1``). From
    reasoning-gym the completion is the right answer.
    """
    if source.startswith(_GYM):
        from datasets import Dataset

        prompts = load_prompt_dataset(source, split, size=size, seed=seed, task_config=task_config, style=style)
        answers = ([{"role": "assistant", "content": answer}] for answer in prompts["answer"])
        rows = zip(prompts["prompt"], answers, strict=True)
        return Dataset.from_list([{"prompt": prompt, "completion": completion} for prompt, completion in rows])
    if task_config or style is not None:
        raise ValueError(f"Options ['style', 'task_config'] are for reasoning_gym sources, not for {source!r}.")
    return sft_columns(first_rows(load_table(source, split, "sft"), size), source)


def _gym_size(source: str, size: int | None) -> int:
    if size is None:
        raise ValueError(f"{source!r} is generated without end: give the number of rows (size).")
    return size


def _check_count(what: str, found: Sequence[Any], size: int, task: str) -> None:
    if len(found) < size:
        raise ValueError(
            f"reasoning-gym task {task!r} gave {len(found)} different {what} where {size} were asked for: "
            "widen its options or ask for fewer."
        )


def _prompts(
    task: str, size: int, seed: int, split: str, task_config: dict[str, Any] | None, style: PromptStyle | None
) -> Iterator[tuple[list[dict[str, str]], dict[str, Any]]]:
    """Yields (conversation, entry) of different prompts of one split."""
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if split not in ("train", "test"):
        raise ValueError(f"Unknown split {split!r} of reasoning-gym task {task!r}: expected 'train' or 'test'.")
    if size < 1:
        raise ValueError(f"Expected a size of at least 1 for reasoning-gym task {task!r}, got {size}.")
    if task not in DATASETS:
        raise ValueError(f"Unknown reasoning-gym task {task!r}: `reasoning_gym.factory.DATASETS` has their names.")
    # Tasks draw entry i from seed + i, so that neighbouring seeds would give nearly the same entries.
    start = random.Random(f"{seed}/{task}").getrandbits(31)
    try:
        # The library checks its options by keyword arguments and assertions.
        entries = reasoning_gym.create_dataset(task, size=size * _DRAWS, seed=start, **(task_config or {}))
    except (AssertionError, TypeError) as error:
        raise ValueError(f"Options {task_config} do not fit reasoning-gym task {task!r}: {error}.") from error
    style = style or PromptStyle()
    seen: set[str] = set()
    for entry in entries:
        prompt = style.messages(entry["question"])
        shown = prompt[-1]["content"]
        if (zlib.crc32(shown.encode()) % _HELD_OUT == 0) == (split == "test") and shown not in seen:
            seen.add(shown)
            yield prompt, entry
