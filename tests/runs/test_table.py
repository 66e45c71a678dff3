"""The index of the table: it saves parsing and never shows what a run.json no longer says."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

import sparseopt as so
from sparseopt.runs import _table
from sparseopt.runs._table import INDEX


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> so.RunManager:
    """Three runs, and an index."""
    monkeypatch.setattr(_table, "INDEX_AFTER", 0)
    manager = so.RunManager(tmp_path / "runs")
    for number in range(3):
        manager.register_run(f"r{number}", {"number": number})
    assert (manager.base_dir / INDEX).exists()
    return manager


def numbers(manager: so.RunManager) -> list[int]:
    return [row["number"] for row in manager.rows()]


def test_unchanged_runs_are_not_parsed(manager: so.RunManager, monkeypatch: pytest.MonkeyPatch) -> None:
    before = manager.rows()
    monkeypatch.setattr(_table, "_read_entry", pytest.fail)
    assert manager.rows() == before
    assert numbers(manager) == [0, 1, 2]


def test_changes_show(manager: so.RunManager) -> None:
    manager.update_metrics("r1", {"loss": 7})
    assert [row.get("loss") for row in manager.rows()] == [None, 7, None]
    shutil.rmtree(manager.base_dir / "r0")
    assert numbers(manager) == [1, 2]
    os.rename(manager.base_dir / "r1", manager.base_dir / "r9")
    assert [(row["run_id"], row["number"]) for row in manager.rows()] == [("r2", 2), ("r9", 1)]


def test_same_size_and_time_is_still_another_file(manager: so.RunManager) -> None:
    path = manager.base_dir / "r1" / "run.json"
    before, found = path.read_text(), path.stat()
    other = path.with_name("other")
    other.write_text(before.replace('"number": 1', '"number": 5'))
    os.replace(other, path)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (found.st_size, found.st_mtime_ns)
    assert numbers(manager) == [0, 5, 2]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": "other"}', '{"format": "sparseopt.runs.index/1"}',
                                     '{"format": "sparseopt.runs.index/1", "runs": {"r0": 5}}'])  # fmt: skip
def test_a_damaged_index_is_made_anew(manager: so.RunManager, content: str) -> None:
    (manager.base_dir / INDEX).write_text(content)
    assert numbers(manager) == [0, 1, 2]
    assert json.loads((manager.base_dir / INDEX).read_text())["runs"].keys() == {"r0", "r1", "r2"}


def test_small_folders_have_no_index(tmp_path: Path) -> None:
    manager = so.RunManager(tmp_path)
    for _ in range(3):
        manager.setup_run({})
    assert not (tmp_path / INDEX).exists()


def test_the_index_that_cannot_be_written(manager: so.RunManager, monkeypatch: pytest.MonkeyPatch) -> None:
    manager.update_metrics("r1", {"loss": 7})

    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(_table, "atomic_write", refuse)
    (manager.base_dir / INDEX).unlink()
    assert numbers(manager) == [0, 1, 2]
