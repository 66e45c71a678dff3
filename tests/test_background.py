"""Background: order, waiting, errors."""

from __future__ import annotations

import threading

import pytest

from sparseopt._background import Background


def test_tasks_run_beside_the_caller_in_order() -> None:
    begun, release, done = threading.Event(), threading.Event(), []

    def task(number: int) -> None:
        begun.set()
        assert release.wait(60)
        done.append((number, threading.current_thread() is threading.main_thread()))

    one = Background("test")
    assert not one.pending
    one.submit(task, 1)
    assert begun.wait(60)
    assert one.pending
    assert done == []
    release.set()
    one.submit(task, 2)  # waits for the first
    assert done[0] == (1, False)
    one.close()
    assert done == [(1, False), (2, False)]
    one.close()


def test_an_error_is_raised_once_and_in_the_caller() -> None:
    def fail() -> None:
        raise OSError("no space")

    done: list[int] = []
    one = Background("test")
    one.submit(fail)
    with pytest.raises(OSError, match="no space"):
        one.submit(done.append, 1)
    one.submit(done.append, 2)  # it goes on
    one.flush()
    assert done == [2]
    one.submit(fail)
    with pytest.raises(OSError, match="no space"):
        one.close()
    assert not one.pending
