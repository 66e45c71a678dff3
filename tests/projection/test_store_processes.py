"""ProjectionStore under several processes: killed, racing, and read meanwhile. Each test is one program that forks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from sparseopt.projection.store import ProjectionStore

DIM = 4096

PROGRAM = """
import os, random, signal, sys, time
import torch
from sparseopt.projection.store import ProjectionStore
torch.set_num_threads(1)
path, DIM = sys.argv[1], {dim}
METADATA = {{"total_proj_dim": DIM, "proj_dtype": "float32", "proj_seed": 1}}

def row(ids):
    return ((torch.as_tensor(ids)[:, None] * 17 + torch.arange(DIM) * 31) % 251).float()

def child(work):
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
        os._exit(0)
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)

def join(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
"""


def run(body: str, path: Path) -> str:
    program = PROGRAM.format(dim=DIM) + body
    result = subprocess.run(
        [sys.executable, "-P", "-c", program, str(path)], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def row(ids: torch.Tensor) -> torch.Tensor:
    return ((ids[:, None] * 17 + torch.arange(DIM) * 31) % 251).float()


def test_killed_at_random_moments_only_whole_rows_remain(tmp_path: Path) -> None:
    out = run(
        """
pwrite = os.pwrite

def slow(number, data, offset):  # in pieces that end within rows: a kill between two is likely
    time.sleep(0.001)
    return pwrite(number, data[:6000], offset)

def write():
    os.pwrite = slow
    with ProjectionStore(path, METADATA, shard_rows=50) as store:
        done = set(store.completed.tolist())
        ids = [i for i in range(20_000) if i not in done]
        for start in range(0, len(ids), 16):
            store.write(ids[start:start + 16], row(ids[start:start + 16]))
            if start % 64 == 0:
                store.flush()

ProjectionStore(path, METADATA, shard_rows=50).close()
counts = []
while len(counts) < 10 or (counts[-1] == 0 and len(counts) < 100):  # at least one gets somewhere, on a busy machine too
    pid = child(write)
    time.sleep(random.uniform(0.05, 0.4))
    os.kill(pid, signal.SIGKILL)
    assert join(pid) == -signal.SIGKILL
    counts.append(len(ProjectionStore(path)))
assert counts == sorted(counts), counts
print(counts)
""",
        tmp_path / "store",
    )
    store = ProjectionStore(tmp_path / "store")
    ids = store.completed
    assert 0 < len(ids) < 20_000, out
    assert store.rows(ids).equal(row(ids))
    # Rows that were cut off can be written over by the next run.
    with ProjectionStore(tmp_path / "store", store.metadata) as again:
        missing = torch.tensor([i for i in range(200) if not store.done(i)])
        again.write(missing, row(missing))
    assert again.rows(range(200)).equal(row(torch.arange(200)))


def test_two_processes_fill_alternate_rows_and_a_third_reads(tmp_path: Path) -> None:
    run(
        """
def write(parity):
    def work():
        with ProjectionStore(path, METADATA, shard_rows=37) as store:
            for i in range(parity, 400, 2):
                store.write([i], row([i]))
                if i % 20 < 2:
                    store.flush()
    return work

children = [child(write(0)), child(write(1))]
while not os.path.exists(os.path.join(path, "metadata.json")):
    time.sleep(0.001)
seen, last = [], -1
while last < 400:
    store = ProjectionStore(path)
    ids = store.completed
    assert len(ids) >= last
    assert store.rows(ids).equal(row(ids))
    last = len(ids)
    seen.append(last)
    if all(os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) for pid in children) and last < 400:
        last = len(ProjectionStore(path).completed)
        break
assert [join(pid) for pid in children] == [0, 0]
assert last == 400, (last, seen)
""",
        tmp_path / "store",
    )
    assert ProjectionStore(tmp_path / "store").rows(range(400)).equal(row(torch.arange(400)))


def test_many_processes_create_one_store(tmp_path: Path) -> None:
    run(
        """
for round in range(10):
    place = f"{path}{round}"
    start = time.monotonic() + 0.05
    def work(i):
        def inner():
            while time.monotonic() < start:
                pass
            with ProjectionStore(place, METADATA, shard_rows=5) as store:
                store.write([i], row([i]))
        return inner
    assert [join(pid) for pid in [child(work(i)) for i in range(8)]] == [0] * 8
    assert ProjectionStore(place).rows(range(8)).equal(row(range(8)))
    assert sorted(os.listdir(place)) in (["metadata.json", "shards"], [".lock", "metadata.json", "shards"])
""",
        tmp_path / "store",
    )


def test_a_store_opened_before_a_fork_says_so(tmp_path: Path) -> None:
    run(
        """
store = ProjectionStore(path, METADATA)
store.write([0], row([0]))
store.flush()
def work():
    try:
        store.write([1], row([1]))
    except RuntimeError as error:
        assert "fork" in str(error)
    else:
        raise AssertionError("no error")
assert join(child(work)) == 0
store.close()
""",
        tmp_path / "store",
    )
