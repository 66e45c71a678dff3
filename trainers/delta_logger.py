"""DeltaLogger: logs what training changes, at scheduled steps, from any transformers or TRL trainer."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from sparseopt._sharded import is_sharded, whole
from sparseopt.deltas.base import SaveBase, state_of
from sparseopt.deltas.log import DeltaLog
from sparseopt.deltas.statistics import AGGREGATES
from sparseopt.optim.sparse_adamw import SparseAdamW
from sparseopt.trainers.callbacks import add_to_entry, come_first
from sparseopt.trainers.processes import in_shards

__all__ = ["DeltaLogger", "Schedule", "parse_schedule", "sparse_of"]

DEFAULTS = {"dpo": "10,20,30,40,100,150,200", "grpo": "10:80:10,100:1000:100"}
FORMS = "steps (10,20,30), ranges with both ends (10:80:10), every:N, or one of " + ", ".join(DEFAULTS)


class Schedule:
    """Training steps: ``step in schedule``, and in order where there is an end.

    Attributes:
        steps: the steps named, sorted.
        every: further ones: each multiple of one of these.
        n_steps: none beyond this; None = no end.
    """

    def __init__(self, steps: Iterable[int], every: Iterable[int] = (), n_steps: int | None = None) -> None:
        self.n_steps = n_steps
        self.steps = tuple(sorted({step for step in steps if n_steps is None or step <= n_steps}))
        self.every = tuple(sorted(set(every)))

    def __contains__(self, step: object) -> bool:
        if not isinstance(step, int) or step < 1 or (self.n_steps is not None and step > self.n_steps):
            return False
        return step in self.steps or any(step % period == 0 for period in self.every)

    def __iter__(self) -> Iterator[int]:
        if not self.every:
            return iter(self.steps)
        if self.n_steps is None:
            raise ValueError(f"the schedule every:{self.every[0]} has no end: give the number of training steps.")
        return (step for step in range(1, self.n_steps + 1) if step in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __bool__(self) -> bool:
        return bool(self.steps or self.every)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Schedule):
            return (self.steps, self.every, self.n_steps) == (other.steps, other.every, other.n_steps)
        return list(self) == other if isinstance(other, list) else NotImplemented

    def __hash__(self) -> int:
        return hash((self.steps, self.every, self.n_steps))

    def __repr__(self) -> str:
        parts = [*map(str, self.steps), *(f"every:{period}" for period in self.every)]
        return f"Schedule({','.join(parts)})"


def parse_schedule(value: str | Iterable[int] | Schedule, n_steps: int | None = None) -> Schedule:
    """Reads a schedule.

    Args:
        value: ``"10,20,30"``, ``"10:80:10,100:1000:100"`` (start:stop:step, both ends included), ``"every:5"``,
            ``"dpo"`` = 10,20,30,40,100,150,200, ``"grpo"`` = 10 to 80 by 10, then 100 to 1000 by 100, or several of these
            with commas between; or whole numbers.
        n_steps: steps of the training; later ones are left out.

    Raises:
        ValueError: anything else, or no step at all.
        TypeError: numbers that are not whole.
    """
    if n_steps is not None and n_steps < 1:
        raise ValueError(f"n_steps must be 1 or more, got {n_steps}.")
    if isinstance(value, Schedule):
        return Schedule(value.steps, value.every, n_steps if n_steps is not None else value.n_steps)
    steps: list[int] = []
    every: list[int] = []
    if isinstance(value, str):
        for part in ",".join(DEFAULTS.get(piece.strip().lower(), piece) for piece in value.split(",")).split(","):
            _parse(part.strip(), value, steps, every)
    else:
        for step in value:
            if isinstance(step, bool) or not isinstance(step, int):
                raise TypeError(f"a schedule holds whole numbers, got {step!r}.")
            steps.append(_positive(step, value))
    if not steps and not every:
        raise ValueError(f"the schedule {value!r} holds no step; expected {FORMS}.")
    return Schedule(steps, every, n_steps)


def _parse(part: str, whole: str, steps: list[int], every: list[int]) -> None:
    head, *rest = (piece.strip() for piece in part.split(":"))
    try:
        if head.lower() == "every" and len(rest) == 1:
            every.append(_positive(int(rest[0]), whole))
        elif not rest:
            steps.append(_positive(int(head), whole))
        elif len(rest) == 2:
            start, stop, step = _positive(int(head), whole), int(rest[0]), _positive(int(rest[1]), whole)
            if stop < start:
                raise ValueError(f"the range {part!r} of the schedule ends before it starts.")
            steps.extend(range(start, stop + 1, step))
        else:
            raise ValueError(f"{part!r} in the schedule {whole!r} is not understood; expected {FORMS}.")
    except ValueError as error:
        if "schedule" in str(error):
            raise
        raise ValueError(f"{part!r} in the schedule {whole!r} is not understood; expected {FORMS}.") from None


def _positive(number: int, whole: object) -> int:
    if number < 1:
        raise ValueError(f"the schedule {whole!r} holds {number}; steps begin at 1.")
    return number


class DeltaLogger(TrainerCallback):
    """Keeps a :class:`~sparseopt.DeltaLog` of a training: ``callbacks=[DeltaLogger(folder, "dpo")]``.

    With a :class:`~sparseopt.SparseAdamW` (:func:`~sparseopt.attach`) a step costs a copy of the active entries, else a copy
    of the model; the rest happens beside training. When the trainer resumes from a checkpoint, steps logged after it are
    dropped and logged again. In a distributed run the first process logs.

    Under FSDP2 the log is the same. At the beginning and at each logged step every process takes part in putting the weights
    together, one parameter at a time, with a SparseAdamW too: all weights are gathered once, and the first process needs CPU
    memory for the whole model three times.

    The statistics of the newest finished step join the trainer's next log entry, for trackers and ``log_history`` alike:
    ``subnet/mean_l2_from_init``, ``subnet/mean_frac_big_from_init``, ``subnet/attn_mean_l2``, ``subnet/mlp_mean_l2``, and
    ``subnet/step``, which they belong to. (Weights & Biases shows transformers' keys as ``train/subnet/...``.)

    A trainer tells nobody when it fails: use the logger as a context manager, or :meth:`close` it, to have an error of the
    last record raised then. What is being written is completed in any case.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        schedule: str | Iterable[int] | Schedule,
        save_base: SaveBase = "auto",
        name: str | None = None,
        revision: str | None = None,
        *,
        final: bool = False,
        restart: bool = False,
    ) -> None:
        """Nothing is written before training begins.

        Args:
            path: the log's folder.
            schedule: see :func:`parse_schedule`.
            save_base, name, revision: see :meth:`sparseopt.DeltaLog.start`.
            final: log the last step of the training too.
            restart: where the folder holds steps of the same base and training begins at step 0, drop them; else that is
                an error.
        """
        self.log = DeltaLog(path)
        self.schedule = parse_schedule(schedule)
        self._options: dict[str, Any] = {"save_base": save_base, "name": name, "revision": revision}
        self._final, self._restart = final, restart
        self._active = self._shards = self._writes = False
        self._reported: int | None = None

    # ---- what the trainer calls ------------------------------------------------------------------------------------------
    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
                       model: Any = None, **kw: Any) -> None:  # fmt: skip
        self._shards = in_shards(args, model, "DeltaLogger")
        self._writes = state.is_world_process_zero
        if not (self._writes or self._shards):
            return
        come_first(self)  # on every process that takes part: callbacks that gather must be in one order everywhere
        if self._active:  # an earlier training of this trainer ended in an error
            self.close()
        resume = state.global_step or (0 if self._restart else None)
        self.log = DeltaLog(self.log.path)
        base = self._together(model) if self._shards else model
        if self._writes:
            self.log.start(base, **self._options, resume_step=resume, module=model)
        self._active, self._reported = True, None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
                    model: Any = None, optimizer: Any = None, **kw: Any) -> None:  # fmt: skip
        last = self._final and state.global_step == state.max_steps
        if self._active and (last or state.global_step in self.schedule):
            source = self._together(model) if self._shards else sparse_of(optimizer) or model
            if self._writes:
                self.log.record(state.global_step, source)
        if self._active and (control.should_save or _will_save(args, state)):
            self.log.flush()  # a checkpoint must not be ahead of the log: a training that resumes from it logs what follows

    def _together(self, model: torch.nn.Module) -> dict[str, Tensor]:
        """The whole state dict of a model in shards, on the CPU of the process that writes; nothing on the others."""
        gathered: dict[int, Tensor] = {}
        result: dict[str, Tensor] = {}
        for name, tensor in state_of(model).items():
            if is_sharded(tensor) and id(tensor) not in gathered:  # tied ones once, so that they stay tied
                entire = whole(tensor)
                gathered[id(tensor)] = entire.cpu() if self._writes else entire.new_empty(0)
            result[name] = gathered.get(id(tensor), tensor)
        return result if self._writes else {}

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        if self._active and args.save_strategy == SaveStrategy.EPOCH:
            self.log.flush()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
               logs: dict[str, Any] | None = None, **kw: Any) -> None:  # fmt: skip
        if not self._active or logs is None or any(key.startswith("eval_") for key in logs):
            return
        if "train_runtime" in logs:  # the last entry: nothing is left for later
            self.log.flush()
        newest = self.log.newest
        if newest is None or newest["step"] == self._reported:
            return
        self._reported = newest["step"]
        values = {f"subnet/{key}": newest[key] for key in AGGREGATES if newest[key] is not None}
        values["subnet/step"] = newest["step"]
        add_to_entry(values, logs, state)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        self.close()

    # ---- ending ----------------------------------------------------------------------------------------------------------
    def close(self) -> None:
        """Waits for the last record; raises its error."""
        self._active = False
        self.log.close()

    def __enter__(self) -> DeltaLogger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _will_save(args: TrainingArguments, state: TrainerState) -> bool:
    """Whether the trainer saves a checkpoint after this step; it decides so after this callback."""
    periodic = args.save_strategy == SaveStrategy.STEPS and state.save_steps > 0
    return (periodic and state.global_step % state.save_steps == 0) or state.global_step >= state.max_steps


def sparse_of(optimizer: Any) -> SparseAdamW | None:
    """The SparseAdamW within what accelerate may have wrapped around it."""
    while optimizer is not None and not isinstance(optimizer, SparseAdamW):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer
