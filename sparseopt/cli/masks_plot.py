"""``sparseopt masks plot``: flags; :mod:`sparseopt.masks.plot` draws."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparseopt.cli._command import DebugFlag, DeviceOption, JsonFlag, example, print_json

__all__ = ["EXAMPLE", "plot"]

EXAMPLE = example(
    "sparseopt masks plot grad_acc/grad_mask_step_*.safetensors --output plots",
    "sparseopt masks plot mask.safetensors --output layers.svg",
)
PICTURES = ("evolution", "layers", "kinds")


def plot(
    files: Annotated[list[Path], typer.Argument(metavar="FILE", help="Mask files of one model, one a step.")],
    output: Annotated[
        Path,
        typer.Option(
            "--output", metavar="DIR_OR_FILE", help="Folder for all pictures, or a .png or .svg file for one."
        ),
    ],
    format: Annotated[str | None, typer.Option("--format", help="png (default) or svg.")] = None,
    picture: Annotated[
        str | None,
        typer.Option(
            "--picture",
            help="Only this: evolution (density, overlap), layers (heat map of the last step) or kinds (attention, MLP, "
            "...). Into a file: evolution by default, layers for one mask.",
        ),
    ] = None,
    device: DeviceOption = "auto",
    json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Draw how masks evolve over steps, where they are active, and attention against MLP; numbers beside, as JSON.

    Steps are what the files' metadata say, else N of step_N in their names, else their order.
    """
    if device not in ("auto", "cpu"):
        raise typer.BadParameter(f"mask files are handled on the CPU: --device is auto or cpu, got {device!r}.")
    if picture is not None and picture not in PICTURES:
        raise typer.BadParameter(f"--picture must be evolution, layers or kinds, got {picture!r}.")
    if picture == "evolution" and len(files) < 2:
        raise typer.BadParameter("an evolution takes at least two mask files.")
    targets = _targets(output, format, picture, len(files))
    from sparseopt.masks import plot as drawing

    by_step = _by_step(files)
    for name, path in targets.items():
        if name == "evolution":
            drawing.plot_evolution(by_step, path)
        elif name == "kinds":
            drawing.plot_kinds(by_step, path)
        else:
            step = max(by_step)
            drawing.plot_layers(by_step[step], path, f"Step {step}" if len(files) > 1 else files[0].name)
    if json:
        pictures = {
            name: {"picture": str(path), "numbers": str(path.with_suffix(".json"))} for name, path in targets.items()
        }
        print_json({"steps": sorted(by_step), "pictures": pictures})
    else:
        for path in targets.values():
            print(f"{path} (numbers: {path.with_suffix('.json').name})")


def _targets(output: Path, format: str | None, picture: str | None, count: int) -> dict[str, Path]:
    """Picture -> file."""
    suffix = output.suffix.removeprefix(".")
    is_file = suffix in ("png", "svg") and not output.is_dir()
    if format is None:
        format = suffix if is_file else "png"
    if format not in ("png", "svg"):
        raise typer.BadParameter(f"--format must be png or svg, got {format!r}.")
    if is_file:
        if suffix != format:
            raise typer.BadParameter(f"--output '{output}' is no {format} file: leave out --format or change the name.")
        return {picture or ("evolution" if count > 1 else "layers"): output}
    wanted = [picture] if picture else [name for name in PICTURES if count > 1 or name != "evolution"]
    return {name: output / f"{name}.{format}" for name in wanted}


def _by_step(files: list[Path]) -> dict[int, Path]:
    from sparseopt.masks.statistics import step_of

    steps = [step_of(file) for file in files]
    if all(step is None for step in steps):
        return dict(enumerate(files, 1))
    by_step: dict[int, Path] = {}
    for file, step in zip(files, steps, strict=True):
        if step is None:
            raise ValueError(f"'{file}' does not say its step, as other files do: name it step_N or leave it out.")
        if step in by_step:
            raise ValueError(f"'{by_step[step]}' and '{file}' are both of step {step}: give one of them.")
        by_step[step] = file
    return by_step
