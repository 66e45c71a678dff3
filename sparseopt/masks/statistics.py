"""Numbers about masks over steps, layers and kinds of modules, from packed bits; :mod:`sparseopt.masks.plot` draws them.

Mask sets may be given as files; then at most four are in memory at a time, packed.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparseopt._safetensors import TensorFile
from sparseopt.masks.jaccard import place
from sparseopt.masks.kinds import KINDS, kind_of
from sparseopt.masks.maskset import MaskSet
from sparseopt.masks.operations import compare, opened

__all__ = ["AGAINST", "Source", "density_by_layer", "evolution", "shares_by_kind", "step_of"]

Source = MaskSet | str | os.PathLike[str]
AGAINST = ("previous", "first", "last")
OUTLIERS = 0.01  # share of the entries whose density may lie above the colour scale of a picture


def step_of(source: Source) -> int | None:
    """The training step of masks: what their metadata say, else ``step_N`` in the file's name, else None.

    Of a file only the header is read.

    Raises:
        FileNotFoundError: there is no such file.
        sparseopt.FormatError: it is damaged.
    """
    if isinstance(source, MaskSet):
        return _step(source.metadata.get("step"))
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"there is no mask file '{path}'.")
    said = None
    if path.suffix == ".safetensors":
        with TensorFile(path) as file:
            said = _step(file.metadata.get("step"))
    if said is not None:
        return said
    found = re.findall(r"step_(\d+)", path.stem)
    return int(found[-1]) if found else None


def _step(said: object) -> int | None:
    if isinstance(said, str) and said.isdecimal():
        return int(said)
    return said if isinstance(said, int) and not isinstance(said, bool) else None


def evolution(masks_by_step: Mapping[int, Source]) -> dict[str, Any]:
    """Density over steps, and how much of a mask is in that of the previous, the first and the last step.

    Args:
        masks_by_step: step -> MaskSet or mask file; two steps or more, the same parameters.

    Returns:
        ``steps`` ascending; ``total_parameters``; by step ``active_parameters`` and ``density``; for each of
        ``previous``, ``first`` and ``last``: ``jaccard`` and ``chance_jaccard`` by step (None for the first step, which
        has no previous one).

    Raises:
        ValueError: fewer than two steps, or a parameter that differs.
    """
    steps = sorted(masks_by_step)
    if len(steps) < 2:
        raise ValueError(f"an evolution takes masks of at least two steps, got {len(steps)}.")
    first, last = opened(masks_by_step[steps[0]]), opened(masks_by_step[steps[-1]])
    result: dict[str, Any] = {"steps": steps, "total_parameters": first.total_parameters}
    result |= {"active_parameters": [], "density": []}
    result |= {key: {"jaccard": [], "chance_jaccard": []} for key in AGAINST}
    previous: MaskSet | None = None
    for step in steps:
        masks = first if step == steps[0] else last if step == steps[-1] else opened(masks_by_step[step])
        result["active_parameters"].append(masks.active_parameters)
        result["density"].append(masks.density)
        for key, other in (("previous", previous), ("first", first), ("last", last)):
            found = None if other is None else compare(masks, other)
            for measure, values in result[key].items():
                values.append(None if found is None else found[measure])
        previous = masks
    return result


def density_by_layer(masks: MaskSet) -> dict[str, Any]:
    """Where a mask is active.

    Returns:
        ``density`` over all; ``layers``: numbers of the transformer layers; ``projections``: names such as q_proj, those
        of attention first; ``cells``: density by projection (rows) and layer, None where there is no such parameter;
        ``by_layer`` and ``by_projection``: densities of columns and rows; ``outside``: density by name of what belongs
        to no layer; ``scale``: where the picture's colours end.
    """
    cells: dict[tuple[str, int | None], list[int]] = {}
    order: dict[str, tuple[int, int]] = {}
    for name, shape in masks.shapes.items():
        layer, projection = place(name)
        order.setdefault(projection, (KINDS.index(kind_of(name)), len(order)))
        cell = cells.setdefault((projection, layer), [0, 0])
        cell[0] += masks.count(name)
        cell[1] += math.prod(shape)
    numbers = sorted({layer for _, layer in cells if layer is not None})
    inside = sorted({key for key, layer in cells if layer is not None}, key=order.__getitem__)
    found = {key: cell for key, cell in cells.items() if key[1] is not None}
    return {
        "density": masks.density,
        "layers": numbers,
        "projections": inside,
        "cells": [[_density([cells[p, n]]) if (p, n) in cells else None for n in numbers] for p in inside],
        "by_layer": [_density([c for (_, at), c in found.items() if at == n]) for n in numbers],
        "by_projection": [_density([c for (key, _), c in found.items() if key == p]) for p in inside],
        "outside": {key: _density([cell]) for (key, layer), cell in cells.items() if layer is None},
        "scale": _scale(list(found.values())),
    }


def shares_by_kind(masks_by_step: Mapping[int, Source]) -> dict[str, Any]:
    """How the active entries are divided between attention, MLP, embeddings, norms and others, by step.

    Returns:
        ``steps`` ascending; for each kind that the model has: ``entries`` of it, ``share_of_entries`` (what chance gives
        as share of the active ones), and by step ``active``, ``share_of_active`` and ``density``.

    Raises:
        ValueError: no steps, or a parameter that differs.
    """
    steps = sorted(masks_by_step)
    if not steps:
        raise ValueError("kinds of modules take masks of at least one step, got none.")
    first = opened(masks_by_step[steps[0]])
    entries: dict[str, int] = {}
    for name, shape in first.shapes.items():
        entries[kind_of(name)] = entries.get(kind_of(name), 0) + math.prod(shape)
    result: dict[str, Any] = {"steps": steps, "kinds": {}}
    for kind in (kind for kind in KINDS if entries.get(kind)):
        share = entries[kind] / first.total_parameters
        lists: dict[str, list[float]] = {"active": [], "share_of_active": [], "density": []}
        result["kinds"][kind] = {"entries": entries[kind], "share_of_entries": share, **lists}
    for step in steps:
        masks = first if step == steps[0] else opened(masks_by_step[step])
        first.require_same_parameters(masks)
        active = dict.fromkeys(result["kinds"], 0)
        for name in masks:
            if masks.count(name):
                active[kind_of(name)] += masks.count(name)
        for kind, values in result["kinds"].items():
            values["active"].append(active[kind])
            values["share_of_active"].append(active[kind] / max(1, masks.active_parameters))
            values["density"].append(active[kind] / values["entries"])
    return result


def _density(cells: Sequence[Sequence[int]]) -> float:
    entries = sum(cell[1] for cell in cells)
    return sum(cell[0] for cell in cells) / entries if entries else 0.0


def _scale(cells: Sequence[Sequence[int]]) -> float:
    """The density that all cells but those of 1% of the entries stay within: norms are small and often fully active."""
    densities = sorted((active / n, n) for active, n in cells if n)
    above = OUTLIERS * sum(n for _, n in densities)
    while densities and densities[-1][1] <= above:
        above -= densities.pop()[1]
    return densities[-1][0] if densities and densities[-1][0] > 0 else 1.0
