"""Progress with the loss, the metrics file, and stopping after a signal, in transformers' Trainer."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from sparseopt.trainers.callbacks import InterruptGuard, MetricsFile, TrainProgress


class Act(TrainerCallback):
    """Does something while one step is computed."""

    def __init__(self, step: int, action: Any) -> None:
        self._step, self._action = step, action

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self._step:
            self._action()


def train(
    model: Path, folder: Path, callbacks: list[TrainerCallback], resume: Path | None = None, **options: Any
) -> Trainer:
    """8 steps, 4 an epoch."""
    ids = torch.randint(3, 64, (16, 8), generator=torch.Generator().manual_seed(1)).tolist()
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, report_to=[], use_cpu=True, disable_tqdm=True,
        **{"max_steps": 8, "save_strategy": "no", "logging_steps": 1, **options},
    )  # fmt: skip
    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(model), args=arguments, callbacks=callbacks,
        train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}),
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return trainer


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_progress_shows_the_loss_on_stderr(
    tiny_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    progress = TrainProgress()
    trainer = train(tiny_folder, tmp_path, [progress])
    out, err = capfd.readouterr()
    assert "{'" not in out + err
    assert "train:" not in out
    lines = [line for line in err.splitlines() if line.startswith("train:")]
    loss = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert lines[0].startswith("train: 1/8 steps")
    assert f"loss {loss[0]:.4g}" in lines[0]
    assert lines[-1].startswith("train: 8/8 steps (100%) done")
    assert f"loss {loss[-1]:.4g}" in lines[-1]
    progress.close()  # a second time does nothing
    assert capfd.readouterr().err == ""


def test_progress_ends_when_training_fails(
    tiny_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise RuntimeError("out of memory")

    progress = TrainProgress()
    with pytest.raises(RuntimeError, match="out of memory") as raised:
        train(tiny_folder, tmp_path, [progress, Act(3, fail)])
    progress.close(raised.value)
    assert "train: 2/8 steps (25%) stopped in" in capfd.readouterr().err


@pytest.mark.parametrize(("every", "expected"), [(1, [1, 2, 3, 4, 5, 6, 7, 8]), (3, [3, 6, 8]), (100, [8])])
def test_metrics_file_has_every_log_entry_and_the_last_step(
    every: int, expected: list[int], tiny_folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "metrics.jsonl"
    trainer = train(tiny_folder, tmp_path, [MetricsFile(path)], logging_steps=every)
    assert steps(path) == expected
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert [json.loads(line)["loss"] for line in path.read_text().splitlines()] == logged


def test_metrics_file_of_a_resumed_run_has_each_step_once(tiny_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    straight = train(tiny_folder, tmp_path, [MetricsFile(path)], save_strategy="steps", save_steps=5)
    first = path.read_text()
    with path.open("a") as file:
        file.write('{"step": 9, "lo')
    resumed = train(tiny_folder, tmp_path, [MetricsFile(path)], resume=tmp_path / "checkpoint-5")
    assert steps(path) == list(range(1, 9))
    assert [json.loads(line)["loss"] for line in path.read_text().splitlines()] == [
        json.loads(line)["loss"] for line in first.splitlines()
    ]
    assert straight.state.global_step == resumed.state.global_step == 8


@pytest.mark.parametrize("number", InterruptGuard.SIGNALS)
def test_a_signal_ends_the_step_saves_and_stops(number: signal.Signals, tiny_folder: Path, tmp_path: Path) -> None:
    handlers = [signal.getsignal(n) for n in InterruptGuard.SIGNALS]
    guard = InterruptGuard()
    with guard:
        trainer = train(tiny_folder, tmp_path, [guard, Act(3, lambda: os.kill(os.getpid(), number))])
    assert guard.interrupted
    assert trainer.state.global_step == 3
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]
    assert json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())["global_step"] == 3
    assert [signal.getsignal(n) for n in InterruptGuard.SIGNALS] == handlers


def test_a_second_signal_stops_at_once(tiny_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        assert "once more to stop at once" in capfd.readouterr().err
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("goes on")

    handler, guard = signal.getsignal(signal.SIGINT), InterruptGuard()
    with pytest.raises(KeyboardInterrupt), guard:
        train(tiny_folder, tmp_path, [guard, Act(3, twice)])
    assert guard.interrupted
    assert not list(tmp_path.glob("checkpoint-*"))
    assert signal.getsignal(signal.SIGINT) is handler


def test_nothing_is_saved_after_the_last_step(tiny_folder: Path, tmp_path: Path) -> None:
    guard = InterruptGuard()
    with guard:
        stop = Act(8, lambda: os.kill(os.getpid(), signal.SIGINT))
        trainer = train(tiny_folder, tmp_path, [guard, stop], save_strategy="steps", save_steps=4, save_total_limit=1)
    assert guard.interrupted
    assert trainer.state.global_step == 8
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]


def test_guard_in_another_thread_leaves_the_handlers_alone() -> None:
    import threading

    handler, seen = signal.getsignal(signal.SIGINT), []

    def enter() -> None:
        with InterruptGuard() as guard:
            seen.append((guard.interrupted, signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [(False, handler)]
