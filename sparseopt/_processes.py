"""This process among those that ``torchrun`` or ``accelerate launch`` started, from the environment they give it."""

from __future__ import annotations

import os

__all__ = ["is_first", "own_device", "position"]


def position() -> tuple[int, int]:
    """(number of this process from 0, number of processes); (0, 1) without a launcher."""
    return _number("RANK", 0), _number("WORLD_SIZE", 1)


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else default


def is_first() -> bool:
    """Whether this process writes files and talks: rank 0, or the only one."""
    return position()[0] == 0


def own_device(asked: str) -> str:
    """The GPU of this process where there are several processes and ``asked`` is any GPU, else what was asked for."""
    if position()[1] == 1 or asked not in ("auto", "cuda"):
        return asked
    import torch

    if not torch.cuda.is_available():
        return asked
    index = _number("LOCAL_RANK", 0)
    torch.cuda.set_device(index)
    return f"cuda:{index}"
