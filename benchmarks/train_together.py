"""``--together``: all arms of :mod:`sparseopt.benchmarks.train_step` alive at once, each in a process of its own.

They compile at the same time and are timed in turns: while one runs its steps, the others wait. An arm compiles once, whatever
the number of turns, and its peak memory is its process' own; the device has to hold all of them together.
"""

from __future__ import annotations

import contextlib
import multiprocessing as mp
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from sparseopt.benchmarks.train_arms import CheckError, Unavailable
from sparseopt.benchmarks.train_settings import Arm, Settings
from sparseopt.benchmarks.train_timing import Given, TimedArm
from sparseopt.progress import Progress

__all__ = ["measure_together"]

EVERY = 30.0  # seconds between two lines that say who still compiles


class _Silent(Progress):
    """The first process shows the progress of all."""

    def __init__(self) -> None: ...

    def update(self, *args: Any, **values: Any) -> None: ...


def _serve(arm: Arm, settings: Settings, mode: str, device: torch.device, pipe: Connection) -> None:
    """One arm: warms up, then times the steps that it is sent; None asks for the result."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process asks for what there is
    try:
        timed = TimedArm(arm, settings, mode, settings.warmup, device, _Silent(), Given())
        pipe.send(("ready", None))
        while (steps := pipe.recv()) is not None:
            timed.warm()
            timed.time(steps)
            pipe.send(("timed", None))
        pipe.send(("result", timed.result()))
    except CheckError as error:
        _tell(pipe, "wrong", str(error))
    except Unavailable as error:
        _tell(pipe, "unavailable", str(error))
    except torch.OutOfMemoryError:
        _tell(pipe, "unavailable", "out of memory beside the other arms")
    except (EOFError, BrokenPipeError):  # nobody asks any more
        return
    except Exception as error:
        traceback.print_exc()
        _tell(pipe, "failed", f"{arm.name}: {type(error).__name__}: {error}")


def _tell(pipe: Connection, kind: str, why: str) -> None:
    with contextlib.suppress(BrokenPipeError):  # nobody asks any more
        pipe.send((kind, why))


def measure_together(
    settings: Settings, mode: str, splits: Sequence[range], device: torch.device, arms: dict[str, dict[str, Any]],
    check: Callable[[], None],
) -> None:  # fmt: skip
    """Times every arm in as many turns as there are ``splits``.

    Args:
        settings: of the run, of random tokens.
        mode: "eager", "compiled", "whole" or "graphs".
        splits: the steps of each turn.
        device: where.
        arms: gets the result of each arm by name, or ``{"unavailable": why}``; after Ctrl-C, of those that were timed.
        check: called while the arms warm up; nothing is timed before it returns.

    Raises:
        CheckError: a result is wrong.
        RuntimeError: an arm failed otherwise.
        KeyboardInterrupt: after what was measured is in ``arms``.
    """
    with _processes(settings, mode, device) as pipes:
        check()
        ready = _all_ready(pipes, arms)
        timed: set[str] = set()
        try:
            with Progress(f"{settings.workload} {mode}", sum(map(len, splits)) * len(ready)) as progress:
                for steps in splits:
                    for name in list(ready):
                        pipes[name].send(steps)
                        if _answer(name, pipes[name], arms) is None:
                            ready.remove(name)
                            timed.discard(name)
                            continue
                        timed.add(name)
                        progress.update(len(steps), arm=name)
        except KeyboardInterrupt:
            _results([name for name in ready if name in timed], pipes, arms)
            raise
        _results(ready, pipes, arms)


@contextlib.contextmanager
def _processes(settings: Settings, mode: str, device: torch.device) -> Iterator[dict[str, Connection]]:
    """Arm -> the pipe to its process."""
    context = mp.get_context("spawn")
    pipes: dict[str, Connection] = {}
    children = []
    try:
        for arm in settings.arms:
            here, there = context.Pipe()
            child = context.Process(target=_serve, args=(arm, settings, mode, device, there), name=arm.name)
            child.start()
            there.close()
            children.append(child)
            pipes[arm.name] = here
        yield pipes
    finally:
        for pipe in pipes.values():
            pipe.close()
        for child in children:
            child.join(5)
            if child.is_alive():
                child.kill()


def _answer(name: str, pipe: Connection, arms: dict[str, dict[str, Any]]) -> Any:
    """What an arm sends next (True for nothing in particular); None where it cannot be measured, which is noted."""
    try:
        kind, value = pipe.recv()
    except EOFError as error:
        raise RuntimeError(f"the process of {name} ended without a word.") from error
    if kind == "wrong":
        raise CheckError(value)
    if kind == "failed":
        raise RuntimeError(value)
    if kind == "unavailable":
        arms[name] = {"unavailable": value}
        return None
    return True if value is None else value


def _all_ready(pipes: dict[str, Connection], arms: dict[str, dict[str, Any]]) -> list[str]:
    """The arms that can be timed, in order, once all are warm."""
    began, waiting, good = time.monotonic(), dict(pipes), set[str]()
    while waiting:
        answered = wait(list(waiting.values()), timeout=EVERY)
        for name in [name for name, pipe in waiting.items() if pipe in answered]:
            if _answer(name, waiting.pop(name), arms) is not None:
                good.add(name)
            print(f"{name}: warm after {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        if waiting and not answered:
            print(f"{time.monotonic() - began:.0f} s, warming up: {', '.join(waiting)}", file=sys.stderr, flush=True)
    return [name for name in pipes if name in good]


def _results(names: Sequence[str], pipes: dict[str, Connection], arms: dict[str, dict[str, Any]]) -> None:
    for name in names:
        pipes[name].send(None)
    for name in names:
        while (found := _answer(name, pipes[name], arms)) is True:
            pass  # Ctrl-C came during its turn, whose end it tells first
        if found is not None:
            arms[name] = found
