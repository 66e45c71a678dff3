"""MaskCollector in transformers' Trainer."""

from __future__ import annotations

import math
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from collecting import METRICS, TOLERANCE, collector, ema_of, names
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

import sparseopt as so
from sparseopt import hub
from sparseopt.trainers import MaskCollector


class Watch(TrainerCallback):
    """A tracker: what it was told."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kw: Any) -> None:
        self.logs.append({**logs, "at": state.global_step})


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


class FakeUploader:
    made: ClassVar[list[FakeUploader]] = []

    def __init__(self, repo_id: str, *, private: bool, spool_dir: Path, base_model: str | None, say: Any) -> None:
        say("Uploading")  # the collector shows what the uploader says
        self.options = {"repo_id": repo_id, "private": private, "spool_dir": spool_dir, "base_model": base_model}
        self.submitted: list[tuple[int, so.MaskSet, dict[str, Any]]] = []
        self.ended: list[Any] = []
        FakeUploader.made.append(self)

    def submit(self, step: int, mask_file: Path, metadata: dict[str, Any]) -> None:
        self.submitted.append((step, so.MaskSet.load(mask_file), metadata))

    def flush(self, timeout: float) -> list[int]:
        self.ended.append(timeout)
        return []

    def close(self) -> None:
        self.ended.append("closed")


@pytest.fixture
def uploaders(monkeypatch: pytest.MonkeyPatch) -> list[FakeUploader]:
    monkeypatch.setattr(hub, "Uploader", FakeUploader)
    monkeypatch.setattr(FakeUploader, "made", [])
    return FakeUploader.made


@pytest.fixture
def make(tiny_folder: Path, tmp_path: Path) -> Callable[..., Trainer]:
    def build(*callbacks: TrainerCallback, masks: Any = None, capture: bool = True, **changes: Any) -> Trainer:
        ids = torch.randint(3, 64, (32, 12), generator=torch.Generator().manual_seed(1)).tolist()
        arguments = TrainingArguments(
            **{
                "output_dir": str(tmp_path / "run"), "per_device_train_batch_size": 4, "max_steps": 6,
                "learning_rate": 1e-2, "logging_steps": 1, "report_to": [], "use_cpu": True, "seed": 0,
                "save_strategy": "no", "disable_tqdm": True, **changes,
            }
        )  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32, attention_dropout=0.0)
        data = Dataset.from_dict({"input_ids": ids, "labels": ids})
        trainer = Trainer(model=model, args=arguments, train_dataset=data, callbacks=list(callbacks))
        if masks is not None:
            so.attach(trainer, masks(model), capture_gradients=capture)
        return trainer

    return build


def same(left: MaskCollector, right: MaskCollector) -> bool:
    a, b = ema_of(left), ema_of(right)
    return a.count == b.count > 0 and a.names == b.names and all(torch.equal(a[n], b[n]) for n in a.names)


# ---- which gradients ---------------------------------------------------------------------------------------------------
@pytest.mark.filterwarnings("ignore:training ends after")
def test_gradients_are_taken_before_clipping(make: Callable[..., Trainer], tmp_path: Path) -> None:
    """Weights stay (learning rate 0), so that clipping is the only difference."""
    found = {}
    for norm in (0.0, 1e-4, 1.0):
        found[norm] = collector(tmp_path)
        trainer = make(found[norm], max_grad_norm=norm, learning_rate=0.0)
        trainer.train()
        assert "clip_grad_norm_" not in vars(trainer.accelerator)  # everything is as it was
        assert all(entry["grad_norm"] > 0.1 for entry in trainer.state.log_history if "grad_norm" in entry)
    assert same(found[0.0], found[1e-4])
    assert same(found[0.0], found[1.0])
    assert ema_of(found[0.0]).count == 6


@pytest.mark.filterwarnings("ignore:training ends after")
def test_micro_batches_make_one_gradient(make: Callable[..., Trainer], tmp_path: Path) -> None:
    whole, parts = collector(tmp_path), collector(tmp_path)
    make(whole, learning_rate=0.0).train()
    make(parts, learning_rate=0.0, per_device_train_batch_size=1, gradient_accumulation_steps=4).train()
    assert ema_of(parts).count == 6
    for name in ema_of(whole).names:
        torch.testing.assert_close(ema_of(parts)[name], ema_of(whole)[name], rtol=1e-3, atol=1e-12)


SCRIPT = """
import sys, torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from sparseopt.trainers import MaskCollector
folder, model, batch = sys.argv[1:]
ids = torch.randint(3, 64, (32, 12), generator=torch.Generator().manual_seed(1)).tolist()
arguments = TrainingArguments(folder + "/run", per_device_train_batch_size=int(batch), max_steps=4, learning_rate=0.0, seed=0,
                              report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True, max_grad_norm=1e-3)
model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attention_dropout=0.0)
data = Dataset.from_dict({"input_ids": ids, "labels": ids})
one = MaskCollector(folder, save_interval=4, save_masks=False)
trainer = Trainer(model=model, args=arguments, train_dataset=data, callbacks=[one])
trainer.train()
assert (one.ema is None) == (trainer.args.process_index != 0)
"""


@pytest.mark.slow
def test_processes_collect_their_mean_gradient_once(tmp_path: Path, tiny_folder: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    for processes, batch in ((1, 8), (2, 4)):
        subprocess.run(
            [sys.executable, *launch, str(processes), "train.py", str(tmp_path / str(processes)), str(tiny_folder), str(batch)],
            cwd=tmp_path, check=True, timeout=300,
        )  # fmt: skip
    one, two = (load_file(tmp_path / n / "grad_acc" / "grad_ema_step_4.safetensors") for n in ("1", "2"))
    assert max(float(value.max()) for value in one.values()) > 1e-6
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-12)


def mlp_masks(model: Any) -> so.MaskSet:
    masks = so.MaskSet.random(model, 0.1, seed=3)
    return so.MaskSet.from_bool({n: masks[n] if "mlp" in n else torch.zeros_like(masks[n]) for n in masks.names})


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_capture_makes_no_difference(make: Callable[..., Trainer], tmp_path: Path, micro_batches: int) -> None:
    found = []
    for capture in (False, True):
        one = collector(tmp_path / str(capture), save_interval=3)
        trainer = make(
            one, masks=mlp_masks, capture=capture, max_grad_norm=1e-3, gradient_accumulation_steps=micro_batches,
            per_device_train_batch_size=4 // micro_batches,
        )  # fmt: skip
        trainer.train()
        found.append(one)
    assert same(*found)
    masks = [so.MaskSet.load(tmp_path / str(c) / "grad_acc" / "grad_mask_step_6.safetensors") for c in (False, True)]
    assert masks[0] == masks[1]
    # Parameters without an active entry were frozen: not accumulated, inactive, and counted.
    assert all("mlp" in name for name in ema_of(found[0]).names)
    assert masks[0].metadata["frozen_parameters"] == len(masks[0]) - len(ema_of(found[0]).names) > 0
    assert 0 < masks[0].active_parameters < masks[0].total_parameters
    assert not any(masks[0].count(name) for name in masks[0].names if "mlp" not in name)
    # Entries outside the mask that is trained are found as well.
    assert (masks[0] & ~mlp_masks_like(masks[0])).active_parameters > 0


def mlp_masks_like(masks: so.MaskSet) -> so.MaskSet:
    return mlp_masks({name: torch.empty(shape) for name, shape in masks.shapes.items()})


@pytest.mark.filterwarnings("ignore:training ends after")
def test_the_loss_scale_is_divided_out(tmp_path: Path) -> None:
    """fp16 needs a GPU; what accelerate's optimizer shows there is its scaler."""
    model = torch.nn.Linear(3, 2)
    one, scaler = collector(tmp_path), torch.amp.GradScaler("cpu", init_scale=512.0)
    state: Any = types.SimpleNamespace(is_world_process_zero=True, global_step=0, max_steps=1, log_history=[])
    optimizer, args = types.SimpleNamespace(scaler=scaler), TrainingArguments(str(tmp_path), max_grad_norm=0.0)
    control: Any = None
    one.on_train_begin(args, state, control, model=model, optimizer=optimizer)
    scaler.scale(model(torch.ones(1, 3)).sum()).backward()
    one.on_pre_optimizer_step(args, state, control, optimizer=optimizer)
    torch.testing.assert_close(ema_of(one)["weight"], torch.full((2, 3), 0.01))


def test_it_refuses_what_it_cannot_see(tmp_path: Path) -> None:
    state: Any = types.SimpleNamespace(is_world_process_zero=True, global_step=0, max_steps=100, log_history=[])
    control: Any = None
    args = TrainingArguments(str(tmp_path), max_grad_norm=1.0)
    with pytest.raises(ValueError, match="clipped gradients"):
        collector(tmp_path).on_train_begin(args, state, control, model=torch.nn.Linear(2, 2), optimizer=None)
    sharded: Any = types.SimpleNamespace(fsdp=["full_shard"], deepspeed=None)
    with pytest.raises(ValueError, match="the shards of FSDP2, not of FSDP1"):
        collector(tmp_path).on_train_begin(sharded, state, control, model=torch.nn.Linear(2, 2), optimizer=None)
    other = collector(tmp_path / "rank1", save_interval=1)
    state.is_world_process_zero = False
    other.on_train_begin(args, state, control, model=torch.nn.Linear(2, 2), optimizer=None)
    other.on_step_end(args, state, control)
    assert other.ema is None
    assert not (tmp_path / "rank1").exists()


# ---- files, metrics, lines -----------------------------------------------------------------------------------------------
def test_files_lines_and_metrics(
    make: Callable[..., Trainer], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the real report_to machinery: tracker classes registered there, which come before the collector."""
    from transformers.integrations import integration_utils

    seen: dict[str, list[dict[str, Any]]] = {"wandb": [], "tensorboard": []}
    for name, logs_seen in seen.items():

        class Tracker(TrainerCallback):
            seen = logs_seen

            def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kw: Any) -> None:
                self.seen.append(dict(logs))

        monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, name, Tracker)
    summary: dict[str, Any] = {}
    wandb: Any = types.ModuleType("wandb")
    wandb.run = types.SimpleNamespace(summary=summary)
    wandb.finish = lambda: None
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    one = collector(tmp_path, save_interval=2, mask_save_interval=3, tolerance=[TOLERANCE, 1e-3])
    trainer = make(one, report_to=["wandb", "tensorboard"])
    trainer.train()

    assert names(tmp_path) == {
        "grad_ema_step_2.safetensors", "grad_ema_step_4.safetensors", "grad_ema_step_6.safetensors",
        "grad_mask_step_3.safetensors", "grad_mask_step_3_tolerance_0.001.safetensors",
        "grad_mask_step_6.safetensors", "grad_mask_step_6_tolerance_0.001.safetensors",
    }  # fmt: skip
    masks = so.MaskSet.load(tmp_path / "grad_acc" / "grad_mask_step_6.safetensors")
    assert masks == ema_of(one).masks(TOLERANCE)
    assert masks.names == [name for name, _ in trainer.model.named_parameters()]  # type: ignore[union-attr]
    about = masks.metadata
    keys = {"step", "timestamp", "tolerance", "total_parameters", "active_parameters", "active_fraction", "sparsity",
            "base_model", "beta", "epsilon"}  # fmt: skip
    assert keys <= about.keys()
    assert (about["step"], about["tolerance"], about["beta"], about["epsilon"]) == (6, TOLERANCE, 0.99, 1e-8)
    assert about["base_model"].endswith("tiny-llama")
    strict = so.MaskSet.load(tmp_path / "grad_acc" / "grad_mask_step_6_tolerance_0.001.safetensors")
    assert strict.active_parameters < masks.active_parameters

    for entries in (*seen.values(), trainer.state.log_history):
        told = [entry for entry in entries if "grad_mask/step" in entry]
        assert [entry["grad_mask/step"] for entry in told] == [3, 6]
        assert told[1].keys() >= METRICS
        assert told[1]["grad_mask/active_fraction"] == masks.density
        assert told[1]["grad_mask/active_count"] == masks.active_parameters
        assert told[1]["grad_mask/total_count"] == masks.total_parameters
        assert told[1]["grad_mask/sparsity"] == 1 - masks.density
        assert told[1]["grad_mask/tolerance_0.001/active_count"] == strict.active_parameters
        assert math.isclose(told[1]["grad_ema/rms_mean"], ema_of(one).rms_mean())
        assert sum("grad_ema/rms_mean" in entry for entry in entries) == 4  # steps 2, 3, 4 and 6
    assert {key: summary[f"grad_mask/metadata/{key}"] for key in about} == about

    lines = capsys.readouterr().err.splitlines()
    assert f"Step 6 | EMA RMS Mean: {ema_of(one).rms_mean():.4g}" in lines
    assert f"Step 6 | Active Fraction: {masks.density:.4f} | Sparsity: {masks.sparsity:.4f}" in lines
    assert f"Saved gradient masks to {tmp_path / 'grad_acc' / 'grad_mask_step_6.safetensors'}" in lines


def test_values_wait_for_the_next_log_entry(make: Callable[..., Trainer], tmp_path: Path) -> None:
    watch = Watch()
    make(collector(tmp_path, save_interval=2, save_masks=False), watch, logging_steps=5).train()
    told = [(entry["at"], entry["grad_mask/step"]) for entry in watch.logs if "grad_mask/step" in entry]
    assert told == [(5, 4), (6, 6)]  # the last joins the entry at the end
    assert not any("mask" in name for name in names(tmp_path))


def test_masks_are_computed_only_when_they_are_due(
    make: Callable[..., Trainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    original = so.GradientEMA.masks
    monkeypatch.setattr(
        so.GradientEMA, "masks", lambda self, tolerance: (calls.append(self.updates), original(self, tolerance))[1]
    )
    make(collector(tmp_path, mask_save_interval=4)).train()
    assert calls == [4]


def test_only_the_newest_accumulations_stay(make: Callable[..., Trainer], tmp_path: Path) -> None:
    make(MaskCollector(tmp_path / "a", keep_accumulations=2, save_masks=False)).train()
    assert names(tmp_path / "a") == {"grad_ema_step_5.safetensors", "grad_ema_step_6.safetensors"}
    make(MaskCollector(tmp_path / "b", keep_accumulations=-1, save_masks=False)).train()
    assert len(names(tmp_path / "b")) == 6
    # What a checkpoint that exists continues from stays.
    make(
        MaskCollector(tmp_path / "c", keep_accumulations=1, save_masks=False), save_strategy="steps", save_steps=3
    ).train()
    assert names(tmp_path / "c") == {"grad_ema_step_3.safetensors", "grad_ema_step_6.safetensors"}


# ---- resuming ------------------------------------------------------------------------------------------------------------
@pytest.mark.filterwarnings("ignore:training ends after")
@pytest.mark.parametrize("sparse", [False, True])
def test_resumed_it_is_bit_by_bit_what_it_would_have_been(
    make: Callable[..., Trainer], tmp_path: Path, sparse: bool
) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "masks": mlp_masks if sparse else None}
    whole = collector(tmp_path / "whole")
    make(whole, **options, output_dir=str(tmp_path / "run-a")).train()

    folder = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        make(collector(folder), StopAt(5), **options, output_dir=str(tmp_path / "run-b")).train()
    assert names(folder) == {"grad_ema_step_2.safetensors", "grad_ema_step_4.safetensors"}
    again = collector(folder)
    trainer = make(again, **options, output_dir=str(tmp_path / "run-b"))
    trainer.train(resume_from_checkpoint=str(tmp_path / "run-b" / "checkpoint-4"))
    assert same(whole, again)
    assert ema_of(again).count == 6


@pytest.mark.filterwarnings("ignore:training ends after")
def test_resuming_without_the_right_accumulation_warns(make: Callable[..., Trainer], tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    make(collector(tmp_path, save_interval=3), **options).train()
    files = tmp_path / "grad_acc"
    assert {"grad_ema_step_2.safetensors", "grad_ema_step_4.safetensors"} <= names(tmp_path)
    # A damaged file is passed over, later ones are removed, and what is missing is said.
    (files / "grad_ema_step_4.safetensors").write_bytes(b"damaged")
    again = collector(tmp_path)
    with pytest.warns(UserWarning, match="the accumulation of step 3 is the newest.*resumes at step 4") as caught:
        make(again, **options).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert any("An older accumulation is looked for" in str(w.message) for w in caught)
    assert ema_of(again).count == 5  # 3 before, steps 5 and 6
    with pytest.warns(UserWarning, match="starts anew"):
        make(collector(tmp_path / "elsewhere"), **options).train(
            resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4")
        )
    with pytest.raises(ValueError, match=r"accumulated with beta=0\.99, not 0\.5"):
        make(collector(tmp_path, beta=0.5), **options).train(
            resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-6")
        )
    fresh = collector(tmp_path, save_interval=6)  # a new training in an old folder
    make(fresh).train()
    assert {n for n in names(tmp_path) if "ema" in n} == {"grad_ema_step_6.safetensors"}
    assert ema_of(fresh).count == 6


def test_after_an_error_it_lets_go(make: Callable[..., Trainer], tmp_path: Path) -> None:
    one = collector(tmp_path, save_interval=2)
    trainer = make(one, StopAt(3))
    with pytest.raises(KeyboardInterrupt), one:
        trainer.train()
    assert one.ema is None
    assert "clip_grad_norm_" not in vars(trainer.accelerator)


# ---- uploads ------------------------------------------------------------------------------------------------------
def test_uploads(make: Callable[..., Trainer], tmp_path: Path, uploaders: list[FakeUploader]) -> None:
    one = collector(tmp_path, save_interval=2, upload_to_hf=True, hf_repo_id="user/masks", hf_upload_interval=3,
                    hf_private=False, save_masks=False, base_model="google/gemma")  # fmt: skip
    make(one).train()
    (uploader,) = uploaders
    assert uploader.options == {"repo_id": "user/masks", "private": False, "spool_dir": tmp_path / "grad_acc" / "spool",
                                "base_model": "google/gemma"}  # fmt: skip
    assert [step for step, _, _ in uploader.submitted] == [3, 6]
    _, masks, metadata = uploader.submitted[1]
    assert masks == ema_of(one).masks(TOLERANCE)
    assert (metadata["step"], metadata["base_model"]) == (6, "google/gemma")
    assert metadata["active_parameters"] == masks.active_parameters
    assert uploader.ended[0] > 0
    assert uploader.ended[1:] == ["closed"]
