"""One step to a repository: what is sent, and how often it is tried."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

from sparseopt import _hub_card as cards
from sparseopt._files import FormatError
from sparseopt._hub_errors import explain, hub_failures
from sparseopt._hub_places import CARD, FORMATS, LocalFolder, Repository, info_path, mask_files, mask_path, mask_step

__all__ = ["LONGEST_BACKOFF", "fetch_masks", "prepare", "read_card", "read_info", "send", "with_retries"]

logger = logging.getLogger("sparseopt.hub")

LONGEST_BACKOFF = 300.0  # seconds
LARGEST_INFO = 1 << 24  # bytes of metadata; anything larger was not written by this package

T = TypeVar("T")


def prepare(repository: Repository, private: bool) -> None:
    """Makes the repository unless it exists; warns where masks that were to be private become public."""
    repository.create(private)
    if getattr(repository, "public_but_wanted_private", False):
        logger.warning("%s exists and is public: what is pushed there can be read by everybody.", repository.name)


def read_card(repository: Repository) -> str | None:
    """The repository's README.md; None where it has none."""
    file = repository.fetch(CARD)
    return None if file is None else file.read_text(encoding="utf-8", errors="replace")


def read_info(repository: Repository, step: int) -> dict[str, Any] | None:
    """The metadata of a step; None where there is none.

    Raises:
        FormatError: the file holds something else.
    """
    file = repository.fetch(info_path(step))
    if file is None:
        return None
    problem = f"'{info_path(step)}' of {repository.name!r} is not the metadata of a mask"
    if file.stat().st_size > LARGEST_INFO:
        raise FormatError(f"{problem}: it has {file.stat().st_size:,} bytes.")
    try:
        info = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{problem}: it is no JSON.") from error
    if not isinstance(info, dict):
        raise FormatError(f"{problem}: expected an object, got {type(info).__name__}.")
    return info


def fetch_masks(repository: Repository, step: int) -> Path | None:
    """The mask file of a step, with those that it is stored against in its folder; None where there is none."""
    file = None
    for format in FORMATS:
        file = file or repository.fetch(mask_path(step, format))
    if file is None:
        return None
    place, seen, child = repository.beside(file), {step}, file
    # What does not fit together is left to MaskSet.load, which says what is wrong.
    while child.suffix == ".safetensors" and (parent := _parent_step(child)) is not None and parent[0] not in seen:
        seen.add(parent[0])
        found = place.fetch(mask_path(*parent))
        if found is None:
            break
        child = found
    return file


def _parent_step(file: Path) -> tuple[int, str] | None:
    from sparseopt.masks.files import parent_of

    parent = parent_of(file)
    return None if parent is None else mask_step(parent[1])


def _describe_parent(repository: Repository, file: Path, step: int, there: Collection[int]) -> dict[str, int]:
    """``parent_step`` for the metadata of a file that is stored against another step.

    Only the repository's own steps can be parents: others would not be found by who downloads.
    """
    from sparseopt.masks.files import parent_of

    parent = None if file.suffix == ".pt" else parent_of(file)
    if parent is None:
        return {}
    known = mask_step(parent[1])
    if known is None or known[0] not in there or known[0] == step:
        raise ValueError(
            f"the masks of step {step} are stored against {parent[1]!r}, which is no other step of {repository.name!r}: "
            "save them whole."
        )
    return {"parent_step": known[0]}


def send(
    repository: Repository,
    file: Path,
    step: int,
    metadata: Mapping[str, Any],
    say: Callable[[str], object] = logger.info,
) -> None:
    """Commits the mask file of a step, its metadata and the card; sending the same again changes nothing.

    A file of the step in the other format is deleted, so that loaders find one only.
    """
    path = mask_path(step, file.suffix.removeprefix("."))
    files = repository.files()
    steps = mask_files(files)
    metadata = {**metadata, **_describe_parent(repository, file, step, steps)}
    stale = [other for other in (mask_path(step, format) for format in FORMATS) if other in files and other != path]
    steps[step] = {path: file.stat().st_size}
    steps = dict(sorted(steps.items()))
    add: dict[str, Path | bytes] = {path: file, info_path(step): cards.to_json(metadata)}
    # The card describes the last step, which is another one when a step comes late, from a spool.
    latest = metadata if step == max(steps) else read_info(repository, max(steps)) or {}
    card = cards.mask_card(repository.name, steps, latest)
    text = cards.merge_card(read_card(repository) if CARD in files else None, card)
    if text is not None:
        add[CARD] = text.encode()
    say(f"Uploading masks to {repository.name}/{path}")
    say(f"Uploading metadata to {repository.name}/{info_path(step)}")
    repository.commit(add, stale, f"Upload gradient masks of step {step}")
    where = str(repository.root) if isinstance(repository, LocalFolder) else "HF Hub"
    say(f"Successfully uploaded masks for step {step} to {where}")


def with_retries(call: Callable[[], T], repository: str, retries: int, backoff: float) -> T:
    """Calls, and calls again after failures that can pass: at most ``retries`` times, after doubling waits."""
    for attempt in range(retries + 1):
        try:
            return call()
        except hub_failures() as error:
            problem = explain(error, repository)
            if not problem.retry or attempt == retries:
                raise
            wait = max(problem.wait or 0.0, min(backoff * 2**attempt, LONGEST_BACKOFF))
            logger.warning("%s Trying again in %.1f s.", problem.sentence, wait)
            time.sleep(wait)
    raise AssertionError("unreachable: the last attempt returns or raises")
