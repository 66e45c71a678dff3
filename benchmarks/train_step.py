"""Whole training steps: dense AdamW, LoRA, 8-bit AdamW and sparse AdamW, in time and memory.

    python -m sparseopt.benchmarks.train_step --shape llama-3.2-3b --workload lm --batch 1 --seq 512 --output FOLDER

Each arm is built alone, from a model of the same seed, so that its peak memory is its own; the list of arms is gone through
in several passes, so that a slow phase of the machine does not hit one arm only. A step is timed from its start to the end
of the device's work, Python included; CUDA events within it tell forward, backward and optimizer (clipping, step and
zero_grad) apart. Before anything is timed every sparse arm is compared with dense AdamW on a small model; after timing,
the frozen entries are compared with what they were. Where either fails, no speed is printed or stored. With ``--together`` the
arms are alive at once, each in a process of its own, and compile at the same time.
"""

from __future__ import annotations

import datetime
import functools
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import sparseopt as so
from sparseopt.benchmarks import train_arms, train_results
from sparseopt.benchmarks.train_arms import CheckError, Unavailable
from sparseopt.benchmarks.train_data import prepare
from sparseopt.benchmarks.train_settings import Arm, Settings, parse
from sparseopt.benchmarks.train_timing import Given, TimedArm, release
from sparseopt.benchmarks.train_together import measure_together
from sparseopt.benchmarks.train_weights import make_model
from sparseopt.progress import Progress, announce_device
from sparseopt.shapes import build_shape

__all__ = ["main", "measure", "run"]


# ---- measuring -------------------------------------------------------------------------------------------------------
def measure(
    arm: Arm, settings: Settings, mode: str, steps: range, device: torch.device, progress: Progress, given: Given
) -> dict[str, Any]:
    """Builds an arm, warms it up and times ``steps``: see :class:`sparseopt.benchmarks.train_timing.TimedArm`."""
    timed = TimedArm(arm, settings, mode, steps.start, device, progress, given)
    timed.time(steps)
    return timed.result()


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
        ValueError: the device has no CUDA graphs.
    """
    device = announce_device(settings.device)
    if "graphs" in settings.modes and device.type != "cuda":
        raise ValueError(f"--mode graphs needs a CUDA device, this is {device.type}.")
    suites: dict[str, dict[str, Any]] = {}
    interrupted = False
    masks = so.MaskSet.load(settings.mask) if settings.mask else None
    given: Given | None = None
    for mode in settings.modes:
        arms: dict[str, dict[str, Any]] = {}
        if not settings.together:
            _check(settings, mode, device, masks)
        if given is None:
            given = _prepare(settings, device, masks)
            release(device)
        try:
            if settings.together:
                check = functools.partial(_check, settings, mode, device, masks)
                measure_together(settings, mode, _splits(settings), device, arms, check)
            else:
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


def _splits(settings: Settings) -> list[range]:
    """The timed steps of each pass."""
    each, more = divmod(settings.rounds, settings.passes)
    starts = [i * each + min(i, more) for i in range(settings.passes + 1)]
    return [range(*pair) for pair in itertools.pairwise(starts)]


def _passes(settings: Settings, mode: str, device: torch.device, arms: dict[str, dict[str, Any]], given: Given) -> None:
    """Measures all arms in turns; ``arms`` is filled as it goes, so that an interrupted run has what was finished."""
    steps = len(settings.arms) * (settings.passes * settings.warmup + settings.rounds)
    with Progress(f"{settings.workload} {mode}", steps) as progress:
        for timed in _splits(settings):
            for arm in settings.arms:
                if "unavailable" in arms.get(arm.name, {}):
                    progress.update(settings.warmup + len(timed))
                    continue
                why = None
                try:
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
                release(device)


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
