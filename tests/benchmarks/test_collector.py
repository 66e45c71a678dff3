"""The benchmark of collecting masks: what it reports, and that it times nothing that is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import sparseopt as so
from sparseopt.benchmarks import collector
from sparseopt.trainers import MaskCollector

TINY = ["--shape", "tiny", "--batch", "1", "--sequence", "8", "--rounds", "2", "--device", "cpu"]


def test_every_arm_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    collector.main([*TINY, "--mask_interval", "10", "--output", str(tmp_path / "result.json")])
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "result.json").read_text())
    results = printed["results"]
    assert [result["arm"] for result in results] == list(collector.ARMS)
    for result in results:
        without, with_ = (result["step_ms"][key]["median"] for key in ("without", "with"))
        assert result["update_share"] == pytest.approx((with_ - without) / without)
        chosen, default = result["mask_steps"]["chosen"], result["mask_steps"]["default"]
        assert result["overhead"] == pytest.approx((with_ - without + chosen["held_up_ms"] / 10) / without)
        assert result["accumulation_bytes"] == 4 * result["parameters"]
        assert 0.015 < chosen["active_fraction"] < 0.05
        assert default["tolerance"] == MaskCollector(tmp_path).tolerances[0]
        for step in (chosen, default):
            parts = step["held_up_parts_ms"]
            assert step["held_up_ms"] == pytest.approx(sum(part["median"] for part in parts.values()))
            assert step["background_ms"]["p20"] <= step["background_ms"]["median"] <= step["background_ms"]["p80"]
            assert step["file_bytes"] > 0
        assert result["environment"].keys() >= {"device", "torch", "commit", "date"}


def test_a_wrong_accumulation_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: so.GradientEMA, *arguments: Any) -> None:
        self._taken.clear()
        self.updates += 1

    monkeypatch.setattr(so.GradientEMA, "update", broken)
    with pytest.raises(SystemExit, match="does not follow the formula"):
        collector.measure("tiny", torch.device("cpu"), batch=1, sequence=8, rounds=1)
