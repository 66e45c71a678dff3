"""Runs that several processes share: each done once, whoever does it, and none lost with a process that is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from sparseopt.benchmarks.run_book import RunBook, read_rows

WORKER = """
import json, os, sys, time
from sparseopt.benchmarks.run_book import RunBook
path, seconds = sys.argv[1], float(sys.argv[2])
def task(key):
    def run():
        print("began", flush=True)
        time.sleep(seconds)
        return {"phase": "final", "arm": key, "pid": os.getpid()}
    return run
from pathlib import Path
book = RunBook(Path(path), {"settings": {}}, str)
done = book.finish_all({f"k{i}": task(f"k{i}") for i in range(6)})
print(json.dumps(done))
"""


def start(path: Path, seconds: float) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-P", "-c", WORKER, str(path), str(seconds)], stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_processes_share_the_runs(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    workers = [start(path, 0.4) for _ in range(2)]
    outputs = [worker.communicate(timeout=60)[0].split() for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
    assert [output[-1] for output in outputs] == ["true", "true"], "each ends when all runs are done"
    rows = read_rows(path)
    assert sorted(row["key"] for row in rows) == [f"k{i}" for i in range(6)]
    assert sum(output.count("began") for output in outputs) == 6, "no run was done twice"


def test_a_killed_process_leaves_its_run_to_the_others(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    victim = start(path, 60)
    assert victim.stdout is not None
    assert victim.stdout.readline() == "began\n"
    book = RunBook(path, {"settings": {}}, str)
    killer = threading.Timer(1.0, lambda: os.kill(victim.pid, signal.SIGKILL))
    killer.start()
    assert book.finish_all({key: lambda: {"phase": "final", "arm": "mine"} for key in ("k0", "k1")})
    assert victim.wait(timeout=30) == -signal.SIGKILL
    assert {row["key"]: row["arm"] for row in read_rows(path)} == {"k0": "mine", "k1": "mine"}


def test_time_ends_the_waiting_for_others(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    other = start(path, 60)
    assert other.stdout is not None
    other.stdout.readline()
    book = RunBook(path, {"settings": {}}, str, time_limit=1.0)
    began = time.monotonic()
    assert not book.finish_all({"k0": lambda: pytest.fail("that run is the other's")})
    assert 1.0 <= time.monotonic() - began < 30
    other.kill()
    other.wait()
    assert not path.exists() or not [json.loads(line) for line in path.read_text().splitlines()]
