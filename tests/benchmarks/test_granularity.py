"""Which mask: shares of the score fall with coarser groups; the page holds what was measured, and the bar's verdict."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from sparseopt import FormatError
from sparseopt.benchmarks import granularity
from sparseopt.benchmarks import granularity_report as report
from sparseopt.benchmarks.study_report import read_rows, summarize

COMMITTED = Path(__file__).parents[2] / "benchmarks" / "results"
DENSE, LORA, ENTRIES = "dense AdamW, bf16", "LoRA r=16, all linear", "sparse 2.5%"


def row(arm: str, accuracy: float, seed: int, phase: str = "final") -> dict[str, Any]:
    figures = {"reward_accuracy": accuracy, "margin": 1.0, "exact_match": 0.1}
    settings = {"model": "a model", "steps": 3, "batch_size": 2, "pairs": {"held_out": 40}}
    return {
        "key": f"{arm}{seed}{phase}", "phase": phase, "arm": arm, "rate": 1e-4, "seed": seed, "held_out": figures,
        "validation": figures, "settings": settings, "trained_parameters": 7, "state_bytes": 3 * 2**20, "train_seconds": 1.0,
        "environment": {"device": "some GPU"}, "date": "2026-01-01", "commit": "abc", "command": "study",
    }  # fmt: skip


def rows(arms: dict[str, list[float]]) -> list[dict[str, Any]]:
    found = []
    for arm, accuracies in arms.items():
        found.append(row(arm, 0.9, 0, "grid"))
        found += [row(arm, accuracy, seed) for seed, accuracy in enumerate(accuracies, 1)]
    return found


def entry(arms: dict[str, tuple[float, float | None]], date: str = "2026-01-02", **settings: Any) -> dict[str, Any]:
    """A stored training step; ``arms``: name -> (milliseconds, GiB)."""
    measured = {
        name: {"total": {"median": ms, "p20": ms, "p80": ms}, "peak_allocated_bytes": gib and int(gib * 2**30)}
        for name, (ms, gib) in arms.items()
    }
    asked = {
        "workload": "lm", "shape": "llama-3.2-3b", "model": "m", "batch": 1, "seq": 512, "mode": "whole",
        "gradient_checkpointing": False, "random_weights": True, **settings,
    }  # fmt: skip
    return {"date": date, "commit": "def", "train_step": {"settings": asked, "arms": measured}}


def write(path: Path, suites: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"device": "some GPU", "suites": suites}))


def test_prices_fall_and_are_shares() -> None:
    torch.manual_seed(0)
    scores = torch.rand(64, 256) ** 8
    kept = granularity.prices({"w": scores}, 0.9)
    assert list(kept) == ["1", "8", "16", "32", "row", "column", "auto"]
    assert 1 > kept["1"] > kept["8"] > kept["16"] > kept["32"] > kept["row"] > 0.1
    assert kept["1"] >= kept["auto"] >= min(kept["row"], kept["column"])
    # A mask of single entries keeps the most that any mask of that size can.
    best = scores.view(-1).topk(round(0.1 * scores.numel())).values.sum() / scores.sum()
    assert abs(kept["1"] - float(best)) < 1e-3


def test_verdict_is_within_one_standard_error_of_the_best_rival() -> None:
    arms = {
        LORA: [0.90, 0.92, 0.94],  # mean 0.92, standard error 0.02 / sqrt(3) = 0.0115
        ENTRIES: [0.91, 0.91, 0.91],
        "sparse 2.5%, columns": [0.909, 0.909, 0.909],  # 0.011 below: within
        "sparse 2.5%, rows": [0.90, 0.91, 0.914],  # 0.012 below: not
        "sparse 2.5%, runs of 16": [0.95],
        DENSE: [0.1, 0.1],
    }
    judged = report.judge(summarize(rows(arms))["arms"])
    assert judged is not None
    best, error, verdicts = judged
    assert best.name == "LoRA r=16"
    assert error == pytest.approx(0.02 / math.sqrt(3))
    found = {verdict.kind.name: (round(verdict.gap, 4), verdict.met) for verdict in verdicts}
    assert found == {
        "single entries": (0.01, True), "runs of 16": (-0.03, True), "columns": (0.011, True), "rows": (0.012, False),
    }  # fmt: skip
    # Entries may be the best, and then their own error counts.
    judged = report.judge(summarize(rows({**arms, ENTRIES: [0.96, 0.96, 0.96]}))["arms"])
    assert judged is not None
    assert (judged[0].name, judged[1]) == ("single entries", 0.0)
    assert [v.kind.name for v in judged[2] if v.met] == ["single entries"]
    # One seed has no spread, and no rival no bar.
    assert report.judge(summarize(rows({**arms, LORA: [0.9]}))["arms"]) is None
    assert report.judge({}) is None


def test_page_holds_what_was_measured_and_says_what_was_not(tmp_path: Path) -> None:
    results, study = tmp_path / "results", tmp_path / "study"
    study.mkdir()
    arms = {
        LORA: [0.9, 0.92],
        ENTRIES: [0.8, 0.82],
        "sparse 2.5%, columns": [0.91, 0.91],
        "sparse 2.5%, rows": [0.8, 0.8],
    }
    (study / "study.jsonl").write_text("\n".join(json.dumps(r) for r in rows(arms)) + "\n")
    steps = {
        "3b": entry({"dense-fused": (50, 25), "lora": (60, 9), "sparse@2.5%/columns": (20, 8)}),
        "3b, dpo": entry({"sparse@2.5%/columns": (1, 1)}, workload="dpo"),
        "entries only": entry({"dense-fused": (70, 25), "sparse@2.5%": (65, 9)}, mode="compiled"),
        report.SUITE: {"cases": {"2.5%, runs of 8, residual, step": {"baselines": {"torch fused": {"ratio": 13.9}}}}},
    }
    write(results / "gpu.json", steps)
    # The same step of one more arm, measured apart: its own dense step is what it is compared with.
    other = entry({"dense-fused": (44, 25), "sparse@2.5%/rows": (22, None)}, date="2026-01-03")
    write(results / "rows" / "gpu.json", {"3b": other})
    (results / "rows" / "else.json").write_text("[1]")
    (results / "granularity.json").write_text(
        json.dumps({"about": "scores of a model", "kept": {"1": 0.8, "row": 0.2}})
    )

    text = report.write_report(results, study, picture=False)
    assert (results / "granularity.md").read_text() == text
    assert not (results / "granularity.png").exists()
    lines = {line.split(" | ")[0].lstrip("| "): line for line in text.splitlines() if line.startswith("|")}
    none = "not measured"
    head = "| 2.5% of the weights in | score kept | reward accuracy | the bar | state | optimizer step against torch fused | "
    assert lines["2.5% of the weights in"] == head + "llama-3.2-3b, 1 x 512, compiled in one piece |"
    assert lines["columns"] == f"| columns | {none} | 0.910 ± 0.000 | met | 3.0 MiB | {none} | 20 ms (2.5x), 8.00 GiB |"
    assert lines["rows"] == f"| rows | 20.0% | 0.800 ± 0.000 | 0.110 below | 3.0 MiB | {none} | 22 ms (2x) |"
    assert (
        lines["single entries"]
        == f"| single entries | 80.0% | 0.810 ± 0.014 | 0.100 below | 3.0 MiB | {none} | {none} |"
    )
    assert lines["runs of 8"] == f"| runs of 8 | {none} | {none} |  | {none} | 13.9x (some GPU) | {none} |"
    assert lines["LoRA r=16"] == "| LoRA r=16 |  | 0.910 ± 0.014 |  | 3.0 MiB |  | 60 ms (0.833x), 9.00 GiB |"
    assert lines["dense AdamW, fp32"].endswith(f"| {none} |  | {none} |  | {none} |")
    assert (
        "within one standard error (0.0100) of the best of LoRA and single entries (LoRA r=16, 0.910): met by columns (0.910); "
        in text
    )
    assert text.rstrip().endswith("below that best: single entries by 0.100, rows by 0.110.")
    assert "2026-01-02, commit `def`, some GPU; 2026-01-03, commit `def`, some GPU" in text
    assert "entries only" not in text


def test_nothing_measured_is_no_error_and_damaged_files_are(tmp_path: Path) -> None:
    text = report.write_report(tmp_path, tmp_path)
    assert "The bar is not judged" in text
    assert text.count("| not measured |") >= 7
    assert not (tmp_path / "granularity.png").exists()
    # Steps of single entries are shown where no groups were measured.
    write(tmp_path / "gpu.json", {"3b": entry({"sparse@2.5%": (65, 9)})})
    assert "65 ms, 9.00 GiB" in report.write_report(tmp_path, tmp_path)
    (tmp_path / "gpu.json").write_text("{")
    with pytest.raises(FormatError, match=r"gpu\.json is not a file of benchmark results"):
        report.write_report(tmp_path, tmp_path)


def test_picture_has_the_kinds_with_learning_and_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = pytest.importorskip("matplotlib.figure")
    drawn: list[Any] = []
    save = figure.Figure.savefig
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k))[1])
    (tmp_path / "study.jsonl").write_text(
        "\n".join(
            json.dumps(r) for r in rows({LORA: [0.9, 0.92], ENTRIES: [0.8], "sparse 2.5%, columns": [0.91, 0.92]})
        )
    )
    few = entry({"lora": (60, 9), "sparse@2.5%/columns": (20, 8)}, shape="few")
    many = entry(
        {"lora": (61, 9), "sparse@2.5%/columns": (21, None), "sparse@2.5%": (65, 9), "sparse@2.5%/rows": (22, 8)}
    )
    write(tmp_path / "gpu.json", {"few": few, "many": many})
    text = report.write_report(tmp_path, tmp_path)
    assert text.endswith("![Accuracy against step time and memory](granularity.png)\n")
    assert (tmp_path / "granularity.png").read_bytes().startswith(b"\x89PNG")
    title = drawn[0].get_suptitle()
    assert "llama-3.2-3b, 1 x 512, compiled in one piece" in title
    assert "not measured: runs of 8, runs of 16, runs of 32, rows, dense AdamW, bf16" in title
    times, memory = drawn[0].axes
    assert times.get_legend_handles_labels()[1] == ["single entries", "columns", "LoRA r=16"]
    assert memory.get_legend_handles_labels()[1] == ["single entries", "LoRA r=16"]
    (tmp_path / "gpu.json").unlink()  # and the picture of an earlier run goes
    assert "granularity.png" not in report.write_report(tmp_path, tmp_path)
    assert not (tmp_path / "granularity.png").exists()


def test_committed_page_is_what_the_committed_results_say() -> None:
    kept = json.loads((COMMITTED / "granularity.json").read_text())
    study = summarize(read_rows(COMMITTED / "study-h100" / "study.jsonl"))
    text = report.page(kept, study, report.steps(COMMITTED), report.optimizer_speeds(COMMITTED))
    shown = (COMMITTED / "granularity.md").read_text()
    assert shown.startswith(text), "python -m sparseopt.benchmarks.granularity writes it anew"


def test_command_writes_the_page_and_names_a_missing_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    granularity.main(["--results", str(tmp_path), "--no_picture"])
    out, err = capsys.readouterr()
    assert out.startswith("# Which mask")
    assert str(tmp_path / "granularity.md") in err
    with pytest.raises(SystemExit) as stopped:
        granularity.main(["--results", str(tmp_path / "none")])
    assert stopped.value.code == 2
    assert "must be a folder of benchmark results" in capsys.readouterr().err
