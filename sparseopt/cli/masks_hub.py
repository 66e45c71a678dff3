"""``sparseopt masks push|pull|steps|prune``: prints what :mod:`sparseopt.hub` does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparseopt.cli._command import Command, DebugFlag, JsonFlag, example, print_json

if TYPE_CHECKING:
    from sparseopt import MaskSet

Repo = Annotated[
    str, typer.Argument(metavar="REPO", help="user/name, hf://user/name[@revision], or a local folder of that layout.")
]
RevisionOption = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit (default: main).")]


def register(app: typer.Typer) -> None:
    """Adds the four commands."""
    app.command("push", cls=Command, epilog=PUSH)(push)
    app.command("pull", cls=Command, epilog=PULL)(pull)
    app.command("steps", cls=Command, epilog=example("sparseopt masks steps user/model-gradient-masks --json"))(steps)
    app.command("prune", cls=Command, epilog=example("sparseopt masks prune user/model-gradient-masks --keep 5"))(prune)


PUSH = example(
    "sparseopt masks push mask.safetensors --repo_id user/model-gradient-masks --step 1000",
    "sparseopt masks push --pending outputs/grad_acc/spool",
)
PULL = example("sparseopt masks pull user/model-gradient-masks --step latest --output mask.safetensors")


def push(
    file: Annotated[Path | None, typer.Argument(metavar="FILE", help="Mask file.")] = None,
    repo_id: Annotated[
        str | None,
        typer.Option("--repo_id", help="Repository or local folder (default: {base_model}-gradient-masks)."),
    ] = None,
    step: Annotated[int | None, typer.Option("--step", help="Training step (default: what the file says).")] = None,
    base_model: Annotated[
        str | None, typer.Option("--base_model", help="Model the masks are for (default: what the file says).")
    ] = None,
    format: Annotated[
        str, typer.Option("--format", help="safetensors, or pt: a dict of bool tensors.")
    ] = "safetensors",
    parent_step: Annotated[
        int | None, typer.Option("--parent_step", help="Store only what differs from this step of the repository.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Let a new repository be public.")] = False,
    revision: RevisionOption = None,
    pending: Annotated[
        Path | None, typer.Option("--pending", metavar="DIR", help="Upload what a killed or offline run left there.")
    ] = None,
    json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Push masks to the Hub, one commit with masks, metadata and card; or what waits in a spool folder.

    New repositories are private. Log in with `hf auth login`.
    """
    if (file is None) == (pending is None):
        raise typer.BadParameter("give either FILE or --pending DIR.")
    from sparseopt import hub

    if pending is not None:
        if any(value is not None for value in (repo_id, step, base_model, parent_step, revision)) or public:
            raise typer.BadParameter("--pending takes no other option: each upload says where it goes.")
        with _log_lines():
            sent = hub.push_pending(pending)
        if json:
            print_json({"uploaded": sent})
            return
        for row in sent:
            print(f"{row['repo_id']}: step {row['step']}, {row['bytes']:,} bytes")
        print(f"{len(sent)} uploaded")
        return
    if format not in ("safetensors", "pt"):
        raise typer.BadParameter(f"--format is safetensors or pt, got {format!r}.")
    from sparseopt import MaskSet

    masks = MaskSet.load(file)  # type: ignore[arg-type]  # one of the two is given
    number = masks.metadata.get("step") if step is None else step
    if number is None:
        raise typer.BadParameter("--step is missing: the file does not say it.")
    if repo_id is None and not (base_model or masks.metadata.get("base_model")):
        raise typer.BadParameter("--repo_id is missing (or --base_model: the file names none).")
    with _log_lines():
        name = hub.push_masks(
            repo_id,
            masks,
            number,
            not public,
            base_model=base_model,
            format=format,
            parent_step=parent_step,
            revision=revision,
        )
    _report("repository", name, number, masks, json)


def pull(
    repo: Repo,
    output: Annotated[
        Path, typer.Option("--output", metavar="FILE", help="Where to write: .safetensors, or .pt for bool tensors.")
    ],
    step: Annotated[str, typer.Option("--step", help="A step, or latest.")] = "latest",
    revision: RevisionOption = None,
    cache_dir: Annotated[
        Path | None, typer.Option("--cache_dir", metavar="DIR", help="Download cache (default: the Hub's).")
    ] = None,
    json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Download the masks of a step, check them, and write them to a file."""
    if step != "latest" and not (step.isascii() and step.isdecimal()):
        raise typer.BadParameter(f"--step is a number or latest, got {step!r}.")
    if output.suffix not in (".safetensors", ".pt"):
        raise typer.BadParameter(f"--output must end in .safetensors or .pt, got {str(output)!r}.")
    from sparseopt import hub

    where: dict[str, Any] = {"revision": revision}
    number = hub.latest_mask_step(repo, **where) if step == "latest" else int(step)
    masks = hub.load_masks_from_hf(repo, number, cache_dir=cache_dir, **where)
    masks.save(output, compress=output.suffix == ".safetensors")
    _report("output", str(output), number, masks, json)


def _report(kind: str, place: str, step: int, masks: MaskSet, json: bool) -> None:
    """Says which masks are at a place now."""
    active, total = masks.active_parameters, masks.total_parameters
    if json:
        counts = {"active_parameters": active, "total_parameters": total, "fingerprint": masks.fingerprint}
        print_json({kind: place, "step": step, **counts})
    else:
        print(f"{place}: step {step}, {active:,} of {total:,} entries active")


def steps(repo: Repo, revision: RevisionOption = None, json: JsonFlag = False, debug: DebugFlag = False) -> None:
    """List the steps of a repository with their sizes."""
    from sparseopt import hub

    report = hub.mask_report(repo, revision=revision)
    if json:
        print_json(report)
        return
    for row in report["steps"]:
        print(f"{row['step']:>10}  {row['bytes']:>15,}  {row['files'][0]}")
    print(f"{len(report['steps'])} steps, {report['bytes']:,} bytes (without what the repository's history keeps)")


def prune(
    repo: Repo,
    keep: Annotated[int, typer.Option("--keep", min=1, help="Number of steps that stay: the last ones.")],
    yes: Annotated[bool, typer.Option("--yes", help="Delete without asking.")] = False,
    revision: Annotated[str | None, typer.Option("--revision", help="Branch (default: main).")] = None,
    json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Delete all but the last steps (and what these are stored against), in one commit; asks first.

    The branch gets smaller by what is said. A repository's history keeps deleted files, and the Hub counts them, until
    they are removed from it for good (on the repository's settings page).
    """
    from sparseopt import hub

    found = hub.prune_masks(repo, keep, dry_run=True, revision=revision)
    gone = found["deleted"]
    if not gone:
        print_json({**found, "done": True}) if json else print(f"nothing to delete: {len(found['kept'])} steps")
        return
    what = f"{len(gone)} steps ({gone[0]} to {gone[-1]}), {found['bytes']:,} bytes"
    if not yes:
        if json:
            raise typer.BadParameter("--json asks nothing: add --yes to delete.")
        if not typer.confirm(f"Delete {what} from {repo}?", err=True):
            print("nothing was deleted")
            raise typer.Exit(1)
    found = hub.prune_masks(repo, keep, revision=revision)
    if json:
        print_json({**found, "done": True})
    else:
        print(f"deleted {what}; {len(found['kept'])} steps are left")


@contextlib.contextmanager
def _log_lines() -> Iterator[None]:
    """Shows what the uploads log on stderr."""
    import logging

    logger = logging.getLogger("sparseopt.hub")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate
