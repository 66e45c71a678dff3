"""sparseopt's projections beside dattri's LoGra and bergson's: same model, batch and values per layer; speed, memory, accuracy.

    pip install dattri bergson && python -m sparseopt.benchmarks.projection_peers --shape llama-3.2-1b --batch 8 --seq 1024

LoGra is called as its attributor does: model.forward patched by its HookManager, compressors of proj_type "normal", the batch's
loss from whole logits, parameters as they come; bergson through its InMemoryCollector, parameters frozen as it freezes them,
with its copies to the host. Arms run in turns, each on its own copy of the model. The Gram error is the
Frobenius norm of (Gram matrix of a batch's projections - that of its exact gradients of the same layers) over that of the latter,
the mean over seeds of the matrices; "scaled" is after the best common factor, for a peer with another scale. dattri projects
nn.Linear only.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import datetime
import importlib.metadata
import importlib.util
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import sparseopt as so
from sparseopt._files import atomic_write
from sparseopt.benchmarks import train_results
from sparseopt.benchmarks.projection import WARM_UP, check
from sparseopt.benchmarks.train_settings import device_of
from sparseopt.progress import Progress
from sparseopt.projection.graph import GraphedProjection

__all__ = ["gram_errors", "main", "measure"]

Pass = Callable[[], Tensor]


def sample_losses(model: Any, tokens: Tensor) -> Tensor:
    """Mean loss of each sample, from whole logits."""
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    losses = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none")
    return losses.view(len(tokens), -1).mean(1)


def plain(model: Any, tokens: Tensor, settings: dict[str, Any], seed: int) -> Pass:
    """An ordinary forward and backward pass; nothing is projected."""

    def run() -> Tensor:
        model.zero_grad(set_to_none=True)
        sample_losses(model, tokens).mean().backward()
        return torch.empty(0)

    return run


def ours(model: Any, tokens: Tensor, settings: dict[str, Any], seed: int) -> Pass:
    projector = so.GradientProjector(model, settings["layers"], settings["rank_total"], seed=seed, dtype="float32")
    projector.__enter__()  # for good: the model is this arm's own copy, and the peer's stays patched too

    def run() -> Tensor:
        projector.losses(tokens).sum().backward()
        return projector.collect()

    return run


def ours_compiled(model: Any, tokens: Tensor, settings: dict[str, Any], seed: int) -> Pass:
    model.base_model.compile()
    return ours(model, tokens, settings, seed)


def ours_graphed(model: Any, tokens: Tensor, settings: dict[str, Any], seed: int) -> Pass:
    projector = so.GradientProjector(model, settings["layers"], settings["rank_total"], seed=seed, dtype="float32")
    projector.__enter__()
    graph, everything = GraphedProjection(projector, *tokens.shape), torch.ones_like(tokens)
    return lambda: graph(tokens, everything)[0]


def logra(model: Any, tokens: Tensor, settings: dict[str, Any], seed: int) -> Pass:
    from dattri.algorithm.block_projected_if.core.compressor import setup_model_compressors
    from dattri.algorithm.block_projected_if.core.hook import HookManager

    names = [
        layer.modules[0] for layer in so.GradientProjector(model, settings["layers"], settings["rank_total"]).layers
    ]
    device, side = str(tokens.device), round(settings["rank_total"] ** 0.5)
    common = {"device": device, "proj_max_batch_size": 64, "proj_seed": seed}
    compressors = setup_model_compressors(
        model, names, sparsifier_kwargs={**common, "proj_dim": side, "proj_type": "normal"},
        projector_kwargs={**common, "proj_dim": -1, "proj_type": "identity"}, sample_inputs={"input_ids": tokens}, device=device,
    )  # fmt: skip
    hooks = HookManager(model, names, device=device)
    hooks.set_compressors(compressors)

    def run() -> Tensor:
        model.zero_grad(set_to_none=True)
        sample_losses(model, tokens).sum().backward()
        return torch.cat([values.flatten(1).float() for values in hooks.get_compressed_grads()], 1)

    return run


def bergson(model: Any, tokens: Tensor, settings: dict[str, Any], seed: int) -> Pass:
    from bergson import GradientProcessor, IndexConfig, InMemoryCollector
    from datasets import Dataset

    names = {
        layer.modules[0] for layer in so.GradientProjector(model, settings["layers"], settings["rank_total"]).layers
    }
    model.requires_grad_(False)
    model.get_input_embeddings().requires_grad_(True)  # as bergson loads models: the graph must begin somewhere
    collector = InMemoryCollector(
        model=model, target_modules=names, data=Dataset.from_dict({"length": [tokens.shape[1]] * len(tokens)}),
        cfg=IndexConfig(run_path=""), processor=GradientProcessor(
            projection_dim=round(settings["rank_total"] ** 0.5), projection_type="normal", projection_seed=seed),
    )  # fmt: skip

    def run() -> Tensor:
        with collector:
            losses = sample_losses(model, tokens)
            losses.sum().backward()
            model.zero_grad()
            if tokens.is_cuda:
                torch.cuda.synchronize()  # its copies to the host do not wait
            rows = torch.cat([values.flatten(1).float() for values in collector.mod_grads.values()], 1)
            collector.process_batch(list(range(len(tokens))), losses=losses)
        return rows

    return run


# dattri and bergson: as far as they are installed.
ARMS: dict[str, Callable[..., Pass]] = {"plain": plain, "dattri LoGra": logra, "bergson": bergson, "sparseopt": ours}
# Peers patch and hook Python: they have no such modes.
MODES = {"compiled": ours_compiled, "graph": ours_graphed}
PEERS = {"dattri LoGra": "dattri", "bergson": "bergson"}


def installed() -> dict[str, Callable[..., Pass]]:
    """The arms that can run here, all eager."""
    return {name: arm for name, arm in ARMS.items() if name not in PEERS or importlib.util.find_spec(PEERS[name])}


def measure(model: Any, tokens: Tensor, settings: dict[str, Any]) -> dict[str, Any]:
    """Arm -> ``milliseconds`` (median, p20, p80), ``tokens_per_second``, and on a GPU ``peak_bytes`` (weights included)."""
    device, cuda = tokens.device, tokens.device.type == "cuda"
    own = sum(p.numel() * p.element_size() for p in model.parameters())
    arms = installed() | {f"sparseopt, {mode}": MODES[mode] for mode in settings.get("modes", ())}
    models = {name: copy.deepcopy(model) for name in arms}
    runs = {name: build(models[name], tokens, settings, 42) for name, build in arms.items()}
    times: dict[str, list[float]] = {name: [] for name in arms}
    found: dict[str, Any] = {name: {} for name in arms}
    with Progress("passes", WARM_UP + settings["rounds"], unit="round") as progress:
        for turn in range(WARM_UP + settings["rounds"]):
            for name, run in runs.items():
                models[name].zero_grad(set_to_none=True)
                before = 0
                if cuda:
                    torch.cuda.synchronize(device)
                    torch.cuda.reset_peak_memory_stats(device)
                    before = torch.cuda.memory_allocated(device)
                start = time.perf_counter()
                run()
                if cuda:
                    torch.cuda.synchronize(device)
                    found[name]["peak_bytes"] = torch.cuda.max_memory_allocated(device) - before + own
                if turn >= WARM_UP:
                    times[name].append(1e3 * (time.perf_counter() - start))
            progress.update()
    for name, values in times.items():
        found[name]["milliseconds"] = train_results.quantiles(values)
        found[name]["tokens_per_second"] = round(1e3 * tokens.numel() / statistics.median(values), 1)
    return found


def gram_errors(
    model: Any, tokens: Tensor, settings: dict[str, Any], seeds: Sequence[int]
) -> dict[str, dict[str, float]]:
    """Arm -> ``gram_error`` and ``gram_error_scaled``, relative, mean over ``seeds``."""
    exact = _exact_gram(copy.deepcopy(model), tokens, settings["layers"])
    found: dict[str, dict[str, float]] = {}
    for name, build in installed().items():
        if name == "plain":
            continue
        raw, scaled = [], []
        for seed in seeds:
            rows = build(copy.deepcopy(model), tokens, settings, seed)().double().cpu()
            gram = rows @ rows.T
            raw.append(float((gram - exact).norm() / exact.norm()))
            factor = (gram * exact).sum() / gram.square().sum()
            scaled.append(float((factor * gram - exact).norm() / exact.norm()))
        found[name] = {"gram_error": statistics.mean(raw), "gram_error_scaled": statistics.mean(scaled)}
    return found


def _exact_gram(model: Any, tokens: Tensor, layers: str) -> Tensor:
    """Inner products of the samples' exact gradients, fp64[B, B] on the CPU; all gradients are held at once, in their dtype."""
    parameters = dict(model.named_parameters())
    names = [f"{layer.name}.weight" for layer in so.GradientProjector(model, layers).layers]
    wanted = [parameters[name] for name in names]
    samples = [torch.autograd.grad(sample_losses(model, sample[None]).sum(), wanted) for sample in tokens]
    gram = torch.zeros(len(tokens), len(tokens), dtype=torch.float64)
    for gradients in zip(*samples, strict=True):  # of one weight
        rows = torch.stack([gradient.flatten() for gradient in gradients])
        for part in rows.split(2**20, dim=1):  # short enough for sums in fp32
            gram += (part.float() @ part.float().T).double().cpu()
    return gram


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m sparseopt.benchmarks.projection_peers", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--shape", help="llama-3.2-1b, tiny, ...: random weights")
    parser.add_argument("--model", help="smollm2, a folder or a Hub name")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq", type=int, default=1024)
    parser.add_argument("--layers", default="mlp,attn")
    parser.add_argument("--rank_total", type=int, default=256, help="a square number")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=5, help="of the matrices, for the Gram error")
    parser.add_argument(
        "--modes", nargs="*", default=[], choices=MODES, help="of sparseopt's passes, beside eager ones"
    )
    parser.add_argument("--gram_seq", type=int, help="tokens of a sample for the Gram error (default: --seq)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, metavar="FILE", help="store JSON there")
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(given)
    if (options.shape is None) == (options.model is None):
        parser.error("give --shape or --model")
    if round(options.rank_total**0.5) ** 2 != options.rank_total:
        parser.error(f"--rank_total must be a square number for LoGra, got {options.rank_total}")
    if options.batch < 2:
        parser.error("--batch must be at least 2: a Gram matrix is of several samples")
    peers = [name for name in PEERS if name in installed()]
    if not peers:
        raise SystemExit("neither dattri nor bergson is installed: there is no peer (pip install dattri bergson).")
    device, dtype = device_of(options.device, parser), getattr(torch, options.dtype)
    from sparseopt import models
    from sparseopt.shapes import build_shape

    model: Any = (
        build_shape(options.shape, device=device, dtype=dtype)
        if options.shape
        else models.load_model(options.model, options.dtype, device)
    )
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (options.batch, options.seq), generator=generator).to(device)
    settings = {"layers": options.layers, "rank_total": options.rank_total, "rounds": options.rounds,
                "modes": options.modes}  # fmt: skip
    errors = check(model, tokens, {**settings, "mode": "eager"})  # refuses to time what is wrong
    with contextlib.redirect_stdout(sys.stderr):  # the peer talks
        arms = measure(model, tokens, settings)
        for name, values in gram_errors(model, tokens[:, : options.gram_seq], settings, range(options.seeds)).items():
            arms[name] |= values
    result = {
        "date": datetime.date.today().isoformat(), "commit": train_results.commit(),
        "command": shlex.join(["python", "-m", "sparseopt.benchmarks.projection_peers",
                               *("FILE" if word == str(options.output) else word for word in given)]),
        "environment": {**train_results.environment(device),
                        **{PEERS[name]: importlib.metadata.version(PEERS[name]) for name in peers}},
        **errors, "arms": arms,
        "tokens_per_second_ratio": {
            name: {peer: round(arms[name]["tokens_per_second"] / arms[peer]["tokens_per_second"], 3) for peer in peers}
            for name in arms if name.startswith("sparseopt")
        },
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    if options.output is not None:
        atomic_write(options.output, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
