"""Files and folders that are either whole or absent: write beside the target, fsync, rename."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

__all__ = ["FormatError", "atomic_folder", "atomic_path", "atomic_write", "clear_leftovers"]

# .NAME.RANDOM.tmp is being written, .NAME.RANDOM.old is a folder that is giving way.
_LEFTOVER = re.compile(r"\.(?P<name>.+)\.[a-z0-9_]{8}\.(?P<kind>tmp|old)")


class FormatError(ValueError):
    """A file is damaged, truncated, of another format, or of a version this release cannot read."""


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path in the target's folder; on success it is fsynced and renamed to ``path``.

    On any error (Ctrl-C included) the temporary file is removed and an existing ``path`` stays as it was.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        _finish(temporary, 0o666)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(target.parent)


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str], *, replace: bool = False) -> Iterator[Path]:
    """Yields a temporary folder beside the target; on success its files are fsynced and it is renamed to ``path``.

    On any error (Ctrl-C included) the temporary folder is removed and an existing ``path`` stays as it was. ``path`` must
    be absent or an empty folder by the end (OSError), unless ``replace``: then a folder there gives way.

    A folder cannot be renamed onto a full one, so replacing takes two renames. Whoever is killed between them leaves both
    folders whole beside ``path``: the old one as ``.NAME.*.old``, which nothing that cleans up ``*.tmp`` removes, and
    which :func:`clear_leftovers` puts back.
    """
    target = Path(os.path.abspath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    old = None
    try:
        yield temporary
        for inner in sorted(temporary.rglob("*"), reverse=True):  # files before their folders
            if not inner.is_symlink():
                _finish(inner, 0o777 if inner.is_dir() else 0o666)
        _finish(temporary, 0o777)
        if replace and target.is_dir():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
            os.replace(target, old)
        os.replace(temporary, target)
    except BaseException:
        if old is not None and not os.path.lexists(target):
            os.replace(old, target)
        elif old is not None:
            # Full, where `path` is somebody else's by now: then the old folder stays beside it.
            with contextlib.suppress(OSError):
                old.rmdir()
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync(target.parent)
    if old is not None:
        shutil.rmtree(old)


def clear_leftovers(folder: str | os.PathLike[str]) -> None:
    """Removes what killed writes left in a folder in which nobody writes now.

    Of a folder that was giving way to another when the kill came, and is the only copy, the name is restored.
    """
    found = [(path, match) for path in Path(folder).iterdir() if (match := _LEFTOVER.fullmatch(path.name))]
    for path, match in sorted(found, key=lambda pair: pair[0].lstat().st_mtime, reverse=True):  # the newest comes back
        target, folder_there = path.with_name(match["name"]), path.is_dir() and not path.is_symlink()
        if match["kind"] == "old" and folder_there and not os.path.lexists(target) and any(path.iterdir()):
            os.replace(path, target)
        elif folder_there:
            shutil.rmtree(path)
        elif match["kind"] == "tmp":  # only folders become .old
            path.unlink()


def _finish(path: Path, permissions: int) -> None:
    """fsyncs, and adds the permissions that an ordinary open() or mkdir() gives: temporary files and folders are private."""
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(path, stat.S_IMODE(path.stat().st_mode) | permissions & ~mask)
    _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def atomic_write(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Writes ``data`` (text as UTF-8) to ``path`` through :func:`atomic_path`."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)
