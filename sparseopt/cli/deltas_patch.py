"""``sparseopt deltas patch``: prints what :mod:`sparseopt.deltas.patch` does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sparseopt.cli._command import DebugFlag, JsonFlag, example, print_json

EXAMPLE = example(
    "sparseopt deltas patch --delta_log_dir delta_logs_smollm2 --from_step 10 --to_step 20 --output patch.safetensors",
    "sparseopt deltas patch --patch patch.safetensors --model_dir step_10 --output_dir step_20",
)


def patch(
    delta_log_dir: Annotated[
        Path | None, typer.Option("--delta_log_dir", metavar="DIR", help="Make a patch from this delta log.")
    ] = None,
    from_step: Annotated[
        int, typer.Option("--from_step", min=0, help="Logged step of the weights to bring up to date; 0: the base.")
    ] = 0,
    to_step: Annotated[
        int | None, typer.Option("--to_step", min=1, help="Logged step that the patch leads to.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE", help="Patch file to write, .safetensors.")
    ] = None,
    patch_file: Annotated[
        Path | None, typer.Option("--patch", metavar="FILE", help="Apply this patch to a model folder.")
    ] = None,
    model_dir: Annotated[
        Path | None, typer.Option("--model_dir", metavar="DIR", help="Model folder that the patch is for.")
    ] = None,
    output_dir: Annotated[
        Path | None, typer.Option("--output_dir", metavar="DIR", help="Folder for the patched model: new or empty.")
    ] = None,
    no_check_base: Annotated[
        bool, typer.Option("--no_check_base", help="Do not check that the patch is for this model.")
    ] = False,
    json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Make a weight patch between two logged steps, or apply one to a model folder.

    A patch holds the entries that changed and their new values: a few percent of a checkpoint.
    """
    making = {"--delta_log_dir": delta_log_dir, "--to_step": to_step, "--output": output}
    applying = {"--patch": patch_file, "--model_dir": model_dir, "--output_dir": output_dir}
    given = [flag for flag, value in {**making, **applying}.items() if value is not None]
    wanted = making if any(flag in making for flag in given) else applying
    if set(given) != set(wanted):
        raise typer.BadParameter(
            f"give {', '.join(making)} to make a patch, or {', '.join(applying)} to apply one; got "
            f"{', '.join(given) or 'neither'}."
        )
    if delta_log_dir is not None and to_step is not None and output is not None:
        result = _make(delta_log_dir, from_step, to_step, output)
    else:
        assert patch_file is not None
        assert model_dir is not None
        assert output_dir is not None
        result = _apply(patch_file, model_dir, output_dir, not no_check_base)
    if json:
        print_json(result)
        return
    share = result["patch_bytes"] / result["bf16_bytes"]
    print(f"{result['output']}: {result['changed_parameters']:,} entries of {result['tensors']} parameters")
    print(f"{result['patch_bytes']:,} bytes, {share:.2%} of the model in bf16 ({result['bf16_bytes']:,} bytes)")


def _make(log_dir: Path, from_step: int, to_step: int, output: Path) -> dict[str, Any]:
    if output.suffix != ".safetensors":
        raise typer.BadParameter(f"--output must end in .safetensors, got {str(output)!r}.")
    import math

    from sparseopt.deltas.base import read_header
    from sparseopt.deltas.log import DeltaLog
    from sparseopt.deltas.patch import between

    numel = sum(math.prod(shape) for shape in read_header(log_dir).shapes.values())
    made = between(DeltaLog(log_dir), from_step, to_step)
    made.save(output)
    return {
        "output": str(output),
        "from_step": from_step,
        "to_step": to_step,
        "changed_parameters": made.changed_parameters,
        "tensors": len(made),
        "patch_bytes": output.stat().st_size,
        "bf16_bytes": 2 * numel,
    }


def _apply(patch_file: Path, model_dir: Path, output_dir: Path, check_base: bool) -> dict[str, Any]:
    from sparseopt import Delta
    from sparseopt.deltas.patch import apply_to_folder

    found = apply_to_folder(Delta.load(patch_file), model_dir, output_dir, check_base=check_base)
    return {"output": str(output_dir), **found, "patch_bytes": patch_file.stat().st_size}
