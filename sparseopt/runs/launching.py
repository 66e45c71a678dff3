"""Running the plan of a sweep: so many workers at a time, each watching one command; what is finished is left alone."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from sparseopt.progress import Progress
from sparseopt.runs._table import RECORD
from sparseopt.runs._worker import is_worked_on
from sparseopt.runs.registry import RunManager
from sparseopt.runs.sweeps import PLANS, Combination, Plan, load_plan

__all__ = ["DEFAULT_COMMAND", "command_of", "plan_lock", "run_plan", "split_command", "state_of"]

DEFAULT_COMMAND = "{python} -P -m sparseopt train lm --config {config} --base_dir {base_dir}"
PLACEHOLDERS = ("python", "config", "run_id", "run_dir", "base_dir")
POLL_S = 0.05
# Interrupted commands have so long to write what they need for going on.
GRACE_S = 60.0


@dataclass
class _Active:
    """A run that is worked on: by a worker of ours, or by one that a killed sweep has left."""

    combination: Combination
    run_id: str
    worker: subprocess.Popen[bytes] | None


def split_command(template: str) -> list[str]:
    """The words of a command template.

    Raises:
        ValueError: it cannot be split, is empty, or says nowhere which run is meant.
    """
    try:
        words = shlex.split(template)
    except ValueError as error:
        raise ValueError(f"The command {template!r} cannot be split into words: {error}.") from None
    if not words:
        raise ValueError("The command of a sweep is empty.")
    if not any("{config}" in word or "{run_dir}" in word or "{run_id}" in word for word in words):
        raise ValueError(f"The command must hold {{config}}, {{run_dir}} or {{run_id}}, got {template!r}.")
    return words


def state_of(manager: RunManager, plan: Plan) -> list[dict[str, Any]]:
    """Every combination of a plan: values, hash, run_id (None before its start), status, final_valid_loss, error.

    The status is ``pending``, ``running``, ``finished``, ``failed`` or ``crashed``.
    """
    states = []
    for combination in plan.combinations:
        state: dict[str, Any] = {"values": combination.values, "hash": combination.hash, "run_id": None,
                                 "status": "pending", "final_valid_loss": None, "error": None}  # fmt: skip
        run_id = plan.runs.get(combination.hash)
        # No record: killed between the choice of the id and its registration, or deleted by somebody.
        if run_id is not None and (manager.base_dir / run_id / RECORD).is_file():
            record = manager.get_run(run_id)
            status, working = record["status"], is_worked_on(manager.base_dir / run_id)
            if status != "finished":
                status = "running" if working else "failed" if status == "failed" else "crashed"
            state |= {"run_id": run_id, "status": status, "error": record["error"],
                      "final_valid_loss": record["metrics"].get("final_valid_loss")}  # fmt: skip
        states.append(state)
    return states


def run_plan(manager: RunManager, plan: Plan, *, jobs: int = 1, skip_failed: bool = False) -> list[dict[str, Any]]:
    """Runs what is not finished yet, ``jobs`` at a time, and returns :func:`state_of`.

    Each run has its configuration in ``{run_dir}/config.yaml`` and its output in ``{run_dir}/log.txt``. A run that fails
    ends no other. Ctrl-C and SIGTERM interrupt the commands and wait for them; running again goes on.

    Args:
        manager: of the folder in which the runs are registered.
        plan: what to run.
        jobs: runs at a time.
        skip_failed: leave alone what failed or crashed before; otherwise that is tried again, in its folder.

    Raises:
        ValueError: ``jobs`` is less than 1, or another process runs this sweep.
    """
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}.")
    with plan_lock(manager, plan):
        _run(manager, plan, jobs, skip_failed)
    return state_of(manager, plan)


@contextlib.contextmanager
def plan_lock(manager: RunManager, plan: Plan) -> Iterator[None]:
    """Being the one process that starts runs of a sweep; the plan is saved, with what others have started before.

    Raises:
        ValueError: another process runs this sweep.
    """
    from filelock import FileLock, Timeout

    folder = manager.base_dir / PLANS
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / f".{plan.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"The sweep {plan.name!r} is being run by another process.") from None
    try:
        if plan.path.exists():
            saved = load_plan(manager.base_dir, plan.name)
            plan.runs, plan.jobs = saved.runs | plan.runs, saved.jobs | plan.jobs
        plan.save()
        yield
    finally:
        lock.release()


def _run(manager: RunManager, plan: Plan, jobs: int, skip_failed: bool) -> None:
    before = state_of(manager, plan)
    done = ("finished", "failed", "crashed") if skip_failed else ("finished",)
    waiting = [c for c, state in zip(plan.combinations, before, strict=True) if state["status"] == "pending"]
    again = [
        c
        for c, state in zip(plan.combinations, before, strict=True)
        if state["status"] in ("failed", "crashed") and state["status"] not in done
    ]
    waiting = again + waiting
    active = [
        _Active(c, state["run_id"], None)
        for c, state in zip(plan.combinations, before, strict=True)
        if state["status"] == "running"
    ]
    skipped = len(plan.combinations) - len(waiting) - len(active)
    failed = 0
    with (
        _termination_as_interrupt(),
        Progress(f"sweep {plan.name}", len(plan.combinations), unit="run", completed=skipped, interval=0.0) as progress,
    ):
        try:
            while waiting or active:
                while waiting and len(active) < jobs:
                    active.append(_start(manager, plan, waiting.pop(0)))
                for entry in list(active):
                    ended = _ended(manager, entry)
                    if ended is None:
                        continue
                    active.remove(entry)
                    if ended == "again":  # a worker that a killed sweep has left is gone without finishing
                        waiting.insert(0, entry.combination)
                        continue
                    failed += ended != "finished"
                    progress.update(failed=failed, last=entry.run_id)
                time.sleep(POLL_S)
        except BaseException:
            _interrupt(manager, active)
            raise


def _start(manager: RunManager, plan: Plan, combination: Combination) -> _Active:
    run_id = plan.runs.get(combination.hash)
    if run_id is None:
        run_id = plan.runs[combination.hash] = manager.new_run_id()
        plan.save()  # before anything runs under this id
    manager.register_run(run_id, combination.config, sweep_name=plan.name)
    base, command = os.path.abspath(manager.base_dir), command_of(manager, plan, run_id)
    worker = subprocess.Popen(
        [sys.executable, "-P", "-m", "sparseopt.runs._worker", base, run_id, "--", *command],
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C on a terminal reaches the sweep alone, which passes it on once
    )
    return _Active(combination, run_id, worker)


def command_of(manager: RunManager, plan: Plan, run_id: str) -> list[str]:
    """The command of a run, its placeholders filled in with absolute paths."""
    base = Path(os.path.abspath(manager.base_dir))
    folder = base / run_id
    values = (sys.executable, str(folder / "config.yaml"), run_id, str(folder), str(base))
    texts = dict(zip(PLACEHOLDERS, values, strict=True))
    return [_fill(word, texts) for word in plan.command]


def _fill(word: str, texts: dict[str, str]) -> str:
    for name, text in texts.items():
        word = word.replace(f"{{{name}}}", text)
    return word


def _ended(manager: RunManager, entry: _Active) -> str | None:
    """How a run ended: finished, failed, again (to be started once more), or None while it goes on."""
    if entry.worker is not None:
        code = entry.worker.poll()
        if code is None:
            return None
        if code != 3:
            return "finished" if code == 0 else "failed"
        entry.worker = None  # another worker has it
    if is_worked_on(manager.base_dir / entry.run_id):
        return None
    status = manager.get_run(entry.run_id)["status"]
    return str(status) if status in ("finished", "failed") else "again"


def _interrupt(manager: RunManager, active: Sequence[_Active]) -> None:
    """Interrupts all commands through their workers and waits; a second Ctrl-C, or the end of the grace, kills."""
    workers = [entry.worker for entry in active if entry.worker is not None]
    for worker in workers:
        if worker.poll() is None:
            worker.send_signal(signal.SIGINT)
    deadline = time.monotonic() + GRACE_S
    try:
        for worker in workers:
            worker.wait(max(0.0, deadline - time.monotonic()))
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        for worker in workers:
            worker.kill()  # its command goes with it
            worker.wait()
    with contextlib.suppress(OSError):
        manager.refresh_csv()


@contextlib.contextmanager
def _termination_as_interrupt() -> Iterator[None]:
    """SIGTERM, as a job's time limit sends it, ends the sweep in order."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # handlers belong to the main thread
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
