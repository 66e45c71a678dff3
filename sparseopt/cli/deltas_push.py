"""``sparseopt deltas push``: prints what :func:`sparseopt.hub.push_delta` does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparseopt.cli._command import DebugFlag, JsonFlag, example, print_json

EXAMPLE = example("sparseopt deltas push delta.safetensors --repo_id user/model-delta --base_model org/model")


def push(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Delta file, .safetensors.")],
    repo_id: Annotated[
        str | None, typer.Option("--repo_id", help="Repository or local folder (default: {base_model}-delta).")
    ] = None,
    base_model: Annotated[
        str | None, typer.Option("--base_model", help="Model that the delta belongs to; the card names it.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Let a new repository be public.")] = False,
    revision: Annotated[str | None, typer.Option("--revision", help="Branch (default: main).")] = None,
    json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Push a trained delta to the Hub, in one commit with its card. New repositories are private."""
    if repo_id is None and base_model is None:
        raise typer.BadParameter("--repo_id is missing (or --base_model, to name the repository after).")
    from sparseopt import Delta, hub

    delta = Delta.load(file)
    name = hub.push_delta(repo_id, delta, not public, base_model=base_model, revision=revision)
    result = {
        "repository": name,
        "file": f"delta_step_{delta.step}.safetensors",
        "step": delta.step,
        "changed_entries": delta.changed_parameters,
        "bytes": file.stat().st_size,
    }
    if json:
        print_json(result)
    else:
        print(f"{name}: {result['file']}, {delta.changed_parameters:,} changed entries, {result['bytes']:,} bytes")
