"""Tables of other people's: aliases of Hub datasets, and their columns as TRL's.

Column layouts that are understood (roles and texts of messages as ``role``/``content`` or, as in ShareGPT, ``from``/``value``):

* preferences: ``prompt``, ``chosen``, ``rejected``; without ``prompt``, what chosen and rejected begin with in common; a
  question (``question``, ``problem``, ``instruction``; with ``system``) or a conversation (``conversations``, ``messages``)
  with ``chosen`` and ``rejected``, each a text, a message or a list of them;
* prompts: ``prompt``, a question or a conversation, with ``answer`` (or ``ground_truth``, ``solution``), of which the part
  behind ``####`` (GSM8K) or within the last ``\\boxed{}`` is the answer to be verified;
* supervised: ``messages``, ``conversations``, ``prompt`` with ``completion``, or a question with ``output``,
  ``response``, ``completion`` or ``answer``.

Texts in a column ``prompt`` stay texts, without a chat template; questions and conversations become messages.

Sources of the aliases' columns: hf.co/datasets/qihoo360/Light-R1-DPOData (dpo-pairs.json: ``conversations`` as a list of
``{"from": "human", "value"}``, ``chosen`` and ``rejected`` as one ``{"from": "gpt", "value"}``) and .../Light-R1-SFTData
(``conversations``), the ShareGPT form of LLaMA-Factory that their authors train with;
hf.co/datasets/open-r1/OpenR1-Math-220k, whose ``problem`` is the prompt and ``answer`` or ``solution`` the gold of
open-r1's GRPO recipes.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["ALIASES", "first_rows", "load_table", "preference_columns", "prompt_columns", "sft_columns"]

Row = dict[str, Any]

# Alias (lower case) -> Hub dataset by use.
ALIASES: Mapping[str, Mapping[str, str]] = {
    "light-r1": {"preference": "qihoo360/Light-R1-DPOData", "sft": "qihoo360/Light-R1-SFTData"},
    "openr1": {"prompt": "open-r1/OpenR1-Math-220k", "sft": "open-r1/OpenR1-Math-220k"},
}
FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
# What is asked of models whose answers are verified: as in open-r1's recipes.
MATH_SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."

_QUESTIONS = ("question", "problem", "instruction")
_CONVERSATIONS = ("conversations", "messages")
_ANSWERS = ("answer", "ground_truth", "solution")
_OUTPUTS = ("output", "response", "completion", "answer")
_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "function": "tool"}
# NuminaMath's words, in OpenR1 too, for problems whose answer cannot be verified.
_UNVERIFIABLE = {"", "proof", "notfound", "null"}
# Columns that would mean something else to TRL than they do here.
_RESERVED = {
    "prompt",
    "completion",
    "completions",
    "chosen",
    "rejected",
    "messages",
    "image",
    "images",
    "tools",
    "label",
}


# ---- loading ---------------------------------------------------------------------------------------------------------
def load_table(source: str, split: str, use: str) -> Dataset:
    """Loads a local file or a Hub dataset, by its name or alias, with the columns that it has.

    Args:
        source: a .jsonl, .json, .parquet or .csv file, a key of :data:`ALIASES` in any case, or a Hub name.
        split: of a Hub dataset.
        use: "preference", "prompt" or "sft": what an alias stands for.

    Raises:
        FileNotFoundError: no such file or dataset, or the Hub cannot be reached.
        FormatError: the file cannot be parsed.
        ValueError: it has no rows; an alias is of no such use, a dataset of no such split.
    """
    dataset = _load_file(source) if _is_file_name(source) else _load_hub(_resolve(source, use), split)
    if not len(dataset):
        raise ValueError(f"Dataset {source!r} has no rows.")
    return dataset


def _resolve(source: str, use: str) -> str:
    uses = ALIASES.get(source.lower())
    if uses is None:
        return source
    if use not in uses:
        raise ValueError(f"Dataset {source!r} serves for {' and '.join(uses)} training, not for {use}s.")
    return uses[use]


def _is_file_name(source: str) -> bool:
    known = source.lower() in ALIASES and not os.path.isfile(source)
    return not known and (os.path.exists(source) or os.path.splitext(source)[1].lower() in FORMATS)


def _load_file(source: str) -> Dataset:
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    from sparseopt._files import FormatError

    kind = FORMATS.get(os.path.splitext(source)[1].lower())
    if kind is None or not os.path.isfile(source):
        if not os.path.exists(source):
            raise FileNotFoundError(f"Data file {source!r} does not exist.")
        raise ValueError(f"Data file {source!r} is of no known kind: expected one of {', '.join(FORMATS)}.")
    if os.path.getsize(source) == 0:
        raise ValueError(f"Data file {source!r} is empty.")
    try:
        return load_dataset(kind, data_files=source, split="train")
    except (DatasetGenerationError, ValueError, UnicodeDecodeError) as error:
        cause = error.__cause__ or error
        if "corresponds to no data" in str(cause):
            raise ValueError(f"Data file {source!r} has no rows.") from error
        raise FormatError(f"Data file {source!r} cannot be read as {kind}: {str(cause).splitlines()[0]}") from error


def _load_hub(name: str, split: str) -> Dataset:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        return load_dataset(name, split=split)
    except DatasetNotFoundError as error:
        raise FileNotFoundError(
            f"Dataset {name!r} is neither a local file nor on the Hugging Face Hub (private ones need `hf auth login`)."
        ) from error
    except OSError as error:
        raise FileNotFoundError(
            f"Dataset {name!r} is neither a local file nor in the Hugging Face cache and the Hub cannot be reached: "
            f"connect to a network or pass a local file ({', '.join(FORMATS)})."
        ) from error


def first_rows(dataset: Dataset, size: int | None) -> Dataset:
    """The first ``size`` rows; all for None."""
    if size is None:
        return dataset
    if size > len(dataset):
        raise ValueError(f"The dataset has {len(dataset)} rows where {size} were asked for.")
    return dataset.select(range(size))


# ---- layouts ---------------------------------------------------------------------------------------------------------
def preference_columns(dataset: Dataset, source: str) -> Dataset:
    """Any layout of preferences -> the columns prompt, chosen, rejected.

    Raises:
        ValueError: columns are missing, or a row is empty in one of them (both are named).
    """
    columns = dataset.column_names
    asked = _first(columns, ("prompt", *_CONVERSATIONS, *_QUESTIONS))
    missing = [name for name in ("prompt", "chosen", "rejected") if name not in columns]
    if missing and missing != ["prompt"]:
        _refuse(source, missing, "prompt, chosen, rejected", columns)
    needed = [name for name in (asked, "chosen", "rejected", "system") if name is not None and name in columns]
    return _mapped(dataset, needed, _preference, source, asked).select_columns(["prompt", "chosen", "rejected"])


def prompt_columns(dataset: Dataset, source: str, size: int | None = None, system: str | None = MATH_SYSTEM) -> Dataset:
    """Any layout of verifiable prompts -> the columns prompt, answer, and those of the others that hold plain values,
    for reward functions.

    Args:
        dataset, source: the table and its name.
        size: number of rows, the first ones; None: all.
        system: system message before a question; None: none.

    Raises:
        ValueError: as :func:`preference_columns`. Rows without an answer that could be verified are left out, with a
            warning that says how many; it is an error if none is left.
    """
    from datasets import Value

    columns = dataset.column_names
    asked = _first(columns, ("prompt", *_QUESTIONS, *_CONVERSATIONS))
    right = _first(columns, _ANSWERS)
    missing = [name for name, found in (("prompt", asked), ("answer", right)) if found is None]
    if missing:
        _refuse(source, missing, "prompt, answer", columns)
    assert asked is not None
    assert right is not None
    if "question_type" in columns or "problem_type" in columns:
        dataset = _verifiable(dataset, source, right)
    dataset = first_rows(dataset, size)
    if isinstance(dataset.features[right], Value) and "string" not in dataset.features[right].dtype:
        dataset = dataset.cast_column(right, Value("string"))  # answers are compared as they are written
    plain = [
        name
        for name, feature in dataset.features.items()
        if isinstance(feature, Value) and name not in _RESERVED | {asked, right, "answer"}
    ]
    mapped = _mapped(dataset, [*plain, *{asked, right}], _prompt, source, asked, right, system)
    return mapped.select_columns(["prompt", "answer", *plain])


def sft_columns(dataset: Dataset, source: str) -> Dataset:
    """Any layout of supervised data -> the column messages, or prompt and completion.

    Raises:
        ValueError: as :func:`preference_columns`; also a conversation that does not end with an assistant's message.
    """
    columns = dataset.column_names
    conversation = _first(columns, ("messages", "conversations"))
    asked = _first(columns, ("prompt", *_QUESTIONS))
    answered = "completion" if asked == "prompt" and "completion" in columns else _first(columns, _OUTPUTS)
    if conversation is not None:
        return _mapped(dataset, [conversation], _conversation, source, conversation)
    if asked is None or answered is None:
        missing = ["messages"] if asked is None else ["completion"]
        _refuse(source, missing, "messages, or prompt and completion", columns)
    assert asked is not None
    assert answered is not None
    needed = [name for name in (asked, answered, "system", "input") if name in columns]
    return _mapped(dataset, needed, _completion, source, asked, answered)


def _first(columns: Sequence[str], wanted: Sequence[str]) -> str | None:
    return next((name for name in wanted if name in columns), None)


def _refuse(source: str, missing: Sequence[str], expected: str, found: Sequence[str]) -> None:
    raise ValueError(
        f"Dataset {source!r} lacks the columns {', '.join(missing)}: expected {expected}, found {', '.join(found)}."
    )


def _mapped(dataset: Dataset, columns: Sequence[str], convert: Callable[..., Row], source: str, *args: Any) -> Dataset:
    """``convert`` on every row; of the columns, those that it returns."""
    chosen = dataset.select_columns(list(columns))
    return chosen.map(_convert, with_indices=True, remove_columns=chosen.column_names, fn_kwargs={
        "convert": convert, "source": source, "args": args,
    })  # fmt: skip


def _convert(row: Row, index: int, convert: Callable[..., Row], source: str, args: tuple[Any, ...]) -> Row:
    try:
        return convert(row, *args)
    except _RowError as error:
        raise ValueError(f"Row {index + 1} of dataset {source!r} {error}.") from None


def _verifiable(dataset: Dataset, source: str, right: str) -> Dataset:
    kept = [i for i, answer in enumerate(dataset[right]) if str(answer or "").strip().lower() not in _UNVERIFIABLE]
    if not kept:
        raise ValueError(f"Dataset {source!r} has no row whose {right} could be verified.")
    if len(kept) < len(dataset):
        warnings.warn(
            f"{len(dataset) - len(kept)} of {len(dataset)} rows of dataset {source!r} have no {right} that could be "
            "verified and are left out.",
            stacklevel=4,
        )
    return dataset.select(kept)


# ---- rows ------------------------------------------------------------------------------------------------------------
class _RowError(ValueError):
    """What is wrong with a row, as the end of a sentence that names it."""


def _preference(row: Row, asked: str | None) -> Row:
    chosen, rejected = _filled(row, "chosen"), _filled(row, "rejected")
    if asked == "prompt" and all(isinstance(row[key], str) for key in ("prompt", "chosen", "rejected")):
        return {key: _filled(row, key) for key in ("prompt", "chosen", "rejected")}
    if asked is None and isinstance(chosen, str) and isinstance(rejected, str):
        return _text_beginning(chosen, rejected)
    answers = {"chosen": _answer(chosen, "chosen"), "rejected": _answer(rejected, "rejected")}
    opens = answers["chosen"][0]["role"] != "assistant"  # whole conversations
    if opens:
        return _common_beginning(**answers)
    if asked is None:
        raise _RowError("has answers without a prompt")
    prompt = _question(row, asked, None)
    return {"prompt": [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt, **answers}


def _text_beginning(chosen: str, rejected: str) -> Row:
    """The prompt is what both texts begin with, up to a white space."""
    shared = _shared_length(chosen, rejected)
    while shared and not chosen[shared - 1].isspace():
        shared -= 1
    if not chosen[:shared].strip():
        raise _RowError("has no prompt: chosen and rejected begin with nothing in common")
    return {"prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}


def _common_beginning(chosen: list[Row], rejected: list[Row]) -> Row:
    shared = _shared_length(chosen, rejected)
    if not shared:
        raise _RowError("has no prompt: chosen and rejected begin with nothing in common")
    if shared in (len(chosen), len(rejected)):
        raise _RowError("has a chosen or rejected conversation that ends within the other")
    return {"prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}


def _shared_length(a: Sequence[Any], b: Sequence[Any]) -> int:
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def _prompt(row: Row, asked: str, right: str, system: str | None) -> Row:
    from sparseopt.rewards import gold_answer

    answer = gold_answer(str(_filled(row, right)))
    if not answer:
        raise _RowError(f"has an empty {right!r}")
    rest = {name: value for name, value in row.items() if name not in (asked, right)}
    return {**rest, "prompt": _question(row, asked, system, until_answer=True), "answer": answer}


def _conversation(row: Row, column: str) -> Row:
    messages = _messages(_filled(row, column), column)
    if messages[-1]["role"] != "assistant":
        raise _RowError(
            f"ends with a message of {messages[-1]['role']!r} in {column!r} where an assistant's is expected"
        )
    return {"messages": messages}


def _completion(row: Row, asked: str, answered: str) -> Row:
    if asked == "prompt" and all(isinstance(row[key], str) for key in (asked, answered)):
        return {"prompt": _filled(row, asked), "completion": _filled(row, answered)}
    if row.get("input"):  # Alpaca's
        row = {**row, asked: f"{_filled(row, asked)}\n\n{row['input']}"}
    prompt = _question(row, asked, None)
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return {"prompt": messages, "completion": _answer(_filled(row, answered), answered)}


def _question(row: Row, asked: str, system: str | None, until_answer: bool = False) -> Any:
    """The prompt of a row: messages, or the text of a column ``prompt``."""
    value = _filled(row, asked)
    if isinstance(value, str):
        if asked == "prompt":
            return value
        system = row.get("system") or system
        turns = [("system", system)] if system else []
        return [{"role": role, "content": content} for role, content in [*turns, ("user", value.strip())]]
    messages = _messages(value, asked)
    if until_answer and asked in _CONVERSATIONS:
        ends = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        messages = messages[: ends[-1]] if ends else messages
        if not messages:
            raise _RowError(f"has no question in {asked!r}")
    return messages


def _answer(value: Any, column: str) -> list[Row]:
    """A text, a message or messages -> messages."""
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    return _messages([value] if isinstance(value, dict) else value, column)


def _messages(value: Any, column: str) -> list[Row]:
    found = []
    for turn in value if isinstance(value, list) else [None]:
        if not isinstance(turn, dict):
            raise _RowError(f"has {type(turn or value).__name__} in {column!r} where messages are expected")
        role, content = (turn.get(a) or turn.get(b) for a, b in (("role", "from"), ("content", "value")))
        if not isinstance(role, str) or not isinstance(content, str) or not content.strip():
            raise _RowError(f"has a message without {'content' if role else 'role'} in {column!r}")
        found.append({"role": _ROLES.get(role.lower(), role.lower()), "content": content})
    return found


def _filled(row: Row, column: str) -> Any:
    value = row[column]
    if value is None or (isinstance(value, (str, list)) and not (value.strip() if isinstance(value, str) else value)):
        raise _RowError(f"has an empty {column!r}")
    return value
