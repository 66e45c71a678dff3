"""What stands between a sweep and one command: it watches the command and books how it ended.

It outlives a sweep that is killed, so that a run that goes on is neither lost nor done twice: while it lives it holds
the run's worker lock, and a second one leaves at once.

    python -m sparseopt.runs._worker BASE_DIR RUN_ID -- COMMAND...
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from sparseopt.runs.registry import RUN_ID_VARIABLE, RUNS_DIR_VARIABLE, RunManager

__all__ = ["is_worked_on", "main", "worker_lock"]

LOG = "log.txt"
PR_SET_PDEATHSIG = 1
# Slurm's notice, under submitit, that the job will end soon: for the command it is a Ctrl-C, with time to write a checkpoint.
_PASSED_ON: dict[int, int] = {signal.SIGUSR2: signal.SIGINT}


@contextlib.contextmanager
def worker_lock(folder: Path, wait: float = 0.0) -> Iterator[bool]:
    """Tries, for ``wait`` seconds, to be the one worker of a run; yields whether it is."""
    from filelock import FileLock, Timeout

    lock = FileLock(folder / ".worker.lock")
    try:
        lock.acquire(timeout=wait, poll_interval=0.02)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def is_worked_on(folder: Path) -> bool:
    """Whether some process is the worker of the run."""
    if not folder.is_dir():
        return False
    with worker_lock(folder) as mine:
        return not mine


def main(arguments: Sequence[str]) -> int:
    """Runs a command for a run: 0 where the run is finished, 1 where it is not, 3 where another works on it."""
    base_dir, run_id, _, *command = arguments
    folder, manager = Path(base_dir) / run_id, RunManager(base_dir)
    with worker_lock(folder, 1.0) as mine:  # longer than anybody takes to look whether there is a worker
        if not mine:
            return 3
        if manager.get_run(run_id)["status"] == "finished":
            return 0
        return _work(manager, run_id, folder, command)


def _work(manager: RunManager, run_id: str, folder: Path, command: Sequence[str]) -> int:
    caught: list[int] = []
    child: subprocess.Popen[bytes] | None = None

    def forward(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        if child is not None:
            _pass_on(child, number)

    for number in (signal.SIGINT, signal.SIGTERM, *_PASSED_ON):
        signal.signal(number, forward)
    manager.start_run(run_id)
    environment = {**os.environ, RUN_ID_VARIABLE: run_id, RUNS_DIR_VARIABLE: os.path.abspath(manager.base_dir)}
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None

    def prepare() -> None:
        if libc is not None:
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        for number in _PASSED_ON:  # Slurm gives its notice to every process, and not all know it
            signal.signal(number, signal.SIG_IGN)

    with open(folder / LOG, "ab") as log:
        try:
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,  # signals to its group reach what it starts, and not this process
                preexec_fn=prepare,  # no other thread runs yet
            )
        except OSError as error:
            manager.finish_run(run_id, "failed", f"{command[0]} cannot be started: {error.strerror}.")
            return 1
        if caught:  # between the handlers and the start
            _pass_on(child, caught[-1])
        with manager.beating(run_id):
            code = child.wait()
    return _book(manager, run_id, code, caught)


def _pass_on(child: subprocess.Popen[bytes], number: int) -> None:
    # It may have ended unseen: poll() knows nothing while wait() is interrupted by this very signal.
    with contextlib.suppress(ProcessLookupError):
        if child.poll() is None:
            os.killpg(child.pid, _PASSED_ON.get(number, number))


def _book(manager: RunManager, run_id: str, code: int, caught: Sequence[int]) -> int:
    record = manager.get_run(run_id)
    if code == 0 and record["status"] != "failed":
        manager.finish_run(run_id)
        return 0
    if caught and record["status"] == "finished":  # by the command, which was done when the signal came
        return 0
    if caught:
        manager.finish_run(run_id, "crashed", f"Interrupted by {signal.Signals(caught[0]).name}.")
    elif code in (-signal.SIGINT, -signal.SIGTERM):  # as Slurm ends all processes of a job; ours comes a moment later
        manager.finish_run(run_id, "crashed", f"Interrupted by {signal.Signals(-code).name}.")
    elif record["status"] != "failed":  # else the command has said what went wrong
        how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
        manager.finish_run(run_id, "failed", f"The command ended with {how}; its output is in {LOG}.")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
