"""Accuracy of projections: figures that follow from theory, and what the command stores."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from sparseopt.benchmarks import projection_accuracy as accuracy

LAYER = nn.ModuleDict({"mlp": nn.Linear(40, 48, bias=False)})


def test_rank_one_errors_are_those_of_theory() -> None:
    """|P_o u|^2 |P_i v|^2 is a product of two chi-squared means: variance (1 + 2/k)^2 - 1."""
    gradients = {"mlp.weight": accuracy.rank_one((48, 40), 6)}
    found = accuracy.errors(LAYER, gradients, "mlp", range(150), rank_total=64, rank_min=4)
    assert found["layer squared norm"] == pytest.approx(100 * math.sqrt(1.25**2 - 1), rel=0.15)
    assert found["layer squared norm"] == pytest.approx(found["whole squared norm"]), "one layer is all there is"
    sketched = accuracy.errors(LAYER, gradients, "mlp", range(150), rank_total=64, rank_min=4, sketch=24)
    assert sketched["layer squared norm"] == pytest.approx(100 * math.sqrt((1 + 2 / 24) ** 2 - 1 + 2 / 64), rel=0.15)
    assert sketched["layer squared norm"] < 0.8 * found["layer squared norm"]


def test_an_exact_projection_has_no_error() -> None:
    """Orthogonal rows, as many as the layer has rows and columns, lose nothing."""
    gradients = {"mlp.weight": torch.randn(3, 48, 40)}
    found = accuracy.errors(LAYER, gradients, "mlp", [0], rank_total=48 * 48, rank_min=48, row_orthonormal=True)
    assert max(found.values()) < 1e-3


def test_command(tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text(" ".join(f"w{i % 60}" for i in range(64)))
    output = tmp_path / "accuracy.json"
    accuracy.main(
        ["--model", str(tiny_folder), "--data", str(tmp_path / "text.txt"), "--rank_total", "16", "--sketch", "12", "--samples",
         "2", "--block_size", "16", "--seeds", "1", "--shape", "24", "20", "--output", str(output)]
    )  # fmt: skip
    stored = json.loads(output.read_text())
    rank_one, real = stored["errors_percent"].values()
    for kinds in (rank_one, real):
        assert list(kinds) == ["plain", "sketch 12 x 12"]
        for values in kinds.values():
            assert 0 < min(values.values()) <= max(values.values()) < 300
    printed = capsys.readouterr().out
    assert f"{rank_one['plain']['layer squared norm']:.1f}%" in printed
    for wrong in (["--model", "x"], ["--samples", "1"]):
        with pytest.raises(SystemExit):
            accuracy.main(wrong)
