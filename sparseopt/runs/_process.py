"""Which process works on a run, and whether it is still there."""

from __future__ import annotations

import functools
import os
import socket
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

__all__ = ["alive", "identity"]


@functools.cache
def _machine() -> str:
    """Where process ids mean the same: host, boot, and namespace of processes (containers may share a host name)."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        space = os.readlink("/proc/self/ns/pid")
    except OSError:  # no Linux
        boot = space = "?"
    return f"{socket.gethostname()} {boot} {space}"


def _started(pid: int) -> str | None:
    """When a process started, in clock ticks since the boot, so that a reused id is told apart; None where unknown.

    Raises:
        ProcessLookupError: there is no such process, or it has ended and waits for its parent.
    """
    try:
        # The second field, the command in parentheses, may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            raise ProcessLookupError(pid) from None
        os.kill(pid, 0)  # no /proc: sends nothing, only asks
        return None
    if fields[0] in "ZX":
        raise ProcessLookupError(pid)
    return fields[19]


def identity() -> dict[str, Any]:
    """This process: host, pid, and what tells it from others with the same."""
    pid = os.getpid()
    return {"host": socket.gethostname(), "pid": pid, "machine": _machine(), "started": _started(pid)}


def alive(owner: Mapping[str, Any], heartbeat: str | None, stale_after: float) -> bool:
    """Whether the process of a run is there: asked of the system on its own machine, else told by the heartbeat.

    Args:
        owner: ``machine``, ``pid``, ``started`` of :func:`identity`.
        heartbeat: when it last wrote (ISO 8601, UTC).
        stale_after: seconds without a heartbeat after which a process elsewhere counts as gone.
    """
    if owner.get("machine") == _machine() and isinstance(owner.get("pid"), int):
        try:
            return _started(owner["pid"]) == owner.get("started")
        except ProcessLookupError:
            return False
        except PermissionError:  # another user's, and there
            return True
    try:
        last = datetime.fromisoformat(str(heartbeat))
    except ValueError:
        return False
    return (datetime.now(UTC) - last).total_seconds() <= stale_after
