"""Rewards for GRPO: built-in functions, a user's own, weights, and a sample of what was rewarded.

A reward function has TRL's signature: keyword arguments ``prompts``, ``completions`` (texts or lists of messages) and the
data's other columns, one value per completion; it returns one number per completion, or None where it has no opinion.

A spec names one: ``answer``, ``format``, ``math`` or ``brevity``, ``module:function``, or ``path/to/file.py:function``,
each with a weight if need be: ``0.2*format`` or ``format*0.2``.

    functions, weights, names = load_rewards(["answer", "0.2*format", "my_rewards.py:polite"])
    recorded = RecordedRewards(functions, names, "run/completions.jsonl", keep=200)
    trainer = GRPOTrainer(..., reward_funcs=recorded.functions, args=GRPOConfig(..., reward_weights=weights))
    print(completions_table("run/completions.jsonl"))
"""

from __future__ import annotations

import functools
import inspect
import json
import math
import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sparseopt._completions import CompletionsFile, completions_table, show_completions
from sparseopt._named import find_named

__all__ = [
    "BUILTIN",
    "RecordedRewards",
    "answer_reward",
    "brevity_reward",
    "completions_table",
    "extract_answer",
    "format_reward",
    "gold_answer",
    "load_rewards",
    "math_reward",
    "score",
    "show_completions",
    "verifiable_reward",
]

Reward = Callable[..., Any]  # list[float | None], or a coroutine of one

_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
BREVITY_BONUS = 0.1  # of an answer without any text
BREVITY_CHARACTERS = 1000  # from here on there is none


# ---- answers ---------------------------------------------------------------------------------------------------------
def extract_answer(text: str) -> str:
    """Returns the final answer in ``text``: the last <answer>...</answer> or \\boxed{...}, else all of it, stripped."""
    tagged = _TAGGED.findall(text)
    within = tagged[-1] if tagged else text
    return (_boxed(within) or [within])[-1].strip()


def gold_answer(text: str) -> str:
    """Returns the answer that a worked solution ends with: what follows ``####`` (GSM8K), the last \\boxed{...}, else all."""
    if "####" in text:
        return text.rpartition("####")[2].strip()
    return (_boxed(text) or [text])[-1].strip()


def _boxed(text: str) -> list[str]:
    """The contents of every complete \\boxed{...}, braces balanced."""
    found = []
    for match in re.finditer(r"\\boxed\s*\{", text):
        depth, end = 1, match.end()
        while end < len(text) and depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        if not depth:
            found.append(text[match.end() : end - 1])
    return found


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


# ---- built-in rewards ------------------------------------------------------------------------------------------------
def score(answer: str | None, entry: dict[str, Any]) -> float:
    """Scores ``answer`` with the task's own scorer: 1.0 is right.

    Args:
        answer: what was said; None scores 0.
        entry: the reasoning-gym entry ("question", "answer", "metadata" with "source_dataset").
    """
    import reasoning_gym

    return float(reasoning_gym.get_score_answer_fn(entry["metadata"]["source_dataset"])(answer, entry))


def verifiable_reward(completions: Sequence[Any], answer: Sequence[str], **columns: Any) -> list[float]:
    """``answer``: the task's own score of each final answer.

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
        said = extract_answer(_text(completion))
        rewards.append(score(said, json.loads(entry)) if entry else float(_equal(said, str(right))))
    return rewards


answer_reward = verifiable_reward


def _equal(said: str, right: str) -> bool:
    try:
        return float(said.replace(",", "")) == float(right.replace(",", ""))
    except ValueError:
        return said == right.strip()


def format_reward(completions: Sequence[Any], **columns: Any) -> list[float]:
    """``format``: 1.0 for exactly one <answer>...</answer>, or without any such tag exactly one \\boxed{...}; else 0.0."""
    rewards = []
    for completion in completions:
        text = _text(completion)
        tags = (text.count("<answer>"), text.count("</answer>"))
        good = len(_TAGGED.findall(text)) == 1 if tags == (1, 1) else tags == (0, 0) and len(_boxed(text)) == 1
        rewards.append(float(good))
    return rewards


def math_reward(completions: Sequence[Any], answer: Sequence[str], **columns: Any) -> list[float | None]:
    """``math``: 1.0 where the final answer equals the right one symbolically (1/2 is 0.5), else 0.0.

    None, which TRL leaves out of the sum, where the right answer is no mathematical expression.

    Args:
        completions, answer: as for :func:`verifiable_reward`; answers are LaTeX or plain numbers.
        columns: not looked at.

    Raises:
        ImportError: the package math-verify is not installed.
    """
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise ImportError(
            "The reward 'math' needs the package math-verify, which is not installed: pip install math-verify"
        ) from error

    # Its time limits are signals, which only the main thread may set.
    main = threading.current_thread() is threading.main_thread()
    parsing, verifying = (5, 5) if main else (None, None)

    def expression(text: str) -> list[Any]:
        bare = text.strip().strip("$")
        return parse(f"\\boxed{{{bare}}}", parsing_timeout=parsing) or parse(text, parsing_timeout=parsing)

    rewards: list[float | None] = []
    for completion, right in zip(completions, answer, strict=True):
        gold = expression(str(right))
        if not gold:
            rewards.append(None)
            continue
        text = _text(completion)
        marked = bool(_TAGGED.search(text) or _boxed(text))
        said = expression(extract_answer(text)) if marked else parse(text, parsing_timeout=parsing)
        rewards.append(float(bool(said) and verify(gold, said, timeout_seconds=verifying)))
    return rewards


def brevity_reward(completions: Sequence[Any], **columns: Any) -> list[float]:
    """``brevity``: a bonus that falls from 0.1 for an empty text to 0 at 1000 characters. Add it to a reward for being
    right, never use it alone."""
    return [BREVITY_BONUS * max(0.0, 1 - len(_text(c).strip()) / BREVITY_CHARACTERS) for c in completions]


BUILTIN: dict[str, Reward] = {
    "answer": verifiable_reward,
    "format": format_reward,
    "math": math_reward,
    "brevity": brevity_reward,
}


# ---- composing -------------------------------------------------------------------------------------------------------
def load_rewards(specs: Sequence[str]) -> tuple[list[Reward], list[float], list[str]]:
    """Finds the reward functions of ``specs``.

    Args:
        specs: at least one; see the top of this module.

    Returns:
        (functions, weights, names), aligned. What a function returns is checked whenever it is called: a wrong number of
        values or something that is no number is an error that names the function.

    Raises:
        ValueError: no specs, an unknown name, a weight that is no finite number, or a module without that function.
        FileNotFoundError: no such file.
        ImportError: the module cannot be imported.
        TypeError: what the spec names cannot be called.
    """
    if isinstance(specs, str):
        specs = [specs]
    if not specs:
        raise ValueError(f"there are no reward functions: name at least one, such as {', '.join(BUILTIN)}.")
    parsed = [_parse(spec) for spec in specs]
    wanted = [name for name, _ in parsed]
    short = [name.rpartition(":")[2] for name in wanted]
    # Two functions of one name from two places: both are then known by all of it.
    names = [full if short.count(brief) > 1 else brief for full, brief in zip(wanted, short, strict=True)]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"reward function {name!r} is named twice: give it one weight.")
    functions = [_checked(_find(full), name) for full, name in zip(wanted, names, strict=True)]
    return functions, [weight for _, weight in parsed], names


def _parse(spec: str) -> tuple[str, float]:
    """``0.2*name``, ``name*0.2`` or ``name`` -> (name, weight)."""
    parts = [part.strip() for part in str(spec).split("*")]
    if len(parts) == 1:
        return parts[0], 1.0
    if len(parts) == 2:
        for weight, name in (parts, parts[::-1]):
            try:
                number = float(weight)
            except ValueError:
                continue
            if math.isfinite(number) and name:
                return name, number
    raise ValueError(f"reward {spec!r} is not understood: expected NAME or WEIGHT*NAME, such as 0.2*format.")


def _find(name: str) -> Reward:
    if name in BUILTIN:
        return BUILTIN[name]
    if ":" not in name:
        raise ValueError(
            f"unknown reward {name!r}: expected one of {', '.join(BUILTIN)}, module:function or path/to/file.py:function."
        )
    found: Reward = find_named(name, "reward")
    return found


def _checked(function: Reward, name: str) -> Reward:
    """``function`` under ``name``, with its result checked."""

    def check(result: Any, completions: Sequence[Any]) -> list[float | None]:
        if not hasattr(result, "__len__") or isinstance(result, (str, dict)):
            raise TypeError(f"reward function {name!r} must return a list of numbers, got {type(result).__name__}.")
        if len(result) != len(completions):
            raise ValueError(
                f"reward function {name!r} must return one value for each of {len(completions)} completions, "
                f"got {len(result)}."
            )
        values: list[float | None] = []
        for value in result:
            try:
                values.append(None if value is None else float(value))
            except (TypeError, ValueError) as error:
                raise TypeError(f"reward function {name!r} must return numbers, got {type(value).__name__}.") from error
        return values

    checked: Reward
    if _is_async(function):

        @functools.wraps(function)
        async def checked(completions: Sequence[Any], **columns: Any) -> list[float | None]:
            return check(await function(completions=completions, **columns), completions)
    else:

        def checked(completions: Sequence[Any], **columns: Any) -> list[float | None]:
            return check(function(completions=completions, **columns), completions)

    checked.__name__ = checked.__qualname__ = name
    checked.__doc__ = function.__doc__
    return checked


def _is_async(function: Reward) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


class RecordedRewards:
    """Reward functions that leave a sample of what they rewarded in a file.

    Attributes:
        functions: pass these to TRL as ``reward_funcs``; they return what the originals return.
    """

    def __init__(
        self, functions: Sequence[Reward], names: Sequence[str], path: str | Path, keep: int = 200, per_step: int = 4
    ) -> None:
        """Args:
            functions, names: of :func:`load_rewards`.
            path: of ``completions.jsonl``. One JSON object a line: step, prompt, completion (texts, or lists of
                messages), rewards (by name; null: no opinion). A file that is there is continued: a run that resumes at
                an earlier step replaces what came after it.
            keep: lines at most, evenly over the run: when there are more, every second recorded step is dropped, and
                from then on every second step is recorded. 0: no file.
            per_step: completions of a step, drawn at random from its batch.

        Only the main process of a distributed run writes. Nothing else changes: randomness is the sample's own.
        """
        if len(functions) != len(names) or len(set(names)) < len(names):
            raise ValueError(f"{len(functions)} reward functions need as many different names, got {list(names)}.")
        if keep < 0 or per_step < 1:
            raise ValueError(f"keep must be at least 0 and per_step at least 1, got {keep} and {per_step}.")
        self.names = list(names)
        self._file = CompletionsFile(Path(path), keep, per_step) if keep else None
        self._calls = 0
        self._pending: dict[str, list[float | None]] = {}
        self.functions: list[Any] = [self._recording(f, n) for f, n in zip(functions, names, strict=True)]

    def _recording(self, function: Reward, name: str) -> Reward:
        recording: Reward
        if _is_async(function):

            async def recording(**inputs: Any) -> Sequence[float | None]:
                return self._record(name, await function(**inputs), inputs)
        else:

            def recording(**inputs: Any) -> Sequence[float | None]:
                return self._record(name, function(**inputs), inputs)

        recording.__name__ = recording.__qualname__ = name
        return recording

    def _record(self, name: str, values: Sequence[float | None], inputs: dict[str, Any]) -> Sequence[float | None]:
        """Keeps the values until every function was called on the batch; then the sample is written."""
        self._pending[name] = list(values)
        if len(self._pending) == len(self.names):
            rewards, self._pending = self._pending, {}
            self._calls += 1
            state = inputs.get("trainer_state")
            if self._file is not None and (state is None or state.is_world_process_zero):
                step = self._calls if state is None else int(state.global_step)
                prompts = inputs.get("prompts") or [""] * len(inputs["completions"])
                self._file.add(step, prompts, inputs["completions"], {n: rewards[n] for n in self.names})
        return values
