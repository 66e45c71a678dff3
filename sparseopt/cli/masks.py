"""``sparseopt masks``: find, look at, compare and merge mask files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparseopt.cli import masks_find
from sparseopt.cli._command import Command, DebugFlag, DeviceOption, JsonFlag, example, group, print_json

if TYPE_CHECKING:
    from sparseopt import MaskSet

app = group("masks", help="Find masks; look at, compare and merge mask files (.safetensors or .pt).")
app.command("find", cls=Command, epilog=masks_find.EXAMPLE)(masks_find.find)

PerLayerFlag = Annotated[bool, typer.Option("--per_layer", help="One line per parameter as well.")]


def _load(path: Path, device: str) -> MaskSet:
    if device not in ("auto", "cpu"):
        raise typer.BadParameter(f"mask files are handled on the CPU: --device is auto or cpu, got {device!r}.")
    from sparseopt import MaskSet

    return MaskSet.load(path)


@app.command("info", cls=Command, epilog=example("sparseopt masks info mask.safetensors --per_layer"))
def info(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Mask file.")],
    per_layer: PerLayerFlag = False,
    device: DeviceOption = "auto",
    json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Say what a mask file holds: active entries, sparsity, fingerprint, and how it was found."""
    masks = _load(file, device)
    summary: dict[str, Any] = {
        "file": str(file),
        "parameters": len(masks.names),
        "total_parameters": masks.total_parameters,
        "active_parameters": masks.active_parameters,
        "density": masks.density,
        "sparsity": masks.sparsity,
        "fingerprint": masks.fingerprint,
        "metadata": masks.metadata,
    }
    if per_layer:
        summary["per_layer"] = {name: _layer(masks, name) for name in masks.names}
    if json:
        print_json(summary)
        return
    print(f"{summary['parameters']} parameter tensors, {masks.total_parameters:,} entries")
    print(f"active: {masks.active_parameters:,} (density {masks.density:.4%}, sparsity {masks.sparsity:.4%})")
    print(f"fingerprint: {masks.fingerprint}")
    for key, value in masks.metadata.items():
        print(f"{key}: {value}")
    for name, layer in summary.get("per_layer", {}).items():
        shape = "x".join(map(str, layer["shape"])) or "scalar"
        print(f"  {name} {shape}: {layer['active']:,} active, density {layer['density']:.4%}")


def _layer(masks: MaskSet, name: str) -> dict[str, Any]:
    import math

    from sparseopt import popcount

    shape = tuple(masks.shapes[name])
    active, total = int(popcount(masks.packed(name))), math.prod(shape)
    return {"shape": list(shape), "active": active, "density": active / total if total else 0.0}


@app.command("compare", cls=Command, epilog=example("sparseopt masks compare a.safetensors b.safetensors --json"))
def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="Mask file.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Mask file over the same parameters.")],
    per_layer: PerLayerFlag = False,
    device: DeviceOption = "auto",
    json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Say how much two masks agree: Jaccard index (and its value expected by chance), overlap, Hamming distance."""
    import sparseopt

    result = sparseopt.compare(_load(a, device), _load(b, device))
    layers = result["per_layer"]
    if json:
        print_json(result)
        return
    print(f"jaccard {result['jaccard']:.6f} (by chance {result['chance_jaccard']:.6f})")
    print(f"overlap {result['overlap']:.6f}")
    print(f"hamming {result['hamming']}")
    for name, values in layers.items() if per_layer else ():
        text = values if not isinstance(values, dict) else ", ".join(f"{k} {_number(v)}" for k, v in values.items())
        print(f"  {name}: {text}")


def _number(value: Any) -> str:
    return f"{value:.6f}" if isinstance(value, float) else str(value)


@app.command(
    "merge",
    cls=Command,
    epilog=example("sparseopt masks merge a.safetensors b.safetensors --how union --output both.safetensors"),
)
def merge(
    files: Annotated[list[Path], typer.Argument(metavar="A B...", help="Mask files over the same parameters.")],
    output: Annotated[
        Path, typer.Option("--output", metavar="FILE", help="Where to write: .safetensors, or .pt for bool tensors.")
    ],
    how: Annotated[str, typer.Option("--how", help="union, intersection or majority.")] = "union",
    device: DeviceOption = "auto",
    json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Merge masks: entries active in any, in all, or in more than half of them."""
    if how not in ("union", "intersection", "majority"):
        raise typer.BadParameter(f"--how must be union, intersection or majority, got {how!r}.")
    if output.suffix not in (".safetensors", ".pt"):
        raise typer.BadParameter(f"--output must end in .safetensors or .pt, got {str(output)!r}.")
    if len(files) < 2:
        raise typer.BadParameter("merging takes at least two mask files.")
    import sparseopt

    merged = sparseopt.merge([_load(file, device) for file in files], how=how)
    merged.save(output, format="pt" if output.suffix == ".pt" else "safetensors")
    if json:
        print_json(
            {
                "output": str(output),
                "active_parameters": merged.active_parameters,
                "total_parameters": merged.total_parameters,
                "fingerprint": merged.fingerprint,
            }
        )
    else:
        print(f"{output}: {merged.active_parameters:,} of {merged.total_parameters:,} entries active")
