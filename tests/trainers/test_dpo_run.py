"""``sparseopt train dpo`` on a tiny model: what it writes, what it leaves alone, stopping and continuing, errors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import sparseopt as so
from sparseopt import models
from sparseopt.trainers import dpo, run

Config = dict[str, dict[str, Any]]
Configure = Callable[..., Config]

FILES = {
    "before.json", "config.json", "mask.safetensors", "metrics.jsonl", "report.md", "results.json", "timing_info.json",
    "trained_entries.safetensors", "training.json", "training.png",
}  # fmt: skip


def weights(folder: Path, dtype: str = "float32") -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in models.load_model(str(folder), dtype).named_parameters()}


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text(), parse_constant=pytest.fail)


def steps(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def check_against_base(folder: Path, base: dict[str, torch.Tensor]) -> int:
    """Only active entries differ from the base, and the delta is the mask's entries; returns how many changed."""
    masks, delta = so.MaskSet.load(folder / "mask.safetensors"), so.Delta.load(folder / "trained_entries.safetensors")
    trained = {name: value.clone() for name, value in base.items()}
    delta.apply_(trained)
    changed = 0
    for name, value in trained.items():
        differs = value.view(-1) != base[name].view(-1)
        assert not (differs & ~masks[name].view(-1)).any(), name
        if masks.count(name):
            assert torch.equal(delta.indices(name).long(), masks.indices(name).long()), name
        changed += int(differs.sum())
    assert delta.changed_parameters == masks.active_parameters
    return changed


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, configure: Configure) -> Path:
    """A run of 10 steps, never interrupted."""
    return dpo.run(configure(tmp_path_factory.mktemp("runs") / "straight"))


def test_writes_the_documented_files(finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} == {*FILES, "model"}
    for name in FILES - {"training.png"}:
        assert name in str(run.__doc__), name
    assert steps(finished) == list(range(1, 11))
    for line in (finished / "metrics.jsonl").read_text().splitlines():
        assert {"loss", "grad_norm", "rewards/margins", "rewards/accuracies"} <= json.loads(line).keys()
    found = results(finished)
    assert found["steps"] == 10
    assert found["before"]["reward_accuracy"] == 0.5
    assert found["before"]["margin"] == 0
    assert found["after"]["margin"] != 0
    assert found["after"]["n"] == 6
    assert found["after"]["greedy"]["n"] == 3
    assert found["versions"]["torch"] == torch.__version__
    assert json.loads((finished / "config.json").read_text())["training"]["n_steps"] == 10


def test_trains_the_mask_and_nothing_else(finished: Path, tiny_folder: Path) -> None:
    base, masks = weights(tiny_folder), so.MaskSet.load(finished / "mask.safetensors")
    total = sum(value.numel() for value in base.values())
    found = results(finished)
    assert masks.total_parameters == total == found["total_parameters"]
    assert masks.active_parameters == round(0.025 * total) == found["active_parameters"]
    assert masks.metadata["method"] == "gradient"
    assert masks.metadata["batches"] == 3
    assert found["mask_fingerprint"] == masks.fingerprint
    assert check_against_base(finished, base) > 0.9 * masks.active_parameters
    trained = weights(finished / "model")
    so.Delta.load(finished / "trained_entries.safetensors").apply_(base)
    for name, value in trained.items():
        assert torch.equal(value.view(torch.int32), base[name].view(torch.int32)), name


def test_report_and_picture_tell_what_the_results_say(finished: Path) -> None:
    from PIL import Image

    page, found = (finished / "report.md").read_text(), results(finished)
    assert f"{found['active_parameters']:,} weights, 2.50% of the {found['total_parameters']:,} that" in page
    assert f"{found['steps']} steps of 2 pairs" in page
    assert found["mask_fingerprint"] in page
    for key, label in (("reward_accuracy", "reward accuracy"), ("margin", "reward margin")):
        before, after = (
            f"{part[key]:.3f} ({part[f'{key}_ci'][0]:.3f} to {part[f'{key}_ci'][1]:.3f})"
            for part in (found["before"], found["after"])
        )
        assert f"| {label} | {before} | {after} |" in page
    exact = found["after"]["greedy"]
    assert f"| {exact['exact_match']:.3f} ({exact['exact_match_ci'][0]:.3f}" in page
    assert f"training {found['train_seconds']} s" in page
    with Image.open(finished / "training.png") as picture:
        assert picture.format == "PNG"
        picture.load()
        assert picture.size[0] > picture.size[1] > 300
        assert len(picture.convert("RGB").getcolors(10**6) or []) > 50, "an empty picture"


def test_refuses_a_folder_that_holds_a_finished_run(finished: Path, configure: Configure) -> None:
    kept = {path: path.read_bytes() for path in finished.iterdir() if path.is_file()}
    with pytest.raises(ValueError, match=r"finished run.*--output_dir"):
        dpo.run(configure(finished))
    with pytest.raises(ValueError, match="nothing to resume"):
        dpo.run(configure(finished, {"training.resume": True}))
    assert kept == {path: path.read_bytes() for path in finished.iterdir() if path.is_file()}


def test_same_settings_give_the_same_weights_and_the_mask_file_too(
    finished: Path, tmp_path: Path, configure: Configure
) -> None:
    """A given mask skips the scoring: were the random state or the trainer touched by it, the weights would differ."""
    given = finished / "mask.safetensors"
    again = dpo.run(
        configure(tmp_path / "given", {"mask.path": given, "mask.method": None, "output.save_model": False})
    )
    assert {path.name for path in again.iterdir()} == FILES
    expected = so.Delta.load(finished / "trained_entries.safetensors")
    assert so.Delta.load(again / "trained_entries.safetensors") == expected
    assert results(again)["mask_fingerprint"] == results(finished)["mask_fingerprint"]
    first, second = ([json.loads(line) for line in (f / "metrics.jsonl").open()] for f in (finished, again))
    assert [(e["loss"], e["num_tokens"]) for e in first] == [(e["loss"], e["num_tokens"]) for e in second]


VARIANTS: dict[str, dict[str, Any]] = {
    "random": {"mask.method": "random", "mask.sparsity": 0.9},
    "bf16": {"model.dtype": "bfloat16", "mask.scope": "per_tensor"},
    "fp16": {"model.dtype": "float16", "optimizer.master_weights": False},
    "accumulation": {"training.gradient_accumulation_steps": 3, "mask.granularity": 16, "mask.sparsity": 0.8},
    "rows": {"mask.granularity": "row", "mask.exclude": "[embed_tokens, norm]", "mask.sparsity": 0.9},
    "columns": {"mask.granularity": "column", "mask.include": "[mlp]", "mask.sparsity": 0.9},
    "checkpointing": {"model.gradient_checkpointing": True, "mask.exclude": "[embed_tokens]"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant: str, tmp_path: Path, configure: Configure, tiny_folder: Path) -> None:
    changes = {"training.n_steps": 3, "training.logging_steps": 2, "evaluation.n_generate": 0, **VARIANTS[variant]}
    config = configure(tmp_path / "run", changes)
    folder = dpo.run(config)
    dtype = config["model"]["dtype"]
    base = weights(tiny_folder, dtype)
    masks, found = so.MaskSet.load(folder / "mask.safetensors"), results(folder)
    assert check_against_base(folder, base) > 0
    assert steps(folder) == [2, 3], "the last step is logged whatever logging_steps"
    assert "greedy" not in found["after"]
    sparsity = config["mask"]["sparsity"]
    left_out = {"rows": ("embed_tokens", "norm"), "checkpointing": ("embed_tokens",)}.get(variant, ())
    eligible = {
        name: value.numel()
        for name, value in base.items()
        if not any(part in name for part in left_out) and (variant != "columns" or "mlp" in name)
    }
    assert all(name in eligible or masks.count(name) == 0 for name in masks.names)
    if variant == "bf16":
        budget = sum(round((1 - sparsity) * size) for size in eligible.values())
    else:
        budget = round((1 - sparsity) * sum(eligible.values()))
    slack = {"accumulation": 15, "rows": 47, "columns": 47}.get(variant, 0)
    assert budget - slack <= masks.active_parameters <= budget
    for name in (name for name in eligible if masks.count(name)):
        mask = masks[name]
        if variant == "accumulation":
            assert (mask.view(-1, 16).any(1) == mask.view(-1, 16).all(1)).all(), name
        elif variant in ("rows", "columns"):
            other = 1 if variant == "rows" else 0
            assert (mask.any(other) == mask.all(other)).all(), name
    if variant == "random":
        assert "batches" not in masks.metadata


def test_capture_off_trains_the_same(tmp_path: Path, configure: Configure, finished: Path) -> None:
    """Dense gradients instead of captured ones: the same arithmetic on the same entries."""
    folder = dpo.run(configure(tmp_path / "run", {"optimizer.capture_gradients": False}))
    dense, captured = (so.Delta.load(f / "trained_entries.safetensors") for f in (folder, finished))
    assert dense.names == captured.names
    for name in dense.names:
        torch.testing.assert_close(dense.values(name), captured.values(name), rtol=1e-4, atol=1e-5)


# ---- the command line, stopping and continuing ---------------------------------------------------------------------------
def command(arguments: list[str], *flags: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "sparseopt", "train", "dpo", *flags, "--set", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=240)
    finally:
        process.kill()
    return process.returncode, out, err


# A run that gets a signal within a step, when nothing of the step is saved yet.
DRIVER = """
import json, os, signal, sys
from transformers import TrainerCallback
from sparseopt.trainers import callbacks, run

class Stop(callbacks.MetricsFile):
    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step + 1 == int(os.environ["STOP_AT"]):
            os.kill(os.getpid(), getattr(signal, os.environ["STOP_WITH"]))

run.MetricsFile = Stop
from sparseopt.cli import main
sys.argv[0] = "sparseopt"
main()
"""


def stopped_run(arguments: list[str], step: int, number: str, *flags: str) -> tuple[int, str, str]:
    """The command in a process that gets a signal while it computes a step."""
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, "train", "dpo", *flags, "--set", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "STOP_AT": str(step), "STOP_WITH": number},
    )  # fmt: skip
    return finish(process)


def test_interrupted_run_says_how_to_resume_and_ends_up_the_same(
    tmp_path: Path, settings: Callable[..., list[str]], configure: Configure, finished: Path
) -> None:
    folder = tmp_path / "run"
    code, out, err = stopped_run(settings(folder), 8, "SIGINT", "--json")
    assert code == 130, err
    assert out == ""
    assert "checkpoint was saved after step 8 of 10" in err
    assert f"--resume --output_dir {folder}" in err
    assert "Traceback" not in err
    assert steps(folder) == list(range(1, 9))
    assert (folder / "checkpoint-8").is_dir()
    assert not (folder / "results.json").exists()

    with pytest.raises(ValueError, match=r"unfinished run.*--resume"):
        dpo.run(configure(folder))
    with pytest.raises(ValueError, match=r"optimizer\.learning_rate is 0\.5, but .* began with 0\.01"):
        dpo.run(configure(folder, {"training.resume": True, "optimizer.learning_rate": 0.5}))
    assert (folder / "checkpoint-8").is_dir(), "errors change nothing"
    # A kill while a checkpoint is written leaves one like this.
    (folder / "checkpoint-9").mkdir()
    (folder / "checkpoint-9" / "trainer_state.json").write_text('{"global_step": 9, "log_')

    code, out, err = finish(command(settings(folder), "--resume", "--json"))
    assert code == 0, err
    assert json.loads(out) == {"output_dir": str(folder)}
    assert "from checkpoint-8" in err
    assert {path.name for path in folder.iterdir()} == {*FILES, "model"}
    assert steps(folder) == list(range(1, 11))
    trained = so.Delta.load(folder / "trained_entries.safetensors")
    assert trained == so.Delta.load(finished / "trained_entries.safetensors")
    assert results(folder)["after"] == results(finished)["after"]


def test_killed_run_resumes_from_its_last_checkpoint(
    tmp_path: Path, settings: Callable[..., list[str]], configure: Configure, finished: Path
) -> None:
    folder, changes = tmp_path / "run", {"training.save_steps": 4}
    code, out, err = stopped_run(settings(folder, changes), 7, "SIGKILL")
    assert code == -signal.SIGKILL, err
    assert out == ""
    assert "loss" in err, "progress shows the loss"
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-4"]
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')  # the kill came while a line was written
    dpo.run(configure(folder, {**changes, "training.resume": True}))
    assert steps(folder) == list(range(1, 11))
    trained = so.Delta.load(folder / "trained_entries.safetensors")
    assert trained == so.Delta.load(finished / "trained_entries.safetensors")
    assert not list(folder.glob("checkpoint-*")), "the trained entries hold all that checkpoints were for"


@pytest.mark.parametrize("when", ["before", "after"])
def test_stopped_while_evaluating(
    when: str, tmp_path: Path, configure: Configure, finished: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Before training a continued run starts over; after it, nothing is trained again."""
    folder, evaluate = tmp_path / "run", dpo.DpoRun.evaluate

    def stop(self: dpo.DpoRun, model: Any, now: str) -> dict[str, Any]:
        if now == when:
            raise KeyboardInterrupt
        return evaluate(self, model, now)

    with monkeypatch.context() as patch:
        patch.setattr(dpo.DpoRun, "evaluate", stop)
        with pytest.raises(KeyboardInterrupt):
            dpo.run(configure(folder))
    assert f"--resume --output_dir {folder}" in capfd.readouterr().err
    if when == "after":
        monkeypatch.setattr(dpo.DpoRun, "make_trainer", lambda *args, **kwargs: pytest.fail("trains again"))
    dpo.run(configure(folder, {"training.resume": True}))
    assert {path.name for path in folder.iterdir()} == {*FILES, "model"}
    trained = so.Delta.load(folder / "trained_entries.safetensors")
    assert trained == so.Delta.load(finished / "trained_entries.safetensors")
    assert results(folder)["after"] == results(finished)["after"]
    assert results(folder)["optimizer_state_bytes"] == results(finished)["optimizer_state_bytes"]


def test_command_prints_progress_on_stderr_and_the_folder_on_stdout(
    tmp_path: Path, settings: Callable[..., list[str]]
) -> None:
    folder = tmp_path / "run"
    changes = {"training.n_steps": 4, "mask.method": None}
    code, out, err = finish(command(settings(folder, changes), "--sparsity", "0.9"))
    assert code == 0, err
    assert out == f"Results: {folder}\n"
    assert err.startswith("Device: cpu")
    training = [line for line in err.splitlines() if line.startswith("train:")]
    assert training
    assert all("loss" in line for line in training)
    assert "4/4 steps" in training[-1]
    assert "{'" not in err, "no dicts of transformers"
    assert "Held-out reward accuracy 0.500 ->" in err
    assert "Traceback" not in err
    assert len(err.splitlines()) < 40, err
    assert so.MaskSet.load(folder / "mask.safetensors").sparsity == pytest.approx(0.9, abs=1e-3)


def test_command_fails_with_one_sentence(tmp_path: Path, settings: Callable[..., list[str]]) -> None:
    arguments = settings(tmp_path / "run", {"model.name": "nobody/no-such-model"})
    code, out, err = finish(command(arguments, HF_HUB_OFFLINE="1"))
    assert code == 1
    assert out == ""
    assert [line for line in err.splitlines() if not line.startswith("Device:")] == [
        line for line in err.splitlines() if line.startswith("Error: Model 'nobody/no-such-model'")
    ]
    assert not (tmp_path / "run").exists(), "nothing is left of a run that could not begin"


def test_errors_come_before_the_work(
    tmp_path: Path, configure: Configure, pairs_file: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dpo.DpoRun, "evaluate", lambda *args: pytest.fail("evaluates first"))
    lacking = tmp_path / "lacking.jsonl"
    lacking.write_text('{"prompt": "w1", "chosen": "w2"}\n')
    part = so.MaskSet.load(finished / "mask.safetensors")
    part.select(part.names[1:]).save(tmp_path / "part.safetensors")
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"data.name": tmp_path / "none.jsonl"}, FileNotFoundError, r"none\.jsonl.* does not exist"),
        ({"data.name": lacking}, ValueError, "lacks the columns rejected"),
        ({"data.n_eval": 20}, ValueError, r"20 different prompts, too few to hold out data\.n_eval=20"),
        ({"data.n_eval": 0}, ValueError, r"data\.n_eval must be at least 2, got 0"),
        ({"training.n_steps": 0}, ValueError, r"training\.n_steps must be at least 1, got 0"),
        ({"training.lr_scheduler": "nope"}, ValueError, "nope"),
        ({"mask.sparsity": 97.5}, ValueError, r"mask\.sparsity must be in \[0, 1\).*97\.5"),
        ({"mask.include": "[nope]"}, ValueError, r"include \['nope'\].* leave no parameter"),
        ({"mask.path": tmp_path / "none.safetensors"}, FileNotFoundError, r"none\.safetensors"),
        ({"mask.path": tmp_path / "part.safetensors"}, ValueError, "lacks 1 parameters"),
        ({"mask.path": pairs_file}, ValueError, r"pairs\.jsonl"),
        ({"training.resume": True}, FileNotFoundError, "no run to resume"),
        ({"optimizer.betas": "[0.9]"}, ValueError, "two numbers"),
        ({"output.dir": pairs_file}, ValueError, "is a file"),
    ]
    for changes, kind, text in cases:
        with pytest.raises(kind, match=text):
            dpo.run(configure(tmp_path / "run", changes))
        assert not (tmp_path / "run").exists(), changes
