"""``sparseopt sweep submit`` on a real Slurm of one node."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from noting_command import notes, write_command
from one_node_slurm import one_node_slurm

import sparseopt as so

pytestmark = pytest.mark.slow

ALL = ["1-1", "1-2", "2-1", "2-2"]


@pytest.fixture(scope="module")
def slurm() -> Iterator[dict[str, str]]:
    with one_node_slurm() as environment:
        yield environment


class Cluster:
    """A sweep of four runs, and the commands of its user."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder, self.environment = folder, environment
        self.command = write_command(folder)
        (folder / "base.yaml").write_text("p: {a: 0, b: 0}\n")
        (folder / "sweep.yaml").write_text("sweep_name: four, really\nparameters: {p.a: [1, 2], p.b: [1, 2]}\n")
        self.manager = so.RunManager(folder / "saved_models")

    def call(self, *words: str, code: int = 0) -> str:
        command = [sys.executable, "-m", "sparseopt", "sweep", *words]
        done = subprocess.run(
            command, env=self.environment, cwd=self.folder, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def submit(self, *flags: str, code: int = 0) -> str:
        return self.call("submit", "base.yaml", "sweep.yaml", "--command", self.command, *flags, code=code)

    def status(self) -> dict[str, Any]:
        return dict(json.loads(self.call("status", "four, really", "--json")))

    def counts(self) -> dict[str, int]:
        return {name: count for name, count in self.status()["counts"].items() if count}

    def slurm(self, *words: str) -> str:
        return subprocess.run(
            words, env=self.environment, capture_output=True, text=True, timeout=60, check=True
        ).stdout

    def queue_is_empty(self) -> bool:
        return not self.slurm("squeue", "-h", "-t", "PENDING,CONFIGURING,RUNNING,COMPLETING").strip()

    def notes(self, word: str) -> list[str]:
        return sorted(notes(self.folder, word))

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 180
        while not condition():
            assert time.monotonic() < deadline, (self.status(), self.slurm("squeue", "--states=all"))
            time.sleep(0.1)

    def wait(self) -> None:
        self.until(self.queue_is_empty)


@pytest.fixture
def cluster(slurm: dict[str, str], tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path, slurm)
    yield cluster
    (tmp_path / "hold").unlink(missing_ok=True)
    cluster.slurm("scancel", "--user=root")
    cluster.wait()


def test_every_run_is_done_once(cluster: Cluster) -> None:
    (cluster.folder / "hold").touch()
    said = cluster.submit("--partition", "debug", "--time", "0:05:00", "--cpus", "1", "--mem", "100M", "--jobs", "2")
    assert said.startswith("Sweep four, really: 4 of 4 runs submitted as the Slurm job ")
    # It has come back while two wait for two CPUs, and two for them.
    cluster.until(lambda: len(cluster.notes("start")) == 2)
    cluster.until(lambda: cluster.counts() == {"running": 2, "queued": 2})
    assert [row["status"] for row in cluster.manager.rows()] == ["running"] * 2  # what waits is no run yet
    text = cluster.call("status", "four, really")
    assert text.splitlines()[0].split() == ["run_id", "status", "job", "job_state", "final_valid_loss", "p.a", "p.b"]
    assert "PENDING (JobArrayTaskLimit)" in text
    assert "4 runs: 2 running, 2 queued." in text
    job = cluster.status()["runs"][0]["job"].split("_")[0]
    asked = cluster.slurm("scontrol", "show", "job", f"{job}_0")
    for words in ("Partition=debug", "TimeLimit=00:05:00", "NumCPUs=1", "MinMemoryNode=100M", "ArrayTaskThrottle=2"):
        assert words in asked
    assert "nothing to submit. 4 runs: 2 running, 2 queued." in cluster.submit()
    (cluster.folder / "hold").unlink()
    cluster.wait()
    assert cluster.counts() == {"finished": 4}
    assert cluster.notes("start") == cluster.notes("done") == ALL
    assert {row["sweep_name"] for row in cluster.manager.rows()} == {"four, really"}
    assert "nothing to submit. 4 runs: 4 finished." in cluster.submit()
    assert cluster.queue_is_empty()


def test_what_failed_is_submitted_again(cluster: Cluster) -> None:
    (cluster.folder / "fail_1-2").touch()
    cluster.submit()
    cluster.wait()
    assert cluster.counts() == {"finished": 3, "failed": 1}
    (failed,) = [run for run in cluster.status()["runs"] if run["status"] == "failed"]
    assert "exit code 3; its output is in log.txt" in failed["error"]
    assert failed["job_state"].startswith("FAILED")
    assert "nothing to submit" in cluster.submit("--skip_failed")
    (cluster.folder / "fail_1-2").unlink()
    assert "1 of 4 runs submitted" in cluster.submit()
    cluster.wait()
    assert cluster.counts() == {"finished": 4}
    assert cluster.notes("start") == sorted([*ALL, "1-2"])
    assert len(cluster.manager.rows()) == 4  # in the folder it had


@pytest.mark.parametrize("how", ["scancel", "notice", "kill"])
def test_what_was_ended_is_submitted_again(cluster: Cluster, how: str) -> None:
    (cluster.folder / "hold").touch()
    cluster.submit("--jobs", "2")
    cluster.until(lambda: cluster.counts() == {"running": 2, "queued": 2})
    array = cluster.status()["runs"][0]["job"].split("_")[0]
    if how == "scancel":
        cluster.slurm("scancel", array)
        expected = {"crashed": 2, "pending": 2}
        errors = {"Interrupted by SIGTERM."}
    elif how == "notice":  # as Slurm gives it before the time limit; meanwhile the others are cancelled
        cluster.slurm("scancel", "--state=PENDING", array)
        cluster.slurm("scancel", "--signal=USR2", array)
        expected = {"crashed": 2, "pending": 2}
        errors = {"Interrupted by SIGUSR2."}
    else:
        cluster.slurm("scancel", "--state=PENDING", array)
        for row in cluster.manager.rows():
            os.kill(row["pid"], signal.SIGKILL)
        expected = {"crashed": 2, "pending": 2}
        errors = {None}
    cluster.wait()
    assert cluster.counts() == expected, [run["error"] for run in cluster.status()["runs"]]
    assert {row["error"] for row in cluster.manager.rows()} == errors
    assert len(cluster.notes("interrupted")) == (2 if how == "notice" else 0)
    (cluster.folder / "hold").unlink()
    assert "4 of 4 runs submitted" in cluster.submit()
    cluster.wait()
    assert cluster.counts() == {"finished": 4}
    assert cluster.notes("done") == ALL


def test_a_job_leaves_alone_what_sweep_run_does(cluster: Cluster) -> None:
    (cluster.folder / "hold").touch()
    cluster.submit("--jobs", "1", "--extra", "begin=now+3", "comment=from_here")
    assert "Comment=from_here" in cluster.slurm("scontrol", "show", "job", cluster.status()["runs"][0]["job"])
    (cluster.folder / "hold").unlink()
    cluster.call("resume", "four, really")
    cluster.wait()
    assert cluster.counts() == {"finished": 4}
    assert cluster.notes("start") == ALL


def test_slurm_says_no(cluster: Cluster) -> None:
    said = cluster.submit("--partition", "none", code=1)
    assert said.startswith("Error: sbatch refuses the jobs of the sweep 'four, really': ")
    assert "nvalid partition" in said
    assert len(said.splitlines()) == 1
    assert cluster.counts() == {"pending": 4}


# ---- the scripts for sbatch ------------------------------------------------------------------------------------------
CONFIGS = Path(__file__).resolve().parents[2] / "configs"
TRAINING = """\
model: {name: gpt2, context_length: 16, tokenizer: bytes, config: {n_layer: 1, n_head: 2, n_embd: 16}}
data: {dataset_path: text.txt}
training: {batch_size: 4, max_steps: 2, save_steps: 2, eval_steps: 2, device: cpu}
run: {name: test}
"""
SWEPT = "sweep_name: rates\nparameters: {training.learning_rate: [1e-3, 1e-4]}\n"


def sbatch(cluster: Cluster, script: str, *arguments: str) -> str:
    """Submits a script as a user does, from the folder of the configurations, and waits; returns what it printed."""
    environment = {**cluster.environment, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    command = ["sbatch", "--wait", "--parsable", str(CONFIGS / script), *arguments]
    done = subprocess.run(
        command, env=environment, cwd=cluster.folder, capture_output=True, text=True, timeout=300, check=False
    )
    (said,) = cluster.folder.glob(f"*-{done.stdout.strip()}.out")
    assert done.returncode == 0, done.stderr + said.read_text()
    return said.read_text()


def test_scripts_train_and_sweep(cluster: Cluster) -> None:
    (cluster.folder / "text.txt").write_text("A text of some words, to be learned by heart. " * 40)
    (cluster.folder / "my_config.yaml").write_text(TRAINING)
    sbatch(cluster, "train_with_config.sh", "my_config.yaml", "--set", "run.name=mine")
    (cluster.folder / "configs").mkdir()  # what the scripts take without arguments
    (cluster.folder / "configs" / "train_config.yaml").write_text(TRAINING)
    (cluster.folder / "configs" / "sweep_config.yaml").write_text(SWEPT)
    sbatch(cluster, "train_with_config.sh")
    assert "2 runs: 2 finished." in sbatch(cluster, "run_sweep.sh")
    rows = cluster.manager.rows()
    assert [(row["run_name"], row["sweep_name"], row["status"]) for row in rows] == [
        ("mine", None, "finished"),
        ("test", None, "finished"),
        ("test", "rates", "finished"),
        ("test", "rates", "finished"),
    ]
    assert [row["training.learning_rate"] for row in rows[2:]] == [1e-3, 1e-4]
    assert all(row["final_valid_loss"] > 0 for row in rows)
    folder = cluster.manager.base_dir / rows[0]["run_id"]
    assert (folder / "checkpoint_2" / "gradients.pt").is_file()
    assert (folder / "final_checkpoint" / "model.safetensors").is_file()
    # Other files, and again: what is finished stays.
    (cluster.folder / "my_sweep.yaml").write_text(SWEPT)
    assert "2 runs: 2 finished." in sbatch(cluster, "run_sweep.sh", "my_config.yaml", "my_sweep.yaml", "--jobs", "2")
    assert len(cluster.manager.rows()) == 4


def test_a_sweep_in_one_job_goes_on_after_its_time_limit(cluster: Cluster) -> None:
    """The script asks for SIGINT two minutes before the limit; here it comes at once."""
    (cluster.folder / "hold").touch()
    command = f"{{python}} {cluster.folder / 'command.py'} {cluster.folder} {{config}}"
    words = [str(CONFIGS / "run_sweep.sh"), "base.yaml", "sweep.yaml", "--command", command]
    environment = {**cluster.environment, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    job = subprocess.run(
        ["sbatch", "--parsable", *words],
        env=environment,
        cwd=cluster.folder,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    cluster.until(lambda: len(cluster.notes("start")) == 1)
    cluster.slurm("scancel", "--batch", "--signal=INT", job)
    cluster.wait()
    assert cluster.counts() == {"crashed": 1, "pending": 3}
    assert cluster.notes("interrupted") == ["1-1"]
    (cluster.folder / "hold").unlink()
    assert "4 runs: 4 finished." in sbatch(cluster, "run_sweep.sh", *words[1:])
    assert cluster.notes("done") == ALL
