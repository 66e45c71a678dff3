"""What a run logged while it trained: ``{run_id}/log.jsonl``, one JSON object a line, with a step and numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparseopt._files import FormatError

__all__ = ["curves", "is_number", "read_log"]

LOG = "log.jsonl"


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The entries of a run's ``log.jsonl``; a last line that a kill has cut is left out, no file is an empty log.

    Raises:
        FormatError: another line is no JSON.
    """
    path = folder / LOG
    lines = path.read_text().splitlines() if path.is_file() else []
    entries = []
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
        except ValueError:
            if number == len(lines):
                break
            raise FormatError(f"{path}, line {number}, is not valid JSON.") from None
        if isinstance(entry, dict):
            entries.append(entry)
    return entries


def is_number(value: Any) -> bool:
    """Whether a value is a number, and no bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def curves(entries: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int | float, int | float]]]:
    """Logged numbers by name as (step, value), by step. Of a step logged twice, as after a restart, the later one counts."""
    found: dict[str, dict[int | float, int | float]] = {}
    for entry in entries:
        step: Any = entry.get("step")
        if is_number(step):
            for name, value in entry.items():
                if name != "step" and is_number(value):
                    found.setdefault(str(name), {})[step] = value
    return {name: sorted(points.items()) for name, points in found.items()}
