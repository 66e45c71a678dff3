"""``sparseopt runs gradients``: flags; :mod:`sparseopt.runs.gradients` measures, ``gradient_plots`` draws."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sparseopt.cli._command import DebugFlag, JsonFlag, example, print_json

__all__ = ["EXAMPLE", "gradients"]

EXAMPLE = example(
    "sparseopt runs gradients 20260101-1200",
    "sparseopt runs gradients RUN --output_dir plots --vanishing_below 1e-4",
    "sparseopt runs gradients RUN --json --no_plots | jq .flags",
)
SHOWN = 8  # findings printed


def gradients(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The run's id, or the beginning of one.")],
    output_dir: Annotated[
        Path | None, typer.Option("--output_dir", help="Where to write (default: the run's folder gradients).")
    ] = None,
    vanishing_below: Annotated[
        float, typer.Option("--vanishing_below", help="A layer vanishes under so much of the median layer's rms.")
    ] = 1e-3,
    exploding_above: Annotated[
        float, typer.Option("--exploding_above", help="A layer explodes over so many times the median layer's rms.")
    ] = 1e2,
    spike_above: Annotated[
        float,
        typer.Option(
            "--spike_above", help="The whole explodes over so many times its median norm over the checkpoints."
        ),
    ] = 10.0,
    no_plots: Annotated[bool, typer.Option("--no_plots", help="Only the numbers, gradients.json.")] = False,
    base_dir: Annotated[Path, typer.Option("--base_dir", help="Folder of the runs.")] = Path("saved_models"),
    json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Analyse the gradients that a run saved with its checkpoints.

    Norms by layer and how they evolve; directions (cosines between neighbouring layers, and of a layer with itself at the
    checkpoint before); variance over micro-batches, where they were saved; layers that vanish or explode; correlation with
    the validation loss. Writes pictures (PNG) and every number (gradients.json).
    """
    from sparseopt.cli.runs import json_ready
    from sparseopt.runs.gradient_findings import Thresholds

    try:
        limits = Thresholds(vanishing_below, exploding_above, spike_above)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    import json as json_module

    from sparseopt._files import atomic_write
    from sparseopt.runs import gradient_plots
    from sparseopt.runs.gradients import analyse
    from sparseopt.runs.registry import RunManager

    folder = base_dir / RunManager(base_dir).resolve(run)
    target = folder / "gradients" if output_dir is None else output_dir
    found = analyse(folder, limits)
    plain: dict[str, Any] = json_ready(found)
    pictures = [] if no_plots else gradient_plots.draw(found, target, f"Gradients of {folder.name}")
    atomic_write(target / "gradients.json", json_module.dumps(plain, indent=1, allow_nan=False) + "\n")
    if json:
        print_json(plain)
        return
    last = found["checkpoints"][-1]
    print(f"{len(found['steps'])} checkpoints, steps {found['steps'][0]} to {found['steps'][-1]}, {len(found['layers'])} layers;"
          f" norm {found['checkpoints'][0]['total_norm']:.4g} -> {last['total_norm']:.4g}")  # fmt: skip
    for entry in found["flags"][:SHOWN]:
        print(
            f"step {entry['step']}: layer {entry['layer']} is {entry['kind']}: {entry['value']:.3g}, limit {entry['limit']:.3g}"
        )
    if not found["flags"]:
        print("No layer vanishes or explodes.")
    elif len(found["flags"]) > SHOWN:
        print(f"and {len(found['flags']) - SHOWN} more")
    strongest = sorted(
        (entry for entry in found["correlations"] if entry["spearman"] is not None), key=lambda e: -abs(e["spearman"])
    )
    for entry in strongest[:3]:
        about = f"{entry['statistic']} ({entry['points']} checkpoints)"
        print(f"rank correlation with the validation loss {entry['spearman']:+.2f}: {about}")
    for path in [*pictures, target / "gradients.json"]:
        print(path)
