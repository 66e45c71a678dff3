"""A bar on a terminal, plain lines elsewhere, always on stderr."""

from __future__ import annotations

import io

import pytest
import torch

from sparseopt import progress as module
from sparseopt.progress import Progress, announce_device, format_seconds, track


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_plain_lines_are_few_and_complete(clock: list[float]) -> None:
    stream = io.StringIO()
    with Progress("train", 20, stream=stream, interval=5) as progress:
        for step in range(20):
            clock[0] += 2
            progress.update(loss=1 / (step + 1))
    lines = stream.getvalue().splitlines()
    assert lines[0] == "train: 1/20 steps (5%), 2 s/step, 0:38 left, loss 1"
    assert lines[1] == "train: 4/20 steps (20%), 2 s/step, 0:32 left, loss 0.25"
    assert lines[-1] == "train: 20/20 steps (100%) done in 0:40, 2 s/step, loss 0.05"
    assert len(lines) == 1 + 6 + 1


def test_resumed_work_does_not_count_for_the_rate(clock: list[float]) -> None:
    with Progress("train", 100, completed=90, stream=io.StringIO()) as progress:
        assert progress.rate is None
        clock[0] += 10
        progress.update(completed=95)
        assert progress.rate == pytest.approx(0.5)


def test_unknown_total_and_errors(clock: list[float]) -> None:
    stream = io.StringIO()

    def read() -> None:
        with Progress("read", unit="file", stream=stream, interval=5) as progress:
            clock[0] += 4000
            progress.update()
            raise KeyError

    with pytest.raises(KeyError):
        read()
    assert stream.getvalue().splitlines() == [
        "read: 1 file, 4e+03 s/file",
        "read: 1 file stopped in 1:06:40, 4e+03 s/file",
    ]


def test_bar_on_a_terminal_also_nested() -> None:
    stream = Terminal()
    with Progress("outer", 2, stream=stream) as outer:
        with Progress("inner", 3, stream=stream) as inner:
            inner.update(3, loss=0.125, note="[bold]")
        outer.update(2)
    text = stream.getvalue()
    assert "outer" in text
    assert "inner" in text
    assert "2/2" in text
    assert Progress._live is None
    assert "done" not in text


def test_bar_is_closed_by_an_error() -> None:
    with pytest.raises(KeyError), Progress("train", 2, stream=Terminal()):
        raise KeyError
    assert Progress._live is None


def test_track(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track([1, 2, 3], "count", unit="number")) == [1, 2, 3]
    captured = capsys.readouterr()
    assert "3/3 numbers (100%) done" in captured.err
    assert captured.out == ""


def test_format_seconds() -> None:
    assert [format_seconds(s) for s in (0, 59.6, 61, 3661)] == ["0:00", "1:00", "1:01", "1:01:01"]


def test_announce_device(capsys: pytest.CaptureFixture[str]) -> None:
    assert announce_device("cpu") == torch.device("cpu")
    captured = capsys.readouterr()
    assert captured.err.startswith("Device: cpu (")
    assert "kernels: " in captured.err
    assert captured.out == ""
    assert announce_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ValueError, match="sees"):
        announce_device("cuda:99")
    with pytest.raises(ValueError, match="nonsense"):
        announce_device("nonsense")
