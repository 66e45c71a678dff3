"""Ports for programs that cannot choose one themselves."""

from __future__ import annotations

import random
import socket
from pathlib import Path


def free_ports(count: int) -> list[int]:
    """Ports of localhost that nobody listens on, below those that the system gives to connections and to ``bind(0)``.

    Between this call and the program's own bind nothing of the system takes them, however much else is running.
    """
    limits = Path("/proc/sys/net/ipv4/ip_local_port_range")
    above = int(limits.read_text().split()[0]) if limits.is_file() else 32768
    found: list[int] = []
    for port in random.SystemRandom().sample(range(above // 2, above), k=200):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise OSError(f"no {count} free ports were found below {above}.")
