"""The benchmark of projecting: what it stores, and that it times nothing that is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import sparseopt as so
from sparseopt.benchmarks import projection

TINY = [
    "--shape", "tiny", "--batch", "2", "--seq", "16", "--dtype", "float32", "--rank_total", "16", "--rounds", "2",
    "--device", "cpu",
]  # fmt: skip


def stored(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("*.json")
    return dict(json.loads(path.read_text())["suites"])


def test_a_run_stores_all_arms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    projection.main([*TINY, "--json", "--output", str(tmp_path)])
    printed = json.loads(capsys.readouterr().out)
    ((name, suite),) = stored(tmp_path).items()
    assert name == "projection, tiny shapes, random weights, float32, 16 values a layer of mlp,attn"
    assert printed == {name: suite["cases"]}
    case = suite["cases"]["2 x 16, eager"]
    assert set(case["baselines"]) == set(projection.ARMS) - {"sparseopt"}
    assert set(suite["arms"]) == set(projection.ARMS)
    for baseline in case["baselines"].values():
        assert baseline["p20"] <= baseline["median"] <= baseline["p80"]
        assert baseline["ratio"] == pytest.approx(baseline["median"] / case["sparseopt"]["median"], abs=1e-3)
    assert 0 < suite["largest_relative_error"] < 1e-4
    assert suite["command"].endswith("--output FOLDER"), "a folder of one machine means nothing elsewhere"
    assert str(tmp_path) not in json.dumps(suite)


def test_other_cases_and_suites_stay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*TINY, "--arms", "plain", "sparseopt", f"--output={tmp_path}"]
    projection.main(arguments)
    (path,) = tmp_path.glob("*.json")
    kept = json.loads(path.read_text())
    kept["suites"]["masks"] = {"cases": {"pack": 1}}
    path.write_text(json.dumps(kept))
    capsys.readouterr()
    projection.main([*arguments, "--seq", "8"])
    suites = stored(tmp_path)
    assert suites.pop("masks") == {"cases": {"pack": 1}}
    (suite,) = suites.values()
    assert list(suite["cases"]) == ["2 x 16, eager", "2 x 8, eager"]
    assert suite["cases"]["2 x 16, eager"] == kept["suites"][next(iter(suites))]["cases"]["2 x 16, eager"]
    assert "| 2 x 8, eager |" in capsys.readouterr().out
    assert "--output=FOLDER" in suite["command"]


def test_a_wrong_projection_is_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    collect = so.GradientProjector.collect

    def broken(self: so.GradientProjector) -> torch.Tensor:
        return collect(self) * 1.001

    monkeypatch.setattr(so.GradientProjector, "collect", broken)
    with pytest.raises(SystemExit, match="off exact gradients"):
        projection.main([*TINY, "--output", str(tmp_path)])
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().out == ""


def test_bars_are_judged_by_the_medians() -> None:
    def times(median: float) -> dict[str, Any]:
        return {"milliseconds": {"median": median, "p20": median, "p80": median}}

    settings = {"shape": None, "model": "smollm2", "size": "4 x 256", "mode": "eager", "device": "cpu", "rounds": 3}
    for plain, met in ((1180.0, True), (1170.0, False)):
        found = projection.summary({"plain": times(plain), "sparseopt": times(1000)}, {}, settings, {})
        bar = found["cases"]["4 x 256, eager"]["bars"]["plain"]
        assert bar == {"at_least": 1.176, "measured": plain / 1000, "met": met}
