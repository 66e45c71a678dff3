"""Preference pairs and verifiable prompts: from reasoning-gym, local files (JSONL, Parquet, CSV), or the Hub.

reasoning-gym makes tasks with a scorer from a seed, without a network. For DPO, chosen is the task's own answer and
rejected a near miss of the same shape: two neighbours of a list swapped, a number off by a little, another weekday.
"""

from __future__ import annotations

import json
import os
import random
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = [
    "PromptStyle",
    "extract_answer",
    "load_preference_dataset",
    "load_prompt_dataset",
    "near_miss",
    "preference_pairs",
    "score",
    "to_dataset",
    "verifiable_reward",
]

_GYM = "reasoning_gym:"
_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
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


def score(answer: str | None, entry: dict[str, Any]) -> float:
    """Scores ``answer`` with the task's own scorer: 1.0 is right.

    Args:
        answer: what was said; None scores 0.
        entry: the reasoning-gym entry ("question", "answer", "metadata" with "source_dataset").
    """
    import reasoning_gym

    return float(reasoning_gym.get_score_answer_fn(entry["metadata"]["source_dataset"])(answer, entry))


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
    """Loads preference pairs with the columns prompt, chosen, rejected.

    Args:
        source: a .jsonl, .json, .parquet or .csv file, ``reasoning_gym:TASK``, or the name of a Hub dataset.
        split: of a Hub dataset; for reasoning-gym "train" or "test", which share no prompt.
        size: number of rows; needed for reasoning-gym, else all rows.
        seed: of reasoning-gym.
        options: for reasoning-gym, as in :func:`preference_pairs`.

    Raises:
        FileNotFoundError: no such file or dataset, or the Hub cannot be reached.
        FormatError: the file cannot be parsed.
        ValueError: columns are missing, or the options make no sense.
    """
    if source.startswith(_GYM):
        task = source.removeprefix(_GYM)
        return to_dataset(preference_pairs(task, _gym_size(source, size), seed, split, **options))
    if options:
        raise ValueError(f"Options {sorted(options)} are for reasoning_gym sources, not for {source!r}.")
    return _first_rows(_load_table(source, split, ("prompt", "chosen", "rejected")), size)


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

    Arguments and errors as in :func:`load_preference_dataset`; ``entry`` is JSON text that :func:`verifiable_reward`
    reads.
    """
    if not source.startswith(_GYM):
        return _first_rows(_load_table(source, split, ("prompt", "answer")), size)
    from datasets import Dataset

    task, count = source.removeprefix(_GYM), _gym_size(source, size)
    rows: list[dict[str, Any]] = []
    for prompt, entry in _prompts(task, count, seed, split, task_config, style):
        rows.append({"prompt": prompt, "answer": str(entry["answer"]), "entry": json.dumps(entry, default=str)})
        if len(rows) >= count:
            break
    _check_count("prompts", rows, count, task)
    return Dataset.from_list(rows)


def extract_answer(text: str) -> str:
    """Returns the final answer in ``text``: the last <answer>...</answer> or \\boxed{...}, else all of it, stripped."""
    tagged = re.findall(r"<answer>(.*?)</answer>", text, flags=re.DOTALL)
    boxed = re.findall(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}", text)
    return (tagged or boxed or [text])[-1].strip()


def verifiable_reward(completions: Sequence[Any], answer: Sequence[str], **columns: Any) -> list[float]:
    """Reward function for TRL's GRPOTrainer: the task's own score of each final answer.

    Args:
        completions: one text, or list of messages (the last one counts), per sample.
        answer: the right answers.
        columns: the dataset's other columns; where ``entry`` is among them its task scores, else an answer equal to the
            right one (as numbers, where both are) gets 1.0.

    Returns:
        One reward per completion, 0.0 to 1.0.
    """
    entries = columns.get("entry") or [None] * len(answer)
    rewards = []
    for completion, right, entry in zip(completions, answer, entries, strict=True):
        said = extract_answer(completion if isinstance(completion, str) else completion[-1]["content"])
        rewards.append(score(said, json.loads(entry)) if entry else float(_equal(said, str(right))))
    return rewards


def _equal(said: str, right: str) -> bool:
    try:
        return float(said.replace(",", "")) == float(right.replace(",", ""))
    except ValueError:
        return said == right.strip()


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


def _first_rows(dataset: Dataset, size: int | None) -> Dataset:
    if size is None:
        return dataset
    if size > len(dataset):
        raise ValueError(f"The dataset has {len(dataset)} rows where {size} were asked for.")
    return dataset.select(range(size))


def _load_table(source: str, split: str, columns: tuple[str, ...]) -> Dataset:
    """Loads a local file or Hub dataset and checks that ``columns`` are there."""
    dataset = _load_file(source) if _is_file_name(source) else _load_hub(source, split)
    missing = [name for name in columns if name not in dataset.column_names]
    # TRL's implicit form: whole conversations in chosen and rejected, and the prompt is what they share.
    if missing == ["prompt"] and "rejected" in columns and len(dataset) and isinstance(dataset[0]["chosen"], list):
        missing = []
    if missing:
        raise ValueError(
            f"Dataset {source!r} lacks the columns {', '.join(missing)}: expected {', '.join(columns)}, "
            f"found {', '.join(dataset.column_names)}."
        )
    return dataset


def _is_file_name(source: str) -> bool:
    return os.path.exists(source) or os.path.splitext(source)[1].lower() in _FORMATS


def _load_file(source: str) -> Dataset:
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    from sparseopt._files import FormatError

    kind = _FORMATS.get(os.path.splitext(source)[1].lower())
    if kind is None or not os.path.isfile(source):
        if not os.path.exists(source):
            raise FileNotFoundError(f"Data file {source!r} does not exist.")
        raise ValueError(f"Data file {source!r} is of no known kind: expected one of {', '.join(_FORMATS)}.")
    try:
        return load_dataset(kind, data_files=source, split="train")
    except (DatasetGenerationError, ValueError, UnicodeDecodeError) as error:
        cause = error.__cause__ or error
        raise FormatError(f"Data file {source!r} cannot be read as {kind}: {str(cause).splitlines()[0]}") from error


def _load_hub(source: str, split: str) -> Dataset:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        return load_dataset(source, split=split)
    except DatasetNotFoundError as error:
        raise FileNotFoundError(
            f"Dataset {source!r} is neither a local file nor on the Hugging Face Hub "
            "(private ones need `hf auth login`)."
        ) from error
    except OSError as error:
        raise FileNotFoundError(
            f"Dataset {source!r} is neither a local file nor in the Hugging Face cache and the Hub cannot be reached: "
            f"connect to a network or pass a local file ({', '.join(_FORMATS)})."
        ) from error
