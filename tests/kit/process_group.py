"""Processes of one gloo group that stay for many tests: starting one costs seconds of imports."""

from __future__ import annotations

import atexit
import datetime
import faulthandler
import multiprocessing as mp
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = 180.0  # of one call, the start of the processes included; a busy machine takes its time


def _serve(rank: int, world: int, folder: str, pipe: Connection) -> None:
    faulthandler.enable()
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world,
        timeout=datetime.timedelta(seconds=TIMEOUT / 2),
    )  # fmt: skip
    while True:
        try:
            work, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, work(rank, world, *args)))
        except BaseException as error:
            traceback.print_exc()
            pipe.send((False, f"{type(error).__name__}: {error}"))


class Processes:
    """``world`` processes; call it with a function of a module and its arguments: ``function(rank, world, *args)``."""

    def __init__(self, world: int) -> None:
        self.folder = tempfile.TemporaryDirectory()
        context = mp.get_context("spawn")
        self.pipes: list[Connection] = []
        self.children = []
        for rank in range(world):
            here, there = context.Pipe()
            child = context.Process(target=_serve, args=(rank, world, self.folder.name, there), daemon=True)
            child.start()
            there.close()
            self.pipes.append(here)
            self.children.append(child)

    def outcomes(self, work: Callable[..., Any], *args: Any) -> list[tuple[bool, Any]]:
        """(True, result) or (False, error) of each rank."""
        for pipe in self.pipes:
            pipe.send((work, args))
        results = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(TIMEOUT):
                self.close()
                raise TimeoutError(f"rank {rank} did not answer.")
            results.append(pipe.recv())
        return results

    def __call__(self, work: Callable[..., Any], *args: Any) -> list[Any]:
        outcomes = self.outcomes(work, *args)
        failed = [str(value) for good, value in outcomes if not good]
        assert not failed, failed
        return [value for _, value in outcomes]

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.close()
        for child in self.children:
            child.join(5)
            if child.is_alive():
                child.kill()
        self.folder.cleanup()


_started: dict[int, Processes] = {}


def processes(world: int) -> Processes:
    """The processes of a group of this size, started at the first use."""
    if world not in _started or not all(child.is_alive() for child in _started[world].children):
        _started[world] = Processes(world)
        atexit.register(_started[world].close)
    return _started[world]
