"""The command line in another process, with training steps that take a while, so that signals fall into training."""

from __future__ import annotations

import os
import subprocess
import sys

DRIVER = """
import sys, time
from sparseopt.trainers import callbacks, {module}

class Slow(callbacks.MetricsFile):
    def on_step_begin(self, args, state, control, **kwargs):
        time.sleep({seconds})

{module}.MetricsFile = Slow
from sparseopt.cli import main
sys.argv[0] = "sparseopt"
main()
"""


def start(module: str, seconds: float, *words: str) -> subprocess.Popen[str]:
    """Starts ``sparseopt`` with the words given; its errors can be read.

    Args:
        module: of ``sparseopt.trainers``, the one that writes the metrics file.
        seconds: that each step takes longer.
    """
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER.format(module=module, seconds=seconds), *words],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def until_training(process: subprocess.Popen[str]) -> None:
    """Reads what the command says until it trains."""
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("train:"):
            return
