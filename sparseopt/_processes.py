"""This process among those that ``torchrun`` or ``accelerate launch`` started, from the environment they give it."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator

__all__ = ["is_first", "launch_group", "own_device", "position", "refuse_several"]


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


def refuse_several(what: str, instead: str) -> None:
    """Raises ValueError where this is one of several processes."""
    world = position()[1]
    if world > 1:
        raise ValueError(f"{what} runs in one process, got {world}: {instead}.")


@contextlib.contextmanager
def launch_group() -> Iterator[Callable[[], object]]:
    """The group of the processes that a launcher started; yields a function that waits for all of them."""
    import torch.distributed as dist

    ours = not dist.is_initialized()
    if ours:
        # Only waiting is to be done, on the CPU; a process may have days more to do than another.
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=7))
    try:
        yield dist.barrier
    finally:
        if ours:
            dist.destroy_process_group()
