"""``sparseopt train lm`` on a small text: its files, gradients, optimizers, and going on."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_training import NO_DROPOUT, gradients, run, settings_of
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

import sparseopt as so
from sparseopt import config, schemas
from sparseopt.trainers import lm, lm_checkpoints, lm_data, lm_model

PLAIN = "{" + ", ".join(f"{k}: {v}" for k, v in ({"n_layer": 2, "n_head": 2, "n_embd": 16} | NO_DROPOUT).items()) + "}"
# One step over all the text that is trained on: 8 sequences, in micro-batches of 2.
ONE_STEP = {
    "model__config": PLAIN, "data__dataset_size": 32 * 9, "data__valid_fraction": 0.1, "training__max_steps": 1,
    "training__batch_size": 8, "training__max_gpu_batch_size": 2, "training__gradient_accumulation_steps": 1,
    "training__save_steps": 0,
}  # fmt: skip


def entries(folder: Path, key: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if "second" not in k and "runtime" not in k} for line in lines if key in line
    ]


def equal_checkpoints(a: Path, b: Path) -> bool:
    """Weights, gradients, optimizer, scheduler and RNG are the same bits."""
    pairs = [(load_file(folder / "model.safetensors") for folder in (a, b)), (gradients(folder) for folder in (a, b))]
    states = [lm_checkpoints.states_of(folder) for folder in (a, b)]
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        pairs.append(torch.load(folder / name, weights_only=False) for folder in states)
    return all(same(*pair) for pair in pairs)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(torch.equal(a, b)) if isinstance(a, torch.Tensor) else bool((a == b) is True or (a == b).all())


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing interrupted, with dropout, over more than an epoch."""
    return run(tmp_path_factory.mktemp("lm"), training__num_epochs=1.5)


# ---- files -----------------------------------------------------------------------------------------------------------
def test_tree_log_and_metrics(straight: Path) -> None:
    steps = lm_checkpoints.steps_of(straight)
    assert steps == [3, 6, 9, 12, 15]  # 148 sequences: 10 steps an epoch
    for name in ("checkpoint_3", "final_checkpoint"):
        files = {path.name for path in (straight / name).iterdir()}
        assert {"model.safetensors", "config.json", "gradients.pt", "accelerator_states", "tokenizer.json"} <= files
    assert not list(straight.glob(".*.tmp"))
    assert [e["step"] for e in entries(straight, "eval_loss")] == [4, 8, 12, 15]  # apart from the checkpoints' interval
    assert [e["step"] for e in entries(straight, "loss")] == [3, 6, 9, 10, 12, 15]
    assert {"step", "epoch", "loss", "learning_rate", "grad_norm"} <= entries(straight, "loss")[0].keys()
    manager = so.RunManager(straight.parent)
    record = manager.get_run(straight.name)
    assert record["status"] == "finished"
    assert record["run_name"] == "test"
    metrics, last = record["metrics"], entries(straight, "eval_loss")[-1]["eval_loss"]
    assert metrics["final_valid_loss"] == last
    assert metrics["final_valid_perplexity"] == pytest.approx(math.exp(last))
    assert metrics["best_valid_loss"] == min(e["eval_loss"] for e in entries(straight, "eval_loss"))
    assert (metrics["step"], metrics["tokenizer"]) == (15, "bytes")
    assert manager.get_best_run()["run_id"] == straight.name


def test_the_final_checkpoint_is_a_model_whose_loss_is_the_logged_one(straight: Path) -> None:
    """Loss per predicted token, with nothing of the library between."""
    model = AutoModelForCausalLM.from_pretrained(straight / "final_checkpoint").eval()
    tokenizer = AutoTokenizer.from_pretrained(straight / "final_checkpoint")
    text = (straight.parent.parent / "text.txt").read_bytes()[:5000]
    ids = torch.tensor(tokenizer(text.decode())["input_ids"])
    assert tokenizer.decode(ids) == text.decode()
    blocks = ids[: len(ids) // 32 * 32].view(-1, 32)
    held = blocks[-round(len(blocks) * 0.05) :]
    with torch.no_grad():
        logits = model(held).logits
    loss = F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), held[:, 1:].reshape(-1))
    assert loss.item() == pytest.approx(entries(straight, "eval_loss")[-1]["eval_loss"], rel=1e-5)


# ---- gradients -------------------------------------------------------------------------------------------------------
def test_gradients_are_those_of_the_whole_step_before_clipping(tmp_path: Path) -> None:
    """Against autograd over all the text at once; the micro-batches' own have the same mean."""
    folder = run(tmp_path, optimizer__max_grad_norm=1e-3, checkpoints__micro_gradients=True, **ONE_STEP)
    settings, _ = config.load_open(schemas.LM, None, settings_of(tmp_path, **ONE_STEP))
    tokenizer, _ = lm_model.load_tokenizer(settings["model"])
    data, _ = lm_data.load_blocks(lm_data.find_sources(settings["data"]), settings["data"], tokenizer, 32)
    assert len(data) == 8
    set_seed(42)
    model = lm_model.build_model(settings, tokenizer, own=False)
    ids = torch.stack([data[i]["input_ids"] for i in range(8)])
    logits = model(ids).logits[:, :-1]
    F.cross_entropy(logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1)).backward()
    saved = gradients(folder / "final_checkpoint")
    expected = {name: p.grad for name, p in model.named_parameters()}
    assert saved.keys() == expected.keys()
    assert "transformer.h.0.mlp.c_fc.weight" in saved
    for name, grad in expected.items():
        torch.testing.assert_close(saved[name], grad, rtol=1e-4, atol=1e-7)
    norm = torch.stack([grad.norm() for grad in saved.values()]).norm().item()
    assert norm == pytest.approx(entries(folder, "loss")[0]["grad_norm"], rel=1e-5)
    micro = [torch.load(path) for path in sorted((folder / "final_checkpoint/micro_gradients").iterdir())]
    assert len(micro) == 4
    for name, grad in saved.items():
        torch.testing.assert_close(torch.stack([m[name] for m in micro]).mean(0), grad, rtol=1e-4, atol=1e-7)
        assert not torch.equal(micro[0][name], micro[1][name])


def test_saving_gradients_changes_nothing(straight: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text((straight.parent.parent / "text.txt").read_text())
    micro = run(tmp_path, training__num_epochs=1.5, checkpoints__micro_gradients=True)
    without = run(tmp_path, training__num_epochs=1.5, checkpoints__gradients=False)
    assert equal_checkpoints(straight / "checkpoint_12", micro / "checkpoint_12")
    weights = [load_file(folder / "final_checkpoint/model.safetensors") for folder in (straight, without)]
    assert same(*weights)
    assert not (without / "final_checkpoint/gradients.pt").exists()
    assert len(list((micro / "checkpoint_3/micro_gradients").iterdir())) == 4


# ---- optimizers ------------------------------------------------------------------------------------------------------
def test_sparse_adamw_trains_the_entries_of_a_mask(tmp_path: Path) -> None:
    settings, _ = config.load_open(schemas.LM, None, settings_of(tmp_path))
    tokenizer, _ = lm_model.load_tokenizer(settings["model"])
    set_seed(42)
    model = lm_model.build_model(settings, tokenizer, own=False)
    masks = so.MaskSet.random(model, 0.1, seed=0)
    masks.save(tmp_path / "mask.safetensors")
    for capture in (None, True):
        gradients_too = capture is None
        folder = run(
            tmp_path, optimizer__mask=tmp_path / "mask.safetensors", optimizer__weight_decay=0.1, training__max_steps=4,
            checkpoints__gradients=gradients_too, optimizer__capture_gradients=capture,
        )  # fmt: skip
        after = load_file(folder / "final_checkpoint/model.safetensors")
        for name, param in model.named_parameters():
            changed = after[name] != param.detach()
            assert not (changed & ~masks[name]).any()
            assert changed[masks[name]].float().mean() > 0.5 or not masks[name].any()
        assert (folder / "final_checkpoint/gradients.pt").exists() is gradients_too


def test_without_bias_correction_the_first_step_is_the_formula(tmp_path: Path) -> None:
    folder = run(
        tmp_path, training__correct_bias=False, training__learning_rate=0.01, optimizer__max_grad_norm=0, **ONE_STEP
    )
    settings, _ = config.load_open(schemas.LM, None, settings_of(tmp_path, **ONE_STEP))
    tokenizer, _ = lm_model.load_tokenizer(settings["model"])
    set_seed(42)
    model = lm_model.build_model(settings, tokenizer, own=False)
    after, saved = load_file(folder / "final_checkpoint/model.safetensors"), gradients(folder / "final_checkpoint")
    for name, param in model.named_parameters():
        grad = saved[name]
        expected = param.detach() - 0.01 * (0.1 * grad) / ((0.001 * grad**2).sqrt() + 1e-8)
        torch.testing.assert_close(after[name], expected, rtol=1e-4, atol=1e-6)


# ---- going on --------------------------------------------------------------------------------------------------------
def test_a_run_from_a_checkpoint_is_bit_identical(straight: Path, tmp_path: Path) -> None:
    """From the middle of an epoch to the middle of the next, dropout included; the registry has two runs."""
    for step in (6, 9):
        again = run(
            straight.parent.parent, base_dir=tmp_path / "saved_models", training__num_epochs=1.5,
            run__checkpoint=straight / f"checkpoint_{step}", run__name="continued_run",
        )  # fmt: skip
        assert lm_checkpoints.steps_of(again) == [s for s in (9, 12, 15) if s > step]
        assert equal_checkpoints(straight / "checkpoint_12", again / "checkpoint_12")
        assert equal_checkpoints(straight / "final_checkpoint", again / "final_checkpoint")
        assert entries(again, "loss") == [e for e in entries(straight, "loss") if e["step"] > step]
    assert len(so.RunManager(tmp_path / "saved_models").rows()) == 2


def test_longer_than_the_run_that_is_gone_on_with(straight: Path) -> None:
    source, base = straight.parent.parent, straight.parent.parent / "longer"
    with pytest.raises(ValueError, match="is at step 15 and the run ends at step 15"):
        run(source, base_dir=base, training__num_epochs=1.5, run__checkpoint=straight / "final_checkpoint")
    longer = run(source, base_dir=base, training__num_epochs=2, run__checkpoint=straight / "final_checkpoint")
    assert entries(longer, "loss")[-1]["step"] == 20
    with pytest.raises(ValueError, match="was trained on other data"):
        run(source, base_dir=base, data__dataset_size="4K", run__checkpoint=straight / "checkpoint_3")
    assert [row["status"] for row in so.RunManager(base).rows()] == ["failed", "finished", "failed"]


@pytest.mark.parametrize("when", [4, 15])
def test_ctrl_c_leaves_a_run_to_go_on_with(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: int
) -> None:
    """The checkpoint that it leaves has gradients; in the last step the run just ends."""

    def interrupt(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == when:
            os.kill(os.getpid(), signal.SIGINT)

    source, base = straight.parent.parent, tmp_path / "saved_models"
    with monkeypatch.context() as patch:
        patch.setattr(lm.TrainProgress, "on_step_end", interrupt)
        if when == 15:
            assert equal_checkpoints(
                run(source, base_dir=base, training__num_epochs=1.5) / "final_checkpoint", straight / "final_checkpoint"
            )
            return
        with pytest.raises(KeyboardInterrupt):
            run(source, base_dir=base, training__num_epochs=1.5)
    manager = so.RunManager(base)
    (row,) = manager.rows()
    assert row["status"] == "crashed"
    newest = lm_checkpoints.newest(base / row["run_id"])
    assert newest is not None
    assert newest.name == "checkpoint_5"
    assert len(gradients(newest)) == 28
    folder = run(source, base_dir=base, resume=row["run_id"])
    assert manager.get_run(folder.name)["status"] == "finished"
    assert equal_checkpoints(straight / "final_checkpoint", folder / "final_checkpoint")
    assert [e["step"] for e in entries(folder, "loss")] == [3, 5, 6, 9, 10, 12, 15]
    with pytest.raises(ValueError, match="is finished"):
        run(source, base_dir=base, resume=folder.name)


def test_killed_before_the_final_checkpoint(straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last step's own checkpoint becomes it, without another step."""
    source, base = straight.parent.parent, tmp_path / "saved_models"

    def fail(*args: Any) -> None:
        raise OSError("disk full")

    real = lm.LmTrainer.write
    monkeypatch.setattr(lm.LmTrainer, "write", lambda self, p: fail() if "final" in p.name else real(self, p))
    with pytest.raises(OSError, match="disk full"):
        run(source, base_dir=base, training__num_epochs=1.5)
    monkeypatch.undo()
    manager = so.RunManager(base)
    (row,) = manager.rows()
    assert (row["status"], row["error"]) == ("failed", "OSError: disk full")
    folder = run(source, base_dir=base, resume=row["run_id"])
    assert equal_checkpoints(straight / "final_checkpoint", folder / "final_checkpoint")
    assert (
        manager.get_run(folder.name)["metrics"]["final_valid_loss"] == entries(straight, "eval_loss")[-1]["eval_loss"]
    )


@pytest.mark.slow
def test_sigkill_and_resume_by_the_command(straight: Path, tmp_path: Path) -> None:
    source, base = straight.parent.parent, tmp_path / "saved_models"
    command = [sys.executable, "-P", "-m", "sparseopt", "train", "lm", "--base_dir", str(base)]
    (tmp_path / "empty.yaml").write_text("")
    overrides = settings_of(source, training__num_epochs=1.5)
    process = subprocess.Popen([*command, "--config", str(tmp_path / "empty.yaml"), "--set", *overrides])
    deadline = time.monotonic() + 120
    while not list(base.glob("*/checkpoint_3")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    (row,) = so.RunManager(base).rows()
    assert row["status"] == "crashed"
    done = subprocess.run([*command, "--resume", row["run_id"], "--json"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["run_id"] == row["run_id"]
    assert equal_checkpoints(straight / "final_checkpoint", base / row["run_id"] / "final_checkpoint")


# ---- errors ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training__batch_size": 0}, "training.batch_size must be at least 1, got 0"),
        ({"training__num_epochs": 0}, "training.num_epochs must be more than 0"),
        ({"training__scheduler": "step"}, "training.scheduler must be one of linear, cosine, got 'step'"),
        ({"run__init_type": "uniform"}, "run.init_type must be one of normal, gaussian"),
        ({"run__checkpoint": "nowhere/checkpoint_1"}, "There is no checkpoint"),
        ({"data__dataset_path": "/nowhere/text.txt"}, "there is no file or folder"),
        ({"data__dataset_size": "many"}, "data.dataset_size must be a number of tokens such as '10M'"),
        ({"data__dataset_size": 40}, "of which none is left to train on"),
        ({"model__config": "{n_layers: 2}"}, "model.config has 'n_layers', .* did you mean 'n_layer'"),
        (
            {"model__pretrained": True, "model__config": "{n_layer: 1}"},
            "which weights of model.pretrained do not follow",
        ),
        ({"initialization__init_mean": 0.5}, "needs run.init_type gaussian"),
        ({"optimizer__capture_gradients": True}, "turn one of them off"),
        ({"optimizer__name": "adamw", "optimizer__mask": "x"}, "optimizer.mask needs the optimizer sparse_adamw"),
        ({"deepspeed": "{}", "optimizer__mask": "x"}, "SparseAdamW does not run under DeepSpeed"),
        ({"deepspeed": "{}", "training__correct_bias": False}, "training.correct_bias false is SparseAdamW's"),
        ({"deepspeed": "none.json"}, "there is no file 'none.json'"),
        ({"deepspeed": "[1]"}, "deepspeed must be a file or a dict"),
    ],
)
def test_wrong_settings_are_said_in_a_sentence(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    if changes.get("optimizer__mask") == "x":
        so.MaskSet.from_bool({"w": torch.ones(2, dtype=torch.bool)}).save(tmp_path / "mask.safetensors")
        changes = changes | {"optimizer__mask": tmp_path / "mask.safetensors"}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(tmp_path, **changes)


def test_a_missing_deepspeed_is_said_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "deepspeed" else real(name, *a))
    with pytest.raises(ImportError, match=r"pip install 'sparseopt\[deepspeed\]'"):
        run(tmp_path, deepspeed="{}")
