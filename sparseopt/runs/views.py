"""Views of the table of runs: which rows, in which order, with which columns, and how they look."""

from __future__ import annotations

import difflib
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TextIO

from sparseopt.runs._record import RESERVED

__all__ = ["check_columns", "default_columns", "parse_filter", "render", "select", "sort_rows", "split_filters"]

Row = Mapping[str, Any]
Test = Callable[[Any], bool]

_FILTER = re.compile(
    r"\s*(?P<column>[^=!<>~]*[^=!<>~\s])\s*(?P<op>==|!=|>=|<=|!~|=~|=|>|<|~)\s*(?P<value>.*?)\s*", re.DOTALL
)
# A comma between two filters: what follows it looks like the beginning of one.
_COMMA = re.compile(r",(?=\s*[\w./-]+\s*(?:[=!]=|[!=]~|[<>]=?|[=~]))")
_NULL = ("null", "none", "")
# Who worked on a run where: shown on request, or in --json and --csv.
PLUMBING = ("heartbeat", "host", "pid", "git_commit")
ALWAYS = ("run_id", "run_name", "status")


# ---- filters ---------------------------------------------------------------------------------------------------------
def split_filters(texts: Iterable[str]) -> list[str]:
    """Filters of which several may stand in one text, separated by commas."""
    return [part for text in texts for part in _COMMA.split(text) if part.strip()]


def parse_filter(text: str) -> tuple[str, Test]:
    """``COLUMN OP VALUE`` as the column and a test of a cell.

    ``=`` and ``!=`` compare numbers as numbers (``lr=1e-4`` is 0.0001), ``true`` and ``false`` with bools, ``null`` with
    what is not there, all else as text; a value in quotes is always text. ``<``, ``<=``, ``>``, ``>=`` compare numbers
    with numbers and text (times, say) with text, and never match what is not there or NaN. ``~`` finds a regular
    expression anywhere in the cell as text, ``!~`` is its opposite.

    Raises:
        ValueError: no operator, no column, a wrong regular expression, or an order with null.
    """
    found = _FILTER.fullmatch(text)
    if found is None:
        raise ValueError(f"A filter is COLUMN=VALUE (or !=, <, <=, >, >=, ~, !~), got {text!r}.")
    column, op, value = found["column"], found["op"], found["value"]
    if op in ("~", "=~", "!~"):
        try:
            pattern = re.compile(_unquoted(value))
        except re.error as error:
            raise ValueError(f"The filter {text!r} has a wrong regular expression: {error}.") from None
        wanted = op != "!~"
        return column, lambda cell: (cell is not None and pattern.search(_text(cell)) is not None) is wanted
    if op in ("=", "==", "!="):
        wanted = op != "!="
        return column, lambda cell: _equal(cell, value) is wanted
    if value.lower() in _NULL:
        raise ValueError(f"The filter {text!r} needs a number or a text to compare with.")
    return column, _order(op, value)


def _equal(cell: Any, value: str) -> bool:
    if len(value) >= 2 and value[0] == value[-1] and value[0] in "'\"":
        return isinstance(cell, str) and cell == value[1:-1]
    if value.lower() in _NULL:
        return cell is None or (value == "" and cell == "")
    if cell is None:
        return False
    if isinstance(cell, bool):
        return value.lower() == str(cell).lower()
    number = _number(value)
    if isinstance(cell, (int, float)):
        return number is not None and (cell == number or (math.isnan(cell) and math.isnan(number)))
    if isinstance(cell, str):
        # Somebody may have written a number as text.
        return cell == value or (number is not None and _number(cell) == number)
    return _text(cell).replace(" ", "") == value.replace(" ", "")


def _order(op: str, value: str) -> Test:
    import operator

    compare: Callable[[Any, Any], bool] = {
        "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
    }[op]  # fmt: skip
    number, text = _number(value), _unquoted(value)

    def test(cell: Any) -> bool:
        if number is None:
            return isinstance(cell, str) and compare(cell, text)
        left = _number(cell) if isinstance(cell, str) else cell
        return isinstance(left, (int, float)) and not isinstance(left, bool) and compare(left, number)

    return test


def _number(text: str) -> int | float | None:
    """Integers exactly, whatever their size; ``1_000`` and texts such as ``infinity`` in words are as Python reads them."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return None


def _unquoted(value: str) -> str:
    return value[1:-1] if len(value) >= 2 and value[0] == value[-1] and value[0] in "'\"" else value


# ---- rows and columns ------------------------------------------------------------------------------------------------
def check_columns(names: Iterable[str], columns: Sequence[str]) -> None:
    """Raises ValueError for a name that is no column, with the nearest one."""
    for name in names:
        if name not in columns:
            near = difflib.get_close_matches(name, columns, n=1, cutoff=0.5)
            last = [column for column in columns if column.rpartition(".")[2] == name]
            hint = f": did you mean {(last or near)[0]!r}?" if last or near else "; --list_columns lists them."
            raise ValueError(f"There is no column {name!r}{hint}")


def select(rows: Iterable[Row], filters: Sequence[tuple[str, Test]], sweep: str | None = None) -> list[Row]:
    """The rows of a sweep that pass every filter."""
    return [
        row
        for row in rows
        if (sweep is None or row.get("sweep_name") == sweep) and all(test(row.get(column)) for column, test in filters)
    ]


def sort_rows(rows: Sequence[Row], column: str, *, descending: bool = False) -> list[Row]:
    """By one column: numbers before text; what is not there, and NaN, is last in either direction. Stable."""

    def missing(row: Row) -> bool:
        cell = row.get(column)
        return cell is None or (isinstance(cell, float) and math.isnan(cell))

    def key(row: Row) -> tuple[bool, Any]:
        cell = row[column]
        return (False, cell) if isinstance(cell, (int, float)) else (True, _text(cell))

    return [
        *sorted((row for row in rows if not missing(row)), key=key, reverse=descending),
        *(row for row in rows if missing(row)),
    ]


def default_columns(rows: Sequence[Row], columns: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """What is worth showing: (columns, those that several runs have in common -> the value).

    Left out are empty columns, where a run is processed (host, pid, ...), and what is the same in all of several rows.
    """
    shown, common = [], {}
    for column in columns:
        cells = [row.get(column) for row in rows]
        if column in ALWAYS:
            shown.append(column)
        elif column in PLUMBING or all(cell is None for cell in cells):
            continue
        elif len(rows) > 1 and column not in RESERVED and all(cell == cells[0] for cell in cells):
            common[column] = cells[0]
        else:
            shown.append(column)
    return shown, common


# ---- looks -----------------------------------------------------------------------------------------------------------
def _text(cell: Any) -> str:
    if isinstance(cell, bool):
        return str(cell).lower()
    if isinstance(cell, (list, dict)):
        import json

        return json.dumps(cell)
    return str(cell)


def cell_text(column: str, cell: Any) -> str:
    """A cell as tables show it: six digits of a float, times to the second, ``-`` for what is not there."""
    if cell is None:
        return "-"
    if isinstance(cell, float):
        return f"{cell:.6g}"
    if column in ("timestamp", "heartbeat"):
        return str(cell)[:19].replace("T", " ")
    return " ".join(_text(cell).split())


def render(rows: Sequence[Row], columns: Sequence[str], stream: TextIO | None = None) -> None:
    """Prints a table: with rich on a terminal, as aligned text elsewhere.

    A table that is wider than the terminal is cut into several, each beginning with the first column.
    """
    stream = stream or sys.stdout
    texts = [[cell_text(column, row.get(column)) for column in columns] for row in rows]
    widths = [max(map(len, cells)) for cells in zip(columns, *texts, strict=True)]
    right = [
        any(isinstance(row.get(column), (int, float)) for row in rows)
        and not any(isinstance(row.get(column), (str, bool)) for row in rows)
        for column in columns
    ]
    if stream.isatty():
        _render_rich(columns, texts, widths, right, stream)
        return
    for line in [list(columns), *texts]:
        cells = [
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(line, widths, right, strict=True)
        ]
        print("  ".join(cells).rstrip(), file=stream)


def _render_rich(
    columns: Sequence[str], texts: Sequence[Sequence[str]], widths: Sequence[int], right: Sequence[bool], stream: TextIO
) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(file=stream)
    blocks: list[list[int]] = [[]]
    for position, width in enumerate(widths):
        taken = sum(widths[i] + 3 for i in blocks[-1]) + width + 4  # borders and padding
        if len(blocks[-1]) > (1 if len(blocks) > 1 else 0) and taken > console.width:
            blocks.append([0])
        blocks[-1].append(position)
    for block in blocks:
        table = Table()
        for i in block:
            table.add_column(Text(columns[i]), justify="right" if right[i] else "left", overflow="fold")
        for line in texts:
            table.add_row(*(Text(line[i]) for i in block))
        console.print(table)
