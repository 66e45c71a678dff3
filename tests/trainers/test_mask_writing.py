"""MaskCollector writes mask files beside training: order, errors, ends of training, and what a kill left out."""

from __future__ import annotations

import threading
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

import sparseopt as so
from sparseopt import hub
from sparseopt.trainers import MaskCollector


class Training:
    """What a trainer calls; gradients are those of the step's number."""

    def __init__(self, folder: Path, step: int = 0, **options: Any) -> None:
        self.args = TrainingArguments(str(folder), max_grad_norm=0.0, report_to=[])
        self.state: Any = types.SimpleNamespace(
            is_world_process_zero=True, global_step=step, max_steps=100, log_history=[]
        )
        self.model = torch.nn.Linear(40, 5)
        self.collector = MaskCollector(
            folder, **{"save_interval": 100, "mask_save_interval": 1, "tolerance": 0.5, "beta": 0.5, **options}
        )

    def begin(self) -> None:
        control: Any = None
        self.collector.on_train_begin(self.args, self.state, control, model=self.model, optimizer=None)

    def step(self) -> None:
        control: Any = None
        self.state.global_step += 1
        for param in self.model.parameters():
            generator = torch.Generator().manual_seed(self.state.global_step)
            param.grad = torch.randn(param.shape, generator=generator)
        self.collector.on_step_begin(self.args, self.state, control)
        self.collector.on_pre_optimizer_step(self.args, self.state, control)
        self.collector.on_step_end(self.args, self.state, control)

    def save(self) -> None:
        control: Any = None
        self.collector.on_save(self.args, self.state, control)

    def end(self) -> None:
        control: Any = None
        self.collector.on_train_end(self.args, self.state, control)

    def masks(self) -> so.MaskSet:
        assert self.collector.ema is not None
        return self.collector.ema.masks(0.5)


def mask_file(folder: Path, step: int) -> Path:
    return folder / "grad_acc" / f"grad_mask_step_{step}.safetensors"


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Nothing is written before it is set."""
    opened, save = threading.Event(), so.MaskSet.save

    def wait_and_save(self: so.MaskSet, *arguments: Any, **options: Any) -> None:
        assert opened.wait(60)
        save(self, *arguments, **options)

    monkeypatch.setattr(so.MaskSet, "save", wait_and_save)
    return opened


def test_training_does_not_wait_for_the_file(
    tmp_path: Path, gate: threading.Event, capsys: pytest.CaptureFixture[str]
) -> None:
    training = Training(tmp_path, mask_save_interval=2)
    training.begin()
    training.step()
    training.step()
    expected = training.masks()
    training.step()  # changes the accumulation
    assert not mask_file(tmp_path, 2).exists()
    out = capsys.readouterr().err
    assert "Step 2 | Active Fraction" in out
    assert "Saved gradient masks" not in out
    gate.set()
    training.end()
    assert so.MaskSet.load(mask_file(tmp_path, 2)) == expected
    assert f"Saved gradient masks to {mask_file(tmp_path, 2)}" in capsys.readouterr().err


def test_every_file_is_written_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written, save = [], so.MaskSet.save

    def noted(self: so.MaskSet, path: Path, **options: Any) -> None:
        save(self, path, **options)
        written.append(path.name)

    monkeypatch.setattr(so.MaskSet, "save", noted)
    training = Training(tmp_path, tolerance=[0.5, 1.5])
    training.begin()
    found = []
    for _ in range(4):
        training.step()
        found.append(training.masks())
    training.end()
    assert written == [
        f"grad_mask_step_{step}{suffix}.safetensors" for step in range(1, 5) for suffix in ("", "_tolerance_1.5")
    ]
    assert [so.MaskSet.load(mask_file(tmp_path, step)) for step in range(1, 5)] == found


def test_errors_of_the_writer_are_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: so.MaskSet, path: Path, **options: Any) -> None:
        raise OSError("no space left")

    save = so.MaskSet.save
    monkeypatch.setattr(so.MaskSet, "save", full)
    for last_step in (False, True):
        training = Training(tmp_path / str(last_step))
        training.begin()
        training.step()
        with pytest.raises(OSError, match="no space left"):
            training.end() if last_step else training.step()
        training.collector.close()
        assert not mask_file(tmp_path / str(last_step), 1).exists()
    monkeypatch.setattr(so.MaskSet, "save", save)
    training.state.global_step = 0
    training.begin()  # and it can be used again
    training.step()
    training.end()
    assert mask_file(tmp_path / "True", 1).is_file()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupted_training_completes_its_file(
    tmp_path: Path, gate: threading.Event, error: type[BaseException]
) -> None:
    training = Training(tmp_path)
    training.begin()
    training.step()
    expected = training.masks()
    gate.set()
    with pytest.raises(error), training.collector:
        raise error
    assert so.MaskSet.load(mask_file(tmp_path, 1)) == expected
    assert training.collector.ema is None


class FakeUploader:
    """Sees whether a file is whole when it comes."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.seen: list[Any] = []
        FakeUploader.last = self

    last: FakeUploader

    def submit(self, step: int, mask_file: Path, metadata: dict[str, Any]) -> None:
        self.seen.append((step, so.MaskSet.load(mask_file), metadata["step"]))

    def flush(self, timeout: float) -> list[int]:
        self.seen.append("flushed")
        return []

    def close(self) -> None:
        self.seen.append("closed")


@pytest.mark.filterwarnings("ignore:hf_upload_interval")
@pytest.mark.parametrize("fails", [False, True])
def test_uploads_begin_when_their_file_is_complete(
    tmp_path: Path, gate: threading.Event, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    monkeypatch.setattr(hub, "Uploader", FakeUploader)
    training = Training(tmp_path, upload_to_hf=True, hf_repo_id="user/masks")
    training.begin()
    training.step()
    expected = training.masks()
    uploader = FakeUploader.last
    assert uploader.seen == []
    if fails:
        monkeypatch.setattr(uploader, "submit", lambda *arguments: mask_file(tmp_path, 99).stat())
        gate.set()
        with pytest.raises(FileNotFoundError):
            training.end()
        assert uploader.seen == ["closed"]
        return
    gate.set()
    training.end()
    assert uploader.seen == [(1, expected, 1), "flushed", "closed"]


def test_masks_that_a_kill_left_out_are_made_when_training_resumes(tmp_path: Path) -> None:
    first = Training(tmp_path, mask_save_interval=2, tolerance=[0.5, 1.5])
    first.begin()
    for _ in range(2):
        first.step()
    first.save()
    expected = first.masks()
    first.end()
    path, other = mask_file(tmp_path, 2), tmp_path / "grad_acc" / "grad_mask_step_2_tolerance_1.5.safetensors"
    other.unlink()  # the process was killed before it was written

    again = Training(tmp_path, step=2, mask_save_interval=2, tolerance=[0.5, 1.5])
    again.begin()
    again.end()
    assert so.MaskSet.load(path) == expected
    assert other.is_file()
    before = path.stat().st_ino
    again.begin()
    again.end()
    assert path.stat().st_ino == before, "what is there stays"

    path.unlink()
    for step, options in ((3, {}), (2, {"save_masks": False}), (2, {"mask_save_interval": 3})):
        quiet = Training(tmp_path, step=step, **{"mask_save_interval": 2, "tolerance": [0.5, 1.5], **options})
        if step == 3:
            with pytest.warns(UserWarning, match="step 2 is the newest"):
                quiet.begin()
        else:
            quiet.begin()
        quiet.end()
        assert not path.exists()
