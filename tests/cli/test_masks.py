"""``sparseopt masks info|compare|merge`` on files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import sparseopt as so
from sparseopt.cli._main import app

A = {"w": torch.tensor([[True, False, True], [False, False, False]]), "b": torch.tensor([True, True])}
B = {"w": torch.tensor([[True, True, False], [False, False, False]]), "b": torch.tensor([True, False])}


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    paths = (tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    for path, masks in zip(paths, (A, B), strict=True):
        so.MaskSet.from_bool(masks).save(path)
    return str(paths[0]), str(paths[1])


def run(*args: str) -> str:
    result = CliRunner().invoke(app, ["masks", *args])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_info(files: tuple[str, str]) -> None:
    report = json.loads(run("info", files[0], "--json", "--per-layer"))
    assert (report["active_parameters"], report["total_parameters"], report["parameters"]) == (4, 8, 2)
    assert report["density"] == report["sparsity"] == 0.5
    assert report["fingerprint"] == so.MaskSet.load(files[0]).fingerprint
    assert report["per_layer"]["w"] == {"shape": [2, 3], "active": 2, "density": pytest.approx(1 / 3)}
    text = run("info", files[0], "--per_layer")
    assert "active: 4 (density 50.0000%" in text
    assert "w 2x3: 2 active" in text
    assert "w 2x3" not in run("info", files[0])


def test_compare(files: tuple[str, str]) -> None:
    report = json.loads(run("compare", *files, "--json"))
    assert report["jaccard"] == pytest.approx(2 / 5)
    assert set(report["per_layer"]) == {"w", "b"}
    assert "jaccard 0.400000" in run("compare", *files)
    assert "  w: " in run("compare", *files, "--per-layer")


@pytest.mark.parametrize(("how", "active"), [("union", 5), ("intersection", 2), ("majority", 4)])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_merge(files: tuple[str, str], tmp_path: Path, how: str, active: int, suffix: str) -> None:
    output = tmp_path / f"merged{suffix}"
    report = json.loads(run("merge", *files, files[0], "--how", how, "--output", str(output), "--json"))
    assert report["active_parameters"] == active
    assert so.MaskSet.load(output) == so.merge([so.MaskSet.load(f) for f in (*files, files[0])], how=how)
