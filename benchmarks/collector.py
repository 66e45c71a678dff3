"""What collecting gradient masks adds to a training step: with and without GradientEMA, in turns, on one model.

    python -m sparseopt.benchmarks.collector --shape qwen2.5-0.5b --batch 8 --sequence 1024 --output collector.json

A turn is one step without and one with the collector (forward, backward, update, clipping, optimizer); which comes first
alternates. Warm-up turns are left out. What a mask step adds is timed apart, after one that warms up: how long it holds up the
training thread (the RMS, the masks, their counts), which is spread over ``--mask_interval`` steps, and what the writer's thread
does beside training (coding the masks, their file). Masks are made at a tolerance that leaves ``--mask_density`` of the entries
active, and at the default one. Weights are random. Nothing is timed unless an update agrees with the formula.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import sparseopt as so
from sparseopt._background import Background
from sparseopt._files import atomic_write
from sparseopt.benchmarks.interleaved import environment
from sparseopt.benchmarks.train_results import commit
from sparseopt.benchmarks.train_settings import device_of, positive, share
from sparseopt.progress import Progress
from sparseopt.shapes import SHAPES, build_shape

__all__ = ["main", "measure"]

WARM_UP = 3
ARMS = ("dense", "masked", "captured")
DEFAULT_TOLERANCE = 1e-5  # of MaskCollector
SAMPLE = 1 << 20  # entries that the other tolerance is chosen from
MASK_ROUNDS = 5


def measure(
    shape: str,
    device: torch.device,
    *,
    arm: str = "dense",
    batch: int = 8,
    sequence: int = 1024,
    rounds: int = 40,
    dtype: torch.dtype = torch.bfloat16,
    density: float = 0.025,
    mask_density: float = 0.025,
    mask_interval: int = 1000,
    offload: bool = False,
) -> dict[str, Any]:
    """Times one arm.

    Args:
        shape: a key of :data:`sparseopt.shapes.SHAPES`.
        device: where.
        arm: "dense" (fused AdamW and clipping over all gradients), "masked" (SparseAdamW) or "captured" (its gradients
            captured during backward).
        batch, sequence: tokens of a step.
        rounds: timed turns.
        dtype: of the weights.
        density: of the masked arms' random mask.
        mask_density: share of the entries that the masks made have active.
        mask_interval: steps that the cost of one mask step is spread over.
        offload: keep the accumulation on the host.

    Returns:
        ``step_ms`` of both ways (median, p20, p80), ``update_share`` (what the updates add to a step), ``mask_steps``
        (:func:`_mask_step`) at the ``chosen`` and the ``default`` tolerance, ``overhead`` (updates, and what masks at the
        chosen tolerance hold up, against a step without), and what it was measured with.
    """
    model: Any = build_shape(shape, device=device, dtype=dtype).train()
    optimizer = _optimizer(model, arm, density)
    ema = so.GradientEMA(model, offload=offload)
    size = SHAPES[shape.lower()].vocabulary
    tokens = torch.randint(size, (batch, sequence), generator=torch.Generator().manual_seed(0)).to(device)

    def backward() -> None:
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()

    def step(collecting: bool) -> None:
        if isinstance(optimizer, so.SparseAdamW):
            optimizer.observe_gradients(ema.take if collecting else None)
        backward()
        if collecting:
            ema.update()
        if arm == "dense":
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.zero_grad()

    _check(model, backward, dtype)
    optimizer.zero_grad()
    times: dict[bool, list[float]] = {False: [], True: []}
    with Progress("turns", WARM_UP + rounds, unit="turn") as progress:
        for turn in range(WARM_UP + rounds):
            for collecting in (False, True) if turn % 2 else (True, False):
                milliseconds = _time(lambda collecting=collecting: step(collecting), device)  # type: ignore[misc]
                if turn >= WARM_UP:
                    times[collecting].append(milliseconds)
            progress.update()
    peaks = {}
    if device.type == "cuda":
        peaks["peak_allocated_bytes"] = torch.cuda.max_memory_allocated(device)
        peaks["peak_reserved_bytes"] = torch.cuda.max_memory_reserved(device)
    limits = {"chosen": lambda: _tolerance(ema, mask_density), "default": lambda: DEFAULT_TOLERANCE}
    mask_steps = {name: _mask_step(ema, limit, lambda: step(True), device) for name, limit in limits.items()}
    without, with_ = (_quantiles(times[collecting]) for collecting in (False, True))
    added = with_["median"] - without["median"]
    result: dict[str, Any] = {
        "shape": shape, "arm": arm, "batch": batch, "sequence": sequence, "dtype": str(dtype).removeprefix("torch."),
        "offload": offload, "rounds": rounds, "weights": "random",
        "parameters": sum(p.numel() for p in model.parameters()), "accumulation_bytes": ema.nbytes,
        "step_ms": {"without": without, "with": with_},
        "update_share": added / without["median"],
        "mask_steps": mask_steps,
        "mask_interval": mask_interval,
        "overhead": (added + mask_steps["chosen"]["held_up_ms"] / mask_interval) / without["median"],
        **peaks,
        "environment": {**environment(), "date": datetime.date.today().isoformat(), "commit": commit()},
    }  # fmt: skip
    if device.type == "cuda":
        result["environment"]["device"] = torch.cuda.get_device_name(device)
    return result


def _optimizer(model: nn.Module, arm: str, density: float) -> torch.optim.Optimizer:
    if arm == "dense":
        return torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    masks = so.MaskSet.random(model, density)
    return so.SparseAdamW(
        model.named_parameters(), lr=1e-6, masks=masks, max_grad_norm=1.0, capture_gradients=arm == "captured"
    )


def _check(model: nn.Module, backward: Callable[[], None], dtype: torch.dtype) -> None:
    """Two updates against the formula, of the first matrix; gradients of a captured arm are observed by nobody here."""
    name, param = next((n, p) for n, p in model.named_parameters() if p.dim() == 2 and "proj" in n)
    one = so.GradientEMA(nn.ParameterDict({"w": param}), beta=0.9)
    expected = torch.zeros_like(param, dtype=torch.float64)
    for seed in range(2):
        gradient = torch.randn(param.shape, generator=torch.Generator().manual_seed(seed)).to(param.device, dtype)
        one.take(param, gradient)
        one.update()
        expected = 0.9 * expected + 0.1 * gradient.double() ** 2
        param.grad = None
    if not torch.allclose(one["w"].double(), expected, rtol=1e-5, atol=0):
        raise SystemExit(f"the accumulation of {name!r} does not follow the formula; no speed is reported.")
    backward()  # what the first backward pass allocates and compiles


def _tolerance(ema: so.GradientEMA, density: float) -> float:
    """The tolerance that about this share of the entries exceeds, from evenly spaced ones."""
    stride = max(1, ema.nbytes // 4 // SAMPLE) | 1
    values = torch.cat([ema[name].reshape(-1)[::stride].cpu() for name in ema.names])
    return float(values.kthvalue(max(1, values.numel() - round(density * values.numel()))).values)


def _mask_step(
    ema: so.GradientEMA, tolerance: Callable[[], float], step: Callable[[], None], device: torch.device
) -> dict[str, Any]:
    """What a step at which masks are made and saved adds: ``held_up_ms`` of the training thread, also by part,
    ``background_ms`` of the writer's thread with nothing else to do, and ``step_beside_ms``, a training step meanwhile."""
    found: list[so.MaskSet] = []
    held_up: dict[str, list[float]] = {"rms": [], "masks": [], "counts": []}
    background: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mask.safetensors"

        def make(limit: float) -> None:
            found[:] = [ema.masks(limit)]

        def save() -> None:
            found[0].save(path, compress=True)

        for turn in range(1 + MASK_ROUNDS):
            step()
            limit = tolerance()
            step()  # so that the RMS has the decay of an update to multiply in
            work: dict[str, Callable[[], Any]] = {
                "rms": ema.rms_mean, "masks": partial(make, limit), "counts": lambda: found[0].metadata,
            }  # fmt: skip
            times = {name: _time(run, device) for name, run in work.items()}
            saving = _time(save, device)
            if turn:
                background.append(saving)
                for name, milliseconds in times.items():
                    held_up[name].append(milliseconds)
        beside: list[float] = []
        writer = Background("sparseopt-benchmark")
        writer.submit(save)
        while writer.pending:
            beside.append(_time(step, device))
        writer.close()
        size = path.stat().st_size
    parts = {name: _quantiles(values) for name, values in held_up.items()}
    return {
        "tolerance": limit, "active_fraction": found[0].density, "file_bytes": size,
        "held_up_ms": sum(part["median"] for part in parts.values()), "held_up_parts_ms": parts,
        "background_ms": _quantiles(background),
        "step_beside_ms": {"steps": len(beside), **_quantiles(beside)} if beside else None,
    }  # fmt: skip


def _time(run: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds from an idle device to an idle device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - start)


def _quantiles(values: list[float]) -> dict[str, float]:
    low, median, high = (
        torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8]).double()).tolist()
    )
    return {"median": median, "p20": low, "p80": high}


def main(arguments: list[str] | None = None) -> None:
    """Command line; prints JSON."""
    parser = argparse.ArgumentParser(prog="sparseopt.benchmarks.collector", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="qwen2.5-0.5b", choices=sorted(SHAPES))
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--batch", type=positive, default=8)
    parser.add_argument("--sequence", type=positive, default=1024)
    parser.add_argument("--rounds", type=positive, default=40)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--density", type=share, default=0.025)
    parser.add_argument("--mask_density", type=share, default=0.025)
    parser.add_argument("--mask_interval", type=positive, default=1000)
    parser.add_argument("--offload", action="store_true")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path)
    given = vars(parser.parse_args(arguments))
    device, output, arms = device_of(given.pop("device"), parser), given.pop("output"), given.pop("arms")
    given["dtype"] = getattr(torch, given["dtype"])
    results = [
        measure(given["shape"], device, arm=arm, **{k: v for k, v in given.items() if k != "shape"}) for arm in arms
    ]
    text = json.dumps({"benchmark": "collection of gradient masks", "results": results}, indent=2)
    if output is not None:
        atomic_write(output, text)
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
