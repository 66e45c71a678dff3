"""What is fine-tuned on: text, tokens, conversations or labelled texts become samples; a part of them is held out.

A sample is ``{"input_ids": int64 [T], "labels": int64 [T]}``, of a classification ``"labels": int64 []``.
"""

from __future__ import annotations

import hashlib
import os
import random
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict, load_from_disk
from torch import Tensor

from sparseopt import columns
from sparseopt.evaluate import tokenize_pair
from sparseopt.progress import track
from sparseopt.projection.text import ALIASES, PILE, TABLES, TEXTS, documents, token_samples
from sparseopt.trainers.finetune_settings import FinetuneSettings

__all__ = ["Samples", "Source", "collate", "open_source", "sample_sets"]

Sample = dict[str, Tensor]
HELD_OUT = 128  # samples at most: they are evaluated ten times
IGNORED = -100  # label of a token that is not predicted


@dataclass
class Source:
    """Data as it was found.

    Attributes:
        name: for messages.
        texts: documents, of which blocks are made; or None.
        table: rows; or None.
        held_out: rows that it brings for evaluation.
    """

    name: str
    texts: Iterable[str] | None = None
    table: Dataset | None = None
    held_out: Dataset | None = None

    def labels(self, column: str) -> list[str]:
        """Names of the classes of a classification.

        Raises:
            ValueError: there is no such column, or it holds no classes.
        """
        if self.table is None or column not in self.table.column_names:
            found = "text only" if self.table is None else ", ".join(self.table.column_names)
            raise ValueError(f"dataset {self.name!r} has no column {column!r} (label_column): it has {found}.")
        named = getattr(self.table.features[column], "names", None)
        if named:
            return list(named)
        values = set(self.table[column])
        if all(isinstance(value, str) for value in values):
            return sorted(values)
        if not all(isinstance(value, int) and not isinstance(value, bool) and value >= 0 for value in values):
            odd = next(value for value in values if not isinstance(value, int) or value < 0)
            raise ValueError(f"labels of {self.name!r} must be texts or whole numbers from 0 on, got {odd!r}.")
        return [f"LABEL_{i}" for i in range(max(values) + 1)]


@dataclass
class Samples:
    """What the trainer gets.

    Attributes:
        train, held_out: samples.
        described: in a sentence.
        digest: of all of them: a continued run must find the same.
    """

    train: list[Sample]
    held_out: list[Sample]
    described: str

    @property
    def digest(self) -> str:
        state = hashlib.sha256()
        for sample in (*self.train, *self.held_out):
            for value in sample.values():
                state.update(value.numpy().tobytes() + b"|")
        return state.hexdigest()[:16]


def open_source(data: Any, split: str, text_column: str, task: str, seed: int) -> Source:
    """Finds the data, and reads none of its texts yet.

    Args:
        data: a file or folder of texts, a table (.jsonl, .json, .parquet, .csv), a folder of ``save_to_disk``, the name of a
            Hub dataset, or a ``datasets.Dataset`` or ``DatasetDict``.
        split: of a Hub dataset or a DatasetDict.
        text_column: of tables that hold text.
        task: of the training.
        seed: of the order of the documents.

    Raises:
        FileNotFoundError: there is no such data.
        ValueError: it is empty, or has no such split.
        TypeError: something else was given.
    """
    if isinstance(data, (str, os.PathLike)):
        name = os.fspath(data)
        if not name:
            raise ValueError("dataset must name a file, a folder or a Hub dataset, got an empty name.")
        path = Path(name)
        if path.is_dir() and any((path / file).is_file() for file in ("dataset_info.json", "dataset_dict.json")):
            return _of_tables(load_from_disk(name), name, split)
        if path.is_dir() or path.suffix.lower() in TEXTS or name.lower() in ALIASES:
            if task != "causal-lm":
                raise ValueError(f"{task} needs labels: {name!r} is text; give a table ({', '.join(TABLES)}).")
            if ALIASES.get(name.lower()) == PILE:
                raise ValueError(f"dataset {name!r} is a stream without end: give a part of it as a file.")
            return Source(name, texts=documents(name, seed=seed)[0])
        return Source(name, table=columns.load_table(name, split, "sft"))
    if isinstance(data, (Dataset, DatasetDict)):
        return _of_tables(data, f"a {type(data).__name__}", split)
    raise TypeError(f"dataset must be a name, a path or a datasets.Dataset, got {type(data).__name__}.")


def _of_tables(data: Any, name: str, split: str) -> Source:
    held_out = None
    if isinstance(data, DatasetDict):
        if split not in data:
            raise ValueError(f"dataset {name!r} has no split {split!r}: it has {', '.join(data)}.")
        held_out = next((data[key] for key in ("validation", "test") if key in data and key != split), None)
        data = data[split]
    if not len(data):
        raise ValueError(f"dataset {name!r} has no rows.")
    return Source(name, table=data, held_out=held_out)


def sample_sets(
    source: Source, settings: FinetuneSettings, tokenizer: Any, length: int, labels: Sequence[str] | None
) -> Samples:
    """Tokenises, and holds out a part.

    Args:
        source: of :func:`open_source`.
        settings: of the run.
        tokenizer: needed unless the data are tokens.
        length: tokens of a sample at most.
        labels: names of the classes of a classification.

    Raises:
        ValueError: columns are missing, a label is unknown, no sample is left.
    """

    def make(part: Source) -> tuple[list[Sample], str]:
        if labels is not None:
            return _classified(part, settings, tokenizer, length, labels)
        return _language(part, settings, tokenizer, length)

    rows, unit = make(source)
    given = source.held_out
    if settings.eval_dataset is not None:
        other = open_source(
            settings.eval_dataset, settings.dataset_split, settings.text_column, settings.task, settings.seed
        )
        held_out = make(other)[0][:HELD_OUT]
    elif given is not None:
        held_out = make(Source(f"{source.name} (held out)", table=given))[0][:HELD_OUT]
    else:
        count = min(HELD_OUT, round(settings.eval_fraction * len(rows)), len(rows) - 1)
        if count and unit != "block":  # the last blocks are of other documents, or of the end of one
            random.Random(f"{settings.seed}/held-out").shuffle(rows)
        rows, held_out = rows[: len(rows) - count], rows[len(rows) - count :]
    tokens = sum(sample["input_ids"].numel() for sample in rows)
    described = (
        f"Data: {len(rows):,} {unit}s of {source.name} to train on ({tokens:,} tokens), {len(held_out):,} held out."
    )
    return Samples(rows, held_out, described)


def _need(tokenizer: Any, source: Source) -> None:
    if tokenizer is None:
        raise ValueError(f"{source.name!r} is text and the model object names no tokenizer: pass tokenizer=.")


# ---- language models -------------------------------------------------------------------------------------------------
def _language(source: Source, settings: FinetuneSettings, tokenizer: Any, length: int) -> tuple[list[Sample], str]:
    table, column = source.table, settings.text_column
    if table is not None and "input_ids" in table.column_names:
        rows = (_tokens(row, length) for row in track(table, "read", len(table), unit="row"))
        return _kept(rows, source, "row"), "row"
    _need(tokenizer, source)
    if table is None or column in table.column_names:
        texts = source.texts if table is None else _texts(table, source.name, column, settings.seed)
        try:
            blocks = list(token_samples(track(texts, "tokenise", unit="document"), tokenizer, length))  # type: ignore[arg-type]
        except ValueError as error:
            raise ValueError(
                f"{source.name!r} has fewer tokens than one sample of max_length={length}: take a smaller one."
            ) from error
        return [{"input_ids": block.input_ids, "labels": block.input_ids.clone()} for block in blocks], "block"
    try:
        talks = columns.sft_columns(table, source.name)
    except ValueError as error:
        if "lacks the columns" not in str(error):
            raise
        raise ValueError(
            f"dataset {source.name!r} has no column {column!r} (text_column), no input_ids, no messages and no prompt with "
            f"completion: it has {', '.join(table.column_names)}."
        ) from error
    if "messages" in talks.column_names and tokenizer.chat_template is None:
        raise ValueError(f"{source.name!r} holds conversations, but the tokenizer has no chat template.")
    answered = (_answer(row, tokenizer, length) for row in track(talks, "tokenise", len(talks), unit="row"))
    return _kept(answered, source, "row"), "row"


def _texts(table: Dataset, name: str, column: str, seed: int) -> Iterable[str]:
    shuffled = table.shuffle(seed=seed)
    for row in shuffled:
        if not isinstance(row[column], str):
            raise ValueError(f"column {column!r} of {name!r} must hold text, got {type(row[column]).__name__}.")
        yield row[column]


def _tokens(row: dict[str, Any], length: int) -> Sample:
    ids = torch.tensor(row["input_ids"], dtype=torch.int64)
    labels = torch.tensor(row["labels"], dtype=torch.int64) if row.get("labels") is not None else ids.clone()
    seen = row.get("attention_mask")
    if seen is not None:  # padding is added again, per batch
        real = torch.tensor(seen, dtype=torch.bool)
        ids, labels = ids[real], labels[real]
    return {"input_ids": ids[:length], "labels": labels[:length]}


def _answer(row: dict[str, Any], tokenizer: Any, length: int) -> Sample:
    if "messages" in row:
        *before, last = row["messages"]
        row = {"prompt": before, "completion": [last]}
    prompt, answer, _ = tokenize_pair(
        tokenizer, {"prompt": row["prompt"], "chosen": row["completion"], "rejected": row["completion"]}
    )
    ids = torch.tensor([*prompt, *answer], dtype=torch.int64)[:length]
    labels = ids.clone()
    labels[: len(prompt)] = IGNORED
    return {"input_ids": ids, "labels": labels}


def _kept(rows: Iterable[Sample], source: Source, unit: str) -> list[Sample]:
    """Rows with something to predict: the first token has no prediction."""
    found, kept = 0, []
    for row in rows:
        found += 1
        if bool((row["labels"][1:] != IGNORED).any()):
            kept.append(row)
    if not kept:
        raise ValueError(f"{source.name!r} has no {unit} with a token to predict within max_length.")
    if len(kept) < found:
        warnings.warn(f"{found - len(kept)} of {found} {unit}s have nothing to predict within max_length: left out.",
                      stacklevel=2)  # fmt: skip
    return kept


# ---- classification --------------------------------------------------------------------------------------------------
def _classified(
    source: Source, settings: FinetuneSettings, tokenizer: Any, length: int, labels: Sequence[str]
) -> tuple[list[Sample], str]:
    table, wanted = source.table, [name.strip() for name in settings.text_column.split(",")]
    if table is None:
        raise ValueError(f"{source.name!r} is text without labels.")
    ready = "input_ids" in table.column_names
    missing = [name for name in (*([] if ready else wanted), settings.label_column) if name not in table.column_names]
    if missing:
        raise ValueError(
            f"dataset {source.name!r} has no column {missing[0]!r}: it has {', '.join(table.column_names)}."
        )
    if len(wanted) > 2:
        raise ValueError(f"text_column names one column, or two for pairs of texts, got {settings.text_column!r}.")
    if not ready:
        _need(tokenizer, source)
    numbers = {name: i for i, name in enumerate(labels)}
    samples = []
    for row in track(table, "tokenise", len(table), unit="row"):
        ids = row["input_ids"] if ready else tokenizer(*(row[name] for name in wanted), truncation=False)["input_ids"]
        label = row[settings.label_column]
        number = numbers.get(label, -1) if isinstance(label, str) else label
        if not isinstance(number, int) or not 0 <= number < len(labels):
            raise ValueError(f"label {label!r} of {source.name!r} is none of {', '.join(labels)}.")
        samples.append({"input_ids": torch.tensor(ids[:length], dtype=torch.int64), "labels": torch.tensor(number)})
    return samples, "text"


def collate(pad: int) -> Callable[[list[Sample]], Sample]:
    """Pads the samples of a batch to the longest: int64 [n, T]."""

    def together(samples: list[Sample]) -> Sample:
        longest = max(len(sample["input_ids"]) for sample in samples)
        batch = {"input_ids": torch.full((len(samples), longest), pad)}
        batch["attention_mask"] = torch.zeros_like(batch["input_ids"])
        single = samples[0]["labels"].dim() == 0
        batch["labels"] = torch.stack([s["labels"] for s in samples]) if single else torch.full_like(
            batch["input_ids"], IGNORED
        )  # fmt: skip
        for i, sample in enumerate(samples):
            size = len(sample["input_ids"])
            batch["input_ids"][i, :size] = sample["input_ids"]
            batch["attention_mask"][i, :size] = 1
            if not single:
                batch["labels"][i, :size] = sample["labels"]
        return batch

    return together
