"""Trainer callbacks that commands share: progress with the loss, a metrics file, and stopping without losing anything."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparseopt._files import atomic_write
from sparseopt.progress import Progress

__all__ = ["InterruptGuard", "MetricsFile", "TrainProgress"]


# logged key -> label beside the bar
SHOWN = {"loss": "loss", "rewards/accuracies": "accuracy", "rewards/margins": "margin", "grad_norm": "norm"}


class TrainProgress(TrainerCallback):
    """A progress bar with the loss and other logged values; takes the place of transformers' own bar."""

    def __init__(self) -> None:
        self._progress: Progress | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        self._progress = Progress("train", state.max_steps, unit="step", completed=state.global_step)
        self._progress.__enter__()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
               logs: dict[str, float] | None = None, **kw: Any) -> None:  # fmt: skip
        if self._progress is not None and logs:
            values: dict[str, Any] = {label: float(logs[key]) for key, label in SHOWN.items() if key in logs}
            self._progress.update(completed=state.global_step, **values)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        if self._progress is not None and not control.should_log:  # the log entry of this step follows
            self._progress.update(completed=state.global_step)

    def close(self, error: BaseException | None = None) -> None:
        """Ends the bar; also after an error, when the trainer calls nobody."""
        if self._progress is not None:
            self._progress.__exit__(type(error) if error else None, error, None)
            self._progress = None

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        self.close()


class MetricsFile(TrainerCallback):
    """Appends what the trainer logs to a JSON-lines file, one object per log entry with its step."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        # A resumed run repeats the steps after its checkpoint: entries of the interrupted one past it are dropped.
        if self._path.exists():
            kept = [line for line in self._path.read_text().splitlines() if _step_of(line) <= state.global_step]
            atomic_write(self._path, "".join(f"{line}\n" for line in kept))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True  # whatever logging_steps: the end is in the file

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
               logs: dict[str, float] | None = None, **kw: Any) -> None:  # fmt: skip
        if logs and "loss" in logs:
            with self._path.open("a") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")


def _step_of(line: str) -> float:
    """Step of an entry; infinity for a line that a kill cut off."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return math.inf


class InterruptGuard(TrainerCallback):
    """First Ctrl-C or SIGTERM: finish the step, save a checkpoint, stop. Second: stop at once.

    A context manager around ``trainer.train()``; afterwards ``interrupted`` says whether it happened. After the last step
    nothing is saved: that is for the caller.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.interrupted = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> InterruptGuard:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            self._previous = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        # os.write: a signal may arrive amid a print, which must not be entered twice.
        os.write(2, b"\nStopping after this step, with a checkpoint; once more to stop at once.\n")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        if state.global_step >= state.max_steps:
            # Done: the caller keeps the outcome. transformers would train a step more when it resumes from here.
            control.should_save = False
        elif self.interrupted:
            control.should_training_stop = True
            control.should_save = True
