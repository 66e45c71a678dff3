"""``sparseopt sweep run|status|resume`` with small commands, failing, interrupted and killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from noting_command import notes, write_command
from typer.testing import CliRunner

import sparseopt as so
from sparseopt.cli._main import app


class Sweep:
    """A sweep of 12 runs in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.command = write_command(folder)
        (folder / "base.yaml").write_text("p: {a: 0, b: 0}\nrun: {name: test}\n")
        self.write("p.a: {values: [1, 2, 3, 4]}", "p.b: [1, 2, 3]")
        self.manager = so.RunManager(folder / "saved_models")
        self.processes: list[subprocess.Popen[str]] = []

    def write(self, *parameters: str) -> None:
        lines = "".join(f"  {parameter}\n" for parameter in parameters)
        (self.folder / "sweep.yaml").write_text(f"sweep_name: twelve\nparameters:\n{lines}")

    @property
    def run(self) -> list[str]:
        return ["run", str(self.folder / "base.yaml"), str(self.folder / "sweep.yaml"), "--command", self.command]

    def start(self, *args: str) -> subprocess.Popen[str]:
        self.processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "sparseopt", "sweep", *args, "--base_dir", str(self.manager.base_dir)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd=self.folder,
            )
        )
        return self.processes[-1]

    def finish(self, *args: str) -> tuple[int, str, str]:
        process = self.start(*args)
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err

    def notes(self, word: str) -> list[str]:
        return notes(self.folder, word)

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not condition():
            assert time.monotonic() < deadline
            assert self.processes[-1].poll() is None or condition()
            time.sleep(0.005)

    def statuses(self) -> list[str]:
        return [row["status"] for row in self.manager.rows()]

    def status(self) -> dict[str, Any]:
        return dict(json.loads(self.finish("status", "twelve", "--json")[1]))


@pytest.fixture
def sweep(tmp_path: Path) -> Any:
    sweep = Sweep(tmp_path)
    yield sweep
    (tmp_path / "hold").unlink(missing_ok=True)  # what waits ends
    for process in sweep.processes:
        if process.poll() is None:
            process.kill()
        process.communicate()


ALL = sorted(f"{a}-{b}" for a in (1, 2, 3, 4) for b in (1, 2, 3))


@pytest.mark.parametrize("kill_workers", [False, True])
def test_killed_twice_ends_with_twelve_none_done_twice(sweep: Sweep, kill_workers: bool) -> None:
    """Runs that go on without the sweep are waited for; those killed with it are done again."""
    for round_, wanted in enumerate((3, 7)):
        process = sweep.start(*(sweep.run if round_ == 0 else ["resume", "twelve"]), "--jobs", "2")
        sweep.until(lambda wanted=wanted: len(sweep.notes("done")) >= wanted)  # type: ignore[misc]
        (sweep.folder / "hold").write_text(f"held_{round_}")
        # Two commands have begun and cannot end.
        sweep.until(lambda word=f"held_{round_}": len({*sweep.notes(word)} - {*sweep.notes("done")}) == 2)  # type: ignore[misc]
        process.send_signal(signal.SIGKILL)
        process.wait()
        held = [row for row in sweep.manager.rows() if row["status"] == "running"]
        assert len(held) == 2
        if kill_workers:
            for row in held:
                os.kill(row["pid"], signal.SIGKILL)
            while "running" in sweep.statuses():  # their commands die with them, before the hold ends
                time.sleep(0.005)
        (sweep.folder / "hold").unlink()
    code, out, err = sweep.finish("resume", "twelve", "--jobs", "2")
    assert (code, out) == (0, "Sweep twelve: 12 runs: 12 finished.\n"), err
    assert sweep.statuses() == ["finished"] * 12
    assert sorted(sweep.notes("done")) == ALL
    started = sweep.notes("start")
    assert sorted(set(started)) == ALL
    assert (len(started) > 12) is kill_workers
    # Once more: nothing is left to do.
    assert sweep.finish(*sweep.run)[0] == 0
    assert sweep.notes("start") == started


def test_one_failure_ends_nothing(sweep: Sweep) -> None:
    sweep.write("p.a: [1, 2]", "p.b: [1, 2]")
    (sweep.folder / "fail_1-2").touch()
    code, out, err = sweep.finish(*sweep.run)
    assert code == 1
    assert out == "Sweep twelve: 4 runs: 3 finished, 1 failed.\n"
    assert "1 of 4 runs did not finish" in err
    assert "exit code 3; its output is in log.txt" in err
    assert "sweep twelve: 4/4 runs (100%)" in err
    (failed,) = [row for row in sweep.manager.rows() if row["status"] == "failed"]
    assert (failed["p.a"], failed["p.b"], failed["sweep_name"]) == (1, 2, "twelve")
    assert (sweep.manager.base_dir / failed["run_id"] / "log.txt").read_text() == "output of 1-2\n"
    assert sweep.notes("done") == ["1-1", "2-1", "2-2"]
    assert sweep.finish("resume", "twelve", "--skip_failed")[0] == 1
    assert len(sweep.notes("start")) == 4
    (sweep.folder / "fail_1-2").unlink()
    assert sweep.finish("resume", "twelve")[0] == 0
    assert sweep.notes("start") == ["1-1", "1-2", "2-1", "2-2", "1-2"]
    assert sweep.statuses() == ["finished"] * 4  # in the folder it had


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(sweep: Sweep, number: int) -> None:
    sweep.write("p.a: [1, 2]", "p.b: [1, 2]")
    (sweep.folder / "hold").touch()
    process = sweep.start(*sweep.run, "--jobs", "2")
    sweep.until(lambda: len(sweep.notes("start")) == 2)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Interrupted: what was written is kept." in err
    assert sweep.statuses() == ["crashed", "crashed"]
    assert sweep.manager.rows()[0]["error"] == "Interrupted by SIGINT."
    assert sweep.status()["counts"] == {
        "finished": 0, "running": 0, "queued": 0, "pending": 2, "failed": 0, "crashed": 2,
    }  # fmt: skip
    (sweep.folder / "hold").unlink()
    assert sweep.finish("resume", "twelve", "--jobs", "2")[0] == 0
    assert sorted(sweep.notes("done")) == ["1-1", "1-2", "2-1", "2-2"]


def test_one_process_at_a_time(sweep: Sweep) -> None:
    (sweep.folder / "hold").touch()
    first = sweep.start(*sweep.run)
    sweep.until(lambda: len(sweep.notes("start")) == 1)
    second = CliRunner().invoke(app, ["sweep", "resume", "twelve", "--base_dir", str(sweep.manager.base_dir)])
    assert (second.exit_code, "is being run by another process" in second.stderr) == (1, True)
    assert sweep.status()["counts"]["running"] == 1
    first.send_signal(signal.SIGINT)


def test_more_values_later(sweep: Sweep) -> None:
    sweep.write("p.a: [1]", "p.b: [1, 2]")
    assert sweep.finish(*sweep.run)[0] == 0
    sweep.write("p.a: [1]", "p.b: [3, 2.0, 1]")
    assert sweep.finish(*sweep.run)[0] == 0
    assert sweep.notes("start") == ["1-1", "1-2", "1-3"]
    code, out, _ = sweep.finish("status", "twelve")
    assert code == 0
    assert out.splitlines()[0].split() == ["run_id", "status", "final_valid_loss", "p.a", "p.b"]
    assert out.splitlines()[-1] == "3 runs: 3 finished."


def test_a_command_that_uses_the_registry_writes_to_the_sweeps_run(sweep: Sweep) -> None:
    """As the seed's training script does: it sets its run up itself, and adds metrics."""
    (sweep.folder / "command.py").write_text(
        "import sys, yaml, sparseopt as so\n"
        "manager = so.RunManager(sys.argv[1] + '/saved_models')\n"
        "config = yaml.safe_load(open(sys.argv[2]))\n"
        "run_id = manager.setup_run({**config, 'more': 1})\n"
        "manager.update_metrics(run_id, {'final_valid_loss': config['p']['a']})\n"
        "if config['p']['a'] == 2:\n"
        "    with manager.tracking(run_id):\n"
        "        raise ValueError('diverged')\n"
    )
    sweep.write("p.a: [1, 2]", "p.b: [1]")
    code, _, err = sweep.finish(*sweep.run)
    assert code == 1
    assert "ValueError: diverged" in err
    rows = sweep.manager.rows()
    assert [(r["status"], r["final_valid_loss"], r["more"], r["sweep_name"], r["error"]) for r in rows] == [
        ("finished", 1, 1, "twelve", None),
        ("failed", 2, 1, "twelve", "ValueError: diverged"),
    ]
    assert [run["final_valid_loss"] for run in sweep.status()["runs"]] == [1, 2]


def test_dry_run_and_bad_input(sweep: Sweep) -> None:
    def call(*args: str) -> Any:
        return CliRunner().invoke(app, ["sweep", *args, "--base_dir", str(sweep.manager.base_dir)])

    assert call(*sweep.run, "--dry_run").stdout.splitlines()[::12] == ["p.a=1 p.b=1", "12 runs."]
    assert len(json.loads(call(*sweep.run, "--dry-run", "--json").stdout)) == 12
    assert not sweep.manager.base_dir.exists()
    assert "There is no sweep 'twelve'" in call("resume", "twelve").stderr
    assert "There is no sweep 'twelve'" in call("status", "twelve").stderr
    assert "must be a text that can name a file" in call("status", "../x").stderr
    result = call("run", "none.yaml", str(sweep.folder / "sweep.yaml"), "--command", "true {config}")
    assert (result.exit_code, result.stderr) == (1, "Error: There is no configuration file 'none.yaml'.\n")
    for command, sentence in (("", "is empty"), ("'", "cannot be split"), ("true", "The command must hold {config}")):
        result = call(*sweep.run[:3], "--command", command)
        assert (result.exit_code, sentence in " ".join(result.stderr.replace("│", " ").split())) == (2, True)
    sweep.write("p.a: [1]")
    result = call(*sweep.run[:3], "--command", "no-such-program {config}")
    assert result.exit_code == 1
    assert "no-such-program cannot be started: No such file or directory." in result.stderr
