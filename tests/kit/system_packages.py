"""Programs of the system that slow tests use: present, or a failure in CI, or a skip that says how to get them."""

from __future__ import annotations

import os
import shutil

import pytest

# Debian's packages, also in the Makefile (`make system`).
SBIN = ("/usr/sbin", "/sbin")


def program(name: str, package: str) -> str:
    """The path of a program; without it the test is skipped, in CI it fails."""
    found = shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", os.defpath), *SBIN]))
    if found is None:
        sentence = f"{name} was not found: `make system` (as root) installs Debian's package {package}"
        if os.environ.get("CI"):
            pytest.fail(sentence)
        pytest.skip(sentence)
    return found


def root() -> None:
    """Skips, in CI fails, where the test is not run as root."""
    if os.geteuid() != 0:
        sentence = "Slurm's daemons are started as root; this is another user"
        if os.environ.get("CI"):
            pytest.fail(sentence)
        pytest.skip(sentence)
