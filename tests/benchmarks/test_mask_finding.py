"""The benchmark of mask finding: its log is one, its bar is checked on tensors large enough to tell."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import sparseopt as so
from sparseopt.benchmarks import mask_finding, report
from sparseopt.deltas.reader import LogReader
from sparseopt.deltas.reconstruct import reconstruct

SHAPES = {"a.weight": (300, 40), "b.weight": (7,)}


def test_the_synthetic_log_is_a_chain_of_the_share_asked_for(tmp_path: Path) -> None:
    mask_finding.write_log(tmp_path, SHAPES, 3, 0.25)
    reader = LogReader(tmp_path)
    assert reader.check() == [10, 20, 30]
    assert reader.shapes == SHAPES
    for step in reader.steps:
        assert 0.2 < reader.file(step).changed_parameters / 12007 < 0.3
    first, last = reconstruct(None, tmp_path, 10), reconstruct(None, tmp_path, 30)
    assert first["a.weight"].dtype == torch.bfloat16
    assert 0.3 < float((first["a.weight"] != last["a.weight"]).float().mean()) < 0.5


@pytest.mark.slow
def test_bar_on_a_tensor_of_32_mb(tmp_path: Path) -> None:
    found = mask_finding.run({"w": (4096, 4096)}, 2, 0.1, ["momentum"], 0.975, tmp_path)
    assert found["limit_bytes"] == 3 * 2 * 4096 * 4096 + 4096 * 4096 // 8
    assert set(found["cases"]) == {"momentum, scratch file", "momentum"}
    for case in found["cases"].values():
        assert case["active"] == case["expected"] == round(0.025 * 4096 * 4096)
        assert 2 << 20 < case["growth_bytes"] < 96 << 20  # the mask alone has 2 MB
        assert case["met"] is True
    assert so.MaskSet.load(tmp_path / "mask.safetensors").active_parameters == round(0.025 * 4096 * 4096)
    assert not list((tmp_path / "scratch").iterdir())


def test_a_file_of_its_own_among_the_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = {"growth_bytes": 10, "met": True}
    monkeypatch.setattr(mask_finding, "run", lambda *arguments: {"parameters": 5, "cases": {"fisher": case}})
    assert mask_finding.main(["--output", str(tmp_path / "results"), "--shape", "tiny"]) == 0
    (path,) = (tmp_path / "results").glob("mask-finding-*.json")
    stored = json.loads(path.read_text())
    assert {"device", "date", "commit", "command", "environment"} <= stored.keys()
    (tmp_path / "README.md").write_text(f"{report.BEGIN}\n{report.END}\n")
    report.render(tmp_path / "results", tmp_path / "README.md")
    assert "No results are stored" in (tmp_path / "README.md").read_text()
    monkeypatch.setattr(mask_finding, "run", lambda *arguments: {"cases": {"fisher": {**case, "met": False}}})
    assert mask_finding.main(["--shape", "tiny"]) == 1
