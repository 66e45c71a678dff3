"""Masks and deltas on the Hugging Face Hub, or in a local folder with the same layout.

A repository is named ``user/name``, ``hf://user/name[@revision]``, or by a local folder; all functions take all three.
Each step is one commit: its masks, their metadata, and the README.md. Repositories are private unless asked otherwise.

Errors everywhere: ValueError (a name, a step), TypeError, FileNotFoundError (no such repository, revision or step),
PermissionError (401 and 403), ConnectionError (no network, a server that cannot answer now), FormatError (a damaged
file); each is one sentence.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparseopt import _hub_card as cards
from sparseopt._hub_places import (
    CARD,
    FORMATS,
    Repository,
    check_step,
    info_path,
    mask_files,
    open_repository,
)
from sparseopt._hub_send import fetch_masks, prepare, read_card, read_info, send, with_retries
from sparseopt._hub_uploader import Uploader, pending, push_pending

if TYPE_CHECKING:
    from torch import Tensor

    from sparseopt import Delta, MaskSet
    from sparseopt.masks.apply import apply_masks_to_model as apply_masks_to_model

__all__ = [
    "Uploader",
    "apply_masks_to_model",
    "latest_mask_step",
    "list_available_mask_steps",
    "load_mask_metadata_from_hf",
    "load_masks_from_hf",
    "mask_report",
    "pending",
    "prune_masks",
    "push_delta",
    "push_masks",
    "push_pending",
]

DERIVED = ("total_parameters", "active_parameters", "active_fraction", "sparsity")

Name = str | os.PathLike[str]


def push_masks(
    repo_id: Name | None,
    masks: MaskSet | Mapping[str, Tensor],
    step: int,
    private: bool = True,
    *,
    metadata: Mapping[str, Any] | None = None,
    base_model: str | None = None,
    format: str = "safetensors",
    compress: bool | None = None,
    parent_step: int | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    retries: int = 3,
    backoff: float = 1.0,
) -> str:
    """Pushes the masks of a step: one commit with masks, metadata and card; the repository is made if need be.

    Args:
        repo_id: repository or folder; None = ``{base_model}-gradient-masks`` of who is logged in.
        masks: a MaskSet, or name -> bool tensor of the parameter's shape.
        step: training step, the name of the files; a step that is there already is replaced.
        private: for a new repository; an existing one stays as it is (a warning says if it is public).
        metadata: added to the masks' own metadata (``tolerance``, ``beta``, ...).
        base_model: model that the masks are for (default: what the metadata says).
        format: ``"safetensors"``, or ``"pt"`` for a dict of bool tensors.
        compress: lossless compression of the bits (default: for safetensors).
        parent_step: store only what differs from this step of the repository, which then has to stay there
            as it is (:func:`prune_masks` keeps it; loaders fetch it).
        revision: branch; it must exist.
        token: access token (default: the one logged in with).
        retries: further attempts after failures that can pass (no network, 429, 5xx).
        backoff: seconds before the first of them, doubled each time; a server's Retry-After counts for more.

    Returns:
        The repository's full name, or the folder.
    """
    from sparseopt import MaskSet

    check_step(step)
    if format not in FORMATS:
        raise ValueError(f"format must be 'safetensors' or 'pt', got {format!r}.")
    mask_set = masks if isinstance(masks, MaskSet) else MaskSet.from_bool(masks)
    described = cards.describe_step(step, {**mask_set.metadata, **(metadata or {})}, base_model)
    described = {**described, **{key: mask_set.metadata[key] for key in DERIVED}, "fingerprint": mask_set.fingerprint}
    cards.to_json(described)  # what JSON cannot hold is said before anything is sent
    if repo_id is None:
        repo_id = cards.default_name(described["base_model"], "gradient-masks")
    repository = open_repository(repo_id, revision, token)
    with tempfile.TemporaryDirectory(prefix="sparseopt-push-") as folder:
        file = Path(folder) / f"step_{step}.{format}"
        small = format == "safetensors" if compress is None else compress
        saved = mask_set.with_metadata(**{key: described[key] for key in ("step", "timestamp", "base_model")})
        with_retries(lambda: prepare(repository, private), repository.name, retries, backoff)
        parent = None
        if parent_step is not None:
            if check_step(parent_step) == step:
                raise ValueError(f"step {step} cannot be stored against itself: parent_step must be another step.")
            parent = fetch_masks(repository, parent_step)
            if parent is None:
                raise _no_step(repository, parent_step)
        saved.save(file, format=format, compress=small, parent=parent)
        with_retries(lambda: send(repository, file, step, described), repository.name, retries, backoff)
    return repository.name


def load_masks_from_hf(
    repo_id: Name,
    step: int | str,
    *,
    revision: str | None = None,
    cache_dir: Name | None = None,
    token: str | bool | None = None,
) -> MaskSet:
    """Loads the masks of a step, from safetensors or, where there is none, ``.pt`` (read without running code).

    Args:
        repo_id: repository or folder.
        step: a step, or ``"latest"``.
        revision: branch, tag or commit.
        cache_dir: where downloads are kept (default: the Hub's cache); what is there is not downloaded again.
        token: access token (default: the one logged in with).

    Raises:
        FileNotFoundError: there is no such repository or step (those that exist are named).
        sparseopt.FormatError: the file is damaged.
    """
    from sparseopt import MaskSet

    repository = open_repository(repo_id, revision, token, cache_dir)
    number = _number(repository, step)
    file = fetch_masks(repository, number)
    if file is None:
        raise _no_step(repository, number)
    return MaskSet.load(file)


def list_available_mask_steps(
    repo_id: Name, *, revision: str | None = None, token: str | bool | None = None
) -> list[int]:
    """Steps that have masks, ascending."""
    return list(mask_files(open_repository(repo_id, revision, token).files()))


def latest_mask_step(repo_id: Name, *, revision: str | None = None, token: str | bool | None = None) -> int:
    """The largest step that has masks.

    Raises:
        FileNotFoundError: there is none.
    """
    return _number(open_repository(repo_id, revision, token), "latest")


def load_mask_metadata_from_hf(
    repo_id: Name,
    step: int | str,
    *,
    revision: str | None = None,
    cache_dir: Name | None = None,
    token: str | bool | None = None,
) -> dict[str, Any]:
    """Metadata of a step: step, timestamp, tolerance, total_parameters, active_parameters, active_fraction, sparsity,
    base_model, beta, epsilon (None where unknown), and what else was known.

    Arguments and errors as for :func:`load_masks_from_hf`.
    """
    repository = open_repository(repo_id, revision, token, cache_dir)
    number = _number(repository, step)
    info = read_info(repository, number)
    if info is None:
        raise _no_step(repository, number)
    return info


def mask_report(repo_id: Name, *, revision: str | None = None, token: str | bool | None = None) -> dict[str, Any]:
    """Sizes in a repository that grows.

    Returns:
        ``repository``, ``steps`` (a list of ``{step, files, bytes}``, ascending, with the metadata's bytes in them) and
        ``bytes`` in all. The Hub also keeps earlier versions of files that were replaced or deleted.
    """
    repository = open_repository(repo_id, revision, token)
    files = repository.files()
    steps = []
    for step, masks in mask_files(files).items():
        found = {**masks, **({info_path(step): files[info_path(step)]} if info_path(step) in files else {})}
        steps.append({"step": step, "files": list(found), "bytes": sum(found.values())})
    return {"repository": repository.name, "steps": steps, "bytes": sum(row["bytes"] for row in steps)}


def prune_masks(
    repo_id: Name, keep: int, *, dry_run: bool = False, revision: str | None = None, token: str | bool | None = None
) -> dict[str, Any]:
    """Deletes all steps but the last ``keep`` (and those that these are stored against), in one commit.

    Args:
        repo_id: repository or folder.
        keep: number of steps that stay, from 1.
        dry_run: only say what would go.

    Returns:
        ``deleted`` and ``kept`` (steps), ``bytes`` that the deleted files have. A repository's history keeps them.
    """
    if isinstance(keep, bool) or not isinstance(keep, int):
        raise TypeError(f"keep must be a whole number, got {keep!r}.")
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}.")
    repository = open_repository(repo_id, revision, token)
    files = repository.files()
    steps = mask_files(files)
    needed = _with_parents(repository, list(steps)[-keep:])
    gone = [step for step in steps if step not in needed]
    paths = [path for step in gone for path in (*steps[step], info_path(step)) if path in files]
    kept = [step for step in steps if step in needed]
    if paths and not dry_run:
        left = {step: steps[step] for step in kept}
        add = {}
        if CARD in files:
            latest = read_info(repository, max(left)) or {}
            text = cards.merge_card(read_card(repository), cards.mask_card(repository.name, left, latest))
            add = {} if text is None else {CARD: text.encode()}
        repository.commit(add, paths, f"Remove gradient masks of {len(gone)} steps, {min(gone)} to {max(gone)}")
    return {"deleted": gone, "kept": kept, "bytes": sum(files[path] for path in paths)}


def push_delta(
    repo_id: Name | None,
    delta: Delta | Name,
    private: bool = True,
    *,
    base_model: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    retries: int = 3,
    backoff: float = 1.0,
) -> str:
    """Pushes a trained delta as ``delta_step_N.safetensors`` with a card, in one commit.

    Args:
        repo_id: repository or folder; None = ``{base_model}-delta`` of who is logged in.
        delta: a Delta, or its file, which is checked before it is sent.
        base_model: model that the delta belongs to, for the card.
        private, revision, token, retries, backoff: see :func:`push_masks`.

    Returns:
        The repository's full name, or the folder.
    """
    from sparseopt import Delta

    loaded = delta if isinstance(delta, Delta) else Delta.load(delta)
    check_step(loaded.step)
    name = cards.public_name(base_model)
    repository = open_repository(repo_id or cards.default_name(name, "delta"), revision, token)
    path = f"delta_step_{loaded.step}.safetensors"
    about = {
        "step": loaded.step,
        "parent step": loaded.parent_step,
        "changed entries": loaded.changed_parameters,
        "parameters": len(loaded),
        "base model": name,
        "base fingerprint": loaded.base_fingerprint,
    }

    def attempt(file: Path) -> None:
        prepare(repository, private)
        text = cards.merge_card(read_card(repository), cards.delta_card(repository.name, path, about, name))
        card = {} if text is None else {CARD: text.encode()}
        repository.commit({path: file, **card}, (), f"Upload delta of step {loaded.step}")

    with tempfile.TemporaryDirectory(prefix="sparseopt-push-") as folder:
        file = Path(folder) / path
        loaded.save(file)
        with_retries(lambda: attempt(file), repository.name, retries, backoff)
    return repository.name


def __getattr__(name: str) -> Any:
    if name == "apply_masks_to_model":  # the one name here that needs torch
        from sparseopt.masks.apply import apply_masks_to_model

        return apply_masks_to_model
    raise AttributeError(f"module 'sparseopt.hub' has no attribute {name!r}")


# ---- parts -----------------------------------------------------------------------------------------------------------
def _number(repository: Repository, step: int | str) -> int:
    if step != "latest":
        return check_step(step)
    steps = mask_files(repository.files())
    if not steps:
        raise FileNotFoundError(f"{repository.name!r} holds no masks (expected masks/step_N.safetensors or .pt).")
    return max(steps)


def _with_parents(repository: Repository, steps: list[int]) -> set[int]:
    """The steps, and all that they are stored against."""
    needed: set[int] = set()
    rest = list(steps)
    while rest:
        step = rest.pop()
        needed.add(step)
        parent = (read_info(repository, step) or {}).get("parent_step")
        if type(parent) is int and parent >= 0 and parent not in needed:
            rest.append(parent)
    return needed


def _no_step(repository: Repository, step: int) -> FileNotFoundError:
    steps = list(mask_files(repository.files()))
    some = ", ".join(map(str, steps[-5:]))
    there = f"it has {len(steps)}, the last: {some}" if steps else "it has none"
    return FileNotFoundError(f"{repository.name!r} has no masks of step {step}; {there}.")
