"""What a mask update costs: ``python -m sparseopt.benchmarks.dynamic_update --output FOLDER``.

    python -m sparseopt.benchmarks.dynamic_update --shape llama-3.2-1b --output FOLDER

Training steps of a model with random weights under RigL, ordinary ones and ones that end with a mask update, in turns; the
update itself (drop, grow, the optimizer's state following) is timed apart from the step, whose backward also keeps the dense
gradients. A step is timed from an idle device to an idle device. ``weights`` trains 20% of every linear layer, ``updates`` 2.5%.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import sparseopt as so
from sparseopt._files import atomic_write
from sparseopt.benchmarks import train_results, train_work
from sparseopt.benchmarks.train_settings import device_of, positive
from sparseopt.optim import remapping
from sparseopt.optim.dynamic.engine import DynamicSparsity
from sparseopt.optim.plan_on_device import build_on_device
from sparseopt.progress import Progress
from sparseopt.shapes import SHAPES, build_shape

__all__ = ["main", "measure"]

TARGETS = {"weights": 0.8, "updates": 0.975}


def measure(
    shape: str, target: str, device: torch.device, *, policy: str = "rigl", sparsity: float | None = None, batch: int = 1,
    seq: int = 512, updates: int = 5, ordinary: int = 8, dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Any]:  # fmt: skip
    """Times ``updates`` steps with a mask update, and ``ordinary`` steps before each.

    Returns:
        ``ordinary_step_ms``, ``step_before_update_ms`` (it collects dense gradients), ``update_ms``, of it ``selecting_ms``
        (what leaves and comes) and ``state_following_ms`` (the optimizer's part, of it on GPUs ``planning_ms``: the new index
        plan), ``step_with_update_ms``, each with median and 20% and 80% quantiles;
        ``extra_ms`` and ``update_over_step`` of the medians; ``peak_*_bytes`` (None on a CPU) of ordinary steps and of steps
        with an update; ``state_bytes``, ``bytes_per_active_entry``, ``active``, ``sparse_active``, ``trainable``.

    Raises:
        RuntimeError: after an update the counts are not what they were, or an inactive weight is not 0.
    """
    sparsity = TARGETS[target] if sparsity is None else sparsity
    model: Any = build_shape(shape, device=device, dtype=dtype)
    model.train()
    interval = ordinary + 1
    engine = DynamicSparsity(
        model, total_steps=10 * interval * (updates + 1), sparsity=sparsity, policy=policy, interval=interval,
        target=target, initial="random",
    )  # fmt: skip
    optimizer = so.SparseAdamW(
        model.named_parameters(), lr=1e-5, masks=engine.masks, unmasked="dense" if target == "weights" else "freeze",
        capture_gradients=True, max_grad_norm=1.0,
    )  # fmt: skip
    engine.start(optimizer)
    active = engine.masks.active_parameters
    loss_of = train_work.make_loss("lm", model, batch, seq, 1)[0]
    following, selecting = list[float](), list[float]()
    optimizer.update_masks = _timed(optimizer.update_masks, device, following)  # type: ignore[method-assign]
    engine._choose = _timed(engine._choose, device, selecting)  # type: ignore[method-assign]
    planning = list[float]()
    remapping.build_on_device = _timed(build_on_device, device, planning)
    times: dict[str, list[float]] = {"ordinary": [], "before": [], "update": [], "whole": []}
    peaks: dict[str, int] = {}
    # The first update compiles; only what follows counts.
    with Progress(f"{shape} {target}", interval * (updates + 1)) as progress:
        for step in range(1, interval * (updates + 1) + 1):
            ends = engine.plan.updates(step)
            _reset_peak(device)
            started = _now(device)
            engine.begin_step(step)
            loss_of().backward()
            optimizer.step()
            optimizer.zero_grad()
            stepped = _now(device)
            record = engine.update(step)
            done = _now(device)
            progress.update()
            if step <= interval:
                for times_of_part in (following, selecting, planning):
                    times_of_part.clear()
                continue
            kind = "update" if ends else "ordinary"
            _keep_peak(peaks, kind, device)
            if not ends:
                times["ordinary"].append(stepped - started)
                continue
            if record is None or not record["grown"] or engine.masks.active_parameters != active:
                raise RuntimeError(f"the update after step {step} did not keep {active:,} active entries: {record}.")
            times["before"].append(stepped - started)
            times["update"].append(done - stepped)
            times["whole"].append(done - started)
    if target == "weights":
        _check(engine)
    engine.close()
    remapping.build_on_device = build_on_device
    spans = {
        "ordinary_step_ms": times["ordinary"], "step_before_update_ms": times["before"], "update_ms": times["update"],
        "selecting_ms": selecting, "state_following_ms": following, "step_with_update_ms": times["whole"],
        **({"planning_ms": planning} if planning else {}),
    }  # fmt: skip
    found: dict[str, Any] = {name: {"count": len(v), **train_results.quantiles(v)} for name, v in spans.items()}
    plain = found["ordinary_step_ms"]["median"]
    extra = found["step_with_update_ms"]["median"] - plain
    state = optimizer.state_bytes()
    return {
        **found, "extra_ms": round(extra, 3), "update_over_step": round(extra / plain, 4),
        "peak_ordinary_bytes": peaks.get("ordinary"), "peak_update_bytes": peaks.get("update"),
        "state_bytes": state, "bytes_per_active_entry": round(state / optimizer.active_parameters, 3),
        "active": optimizer.active_parameters, "sparse_active": active,
        "trainable": sum(p.numel() for p in model.parameters()), "sparse_layers": len(engine.layers),
        "sparsity": engine.sparsity, "policy": policy, "target": target, "shape": shape, "batch": batch, "seq": seq,
        "dtype": str(dtype).removeprefix("torch."),
    }  # fmt: skip


def _timed(inner: Callable[..., Any], device: torch.device, times: list[float]) -> Callable[..., Any]:
    """``inner``, every call of it timed."""

    def timed(*arguments: Any, **named: Any) -> Any:
        began = _now(device)
        result = inner(*arguments, **named)
        times.append(_now(device) - began)
        return result

    return timed


def _now(device: torch.device) -> float:
    """Milliseconds, with an idle device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * time.perf_counter()


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _keep_peak(peaks: dict[str, int], kind: str, device: torch.device) -> None:
    if device.type == "cuda":
        peaks[kind] = max(peaks.get(kind, 0), torch.cuda.max_memory_allocated(device))


def _check(engine: DynamicSparsity) -> None:
    for layer in engine.layers:
        if bool(layer.param.detach()[~engine.masks[layer.name].to(layer.param.device)].any()):
            raise RuntimeError(f"an inactive weight of {layer.name!r} is not 0.")


def _bars(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        f"mask update under one ordinary step, {r['shape']} {r['target']} {r['policy']}": {
            "below": 1.0, "measured": r["update_over_step"], "met": r["update_over_step"] < 1,
        }
        for r in results
    }  # fmt: skip


def _markdown(found: dict[str, Any]) -> str:
    lines = [
        f"### Mask updates: {found['date']}, commit `{found['commit']}`, {found['environment']['device']}",
        "",
        "| shape | target | policy | ordinary step ms | step with update ms | update ms | of it selection | state (of it plan) |"
        " extra / step | peak GiB ordinary / update | state bytes per active entry |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in found["results"]:
        spans = [
            f"{r[k]['median']:.1f} ({r[k]['p20']:.1f}-{r[k]['p80']:.1f})"
            for k in ("ordinary_step_ms", "step_with_update_ms", "update_ms", "selecting_ms", "state_following_ms")
        ]
        spans[-1] += f" ({r['planning_ms']['median']:.1f})" if "planning_ms" in r else ""
        peaks = [r["peak_ordinary_bytes"], r["peak_update_bytes"]]
        shown = " / ".join("-" if p is None else f"{p / 2**30:.2f}" for p in peaks)
        lines.append(
            f"| {r['shape']} {r['batch']} x {r['seq']} | {r['target']} {r['sparsity']:.1%} | {r['policy']} | "
            f"{' | '.join(spans)} | {r['update_over_step']:.2f} | {shown} | {r['bytes_per_active_entry']:.2f} |"
        )
    lines += [""] + [f"- {name}: {'met' if bar['met'] else 'not met'}" for name, bar in found["bars"].items()]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; prints Markdown. Returns the exit code: 1 when a check failed."""
    parser = argparse.ArgumentParser(prog="python -m sparseopt.benchmarks.dynamic_update", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="where dynamic_update.json and .md go")
    parser.add_argument("--shape", default="llama-3.2-1b", choices=sorted(SHAPES))
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=TARGETS)
    parser.add_argument("--policies", nargs="+", default=["rigl"], choices=("rigl", "set"))
    parser.add_argument("--batch", type=positive, default=1)
    parser.add_argument("--seq", type=positive, default=512)
    parser.add_argument("--updates", type=positive, default=5, help="timed updates (%(default)s)")
    parser.add_argument("--ordinary", type=positive, default=8, help="ordinary steps before each (%(default)s)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--commit", help="recorded where the source is not a git checkout")
    options = parser.parse_args(arguments)
    device = device_of(options.device, parser)
    results: list[dict[str, Any]] = []
    try:
        for target in options.targets:
            for policy in options.policies:
                results.append(
                    measure(
                        options.shape, target, device, policy=policy, batch=options.batch, seq=options.seq,
                        updates=options.updates, ordinary=options.ordinary, dtype=getattr(torch, options.dtype),
                    )
                )  # fmt: skip
                gc.collect()
                if device.type == "cuda":
                    torch.cuda.empty_cache()
                found = {
                    "benchmark": "mask updates", "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
                    "commit": options.commit or train_results.commit(),
                    "environment": train_results.environment(device), "results": results, "bars": _bars(results),
                }  # fmt: skip
                if options.output:
                    options.output.mkdir(parents=True, exist_ok=True)
                    atomic_write(options.output / "dynamic_update.json", json.dumps(found, indent=1) + "\n")
                    atomic_write(options.output / "dynamic_update.md", _markdown(found))
    except (RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(_markdown(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
