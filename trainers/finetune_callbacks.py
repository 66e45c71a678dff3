"""Callbacks of a dynamic sparse fine-tuning: timed mask updates, their history as a file and a bar, evaluation with a bar."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from sparseopt._files import atomic_write
from sparseopt.progress import format_values
from sparseopt.trainers.callbacks import HasBar, quantiles
from sparseopt.trainers.dynamic import DynamicSparsity

__all__ = ["HISTORY", "EvaluationProgress", "MaskHistory", "TimedSparsity"]

HISTORY = "mask_history.json"
SHOWN = {"sparsity": "sparsity", "churn": "churn", "regrown": "regrown", "inactive_grad_norm": "inactive norm"}


class TimedSparsity(DynamicSparsity):
    """DynamicSparsity that knows how long its updates take; the device is waited for around them.

    Attributes:
        seconds: of each update of this process.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.seconds: list[float] = []

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        if self.engine is None or not self.engine.plan.updates(state.global_step):
            return
        _wait(args.device)
        began = time.perf_counter()
        super().on_step_end(args, state, control, **kw)
        _wait(args.device)
        self.seconds.append(time.perf_counter() - began)

    def summary(self) -> dict[str, float] | None:
        """Seconds of the updates of this process: median, p20, p80; None if there were none."""
        return quantiles(self.seconds)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class MaskHistory(HasBar):
    """Keeps the file of mask changes up to date, and shows a bar of the updates, or a line for each.

    The file holds ``layers``, ``layer_entries``, ``first`` (step 0: ``active``, ``sparsity``) and ``updates``, the records of
    :class:`sparseopt.optim.dynamic.engine.DynamicSparsity`.
    """

    def __init__(self, dynamic: TimedSparsity, path: Path) -> None:
        self._dynamic, self._path = dynamic, path
        self._first: dict[str, Any] = {}
        self._total = 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        engine = self._dynamic.engine
        assert engine is not None
        if state.global_step == 0:
            self._first = {"step": 0, "active": engine.masks.active_parameters, "sparsity": engine.sparsity}
        else:  # of the run that is continued
            self._first = json.loads(self._path.read_text())["first"]
        self._write()
        self._total = sum(map(engine.plan.updates, range(1, state.max_steps + 1)))
        if self._total and sys.stderr.isatty():
            self.open("masks", self._total, unit="update", completed=len(engine.history))

    def _write(self) -> None:
        engine = self._dynamic.engine
        assert engine is not None
        content = {
            "layers": len(engine.layers), "layer_entries": engine.masks.total_parameters, "first": self._first,
            "updates": engine.history,
        }  # fmt: skip
        atomic_write(self._path, json.dumps(content, indent=1, allow_nan=False))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        engine = self._dynamic.engine
        if engine is None or not engine.plan.updates(state.global_step):
            return
        self._write()
        record = engine.history[-1]
        values = {label: record[key] for key, label in SHOWN.items() if record[key] is not None}
        if self._progress is not None:
            self._progress.update(**values)
            if len(engine.history) == self._total:
                self.close()
            return
        count, took = f"{len(engine.history)}/{self._total}", format_values({"took": self._dynamic.seconds[-1]})
        print(f"masks: update {count} after step {state.global_step} {took} s, {format_values(values)}",
              file=sys.stderr, flush=True)  # fmt: skip


class EvaluationProgress(HasBar):
    """A bar on a terminal while held-out samples are evaluated, and a line with the outcome.

    Attributes:
        stage: what is evaluated, if it is not the model after the trainer's step.
    """

    def __init__(self) -> None:
        self.stage: str | None = None

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kw: Any,
    ) -> None:
        if self._progress is None and sys.stderr.isatty():
            self.open("evaluate", len(eval_dataloader), unit="batch")
        if self._progress is not None:
            self._progress.update()

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
        metrics: dict[str, float] | None = None, **kw: Any,
    ) -> None:  # fmt: skip
        self.close()
        figures = {key.removeprefix("eval_"): value for key, value in (metrics or {}).items()}
        shown = {f"held-out {key}": figures[key] for key in ("loss", "accuracy") if key in figures}
        when = self.stage or ("first masks" if not state.global_step else f"step {state.global_step}")
        print(f"evaluate: {when}, {format_values(shown)}", file=sys.stderr, flush=True)
