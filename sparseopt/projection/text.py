"""Texts as samples: documents of a file, a folder or a Hub dataset, cut to blocks of tokens that are numbered from 0.

The seed shuffles the documents (a stream within a buffer), so that a sample's number means the same text in every run
with the same source, seed and block size; nothing else decides it.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["PILE", "ByteTokenizer", "Sample", "batches", "check_source", "documents", "token_samples"]

PILE = "monology/pile-uncopyrighted"
ALIASES = {"pile": PILE, "the-pile": PILE, "the_pile": PILE}
TEXTS = (".txt", ".md", ".rst")
TABLES = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
SHUFFLE_BUFFER = 10_000  # documents of a stream


class Tokenizer(Protocol):
    """What is asked of a tokenizer."""

    eos_token_id: int | None

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...


class ByteTokenizer:
    """UTF-8 bytes as tokens, for models with random weights, where no vocabulary means anything."""

    eos_token_id: int | None = 0

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        return list(text.encode())


@dataclass(frozen=True)
class Sample:
    """One sample.

    Attributes:
        number: from 0 on, in the order of the shuffled source.
        input_ids: int64 [at most the block size].
    """

    number: int
    input_ids: Tensor


# ---- documents -------------------------------------------------------------------------------------------------------
def check_source(source: str) -> None:
    """Says what is wrong with a source of :func:`documents` as far as a look at the file system tells.

    Raises:
        FileNotFoundError: no such file, or no text in the folder.
        ValueError: a file of another kind.
    """
    path = Path(source)
    suffix = path.suffix.lower()
    if path.is_dir():
        if not _texts_in(path):
            raise FileNotFoundError(f"folder '{source}' holds no text: expected files of {', '.join(TEXTS)}.")
    elif suffix in TEXTS or suffix in TABLES:
        if not path.is_file():
            raise FileNotFoundError(f"there is no file '{source}'.")
    elif path.is_file():
        raise ValueError(f"'{source}' is neither text ({', '.join(TEXTS)}) nor a table ({', '.join(TABLES)}).")


def _texts_in(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in TEXTS and file.is_file())


def documents(
    source: str, *, split: str = "train", column: str = "text", seed: int | None = 42
) -> tuple[Iterable[str], int | None]:
    """Documents of a source, shuffled.

    Args:
        source: a file (.txt, .md, .rst: one document; .jsonl, .json, .parquet, .csv: one a row), a folder of text files,
            ``pile``, or the name of a Hub dataset, which is streamed.
        split: of a Hub dataset.
        column: of a table, the one with the text.
        seed: of the shuffling; None keeps the order.

    Returns:
        (documents, how many; None where that is not known).

    Raises:
        FileNotFoundError: no such file, no text in the folder, or the Hub cannot be reached.
        ValueError: a table without the column, or a file of another kind.
    """
    check_source(source)
    path = Path(source)
    if path.is_dir():
        files = _texts_in(path)
        if seed is not None:
            random.Random(seed).shuffle(files)
        return (file.read_text(encoding="utf-8", errors="replace") for file in files), len(files)
    if path.suffix.lower() in TEXTS:
        return [path.read_text(encoding="utf-8", errors="replace")], 1
    if path.suffix.lower() in TABLES:
        return _rows(
            TABLES[path.suffix.lower()], {"data_files": str(path), "split": "train"}, source, column, seed
        ), None
    name = ALIASES.get(source.lower(), source)
    return _rows(name, {"split": split}, source, column, seed), None


def _rows(name: str, options: dict[str, Any], source: str, column: str, seed: int | None) -> Iterator[str]:
    """Texts of a streamed table. Its first row is read here, so that what is wrong with it is said at once."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        table = load_dataset(name, streaming=True, **options)
        first = next(iter(table), None)
    except (DatasetNotFoundError, ConnectionError, OSError) as error:
        raise FileNotFoundError(
            f"{source!r} is no local text, and the Hub gave no dataset of that name ({' '.join(str(error).split())[:200]}); "
            "pass --data with a file or a folder."
        ) from error
    if first is None:
        raise ValueError(f"{source!r} is empty.")
    if not isinstance(first.get(column), str):
        raise ValueError(f"{source!r} has no text in a column {column!r}: there are {', '.join(map(repr, first))}.")
    if seed is not None:
        table = table.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
    return (row[column] for row in table if isinstance(row[column], str))


# ---- samples ---------------------------------------------------------------------------------------------------------
def token_samples(
    texts: Iterable[str],
    tokenizer: Tokenizer,
    block_size: int,
    *,
    limit: int | None = None,
    per_document: bool = False,
) -> Iterator[Sample]:
    """Samples of a text: blocks of exactly ``block_size`` tokens, documents joined by the end-of-text token.

    Args:
        texts: documents.
        tokenizer: a transformers tokenizer, or :class:`ByteTokenizer`.
        block_size: tokens of a block, at least 2.
        limit: number of samples; None: all. What is left at the end and fills no block is dropped.
        per_document: each document is a sample of its own, cut at ``block_size``; those with fewer than two tokens, which
            have no target, are left out.

    Raises:
        ValueError: a block size below 2, or (blocks) fewer tokens than one block in all.
    """
    if block_size < 2:
        raise ValueError(f"block_size must be at least 2 tokens, got {block_size}.")
    number, rest = 0, torch.empty(0, dtype=torch.int64)
    for text in texts:
        if limit is not None and number >= limit:
            return
        tokens = torch.tensor(tokenizer.encode(text, add_special_tokens=False), dtype=torch.int64)
        if per_document:
            if len(tokens) >= 2:
                yield Sample(number, tokens[:block_size].clone())
                number += 1
            continue
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        rest = torch.cat([rest, tokens, torch.tensor(end, dtype=torch.int64)])
        whole = len(rest) // block_size if limit is None else min(len(rest) // block_size, limit - number)
        for block in rest[: whole * block_size].split(block_size):
            if len(block):
                yield Sample(number, block.clone())
                number += 1
        rest = rest[whole * block_size :]
    if not number:
        raise ValueError(
            "the source has no document of two tokens or more." if per_document else
            f"the source has {len(rest):,} tokens, fewer than one block of {block_size:,}: take a smaller block_size."
        )  # fmt: skip


def batches(samples: Iterable[Sample], size: int) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Consecutive samples together.

    Yields:
        (numbers, input_ids int64 [n, T] padded with 0, attention_mask int64 [n, T]); the last may hold fewer.
    """
    group: list[Sample] = []
    for sample in samples:
        group.append(sample)
        if len(group) == size:
            yield _together(group)
            group = []
    if group:
        yield _together(group)


def _together(group: Sequence[Sample]) -> tuple[list[int], Tensor, Tensor]:
    length = max(len(sample.input_ids) for sample in group)
    ids = torch.zeros(len(group), length, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, sample in enumerate(group):
        ids[row, : len(sample.input_ids)] = sample.input_ids
        mask[row, : len(sample.input_ids)] = 1
    return [sample.number for sample in group], ids, mask
