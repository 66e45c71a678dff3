"""Where masks are shared: a repository on the Hub, or a local folder with the same layout.

    README.md
    masks/step_N.safetensors      (or step_N.pt)
    metadata/step_N_info.json

``user/name`` and ``hf://user/name[@revision]`` are repositories; a folder that exists, and a name that begins with
``/``, ``.`` or ``~`` or has several slashes, are folders. Paths are always made from step numbers that were parsed,
never from names that a server sent.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from sparseopt._files import atomic_path, atomic_write
from sparseopt._hub_errors import one_sentence

__all__ = [
    "CARD",
    "FORMATS",
    "HubRepository",
    "LocalFolder",
    "Repository",
    "check_step",
    "info_path",
    "mask_files",
    "mask_path",
    "mask_step",
    "open_repository",
]

CARD = "README.md"
FORMATS = ("safetensors", "pt")  # in the order in which loaders look
LONGEST_STEP = 15  # digits
MASK_FILE = re.compile(r"masks/step_(0|[1-9][0-9]{0,14})\.(safetensors|pt)")


class Repository(Protocol):
    """What a Hub repository and a local folder have in common."""

    name: str

    def create(self, private: bool) -> None:
        """Makes the repository unless it exists."""

    def files(self) -> dict[str, int]:
        """Path in the repository -> bytes."""

    def fetch(self, path: str) -> Path | None:
        """A local copy of one file; None where the repository lacks it."""

    def beside(self, file: Path) -> Repository:
        """The repository as it was when ``file`` was fetched: further files land in the same folder."""

    def commit(self, add: Mapping[str, Path | bytes], delete: Iterable[str], message: str) -> None:
        """Adds and deletes files, in one commit."""


class LocalFolder:
    """A folder with a repository's layout."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.name = str(root)

    def create(self, private: bool) -> None:
        self.root.mkdir(parents=True, exist_ok=True)

    def files(self) -> dict[str, int]:
        if not self.root.is_dir():
            raise FileNotFoundError(f"there is no folder '{self.root}'.")
        # Only what belongs to the layout: the folder may be anybody's, and large.
        found = [self.root / CARD, *(self.root / "masks").glob("*"), *(self.root / "metadata").glob("*")]
        return {f.relative_to(self.root).as_posix(): f.stat().st_size for f in found if f.is_file()}

    def fetch(self, path: str) -> Path | None:
        if not self.root.is_dir():
            raise FileNotFoundError(f"there is no folder '{self.root}'.")
        file = self.root / path
        return file if file.is_file() else None

    def beside(self, file: Path) -> LocalFolder:
        return self

    def commit(self, add: Mapping[str, Path | bytes], delete: Iterable[str], message: str) -> None:
        for path, content in add.items():
            if isinstance(content, bytes):
                atomic_write(self.root / path, content)
                continue
            with atomic_path(self.root / path) as temporary:
                shutil.copyfile(content, temporary)
        for path in delete:
            (self.root / path).unlink(missing_ok=True)


class HubRepository:
    """A model repository on the Hub, through ``huggingface_hub`` and its settings (HF_ENDPOINT, HF_TOKEN, ...)."""

    def __init__(
        self,
        repo_id: str,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        from huggingface_hub import HfApi
        from huggingface_hub.utils import validate_repo_id

        self.name = repo_id
        with one_sentence(repo_id):
            validate_repo_id(repo_id)
        self.revision = revision
        self._token = token
        self.cache_dir = None if cache_dir is None else os.fspath(cache_dir)
        self.public_but_wanted_private = False
        # Read now: the client itself reads it when it is first imported, which may be long ago.
        endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or None
        self._api = HfApi(endpoint=endpoint, token=token)

    def create(self, private: bool) -> None:
        """Also notes whether an existing repository is public although a private one was asked for."""
        with one_sentence(self.name):
            # The answer names the owner, where the name given has none.
            self.name = self._api.create_repo(self.name, private=private, exist_ok=True).repo_id
            if private:
                self.public_but_wanted_private = self._api.model_info(self.name).private is False

    def files(self) -> dict[str, int]:
        with one_sentence(self.name):
            tree = self._api.list_repo_tree(self.name, recursive=True, revision=self.revision)
            sizes = {entry.path: getattr(entry, "size", None) for entry in tree}
        return {path: int(size) for path, size in sizes.items() if size is not None}  # folders have none

    def fetch(self, path: str) -> Path | None:
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        with one_sentence(self.name):
            try:
                file = self._api.hf_hub_download(self.name, path, revision=self.revision, cache_dir=self.cache_dir)
            except LocalEntryNotFoundError:
                raise
            except EntryNotFoundError:
                return None
        return Path(file)

    def beside(self, file: Path) -> HubRepository:
        # The client's cache: <cache>/models--user--name/snapshots/<commit>/masks/step_N.safetensors
        commit = file.parents[1].name
        revision = commit if re.fullmatch(r"[0-9a-f]{40}", commit) else self.revision
        return HubRepository(self.name, revision, self._token, self.cache_dir)

    def commit(self, add: Mapping[str, Path | bytes], delete: Iterable[str], message: str) -> None:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        operations: list[Any] = [
            CommitOperationAdd(
                path_in_repo=path, path_or_fileobj=content if isinstance(content, bytes) else str(content)
            )
            for path, content in add.items()
        ]
        operations += [CommitOperationDelete(path_in_repo=path, is_folder=False) for path in delete]
        with one_sentence(self.name):
            self._api.create_commit(self.name, operations, commit_message=message, revision=self.revision)


def open_repository(
    repo_id: str | os.PathLike[str],
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Repository:
    """The repository or folder of a name; nothing is asked or made yet.

    Raises:
        ValueError: the name is neither; or a revision was given for a folder.
    """
    name = os.fspath(repo_id)
    if not name:
        raise ValueError("the repository's name is empty: expected user/name, hf://user/name or a folder.")
    if name.startswith("hf://"):
        name = name.removeprefix("hf://").removeprefix("models/").rstrip("/")
        name, at, given = name.partition("@")
        if (
            name.startswith(("datasets/", "spaces/", "buckets/", "kernels/"))
            or name.count("/") > 1
            or (at and not given)
        ):
            raise ValueError(f"{os.fspath(repo_id)!r} is not a model repository: expected hf://user/name[@revision].")
        if given and revision not in (None, given):
            raise ValueError(f"{os.fspath(repo_id)!r} names another revision than revision={revision!r}.")
        return HubRepository(name, given or revision, token, cache_dir)
    local = (
        isinstance(repo_id, os.PathLike) or os.path.isabs(name) or name.startswith((".", "~")) or name.count("/") > 1
    )
    if local or os.path.isdir(name):
        if revision is not None:
            raise ValueError(f"'{name}' is a local folder, which has no revisions, got revision={revision!r}.")
        return LocalFolder(Path(name).expanduser())
    return HubRepository(name, revision, token, cache_dir)


def check_step(step: object) -> int:
    """A step number: a whole number from 0."""
    if isinstance(step, bool) or not isinstance(step, int):
        raise TypeError(f"step must be a whole number, got {step!r}.")
    if step < 0 or len(str(step)) > LONGEST_STEP:
        raise ValueError(f"step must lie in 0..10^{LONGEST_STEP}-1, got {step}.")
    return step


def mask_files(files: Mapping[str, int]) -> dict[int, dict[str, int]]:
    """Step -> {path of a mask file: bytes}, sorted by step; everything else in the repository is left out."""
    found: dict[int, dict[str, int]] = {}
    for path, size in files.items():
        match = MASK_FILE.fullmatch(path)
        if match:
            found.setdefault(int(match[1]), {})[mask_path(int(match[1]), match[2])] = size
    return dict(sorted(found.items()))


def mask_step(name: str | None) -> tuple[int, str] | None:
    """(step, format) of a mask file's name, without its folder; None for other names."""
    match = MASK_FILE.fullmatch(f"masks/{name}")
    return (int(match[1]), match[2]) if match else None


def mask_path(step: int, format: str) -> str:
    return f"masks/step_{step}.{format}"


def info_path(step: int) -> str:
    return f"metadata/step_{step}_info.json"
