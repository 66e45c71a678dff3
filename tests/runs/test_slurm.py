"""What a submission means, without a Slurm: times, resources, states. The real one is in tests/cli/test_sweep_slurm.py."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

import sparseopt as so
from sparseopt.cli._main import app
from sparseopt.runs import slurm
from sparseopt.runs.sweeps import make_plan, parse_sweep


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("90", 90), ("0:30", 1), ("90:01", 91), ("1:30:00", 90), ("1-0", 1440), ("1-2:30", 1590), ("0-0:0:61", 2)],
)
def test_times(text: str, minutes: int) -> None:
    assert slurm.parse_time(text) == minutes


@pytest.mark.parametrize("text", ["", "x", "1h", "1:2:3:4", "-5", "0", "1-", "1-0:0:0:0"])
def test_wrong_times(text: str) -> None:
    with pytest.raises(ValueError, match="time must be"):
        slurm.parse_time(text)


def test_wrong_resources() -> None:
    with pytest.raises(ValueError, match="'job_name' is set by the submission itself"):
        slurm.Resources(extra={"job_name": "x"})
    with pytest.raises(ValueError, match="mem must be a number and K, M, G or T, such as 16G, got 'much'"):
        slurm.Resources(mem="much")


def test_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A queue in which one run's job waits, one's has failed, and one's is forgotten."""
    spec = parse_sweep({"sweep_name": "s", "parameters": {"a": [1, 2, 3, 4]}}, "sweep")
    plan = make_plan(tmp_path, spec, {}, ["x", "{config}"])
    manager = so.RunManager(tmp_path)
    for combination in plan.combinations[:3]:
        plan.runs[combination.hash] = manager.new_run_id()
    first, second, third = (plan.runs[c.hash] for c in plan.combinations[:3])
    plan.jobs = {first: "7_0", second: "7_1", third: "5"}
    manager.register_run(second, plan.combinations[1].config)
    manager.finish_run(second, "failed", "Too bad.")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.warns(UserWarning, match=r"squeue was not found on this machine\. The states of jobs are not known"):
        states = slurm.state_with_jobs(manager, plan)
    assert [state["status"] for state in states] == ["pending", "failed", "pending", "pending"]
    with pytest.raises(FileNotFoundError, match="squeue was not found"):
        slurm.state_with_jobs(manager, plan, must_know=True)
    fake = tmp_path / "squeue"
    fake.write_text("#!/bin/sh\necho '7_0|PENDING|Resources'; echo '7_1|FAILED|NonZeroExitCode'\n")
    fake.chmod(0o755)
    states = slurm.state_with_jobs(manager, plan, must_know=True)
    assert [(state["status"], state["job"], state["job_state"]) for state in states] == [
        ("queued", "7_0", "PENDING (Resources)"),
        ("failed", "7_1", "FAILED (NonZeroExitCode)"),
        ("pending", "5", None),
        ("pending", None, None),
    ]
    fake.write_text("#!/bin/sh\necho '7_1|RUNNING|None'\n")
    assert [state["status"] for state in slurm.state_with_jobs(manager, plan)] == [
        "pending",
        "queued",
        "pending",
        "pending",
    ]
    fake.write_text("#!/bin/sh\necho 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1\n")
    with pytest.raises(ValueError, match="squeue failed: slurm_load_jobs error: Unable to contact slurm controller"):
        slurm.state_with_jobs(manager, plan, must_know=True)


def test_bad_usage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "base.yaml").write_text("a: 1\n")
    (tmp_path / "sweep.yaml").write_text("sweep_name: s\nparameters: {a: [1, 2]}\n")
    files = [str(tmp_path / "base.yaml"), str(tmp_path / "sweep.yaml")]

    def submit(*flags: str) -> tuple[int, str, str]:
        words = ["sweep", "submit", *files, *flags, "--base_dir", str(tmp_path / "saved_models")]
        result = CliRunner().invoke(app, words)
        return result.exit_code, result.stdout, " ".join(result.stderr.replace("│", " ").split())

    command = ("--command", "true {config}")
    assert submit("--dry_run")[:2] == (0, "a=1\na=2\n2 runs.\n")
    for flags, sentence in (
        ((*command, "--time", "soon"), "time must be minutes"),
        ((*command, "--extra", "account"), "--extra takes OPTION=VALUE, got 'account'."),
        ((*command, "--extra", "a=b", "output=x"), "'output' is set by the submission itself"),
        ((*command, "--mem", "x"), "mem must be a number"),
    ):
        code, _, said = submit(*flags)
        assert (code, sentence in said) == (2, True), said
    monkeypatch.setenv("PATH", os.devnull)
    code, _, said = submit(*command)
    assert (code, "Slurm's sbatch and srun were not found" in said) == (1, True)
    assert not (tmp_path / "saved_models").exists()
