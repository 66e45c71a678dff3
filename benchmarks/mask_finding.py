"""Memory and time of finding a mask from a delta log, on the CPU: ``python -m sparseopt.benchmarks.mask_finding``.

A synthetic log is written (random bf16 weights of a model's shapes; at each step a random share of every tensor changes),
then every case runs in a process of its own: scores, mask, file. Peak memory is the growth of the process's resident set
(VmHWM) over what it has after the imports. ``scratch``: scores are computed once, into an unnamed file; else again in each
pass. The bar: growth below three times the largest tensor (as logged) plus a budget of one bit a parameter, which is the
mask itself; and exactly round((1 - sparsity) n) active entries.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import sparseopt as so
from sparseopt._files import atomic_write
from sparseopt.deltas.base import write_base
from sparseopt.deltas.scores import METHODS, scores

__all__ = ["main", "measure", "run", "write_log"]

BAR = 3.0  # times the largest tensor
STEP = 10  # training steps between two logged ones


def write_log(
    folder: str | os.PathLike[str],
    shapes: Mapping[str, Sequence[int]],
    steps: int,
    share: float,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> None:
    """Writes a synthetic delta log.

    Args:
        folder: of the log.
        shapes: of the parameters, by name.
        steps: logged steps; they are 10, 20, ...
        share: of each tensor's entries that changes from one logged step to the next.
        dtype: of the weights.
        seed: of weights, places and changes.
    """
    generator = torch.Generator().manual_seed(seed)
    state = {
        name: torch.empty(*shape, dtype=dtype).normal_(0, 0.02, generator=generator) for name, shape in shapes.items()
    }
    base = write_base(folder, state, save_base=True)
    for parent, step in itertools.pairwise([None, *range(STEP, STEP * (steps + 1), STEP)]):
        entries = {}
        for name, tensor in state.items():
            flat = tensor.view(-1)
            # Sorted distinct places at a mean distance of 1 / share, without a pass over all entries.
            count = math.ceil(flat.numel() * share)
            gaps = torch.empty(count + 64).exponential_(share, generator=generator).floor_().long() + 1
            places = gaps.cumsum_(0) - 1
            places = places[places < flat.numel()]
            flat[places] += torch.empty(places.numel(), dtype=dtype).normal_(0, 1e-3, generator=generator)
            entries[name] = places, flat[places]
        delta = so.Delta.from_dict(entries, shapes, step=step, parent_step=parent, base_fingerprint=base.fingerprint)
        delta.save(Path(folder) / f"delta_step_{step}.safetensors")


def peak_bytes() -> int:
    """Highest resident set of this process so far; 0 where the system does not say."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)


def measure(log: str, method: str, sparsity: float, scratch: str | None, output: str) -> dict[str, Any]:
    """One case, in this process -> seconds, growth of memory, and the mask's counts."""
    torch.zeros(1 << 16).float().sum()  # thread pools and the like are no part of it
    start, before, busy = time.perf_counter(), peak_bytes(), time.process_time()
    found = scores(log, method)
    opened = time.perf_counter()
    n = sum(math.prod(shape) for shape in found.shapes.values())
    if scratch is None:
        masks = so.find_masks(found, sparsity)
    else:
        with found.spool(scratch) as spooled:
            masks = so.find_masks(spooled, sparsity)
    masks.save(output)
    return {
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(time.process_time() - busy, 1),
        "seconds_opening": round(opened - start, 1),
        "growth_bytes": peak_bytes() - before,
        "active": masks.active_parameters,
        "expected": round((1 - sparsity) * n),
        "zero_score_share": masks.metadata["zero_score_share"],
    }


def run(
    shapes: Mapping[str, Sequence[int]], steps: int, share: float, methods: Sequence[str], sparsity: float, folder: Path
) -> dict[str, Any]:
    """Writes a log into ``folder`` and measures every method with and without a scratch file, each in a fresh process.

    Raises:
        RuntimeError: a case failed.
    """
    log = folder / "log"
    arguments = [json.dumps({name: list(shape) for name, shape in shapes.items()}), str(log), str(steps), str(share)]
    _child("write", *arguments)
    largest = max(math.prod(shape) for shape in shapes.values()) * torch.bfloat16.itemsize
    n = sum(math.prod(shape) for shape in shapes.values())
    limit = BAR * largest + n / 8
    cases = {}
    for method in methods:
        for scratch in (True, False):
            place = str(folder / "scratch") if scratch else ""
            found = _child("measure", str(log), method, str(sparsity), place, str(folder / "mask.safetensors"))
            met = bool(found["active"] == found["expected"] and 0 < found["growth_bytes"] < limit)
            cases[f"{method}{', scratch file' if scratch else ''}"] = {**found, "met": met}
            print(f"{method}{', scratch file' if scratch else ''}: {found}", file=sys.stderr)
    files = sum(path.stat().st_size for path in log.glob("delta_step_*.safetensors"))
    return {
        "parameters": n, "steps": steps, "changed_share": share, "sparsity": sparsity, "largest_tensor_bytes": largest,
        "budget_bytes": -(-n // 8), "limit_bytes": int(limit), "delta_files_bytes": files, "cases": cases,
    }  # fmt: skip


def _child(*arguments: str) -> dict[str, Any]:
    # -P: a source tree in the working directory must not shadow the installed package.
    command = [sys.executable, "-P", "-m", "sparseopt.benchmarks.mask_finding", "--child", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the case {' '.join(arguments[:3])} failed (exit code {done.returncode}).")
    return json.loads(done.stdout or "{}")


def _serve(job: str, *arguments: str) -> None:
    if job == "write":
        shapes, log, steps, share = arguments
        write_log(log, json.loads(shapes), int(steps), float(share))
    else:
        log, method, sparsity, scratch, output = arguments
        print(json.dumps(measure(log, method, float(sparsity), scratch or None, output)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code: 1 when the bar was missed."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["--child"]:
        _serve(*given[1:])
        return 0
    parser = argparse.ArgumentParser(
        prog="python -m sparseopt.benchmarks.mask_finding", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--shape", default="llama-3.2-1b", help="model whose shapes are taken (%(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="logged steps (%(default)s)")
    parser.add_argument("--share", type=float, default=0.05, help="of all entries, changed at each step (%(default)s)")
    parser.add_argument("--sparsity", type=float, default=0.975, help="of the mask (%(default)s)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--folder", type=Path, help="where log and scratch files go for the time (the system's)")
    parser.add_argument("--output", type=Path, help="folder for mask-finding-DEVICE.json")
    options = parser.parse_args(given)

    from sparseopt.benchmarks.train_results import commit, environment, slug
    from sparseopt.shapes import parameter_shapes

    shapes = parameter_shapes(options.shape)
    folder = Path(tempfile.mkdtemp(prefix="mask_finding.", dir=options.folder))
    try:
        found = run(shapes, options.steps, options.share, options.methods, options.sparsity, folder)
    finally:
        shutil.rmtree(folder)
    where = environment(torch.device("cpu"))
    command = (
        f"python -m sparseopt.benchmarks.mask_finding --shape {options.shape} --steps {options.steps} "
        f"--share {options.share} --sparsity {options.sparsity} --methods {' '.join(options.methods)}"
    )
    result = {
        "benchmark": "mask finding", "device": where["device"], "date": datetime.date.today().isoformat(),
        "commit": commit(), "command": command,
        "environment": where, "shape": options.shape, **found,
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    if options.output is not None:
        atomic_write(
            options.output / f"mask-finding-{slug(str(where['device']))}.json", json.dumps(result, indent=1) + "\n"
        )
    return 0 if all(case["met"] for case in found["cases"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
