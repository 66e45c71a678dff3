"""The benchmark of several processes on two of a CPU: it runs, and its bytes are those that arithmetic gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_bytes_and_state_on_two_processes(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m",
         "sparseopt.benchmarks.scale_out", "--shape", "tiny", "--device", "cpu", "--seq", "16", "--steps", "2", "--output",
         str(tmp_path)],
        capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "scale-out-tiny-cpu-x2.json").read_text())
    arms, total, active = result["arms"], result["total_parameters"], result["active_parameters"]
    assert arms["ddp dense"]["bytes_reduced_per_step"] == 2 * total
    # Besides the compact gradients: a flag for each tensor, and the smallest parameter, which DDP keeps.
    for arm, size in {"ddp sparse fp32": 4, "ddp sparse bf16": 2}.items():
        assert 0 < arms[arm]["bytes_reduced_per_step"] - size * active < 1000
    dense, sparse = (sum(arms[f"fsdp2 {way}"]["state_bytes"]) for way in ("dense", "sparse"))
    assert sparse < dense
    for facts in (arms["fsdp2 sparse"], arms["fsdp2 dense"]):
        assert facts["bytes_gathered_per_step"] > 0
    assert all(len(facts["peak_memory_bytes"]) == 2 and facts["step_ms"]["median"] > 0 for facts in arms.values())
    table = (tmp_path / "scale-out-tiny-cpu-x2.md").read_text()
    assert all(f"| {arm} |" in table for arm in arms)
    assert result["commit"] in table
