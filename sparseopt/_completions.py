"""``completions.jsonl``: a bounded sample of rewarded completions, evenly over a run, and tables of it."""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from sparseopt._files import FormatError, atomic_write

__all__ = ["CompletionsFile", "completions_table", "read_completions", "show_completions"]

SHOWN = 300  # characters of a text in a table


class CompletionsFile:
    """The sample; see :class:`sparseopt.rewards.RecordedRewards` for its rules."""

    def __init__(self, path: Path, keep: int, per_step: int) -> None:
        self.path, self.keep, self.per_step = path, keep, min(per_step, keep)
        self._rows = read_completions(path) if path.is_file() else []
        self._resumed = path.is_file()
        self._last: int | None = None
        self._stride = 1
        self._thin()

    def add(
        self,
        step: int,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        rewards: Mapping[str, Sequence[float | None]],
    ) -> None:
        """Takes a sample of a step's batch, if this step is one of those that are recorded."""
        if self._resumed:  # what an interrupted run did after the checkpoint is done again
            self._rows = [row for row in self._rows if row["step"] < step]
            self._resumed = False
            self._write()
        if step % self._stride or step == self._last:
            return
        self._last = step
        count = min(self.per_step, len(completions))
        # Its own generator: the run's random numbers are the same with and without a record.
        chosen = sorted(random.Random(f"completions/{step}").sample(range(len(completions)), count))
        new = [
            {
                "step": step,
                "prompt": prompts[i],
                "completion": completions[i],
                "rewards": {name: _finite(values[i]) for name, values in rewards.items()},
            }
            for i in chosen
        ]
        self._rows += new
        if len(self._rows) > self.keep:
            self._thin()
            self._write()
        else:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_lines(new))

    def _thin(self) -> None:
        while len(self._rows) > self.keep:
            self._stride *= 2
            kept = [row for row in self._rows if row["step"] % self._stride == 0]
            if not kept:
                kept = self._rows[-self.per_step :]
            self._rows = kept

    def _write(self) -> None:
        atomic_write(self.path, _lines(self._rows))


def _lines(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False, allow_nan=False, default=str) + "\n" for row in rows)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def read_completions(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a ``completions.jsonl``; a line that was cut off at the end (the process was killed) is left out.

    Raises:
        FileNotFoundError: there is no such file.
        sparseopt.FormatError: another line is no such row.
    """
    source = Path(path)
    if not source.is_file():
        raise FileNotFoundError(f"there is no file '{source}' of completions.")
    lines = source.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows.append({key: row[key] for key in ("step", "prompt", "completion", "rewards")})
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines) and not line.endswith("\n"):
                break
            raise FormatError(f"line {number} of '{source}' is no completion.") from error
    return rows


def _evenly(rows: Sequence[dict[str, Any]], limit: int) -> list[dict[str, Any]]:
    """At most ``limit`` rows, the first and the last among them."""
    if len(rows) <= limit:
        return list(rows)
    if limit == 1:
        return [rows[-1]]
    return [rows[round(i * (len(rows) - 1) / (limit - 1))] for i in range(limit)]


def _shown(value: Any) -> str:
    """A text, or the last message of a conversation, shortened in the middle."""
    text = value if isinstance(value, str) else str(value[-1]["content"]) if value else ""
    text = text.strip()
    half = SHOWN // 2
    return text if len(text) <= SHOWN else f"{text[:half]} [...] {text[-half:]}"


def _cells(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    names = list(dict.fromkeys(name for row in rows for name in row["rewards"]))
    table = []
    for row in rows:
        values = [row["rewards"].get(name) for name in names]
        numbers = ["-" if value is None else f"{value:.3g}" for value in values]
        table.append([str(row["step"]), _shown(row["prompt"]), _shown(row["completion"]), *numbers])
    return ["step", "prompt", "completion", *names], table


def completions_table(path: str | Path, limit: int = 12) -> str:
    """A Markdown table of completions from ``completions.jsonl``: step, the prompt's last message, completion, rewards.

    Args:
        path: the file.
        limit: rows at most, evenly over the run, the first and the last among them. Long texts are cut in the middle.
    """
    head, rows = _cells(_evenly(read_completions(path), limit))
    if not rows:
        return "No completions were recorded.\n"
    lines = [head, ["---:", "---", "---", *["---:"] * (len(head) - 3)], *([_markdown(c) for c in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _markdown(text: str) -> str:
    """Text that stays in its cell and is shown as it is."""
    for character in "\\`*_<>[]|$#":
        text = text.replace(character, f"\\{character}")
    return "<br>".join(line.strip() for line in text.splitlines() if line.strip())


def show_completions(path: str | Path, limit: int = 12, stream: TextIO | None = None) -> None:
    """Prints completions from ``completions.jsonl``: a table on a terminal, the Markdown of it elsewhere.

    Args:
        path, limit: as for :func:`completions_table`.
        stream: default ``sys.stderr``.
    """
    stream = stream or sys.stderr
    if not stream.isatty():
        print(completions_table(path, limit), file=stream, end="", flush=True)
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    head, rows = _cells(_evenly(read_completions(path), limit))
    table = Table(title="Sampled completions", show_lines=True)
    for name in head:
        text = name in ("prompt", "completion")
        table.add_column(name, justify="left" if text else "right", overflow="fold", no_wrap=not text)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # as it is: brackets are no markup
    Console(file=stream).print(table)
