"""Results of the training-step benchmark: bars by device, the file they are kept in, arms that cannot be built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import sparseopt as so
from sparseopt.benchmarks import report, train_arms, train_results
from sparseopt.benchmarks.train_arms import Unavailable
from sparseopt.benchmarks.train_settings import Arm, parse
from sparseopt.shapes import build_shape

pytest.importorskip("transformers")


def arm(median: float, peak: int | None = None) -> dict[str, Any]:
    span = {"median": median, "p20": median, "p80": median}
    phases = {"forward": span, "backward": span, "optimizer": span}
    return {
        "rounds": 20, "total": span, "phases": phases, "peak_allocated_bytes": peak, "peak_reserved_bytes": peak,
        "state_bytes": 1, "gradient_bytes": 1, "trained": 1, "loss": 1.0,
    }  # fmt: skip


@pytest.mark.parametrize("device", ["NVIDIA H100 80GB HBM3", "NVIDIA H200"])
def test_bars_are_judged_on_the_device_they_were_set_for(device: str, tmp_path: Path) -> None:
    settings, _ = parse(["--shape", "llama-3.2-3b", "--workload", "lm"])
    arms = {"dense-fused": arm(80.0, 25 << 30), "lora": arm(110.0, 10 << 30), "sparse@2.5%": arm(60.0, 9 << 30)}
    about = {"date": "2030-01-01", "commit": "abc", "command": "x", "environment": {"device": device}}
    suite = train_results.suite(arms, settings.record("eager"), about)
    case = suite["cases"]["sparse@2.5%"]
    if "H200" in device:
        assert case["bars"] == {}
        return
    assert case["bars"]["dense-fused"] == {"at_least": 1.3, "measured": 1.333, "met": True}
    assert case["bars"]["lora"]["met"] is True
    assert case["bars"]["peak memory of lora"]["measured"] == pytest.approx(10 / 9, abs=1e-3)
    assert train_results.picture(suite, settings.name("eager"), tmp_path / "a.png")
    table = train_results.markdown(suite, settings.name("eager"))
    assert "| sparse@2.5% | 60 (60-60) | **1.33x** |" in table
    assert "9.00 GiB" in table
    assert report.table(suite["cases"]).count("met") == 3
    slow = train_results.suite({**arms, "sparse@2.5%": arm(70.0, 11 << 30)}, settings.record("eager"), about)
    assert {bar["met"] for bar in slow["cases"]["sparse@2.5%"]["bars"].values()} == {False}


def test_a_foreign_file_is_not_overwritten(tmp_path: Path) -> None:
    entry = {"environment": {"device": "Some GPU"}, "cases": {}}
    (tmp_path / "some-gpu.json").write_text("[1]")
    with pytest.raises(so.FormatError, match="not a file of benchmark results"):
        train_results.store(entry, "x", tmp_path)
    assert (tmp_path / "some-gpu.json").read_text() == "[1]"


def test_an_arm_without_its_package() -> None:
    if train_arms.importlib.util.find_spec("bitsandbytes") is not None:
        pytest.skip("bitsandbytes is installed")
    with pytest.raises(Unavailable, match="not installed"):
        train_arms.build(Arm("adamw8bit"), build_shape("tiny", device="cpu"))
