"""The DPO study: every arm trains a tiny model, finished runs are skipped, rates come from validation, it is shown."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sparseopt import FormatError, evaluate
from sparseopt.benchmarks import run_book, study, study_report, study_training

pytest.importorskip("peft")
WORDS = 60


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Such a small model is many times slower with more threads on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model_folder(build_llama: Callable[..., Path]) -> Path:
    """Without dropout."""
    return build_llama(attention_dropout=0.0)


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 pairs to train on, 6 to choose by, 8 held out; answers of different lengths."""
    folder = tmp_path_factory.mktemp("pairs")
    rows = []
    for i in range(38):
        a, b, c = (1 + (7 * i + k) % (WORDS - 2) for k in (1, 5, 11))
        rows.append(
            {"prompt": f"w{a} " * (1 + i % 3) + f"w{b}", "chosen": f" w{b} w{a}", "rejected": f" w{c}" * (1 + i % 2)}
        )
    for split, part in {"train": rows[:24], "validation": rows[24:30], "held_out": rows[30:]}.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    (folder / "task.json").write_text(json.dumps({"task": "pairs of words"}))
    return folder


@pytest.fixture(scope="module")
def arguments(model_folder: Path, data_folder: Path) -> list[str]:
    return [
        "--data", str(data_folder), "--model", str(model_folder), "--device", "cpu", "--steps", "4", "--batch_size", "4",
        "--seeds", "1", "2", "--commit", "abc",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def finished(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the whole study ran."""
    out = tmp_path_factory.mktemp("study")
    assert study.main([str(out), *arguments]) == 0
    return out


def rows_of(out: Path) -> list[dict[str, Any]]:
    return run_book.read_rows(out / "study.jsonl")


def test_all_arms_run_and_only_final_runs_see_held_out_pairs(finished: Path) -> None:
    rows = rows_of(finished)
    final = [row for row in rows if row["phase"] == "final"]
    names = [arm.name for arm in study.ARMS.values()]
    assert [row["arm"] for row in final] == names * 2
    assert [row["seed"] for row in final] == [1] * len(names) + [2] * len(names)
    for row in rows:
        assert (row["held_out"] is None) == (row["phase"] == "grid")
        if row["phase"] != "before":
            assert row["validation"]["n"] == 6
            assert row["train_seconds"] > 0
    for name in names:
        grid = {row["rate"] for row in rows if row["phase"] == "grid" and row["arm"] == name}
        assert {row["rate"] for row in final if row["arm"] == name} == {study_report.choose(rows, name)} <= grid
    before = [row for row in rows if row["phase"] == "before"]
    assert [row["arm"] for row in before] == ["before, bfloat16", "before, float32"]
    assert all(row["held_out"]["reward_accuracy"] == 0.5 and row["held_out"]["margin"] == 0 for row in before)


def test_each_arm_trains_what_it_says(finished: Path) -> None:
    by_arm = {row["arm"]: row for row in rows_of(finished) if row["phase"] == "final"}
    total, embedding = 2 * (32 * (2 * 32 + 2 * 16 + 3 * 48) + 2 * 32) + 32 + 64 * 32, 64 * 32
    lora = 2 * 16 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48))
    trained = {key: by_arm[arm.name]["trained_parameters"] for key, arm in study.ARMS.items()}
    assert (trained["dense-bf16"], trained["dense-fp32"], trained["lora"]) == (total, total, lora)
    assert trained["sparse"] == round(0.025 * (total - embedding))
    assert trained["sparse-0.25"] == round(0.0025 * (total - embedding))
    assert 0 < trained["sparse-row"] <= trained["sparse"]
    state = {key: by_arm[arm.name]["state_bytes"] for key, arm in study.ARMS.items()}
    assert 4 * total <= state["dense-bf16"] < state["dense-fp32"] <= 8 * total + 4 * 30
    assert state["sparse"] < state["dense-bf16"]
    assert all(row["loss_first"] == pytest.approx(math.log(2), abs=0.05) for row in by_arm.values())


def test_finished_runs_are_not_run_again(
    finished: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (finished / "study.jsonl").read_bytes()

    def refuse(*args: Any) -> None:
        raise AssertionError("a finished run was started again")

    monkeypatch.setattr(study_training.Study, "run", refuse)
    monkeypatch.setattr(study_training.Study, "evaluate", refuse)
    assert study.main([str(finished), *arguments]) == 0
    assert (finished / "study.jsonl").read_bytes() == before
    assert study.main([str(finished), *arguments, "--beta", "0.2"]) == 1
    assert "beta 0.1 there, 0.2 here" in capsys.readouterr().err


def test_time_limit_stops_between_runs_and_the_same_command_goes_on(
    finished: Path, arguments: list[str], tmp_path: Path
) -> None:
    few = [*arguments, "--arms", "sparse", "lora", "--no_picture"]
    assert study.main([str(tmp_path), *few, "--time_limit", "0.001"]) == 1  # not even one run
    assert not (tmp_path / "study.jsonl").exists()
    lines = (finished / "study.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "study.jsonl").write_text("".join(lines[:2]))
    assert study.main([str(tmp_path), *few, "--time_limit", "0.001"]) == 3
    assert len(rows_of(tmp_path)) == 2
    assert study.main([str(tmp_path), *few]) == 0
    ours, theirs = ({row["key"]: row for row in rows_of(folder)} for folder in (tmp_path, finished))
    assert len(ours) > 2
    for key, row in ours.items():  # the same run whatever ran before it
        assert row["validation"] == theirs[key]["validation"], row["arm"]
        assert row["held_out"] == theirs[key]["held_out"]


def test_report_shows_every_arm_with_its_spread(finished: Path) -> None:
    summary = json.loads((finished / "study.json").read_text())
    text = (finished / "study.md").read_text()
    assert (finished / "study.png").read_bytes().startswith(b"\x89PNG")
    assert (summary["commit"], summary["environment"]["device"][:3]) == ("abc", "cpu")
    assert summary["command"].startswith("python -m sparseopt.benchmarks.study ")
    assert str(finished) not in json.dumps(summary)
    for name, arm in summary["arms"].items():
        values = [seed["margin"] for seed in arm["seeds"]]
        assert arm["mean"]["margin"] == pytest.approx(sum(values) / 2)
        assert arm["std"]["margin"] == pytest.approx(abs(values[0] - values[1]) / math.sqrt(2))
        row = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
        assert f"{arm['mean']['margin']:.3f} ± {arm['std']['margin']:.3f}" in row


def row(phase: str, rate: float, accuracy: float | None, exact: float = 0.0, margin: float = 0.0) -> dict[str, Any]:
    found = None if accuracy is None else {"reward_accuracy": accuracy, "margin": margin, "exact_match": exact}
    return {"phase": phase, "arm": "a", "rate": rate, "validation": found, "held_out": None}


def test_rate_is_chosen_by_accuracy_and_exact_match_of_validation() -> None:
    rows = [row("grid", 1e-3, 0.99, 0.0), row("grid", 1e-4, 0.9, 0.5), row("grid", 1e-2, None), row("final", 1.0, 1, 1)]
    assert study_report.choose(rows, "a") == 1e-4
    assert study_report.choose([*rows, row("grid", 1e-5, 0.9, 0.5, margin=1.0)], "a") == 1e-5
    assert study_report.choose([*rows, row("grid", 2e-4, 0.9, 0.5)], "a") == 1e-4  # the lower rate on ties
    assert study_report.choose(rows, "b") is None
    rows[1]["held_out"] = {"reward_accuracy": 0.0, "margin": -9.0, "exact_match": 0.0}
    assert study_report.choose(rows, "a") == 1e-4


def test_best_rate_at_the_edge_extends_the_grid(tmp_path: Path) -> None:
    """A fake study whose figures rise with the rate up to 8."""

    class Rising:
        def run(self, arm: study_training.Arm, rate: float, seed: int, splits: tuple[str, ...]) -> dict[str, Any]:
            value = rate if rate <= best else best - rate
            return {s: {"reward_accuracy": value, "margin": 0.0, "exact_match": 0.0} for s in splits}

    def tried(peak: float) -> tuple[float | None, list[float]]:
        nonlocal best
        best = peak
        fake: Any = Rising()
        book = run_book.RunBook(tmp_path / str(peak) / "study.jsonl", {"settings": {}}, str)
        runner = study.Runner(book, fake)
        arm = study_training.Arm("a", "dense", torch.float32, (1.0, 2.0, 4.0))
        return runner._search(arm, 0), [r["rate"] for r in book.rows.values()]

    best = 0.0
    assert tried(2.0) == (2.0, [1.0, 2.0, 4.0])
    assert tried(8.0) == (8.0, [1.0, 2.0, 4.0, 8.0, 16.0])
    assert tried(100.0) == (16.0, [1.0, 2.0, 4.0, 8.0, 16.0])
    assert tried(0.1) == (0.25, [1.0, 2.0, 4.0, 0.5, 0.25])  # beyond its peak the smaller rate is the better


def test_diverged_runs_are_told(finished: Path, tmp_path: Path) -> None:
    rows = rows_of(finished)
    name = study.ARMS["sparse"].name
    for r in rows:
        if r["arm"] == name and r["seed"] == 2:
            r["held_out"] = r["validation"] = None
        run_book.append_row(tmp_path / "study.jsonl", r)
    summary = study_report.write_report(tmp_path, picture=False)
    assert (len(summary["arms"][name]["seeds"]), summary["arms"][name]["std"]) == (1, None)
    assert f"diverged and are in no mean: {name} 1" in (tmp_path / "study.md").read_text()


def test_training_logps_are_those_of_the_evaluation(model_folder: Path, data_folder: Path) -> None:
    """Right-padded batches with a causal mask against sparseopt.evaluate's own way, in fp32."""
    from sparseopt import models

    _, pairs = study.load_pairs(data_folder)
    model, tokenizer = models.load_model(str(model_folder)), models.load_tokenizer(str(model_folder))
    encoded = study_training.encode(tokenizer, pairs["train"], torch.device("cpu"))
    with torch.no_grad():
        found = study_training.answer_logps(model, *encoded.take(torch.arange(24))).view(-1, 2)
    expected = evaluate.sequence_logps(model, tokenizer, pairs["train"])
    torch.testing.assert_close(found, torch.stack(expected, 1), rtol=1e-4, atol=1e-4)


def test_prepared_pairs_are_disjoint_and_damage_is_told(tmp_path: Path) -> None:
    pytest.importorskip("reasoning_gym")
    study.prepare(tmp_path, "chain_sum", {"train": 30, "validation": 10, "held_out": 10})
    task, pairs = study.load_pairs(tmp_path)
    prompts = [row["prompt"][-1]["content"] for rows in pairs.values() for row in rows]
    assert task == "chain_sum"
    assert [len(rows) for rows in pairs.values()] == [30, 10, 10]
    assert len(set(prompts)) == 50
    (tmp_path / "held_out.jsonl").write_text("{")
    with pytest.raises(FormatError, match="held_out"):
        study.load_pairs(tmp_path)
    with pytest.raises(FileNotFoundError, match="--prepare"):
        study.load_pairs(tmp_path / "nothing")
    with pytest.raises(ValueError, match="no task 'x'"):
        study.prepare(tmp_path, "x")
