"""The same grid on the Triton kernels, in Triton's interpreter: another process, since Triton chooses at import."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
# Fewer than this would mean that the grid no longer reaches the kernels.
LEAST = {
    "test_mask_ops": 130,
    "test_gather": 270,
    "test_scatter": 280,
    "test_remap": 330,
    "test_select": 330,
    "test_accumulate_squares": 330,
    "test_sparse_adamw": 530,
    "test_grad_project": 80,
    "test_cross_entropy": 60,
    "test_registration": 20,
    "test_plan": 70,
}


# Every op goes through the interpreter among the fast tests (test_registration); whole grids are slow there.
FAST = ("test_registration",)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("module", [pytest.param(m, marks=() if m in FAST else pytest.mark.slow) for m in LEAST])
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is the process that runs the grid")
def test_grid_in_the_interpreter(module: str, record_property: Callable[[str, object], None]) -> None:
    pytest.importorskip("triton")
    environment = dict(os.environ, TRITON_INTERPRET="1", SPARSEOPT_BACKEND="triton", OMP_NUM_THREADS="1")
    # -P: the working directory stays off sys.path, so that the installed package is tested.
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-m", "not gpu and not slow", "-p", "no:cacheprovider"]
    finished = subprocess.run(
        [*command, "-c", str(ROOT / "pyproject.toml"), f"--rootdir={ROOT}", str(HERE / f"{module}.py")],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1150,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-2000:]
    passed = re.search(r"(\d+) passed", finished.stdout)
    assert passed is not None
    record_property("cases", passed[1])
    assert int(passed[1]) >= LEAST[module]
