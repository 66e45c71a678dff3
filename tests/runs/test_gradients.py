"""Gradient analysis against plain numpy on whole vectors, with planted findings and damaged files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import sparseopt as so
from sparseopt.cli._main import app
from sparseopt.runs.gradient_findings import Thresholds, correlations, flags, loss_at, rank_correlation
from sparseopt.runs.gradients import analyse, gradient_files, layer_of

Gradients = dict[str, torch.Tensor]
SHAPES = {
    "transformer.wte.weight": (7, 4),
    "transformer.h.10.mlp.weight": (4, 6),  # as a file sorted by text has it
    "transformer.h.10.norm.weight": (4,),
    "transformer.h.2.mlp.weight": (4, 6),
    "transformer.h.2.norm.weight": (4,),
    "transformer.h.2.extra.weight": (3, 3),
    "transformer.ln_f.weight": (4,),
}
LAYERS = {
    "wte": ["transformer.wte.weight"],
    "2": ["transformer.h.2.mlp.weight", "transformer.h.2.norm.weight", "transformer.h.2.extra.weight"],
    "10": ["transformer.h.10.mlp.weight", "transformer.h.10.norm.weight"],
    "ln_f": ["transformer.ln_f.weight"],
}


def draw(seed: int, dtype: torch.dtype = torch.float32) -> Gradients:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


def save(folder: Path, gradients: Gradients, micro: list[Gradients] | None = None) -> None:
    folder.mkdir(parents=True)
    torch.save(gradients, folder / "gradients.pt")
    for i, batch in enumerate(micro or []):
        (folder / "micro_gradients").mkdir(exist_ok=True)
        torch.save(batch, folder / "micro_gradients" / f"{i:05d}.pt")


def vector(gradients: Gradients, names: list[str]) -> np.ndarray[Any, Any]:
    return np.concatenate([gradients[name].double().numpy().ravel() for name in names])


def cosine(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers(tmp_path: Path, dtype: torch.dtype) -> None:
    run = tmp_path / "run"
    whole = {step: draw(step, dtype) for step in (100, 20, 60)}
    # What the micro-batches share is seen in all layers but one.
    micro = [draw(1000 + i, dtype) for i in range(5)]
    for batch in micro:
        for name in set(SHAPES) - set(LAYERS["ln_f"]):
            batch[name] += 2 * whole[60][name]
    for step, gradients in whole.items():
        save(run / f"checkpoint_{step}", gradients, micro if step == 60 else None)
    entries = [{"step": 20, "eval_loss": 3.0}, {"step": 50, "loss": 1}, {"step": 100, "eval_loss": 1.0}]
    (run / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries) + '{"step": 1')
    found = analyse(run)
    assert found["steps"] == [20, 60, 100]
    assert found["layers"] == list(LAYERS)
    assert [c["eval_loss"] for c in found["checkpoints"]] == [3.0, 2.0, 1.0]
    for checkpoint in found["checkpoints"]:
        gradients = whole[checkpoint["step"]]
        assert checkpoint["total_norm"] == pytest.approx(np.linalg.norm(vector(gradients, list(SHAPES))))
        for label, names in LAYERS.items():
            expected = vector(gradients, names)
            assert checkpoint["layers"][label]["norm"] == pytest.approx(np.linalg.norm(expected))
            assert checkpoint["layers"][label]["rms"] == pytest.approx(math.sqrt(np.mean(expected**2)))
        (pair,) = checkpoint["next"]
        assert pair["layers"] == ["2", "10"]
        low, high = (
            vector(gradients, [f"transformer.h.{n}.{part}.weight" for part in ("mlp", "norm")]) for n in (2, 10)
        )
        assert pair["cosine"] == pytest.approx(cosine(low, high))
        assert set(pair["parameters"]) == {"mlp.weight", "norm.weight"}
    first, second, third = found["checkpoints"]
    assert first["previous"] is None
    for label, names in LAYERS.items():
        expected_cosine = cosine(vector(whole[100], names), vector(whole[60], names))
        assert third["previous"][label] == pytest.approx(expected_cosine)
    assert first["variance"] is None
    for label, names in [*LAYERS.items(), ("all", list(SHAPES))]:
        batches = np.stack([vector(batch, names) for batch in micro])
        variance, mean = batches.var(axis=0, ddof=1).sum(), np.linalg.norm(batches.mean(axis=0))
        measured = second["variance"]["all"] if label == "all" else second["variance"]["layers"][label]
        assert measured["variance"] == pytest.approx(variance, rel=1e-5)
        assert measured["mean_norm"] == pytest.approx(mean, rel=1e-5)
        assert measured["noise"] == pytest.approx(math.sqrt(variance) / mean, rel=1e-5)
        signal = mean**2 - variance / 5
        if label == "ln_f":
            assert signal < 0
            assert measured["noise_scale"] is None
        else:
            assert measured["noise_scale"] == pytest.approx(variance / signal, rel=1e-4)
    assert found["flags"] == []


def test_planted_findings(tmp_path: Path) -> None:
    def plant(step: int, **factors: float) -> None:
        gradients = draw(step)
        for label, factor in factors.items():
            for name in LAYERS[label.removeprefix("layer_")]:
                gradients[name] *= factor
        save(tmp_path / f"checkpoint_{step}", gradients)

    plant(1)
    plant(2, ln_f=1e-5)
    plant(3, layer_2=0.0)
    plant(4, layer_10=1e3)
    plant(5, wte=math.nan)
    plant(6, wte=50, layer_2=50, layer_10=50, ln_f=50)
    found = {(flag["step"], flag["layer"], flag["kind"]) for flag in analyse(tmp_path)["flags"]}
    assert found == {
        (2, "ln_f", "vanishing"),
        (3, "2", "vanishing"),
        (4, "10", "exploding"),
        (4, "all", "exploding"),
        (5, "wte", "exploding"),
        (5, "all", "exploding"),
        (6, "all", "exploding"),
    }
    assert analyse(tmp_path, Thresholds(1e-9, 1e4, 1e6))["flags"] != []
    assert {flag["step"] for flag in analyse(tmp_path, Thresholds(1e-9, 1e4, 1e6))["flags"]} == {3, 5}


def test_all_zero_gradients_vanish(tmp_path: Path) -> None:
    save(tmp_path / "checkpoint_1", {name: value * 0 for name, value in draw(1).items()})
    assert [flag["kind"] for flag in analyse(tmp_path)["flags"]] == ["vanishing"] * 4


def test_correlations() -> None:
    assert rank_correlation([1, 2, 3, 4], [10, 20, 15, 40]) == pytest.approx(0.8)
    assert rank_correlation([1, 1, 2], [3, 3, 5]) == pytest.approx(1.0)  # equal values share a rank
    assert rank_correlation([1, 1, 1], [1, 2, 3]) is None
    assert [loss_at(step, {10: 4.0, 20: 2.0}) for step in (5, 10, 15, 20, 25)] == [None, 4.0, 3.0, 2.0, None]
    checkpoints = [
        {"step": i, "total_norm": norm, "eval_loss": loss, "next": [], "previous": None, "variance": None,
         "layers": {"0": {"norm": -norm, "rms": 1.0}}}
        for i, (norm, loss) in enumerate([(1.0, 5.0), (2.0, 6.0), (4.0, 9.0), (math.inf, 1.0), (5.0, None)])
    ]  # fmt: skip
    by_name = {entry["statistic"]: entry for entry in correlations(checkpoints, ["0"])}
    assert (by_name["total norm"]["points"], by_name["total norm"]["spearman"]) == (3, pytest.approx(1.0))
    assert by_name["total norm"]["pearson"] == pytest.approx(np.corrcoef([1, 2, 4], [5, 6, 9])[0, 1])
    assert by_name["norm of layer 0"]["spearman"] == pytest.approx(-1.0)
    assert (by_name["noise"]["points"], by_name["noise"]["pearson"]) == (0, None)
    assert flags([], Thresholds()) == []
    with pytest.raises(ValueError, match="spike_above must be a positive number, got 0"):
        Thresholds(spike_above=0)


def test_which_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="has saved no gradients"):
        gradient_files(tmp_path)
    save(tmp_path / "final_checkpoint", draw(1))
    assert list(gradient_files(tmp_path)) == [1]
    (tmp_path / "log.jsonl").write_text('{"step": 7, "loss": 1.0}\n')
    assert list(gradient_files(tmp_path)) == [7]
    save(tmp_path / "checkpoint_3", draw(1))
    (tmp_path / "checkpoint_9").mkdir()
    assert {step: path.name for step, path in gradient_files(tmp_path).items()} == {
        3: "checkpoint_3",
        7: "final_checkpoint",
    }
    (tmp_path / "final_checkpoint" / "accelerator_states").mkdir()
    (tmp_path / "final_checkpoint" / "accelerator_states" / "trainer_state.json").write_text('{"global_step": 3}')
    assert [path.name for path in gradient_files(tmp_path).values()] == ["checkpoint_3"]


def test_layers_by_name() -> None:
    assert layer_of("model.layers.12.self_attn.q_proj.weight") == (12, "12", "self_attn.q_proj.weight")
    assert layer_of("lm_head.weight") == (None, "lm_head", "weight")
    assert layer_of("weight") == (None, "weight", "weight")


def test_wrong_files(tmp_path: Path) -> None:
    save(tmp_path / "checkpoint_1", draw(1))
    path = tmp_path / "checkpoint_1" / "gradients.pt"
    data = path.read_bytes()
    for damaged in (data[: len(data) // 2], b"", b"nothing"):
        path.write_bytes(damaged)
        with pytest.raises(so.FormatError, match=r"gradients\.pt holds no gradients"):
            analyse(tmp_path)
    for content in ([1], {"a": 1}, {"a": torch.tensor([1])}):
        torch.save(content, path)
        with pytest.raises(so.FormatError, match=r"expected a dict of parameter name -> floating-point tensor"):
            analyse(tmp_path)
    path.write_bytes(data)
    (tmp_path / "log.jsonl").write_text('{"step"\n{"step": 1}\n')
    with pytest.raises(so.FormatError, match=r"log\.jsonl, line 1, is not valid JSON"):
        analyse(tmp_path)


def test_command(tmp_path: Path) -> None:
    manager = so.RunManager(tmp_path)
    run_id = manager.setup_run({})
    for step in (1, 2, 3):
        gradients = draw(step)
        if step == 3:
            gradients["transformer.wte.weight"][0, 0] = math.inf
        save(tmp_path / run_id / f"checkpoint_{step}", gradients, [draw(10), draw(11)])
    with open(tmp_path / run_id / "log.jsonl", "w") as file:
        file.writelines(json.dumps({"step": step, "eval_loss": 4.0 - step}) + "\n" for step in (1, 2, 3))

    def call(*flags: str) -> Any:
        return CliRunner().invoke(app, ["runs", "gradients", run_id[:20], "--base_dir", str(tmp_path), *flags])

    result = call()
    assert result.exit_code == 0, result.stderr
    assert "3 checkpoints, steps 1 to 3, 4 layers" in result.stdout
    assert "step 3: layer wte is exploding: inf" in result.stdout
    folder = tmp_path / run_id / "gradients"
    pictures = sorted(path.name for path in folder.glob("*.png"))
    assert pictures == ["correlation.png", "directions.png", "norms.png", "variance.png"]
    for path in folder.glob("*.png"):
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG")
        assert len(data) > 10_000
    numbers = json.loads((folder / "gradients.json").read_text())
    assert numbers["checkpoints"][2]["total_norm"] == "inf"
    result = call("--json", "--no_plots", "--output_dir", str(tmp_path / "elsewhere"))
    assert json.loads(result.stdout) == numbers
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["gradients.json"]
    assert call("--vanishing_below", "-1").exit_code == 2
