"""One of several processes: who talks, on which device, and what all of them agree on."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from agreeing import ask
from process_group import processes

from sparseopt import progress
from sparseopt._processes import is_first, own_device, position
from sparseopt.trainers import processes as trained
from sparseopt.trainers.processes import Anyone


def test_what_one_process_sees_all_do() -> None:
    assert processes(2)(ask) == [[False, True, False, True]] * 2


def test_alone_the_answer_is_ones_own() -> None:
    anyone = Anyone()
    assert [anyone.ask(here, torch.device("cpu")) for here in (False, True, False)] == [False, True, False]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_gpus_the_answer_comes_one_step_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        monkeypatch.setattr(trained, "several", lambda: True)
        anyone = Anyone()
        given = [anyone.ask(here, torch.device("cuda")) for here in (True, False, True, True, False)]
        assert given == [False, True, False, True, True]
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("rank", "world", "expected"),
    [(None, None, (0, 1)), ("3", "4", (3, 4)), ("", "", (0, 1)), ("none", "-1", (0, 1))],
)
def test_position(
    monkeypatch: pytest.MonkeyPatch, rank: str | None, world: str | None, expected: tuple[int, int]
) -> None:
    for name, value in (("RANK", rank), ("WORLD_SIZE", world)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert position() == expected
    assert is_first() == (expected[0] == 0)


def test_the_first_process_talks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        stream = io.StringIO()
        with progress.Progress("train", 2, stream=stream, interval=1e9) as bar:
            bar.update()
        assert stream.getvalue().count("done in") == lines
        progress.announce_device("cpu")
        assert capsys.readouterr().err.count("Device: cpu") == lines


def test_every_process_takes_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert own_device("auto") == "auto"
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert [own_device(asked) for asked in ("auto", "cuda", "cuda:1", "cpu")] == ["cuda:2", "cuda:2", "cuda:1", "cpu"]
    assert chosen == [2, 2]
