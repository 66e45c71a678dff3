"""What a dynamic sparse fine-tuning can be told, checked before anything is loaded."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import SchedulerType

from sparseopt._named import find_named
from sparseopt.optim.dynamic.criteria import Criterion, check_criterion, is_pruning_method
from sparseopt.optim.dynamic.engine import DynamicSparsity as Engine
from sparseopt.optim.dynamic.patterns import parse_pattern
from sparseopt.optim.dynamic.policy import SparsitySchedule, check_sparsity

__all__ = ["TASKS", "FinetuneSettings", "parse_schedule"]

TASKS = ("causal-lm", "sequence-classification")
TRACKERS = ("wandb", "trackio", "tensorboard", "none")

# What a continued run may differ in; the others would make another training of it.
FREE = ("output_dir", "device", "resume", "report_to", "tokenizer")
_SECTIONS = {
    "model": ("model_name", "task", "dropout"),
    "data": ("dataset", "dataset_split", "eval_dataset", "eval_fraction", "text_column", "label_column", "max_length"),
    "sparsity": (
        "sparsity_ratio", "sparsity_type", "mask_update_interval", "mask_update_fraction", "use_rigl", "use_topk_attention",
        "topk_ratio", "policy", "target", "dropped", "distribution", "exclude", "sparsity_schedule", "criterion",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class FinetuneSettings:
    """The arguments of :func:`sparseopt.sparse_finetune`, which describes them."""

    model_name: Any
    dataset: Any
    sparsity_ratio: float
    sparsity_type: str
    mask_update_interval: int
    mask_update_fraction: float
    use_rigl: bool
    use_topk_attention: bool
    topk_ratio: float
    learning_rate: float
    batch_size: int
    num_epochs: int
    warmup_steps: int
    gradient_accumulation_steps: int
    fp16: bool
    gradient_checkpointing: bool
    output_dir: str | os.PathLike[str]
    policy: str | None
    target: str
    dropped: str
    distribution: str
    exclude: str | Sequence[str]
    sparsity_schedule: SparsitySchedule | str | None
    criterion: Criterion | str
    task: str
    tokenizer: Any
    dataset_split: str
    eval_dataset: Any
    eval_fraction: float
    eval_steps: int | None
    text_column: str
    label_column: str
    max_length: int
    max_steps: int | None
    weight_decay: float
    dropout: float | None
    lr_scheduler_type: str
    max_grad_norm: float
    seed: int
    logging_steps: int
    save_steps: int
    report_to: str | Sequence[str]
    resume: bool
    device: str

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity_ratio, "sparsity_ratio")
        for name in (
            "mask_update_interval",
            "batch_size",
            "num_epochs",
            "gradient_accumulation_steps",
            "logging_steps",
        ):
            _whole(name, getattr(self, name), 1)
        for name in ("max_steps", "eval_steps"):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name), 1)
        _whole("max_length", self.max_length, 2)
        for name in ("warmup_steps", "save_steps", "seed"):
            _whole(name, getattr(self, name), 0)
        _number("mask_update_fraction", self.mask_update_fraction, 0, 1)
        _number("topk_ratio", self.topk_ratio, 0, 1, above=True)
        _number("learning_rate", self.learning_rate, 0, math.inf)
        _number("weight_decay", self.weight_decay, 0, math.inf)
        _number("max_grad_norm", self.max_grad_norm, 0, math.inf)
        _number("eval_fraction", self.eval_fraction, 0, 0.9)
        if self.dropout is not None:
            _number("dropout", self.dropout, 0, 0.95)
        _choice("task", self.task, TASKS)
        _choice("lr_scheduler_type", self.lr_scheduler_type, tuple(kind.value for kind in SchedulerType))
        for tracker in self.trackers:
            _choice("report_to", tracker, TRACKERS)
        check_criterion(self.score)
        self._check_engine()

    def _check_engine(self) -> None:
        """Asks the engine itself, with a layer that fits any pattern."""
        pattern = parse_pattern(self.sparsity_type)
        options = self.engine_options()
        del options["exclude"], options["criterion"]
        if options["sparsity_schedule"] is not None:
            options["sparsity_schedule"] = lambda step, total: 0.5
        initial = "random" if options["initial"] is not None else None
        Engine(nn.Linear(pattern.m or 8, 4, bias=False), total_steps=1, **{**options, "initial": initial})

    # ---- what follows from them ----------------------------------------------------------------------------------------
    @property
    def masks_policy(self) -> str:
        """rigl, set, gradual or static."""
        if self.policy is not None:
            return self.policy
        if self.use_rigl:
            return "rigl"
        return "static" if self.sparsity_schedule is None else "gradual"

    @property
    def schedule(self) -> SparsitySchedule | None:
        return parse_schedule(self.sparsity_schedule, self.mask_update_interval)

    @property
    def score(self) -> Criterion:
        return find_named(self.criterion, "criterion") if isinstance(self.criterion, str) else self.criterion

    @property
    def patterns(self) -> list[str]:
        """Of excluded parameters."""
        return [self.exclude] if isinstance(self.exclude, str) else list(self.exclude)

    @property
    def trackers(self) -> list[str]:
        names = [self.report_to] if isinstance(self.report_to, str) else list(self.report_to)
        return [name for name in names if name != "none"]

    def engine_options(self) -> dict[str, Any]:
        """Arguments of :class:`sparseopt.trainers.DynamicSparsity`."""
        score = self.score
        return {
            "sparsity": self.sparsity_ratio, "pattern": self.sparsity_type, "policy": self.masks_policy,
            "interval": self.mask_update_interval, "fraction": self.mask_update_fraction, "target": self.target,
            "dropped": self.dropped, "distribution": self.distribution, "exclude": self.patterns, "criterion": score,
            # Masks that stay would never ask a score function: it chooses the first ones then.
            "initial": "criterion" if score is not None and self.masks_policy == "static" else None,
            "sparsity_schedule": self.schedule, "seed": self.seed, "watch_gradients": not is_static(self),
        }  # fmt: skip

    def record(self) -> dict[str, dict[str, Any]]:
        """All settings by section, as JSON has them, for the run folder."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        sections: dict[str, dict[str, Any]] = {
            section: {name: _said(values.pop(name)) for name in names} for section, names in _SECTIONS.items()
        }
        sections["output"] = {"dir": str(values["output_dir"])}
        sections["training"] = {name: _said(value) for name, value in values.items() if name not in FREE}
        sections["training"] |= {"resume": self.resume, "device": self.device}
        return sections


def is_static(settings: FinetuneSettings) -> bool:
    return settings.masks_policy == "static"


def parse_schedule(schedule: SparsitySchedule | str | None, interval: int = 1) -> SparsitySchedule | None:
    """A function of ``(step, total_steps)``: itself, or by name.

    ``linear:A:B`` goes from sparsity A to B, which the last update reaches, wherever the interval puts it;
    ``module:function`` and ``file.py:function`` name one.

    Raises:
        ValueError: not understood, or A or B outside [0, 1).
    """
    if schedule is None or not isinstance(schedule, str):
        if schedule is not None and not callable(schedule):
            raise TypeError(f"sparsity_schedule must be a function of (step, total_steps), got {schedule!r}.")
        return schedule
    if not schedule.startswith("linear:"):
        found: SparsitySchedule = find_named(schedule, "sparsity_schedule")
        return found
    try:
        first, last = (float(part) for part in schedule.removeprefix("linear:").split(":"))
    except ValueError:
        raise ValueError(f"sparsity_schedule {schedule!r} is not understood: expected linear:0.1:0.9.") from None
    for value in (first, last):
        check_sparsity(value, f"each end of sparsity_schedule {schedule!r}")

    def linear(step: int, total_steps: int) -> float:
        end = total_steps // interval * interval
        return first + (last - first) * min(1.0, step / end) if end else first

    return linear


def check_schedule(plan: Any) -> None:
    """Asks a schedule for every step at which it will be asked, before training begins.

    Raises:
        ValueError: NaN or something outside [0, 1) for one of them.
    """
    if plan.schedule is not None:
        for step in (0, *(step for step in range(1, plan.total_steps + 1) if plan.updates(step))):
            plan.sparsity_at(step)


def pruning_name(criterion: Criterion) -> str:
    """What a criterion is called in a log."""
    if criterion is None:
        return "|w|"
    kind: Any = type(criterion) if is_pruning_method(criterion) and not isinstance(criterion, type) else criterion
    return getattr(kind, "__name__", type(criterion).__name__)


def _whole(name: str, value: object, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name} must be a whole number, {low} or more, got {value!r}.")


def _number(name: str, value: object, low: float, high: float, above: bool = False) -> None:
    good = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not good or not (low < value if above else low <= value) or not value <= high:  # type: ignore[operator]
        limits = f"at least {low}" if high == math.inf else f"in {'(' if above else '['}{low}, {high}]"
        raise ValueError(f"{name} must be a number {limits}, got {value!r}.")


def _choice(name: str, value: object, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}.")


def _said(value: Any) -> Any:
    """A setting as JSON has it: objects by what they are, functions by their name."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (list, tuple)):
        return [_said(part) for part in value]
    if isinstance(value, nn.Module):
        return f"{type(value).__name__} of {sum(p.numel() for p in value.parameters())} weights"
    if isinstance(value, torch.Tensor) or not isinstance(value, (type, Callable)):  # type: ignore[arg-type]
        return type(value).__name__
    return f"{getattr(value, '__module__', '')}:{getattr(value, '__qualname__', type(value).__qualname__)}"
