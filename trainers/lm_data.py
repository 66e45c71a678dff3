"""Text as blocks of tokens for language-model training: which files, how many tokens, what is held out.

``dataset_size: "10M"`` means the folder ``{dataset_path}/10M`` where there is one, else the first ten million tokens.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from torch.utils.data import Dataset

from sparseopt._files import atomic_path
from sparseopt.models import cache_dir
from sparseopt.progress import Progress
from sparseopt.projection.text import TABLES, TEXTS, documents

__all__ = ["Blocks", "Sources", "find_sources", "load_blocks", "parse_size"]

# Corpora by split are often named so: bnc_spoken.train, bnc_spoken.dev.
SPLIT_ENDINGS = (".train", ".dev", ".valid", ".test")
UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9}
PIECE = 1 << 20  # characters that are tokenized together
CACHED_BYTES = 4 << 20  # from this size of files on, seconds of tokenizing


class Blocks(Dataset[dict[str, Tensor]]):
    """Sequences of equal length, one after the other in a text.

    Args:
        tokens: int32 [blocks, context length].
    """

    def __init__(self, tokens: np.ndarray) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.from_numpy(self.tokens[index].astype(np.int64))
        return {"input_ids": ids, "labels": ids}

    @property
    def fingerprint(self) -> str:
        """16 hex digits of the tokens, by which a continued run knows its data."""
        return hashlib.sha256(np.ascontiguousarray(self.tokens).tobytes()).hexdigest()[:16]


@dataclass(frozen=True)
class Sources:
    """Where the text is.

    Attributes:
        train, valid: files, or the name of a Hub dataset; ``valid`` None: a part of the training text.
        limit: tokens to take from the training text; None: all.
    """

    train: list[Path] | str
    valid: list[Path] | str | None
    limit: int | None


def parse_size(text: str) -> int | None:
    """``10M`` as 10,000,000 (K, M, B, G; in either case); None where it is no number."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMBG]?)\s*", text, re.IGNORECASE)
    return round(float(found[1]) * UNITS[found[2].upper()]) if found else None


# ---- files -----------------------------------------------------------------------------------------------------------
def find_sources(settings: dict[str, Any]) -> Sources:
    """What the section ``data`` names; reads nothing.

    Raises:
        FileNotFoundError: no such file or folder, or no text in it.
        ValueError: no path, a size that is neither a number nor there, or a file of another kind.
    """
    path, size = settings["dataset_path"], settings["dataset_size"]
    if not path:
        raise ValueError("data.dataset_path must name a text file, a folder of them, or a Hub dataset.")
    place, limit = Path(path).expanduser(), None
    if size is not None:
        inner = place / size
        if inner.exists():
            place = inner
        else:
            limit = parse_size(size)
            if not limit:
                raise ValueError(
                    f"data.dataset_size must be a number of tokens such as '10M', or a folder in {path!r}, got {size!r}."
                )
    valid = (
        None if settings["eval_path"] is None else _files(Path(settings["eval_path"]).expanduser(), "data.eval_path")
    )
    if place.is_dir() and valid is None:
        train, valid = _split_folder(place)
        return Sources(train, valid, limit)
    return Sources(_files(place, "data.dataset_path"), valid, limit)


def _files(place: Path, key: str) -> list[Path] | str:
    """Text and table files at a place, sorted by path; a name that cannot be a path is a Hub dataset's."""
    if place.is_dir():
        files = sorted(f for f in place.rglob("*") if f.is_file() and _is_text(f) and not f.name.startswith("."))
        if not files:
            raise FileNotFoundError(f"{key}: the folder {str(place)!r} holds no text ({', '.join((*TEXTS, *TABLES))}).")
        return files
    if place.is_file():
        if not _is_text(place):
            raise ValueError(
                f"{key}: {str(place)!r} is neither text ({', '.join(TEXTS)}) nor a table ({', '.join(TABLES)})."
            )
        return [place]
    name = str(place)
    if place.is_absolute() or name.startswith(".") or name.count("/") > 1 or _is_text(place):
        raise FileNotFoundError(f"{key}: there is no file or folder {name!r}.")
    return name


def _is_text(path: Path) -> bool:
    return path.suffix.lower() in (*TEXTS, *TABLES, *SPLIT_ENDINGS)


def _split_folder(folder: Path) -> tuple[list[Path] | str, list[Path] | str | None]:
    """Training and validation text of a folder: by names such as train/ and valid.txt, where something is named train."""
    entries = sorted(folder.iterdir())
    train, valid = (
        [entry for entry in entries if re.match(pattern, entry.name, re.IGNORECASE) or entry.suffix in endings]
        for pattern, endings in ((r"train(ing)?\b|train_", (".train",)),
                                 (r"(valid(ation)?|val|dev|eval)\b|(valid|val|dev|eval)_", (".dev", ".valid")))
    )  # fmt: skip
    if not train:
        return _files(folder, "data.dataset_path"), None
    found = [[f for entry in group for f in _files(entry, "data.dataset_path")] for group in (train, valid)]
    return [Path(f) for f in found[0]], [Path(f) for f in found[1]] or None


# ---- tokens ----------------------------------------------------------------------------------------------------------
def load_blocks(
    sources: Sources, settings: dict[str, Any], tokenizer: Any, context_length: int
) -> tuple[Blocks, Blocks | None]:
    """Tokenizes the sources into blocks to train on and blocks to evaluate on.

    Texts are joined by the end-of-text token, in the order of the source; what fills no block at the end is dropped.

    Args:
        sources: as :func:`find_sources` gives them.
        settings: the section ``data``.
        tokenizer: transformers' tokenizer.
        context_length: tokens of a block.

    Raises:
        ValueError: too little text, or a table without the column.
        FileNotFoundError: the Hub has no such dataset, or cannot be reached.
    """
    if not 0 <= settings["valid_fraction"] < 1:
        raise ValueError(f"data.valid_fraction must be in [0, 1), got {settings['valid_fraction']}.")
    blocks = _blocks(sources.train, settings, tokenizer, context_length, sources.limit)
    valid = None
    if sources.valid is not None:
        valid = _blocks(sources.valid, settings, tokenizer, context_length, None)
    elif settings["valid_fraction"]:
        held = max(1, round(len(blocks) * settings["valid_fraction"]))
        if held >= len(blocks):
            raise ValueError(
                f"data.dataset_path gives {len(blocks)} block of {context_length:,} tokens, of which none is left to train "
                "on: take more text or a smaller model.context_length."
            )
        blocks, valid = blocks[:-held], blocks[-held:]
    return Blocks(blocks), None if valid is None else Blocks(valid)


def _blocks(
    source: list[Path] | str, settings: dict[str, Any], tokenizer: Any, length: int, limit: int | None
) -> np.ndarray:
    whole = _cached(source, settings, tokenizer, limit)
    count = len(whole)
    if count < length:
        raise ValueError(
            f"{source if isinstance(source, str) else source[0]} gives {count:,} tokens, fewer than one block of "
            f"{length:,}: take more text or a smaller model.context_length."
        )
    return whole[: count // length * length].reshape(-1, length)


def _cached(source: list[Path] | str, settings: dict[str, Any], tokenizer: Any, limit: int | None) -> np.ndarray:
    """Tokens of large files are kept, and mapped into memory: the runs of a sweep tokenize them once."""
    files = [] if isinstance(source, str) else [(path.resolve(), path.stat()) for path in source]
    if sum(found.st_size for _, found in files) < CACHED_BYTES:
        return _tokenized(source, settings, tokenizer, limit)
    described = [[str(path), found.st_size, found.st_mtime_ns] for path, found in files]
    key = json.dumps(
        [described, settings["column"], limit, tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token_id]
    )
    folder = cache_dir() / "tokens"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npy"
    with FileLock(path.with_suffix(".lock")):
        if not path.is_file():
            tokens = _tokenized(source, settings, tokenizer, limit)
            with atomic_path(path) as temporary, temporary.open("wb") as file:
                np.save(file, tokens)
    return np.load(path, mmap_mode="r")


def _tokenized(source: list[Path] | str, settings: dict[str, Any], tokenizer: Any, limit: int | None) -> np.ndarray:
    pieces: list[np.ndarray] = []
    count = 0
    with Progress("tokenize", limit, unit="token") as progress:
        for tokens in _tokens(_texts(source, settings), tokenizer):
            pieces.append(tokens if limit is None else tokens[: limit - count])
            count += len(pieces[-1])
            progress.update(completed=count)
            if limit is not None and count >= limit:
                break
    return np.concatenate(pieces) if pieces else np.empty(0, np.int32)


def _tokens(texts: Iterable[tuple[str, bool]], tokenizer: Any) -> Iterator[np.ndarray]:
    """Tokens (int32) of pieces of text, several at a time; after the last piece of a text comes its end."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    group: list[tuple[str, bool]] = []
    size = 0

    def encoded() -> np.ndarray:
        ids = tokenizer([text for text, _ in group], add_special_tokens=False, verbose=False)["input_ids"]
        flat = [token for row, (_, last) in zip(ids, group, strict=True) for token in (*row, *(end if last else ()))]
        return np.array(flat, dtype=np.int32)

    for text, last in texts:
        group.append((text, last))
        size += len(text)
        if size >= PIECE:
            yield encoded()
            group, size = [], 0
    if group:
        yield encoded()


def _texts(source: list[Path] | str, settings: dict[str, Any]) -> Iterator[tuple[str, bool]]:
    """(piece of a text, whether it is the last one of it)."""
    if isinstance(source, str):
        try:
            found, _ = documents(source, split=settings["split"], column=settings["column"], seed=None)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"data.dataset_path: {source!r} is no local text, and the Hub gave no dataset of that name "
                f"({type(error.__cause__).__name__})."
            ) from error
        yield from ((text, True) for text in found)
        return
    for path in source:
        if path.suffix.lower() in TABLES:
            found, _ = documents(str(path), column=settings["column"], seed=None)
            yield from ((text, True) for text in found)
        else:
            yield from _pieces(path)


def _pieces(path: Path) -> Iterator[tuple[str, bool]]:
    """A text file in pieces that end with a line: of a large file no more is read than is needed."""
    rest = ""
    with path.open(encoding="utf-8", errors="replace") as file:
        while read := file.read(PIECE):
            rest += read
            cut = rest.rfind("\n") + 1
            if cut and len(rest) >= PIECE:
                yield rest[:cut], False
                rest = rest[cut:]
    yield rest, True
