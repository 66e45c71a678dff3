"""Entries of a mask that are chosen together: single ones, aligned runs, whole rows or columns."""

from __future__ import annotations

__all__ = ["AUTO", "GRANULARITIES", "Granularity", "granularity_of"]

Granularity = int | str

GRANULARITIES: tuple[Granularity, ...] = (1, 8, 16, 32, "row", "column")
AUTO = "auto"  # find_masks chooses for each tensor


def granularity_of(value: object) -> Granularity:
    """Checks a granularity: 1, 8, 16, 32 (an int or its decimal string), ``"row"``, ``"column"`` or ``"auto"``."""
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    for allowed in (*GRANULARITIES, AUTO):
        if type(value) is type(allowed) and value == allowed:
            return allowed
    raise ValueError(f"granularity must be 1, 8, 16, 32, 'row', 'column' or 'auto', got {value!r}.")
