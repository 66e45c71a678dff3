"""Files and folders that are whole or absent: errors, kills at the worst moment, permissions, what is cleared up."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sparseopt import _files
from sparseopt._files import atomic_folder, atomic_path, atomic_write, clear_leftovers

OLD, NEW = {"a": "old"}, {"a": "new", "inner/b": "new"}


@pytest.fixture(autouse=True)
def _umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


def fill(folder: Path, content: dict[str, str]) -> None:
    for name, text in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def fill_and_raise(folder: Path, content: dict[str, str], error: type[BaseException]) -> None:
    fill(folder, content)
    raise error


def content_of(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- files -----------------------------------------------------------------------------------------------------------
def test_a_file_is_replaced_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "new" / "x"
    atomic_write(target, "old")
    with atomic_path(target) as temporary:
        temporary.write_bytes(b"new")
        assert temporary.parent == target.parent
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert target.stat().st_mode & 0o777 == 0o640
    assert names(target.parent) == ["x"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_the_file_as_it_was(tmp_path: Path, error: type[BaseException]) -> None:
    atomic_write(tmp_path / "x", "old")
    with pytest.raises(error), atomic_path(tmp_path / "x") as temporary:
        fill_and_raise(temporary.parent, {temporary.name: "half"}, error)
    assert (tmp_path / "x").read_text() == "old"
    assert names(tmp_path) == ["x"]


# ---- folders ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("there", ["absent", "empty"])
def test_a_folder_appears_when_it_is_whole(tmp_path: Path, replace: bool, there: str) -> None:
    target = tmp_path / "deep" / "x"
    if there == "empty":
        target.mkdir(parents=True)
    with atomic_folder(target, replace=replace) as temporary:
        fill(temporary, NEW)
        (temporary / "a").chmod(0o700)  # what is private or a program stays so and gets what an open() gives
        assert temporary.parent == target.parent
        assert target.exists() == (there == "empty")
    assert content_of(target) == NEW
    modes = {name: (target / name).stat().st_mode & 0o777 for name in (".", "inner", "a", "inner/b")}
    assert modes == {".": 0o750, "inner": 0o750, "a": 0o740, "inner/b": 0o640}
    assert names(target.parent) == ["x"]


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_the_folder_as_it_was(tmp_path: Path, error: type[BaseException], replace: bool) -> None:
    fill(tmp_path / "x", OLD)
    with pytest.raises(error), atomic_folder(tmp_path / "x", replace=replace) as temporary:
        fill_and_raise(temporary, NEW, error)
    assert content_of(tmp_path / "x") == OLD
    assert names(tmp_path) == ["x"]


def test_a_full_folder_gives_way_only_if_told(tmp_path: Path) -> None:
    fill(tmp_path / "x", OLD)
    with pytest.raises(OSError, match="not empty"), atomic_folder(tmp_path / "x") as temporary:
        fill(temporary, NEW)
    assert content_of(tmp_path / "x") == OLD
    with atomic_folder(tmp_path / "x", replace=True) as temporary:
        fill(temporary, NEW)
    assert content_of(tmp_path / "x") == NEW
    (tmp_path / "file").write_text("a file")
    with pytest.raises(NotADirectoryError), atomic_folder(tmp_path / "file", replace=True) as temporary:
        fill(temporary, NEW)
    assert (tmp_path / "file").read_text() == "a file"
    assert names(tmp_path) == ["file", "x"]


@pytest.mark.parametrize("failing", [1, 2])
def test_a_rename_that_fails_leaves_the_folder_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    fill(tmp_path / "x", OLD)
    calls: list[Any] = []
    rename: Callable[..., None] = os.replace

    def fails(*paths: Any) -> None:
        calls.append(paths)
        if len(calls) == failing:
            raise PermissionError("no")
        rename(*paths)

    monkeypatch.setattr(_files.os, "replace", fails)
    with pytest.raises(PermissionError), atomic_folder(tmp_path / "x", replace=True) as temporary:
        fill(temporary, NEW)
    assert content_of(tmp_path / "x") == OLD
    assert names(tmp_path) == ["x"]


KILLED = """
import os, sys
from pathlib import Path
from sparseopt import _files

calls, rename = [], os.replace

def replace(*paths):
    if len(calls) == int(sys.argv[2]):
        os._exit(9)
    calls.append(paths)
    rename(*paths)

os.replace = replace
_files.shutil.rmtree = lambda path: os._exit(9)
with _files.atomic_folder(sys.argv[1], replace=True) as folder:
    (folder / "a").write_text("new")
"""


@pytest.mark.parametrize(("renames", "expected"), [(0, "old"), (1, "old"), (2, "new")])
def test_a_kill_between_the_renames_loses_nothing(tmp_path: Path, renames: int, expected: str) -> None:
    target = tmp_path / "x"
    fill(target, OLD)
    result = subprocess.run([sys.executable, "-c", KILLED, str(target), str(renames)], check=False, timeout=60)
    assert result.returncode == 9
    assert target.exists() == (renames != 1)
    for left in tmp_path.glob(".*.tmp"):  # what others clean up is never the only copy
        assert content_of(left) == {"a": "new"}
    clear_leftovers(tmp_path)
    assert content_of(target) == {"a": expected}
    assert names(tmp_path) == ["x"]
    clear_leftovers(tmp_path)
    assert content_of(target) == {"a": expected}


def test_what_is_cleared_up(tmp_path: Path) -> None:
    ours = [".x.safetensors.ab_cd012.tmp", ".x.abcdefgh.tmp", ".gone.abcdefgh.old"]
    theirs = [".x.tmp", "x.abcdefgh.tmp", ".x.backup.tmp", ".x.ABCDEFGH.tmp", ".notes.abcdefgh.old", ".old"]
    (tmp_path / ours[1]).mkdir()
    (tmp_path / ours[2]).mkdir()  # nothing in it: no folder had been moved there yet
    for name in (ours[0], *theirs):
        (tmp_path / name).write_text("")
    clear_leftovers(tmp_path)
    assert names(tmp_path) == sorted(theirs)


def test_the_newest_of_several_comes_back(tmp_path: Path) -> None:
    for age, name in enumerate(["bbbbbbbb", "aaaaaaaa", "cccccccc"]):
        folder = tmp_path / f".x.{name}.old"
        fill(folder, {"a": name})
        os.utime(folder, (1000 - age, 1000 - age))
    clear_leftovers(tmp_path)
    assert content_of(tmp_path / "x") == {"a": "bbbbbbbb"}
    assert names(tmp_path) == ["x"]
