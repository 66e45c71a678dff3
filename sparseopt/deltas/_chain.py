"""The chain of a delta log: each step follows the one logged before it, the first the base, all on the log's own base."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from sparseopt._files import FormatError
from sparseopt.deltas._file import DeltaFile
from sparseopt.deltas.base import Base, Header
from sparseopt.deltas.delta import Delta

__all__ = ["check_chain", "check_delta", "delta_path", "require_step"]


def delta_path(folder: Path, step: int) -> Path:
    """The file of a logged step."""
    return folder / f"delta_step_{step}.safetensors"


def require_step(folder: Path, steps: Sequence[int], step: int) -> int:
    """Returns ``step``.

    Raises:
        ValueError: it is none of the logged ``steps``, which are listed.
    """
    if step not in steps:
        raise ValueError(f"the delta log '{folder}' has no step {step}; it has {_listed(steps)}.")
    return step


def check_delta(path: Path, step: int, delta: DeltaFile | Delta, base: Base | Header) -> None:
    """Checks that the delta read from ``path`` is the one of ``step`` in a log with this base.

    Raises:
        sparseopt.FormatError: it holds another step.
        ValueError: it is of another base, or of other parameters than the base's.
    """
    if delta.step != step:
        raise FormatError(f"'{path}' is damaged or renamed: it holds step {delta.step}.")
    if delta.base_fingerprint != base.fingerprint:
        raise ValueError(
            f"'{path}' is a delta of another base (fingerprint {str(delta.base_fingerprint)[:12]}) than its log's, "
            f"{base.name or 'an unnamed model'!r} (fingerprint {base.fingerprint[:12]})."
        )
    dtypes = delta.dtypes
    for name, shape in delta.shapes.items():
        if base.shapes.get(name) != shape or base.dtypes[name] != dtypes[name]:
            raise ValueError(
                f"'{path}' changes {name!r} as {_described(shape, dtypes[name])}, the base has "
                f"{_described(base.shapes[name], base.dtypes[name]) if name in base.shapes else 'no such tensor'}."
            )


def check_chain(folder: Path, steps: Sequence[int], last: int, open_file: Callable[[int], DeltaFile]) -> list[int]:
    """Checks the headers of all that the model at step ``last`` depends on.

    Args:
        folder: of the log.
        steps: the logged ones, ascending.
        last: one of them.
        open_file: gives the file of a step, after :func:`check_delta`.

    Returns:
        The chain: the logged steps up to and with ``last``.

    Raises:
        ValueError: there is a gap.
    """
    chain = [step for step in steps if step <= last]
    parent: int | None = None
    for step in chain:
        follows = open_file(step).parent_step
        if follows != parent:
            raise ValueError(
                f"the delta log '{folder}' has a gap: step {step} follows {_place(follows)}, not {_place(parent)}; "
                f"it has {_listed(steps)}."
            )
        parent = step
    return chain


def _place(step: int | None) -> str:
    return "the base" if step is None else f"step {step}"


def _listed(steps: Sequence[int]) -> str:
    return f"step{'s' if len(steps) > 1 else ''} {', '.join(map(str, steps))}" if steps else "none"


def _described(shape: Sequence[int], dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')}{list(shape)}"
