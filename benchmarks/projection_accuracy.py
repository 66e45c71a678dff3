"""How well projections keep squared norms and dot products: the plain one beside the two-stage sketch, of equal size.

    python -m sparseopt.benchmarks.projection_accuracy --model smollm2 --data build/texts --output accuracy.json

Errors are root mean squares over layers, samples and seeds of the matrices, in percent: of a layer's squared norm, relative to
it; of the dot product of two samples' gradients of a layer, relative to the product of their norms; and the same of the whole
gradient of the projected layers (its entries side by side). ``rank-1`` gradients, u v^T with Gaussian u and v, are what a layer
gets from a single token, the hardest case for P_o dW P_i^T; a dense Gaussian matrix of 256 rows would have sqrt(2/256) = 8.8%.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sparseopt as so
from sparseopt._files import atomic_write
from sparseopt.benchmarks import train_results
from sparseopt.progress import announce_device, track

__all__ = ["errors", "main", "rank_one", "table"]

Gradients = Mapping[str, Tensor]


def errors(
    model: nn.Module, gradients: Gradients, layers: str, seeds: Sequence[int], **options: Any
) -> dict[str, float]:
    """Errors of one kind of projection.

    Args:
        model: its layers' names and shapes matter, its weights do not.
        gradients: parameter name -> exact gradients of n >= 2 samples, [n, *shape].
        layers: patterns; every layer they choose must be in ``gradients``.
        seeds: of the matrices.
        options: of :class:`sparseopt.GradientProjector`: ``rank_total``, ``sketch``, ...

    Returns:
        ``layer squared norm``, ``layer dot product``, ``whole squared norm``, ``whole dot product``: percent.
    """
    squares: dict[str, list[Tensor]] = defaultdict(list)
    for seed in track(list(seeds), "matrices", unit="seed"):
        projector = so.GradientProjector(model, layers, seed=seed, dtype="float32", **options)
        whole, whole_exact = torch.zeros(()), torch.zeros(())
        for layer in projector.layers:
            exact = gradients[f"{layer.name}.weight"].float()
            rows = projector.project(layer.name, exact).double()
            flat = exact.flatten(1).double()
            ours, theirs = rows @ rows.T, flat @ flat.T
            _add(squares, "layer", ours, theirs)
            whole, whole_exact = whole + ours, whole_exact + theirs
        _add(squares, "whole", whole, whole_exact)
    return {name: 100 * math.sqrt(float(torch.cat(values).mean())) for name, values in squares.items()}


def _add(squares: dict[str, list[Tensor]], what: str, ours: Tensor, exact: Tensor) -> None:
    """Squared relative errors of two Gram matrices [n, n]; a sample without a gradient there has none."""
    norms = exact.diagonal().sqrt()
    wrong = ((ours - exact) / (norms[:, None] * norms)).square()
    there = (norms[:, None] * norms) > 0
    own = torch.eye(len(norms), dtype=torch.bool)
    squares[f"{what} squared norm"].append(wrong[own & there])
    squares[f"{what} dot product"].append(wrong[~own & there])


def rank_one(shape: tuple[int, int], samples: int, seed: int = 0) -> Tensor:
    """Independent matrices u v^T, [samples, d_out, d_in]."""
    generator = torch.Generator().manual_seed(seed)
    u, v = (torch.randn(samples, d, generator=generator) for d in shape)
    return u[:, :, None] * v[:, None, :]


def real(model: Any, texts: Iterator[Tensor], layers: str) -> dict[str, Tensor]:
    """Exact gradients of single samples, of the layers that the patterns choose."""
    names = [f"{layer.name}.weight" for layer in so.GradientProjector(model, layers).layers]
    parameters = dict(model.named_parameters())
    model.requires_grad_(False)
    for name in names:
        parameters[name].requires_grad_(True)
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    for ids in texts:
        loss = model(input_ids=ids[None], labels=ids[None], use_cache=False).loss
        for name, gradient in zip(names, torch.autograd.grad(loss, [parameters[name] for name in names]), strict=True):
            found[name].append(gradient)
    return {name: torch.stack(values) for name, values in found.items()}


def table(found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Markdown: gradients x projection -> errors."""
    columns = list(next(iter(next(iter(found.values())).values())))
    lines = [f"| gradients | projection | {' | '.join(columns)} |", "| --- " * (len(columns) + 2) + "|"]
    for gradients, kinds in found.items():
        for kind, values in kinds.items():
            lines.append(f"| {gradients} | {kind} | {' | '.join(f'{values[name]:.1f}%' for name in columns)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m sparseopt.benchmarks.projection_accuracy", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", help="smollm2, a folder or a Hub name; without it rank-1 gradients only")
    parser.add_argument("--data", help="text for it, as sparseopt project run takes it")
    parser.add_argument("--layers", default="mlp,attn")
    parser.add_argument("--rank_total", type=int, default=256)
    parser.add_argument("--sketch", type=int, default=128)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--block_size", type=int, default=64)
    parser.add_argument(
        "--seeds", type=int, default=3, help="of the matrices, for the model; rank-1 takes 100 times as many"
    )
    parser.add_argument("--shape", type=int, nargs=2, default=(1536, 576), help="d_out, d_in of rank-1 gradients")
    parser.add_argument("--output", type=Path, metavar="FILE", help="store JSON there")
    options = parser.parse_args(arguments)
    if options.model is not None and options.data is None:
        parser.error("--model needs --data")
    if options.samples < 2:
        parser.error("--samples must be at least 2: dot products are of two")
    kinds: dict[str, dict[str, Any]] = {
        "plain": {"rank_total": options.rank_total},
        f"sketch {options.sketch} x {options.sketch}": {"rank_total": options.rank_total, "sketch": options.sketch},
    }
    d_out, d_in = options.shape
    layer = nn.ModuleDict({"mlp": nn.Linear(d_in, d_out, bias=False, device="meta")})
    one = {"mlp.weight": rank_one((d_out, d_in), options.samples)}
    found = {"rank-1": {kind: errors(layer, one, "mlp", range(100 * options.seeds), **o) for kind, o in kinds.items()}}
    if options.model is not None:
        from sparseopt import models
        from sparseopt.projection import text

        model = models.load_model(options.model, "float32", announce_device("cpu"))
        documents, _ = text.documents(options.data)
        samples = text.token_samples(
            documents, models.load_tokenizer(options.model), options.block_size, limit=options.samples
        )
        exact = real(model, (sample.input_ids for sample in samples), options.layers)
        label = f"{options.model}, {options.samples} samples of {options.block_size} tokens"
        found[label] = {
            kind: errors(model, exact, options.layers, range(options.seeds), **o) for kind, o in kinds.items()
        }
    print(table(found))
    if options.output is not None:
        about = {"date": datetime.date.today().isoformat(), "commit": train_results.commit(),
                 "settings": {k: v for k, v in vars(options).items() if k not in ("output", "data")}}  # fmt: skip
        atomic_write(options.output, json.dumps({**about, "errors_percent": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
