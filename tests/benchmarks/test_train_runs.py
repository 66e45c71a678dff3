"""The training-step benchmark on real rows: what a run leaves, checkpoints, masks, and bad data."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import sparseopt as so
from sparseopt import models
from sparseopt.benchmarks import train_data, train_step, train_weights
from sparseopt.benchmarks.train_settings import Settings, parse
from sparseopt.progress import Progress

pytest.importorskip("transformers")
pytest.importorskip("datasets")
CPU = torch.device("cpu")
Command = Callable[..., list[str]]


def settings_of(command: Command, *arguments: Any) -> Settings:
    return parse(command(*arguments))[0]


def work_of(settings: Settings, fixed: bool = False) -> tuple[train_data.Work, Any]:
    model = train_weights.make_model(settings, CPU)
    return train_data.prepare(settings, model, CPU, fixed), model


# ---- whole runs ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("workload", ["dpo", "grpo"])
def test_a_run_leaves_its_timing(
    workload: str,
    folder: Path,
    pairs: Path,
    prompts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command: Command,
) -> None:
    pytest.importorskip("peft")
    data = pairs if workload == "dpo" else prompts
    arguments = command(workload, folder, data, "--subset_size", "4", "--results_dir", str(tmp_path))
    arguments += ["--arms", "dense-fused,lora,sparse@10%", "--n_steps", "3"]
    target = tmp_path / f"{workload}_tiny_llama_bs1_float32"
    target.mkdir()
    (target / "timing_info.json").write_text("an earlier run")
    (target / "notes.txt").write_text("kept")
    assert train_step.main(arguments) == 0
    printed = capsys.readouterr()
    assert sorted(path.name for path in target.iterdir()) == [
        "notes.txt",
        "report.md",
        "timing.png",
        "timing_info.json",
    ]
    text = (target / "timing_info.json").read_text()
    info = json.loads(text)
    assert (info["format"], info["version"], info["run"]) == ("sparseopt.timing", 1, target.name)
    assert info["commit"] == "abc123"
    assert info["date"]
    assert info["command"].startswith(
        f"sparseopt bench {workload} --model tiny-llama --data {data.name} --subset_size 4"
    )
    assert info["device"]
    assert {"python", "torch", "sparseopt", "transformers", "peft"} <= set(info["versions"])
    assert info["data"]["rows"] == 4
    assert list(info["arms"]) == ["dense-fused", "lora", "sparse@10%"]
    for values in info["arms"].values():
        assert values["rounds"] == 3
        assert 0 < values["total"]["p20"] <= values["total"]["median"] <= values["total"]["p80"]
        assert list(values["phases"]) == ["forward", "backward", "optimizer"]
        assert values["tokens_per_second"] > 0
        assert values["state_bytes"] > 0
        assert values["peak_allocated_bytes"] is None  # on a CPU
    dense, sparse = info["arms"]["dense-fused"], info["arms"]["sparse@10%"]
    assert sparse["state_bytes"] < dense["state_bytes"]
    expected = dense["total"]["median"] / sparse["total"]["median"]
    assert sparse["speedup_over_dense_fused"] == pytest.approx(expected, rel=1e-3)
    assert (info["generation"] is None) == (workload == "dpo")
    report = (target / "report.md").read_text()
    assert "tokens/s" in report
    assert "4 rows of" in report
    assert "![Times of the phases](timing.png)" in report
    assert ("Generation of a step's 4 completions" in report) == (workload == "grpo")
    assert report.startswith(printed.out.rstrip("\n")[:200])
    assert (target / "timing.png").read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path) not in text + report
    assert str(folder) not in text + report


def test_tokens_per_second_counts_real_tokens(folder: Path, pairs: Path, command: Command) -> None:
    settings = settings_of(command, "dpo", folder, pairs, "--arms", "dense-fused", "--n_steps", "5")
    model = train_weights.make_model(settings, CPU)
    given = train_step.Given(train_data.prepare(settings, model, CPU, fixed=False))
    assert given.work is not None
    passes: dict[str, Any] = {}
    for steps in (range(0, 3), range(3, 5)):
        with Progress("test", 1) as progress:
            found = train_step.measure(settings.arms[0], settings, "eager", steps, CPU, progress, given)
        assert found["tokens"] == sum(batch.tokens for batch in given.work.micro_batches[steps.start : steps.stop])
        train_step._merge(passes, "dense-fused", found)
    merged = passes["dense-fused"]
    tokens = sum(int((batch.ids != 0).sum()) for batch in given.work.micro_batches[:5])
    seconds = sum(merged["times"]["total"]) / 1e3
    summary = train_step._summary(merged)
    assert summary["rounds"] == 5
    assert summary["tokens_per_second"] == pytest.approx(tokens / seconds, rel=1e-3)


def test_a_failed_check_leaves_no_files(
    folder: Path,
    pairs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: Command,
) -> None:
    from sparseopt.benchmarks import train_arms

    def fail(*_: Any, **__: Any) -> None:
        raise train_arms.CheckError("it is wrong")

    monkeypatch.setattr(train_arms.Built, "check", fail)
    results = tmp_path / "results"
    arguments = command("dpo", folder, pairs, "--arms", "sparse@10%", "--results_dir", str(results))
    assert train_step.main(arguments) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "no speed is reported" in printed.err
    assert not results.exists()


@pytest.mark.slow
def test_compiled_layers_see_one_shape(
    folder: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: Command
) -> None:
    arguments = command("dpo", folder, pairs, "--arms", "sparse@10%", "--passes", "1", "--compile", "--n_steps", "7")
    assert train_step.main([*arguments, "--results_dir", str(tmp_path)]) == 0
    info = json.loads((tmp_path / "dpo_tiny_llama_bs1_float32_compiled/timing_info.json").read_text())
    assert info["data"]["padded_to"] == "the longest sequence"
    total = info["arms"]["sparse@10%"]["total"]
    assert total["p80"] < 20 * total["p20"]  # a compilation takes seconds, a step milliseconds


# ---- checkpoints -----------------------------------------------------------------------------------------------------
def test_checkpoints(folder: Path, pairs: Path, tmp_path: Path, command: Command) -> None:
    model = models.load_model(str(folder))
    name = "model.layers.0.mlp.up_proj.weight"
    start = model.get_parameter(name).detach().clone()
    with torch.no_grad():
        model.get_parameter(name)[0, :3] = torch.tensor([1.0, 2.0, 3.0])
    whole, run, sparse = tmp_path / "whole", tmp_path / "run", tmp_path / "sparse"
    model.save_pretrained(whole)
    model.save_pretrained(run / "model")
    (run / "config.json").write_text("{}")  # a run's settings
    sparse.mkdir()
    indices = torch.tensor([0, 1, 2], dtype=torch.int32)
    entries = {name: (indices, torch.tensor([1.0, 2.0, 3.0]))}
    so.Delta.from_dict(entries, {name: tuple(start.shape)}, step=1, parent_step=None, base_fingerprint="x").save(
        sparse / "trained_entries.safetensors"
    )
    for checkpoint in (whole, run, sparse):
        settings = settings_of(command, "dpo", folder, pairs, "--checkpoint", str(checkpoint))
        found: Any = train_weights.make_model(settings, CPU)
        assert found.get_parameter(name)[0, :3].tolist() == [1.0, 2.0, 3.0], checkpoint
        assert torch.equal(found.get_parameter(name)[1:], start[1:])
        work, _ = work_of(settings)  # the reference is the checkpoint, not the base
        assert float(work.losses(found, 0)[0]().detach()) == pytest.approx(math.log(2), abs=1e-6)
        assert f"from {checkpoint.name}" in settings.name("eager")
        assert settings.run_name("eager") == f"dpo_tiny_llama_bs1_from_{checkpoint.name}_float32"


def test_a_checkpoint_without_weights(
    folder: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: Command
) -> None:
    for checkpoint, sentence in ((tmp_path, "holds no weights"), (tmp_path / "none", "does not exist")):
        assert train_step.main(command("dpo", folder, pairs, "--checkpoint", str(checkpoint))) == 1
        assert sentence in capsys.readouterr().err.splitlines()[-1]


# ---- masks -----------------------------------------------------------------------------------------------------------
def masks_of(folder: Path) -> so.MaskSet:
    model = models.load_model(str(folder))
    masks = {name: torch.zeros(p.shape, dtype=torch.bool) for name, p in model.named_parameters()}
    masks["model.layers.1.mlp.down_proj.weight"][:, :7] = True
    masks["model.norm.weight"][3] = True
    return so.MaskSet.from_bool(masks)


def test_a_mask_file_is_an_arm(
    folder: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: Command
) -> None:
    file = tmp_path / "found.safetensors"
    masks = masks_of(folder)
    masks.save(file)
    arguments = command("dpo", folder, pairs, "--mask", str(file), "--arms", "dense-fused", "--json")
    assert train_step.main([*arguments, "--results_dir", str(tmp_path)]) == 0
    ((_, suite),) = json.loads(capsys.readouterr().out).items()
    assert list(suite["cases"]) == ["sparse@mask"]
    found = suite["train_step"]["arms"]["sparse@mask"]
    assert found["trained"] == masks.active_parameters == 32 * 7 + 1
    assert suite["train_step"]["settings"]["mask"] == "found.safetensors"
    assert "--mask found.safetensors" in suite["command"]


def test_a_mask_file_with_random_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from sparseopt.shapes import build_shape

    so.MaskSet.random(build_shape("tiny", device="cpu"), 0.1, seed=1).save(tmp_path / "m.safetensors")
    arguments = ["--shape", "tiny", "--seq", "16", "--rounds", "2", "--warmup", "1", "--device", "cpu"]
    arguments += ["--mask", str(tmp_path / "m.safetensors"), "--arms", "sparse@mask"]
    assert train_step.main(arguments) == 0
    assert "| sparse@mask |" in capsys.readouterr().out


@pytest.mark.parametrize("fault", ["absent", "foreign", "incomplete", "empty", "shape"])
def test_a_mask_that_does_not_fit(
    fault: str, folder: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: Command
) -> None:
    file = tmp_path / "found.safetensors"
    bits = {name: bits for name, bits in masks_of(folder).items()}
    sentence = {
        "absent": "found.safetensors", "foreign": "but the model does not have it", "empty": "has no active entry",
        "incomplete": "lacks 1 parameters of the model, such as 'model.norm.weight'", "shape": "but the model has [32]",
    }[fault]  # fmt: skip
    if fault == "foreign":
        bits["other.weight"] = torch.ones(3, dtype=torch.bool)
    elif fault == "incomplete":
        del bits["model.norm.weight"]
    elif fault == "empty":
        bits = {name: torch.zeros_like(mask) for name, mask in bits.items()}
    elif fault == "shape":
        bits["model.norm.weight"] = torch.ones(5, dtype=torch.bool)
    if fault != "absent":
        so.MaskSet.from_bool(bits).save(file)
    assert train_step.main(command("dpo", folder, pairs, "--mask", str(file), "--arms", "sparse@mask")) == 1
    printed = capsys.readouterr()
    assert sentence in printed.err.splitlines()[-1]
    assert printed.out == ""


# ---- bad data --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("rows", "more", "sentence"),
    [
        ([{"prompt": "w1", "chosen": "w2"}], (), "lacks the columns rejected"),
        ([{"prompt": "w1", "chosen": " w2", "rejected": " w3"}], ("--batch_size", "2"), "less than one batch of 2"),
        ([{"prompt": "w1", "chosen": " w2", "rejected": " w3"}], ("--subset_size", "5"), "has 1 rows where 5"),
        ([{"prompt": "w1", "chosen": " w2", "rejected": " w3"}], ("--seq", "65"), "--seq 65 is longer than the 64 positions"),
        ([{"prompt": "", "chosen": "w2", "rejected": "w3"}], (), "empty"),
    ],
)  # fmt: skip
def test_bad_rows(
    rows: list[dict[str, str]], more: tuple[str, ...], sentence: str, folder: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], command: Command) -> None:  # fmt: skip
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert train_step.main(command("dpo", folder, path, "--arms", "dense-fused", *more)) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("Error: ")
    assert sentence in last


def test_empty_and_absent_data(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: Command
) -> None:
    empty = tmp_path / "empty.csv"
    empty.write_text("prompt,chosen,rejected\n")
    assert train_step.main(command("dpo", folder, empty, "--arms", "dense-fused")) == 1
    assert "has no rows" in capsys.readouterr().err.splitlines()[-1]
    assert train_step.main(command("dpo", folder, tmp_path / "none.jsonl", "--arms", "dense-fused")) == 1
    assert "does not exist" in capsys.readouterr().err.splitlines()[-1]


def test_conversations_need_a_chat_template(
    folder: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: Command
) -> None:
    plain = tmp_path / "plain"
    shutil.copytree(folder, plain)
    for path in plain.glob("chat_template*"):
        path.unlink()
    settings = json.loads((plain / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (plain / "tokenizer_config.json").write_text(json.dumps(settings))
    assert train_step.main(command("dpo", plain, pairs, "--arms", "dense-fused")) == 1
    assert "has no chat template, which the conversations of" in capsys.readouterr().err.splitlines()[-1]
