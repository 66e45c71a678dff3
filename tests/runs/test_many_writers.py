"""Many processes on one folder, killed at random: nothing acknowledged is lost, and runs.csv always parses."""

from __future__ import annotations

import csv
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import sparseopt as so

# Each writes metrics to its own run and to one that all share; a name is acknowledged once the call has returned.
WORKER = """
import os, sys, sparseopt as so
base, shared, name, count = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
manager = so.RunManager(base)
own = manager.setup_run({"worker": name})
out = os.open(os.path.join(os.path.dirname(base), f"ack_{name}"), os.O_CREAT | os.O_WRONLY | os.O_APPEND)
for step in range(count):
    target = shared if step % 2 else own
    manager.update_metrics(target, {f"m_{name}_{step}": step})
    os.write(out, f"{target} m_{name}_{step} {step}\\n".encode())
"""


def parse(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        header, *lines = list(csv.reader(file))
    assert header[0] == "run_id"
    assert len(set(header)) == len(header)
    assert all(len(line) == len(header) for line in lines)
    return [dict(zip(header, line, strict=True)) for line in lines]


@pytest.mark.parametrize(
    ("processes", "updates", "killed"),
    [(6, 12, 3), pytest.param(32, 100, 16, marks=pytest.mark.slow)],
)
def test_nothing_acknowledged_is_lost(tmp_path: Path, processes: int, updates: int, killed: int) -> None:
    manager = so.RunManager(tmp_path / "saved_models")
    shared = manager.setup_run({"worker": "all"})
    rng = random.Random(processes)
    workers = [
        subprocess.Popen([sys.executable, "-c", WORKER, str(manager.base_dir), shared, str(i), str(updates)])
        for i in range(processes)
    ]
    # Each victim is killed once it has acknowledged so many updates, wherever it then is.
    victims = {i: rng.randrange(1, updates * 2 // 3) for i in rng.sample(range(processes), killed)}
    parsed, deadline = 0, time.monotonic() + 500
    try:
        while any(worker.poll() is None for worker in workers):
            assert time.monotonic() < deadline
            rows = parse(manager.base_dir / "runs.csv")
            parsed += 1
            assert rows
            for i, after in victims.items():
                path = tmp_path / f"ack_{i}"
                if workers[i].poll() is None and path.exists() and path.read_text().count("\n") >= after:
                    os.kill(workers[i].pid, signal.SIGKILL)
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
            worker.wait()
    assert [w.returncode for i, w in enumerate(workers) if i not in victims] == [0] * (processes - killed)
    assert [workers[i].returncode for i in victims] == [-signal.SIGKILL] * killed
    acknowledged = [line.split() for i in range(processes) for line in (tmp_path / f"ack_{i}").read_text().splitlines()]
    assert len(acknowledged) >= (processes - killed) * updates + killed
    metrics = {row["run_id"]: manager.get_run(row["run_id"])["metrics"] for row in manager.rows()}
    lost = [entry for entry in acknowledged if metrics[entry[0]].get(entry[1]) != int(entry[2])]
    assert lost == []
    manager.refresh_csv()
    table = {row["run_id"]: row for row in parse(manager.base_dir / "runs.csv")}
    assert [entry for entry in acknowledged if table[entry[0]][entry[1]] != entry[2]] == []
    ended = [row["status"] for row in manager.rows() if row["worker"] != "all"]
    assert (ended.count("finished"), ended.count("crashed")) == (processes - killed, killed)
    print(f"{len(acknowledged)} acknowledged updates, runs.csv parsed {parsed} times")
