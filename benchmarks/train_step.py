"""Whole training steps: dense AdamW, LoRA, 8-bit AdamW and sparse AdamW, in time and memory.

    python -m sparseopt.benchmarks.train_step --shape llama-3.2-3b --workload lm --batch 1 --seq 512 --output FOLDER

Each arm is built alone, from a model of the same seed, so that its peak memory is its own; the list of arms is gone through
in several passes, so that a slow phase of the machine does not hit one arm only. A step is timed from its start to the end
of the device's work, Python included; CUDA events within it tell forward, backward and optimizer (clipping, step and
zero_grad) apart. Before anything is timed every sparse arm is compared with dense AdamW on a small model; after timing,
the frozen entries are compared with what they were. Where either fails, no speed is printed or stored.
"""

from __future__ import annotations

import datetime
import gc
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sparseopt as so
from sparseopt.benchmarks import train_arms, train_results, train_work
from sparseopt.benchmarks.train_arms import Built, CheckError, Unavailable
from sparseopt.benchmarks.train_data import Work, prepare
from sparseopt.benchmarks.train_settings import MASK_ARM, Arm, Settings, parse
from sparseopt.benchmarks.train_weights import make_model, without_dropout
from sparseopt.progress import Progress, announce_device
from sparseopt.shapes import build_shape

__all__ = ["main", "measure", "run"]


# ---- measuring -------------------------------------------------------------------------------------------------------
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
        last = loss.detach()
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


def measure(
    arm: Arm, settings: Settings, mode: str, steps: range, device: torch.device, progress: Progress, given: Given
) -> dict[str, Any]:
    """Builds an arm, warms it up and times ``steps``; warm-up takes the rows of the steps before them.

    Returns:
        ``times`` (a list of milliseconds for each phase and ``total``), ``allocated_before_bytes`` (what other arms left:
        next to nothing), ``peak_allocated_bytes`` and ``peak_reserved_bytes`` (None on a CPU), ``state_bytes``,
        ``gradient_bytes``, ``trained``, ``loss``, ``tokens`` (of the timed steps, without padding).

    Raises:
        CheckError: the loss is not finite, the first one is not that of an untrained policy, or a frozen entry moved.
        Unavailable: the arm's package is missing.
        torch.OutOfMemoryError: as it says.
    """
    cuda = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if cuda else None
    model = make_model(settings, device)
    work = given.work
    if work is not None:
        without_dropout(model)
    masks = given.masks if arm.name == MASK_ARM else None
    built = train_arms.build(arm, model, master=settings.master, masks=masks)
    if settings.gradient_checkpointing:
        _checkpoint(model)
    built.model.train()
    losses = _losses(settings, built.model, work)
    train_arms.compile_model(model, mode)  # from here on: the reference of DPO needs no graph of its own
    for number in range(settings.warmup):
        if number == 1:
            # What set-up, compilation and the first allocation of the state left behind is not the step's memory.
            _release(device)
        _, loss = _step(built, losses(steps.start - settings.warmup + number), device)
        if number == 0 and work is not None and mode == "eager":  # compiled code rounds in other places
            _first(arm, work, loss)
        progress.update(arm=arm.name, phase="warm-up")
    gradient_bytes = _gradient_bytes(built, losses(steps.start - 1))
    _synchronize(device)
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    times: dict[str, list[float]] = {phase: [] for phase in (*train_results.PHASES, "total")}
    seen = []
    for step in steps:
        spent, loss = _step(built, losses(step), device)
        seen.append(loss)
        for phase, value in spent.items():
            times[phase].append(value)
        progress.update(arm=arm.name, phase="timed")
    peaks = (torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)) if cuda else (None, None)
    final = float(seen[-1])
    if not all(math.isfinite(float(loss)) for loss in seen):
        raise CheckError(f"{arm.name}: the loss is not finite")
    try:
        # Equal rewards within every group give no gradient, and nothing to see.
        built.check(moves=work is None or work.moves(range(steps.start - settings.warmup, steps.stop)))
    except CheckError as error:
        raise CheckError(f"{arm.name}: {error}") from error
    return {
        "times": times, "allocated_before_bytes": before, "peak_allocated_bytes": peaks[0],
        "peak_reserved_bytes": peaks[1], "loss": final, "state_bytes": built.state_bytes(),
        "gradient_bytes": gradient_bytes, "trained": built.trained,
        "tokens": sum(_tokens(settings) if work is None else work.tokens(step) for step in steps),
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


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _check(settings: Settings, mode: str, device: torch.device, masks: so.MaskSet | None) -> None:
    """Sparse arms on a small model; a mask file has no place there: a random mask of its density stands in for it."""
    for arm in settings.arms:
        if arm.sparse:
            small = build_shape("tiny", device=device, dtype=getattr(torch, settings.dtype))
            stand_in = arm if arm.density is not None else Arm(arm.name, max(0.01, masks.density if masks else 1.0))
            train_arms.check_small(stand_in, small, settings.workload, mode=mode, master=settings.master)


def _prepare(settings: Settings, device: torch.device, masks: so.MaskSet | None) -> Given:
    """Real rows and fitted masks, before anything is timed."""
    if settings.data is None and masks is None:
        return Given()
    model = make_model(settings, device)
    if masks is not None:
        assert settings.mask is not None
        masks = train_arms.fit_masks(model, masks, settings.mask)
    work = prepare(settings, model, device, fixed=settings.modes != ("eager",)) if settings.data else None
    return Given(work, masks)


def run(settings: Settings, commit: str | None = None) -> tuple[dict[str, dict[str, Any]], bool]:
    """Checks and measures everything.

    Returns:
        (mode -> suite, whether Ctrl-C ended it early: then the suites hold what had been measured by then).

    Raises:
        CheckError: a result is wrong; there is no speed.
    """
    device = announce_device(settings.device)
    suites: dict[str, dict[str, Any]] = {}
    interrupted = False
    masks = so.MaskSet.load(settings.mask) if settings.mask else None
    given: Given | None = None
    for mode in settings.modes:
        _check(settings, mode, device, masks)
        if given is None:
            given = _prepare(settings, device, masks)
            _release(device)
        arms: dict[str, dict[str, Any]] = {}
        try:
            _passes(settings, mode, device, arms, given)
        except KeyboardInterrupt:
            interrupted = True
        if not any("times" in arm for arm in arms.values()) and interrupted:
            break
        about = {
            "date": datetime.date.today().isoformat(),
            "commit": commit or train_results.commit(),
            "command": settings.command(mode),
            "environment": train_results.environment(device),
        }
        record = settings.record(mode) | ({"interrupted": True} if interrupted else {})
        finished = {arm: _summary(values) for arm, values in arms.items()}
        work = given.work
        rows = {} if work is None else {"data": work.about, "generation": work.generation}
        suites[mode] = train_results.suite(finished, record, about, rows)
        if interrupted:
            break
    return suites, interrupted


def _passes(settings: Settings, mode: str, device: torch.device, arms: dict[str, dict[str, Any]], given: Given) -> None:
    """Measures all arms in turns; ``arms`` is filled as it goes, so that an interrupted run has what was finished."""
    split = [
        settings.rounds // settings.passes + (i < settings.rounds % settings.passes) for i in range(settings.passes)
    ]
    steps = len(settings.arms) * (settings.passes * settings.warmup + settings.rounds)
    with Progress(f"{settings.workload} {mode}", steps) as progress:
        for number, rounds in enumerate(split):
            first = sum(split[:number])
            for arm in settings.arms:
                if "unavailable" in arms.get(arm.name, {}):
                    progress.update(settings.warmup + rounds)
                    continue
                why = None
                try:
                    timed = range(first, first + rounds)
                    _merge(arms, arm.name, measure(arm, settings, mode, timed, device, progress, given))
                except torch.OutOfMemoryError:
                    why = "out of memory"
                except Unavailable as error:
                    why = str(error)
                if why:
                    arms[arm.name] = {"unavailable": why}
                # Only here, outside of `except`, nothing refers to the arm any more.
                if mode != "eager":
                    torch._dynamo.reset()
                _release(device)


def _merge(arms: dict[str, dict[str, Any]], name: str, found: dict[str, Any]) -> None:
    """Adds one pass of an arm to its earlier ones: all times and tokens, the largest peaks."""
    if name in arms:
        earlier = arms[name]
        for phase, values in earlier["times"].items():
            found["times"][phase] = values + found["times"][phase]
        found["tokens"] += earlier["tokens"]
        for key in ("peak_allocated_bytes", "peak_reserved_bytes"):
            found[key] = None if found[key] is None else max(found[key], earlier[key])
    arms[name] = found


def _summary(arm: dict[str, Any]) -> dict[str, Any]:
    if "unavailable" in arm:
        return arm
    spans = {phase: train_results.quantiles(values) for phase, values in arm["times"].items()}
    rest = {key: value for key, value in arm.items() if key not in ("times", "tokens")}
    rest["tokens_per_second"] = round(1e3 * arm["tokens"] / sum(arm["times"]["total"]), 2)
    return {"rounds": len(arm["times"]["total"]), "total": spans.pop("total"), "phases": spans, **rest}


# ---- command line ----------------------------------------------------------------------------------------------------
def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Command line; returns the exit code: 1 when a check or anything else failed, 130 after Ctrl-C."""
    settings, options = parse(arguments, prog)
    try:
        suites, interrupted = run(settings, options.commit)
        named = {settings.name(mode): entry for mode, entry in suites.items()}
        for (name, entry), mode in zip(named.items(), suites, strict=True):
            if options.output:
                _write(entry, name, options.output)
            if settings.results:
                run_name = settings.run_name(mode)
                train_results.write_run(entry, name, Path(settings.results) / run_name, run_name)
            if not options.json:
                print(train_results.markdown(entry, name), flush=True)
        if options.json:
            print(json.dumps(named, indent=1, allow_nan=False))
    except CheckError as error:
        if options.debug:
            raise
        print(f"Error: no speed is reported, because a result is wrong: {error}.", file=sys.stderr)
        return 1
    except (ValueError, OSError, ImportError) as error:
        if options.debug:
            raise
        print(f"Error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    if interrupted:
        print("Interrupted: the steps measured by then are kept.", file=sys.stderr)
        return 130
    return 0


def _write(entry: dict[str, Any], name: str, folder: Path) -> None:
    path = train_results.store(entry, name, folder)
    stem = f"{path.stem}-{train_results.slug(name)}"
    train_results.atomic_write(folder / f"{stem}.md", train_results.markdown(entry, name))
    drawn = train_results.picture(entry, name, folder / f"{stem}.png")
    picture = f" and {stem}.png" if drawn else "; no picture, because matplotlib is not installed"
    print(f"stored in {path}, {stem}.md{picture}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
