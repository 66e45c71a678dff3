"""Two hosts, one is killed: the other ends with an error in time, and the run goes on from the last checkpoint.

Hosts are network namespaces joined by a virtual cable where the system lets us make them, else two launchers on this one.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from distributed_training import EVERYONE, make_model, make_optimizer, train, weights
from free_ports import free_ports

pytestmark = [pytest.mark.slow, pytest.mark.alone]  # what a dead host costs is measured in seconds
SCRIPT = Path(__file__).parents[1] / "kit" / "two_hosts.py"
Host = tuple[list[str], str]  # what a command is begun with, network interface


def _namespaces() -> list[str] | None:
    """Commands that join two network namespaces; None where that is not allowed."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return None
    a, b = f"so{os.getpid()}a", f"so{os.getpid()}b"
    commands = [
        f"ip netns add {a}", f"ip netns add {b}", f"ip link add {a} type veth peer name {b}", f"ip link set {a} netns {a}",
        f"ip link set {b} netns {b}", f"ip -n {a} addr add 10.207.0.1/24 dev {a}",
        f"ip -n {b} addr add 10.207.0.2/24 dev {b}", f"ip -n {a} link set {a} up", f"ip -n {b} link set {b} up",
        f"ip -n {a} link set lo up", f"ip -n {b} link set lo up",
    ]  # fmt: skip
    for command in commands:
        if subprocess.run(command.split(), capture_output=True, check=False).returncode:
            for name in (a, b):
                subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
            return None
    return [a, b]


@pytest.fixture
def hosts() -> Iterator[tuple[list[Host], str]]:
    """(the two hosts, address of the first)."""
    names = _namespaces()
    if names is None:
        yield [([], "lo"), ([], "lo")], "127.0.0.1"
        return
    yield [(["ip", "netns", "exec", name], name) for name in names], "10.207.0.1"
    for name in names:
        subprocess.run(["ip", "netns", "del", name], check=True)


def start(hosts: list[Host], address: str, folder: Path, log: Path) -> list[subprocess.Popen[bytes]]:
    (port,) = free_ports(1)
    started = []
    for number, (begin, interface) in enumerate(hosts):
        command = [
            *begin, sys.executable, "-P", "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d",
            f"--rdzv-endpoint={address}:{port}", "--rdzv-id=run", f"--rdzv-conf=timeout=60,is_host={1 - number}",
            "--max-restarts=0", f"--local-addr={address if number == 0 else address.replace('0.1', '0.2') if begin else address}",
            str(SCRIPT), str(folder),
        ]  # fmt: skip
        path = os.pathsep.join([str(SCRIPT.parent), os.environ.get("PYTHONPATH", "")])
        variables = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": interface, "PYTHONPATH": path}
        with (log.parent / f"{log.name}.{number}").open("wb") as file:
            started.append(
                subprocess.Popen(command, env=variables, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
            )
    return started


def kill(host: subprocess.Popen[bytes]) -> None:
    """The launcher and everything that it started, at once, as when a host loses its power."""
    children = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(host.pid)], capture_output=True, text=True, check=False
    ).stdout.split()
    for process in [host.pid, *map(int, children)]:
        os.kill(process, signal.SIGKILL)
    host.wait()


def read(log: Path) -> str:
    return "".join((log.parent / f"{log.name}.{n}").read_text() for n in range(2))


def test_a_killed_host_ends_the_run_and_it_resumes(tmp_path: Path, hosts: tuple[list[Host], str]) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    running = start(*hosts, folder, tmp_path / "first")
    try:
        deadline = time.monotonic() + 120
        while not list(folder.glob("4/.metadata")):
            assert time.monotonic() < deadline, read(tmp_path / "first")
            assert all(host.poll() is None for host in running), read(tmp_path / "first")
            time.sleep(0.1)
        kill(running[1])
        began = time.monotonic()
        assert running[0].wait(timeout=60) != 0
        assert time.monotonic() - began < 45
        said = read(tmp_path / "first")
        assert re.search(r"Error: .*((closed|reset) by peer|[Tt]imed? ?out)", said), said
        assert not (folder / "weights.pt").exists()

        running = start(*hosts, folder, tmp_path / "second")
        assert [host.wait(timeout=180) for host in running] == [0, 0], read(tmp_path / "second")
    finally:
        for host in running:
            if host.poll() is None:
                kill(host)
    said = read(tmp_path / "second")
    assert "starts at step 0" not in said
    assert "starts at step" in said
    expected = make_model()
    train(expected, make_optimizer(expected), 0, 1, EVERYONE)
    found = torch.load(folder / "weights.pt", weights_only=True)
    for name, value in weights(expected).items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6)
