"""Policies by seed on a tiny model: what they share, what is not run twice, what the figures are; the cost of updates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from sparseopt.benchmarks import dynamic_learning, dynamic_report, dynamic_update


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty documents of words the tiny tokenizer knows, each a walk with its own stride."""
    folder = tmp_path_factory.mktemp("texts")
    for i in range(40):
        (folder / f"text{i}.txt").write_text(" ".join(f"w{(i + j * (1 + i % 3)) % 60}" for j in range(60)))
    return folder


def arguments(out: Path, model: Path, texts: Path, *more: str) -> list[str]:
    settings = {
        "steps": 8, "grid_steps": 3, "batch": 4, "seq": 16, "interval": 2, "evaluate_every": 4, "evaluation_windows": 5,
        "sparsity": 0.5,
    }  # fmt: skip
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    base = ["--output", str(out), "--model", str(model), "--texts", str(texts), "--device", "cpu", "--dtype", "float32"]
    return [*base, *words, "--commit", "abc", *more]


def test_parts_are_made_of_whole_documents(tiny_folder: Path, texts: Path) -> None:
    from sparseopt.models import load_tokenizer

    found = dynamic_learning.read_texts(texts)
    tokenizer = load_tokenizer(str(tiny_folder))
    corpus = dynamic_learning.make_corpus(found, tokenizer, 16, 5, torch.device("cpu"))
    assert sum(corpus.documents.values()) == 40
    assert all(corpus.documents.values())
    assert len(corpus.windows["held_out"]) == 5
    assert len(corpus.windows["train"]) == corpus.documents["train"] * 61 // 16
    # The first window of a part is the beginning of its first document.
    for part, windows in corpus.windows.items():
        first = next(text for name, text in found.items() if dynamic_learning.part_of(name) == part)
        assert windows[0].tolist() == tokenizer(first)["input_ids"][:16]
    with pytest.raises(ValueError, match="fewer than a window of 100000"):
        dynamic_learning.make_corpus(found, tokenizer, 100000, 5, torch.device("cpu"))
    with pytest.raises(FileNotFoundError, match=r"holds no \.txt file"):
        dynamic_learning.read_texts(tiny_folder)


def test_policies_differ_in_nothing_but_their_masks(
    tmp_path: Path, tiny_folder: Path, texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "runs"
    given = arguments(out, tiny_folder, texts, "--rates", "1e-3", "1e-2", "--fractions", "0.1", "0.4", "--seeds", "1")
    assert dynamic_learning.main([*given, "--time_limit", "0"]) == 3
    assert "the same command goes on" in capsys.readouterr().err
    assert dynamic_learning.main([*given, "--report"]) == 1, "no run finished: there is nothing to report"
    assert "no final run is there yet" in capsys.readouterr().err
    assert dynamic_learning.main([*given, "--no_picture"]) == 0
    before = (out / "runs.jsonl").read_text()
    assert dynamic_learning.main([*given[:-1], "1", "2"]) == 0
    after = (out / "runs.jsonl").read_text()
    assert after.startswith(before), "finished runs are not run again"
    rows = [json.loads(line) for line in after.splitlines()]
    final = [row for row in rows if row["phase"] == "final"]
    assert rows[0]["phase"] == "before"
    assert [(r["arm"], r["seed"]) for r in final] == [(p, seed) for seed in (1, 2) for p in ("static", "set", "rigl")]
    rates = {row["rate"]: row["loss"] for row in rows if row["phase"] == "rates"}
    assert 2 <= len(rates) <= 4
    (rate,) = {row["rate"] for row in final}
    assert rate == min(rates, key=lambda r: rates[r])
    assert len(rates) == 4 or min(rates) < rate < max(rates), "a best rate at the edge was followed"
    for policy in ("set", "rigl"):
        tried = {row["fraction"]: row for row in rows if row["phase"] == "fractions" and row["arm"] == policy}
        assert set(tried) == {0.1, 0.4}
        assert {(row["rate"], row["seed"], row["steps"]) for row in tried.values()} == {(rate, 0, 8)}
        best = min(tried, key=lambda fraction: tried[fraction]["loss"])
        assert {row["fraction"] for row in final if row["arm"] == policy} == {best}
    for seed in (1, 2):
        mine = [row for row in final if row["seed"] == seed]
        assert len({row["first_masks"] for row in mine}) == 1
        assert len({row["order"] for row in mine}) == 1
        assert len({row["curve"][0][1] for row in mine}) == 1, "the same pruned model"
        assert len({row["loss"] for row in mine}) == 3, "and three different trainings"
    assert len({row["order"] for row in final}) == 2
    for row in final:
        assert [step for step, _ in row["curve"]] == [0, 4, 8]
        # Updates after steps 2, 4 and 6; at 6, three quarters, nothing is exchanged any more.
        grown = [record["grown"] > 0 for record in row["history"]]
        assert grown == ([] if row["arm"] == "static" else [True, True, False])
    found = json.loads((out / "dynamic_learning.json").read_text())
    assert found["commit"] == "abc"
    ends = {(row["arm"], str(row["seed"])): row["loss"] for row in final}
    assert {(arm, s): loss for arm, v in found["arms"].items() for s, loss in v["seeds"].items()} == ends
    assert (out / "dynamic_learning.png").read_bytes().startswith(b"\x89PNG")
    assert f"{found['arms']['rigl']['held_out']['mean']:.4f} ±" in (out / "dynamic_learning.md").read_text()
    assert dynamic_learning.main([*given, "--steps", "9"]) == 1
    assert "other settings (steps 8 there, 9 here): give another folder" in capsys.readouterr().err


def row(arm: str, seed: int, loss: float | None, order: str = "a") -> dict[str, Any]:
    curve = [[0, 9.0], [600, loss]]
    return {
        "phase": "final", "arm": arm, "seed": seed, "fraction": 0.1, "loss": loss, "train": loss, "rate": 1e-3, "curve": curve,
        "history": [], "first_masks": "m", "order": order, "step_ms": 1.0, "date": "", "commit": "", "environment": {},
        "settings": {},
    }  # fmt: skip


def test_bars_compare_equal_seeds() -> None:
    losses = {"static": (5.0, 4.0), "set": (4.5, 3.5), "rigl": (4.25, 3.5)}
    rows = [row(arm, seed, loss) for arm, pair in losses.items() for seed, loss in enumerate(pair)]
    found = dynamic_report.summary(rows)
    assert found["differences"]["rigl - static"]["seeds"] == {"0": -0.75, "1": -0.5}
    assert found["bars"]["RigL below static"] == {"below": 0.0, "measured": -0.625, "met": True}
    assert found["bars"]["RigL not above SET"] == {"at_most": 0.0, "measured": -0.125, "met": True}
    worse = [row("rigl", 0, 5.5) if r["arm"] == "rigl" and r["seed"] == 0 else r for r in rows]
    bars = dynamic_report.summary(worse)["bars"]
    assert [(bar["measured"], bar["met"]) for bar in bars.values()] == [(0.0, False), (0.5, False)]
    with pytest.raises(ValueError, match="rigl diverged under seed 1"):
        dynamic_report.summary([*rows[:-1], row("rigl", 1, None)])
    with pytest.raises(ValueError, match="seed 1 began with different masks or saw different windows"):
        dynamic_report.summary([*rows[:-1], row("rigl", 1, 3.0, order="b")])


@pytest.mark.parametrize("target", ["weights", "updates"])
def test_cost_of_updates(tmp_path: Path, target: str) -> None:
    code = dynamic_update.main(
        ["--shape", "tiny", "--targets", target, "--seq", "16", "--updates", "2", "--ordinary", "2", "--device", "cpu",
         "--output", str(tmp_path), "--commit", "abc"]
    )  # fmt: skip
    assert code == 0
    found = json.loads((tmp_path / "dynamic_update.json").read_text())
    (result,) = found["results"]
    assert result["ordinary_step_ms"]["count"] == 4
    assert result["update_ms"]["count"] == result["state_following_ms"]["count"] == 2
    assert 0 < result["state_following_ms"]["median"] < result["update_ms"]["median"]
    assert result["update_ms"]["p20"] < result["step_with_update_ms"]["p20"]
    density = {"weights": 0.2, "updates": 0.025}[target]
    linear = 2 * 64 * (4 * 16 + 2 * 2 * 16 + 64 + 3 * 128)
    assert result["sparse_active"] == pytest.approx(density * linear, abs=20)
    assert result["bytes_per_active_entry"] < (10 + 2) * 1.2
    (bar,) = found["bars"].values()
    assert bar["met"] == (bar["measured"] < 1)


def test_first_masks_at_random(tmp_path: Path, tiny_folder: Path, texts: Path) -> None:
    short = (
        "--initial",
        "random",
        "--policies",
        "static",
        "--rates",
        "1e-3",
        "--fractions",
        "0.1",
        "--seeds",
        "1",
        "2",
    )
    assert dynamic_learning.main([*arguments(tmp_path, tiny_folder, texts, *short), "--no_picture"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert [row["phase"] for row in rows] == ["before", "final", "final"], "nothing is left to choose"
    assert rows[1]["first_masks"] != rows[2]["first_masks"], "each seed draws its own"
    assert "first masks at random" in (tmp_path / "dynamic_learning.md").read_text()
