"""A real Slurm of one node on localhost: munged, slurmctld and slurmd with keys, ports and folders of their own."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import system_packages
from free_ports import free_ports

CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort={ctld_port}
SlurmdPort={slurmd_port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
KillWait=5
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=1000 State=UNKNOWN
PartitionName=debug Nodes={host} Default=YES MaxTime=INFINITE DefaultTime=10 State=UP
"""


def _until(condition: Callable[[], bool], what: str, folder: Path, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            logs = "\n".join(f"--- {log.name}\n{log.read_text()[-2000:]}" for log in sorted(folder.glob("*.log")))
            raise AssertionError(f"Slurm: {what} within {seconds:.0f} s.\n{logs}")
        time.sleep(0.1)


@contextlib.contextmanager
def one_node_slurm(cpus: int = 2) -> Iterator[dict[str, str]]:
    """Starts the daemons and yields the environment with which Slurm's commands reach them; ends them afterwards.

    The node is called what this host is called, with so many CPUs, however many there are: jobs wait only for these.
    """
    system_packages.root()
    munged = system_packages.program("munged", "munge")
    daemons = [system_packages.program(name, "slurm-wlm") for name in ("slurmctld", "slurmd")]
    sinfo = system_packages.program("sinfo", "slurm-wlm")
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # munge wants a path that everybody may enter
    os.chmod(folder, 0o755)
    processes: list[subprocess.Popen[bytes]] = []
    logs = contextlib.ExitStack()
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    try:
        munge = folder / "munge"
        munge.mkdir()
        (munge / "key").write_bytes(secrets.token_bytes(128))
        (munge / "key").chmod(0o400)
        for path in (folder, munge, munge / "key"):
            shutil.chown(path, "munge", "munge")
        files = {"socket": folder / "munge.socket", "key-file": munge / "key", "pid-file": munge / "pid",
                 "log-file": munge / "log", "seed-file": munge / "seed"}  # fmt: skip
        flags = [f"--{name}={path}" for name, path in files.items()]
        said = logs.enter_context((folder / "munged.out.log").open("wb"))
        command = [munged, "--foreground", *flags]
        processes.append(subprocess.Popen(command, user="munge", group="munge", extra_groups=[], stderr=said))
        _until((folder / "munge.socket").exists, "munged did not listen", folder)
        ctld_port, slurmd_port = free_ports(2)
        for name in ("state", "spool"):
            (folder / name).mkdir()
        host = socket.gethostname().split(".")[0]
        (folder / "slurm.conf").write_text(
            CONF.format(host=host, folder=folder, cpus=cpus, ctld_port=ctld_port, slurmd_port=slurmd_port)
        )
        for daemon, more in zip(daemons, ([], ["-N", host]), strict=True):
            log = logs.enter_context((folder / f"{Path(daemon).name}.out.log").open("wb"))
            processes.append(subprocess.Popen([daemon, "-D", *more], env=environment, stdout=log, stderr=log))

        def idle() -> bool:
            answer = subprocess.run(
                [sinfo, "-h", "-o", "%t"], env=environment, capture_output=True, text=True, check=False
            )
            return answer.returncode == 0 and answer.stdout.split() == ["idle"]

        _until(idle, "the node was not idle", folder)
        yield environment
    finally:
        for process in reversed(processes):
            process.send_signal(signal.SIGTERM)
        for process in reversed(processes):
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        logs.close()
        shutil.rmtree(folder, ignore_errors=True)
