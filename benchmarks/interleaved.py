"""One benchmark case: sparseopt and its baselines, timed in turns in one process, and checked against each other.

A round times every baseline once and then sparseopt once, so that a slow phase of the machine hits all arms alike;
warm-up rounds are left out. A case whose check fails raises before anything is timed: no speed is recorded.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy
import torch

import sparseopt

__all__ = ["WARMUP", "compare", "environment", "rounds", "scale"]

WARMUP = 3


def scale() -> float:
    """Size of the problems against the published ones: ``SPARSEOPT_BENCH_SCALE``. Bars are judged at 1 only."""
    value = float(os.environ.get("SPARSEOPT_BENCH_SCALE", "1"))
    if not 0 < value <= 1:
        raise ValueError(f"SPARSEOPT_BENCH_SCALE must be in (0, 1], got {value}.")
    return value


def rounds() -> int:
    """Timed rounds of each case: ``SPARSEOPT_BENCH_ROUNDS``, 15 unless set."""
    value = int(os.environ.get("SPARSEOPT_BENCH_ROUNDS", "15"))
    if value < 1:
        raise ValueError(f"SPARSEOPT_BENCH_ROUNDS must be at least 1, got {value}.")
    return value


def environment() -> dict[str, str | int]:
    """What the numbers depend on."""
    return {
        "device": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "not set"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "sparseopt": sparseopt.__version__,
    }


def cpu_name() -> str:
    """The processor's model name, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return " ".join(line.partition(":")[2].split())
    return platform.processor() or platform.machine()


def compare(
    benchmark: Any,
    case: str,
    ours: Callable[[], object],
    baselines: Mapping[str, Callable[[], object]],
    *,
    check: Callable[[], None],
    bars: Mapping[str, float] | None = None,
    **facts: float,
) -> None:
    """Checks, times and checks again.

    Args:
        benchmark: pytest-benchmark's fixture; it times ``ours``.
        case: name of the case, a row of the table.
        ours, baselines: one repetition of the work, without arguments. All are called equally often before ``check``.
        check: raises AssertionError unless all arms agree.
        bars: baseline or fact -> how many times better sparseopt must be.
        facts: other ratios of this case ("dense state bytes / sparse state bytes"), reported beside the times.

    Raises:
        AssertionError: the check failed; nothing is recorded.
    """
    times: dict[str, list[float]] = {name: [] for name in baselines}
    calls = 0

    def others() -> None:
        for name, run in baselines.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)

    def counted() -> None:
        nonlocal calls
        calls += 1
        ours()

    others()
    counted()
    check()
    alone = {name: _alone(run) for name, run in {"sparseopt": counted, **baselines}.items()}
    for name in baselines:  # all arms have taken the same number of steps again
        times[name] += [0.0] * (len(alone[name]) + WARMUP)
    benchmark.pedantic(counted, setup=others, rounds=rounds(), warmup_rounds=WARMUP)
    for name, run in baselines.items():  # pytest-benchmark may call once more than it times
        for _ in range(calls - len(times[name])):
            run()
    check()
    skip = 1 + WARMUP + rounds() + WARMUP
    benchmark.extra_info.update(
        case=case,
        baselines={name: values[skip : skip + rounds()] for name, values in times.items()},
        alone=alone,
        bars=dict(bars or {}),
        facts=facts,
        scale=scale(),
        environment=environment(),
        checked=True,
    )


def _alone(run: Callable[[], object]) -> list[float]:
    """Seconds of calls back to back: what fits in the cache stays there between them, unlike in training."""
    values = []
    for _ in range(WARMUP + rounds()):
        start = time.perf_counter()
        run()
        values.append(time.perf_counter() - start)
    return values[WARMUP:]
