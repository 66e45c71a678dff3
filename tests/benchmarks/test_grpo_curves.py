"""GRPO by arm and seed: what is kept, what is not run twice, the time limit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("trl")

from sparseopt.benchmarks import grpo_curves


def arguments(target: Path, folder: Path, prompts: Path, *more: str) -> list[str]:
    changes = {
        "model.name": folder, "data.name": prompts, "data.options": "{}", "data.style": "{}", "data.n_train": None,
        "data.n_eval": 2, "mask.batches": 1, "training.n_steps": 3, "training.batch_size": 1,
        "training.num_generations": 4, "training.max_completion_length": 8,
        "rewards.functions": f"[{target.parent / 'ours.py'}:letters]",
    }  # fmt: skip
    text = [f"{key}={'null' if value is None else value}" for key, value in changes.items()]
    return [str(target), "--device", "cpu", "--commit", "abc", *more, "--set", *text]


def test_curves_of_arms_and_seeds(
    tmp_path: Path, folder: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "curves"
    (tmp_path / "ours.py").write_text(
        "def letters(completions, **columns):\n    return [len(str(text)) % 7 / 7 for text in completions]\n"
    )
    assert grpo_curves.main(arguments(target, folder, prompts, "--seeds", "0,1", "--time_limit", "0")) == 3
    assert not list(target.glob("*-seed*")), "the time was over before the first run"
    assert grpo_curves.main(arguments(target, folder, prompts, "--seeds", "0")) == 0
    first = (target / "sparse-seed0" / "results.json").read_bytes()
    assert grpo_curves.main(arguments(target, folder, prompts, "--seeds", "0,1")) == 0
    assert (target / "sparse-seed0" / "results.json").read_bytes() == first, "not run again"
    found = json.loads((target / "grpo_curves.json").read_text())
    assert found["commit"] == "abc"
    assert list(found["runs"]) == ["dense-seed0", "sparse-seed0", "dense-seed1", "sparse-seed1"]
    for run in found["runs"].values():
        assert len(run["reward"]) == 3
    for arm in ("dense", "sparse"):
        figures = found["arms"][arm]
        assert figures["seeds"] == [0, 1]
        ends = [sum(found["runs"][f"{arm}-seed{seed}"]["reward"]) / 3 for seed in (0, 1)]
        assert figures["sampled_last"] == {"mean": sum(ends) / 2, "least": min(ends), "most": max(ends)}
    assert (target / "grpo_curves.png").read_bytes().startswith(b"\x89PNG")
    assert "sparse: sampled reward" in capsys.readouterr().out


def test_unknown_arms_are_bad_usage(tmp_path: Path, folder: Path, prompts: Path) -> None:
    with pytest.raises(SystemExit) as error:
        grpo_curves.main(arguments(tmp_path, folder, prompts, "--arms", "dense,nope"))
    assert error.value.code == 2
