"""What a delta log holds, from its headers and statistics; no tensor is read."""

from __future__ import annotations

import math
from typing import Any

from sparseopt.deltas._chain import delta_path
from sparseopt.deltas._file import DeltaFile
from sparseopt.deltas.base import TENSOR_FILE, read_header
from sparseopt.deltas.log import DeltaLog
from sparseopt.deltas.reader import list_steps, path_of
from sparseopt.deltas.statistics import AGGREGATES

__all__ = ["summarize"]


def summarize(log: Any) -> dict[str, Any]:
    """Base, size and steps of a log.

    Args:
        log: its folder, or a :class:`sparseopt.DeltaLog`.

    Returns:
        ``base`` (name, revision, fingerprint, saved, bytes of ``base.safetensors``), ``tensors``, ``entries``, ``dtypes``,
        ``checkpoint_bytes`` (the whole model in the logged dtypes), ``steps``: per step ``step``, ``parent_step``,
        ``bytes``, ``share_of_checkpoint``, ``changed`` entries, ``changed_share``, and the aggregates of its statistics
        (None where there are none); ``bytes`` of all steps; ``problem``: what keeps the chain from being whole, or None.

    Raises:
        FileNotFoundError: no log there.
        sparseopt.FormatError: a damaged file.
    """
    path = path_of(log)
    steps = list_steps(path)
    header = read_header(path)
    reader = DeltaLog(path)
    entries = sum(math.prod(shape) for shape in header.shapes.values())
    checkpoint = sum(math.prod(shape) * header.dtypes[name].itemsize for name, shape in header.shapes.items())
    rows = []
    for step in steps:
        file = DeltaFile(delta_path(path, step))
        known = reader.stats(step) if (path / f"stats_step_{step}.json").is_file() else {}
        rows.append(
            {
                "step": step,
                "parent_step": file.parent_step,
                "bytes": file.size,
                "share_of_checkpoint": file.size / checkpoint if checkpoint else 0.0,
                "changed": file.changed_parameters,
                "changed_share": file.changed_parameters / entries if entries else 0.0,
                **{key: known.get(key) for key in AGGREGATES},
            }
        )
    problem = None
    try:
        reader.chain()
    except ValueError as error:
        problem = str(error)
    saved = path / TENSOR_FILE
    return {
        "log": str(path),
        "base": {
            "name": header.name,
            "revision": header.revision,
            "fingerprint": header.fingerprint,
            "saved": header.saved,
            "bytes": saved.stat().st_size if saved.is_file() else 0,
        },
        "tensors": len(header.shapes),
        "entries": entries,
        "dtypes": sorted({str(dtype).removeprefix("torch.") for dtype in header.dtypes.values()}),
        "checkpoint_bytes": checkpoint,
        "steps": rows,
        "bytes": sum(row["bytes"] for row in rows),
        "problem": problem,
    }
