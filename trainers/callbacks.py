"""Trainer callbacks that commands share: progress with the loss, a metrics file, and stopping without losing anything.

And what callbacks share that show a bar (:class:`HasBar`) or report values (:class:`NextEntry`, :func:`come_first`,
:func:`add_to_entry`).
"""

from __future__ import annotations

import inspect
import json
import math
import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, TypeVar

import numpy as np
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from sparseopt._files import atomic_write
from sparseopt.progress import Progress
from sparseopt.trainers.processes import Anyone, is_first, several

__all__ = ["HasBar", "InterruptGuard", "MetricsFile", "NextEntry", "StepTimer", "TrainProgress", "add_to_entry",
           "calling", "come_first", "quantiles"]  # fmt: skip

T = TypeVar("T")


# logged key -> label beside the bar
SHOWN = {
    "loss": "loss", "reward": "reward", "rewards/accuracies": "accuracy", "rewards/margins": "margin",
    "mean_token_accuracy": "accuracy", "grad_norm": "norm",
}  # fmt: skip


class HasBar(TrainerCallback):
    """Shows one progress bar at a time, which ends with training at the latest."""

    _progress: Progress | None = None

    def open(self, label: str, total: int, *, unit: str, completed: int = 0) -> None:
        """Begins a bar; the arguments are those of :class:`sparseopt.progress.Progress`."""
        self._progress = Progress(label, total, unit=unit, completed=completed)
        self._progress.__enter__()

    def close(self, error: BaseException | None = None) -> None:
        """Ends the bar; also after an error, when the trainer calls nobody."""
        if self._progress is not None:
            self._progress.__exit__(type(error) if error else None, error, None)
            self._progress = None

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        self.close()


class TrainProgress(HasBar):
    """A progress bar with the loss and other logged values; takes the place of transformers' own bar."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        self.open("train", state.max_steps, unit="step", completed=state.global_step)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
               logs: dict[str, float] | None = None, **kw: Any) -> None:  # fmt: skip
        if self._progress is not None and logs:
            values: dict[str, Any] = {label: float(logs[key]) for key, label in SHOWN.items() if key in logs}
            self._progress.update(completed=state.global_step, **values)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        if self._progress is not None and not control.should_log:  # the log entry of this step follows
            self._progress.update(completed=state.global_step)


class MetricsFile(TrainerCallback):
    """Appends what the trainer logs to a JSON-lines file, one object per log entry with its step.

    Args:
        path: the file.
        keys: entries that hold one of these are written.
    """

    def __init__(self, path: Path, keys: tuple[str, ...] = ("loss",)) -> None:
        self._path, self._keys = path, keys

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
        if logs and any(key in logs for key in self._keys):
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
    nothing is saved: that is for the caller. Several processes stop after the same step, whichever of them got the signal.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)
    ECHO = 3.0  # seconds in which a launcher may pass on what this process has got already

    def __init__(self) -> None:
        self._signalled = self._agreed = False
        self._anyone = Anyone()
        self._when = 0.0
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

    @property
    def interrupted(self) -> bool:
        """Whether training is to stop; of several processes, what :meth:`agree` found."""
        return self._agreed if several() else self._signalled

    def agree(self, device: torch.device) -> None:
        """After a step: every process learns whether one got a signal."""
        self._agreed |= self._anyone.ask(self._signalled, device)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._signalled:
            if several() and time.monotonic() - self._when < self.ECHO:
                return
            raise KeyboardInterrupt
        self._signalled, self._when = True, time.monotonic()
        if is_first():
            # os.write: a signal may arrive amid a print, which must not be entered twice.
            os.write(2, b"\nStopping after this step, with a checkpoint; once more to stop at once.\n")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        self.agree(args.device)
        if state.global_step >= state.max_steps:
            # Done: the caller keeps the outcome. transformers would train a step more when it resumes from here.
            control.should_save = False
        elif self.interrupted:
            control.should_training_stop = True
            control.should_save = True


class StepTimer(TrainerCallback):
    """Times steps, and the optimizer's part of them, into ``timing_info.json``; the first steps are left out.

    On a GPU times are read from events after training: nothing waits for the device in between.
    """

    WARM_UP = 2  # steps: allocations, compilation, caches

    def __init__(self, path: Path) -> None:
        self._path = path
        self._marks: list[tuple[Any, Any, Any, Any]] = []  # begin, before and after the optimizer, end of each step
        self._open: list[Any] = []
        self._cuda = False

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) / 1000 if self._cuda else end - start

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        self._cuda = args.device.type == "cuda"
        if self._cuda:
            torch.cuda.reset_peak_memory_stats(args.device)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        self._open = [self._mark()]

    def on_pre_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
                              **kw: Any) -> None:  # fmt: skip
        self._open.append(self._mark())

    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
                          **kw: Any) -> None:  # fmt: skip
        self._open.append(self._mark())

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        if len(self._open) == 3:
            begin, before, after = self._open
            self._marks.append((begin, before, after, self._mark()))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        if self._cuda:
            torch.cuda.synchronize(args.device)
        whole = [self._seconds(mark[0], mark[3]) for mark in self._marks]
        optimizer = [self._seconds(mark[1], mark[2]) for mark in self._marks]
        skipped = self.WARM_UP if len(whole) > self.WARM_UP else 0
        self._info: dict[str, Any] = {
            "device": torch.cuda.get_device_name(args.device) if self._cuda else "cpu",
            "timed_steps": len(whole) - skipped,
            "warm_up_steps": skipped,
            "step_seconds": quantiles(whole[skipped:]),
            "optimizer_seconds": quantiles(optimizer[skipped:]),
            "all_step_seconds": [round(seconds, 6) for seconds in whole],
        }
        if self._cuda:
            self._info["peak_reserved_bytes"] = torch.cuda.max_memory_reserved(args.device)
        atomic_write(self._path, json.dumps(self._info, indent=2))

    def summary(self) -> dict[str, Any]:
        """``step_seconds`` and ``optimizer_seconds``: median, p20 and p80 of the steps of this process."""
        return {key: self._info[key] for key in ("step_seconds", "optimizer_seconds")}


def quantiles(seconds: list[float]) -> dict[str, float] | None:
    """Median, p20 and p80; None of nothing."""
    if not seconds:
        return None
    low, median, high = np.quantile(seconds, (0.2, 0.5, 0.8))
    return {"median": round(float(median), 6), "p20": round(float(low), 6), "p80": round(float(high), 6)}


# ---- values for trackers -------------------------------------------------------------------------------------------------
def calling(kind: type[T]) -> T | None:
    """The innermost object of a class in whose method this call happens; None if there is none.

    Trainers hand their callbacks neither themselves nor the handler that holds them.
    """
    frame = inspect.currentframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, kind):
            return owner
        frame = frame.f_back
    return None


def come_first(callback: TrainerCallback) -> None:
    """Moves a callback, from its ``on_train_begin``, before the trackers', which come before a user's.

    They all see one ``logs`` in turn: what this callback adds to it in ``on_log`` reaches them.
    """
    handler = calling(CallbackHandler)
    if handler is not None:
        others = [other for other in handler.callbacks if other is not callback]
        # In place, because the handler is going through the list: all others after this one keep their places.
        handler.callbacks[:] = [callback, *others]


def add_to_entry(values: dict[str, Any], logs: dict[str, Any], state: TrainerState) -> None:
    """Adds values to a log entry, and to the copy that the trainer put into ``log_history`` before it asked anybody."""
    logs.update(values)
    if state.log_history and state.log_history[-1].get("step") == state.global_step:
        state.log_history[-1].update(values)


class NextEntry(TrainerCallback):
    """Keeps values for trackers until the trainer's next log entry of training; one of an evaluation gets none."""

    def __init__(self) -> None:
        self._values: dict[str, Any] = {}

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
               logs: dict[str, Any] | None = None, **kw: Any) -> None:  # fmt: skip
        if self._values and logs is not None and not any(key.startswith("eval_") for key in logs):
            add_to_entry(self._values, logs, state)
            self._values = {}
