"""``sparseopt train``: flags and files become a configuration; :mod:`sparseopt.trainers` does the work."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from sparseopt.cli._command import Command, DebugFlag, JsonFlag, example, group, print_json

app = group("train", help="Train a model: every weight, or only those of a mask.")


@app.command(
    "dpo",
    cls=Command,
    epilog=example(
        "sparseopt train dpo --config configs/quickstart.yaml",
        "sparseopt train dpo --model_name smollm2 --mask mask.safetensors --n_steps 50 --learning_rate 5e-5",
        "sparseopt train dpo --config configs/quickstart.yaml --set training.beta=0.2 data.n_train=500",
    ),
)
def dpo(
    config: Annotated[str | None, typer.Option("--config", metavar="FILE", help="YAML or TOML file.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE...", help="Override settings of the file; repeatable."),
    ] = None,
    model_name: Annotated[
        str | None, typer.Option("--model_name", help="smollm2, a local folder or a Hub name (model.name).")
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", help="reasoning-gym task, local file or Hub dataset (data.name).")
    ] = None,
    mask: Annotated[str | None, typer.Option("--mask", metavar="FILE", help="Mask file (mask.path).")] = None,
    sparsity: Annotated[
        float | None,
        typer.Option(
            "--sparsity", help="Share of inactive entries of the mask that is found from gradients (mask.sparsity)."
        ),
    ] = None,
    n_steps: Annotated[int | None, typer.Option("--n_steps", help="Optimizer steps (training.n_steps).")] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch_size", help="Pairs per micro-batch (training.batch_size).")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option("--learning_rate", help="Peak learning rate (optimizer.learning_rate).")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of everything random (training.seed).")] = None,
    device: Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda or cuda:N (training.device).")] = None,
    output_dir: Annotated[
        str | None, typer.Option("--output_dir", metavar="FOLDER", help="Run folder (output.dir).")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the interrupted run in the run folder (training.resume).")
    ] = False,
    json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Direct preference optimization: find or load a mask, train its weights, evaluate before and after.

    Without a mask (no --mask, no --sparsity, no mask.method in the file) every weight trains.
    Settings come from defaults, the file, --set and flags; the later wins.
    """
    flags: dict[str, Any] = {
        "model_name": model_name,
        "data": data,
        "mask": mask,
        "sparsity": sparsity,
        "n_steps": n_steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "seed": seed,
        "device": device,
        "output_dir": output_dir,
        "resume": resume or None,
    }
    settings = _configuration(config, set_ or [], flags)

    from sparseopt.trainers.dpo import run

    folder = run(settings)
    if json:
        print_json({"output_dir": str(folder)})
    else:
        print(f"Results: {folder}")


def _configuration(config: str | None, overrides: list[str], flags: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Bad flags and overrides are bad usage (exit code 2); a bad file is a failure (exit code 1)."""
    from sparseopt import config as configuration

    if flags["mask"] is not None and flags["sparsity"] is not None:
        raise typer.BadParameter("--mask names a mask and --sparsity asks for another: give one of them.")
    given = {configuration.DPO_FLAGS[flag]: value for flag, value in flags.items()}
    try:
        settings = configuration.load(configuration.DPO, config, overrides, given)
    except configuration.OverrideError as error:
        raise typer.BadParameter(str(error)) from error
    if flags["mask"] is not None:
        settings["mask"]["method"] = None
    if flags["sparsity"] is not None:
        settings["mask"]["path"] = None
        settings["mask"]["method"] = settings["mask"]["method"] or "gradient"
    return settings
