"""The top of the command tree. Only the branch that is asked for is imported and built: building all takes longer than help."""

from __future__ import annotations

import functools
import importlib
import sys
from typing import Annotated, Any

import typer

from sparseopt._version import __version__
from sparseopt.cli._command import Command, example, group

__all__ = ["app", "build", "main"]

# Modules beside this one: each has a group ``app``, or a command of its own name with an EXAMPLE.
NAMES = ("doctor", "plan", "train", "finetune", "masks", "deltas", "project", "runs", "sweep", "bench")

app: typer.Typer  # the whole tree, built when it is first looked at


def _version(value: bool) -> None:
    if value:
        print(f"sparseopt {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@functools.cache
def build(*names: str) -> typer.Typer:
    """The command tree: the branches of these names, or all."""
    root = group(
        None,
        help="Train only the weights that matter. Flags are written --like_this or --like-this.",
        epilog=example("sparseopt train dpo --config configs/quickstart.yaml", "sparseopt doctor"),
    )
    root.callback()(_root)
    for name in names or NAMES:
        module = importlib.import_module(f"sparseopt.cli.{name}")
        if hasattr(module, "app"):
            root.add_typer(module.app)
        else:
            root.command(name, cls=Command, epilog=module.EXAMPLE)(getattr(module, name))
    return root


def __getattr__(name: str) -> Any:
    if name == "app":
        return build()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def main() -> None:
    """Runs the command line and exits with its code."""
    try:
        first = sys.argv[1:2]
        tree = build(*first) if set(first) <= set(NAMES) else build()
        tree(prog_name="sparseopt")
    except KeyboardInterrupt:  # before or after a command's own handler
        print("Interrupted.", file=sys.stderr)
        sys.exit(130)
