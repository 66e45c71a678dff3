"""One optimizer step on a CUDA GPU: one tensor of 525 M bf16 parameters, as users run it (Python included).

python -m sparseopt.benchmarks.gpu_optimizer [FOLDER]     writes FOLDER/<device>.json, as sparseopt.benchmarks.report reads it

Arms are timed in turns with CUDA events, medians of 20 rounds after 5 of warm-up. Before anything is timed, a step of each
sparse arm is compared with the plain-PyTorch reference on the device; a difference ends the program.
"""

from __future__ import annotations

import datetime
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sparseopt as so

N = 525_336_576  # the embedding of Llama-3.1-8B: 128256 x 4096
CASES = [("10%", 0.1, 1), ("2.5%", 0.025, 1), ("1%", 0.01, 1), ("0.25%", 0.0025, 1), ("2.5%, runs of 16", 0.025, 16)]


def make_mask(n: int, density: float, run: int) -> Tensor:
    """bool[n] on the CPU, of aligned runs."""
    mask = torch.rand(-(-n // run), device="cuda") < density
    return mask.repeat_interleave(run)[:n].cpu()


def check(density: float, run: int, clip: float | None) -> None:
    """Three steps against dense AdamW on the fp32 values of the active entries; frozen entries bitwise equal."""
    n = 4_000_000
    mask = make_mask(n, density, run)
    param = nn.Parameter(torch.randn(n, device="cuda").bfloat16())
    start = param.detach().clone()
    active = mask.cuda()
    alone = nn.Parameter(start[active].float())
    sparse = so.SparseAdamW([("p", param)], lr=1e-3, masks={"p": mask}, max_grad_norm=clip)
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


def time_in_turns(
    arms: dict[str, Callable[[], Any]], rounds: int = 20, warm_up: int = 5
) -> dict[str, dict[str, float]]:
    """name -> median, p20 and p80 in milliseconds."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(warm_up + rounds):
        for name, arm in arms.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            arm()
            end.record()
            end.synchronize()
            if turn >= warm_up:
                times[name].append(begin.elapsed_time(end))
    result = {}
    for name, values in times.items():
        cuts = statistics.quantiles(values, n=5)
        result[name] = {"median": statistics.median(values), "p20": cuts[0], "p80": cuts[3]}
    return result


def case(
    times: dict[str, dict[str, float]], ours: str, baselines: list[str], facts: Mapping[str, float]
) -> dict[str, Any]:
    """One row of the report: our times, each baseline's with its ratio."""
    mine = times[ours]
    beside = {name: {**times[name], "ratio": times[name]["median"] / mine["median"]} for name in baselines}
    return {"rounds": 20, "sparseopt": mine, "baselines": beside, "facts": facts, "bars": {}}


def main(folder: str | None = None) -> None:
    param = nn.Parameter(torch.randn(N, device="cuda").bfloat16())
    param.grad = torch.randn(N, device="cuda").bfloat16()
    fused, foreach = torch.optim.AdamW([param], fused=True), torch.optim.AdamW([param])

    def fused_clipped() -> None:
        torch.nn.utils.clip_grad_norm_([param], 1e9)
        fused.step()

    baselines: dict[str, Callable[[], Any]] = {
        "torch fused": fused.step, "torch default": foreach.step, "torch fused + clip": fused_clipped,
    }  # fmt: skip
    cases: dict[str, Any] = {}
    for label, density, run in CASES:
        for clip in (None, 1.0):
            check(density, run, clip)
        masks = so.MaskSet.from_bool({"p": make_mask(N, density, run)})
        plain = so.SparseAdamW([("p", param)], masks=masks)
        clipped = so.SparseAdamW([("p", param)], masks=masks, max_grad_norm=1e9)
        times = time_in_turns({**baselines, "sparse": plain.step, "sparse + clip": clipped.step})
        facts = {"state_bytes": plain.state_bytes(), "active": plain.active_parameters}
        cases[label] = case(times, "sparse", ["torch fused", "torch default"], facts)
        cases[f"{label}, clipping"] = case(times, "sparse + clip", ["torch fused + clip"], facts)
        print(label, {name: round(value["median"], 3) for name, value in times.items()}, flush=True)
        del plain, clipped
    import triton

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    device = torch.cuda.get_device_name()
    environment = {
        "device": device,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "sparseopt": so.__version__,
    }
    suite = {
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip() or "unknown",
        "command": "python -m sparseopt.benchmarks.gpu_optimizer",
        "environment": environment,
        "cases": cases,
    }
    if folder:
        name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
        stored = {"device": device, "suites": {"optimizer, 525 M bf16 parameters": suite}}
        Path(folder, f"{name}.json").write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:2])
