"""2:4 weights in PyTorch's semi-structured format beside the same weights stored densely: inference on a CUDA GPU.

    python -m sparseopt.benchmarks.semi_structured --output DIR --shape llama-3.2-1b --tokens 512 4096

Weights are random, two of every four zeroed by magnitude; both arms hold the same values. ``layers``: each kind of linear layer
alone, the GPU's time by CUDA events, caches overwritten before each call. ``model``: a forward pass without cache, logits of the
last 64 positions, from an idle device to an idle one, so that the host's time counts. Arms are timed in turns, medians with 20%
and 80% quantiles of 20 rounds after 5 of warm-up. Errors are relative Frobenius norms against fp32; no speed is reported where
that of 2:4 is above twice the dense one's (plus 0.001). What torch cannot compile is recorded as its error. ``bytes``: the
weights' own; ``peak_bytes``: what a pass takes on top.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparseopt as so
from sparseopt._files import atomic_write
from sparseopt.benchmarks import train_results
from sparseopt.benchmarks.gpu_optimizer import ROUNDS, WARM_UP, Arm, environment, time_in_turns
from sparseopt.optim.dynamic.layers import find_layers
from sparseopt.optim.dynamic.patterns import parse_pattern
from sparseopt.progress import Progress, announce_device
from sparseopt.semi_structured import BACKENDS, semi_structured_backend
from sparseopt.shapes import SHAPES, build_shape, get_shape, linear_shapes

__all__ = ["check", "main", "measure_layer", "measure_model", "prune"]

KEPT_LOGITS = 64
SEQUENCE = 2048  # at most; more tokens are more sequences
MODES = ("eager", "compiled")
Run = Callable[[], Tensor]


def prune(model: nn.Module) -> so.MaskSet:
    """Zeroes two of every four weights of the model's linear layers, the smallest, in place; returns what was kept."""
    pattern, masks = parse_pattern("2:4"), {}
    for layer in find_layers(model):
        weight = layer.param.detach()
        masks[layer.name] = pattern.select(layer, weight.abs().float(), layer.numel // 2)
        weight.mul_(masks[layer.name])
    return so.MaskSet.from_bool({name: mask.cpu() for name, mask in masks.items()})


def check(case: str, sparse: Tensor, dense: Tensor, reference: Tensor) -> dict[str, float]:
    """Errors of both arms against fp32, and between them.

    Raises:
        SystemExit: 2:4 is further off than rounding explains.
    """
    outputs = {"2:4": sparse, "dense": dense}
    errors = {name: float((out.float() - reference).norm() / reference.norm()) for name, out in outputs.items()}
    if not errors["2:4"] <= 2 * errors["dense"] + 1e-3:  # NaN fails too
        raise SystemExit(
            f"{case}: 2:4 is off by {errors['2:4']:.2e}, dense by {errors['dense']:.2e}; no speed is reported."
        )
    apart = (sparse.float() - dense.float()).abs().max() / dense.float().abs().max()
    return {**errors, "largest difference": float(apart)}


def measure_layer(outputs: int, inputs: int, tokens: int, mode: str, backend: str) -> dict[str, Any]:
    """One linear layer on [tokens, inputs]."""
    dense = nn.Sequential(nn.Linear(inputs, outputs, bias=False, device="cuda", dtype=torch.bfloat16)).eval()
    masks = prune(dense)
    sparse = copy.deepcopy(dense)
    so.to_semi_structured(sparse, masks, backend=backend)
    x = torch.randn(tokens, inputs, device="cuda", dtype=torch.bfloat16)
    reference = F.linear(x.float(), next(dense.parameters()).detach().float())
    result: dict[str, Any] = {"outputs": outputs, "inputs": inputs, "tokens": tokens, "mode": mode}
    runs = _runs({"dense": dense, "2:4": sparse}, mode, lambda model: model(x))
    found = _warm(runs)
    if isinstance(found, str):
        return {**result, "error": found}
    result["relative_error"] = check(f"{outputs} x {inputs}, {tokens}", found["2:4"], found["dense"], reference)
    times = time_in_turns({name: Arm(run) for name, run in runs.items()})
    return {**result, "ms": times, "speedup": times["dense"]["median"] / times["2:4"]["median"]}


def measure_model(shape: str, tokens: list[int], modes: list[str], backend: str) -> list[dict[str, Any]]:
    """Forward passes of a whole model, as [sequences, at most 2048]."""
    # sdpa's kernels are the same in both arms.
    dense: Any = build_shape(shape, device="cuda").requires_grad_(False)
    masks = prune(dense)
    sparse: Any = copy.deepcopy(dense)
    converted = so.to_semi_structured(sparse, masks, backend=backend)
    sizes = {"dense": weight_bytes(dense), "2:4": weight_bytes(sparse)}
    results = []
    length = min(SEQUENCE, get_shape(shape).positions)
    for count in tokens:
        sequence = min(count, length)
        if count % sequence:
            raise SystemExit(f"{count} tokens are no whole number of sequences of {sequence}.")
        batch = torch.randint(get_shape(shape).vocabulary, (count // sequence, sequence), device="cuda")

        def forward(model: Any, batch: Tensor = batch) -> Tensor:
            return model(input_ids=batch, use_cache=False, logits_to_keep=KEPT_LOGITS).logits

        with torch.no_grad():
            exact = copy.deepcopy(dense).float()
            reference = forward(exact)
            del exact
        for mode in modes:
            result: dict[str, Any] = {
                "tokens": count, "sequences": count // sequence, "mode": mode, "converted_layers": len(converted), "bytes": sizes,
            }  # fmt: skip
            results.append(result)
            runs = _runs({"dense": dense, "2:4": sparse}, mode, forward)
            found = _warm(runs)
            if isinstance(found, str):
                result["error"] = found
                continue
            result["relative_error"] = check(f"{shape}, {count}, {mode}", found["2:4"], found["dense"], reference)
            result["peak_bytes"] = {name: _peak(run) for name, run in runs.items()}
            result["ms"] = _latencies(runs)
            result["speedup"] = result["ms"]["dense"]["median"] / result["ms"]["2:4"]["median"]
    return results


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the parameters, tied ones once."""
    total = 0
    for param in model.parameters():
        whole: Any = param
        if isinstance(whole, torch.sparse.SparseSemiStructuredTensor):
            tensors = [getattr(whole, name) for name in whole.__tensor_flatten__()[0]]
        else:
            tensors = [whole]
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return total


def _runs(models: dict[str, Any], mode: str, forward: Callable[[Any], Tensor]) -> dict[str, Run]:
    torch._dynamo.reset()  # one case's graphs do not crowd the next one's

    def make(model: Any) -> Run:
        called = torch.compile(model, dynamic=False) if mode == "compiled" else model

        def run() -> Tensor:
            with torch.no_grad():
                return forward(called)

        return run

    return {name: make(model) for name, model in models.items()}


def _warm(runs: dict[str, Run]) -> dict[str, Tensor] | str:
    """Each arm's output; compilation happens here. A text: what torch says that it cannot compile."""
    try:
        return {name: run().clone() for name, run in runs.items()}
    except torch._dynamo.exc.TorchDynamoException as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"


def _peak(run: Run) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _latencies(runs: dict[str, Run]) -> dict[str, dict[str, float]]:
    """Milliseconds from an idle device to an idle device, arms in turns and in alternating order."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(WARM_UP + ROUNDS):
        for name in list(runs)[:: 1 if turn % 2 else -1]:
            torch.cuda.synchronize()
            start = time.perf_counter()
            runs[name]()
            torch.cuda.synchronize()
            if turn >= WARM_UP:
                times[name].append(1e3 * (time.perf_counter() - start))
    cuts = {name: statistics.quantiles(values, n=5) for name, values in times.items()}
    return {
        name: {"median": statistics.median(values), "p20": cuts[name][0], "p80": cuts[name][3]}
        for name, values in times.items()
    }


def main(arguments: list[str] | None = None) -> None:
    """Command line; writes DIR/semi-structured-DEVICE-SHAPE.json after every case, prints one line of each."""
    parser = argparse.ArgumentParser(
        prog="sparseopt.benchmarks.semi_structured", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--shape", default="llama-3.2-1b", choices=sorted(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=[512, 4096])
    parser.add_argument("--parts", nargs="+", default=["layers", "model"], choices=("layers", "model"))
    parser.add_argument("--mode", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--backend", default="auto", choices=BACKENDS)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args(arguments)
    if announce_device("auto").type != "cuda":
        raise SystemExit("this benchmark needs a CUDA GPU of compute capability 8.0 or newer.")
    torch.manual_seed(0)
    words = sys.argv[1:] if arguments is None else arguments
    backend = semi_structured_backend(given.backend).BACKEND
    report: dict[str, Any] = {
        "benchmark": "2:4 weights in semi-structured format", "shape": given.shape, "weights": "random, 2:4 by magnitude",
        "dtype": "bfloat16", "backend": backend, "rounds": ROUNDS,
        "command": shlex.join(["python", "-m", "sparseopt.benchmarks.semi_structured", *words]),
        "environment": {**environment(), "date": datetime.date.today().isoformat(), "commit": train_results.commit()},
        "layers": [], "model": [],
    }  # fmt: skip
    given.output.mkdir(parents=True, exist_ok=True)
    device = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    path = given.output / f"semi-structured-{device}-{given.shape}-{backend}.json"

    def keep(part: str, results: list[dict[str, Any]]) -> None:
        report[part] += results
        atomic_write(path, json.dumps(report, indent=1) + "\n")
        for result in results:
            print(part, _line(result), flush=True)

    if "layers" in given.parts:
        sizes = sorted(set(linear_shapes(given.shape).values()))
        cases = [(size, count, mode) for size in sizes for count in given.tokens for mode in given.mode]
        with Progress("layers", len(cases), unit="case") as progress:
            for (outputs, inputs), count, mode in cases:
                keep("layers", [measure_layer(outputs, inputs, count, mode, backend)])
                progress.update()
    if "model" in given.parts:
        for count in given.tokens:
            keep("model", measure_model(given.shape, [count], given.mode, backend))
    print("stored in", path)


def _line(result: dict[str, Any]) -> str:
    size = f"{result['outputs']} x {result['inputs']}, " if "outputs" in result else ""
    start = f"{size}{result['tokens']} tokens, {result['mode']}:"
    if "error" in result:
        return f"{start} {result['error']}"
    times, errors = result["ms"], result["relative_error"]
    return (
        f"{start} dense {times['dense']['median']:.3f} ms, 2:4 {times['2:4']['median']:.3f} ms, {result['speedup']:.2f} times; "
        f"error {errors['dense']:.1e} and {errors['2:4']:.1e}"
    )


if __name__ == "__main__":
    main()
