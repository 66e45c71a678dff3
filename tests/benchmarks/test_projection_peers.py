"""The comparison with other libraries: refusals, figures, and the Gram error of what has none."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from sparseopt.benchmarks import projection_peers as peers
from sparseopt.shapes import build_shape

TINY = [
    "--shape", "tiny", "--batch", "3", "--seq", "16", "--rank_total", "16", "--dtype", "float32", "--rounds", "2",
    "--seeds", "2", "--device", "cpu",
]  # fmt: skip


def test_without_the_peer_nothing_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="neither dattri nor bergson is installed"):
        peers.main(TINY)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("wrong", [[], ["--rank_total", "12"], ["--batch", "1"], ["--model", "smollm2"]])
def test_bad_usage(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        peers.main([*TINY, *wrong] if wrong else [])
    assert error.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_gram_error_of_exact_rows_is_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact gradients in place of projections: no error; twice as long, only the scaled one has none."""
    model = build_shape("tiny", device="cpu", dtype=torch.float32)
    tokens = torch.randint(256, (3, 8))

    def exact(factor: float) -> Any:
        def build(model: Any, tokens: torch.Tensor, settings: dict[str, Any], seed: int) -> Any:
            def run() -> torch.Tensor:
                names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(model.config.num_hidden_layers)]
                parameters = dict(model.named_parameters())
                rows = []
                for sample in tokens:
                    loss = peers.sample_losses(model, sample[None]).sum()
                    found = torch.autograd.grad(loss, [parameters[name] for name in names])
                    rows.append(factor * torch.cat([gradient.flatten() for gradient in found]))
                return torch.stack(rows)

            return run

        return build

    monkeypatch.setattr(peers, "ARMS", {"plain": peers.plain, "exact": exact(1), "longer": exact(2)})
    found = peers.gram_errors(model, tokens, {"layers": "mlp.up_proj", "rank_total": 16}, range(1))
    assert found["exact"]["gram_error"] < 1e-6
    assert found["longer"]["gram_error"] == pytest.approx(3, rel=1e-5)
    assert found["longer"]["gram_error_scaled"] < 1e-6


def test_a_run_beside_a_peer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another rank of our own stands for a library that is not installed here; a missing one is left out."""

    def peer(model: Any, tokens: torch.Tensor, settings: dict[str, Any], seed: int) -> Any:
        return peers.ours(model, tokens, {**settings, "rank_total": 4}, seed)

    monkeypatch.setattr(peers, "ARMS", {"plain": peers.plain, "peer": peer, "missing": peer, "sparseopt": peers.ours})
    monkeypatch.setattr(peers, "PEERS", {"peer": "numpy", "missing": "no_such_library"})
    monkeypatch.setattr(peers, "MODES", {"compiled": peers.ours})
    peers.main([*TINY, "--modes", "compiled", "--output", str(tmp_path / "peers.json")])
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((tmp_path / "peers.json").read_text())
    assert list(result["arms"]) == ["plain", "peer", "sparseopt", "sparseopt, compiled"]
    for name in ("peer", "sparseopt"):
        assert 0 < result["arms"][name]["gram_error_scaled"] < 3
    for name in ("sparseopt", "sparseopt, compiled"):
        fast = result["arms"][name]["tokens_per_second"] / result["arms"]["peer"]["tokens_per_second"]
        assert result["tokens_per_second_ratio"][name] == {"peer": pytest.approx(fast, abs=1e-3)}
    assert "numpy" in result["environment"]
