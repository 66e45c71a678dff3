"""An arm of :mod:`sparseopt.benchmarks.train_step`: built, warmed up, timed, checked."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import sparseopt as so
from sparseopt.benchmarks import train_arms, train_results, train_work
from sparseopt.benchmarks.train_arms import Built, CheckError
from sparseopt.benchmarks.train_data import Work
from sparseopt.benchmarks.train_settings import MASK_ARM, Arm, Settings
from sparseopt.benchmarks.train_weights import make_model, without_dropout
from sparseopt.progress import Progress

__all__ = ["Given", "TimedArm", "release"]


class Marks:
    """Moments within a step: CUDA events on a GPU, which are read after the step, else the clock."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.moments: list[Any] = []

    def mark(self) -> None:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.moments.append(event)
        else:
            self.moments.append(time.perf_counter())

    def milliseconds(self) -> list[float]:
        """Between neighbours; call it when the device is idle."""
        pairs = zip(self.moments[:-1], self.moments[1:], strict=True)
        if self.device.type == "cuda":
            return [begin.elapsed_time(end) for begin, end in pairs]
        return [1e3 * (end - begin) for begin, end in pairs]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _step(built: Built, losses: list[Callable[[], Tensor]], device: torch.device) -> tuple[dict[str, float], Tensor]:
    """One step: milliseconds of phases and ``total``, and the loss."""
    start = time.perf_counter()
    marks = Marks(device)
    marks.mark()
    last = torch.zeros(())
    for micro_batch in losses:
        loss = micro_batch()
        marks.mark()
        loss.backward()
        marks.mark()
        last = loss.detach().clone()  # a CUDA graph overwrites its loss
        del loss
    built.update()
    marks.mark()
    _synchronize(device)
    total = 1e3 * (time.perf_counter() - start)
    *micro, optimizer = marks.milliseconds()
    return {"forward": sum(micro[::2]), "backward": sum(micro[1::2]), "optimizer": optimizer, "total": total}, last


@dataclass(frozen=True)
class Given:
    """What all arms share: real rows, and the masks of ``sparse@mask``; None where there are none."""

    work: Work | None = None
    masks: so.MaskSet | None = None


class TimedArm:
    """An arm after its warm-up, which takes the rows of the steps before ``first``.

    Args:
        arm: which.
        settings: of the run.
        mode: "eager", "compiled", "whole" or "graphs".
        first: the first timed step.
        device: where.
        progress: told of every step.
        given: what all arms share.

    Raises:
        CheckError: the first loss is not that of an untrained policy.
        Unavailable: the arm's package is missing.
        torch.OutOfMemoryError: as it says.
    """

    def __init__(
        self,
        arm: Arm,
        settings: Settings,
        mode: str,
        first: int,
        device: torch.device,
        progress: Progress,
        given: Given,
    ) -> None:
        self.arm, self.settings, self.device, self.progress, self.work = arm, settings, device, progress, given.work
        self.first, self.last = first - settings.warmup, first
        cuda = device.type == "cuda"
        self.before = torch.cuda.memory_allocated(device) if cuda else None
        model = make_model(settings, device)
        if self.work is not None:
            without_dropout(model)
        masks = given.masks if arm.name == MASK_ARM else None
        self.built = train_arms.build(arm, model, master=settings.master, masks=masks)
        if settings.gradient_checkpointing:
            _checkpoint(model)
        self.built.model.train()
        self.losses = _losses(settings, self.built.model, self.work)
        train_arms.compile_model(model, mode)  # from here on: the reference of DPO needs no graph of its own
        for number in range(settings.warmup):
            if number == 1:
                # What set-up, compilation and the first allocation of the state left behind is not the step's memory.
                release(device)
            _, loss = _step(self.built, self.losses(self.first + number), device)
            if number == 0 and self.work is not None and mode == "eager":  # compiled code rounds in other places
                _first(arm, self.work, loss)
            progress.update(arm=arm.name, phase="warm-up")
        self.gradient_bytes = _gradient_bytes(self.built, self.losses(first - 1))
        _synchronize(device)
        self.peaks: tuple[int | None, int | None] = (None, None)
        self.times: dict[str, list[float]] = {phase: [] for phase in (*train_results.PHASES, "total")}
        self.seen: list[Tensor] = []

    def warm(self) -> None:
        """One more step of warm-up, on random tokens: after a pause."""
        _step(self.built, self.losses(self.last), self.device)

    def time(self, steps: range) -> None:
        """Times ``steps``, which follow those before."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        for step in steps:
            spent, loss = _step(self.built, self.losses(step), self.device)
            self.seen.append(loss)
            for phase, value in spent.items():
                self.times[phase].append(value)
            self.progress.update(arm=self.arm.name, phase="timed")
        self.last = steps.stop
        if self.device.type == "cuda":
            found = (torch.cuda.max_memory_allocated(self.device), torch.cuda.max_memory_reserved(self.device))
            self.peaks = (max(self.peaks[0] or 0, found[0]), max(self.peaks[1] or 0, found[1]))

    def result(self) -> dict[str, Any]:
        """What was measured.

        Returns:
            ``times`` (a list of milliseconds for each phase and ``total``), ``allocated_before_bytes`` (what other arms left:
            next to nothing), ``peak_allocated_bytes`` and ``peak_reserved_bytes`` (None on a CPU), ``state_bytes``,
            ``gradient_bytes``, ``trained``, ``loss``, ``tokens`` (of the timed steps, without padding).

        Raises:
            CheckError: a loss is not finite, or a frozen entry moved.
        """
        name, work = self.arm.name, self.work
        if not all(math.isfinite(float(loss)) for loss in self.seen):
            raise CheckError(f"{name}: the loss is not finite")
        try:
            # Equal rewards within every group give no gradient, and nothing to see.
            self.built.check(moves=work is None or work.moves(range(self.first, self.last)))
        except CheckError as error:
            raise CheckError(f"{name}: {error}") from error
        timed = range(self.last - len(self.seen), self.last)
        return {
            "times": self.times, "allocated_before_bytes": self.before, "peak_allocated_bytes": self.peaks[0],
            "peak_reserved_bytes": self.peaks[1], "loss": float(self.seen[-1]), "state_bytes": self.built.state_bytes(),
            "gradient_bytes": self.gradient_bytes, "trained": self.built.trained,
            "tokens": sum(_tokens(self.settings) if work is None else work.tokens(step) for step in timed),
        }  # fmt: skip


def _losses(settings: Settings, model: nn.Module, work: Work | None) -> Callable[[int], list[Callable[[], Tensor]]]:
    """Step -> the loss of each of its micro-batches."""
    if work is not None:
        return lambda step: work.losses(model, step)
    same = train_work.make_loss(settings.workload, model, settings.batch, settings.seq, settings.accumulation)
    return lambda step: same


def _tokens(settings: Settings) -> int:
    """Of a step of random tokens."""
    return settings.batch * settings.seq * settings.accumulation * (2 if settings.workload == "dpo" else 1)


def _first(arm: Arm, work: Work, loss: Tensor) -> None:
    try:
        work.check_first(loss)
    except CheckError as error:
        raise CheckError(f"{arm.name}: {error}") from error


def _checkpoint(model: Any) -> None:
    # Renamed in transformers 5.2x; the old names warn there.
    prefix = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    options = {f"{prefix}_checkpointing_kwargs": {"use_reentrant": False}}
    getattr(model, f"{prefix}_checkpointing_enable")(**options)


def _gradient_bytes(built: Built, losses: list[Callable[[], Tensor]]) -> int:
    """Of one more warm-up step: what is there between backward and the optimizer."""
    for loss in losses:
        loss().backward()
    count = built.gradient_bytes()
    built.update()
    return count


def release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
