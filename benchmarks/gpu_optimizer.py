"""One optimizer step on a CUDA GPU beside torch's: one tensor of 525 M bf16 parameters, and the shapes of a 3 B model.

python -m sparseopt.benchmarks.gpu_optimizer [FOLDER] [single] [model]     writes FOLDER/<device>.json

Times are the GPU's, by CUDA events, with enough work queued ahead that the host never keeps the GPU waiting, as behind a
backward pass; the host's own time for a step stands beside them. Arms are timed in turns, medians of 20 rounds after 5 of
warm-up. Before anything is timed, steps of each kind are compared with dense AdamW on the active entries, on the device; a
difference ends the program without a figure.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

import sparseopt as so

N = 525_336_576  # the embedding of Llama-3.1-8B: 128256 x 4096
ROUNDS, WARM_UP = 20, 5
NEEDED_GIB = {"single": 15, "model": 60}
SINGLE = [("10%", 0.1, 1), ("2.5%", 0.025, 1), ("1%", 0.01, 1), ("0.25%", 0.0025, 1),
          ("2.5%, runs of 8", 0.025, 8), ("2.5%, runs of 16", 0.025, 16), ("2.5%, runs of 32", 0.025, 32)]  # fmt: skip
MODEL = [("10%", 0.1, 1), ("2.5%", 0.025, 1), ("0.25%", 0.0025, 1), ("2.5%, runs of 16", 0.025, 16)]
MASTERS: dict[str, Literal["fp32", "residual"]] = {"fp32 master": "fp32", "residual": "residual"}
# (case, arm) -> {baseline: how many times faster it must be}
BARS: dict[tuple[str, str], dict[str, float]] = {
    ("2.5%", "step"): {"torch fused": 5.5, "torch default": 14},
    ("2.5%", "clip + step"): {"torch fused + clip": 6.5},
    ("0.25%", "step"): {"torch fused": 24},
    ("0.25%", "clip + step"): {"torch fused + clip": 30},
    ("2.5%, runs of 16", "step"): {"torch fused": 18},
}
MODEL_BARS: dict[tuple[str, str], dict[str, float]] = {
    ("2.5%", "clip + step"): {"torch fused + clip": 5.5},
    ("2.5%", "clip + step, captured"): {"torch fused + clip": 8},
    ("10%", "clip + step, captured"): {"torch fused + clip": 3.3},
}


def make_mask(n: int, density: float, run: int) -> Tensor:
    """bool[n] on the CPU, of aligned runs."""
    mask = torch.rand(-(-n // run), device="cuda") < density
    return mask.repeat_interleave(run)[:n].cpu()


def check(density: float, run: int, clip: float | None, master: Literal["fp32", "residual"]) -> None:
    """Three steps against dense AdamW on the fp32 values of the active entries; frozen entries bitwise equal."""
    n = 4_000_000
    mask = make_mask(n, density, run)
    param = nn.Parameter(torch.randn(n, device="cuda").bfloat16())
    start = param.detach().clone()
    active = mask.cuda()
    alone = nn.Parameter(start[active].float())
    sparse = so.SparseAdamW([("p", param)], lr=1e-3, masks={"p": mask}, max_grad_norm=clip, master_weights=master)
    dense = torch.optim.AdamW([alone], lr=1e-3)
    for _ in range(3):
        param.grad = torch.randn_like(param)
        alone.grad = param.grad[active].float()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_([alone], clip)
        sparse.step()
        dense.step()
    if not torch.equal(param.detach()[~active], start[~active]):
        raise SystemExit(f"{density}, runs of {run}: a frozen entry moved; no speed is reported.")
    torch.testing.assert_close(param.detach()[active], alone.detach().bfloat16(), rtol=2**-7, atol=1e-6)


class Arm:
    """One repetition is ``before()``, not timed, then ``run()``."""

    def __init__(self, run: Callable[[], Any], before: Callable[[], Any] = lambda: None) -> None:
        self.run, self.before = run, before


def time_in_turns(arms: Mapping[str, Arm]) -> dict[str, dict[str, float]]:
    """name -> median, p20 and p80 on the GPU, and the host's median, in milliseconds."""
    filler = torch.empty(2**29, dtype=torch.bfloat16, device="cuda")
    gpu: dict[str, list[float]] = {name: [] for name in arms}
    host: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(WARM_UP + ROUNDS):
        for name, arm in arms.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            for _ in range(8):  # some 6 ms
                filler.add_(1)
            arm.before()
            start = time.perf_counter()
            begin.record()
            arm.run()
            end.record()
            spent = time.perf_counter() - start
            torch.cuda.synchronize()
            if turn >= WARM_UP:
                gpu[name].append(begin.elapsed_time(end))
                host[name].append(1e3 * spent)
    result = {}
    for name, values in gpu.items():
        cuts = statistics.quantiles(values, n=5)
        result[name] = {
            "median": statistics.median(values), "p20": cuts[0], "p80": cuts[3], "host": statistics.median(host[name]),
        }  # fmt: skip
    return result


def case(
    times: Mapping[str, dict[str, float]], ours: str, baselines: list[str], facts: Mapping[str, float],
    bars: Mapping[str, float],
) -> dict[str, Any]:  # fmt: skip
    """One row of the report: our times, each baseline's with its ratio."""
    mine = times[ours]
    beside = {name: {**times[name], "ratio": times[name]["median"] / mine["median"]} for name in baselines}
    judged = {
        name: {"at_least": bar, "measured": beside[name]["ratio"], "met": beside[name]["ratio"] >= bar}
        for name, bar in bars.items()
    }
    return {"rounds": ROUNDS, "sparseopt": mine, "baselines": beside, "facts": dict(facts), "bars": judged}


def run_suite(
    shapes: Mapping[str, int], cases: list[tuple[str, float, int]], bars: Mapping[tuple[str, str], dict[str, float]],
    captured: bool,
) -> dict[str, Any]:  # fmt: skip
    """Times every arm on bf16 tensors of these sizes."""
    params = {name: nn.Parameter(torch.randn(n, device="cuda").bfloat16()) for name, n in shapes.items()}
    grads = {name: torch.randn(n, device="cuda").bfloat16() for name, n in shapes.items()}

    def give_gradients(optimizer: so.SparseAdamW | None = None) -> None:
        for name, param in params.items():
            param.grad = grads[name]
        for arena in optimizer._arenas if optimizer is not None else ():
            arena._look()  # the other arms write the same parameters; a run has one optimizer

    everything = list(params.values())
    fused, default = torch.optim.AdamW(everything, fused=True), torch.optim.AdamW(everything)

    def clipped(step: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            torch.nn.utils.clip_grad_norm_(everything, 1e9)
            step()

        return run

    baselines = {
        "torch fused": Arm(fused.step, give_gradients), "torch default": Arm(default.step, give_gradients),
        "torch fused + clip": Arm(clipped(fused.step), give_gradients),
    }  # fmt: skip
    times = time_in_turns(baselines)
    for optimizer in (fused, default):
        optimizer.state.clear()
    print({name: round(value["median"], 3) for name, value in times.items()}, flush=True)
    fused.step()  # one baseline stays, in turns with every case
    results: dict[str, Any] = {}
    for label, density, run in cases:
        masks = so.MaskSet.from_bool({name: make_mask(n, density, run) for name, n in shapes.items()})
        for kind, master in MASTERS.items():
            if captured and master != "fp32" and label != "2.5%":
                continue  # building plans of billions of entries takes longer than timing them
            check(density, run, None, master)
            check(density, run, 1.0, master)

            def sparse(clip: float | None, capture: bool = False, masks: Any = masks, master: Any = master) -> Any:
                return so.SparseAdamW(params.items(), masks=masks, max_grad_norm=clip, master_weights=master,
                                      capture_gradients=capture)  # fmt: skip

            clipping = sparse(1e9)
            arms = {
                "torch fused": baselines["torch fused"], "clip + step": Arm(clipping.step, partial(give_gradients, clipping))
            }  # fmt: skip
            if not captured:
                plain = sparse(None)
                arms["step"] = Arm(plain.step, partial(give_gradients, plain))
            if captured:
                catching = sparse(1e9, capture=True)

                def gather(catching: Any = catching) -> None:
                    catching._capture.take_dense()
                    catching._capture.flush()

                def prepare(gather: Callable[[], None] = gather, catching: Any = catching) -> None:
                    give_gradients(catching)
                    gather()

                def forget(catching: Any = catching) -> None:
                    catching.zero_grad()
                    give_gradients()

                arms["gathers"] = Arm(gather, forget)
                arms["clip + step, captured"] = Arm(catching.step, prepare)
            here = time_in_turns(arms)
            facts = {"state_bytes": clipping.state_bytes(), "active": clipping.active_parameters}
            together = {**times, **here}
            for arm in ("step", "clip + step", "clip + step, captured"):
                if arm not in here:
                    continue
                beside = ["torch fused", "torch default"] if arm == "step" else ["torch fused + clip"]
                judged = bars.get((label, arm), {}) if master == ("residual" if run > 1 else "fp32") else {}
                more = {"gathers_ms": here["gathers"]["median"]} if arm.endswith("captured") else {}
                results[f"{label}, {kind}, {arm}"] = case(together, arm, beside, {**facts, **more}, judged)
            print(label, kind, {k: (round(v["median"], 3), round(v["host"], 2)) for k, v in here.items()}, flush=True)
            del clipping, arms
            plain = catching = None
            for param in everything:
                param.grad = None
    return results


def environment() -> dict[str, str]:
    import triton

    return {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
        "sparseopt": so.__version__,
    }  # fmt: skip


def commit() -> str:
    """The commit measured: ``SPARSEOPT_COMMIT`` where the tree came without its history, else git's."""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return os.environ.get("SPARSEOPT_COMMIT") or found.stdout.strip() or "unknown"


def store(folder: str, suites: Mapping[str, dict[str, Any]], command: str) -> Path:
    """Adds suites to FOLDER/<device>.json."""
    device = torch.cuda.get_device_name()
    Path(folder).mkdir(parents=True, exist_ok=True)
    path = Path(folder, re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json")
    stored: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"device": device, "suites": {}}
    for name, cases in suites.items():
        stored["suites"][name] = {
            "date": datetime.date.today().isoformat(), "commit": commit(), "command": command,
            "environment": environment(), "cases": cases,
        }  # fmt: skip
    path.write_text(json.dumps(stored, indent=1) + "\n")
    return path


def main(folder: str | None = None, *which: str) -> None:
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA GPU; `make bench` measures the CPU.")
    suites = {}
    memory = torch.cuda.get_device_properties(0).total_memory
    for name in which or ("single", "model"):
        if memory < NEEDED_GIB[name] * 2**30:
            print(f"{name}: left out, it needs {NEEDED_GIB[name]} GiB and this GPU has {memory / 2**30:.0f}.")
            continue
        if name == "single":
            suites["optimizer, 525 M bf16 parameters"] = run_suite({"p": N}, SINGLE, BARS, captured=False)
        else:
            from sparseopt.shapes import parameter_shapes

            shapes = {name: math.prod(shape) for name, shape in parameter_shapes("llama-3.2-3b").items()}
            suites[f"optimizer, {len(shapes)} bf16 tensors shaped like Llama-3.2-3B (random weights)"] = run_suite(
                shapes, MODEL, MODEL_BARS, captured=True
            )
    if folder:
        print("stored in", store(folder, suites, "python -m sparseopt.benchmarks.gpu_optimizer FOLDER"))


if __name__ == "__main__":
    main(*sys.argv[1:])
