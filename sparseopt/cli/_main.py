"""The top of the command tree."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from sparseopt._version import __version__
from sparseopt.cli import bench, deltas, doctor, finetune, masks, plan, project, runs, sweep, train
from sparseopt.cli._command import Command, example, group

__all__ = ["app", "main"]

app = group(
    None,
    help="Train only the weights that matter. Flags are written --like_this or --like-this.",
    epilog=example("sparseopt train dpo --config configs/quickstart.yaml", "sparseopt doctor"),
)


def _version(value: bool) -> None:
    if value:
        print(f"sparseopt {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


app.command("doctor", cls=Command, epilog=doctor.EXAMPLE)(doctor.doctor)
app.command("plan", cls=Command, epilog=plan.EXAMPLE)(plan.plan)
app.add_typer(train.app)
app.command("finetune", cls=Command, epilog=finetune.EXAMPLE)(finetune.finetune)
app.add_typer(masks.app)
app.add_typer(deltas.app)
app.add_typer(project.app)
app.add_typer(runs.app)
app.add_typer(sweep.app)
app.add_typer(bench.app)


def main() -> None:
    """Runs the command line and exits with its code."""
    try:
        app(prog_name="sparseopt")
    except KeyboardInterrupt:  # before or after a command's own handler
        print("Interrupted.", file=sys.stderr)
        sys.exit(130)
