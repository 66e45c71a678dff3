"""What a run folder clears up of a run that was killed, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparseopt.trainers.run_folder import RunFolder

LEFT = [".results.json.abc01_x9.tmp", ".training.png.00000000.tmp"]


def begin(path: Path, config: dict[str, dict[str, Any]]) -> None:
    RunFolder(path, config).begin(config["training"]["resume"])


@pytest.mark.parametrize("resume", [True, False])
def test_leftovers_of_a_killed_run_go(tmp_path: Path, configure: Callable[..., Any], resume: bool) -> None:
    begin(tmp_path, configure(tmp_path))
    for name in LEFT:
        (tmp_path / name).write_text("half")
    (tmp_path / ".model.abcdefgh.tmp").mkdir()
    (tmp_path / ".model.abcdefgh.tmp" / "model.safetensors").write_text("half")
    begin(tmp_path, configure(tmp_path, {"training.resume": resume}))
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_model_that_was_being_replaced_is_there_again(tmp_path: Path, configure: Callable[..., Any]) -> None:
    """Killed between the renames: training is done, and of its outcome there is no other copy."""
    begin(tmp_path, configure(tmp_path))
    (tmp_path / "training.json").write_text("{}")
    for kind, text in (("old", "trained"), ("tmp", "with its tokenizer")):
        (tmp_path / f".model.abcdefgh.{kind}").mkdir()
        (tmp_path / f".model.abcdefgh.{kind}" / "model.safetensors").write_text(text)
    folder = RunFolder(tmp_path, configure(tmp_path, {"training.resume": True}))
    assert not (tmp_path / "model").exists(), "looking writes nothing"
    folder.begin(True)
    assert folder.trained
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model", "training.json"]
    assert (tmp_path / "model" / "model.safetensors").read_text() == "trained"


def test_a_folder_without_a_run_is_not_cleared_up(tmp_path: Path, configure: Callable[..., Any]) -> None:
    (tmp_path / LEFT[0]).write_text("somebody else's")
    begin(tmp_path, configure(tmp_path))
    assert (tmp_path / LEFT[0]).read_text() == "somebody else's"


def test_a_run_resumes_on_as_many_processes(
    tmp_path: Path, configure: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    again = configure(tmp_path, {"training.resume": True})
    monkeypatch.setenv("WORLD_SIZE", "4")
    begin(tmp_path, configure(tmp_path))
    begin(tmp_path, again)
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(ValueError, match=r"began with 4 processes, .*, now 1 process: resume with as many"):
        begin(tmp_path, again)
    (tmp_path / "training.json").write_text("{}")
    begin(tmp_path, again)  # what is left, the evaluation, is the same everywhere


def test_a_run_of_one_process_does_not_resume_on_several(
    tmp_path: Path, configure: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(tmp_path, configure(tmp_path))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"began with 1 process, .*, now 2 processes"):
        begin(tmp_path, configure(tmp_path, {"training.resume": True}))
