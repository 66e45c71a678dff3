"""Projecting per-sample gradients against a plain forward and backward pass, in time and memory.

    python -m sparseopt.benchmarks.projection --shape gpt2 --batch 16 --seq 1024 --output benchmarks/results

Arms, each on its own copy of one model, in turns: ``plain`` (the model's own loss, all weight gradients), ``no weight
gradients`` (weights frozen, gradients of activations down to the embeddings), ``naive hooks`` (the same, with hooks that
keep inputs and project), and sparseopt. A pass is forward and backward, from an idle device to an idle device. Modes: eager;
compiled (``torch.compile`` of the whole model, of its base for sparseopt, whose head is not part of the model's forward);
graph (the pass as one CUDA graph). Nothing is timed unless projections agree with exact gradients of single samples.
Weights are random where a shape is named.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import datetime
import json
import re
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sparseopt as so
from sparseopt._files import atomic_write
from sparseopt.benchmarks import report, train_results
from sparseopt.benchmarks.train_settings import device_of
from sparseopt.progress import Progress

__all__ = ["ARMS", "BARS", "main", "measure"]

ARMS = ("plain", "no weight gradients", "naive hooks", "sparseopt")
MODES = ("eager", "compiled", "graph")
# (shape, batch x seq, mode) -> baseline -> how many times faster. The graph's eager bar compares with an eager plain pass.
BARS: dict[tuple[str, str, str], dict[str, float]] = {
    **{(shape, size, mode): {"plain": 1 / 0.78, "peak memory of plain": 1.0}
       for shape, size in (("gpt2", "16 x 1024"), ("llama-3.2-1b", "8 x 1024")) for mode in ("eager", "compiled")},
    **{("gpt2", "2 x 1024", mode): {"plain": 1 / 0.85, "plain, eager": 1 / 0.6} for mode in ("compiled", "graph")},
    ("smollm2", "4 x 256", "eager, cpu"): {"plain": 1 / 0.85},
}  # fmt: skip
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 3e-2}
WARM_UP = 3


class Arm:
    """One way to do a pass, on its own copy of the model.

    Attributes:
        run: one pass.
        own_bytes: of the model.
    """

    def __init__(self, name: str, model: Any, tokens: Tensor, settings: dict[str, Any], stack: ExitStack) -> None:
        self.name, self.own_bytes = name, sum(p.numel() * p.element_size() for p in model.parameters())
        self.model, self.tokens = model, tokens
        mode = settings["mode"]
        self.projector: so.GradientProjector | None = None
        if name == "sparseopt":
            if mode == "compiled":
                model.base_model.compile()
            self.projector = stack.enter_context(_projector(model, settings))
        else:
            if name != "plain":
                model.requires_grad_(False)
                # Activations below the first block need gradients, as if an adapter were there.
                model.get_input_embeddings().register_forward_hook(lambda _, __, out: out.requires_grad_(True))
            if name == "naive hooks":
                self.hooks = _NaiveHooks(model, settings)
            if mode == "compiled":
                model.compile()
        self.run: Callable[[], Any] = self._pass
        if mode == "graph":
            self.run = _recorded(self._pass)

    def _pass(self) -> Any:
        if self.projector is not None:
            self.projector.losses(self.tokens).sum().backward()
            return self.projector.collect()
        if self.name == "plain":
            self.model.zero_grad(set_to_none=True)
        self.model(input_ids=self.tokens, labels=self.tokens, use_cache=False).loss.backward()
        return self.hooks.collect() if self.name == "naive hooks" else None


class _NaiveHooks:
    """Inputs kept by forward hooks, projected in full backward hooks, layer by layer."""

    def __init__(self, model: nn.Module, settings: dict[str, Any]) -> None:
        projector = _projector(model, settings)
        modules = dict(model.named_modules())
        self.slices: dict[str, Tensor] = {}
        for layer in projector.layers:
            module, weight = modules[layer.modules[0]], modules[layer.modules[0]].weight
            inner, outer = (m.to(weight.device, weight.dtype) for m in projector.projection_matrices(layer.name))
            module.register_forward_hook(self._keep)
            module.register_full_backward_hook(self._project(layer.name, inner, outer))

    @staticmethod
    def _keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        module._kept = inputs[0].detach()

    def _project(self, name: str, inner: Tensor, outer: Tensor) -> Callable[..., None]:
        def hook(module: nn.Module, _: Any, gradients: tuple[Tensor, ...]) -> None:
            kept: Any = module._kept
            self.slices[name] = (gradients[0] @ outer.T).transpose(1, 2) @ (kept @ inner.T)
            del module._kept

        return hook

    def collect(self) -> Tensor:
        rows = torch.cat([values.flatten(1) for values in self.slices.values()], 1)
        self.slices.clear()
        return rows


def _projector(model: nn.Module, settings: dict[str, Any], dtype: str = "bfloat16") -> so.GradientProjector:
    return so.GradientProjector(model, settings["layers"], settings["rank_total"], dtype=dtype)


def _recorded(run: Callable[[], Any]) -> Callable[[], Any]:
    """The pass as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def check(model: Any, tokens: Tensor, settings: dict[str, Any]) -> dict[str, float]:
    """Compares projections with exact gradients in fp32, projected; stops the program where they are too far off.

    In 16 bits the backward pass itself rounds: beside the error of the projections stands that of the model's own 16-bit
    gradients, projected likewise. Projections may be off by the dtype's bound, or by half more than those gradients are.

    Returns:
        ``largest_relative_error`` of a sample's layer (2-norms), and ``of_plain_gradients``.
    """
    few = tokens[:2, :128]
    projector = _projector(model, settings, "float32")
    with projector:
        projector.losses(few).sum().backward()
        rows = projector.collect()
    dtype = next(model.parameters()).dtype
    names = {layer.name: f"{layer.name}.weight" for layer in projector.layers}
    exact = model if dtype == torch.float32 else copy.deepcopy(model).float()
    worst, plain = 0.0, 0.0
    for sample, row in zip(few, rows, strict=True):
        true, own = (_gradients(copied, sample, names) for copied in (exact, model))
        for layer in projector.layers:
            goal = projector.project(layer.name, true[layer.name])
            ours = row[layer.slice_start : layer.slice_end]
            worst = max(worst, float((ours - goal).norm() / goal.norm()))
            plain = max(plain, float((projector.project(layer.name, own[layer.name]) - goal).norm() / goal.norm()))
    bound = max(TOLERANCE[dtype], 1.5 * plain)
    if not worst <= bound:
        raise SystemExit(f"projections are {worst:.2e} off exact gradients (bound {bound:.2g}); no speed is reported.")
    return {"largest_relative_error": worst, "of_plain_gradients": plain}


def _gradients(model: Any, sample: Tensor, names: dict[str, str]) -> dict[str, Tensor]:
    """Layer -> exact gradient of one sample's loss, fp32."""
    parameters = dict(model.named_parameters())
    loss = model(input_ids=sample[None], labels=sample[None], use_cache=False).loss
    found = torch.autograd.grad(loss, [parameters[name] for name in names.values()])
    return {layer: gradient.float() for layer, gradient in zip(names, found, strict=True)}


def measure(model: Any, tokens: Tensor, settings: dict[str, Any]) -> dict[str, Any]:
    """Times the arms in turns.

    Returns:
        arm -> ``milliseconds`` (median, p20, p80) and on a GPU ``peak_bytes`` (weights included).
    """
    device = tokens.device
    names = [*settings["arms"], *(["plain, eager"] if settings["mode"] != "eager" else [])]
    found: dict[str, Any] = {}
    with ExitStack() as stack:
        arms = {}
        for name in names:
            own = {**settings, "mode": "eager"} if name == "plain, eager" else settings
            arms[name] = Arm(name.partition(",")[0], copy.deepcopy(model), tokens, own, stack)
        times: dict[str, list[float]] = {name: [] for name in arms}
        with Progress("passes", WARM_UP + settings["rounds"], unit="round") as progress:
            for turn in range(WARM_UP + settings["rounds"]):
                for name, arm in arms.items():
                    if settings["mode"] != "graph":
                        arm.model.zero_grad(set_to_none=True)  # else gradients of the last turn would hide in `before`
                    _wait(device)
                    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
                    if device.type == "cuda":
                        torch.cuda.reset_peak_memory_stats(device)
                    start = time.perf_counter()
                    arm.run()
                    _wait(device)
                    if turn >= WARM_UP:
                        times[name].append(1e3 * (time.perf_counter() - start))
                    if device.type == "cuda":
                        found[name] = {"peak_bytes": torch.cuda.max_memory_allocated(device) - before + arm.own_bytes}
                progress.update()
    for name, values in times.items():
        found[name] = {**found.get(name, {}), "milliseconds": train_results.quantiles(values)}
    return found


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def summary(
    found: dict[str, Any], errors: dict[str, float], settings: dict[str, Any], about: dict[str, Any]
) -> dict[str, Any]:
    """One suite of a result file, as the report shows it."""
    mine = found["sparseopt"]["milliseconds"]
    baselines = {
        name: {**arm["milliseconds"], "ratio": round(arm["milliseconds"]["median"] / mine["median"], 3)}
        for name, arm in found.items() if name != "sparseopt"
    }  # fmt: skip
    facts = {}
    for name, arm in found.items():
        if "peak_bytes" in arm and name != "sparseopt":
            facts[f"peak memory of {name}"] = round(arm["peak_bytes"] / found["sparseopt"]["peak_bytes"], 3)
    mode = settings["mode"] if settings["device"] != "cpu" else f"{settings['mode']}, cpu"
    bars = {}
    for name, least in BARS.get((settings["shape"] or settings["model"], settings["size"], mode), {}).items():
        measured = facts[name] if name in facts else baselines[name]["ratio"] if name in baselines else None
        if measured is not None:
            bars[name] = {"at_least": round(least, 3), "measured": measured, "met": measured >= least}
    case: dict[str, Any] = {
        "rounds": settings["rounds"],
        "sparseopt": mine,
        "baselines": baselines,
        "facts": facts,
        "bars": bars,
        **{key: about[key] for key in ("commit", "date") if key in about},
    }
    return {**about, "cases": {f"{settings['size']}, {settings['mode']}": case}, "arms": found, "settings": settings,
            **errors}  # fmt: skip


def store(folder: Path, suite: str, found: dict[str, Any]) -> Path:
    """Adds a suite to FOLDER/<device>.json, beside other benchmarks' suites; its own other cases stay."""
    device, threads = str(found["environment"]["device"]), found["environment"].get("threads")
    device += f" {threads} threads" if threads else ""
    path = folder / f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.json"
    stored: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"device": device, "suites": {}}
    before = stored["suites"].get(suite, {"cases": {}})
    stored["suites"][suite] = {**found, "cases": {**before["cases"], **found["cases"]}}
    atomic_write(path, json.dumps(stored, indent=1) + "\n")
    return path


def parser(prog: str) -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--shape", help="gpt2, llama-3.2-1b, ...: random weights")
    parser.add_argument("--model", help="smollm2, a folder or a Hub name")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seq", type=int, default=1024)
    parser.add_argument("--layers", default="mlp,attn")
    parser.add_argument("--rank_total", type=int, default=256)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--mode", nargs="+", default=["eager"], choices=MODES)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="store <device>.json there")
    parser.add_argument("--json", action="store_true", help="print JSON in place of a table")
    return parser


def main(arguments: Sequence[str] | None = None, prog: str = "python -m sparseopt.benchmarks.projection") -> None:
    """Command line; ``prog`` is what it is called by."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser(prog).parse_args(given)
    if (options.shape is None) == (options.model is None):
        parser(prog).error("give --shape or --model")
    if "sparseopt" not in options.arms or "plain" not in options.arms:
        parser(prog).error("--arms must hold plain and sparseopt")
    device = device_of(options.device, parser(prog))
    from sparseopt import models
    from sparseopt.shapes import build_shape

    dtype = getattr(torch, options.dtype)
    if options.shape:
        model: Any = build_shape(options.shape, device=device, dtype=dtype)
    else:
        model = models.load_model(options.model, options.dtype, device)
    size = (options.batch, options.seq)
    tokens = torch.randint(model.config.vocab_size, size, generator=torch.Generator().manual_seed(0)).to(device)
    settings = {
        "shape": options.shape, "model": options.model, "size": f"{options.batch} x {options.seq}", "dtype": options.dtype,
        "layers": options.layers, "rank_total": options.rank_total, "rounds": options.rounds, "arms": options.arms,
        "device": device.type,
    }  # fmt: skip
    errors = check(model, tokens, {**settings, "mode": "eager"})
    print("against exact gradients in fp32: " + ", ".join(f"{k} {v:.2e}" for k, v in errors.items()), file=sys.stderr)
    shown: dict[str, Any] = {}
    for mode in options.mode:
        about = {
            "date": datetime.date.today().isoformat(), "commit": train_results.commit(),
            # Folders of one machine mean nothing elsewhere.
            "command": shlex.join([*prog.split(), *(_neutral(word, options.output) for word in given)]),
            "environment": train_results.environment(device),
        }  # fmt: skip
        with contextlib.redirect_stdout(sys.stderr):
            found = summary(
                measure(model, tokens, {**settings, "mode": mode}), errors, {**settings, "mode": mode}, about
            )
        name = f"{options.shape} shapes, random weights" if options.shape else str(options.model)
        suite = f"projection, {name}, {options.dtype}, {options.rank_total} values a layer of {options.layers}"
        shown.setdefault(suite, {}).update(found["cases"])
        if options.output is not None:
            print(f"stored in {store(options.output, suite, found)}", file=sys.stderr)
    if options.json:
        print(json.dumps(shown, indent=1))
        return
    for suite, cases in shown.items():
        print(f"{suite}\n\n{report.table(cases)}")


def _neutral(word: str, folder: Path | None) -> str:
    name, equals, value = word.rpartition("=")
    return f"{name}{equals}FOLDER" if folder is not None and value == str(folder) else word


if __name__ == "__main__":
    main()
