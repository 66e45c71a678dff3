"""A sweep on Slurm: what is not finished goes to the queue as one array of jobs, through submitit; nothing waits for it.

Each job is the worker of one run (:mod:`sparseopt.runs._worker`), so that a run is done once however often it is
submitted: a second job leaves where another works on the run, or where it is finished. The plan keeps each run's latest
job, and what the queue still holds is not submitted again. Where a job is in the queue is asked of ``squeue`` (by the
sweep's name), never of ``sacct``: accounting is not needed.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sparseopt.runs import _worker
from sparseopt.runs.launching import command_of, plan_lock, state_of
from sparseopt.runs.registry import RunManager
from sparseopt.runs.sweeps import PLANS, Plan

__all__ = ["Resources", "job_states", "parse_time", "state_with_jobs", "submit_plan"]

# States in which a job is over; in all others it is or comes to work.
ENDED = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "COMPLETING", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY",
         "PREEMPTED", "REVOKED", "TIMEOUT")  # fmt: skip
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<parts>\d+(?::\d+){0,2})")
# Set by the submission itself: another value would hide its jobs from it, or its runs from their jobs.
_OURS = ("array", "job-name", "output", "error", "signal", "open-mode", "wckey")
# Notice before the time limit; a quarter of a short limit.
_UNTIL_KILLED_S = 90


@dataclass(frozen=True)
class Resources:
    """What each job asks for; None leaves it to the cluster. ``extra``: any other option of sbatch, by its long name."""

    partition: str | None = None
    minutes: int | None = None
    cpus: int | None = None
    gpus: int | None = None
    mem: str | None = None
    parallel: int | None = None  # jobs of the array at a time
    setup: tuple[str, ...] = ()  # lines of shell before the command
    extra: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.extra:
            if name.replace("_", "-") in _OURS:
                raise ValueError(f"extra: {name!r} is set by the submission itself and cannot be given.")
        if self.mem is not None and not re.fullmatch(r"\d+[KMGT]?B?", self.mem):
            raise ValueError(f"mem must be a number and K, M, G or T, such as 16G, got {self.mem!r}.")


def parse_time(text: str) -> int:
    """Minutes, rounded up, of a time as sbatch writes it: ``M``, ``M:S``, ``H:M:S``, ``D-H``, ``D-H:M``, ``D-H:M:S``.

    Raises:
        ValueError: it is none of these, or nothing.
    """
    found = _TIME.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"time must be minutes, H:M:S or D-H[:M[:S]], got {text!r}.")
    parts = [int(part) for part in found["parts"].split(":")]
    if found["days"] is not None:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
        seconds += (int(found["days"]) * 24 + hours) * 3600 + minutes * 60
    elif len(parts) == 3:
        seconds = parts[0] * 3600 + parts[1] * 60 + parts[2]
    else:
        seconds = parts[0] * 60 + (parts[1] if len(parts) == 2 else 0)
    if seconds < 1:
        raise ValueError(f"time must be longer than nothing, got {text!r}.")
    return -(-seconds // 60)


def submit_plan(
    manager: RunManager, plan: Plan, resources: Resources, *, skip_failed: bool = False
) -> tuple[str | None, list[dict[str, Any]]]:
    """Submits what is neither finished, nor worked on, nor in the queue, and returns at once.

    Args:
        manager: of the folder in which the runs are registered; jobs reach it under the same path.
        plan: what to run.
        resources: of each job.
        skip_failed: leave alone what failed or crashed before; otherwise that is tried again, in its folder.

    Returns:
        The id of the array (None where nothing is left to submit), and :func:`state_with_jobs`.

    Raises:
        FileNotFoundError: Slurm's commands are not on this machine.
        ModuleNotFoundError: submitit is missing.
        ValueError: sbatch refuses, squeue does not answer, or another process runs this sweep.
    """
    if shutil.which("sbatch") is None or shutil.which("srun") is None:
        raise FileNotFoundError("Slurm's sbatch and srun were not found on this machine; 'sweep run' works without.")
    array = None
    with plan_lock(manager, plan):
        states = state_with_jobs(manager, plan, must_know=True)
        left = ("finished", "running", "queued", *(("failed", "crashed") if skip_failed else ()))
        chosen = [c for c, state in zip(plan.combinations, states, strict=True) if state["status"] not in left]
        for combination in chosen:
            if combination.hash not in plan.runs:
                plan.runs[combination.hash] = manager.new_run_id()
        plan.save()  # the ids are known before anything runs under them
        if chosen:
            base = os.path.abspath(manager.base_dir)
            calls = []
            for combination in chosen:
                run_id = plan.runs[combination.hash]
                calls.append((base, run_id, plan.name, combination.config, command_of(manager, plan, run_id)))
            jobs = _sbatch(manager, plan, resources, calls)
            plan.jobs |= {plan.runs[c.hash]: job for c, job in zip(chosen, jobs, strict=True)}
            plan.save()
            array = jobs[0].partition("_")[0]
    return array, state_with_jobs(manager, plan)


def _sbatch(manager: RunManager, plan: Plan, resources: Resources, calls: Sequence[tuple[Any, ...]]) -> list[str]:
    """Sends one array, and returns the job of each call."""
    import submitit
    from submitit.core.utils import FailedJobError

    folder = os.path.abspath(manager.base_dir / PLANS / f"{plan.name}.slurm")
    # -P: what lies in the folder of the submission must not be taken for a package.
    executor = submitit.SlurmExecutor(folder=folder, max_num_timeout=0, python=f"{shlex.quote(sys.executable)} -P")
    wanted: dict[str, Any] = {
        "partition": resources.partition,
        "cpus_per_task": resources.cpus,
        "gpus_per_node": resources.gpus,
        "mem": resources.mem,
        "array_parallelism": resources.parallel,
        "setup": list(resources.setup) or None,
        "additional_parameters": dict(resources.extra) or None,
    }
    executor.update_parameters(
        job_name=_job_name(plan.name),
        time=resources.minutes,
        signal_delay_s=_UNTIL_KILLED_S if resources.minutes is None else min(_UNTIL_KILLED_S, resources.minutes * 15),
        # A key of accounting that Slurm refuses where it is not known.
        wckey=None,
        **{key: value for key, value in wanted.items() if value is not None},
    )
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):  # submitit repeats there what sbatch says
            jobs = executor.submit_array([functools.partial(work, *call) for call in calls])
    except FailedJobError as error:
        words = re.findall(r"^sbatch: (?:error|fatal): (.+)$", said.getvalue(), re.MULTILINE)
        why = "; ".join(words) or " ".join(str(error).split())
        raise ValueError(f"sbatch refuses the jobs of the sweep {plan.name!r}: {why}") from error
    print(said.getvalue(), end="", file=sys.stderr)  # warnings
    return [str(job.job_id) for job in jobs]


def work(base_dir: str, run_id: str, sweep_name: str, config: dict[str, Any], command: list[str]) -> None:
    """What a job does: it registers its run, and is its worker.

    Raises:
        RuntimeError: the run did not finish (so that Slurm, too, counts the job as failed).
    """
    manager = RunManager(base_dir)
    # Only now, not when it is submitted: what waits in a queue is not a run whose process is gone.
    manager.register_run(run_id, config, sweep_name=sweep_name)
    if _worker.main([base_dir, run_id, "--", *command]) == 1:
        record = manager.get_run(run_id)
        raise RuntimeError(f"The run {run_id} is {record['status']}: {record['error']}")


def _job_name(sweep: str) -> str:
    # squeue takes several names separated by commas.
    return f"sparseopt-{re.sub(r'[^A-Za-z0-9_.-]', '_', sweep)}"


def job_states(sweep: str) -> dict[str, str]:
    """Job -> state, as ``PENDING (Resources)``, of the jobs of a sweep that Slurm still knows.

    Raises:
        FileNotFoundError: there is no squeue on this machine.
        ValueError: squeue does not answer.
    """
    command = ["squeue", "--noheader", "--array", "--states=all", f"--name={_job_name(sweep)}", "--format=%i|%T|%r"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError:
        raise FileNotFoundError("Slurm's squeue was not found on this machine.") from None
    except subprocess.TimeoutExpired:
        raise ValueError("squeue did not answer within 60 s.") from None
    if answer.returncode != 0:
        raise ValueError(f"squeue failed: {' '.join(answer.stderr.split()) or f'exit code {answer.returncode}'}")
    states = {}
    for line in answer.stdout.splitlines():
        job, state, reason = line.strip().split("|", 2)
        states[job] = state if reason in ("None", "") else f"{state} ({reason})"
    return states


def state_with_jobs(manager: RunManager, plan: Plan, *, must_know: bool = False) -> list[dict[str, Any]]:
    """:func:`sparseopt.runs.launching.state_of`, with ``job`` and ``job_state`` where the run was submitted.

    What is in the queue has the status ``queued``. Where Slurm cannot be asked, a warning says so, and states are None;
    with ``must_know``, that is an error (see :func:`job_states`).
    """
    known: dict[str, str] = {}
    if any(run_id in plan.jobs for run_id in plan.runs.values()):
        try:
            known = job_states(plan.name)
        except (FileNotFoundError, ValueError) as error:
            if must_know:
                raise
            warnings.warn(f"{error} The states of jobs are not known.", stacklevel=2)
    states = state_of(manager, plan)  # after the queue: what ended in between is seen as ended
    for state in states:
        job = plan.jobs.get(plan.runs.get(state["hash"], ""))
        state |= {"job": job, "job_state": None if job is None else known.get(job)}
        active = state["job_state"] is not None and state["job_state"].split()[0] not in ENDED
        if active and state["status"] in ("pending", "failed", "crashed"):
            state |= {"status": "queued", "error": None}
    return states
