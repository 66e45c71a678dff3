"""``sparseopt deltas``: what a delta log holds, checkpoints from it, and weight patches."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sparseopt.cli import deltas_patch, deltas_push
from sparseopt.cli._command import Command, DebugFlag, DeviceOption, JsonFlag, example, group, print_json

app = group(
    "deltas",
    help="Look at delta logs, rebuild checkpoints from them, make weight patches, share deltas.",
    epilog=example(
        "sparseopt deltas info --delta_log_dir delta_logs_smollm2",
        "sparseopt deltas reconstruct --delta_log_dir delta_logs_smollm2 --step 100 --output_dir step_100",
    ),
)

Log = Annotated[Path, typer.Option("--delta_log_dir", metavar="DIR", help="Folder of the delta log.")]


@app.command("steps", cls=Command, epilog=example("sparseopt deltas steps --delta_log_dir delta_logs_smollm2"))
def steps(delta_log_dir: Log, device: DeviceOption = "auto", json: JsonFlag = False, debug: DebugFlag = False) -> None:
    """List the logged steps, one a line."""
    _cpu(device)
    _print_steps(delta_log_dir, json)


def _print_steps(folder: Path, json: bool) -> None:
    from sparseopt.deltas.base import read_header
    from sparseopt.deltas.reader import list_steps

    found = list_steps(folder)
    read_header(folder)  # a folder that is no log is an error, not a log without steps
    if json:
        print_json({"log": str(folder), "steps": found})
    for step in () if json else found:
        print(step)


@app.command("info", cls=Command, epilog=example("sparseopt deltas info --delta_log_dir delta_logs_smollm2 --json"))
def info(delta_log_dir: Log, device: DeviceOption = "auto", json: JsonFlag = False, debug: DebugFlag = False) -> None:
    """Say what a delta log holds: its base, each step's size beside the full checkpoint, and how far weights moved."""
    _cpu(device)
    from sparseopt.deltas.summary import summarize

    found = summarize(delta_log_dir)
    if json:
        print_json(found)
        return
    base = found["base"]
    where = f"saved in the log, {base['bytes']:,} bytes" if base["saved"] else "read from there"
    print(f"base: {base['name'] or 'unnamed'}{' ' + base['revision'] if base['revision'] else ''} ({where})")
    print(f"fingerprint: {base['fingerprint']}")
    print(
        f"{found['tensors']} tensors, {found['entries']:,} entries, {', '.join(found['dtypes'])}; "
        f"a full checkpoint has {found['checkpoint_bytes']:,} bytes"
    )
    if found["steps"]:
        print(f"{'step':>8}  {'bytes':>15}  {'of full':>8}  {'changed':>8}  {'mean L2':>10}  {'far':>8}")
    for row in found["steps"]:
        norm, far = row["mean_l2_from_init"], row["mean_frac_big_from_init"]
        print(
            f"{row['step']:>8}  {row['bytes']:>15,}  {row['share_of_checkpoint']:>8.2%}  {row['changed_share']:>8.2%}  "
            f"{'-' if norm is None else format(norm, '.4g'):>10}  {'-' if far is None else format(far, '.2%'):>8}"
        )
    full = len(found["steps"]) * found["checkpoint_bytes"]
    if full:
        share = found["bytes"] / full
        print(f"{len(found['steps'])} steps: {found['bytes']:,} bytes, {share:.2%} of as many full checkpoints")
        print("mean L2: of value - base over parameters; far: mean share of entries that moved by more than 1e-5")
    if found["problem"] is not None:
        print(f"broken: {found['problem']}")


@app.command(
    "reconstruct",
    cls=Command,
    epilog=example(
        "sparseopt deltas reconstruct --delta_log_dir delta_logs_smollm2 --step 100 --output_dir step_100",
        "sparseopt deltas reconstruct --delta_log_dir delta_logs_smollm2 --list_steps",
    ),
)
def reconstruct(
    delta_log_dir: Log,
    step: Annotated[int | None, typer.Option("--step", help="Logged step (default: the last).")] = None,
    output_dir: Annotated[
        Path | None,
        typer.Option("--output_dir", metavar="DIR", help="Folder for the checkpoint: new, or an earlier one of these."),
    ] = None,
    model_name: Annotated[
        str | None,
        typer.Option("--model_name", help="Base model: smollm2, a folder or a Hub name (default: what the log says)."),
    ] = None,
    list_steps: Annotated[bool, typer.Option("--list_steps", help="List the logged steps and stop.")] = False,
    max_shard_size: Annotated[
        str, typer.Option("--max_shard_size", help="Largest weight file, such as 5GB or 200MiB.")
    ] = "5GB",
    device: DeviceOption = "auto",
    json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Rebuild the model of a logged step as a folder for from_pretrained, bit by bit as it was trained."""
    _cpu(device)
    if list_steps:
        _print_steps(delta_log_dir, json)
        return
    if output_dir is None:
        raise typer.BadParameter("--output_dir is missing (or --list_steps).")
    from sparseopt.deltas._model_folder import parse_size
    from sparseopt.deltas.reconstruct import write_checkpoint

    try:
        size = parse_size(max_shard_size)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    about: dict[str, Any] = {
        "output_dir": str(output_dir),
        **write_checkpoint(delta_log_dir, step, output_dir, model_name, size),
    }
    if json:
        print_json(about)
    else:
        print(f"{output_dir}: step {about['step']}, {about['bytes']:,} bytes in {', '.join(about['files'])}")


def _cpu(device: str) -> None:
    if device not in ("auto", "cpu"):
        raise typer.BadParameter(f"delta logs are handled on the CPU: --device is auto or cpu, got {device!r}.")


app.command("patch", cls=Command, epilog=deltas_patch.EXAMPLE)(deltas_patch.patch)
app.command("push", cls=Command, epilog=deltas_push.EXAMPLE)(deltas_push.push)
