"""Real rows of the training-step benchmark: settings, batches, reference, completions."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sparseopt import models
from sparseopt.benchmarks import train_data, train_step, train_weights
from sparseopt.benchmarks.train_settings import Settings, parse
from sparseopt.evaluate import sequence_logps

pytest.importorskip("transformers")
pytest.importorskip("datasets")
CPU = torch.device("cpu")
Command = Callable[..., list[str]]


def words(first: int, count: int) -> str:
    return " ".join(f"w{(first + i) % 58}" for i in range(count))


def settings_of(command: Command, *arguments: Any) -> Settings:
    return parse(command(*arguments))[0]


def work_of(settings: Settings, fixed: bool = False) -> tuple[train_data.Work, Any]:
    model = train_weights.make_model(settings, CPU)
    return train_data.prepare(settings, model, CPU, fixed), model


# ---- settings --------------------------------------------------------------------------------------------------------
def test_the_commands_of_before_have_their_meaning() -> None:
    dpo, _ = parse(["--workload", "dpo", "--n_steps", "100", "--batch_size", "1", "--subset_size", "100"])
    assert (dpo.model, dpo.data, dpo.subset, dpo.rounds, dpo.batch) == (
        "google/gemma-3-270m-it", "Light-R1", 100, 100, 1,
    )  # fmt: skip
    assert (dpo.results, dpo.run_name("eager")) == ("results", "dpo_google_gemma_3_270m_it_bs1")
    text = "--workload grpo --checkpoint None --n-steps 50 --batch-size 1 --subset-size 10"
    grpo, _ = parse(text.split())
    assert (grpo.data, grpo.subset, grpo.rounds, grpo.checkpoint) == ("OpenR1", 10, 50, None)
    alone, _ = parse(["--workload", "grpo", "--checkpoint", "None"])
    assert alone.data == "OpenR1"
    random, _ = parse(["--workload", "dpo", "--model", "smollm2"])
    assert random.data is random.results is None
    named, _ = parse(["--workload", "dpo", "--model", "smollm2", "--run_name", "mine", "--mode", "both"])
    assert named.results == "results"
    assert [named.run_name(mode) for mode in named.modes] == ["mine_eager", "mine_compiled"]


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ("--workload lm --model x --subset_size 3", "--subset_size is for dpo and grpo"),
        ("--workload dpo --shape tiny --data x", "real rows, which need --model"),
        ("--workload dpo", "give one of --shape and --model"),
        ("--workload dpo --subset_size 2 --batch_size 3", "less than one batch of 3"),
        ("--workload dpo --data x --num_generations 4", "--num_generations is for grpo on real rows"),
        ("--workload grpo --data x --num_generations 1", "at least 2"),
        ("--workload grpo --data x --seq 64 --max_completion_length 64", "leaves no room for a prompt"),
        ("--workload dpo --data x --run_name a/b", "plain name of a folder"),
        ("--workload dpo --shape tiny --arms sparse@mask", "needs --mask FILE"),
    ],
)
def test_bad_usage(wrong: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(wrong.split())
    assert caught.value.code == 2
    assert sentence in capsys.readouterr().err


# ---- pairs -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("fixed", [False, True])
def test_reference_is_the_model_itself(folder: Path, pairs: Path, fixed: bool, command: Command) -> None:
    settings = settings_of(command, "dpo", folder, pairs, "--batch_size", "3", "--accumulation", "2")
    work, model = work_of(settings, fixed)
    assert len(work.micro_batches) == 3  # seven rows, and the first two again
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    chosen, rejected = sequence_logps(model, models.load_tokenizer(str(folder)), rows)
    order = [0, 1, 2], [3, 4, 5], [6, 0, 1]
    for batch, chunk in zip(work.micro_batches, order, strict=True):
        expected = torch.cat([chosen[chunk], rejected[chunk]])
        torch.testing.assert_close(batch.values, expected, rtol=0, atol=1e-4)
        assert batch.tokens == int((batch.ids != 0).sum())
    shapes = {tuple(batch.ids.shape) for batch in work.micro_batches}
    assert len(shapes) == (1 if fixed else 3)
    model.train()  # dropout is off: an untrained policy is the reference
    assert sum(float(loss().detach()) for loss in work.losses(model, 0)) == pytest.approx(math.log(2), abs=1e-6)
    assert work.batches(-1) == [work.micro_batches[1], work.micro_batches[2]]
    assert work.batches(1) == [work.micro_batches[2], work.micro_batches[0]]
    assert work.tokens(1) == work.micro_batches[2].tokens + work.micro_batches[0].tokens


def test_padding_changes_nothing(folder: Path, pairs: Path, command: Command) -> None:
    alone, model = work_of(settings_of(command, "dpo", folder, pairs))
    together, _ = work_of(settings_of(command, "dpo", folder, pairs, "--batch_size", "4"))
    per_row = torch.stack([batch.values for batch in alone.micro_batches[:4]])
    torch.testing.assert_close(together.micro_batches[0].values, per_row.T.flatten(), rtol=0, atol=1e-5)
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.up_proj.weight").mul_(1.5)
    mean = sum(float(alone.losses(model, step)[0]().detach()) for step in range(4)) / 4
    assert float(together.losses(model, 0)[0]().detach()) == pytest.approx(mean, abs=1e-5)
    assert abs(mean - math.log(2)) > 1e-4


def test_long_rows_lose_the_beginning_of_their_prompt(folder: Path, tmp_path: Path, command: Command) -> None:
    path = tmp_path / "long.jsonl"
    rows = [
        {"prompt": words(0, 40), "chosen": " " + words(0, 5), "rejected": " " + words(9, 3)},
        {"prompt": "w1 w2", "chosen": " " + words(0, 50), "rejected": " w3"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    work, _ = work_of(settings_of(command, "dpo", folder, path))
    assert work.about["cut"] == 2
    assert work.about["tokens"]["max"] == 32
    tokenizer = models.load_tokenizer(str(folder))
    first = tokenizer.decode(work.micro_batches[0].ids[0])
    assert first.split() == [*words(14, 26).split(), *words(0, 5).split(), "</s>"]
    assert tokenizer.decode(work.micro_batches[1].ids[0]).split()[:2] == ["w2", "w0"]
    assert work.micro_batches[1].inside[0].sum() == 31


def test_a_wrong_reference_shows_no_speed(
    folder: Path,
    pairs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: Command,
) -> None:
    original = train_data.MicroBatch.summed

    def wrong(self: train_data.MicroBatch, model: Any) -> torch.Tensor:
        values = original(self, model)
        return values if values.requires_grad else values * torch.tensor([1.0, 1.5])

    monkeypatch.setattr(train_data.MicroBatch, "summed", wrong)
    results = tmp_path / "results"
    arguments = command("dpo", folder, pairs, "--arms", "dense-fused", "--results_dir", str(results))
    assert train_step.main(arguments) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "no speed is reported" in printed.err
    assert "not ln 2" in printed.err
    assert not results.exists()


# ---- completions -----------------------------------------------------------------------------------------------------
def test_completions_and_advantages(
    folder: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    from sparseopt import rewards

    given: list[tuple[list[str], list[str]]] = []

    def reward(completions: list[str], answer: list[str], **_: Any) -> list[float]:
        given.append((completions, answer))
        return [float(i % 4 == 0) if right != "w1" else 0.5 for i, right in enumerate(answer)]

    monkeypatch.setattr(rewards, "verifiable_reward", reward)
    settings = settings_of(command, "grpo", folder, prompts, "--batch_size", "2", "--accumulation", "2")
    work, model = work_of(settings)
    assert len(work.micro_batches) == 3
    assert [answer for _, answer in given] == [
        ["w0"] * 4 + ["w1"] * 4, ["w2"] * 4 + ["w3"] * 4, ["w4"] * 4 + ["w0"] * 4,
    ]  # fmt: skip
    one = torch.tensor([1.5, -0.5, -0.5, -0.5])  # (r - mean) / std of 1, 0, 0, 0
    torch.testing.assert_close(work.micro_batches[0].values.view(2, 4), torch.stack([one, 0 * one]), atol=1e-3, rtol=0)
    assert work.generation is not None
    assert work.generation["completions"] == 16
    assert work.generation["groups_with_gradient"] == pytest.approx(5 / 6, abs=1e-4)
    assert 0 < work.generation["step"]["p20"] <= work.generation["step"]["p80"]
    assert 1 <= work.generation["tokens_per_completion"] <= 6
    batch = work.micro_batches[0]
    lengths = batch.inside.sum(1)
    assert bool((lengths >= 1).all())
    assert bool((lengths <= 6).all())
    first = batch.ids[0, batch.ids.shape[1] - batch.inside.shape[1] :][batch.inside[0]]
    assert models.load_tokenizer(str(folder)).decode(first, skip_special_tokens=True) == given[0][0][0]
    # On-policy, the loss is minus the mean advantage over tokens, and its gradient that of the weighted likelihood.
    expected = -(batch.values * batch.inside).sum() / batch.inside.sum() / 2
    loss = work.losses(model, 0)[0]()
    assert float(loss.detach()) == pytest.approx(float(expected), abs=1e-6)
    loss.backward()
    grad = model.get_parameter("model.layers.0.mlp.up_proj.weight").grad
    assert grad is not None
    assert grad.abs().sum() > 0
    assert work.moves(range(1))
    same, _ = work_of(settings)
    assert torch.equal(same.micro_batches[0].ids, batch.ids)


def test_equal_rewards_train_nothing_and_are_timed(
    folder: Path,
    prompts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: Command,
) -> None:
    from sparseopt import rewards

    monkeypatch.setattr(rewards, "verifiable_reward", lambda completions, **_: [0.0] * len(completions))
    monkeypatch.chdir(tmp_path)
    arguments = command("grpo", folder, prompts, "--arms", "sparse@10%", "--dtype", "bfloat16", "--passes", "1")
    assert train_step.main(arguments) == 0
    assert "differed among the completions of 0% of the prompts" in capsys.readouterr().out
    info = json.loads((tmp_path / "results/grpo_tiny_llama_bs1/timing_info.json").read_text())
    assert info["generation"]["mean_reward"] == 0
    assert info["generation"]["groups_with_gradient"] == 0
