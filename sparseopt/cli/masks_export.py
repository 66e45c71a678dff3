"""``sparseopt masks export``: flags and printing; :mod:`sparseopt.deltas.pruned` does the work."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from sparseopt.cli._command import DebugFlag, DeviceOption, JsonFlag, example, print_json

__all__ = ["EXAMPLE", "export"]

EXAMPLE = example("sparseopt masks export --mask mask.safetensors --model_name smollm2 --output_dir smollm2_pruned")


def export(
    mask: Annotated[Path, typer.Option("--mask", metavar="FILE", help="Mask file.")],
    model_name: Annotated[str, typer.Option("--model_name", help="smollm2, a model folder or a Hub name.")],
    output_dir: Annotated[Path, typer.Option("--output_dir", metavar="DIR", help="New folder for the pruned model.")],
    keep_unmasked: Annotated[
        bool,
        typer.Option(
            "--keep_unmasked/--no_keep_unmasked",
            help="Parameters whose mask has nothing active (embeddings that were excluded, say) keep their weights, or "
            "become 0. Tensors without a mask are always kept.",
        ),
    ] = True,
    max_shard_size: Annotated[
        str, typer.Option("--max_shard_size", help="Largest weight file, such as 5GB or 200MiB.")
    ] = "5GB",
    device: DeviceOption = "auto",
    json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Write a model folder for from_pretrained in which the weights outside a mask are 0.

    Masks say which weights are worth training. The others still matter: without them most models are destroyed, unless
    they were trained sparse.
    """
    if device not in ("auto", "cpu"):
        raise typer.BadParameter(f"models are exported on the CPU: --device is auto or cpu, got {device!r}.")
    from sparseopt import MaskSet
    from sparseopt.deltas._model_folder import parse_size
    from sparseopt.deltas.pruned import write_pruned

    try:
        size = parse_size(max_shard_size)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    about = write_pruned(model_name, MaskSet.load(mask), output_dir, keep_unmasked=keep_unmasked, max_shard_size=size)
    print(
        "Warning: pruning by masks of gradients or updates usually destroys a model, unless it was trained sparse: "
        "evaluate it before use.",
        file=sys.stderr,
    )
    if json:
        print_json({"output_dir": str(output_dir), **about})
        return
    print(
        f"{output_dir}: {about['zero_parameters']:,} of {about['total_parameters']:,} weights are 0 "
        f"({about['zero_share']:.2%}), {about['bytes']:,} bytes in {', '.join(about['files'])}"
    )
    if about["kept"]:
        print(f"kept all weights of {len(about['kept'])} tensors, {about['kept'][0]} among them")
