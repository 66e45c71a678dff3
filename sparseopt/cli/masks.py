"""``sparseopt masks``: find, look at, compare, merge, draw and export mask files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparseopt.cli import masks_export, masks_find, masks_hub, masks_plot
from sparseopt.cli._command import Command, DebugFlag, DeviceOption, JsonFlag, example, group, print_json

if TYPE_CHECKING:
    from sparseopt import MaskSet

app = group(
    "masks",
    help="Find masks; look at, compare, merge and draw mask files (.safetensors or .pt).",
    epilog=example(
        "sparseopt masks find --model_name smollm2 --method weight_magnitude --sparsity_percent 90 --output mask.safetensors",
        "sparseopt masks info mask.safetensors",
    ),
)
app.command("find", cls=Command, epilog=masks_find.EXAMPLE)(masks_find.find)

PerLayerFlag = Annotated[bool, typer.Option("--per_layer", help="One line per parameter as well.")]


def _load(path: Path, device: str) -> MaskSet:
    _require_cpu(device)
    from sparseopt import MaskSet

    return MaskSet.load(path)


def _require_cpu(device: str) -> None:
    if device not in ("auto", "cpu"):
        raise typer.BadParameter(f"mask files are handled on the CPU: --device is auto or cpu, got {device!r}.")


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


@app.command(
    "compare",
    cls=Command,
    epilog=example(
        "sparseopt masks compare a.safetensors b.safetensors --per_kind --json",
        "sparseopt masks compare step_10.safetensors step_20.safetensors step_30.safetensors",
    ),
)
def compare(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE", help="Two mask files or more, over the same parameters.")
    ],
    per_layer: PerLayerFlag = False,
    per_kind: Annotated[
        bool, typer.Option("--per_kind", help="One line per kind of module, projection and layer as well.")
    ] = False,
    device: DeviceOption = "auto",
    json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Say how much masks agree: Jaccard index (and its value expected by chance), overlap, Hamming distance.

    Three masks or more are compared in pairs.
    """
    _require_cpu(device)
    if len(files) < 2:
        raise typer.BadParameter("comparing takes at least two mask files.")
    from sparseopt.masks.operations import compare_many

    found = compare_many(files)
    groups = {"per_layer": per_layer, "per_kind": per_kind, "per_projection": per_kind, "per_block": per_kind}
    for pair in found["pairs"]:
        left, right = pair.pop("left"), pair.pop("right")
        if len(files) == 2:
            if json:
                print_json(pair)
            else:
                _print_comparison(pair, groups)
            return
        for key in [key for key, wanted in groups.items() if not wanted]:
            del pair[key]
        pair |= {"left": str(files[left]), "right": str(files[right])}
        if not json:
            print(f"{files[left]} and {files[right]}:")
            _print_comparison(pair, groups, "  ")
    if json:
        print_json({"files": [str(file) for file in files], **found})


def _print_comparison(result: dict[str, Any], groups: dict[str, bool], indent: str = "") -> None:
    print(f"{indent}jaccard {result['jaccard']:.6f} (by chance {result['chance_jaccard']:.6f})")
    print(f"{indent}overlap {result['overlap']:.6f}")
    print(f"{indent}hamming {result['hamming']}")
    for key, wanted in groups.items():
        for name, values in result[key].items() if wanted else ():
            label = f"layer {name}" if key == "per_block" else name
            print(f"{indent}  {label}: {', '.join(f'{measure} {value:.6f}' for measure, value in values.items())}")


@app.command(
    "merge",
    cls=Command,
    epilog=example(
        "sparseopt masks merge a.safetensors b.safetensors --how union --output both.safetensors",
        "sparseopt masks merge a.safetensors b.safetensors c.safetensors --how weighted --weights 1,2,0.5 \\",
        "    --sparsity 0.975 --output merged.safetensors",
    ),
)
def merge(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE", help="Two mask files or more, over the same parameters.")
    ],
    output: Annotated[
        Path, typer.Option("--output", metavar="FILE", help="Where to write: .safetensors, or .pt for bool tensors.")
    ],
    how: Annotated[str, typer.Option("--how", help="union, intersection, majority or weighted.")] = "union",
    weights: Annotated[
        list[str] | None,
        typer.Option("--weights", metavar="W...", help="weighted: a number for each file (default: 1 each)."),
    ] = None,
    threshold: Annotated[
        float | None, typer.Option("--threshold", help="weighted: least sum of weights (default: half of them all).")
    ] = None,
    sparsity: Annotated[
        float | None,
        typer.Option("--sparsity", min=0, max=1, help="weighted: instead, the exact share that stays inactive."),
    ] = None,
    device: DeviceOption = "auto",
    json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Merge masks: entries active in any, in all, or in more than half of them, or by weights of the masks.

    Weighted: an entry scores the summed weights of the masks in which it is active.
    """
    if how not in ("union", "intersection", "majority", "weighted"):
        raise typer.BadParameter(f"--how must be union, intersection, majority or weighted, got {how!r}.")
    if how != "weighted" and (weights or threshold is not None or sparsity is not None):
        raise typer.BadParameter(f"--weights, --threshold and --sparsity belong to --how weighted, got --how {how}.")
    if threshold is not None and sparsity is not None:
        raise typer.BadParameter("give --threshold or --sparsity, not both.")
    numbers = _numbers(weights, len(files))
    if output.suffix not in (".safetensors", ".pt"):
        raise typer.BadParameter(f"--output must end in .safetensors or .pt, got {str(output)!r}.")
    if len(files) < 2:
        raise typer.BadParameter("merging takes at least two mask files.")
    import sparseopt

    loaded = [_load(file, device) for file in files]
    merged = sparseopt.merge(loaded, how=how, weights=numbers, threshold=threshold, sparsity=sparsity)
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


masks_hub.register(app)


def _numbers(given: list[str] | None, count: int) -> list[float] | None:
    if not given:
        return None
    try:
        numbers = [float(number) for text in given for number in text.split(",") if number.strip()]
    except ValueError:
        raise typer.BadParameter(f"--weights takes numbers, got {' '.join(given)!r}.") from None
    if len(numbers) != count:
        raise typer.BadParameter(f"--weights takes a number for each of the {count} files, got {len(numbers)}.")
    return numbers


app.command("plot", cls=Command, epilog=masks_plot.EXAMPLE)(masks_plot.plot)
app.command("export", cls=Command, epilog=masks_export.EXAMPLE)(masks_export.export)
