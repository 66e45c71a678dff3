"""Arms that are alive at once, each in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sparseopt.benchmarks import train_step
from sparseopt.benchmarks.train_arms import CheckError
from sparseopt.benchmarks.train_settings import parse
from sparseopt.benchmarks.train_together import _answer, measure_together

SMALL = ["--shape", "tiny", "--seq", "16", "--device", "cpu", "--density", "2.5%", "--together"]


def test_every_arm_takes_its_turns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--arms", "dense-fused,sparse/columns", "--rounds", "5", "--passes", "2", "--warmup", "2"]
    assert train_step.main([*SMALL, *arguments, "--output", str(tmp_path), "--json"]) == 0
    found = capsys.readouterr()
    (suite,) = json.loads(found.out).values()
    assert "--together" in suite["command"]
    arms = suite["train_step"]["arms"]
    assert list(arms) == ["dense-fused", "sparse@2.5%/columns"]  # as asked for, whichever was warm first
    assert all(arm["rounds"] == 5 and arm["total"]["median"] > 0 for arm in arms.values())
    assert arms["sparse@2.5%/columns"]["state_bytes"] < arms["dense-fused"]["state_bytes"]
    assert "dense-fused: warm after" in found.err


@pytest.mark.parametrize("more", [["--mask", "m.safetensors"], ["--workload", "dpo", "--subset_size", "4"]])
def test_real_rows_and_mask_files_are_refused(more: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*SMALL[2:], *more] if "--subset_size" in more else [*SMALL, *more]
    with pytest.raises(SystemExit):
        parse(arguments)
    assert f"leave out {'--subset_size' if '--subset_size' in more else '--mask'}" in capsys.readouterr().err


def test_cuda_graphs_need_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert train_step.main([*SMALL, "--arms", "dense-fused", "--mode", "graphs"]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "Error: --mode graphs needs a CUDA device, this is cpu."


def test_an_arm_that_fails_ends_all(capfd: pytest.CaptureFixture[str]) -> None:
    import torch

    settings, _ = parse([*SMALL, "--arms", "dense-fused", "--gradient_checkpointing"])
    with pytest.raises(RuntimeError, match=r"dense-fused: RuntimeError: META device"):
        measure_together(settings, "eager", [range(1)], torch.device("meta"), {}, lambda: None)
    assert "Traceback" in capfd.readouterr().err


class Pipe:
    def __init__(self, answer: tuple[str, object] | None) -> None:
        self.answer = answer

    def recv(self) -> tuple[str, object]:
        if self.answer is None:
            raise EOFError
        return self.answer


def test_answers() -> None:
    arms: dict = {}
    with pytest.raises(CheckError, match="frozen"):
        _answer("a", Pipe(("wrong", "a frozen entry moved")), arms)
    with pytest.raises(RuntimeError, match="the process of a ended without a word"):
        _answer("a", Pipe(None), arms)
    assert _answer("a", Pipe(("ready", None)), arms) is True
    assert arms == {}
    assert _answer("a", Pipe(("unavailable", "not installed")), arms) is None
    assert arms == {"a": {"unavailable": "not installed"}}


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_timed(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "sparseopt.benchmarks.train_step", *SMALL, "--arms", "dense-fused,sparse/rows",
               "--rounds", "1000000", "--passes", "50000", "--warmup", "2", "--output", str(tmp_path)]  # fmt: skip
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, process_group=0
    ) as process:
        assert process.stderr is not None
        lines = (line for line in process.stderr if "steps/s" in line)
        next(lines)
        next(lines)  # five seconds later: both had their turn
        os.killpg(process.pid, signal.SIGINT)
        rest = process.stderr.read()
        assert process.wait(60) == 130, rest
    assert "the steps measured by then are kept" in rest
    (suite,) = json.loads(next(tmp_path.glob("*.json")).read_text())["suites"].values()
    found = suite["train_step"]
    assert found["settings"]["interrupted"]
    assert len(found["arms"]) == 2
    assert all(arm["rounds"] >= 20 for arm in found["arms"].values())
    assert "Traceback" not in rest
