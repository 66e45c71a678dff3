"""Optimizer state of sharded models: saved on two processes, loaded on two, four and one, and as one state dict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_training import (
    pickle_a_part,
    resume,
    resume_alone,
    resume_whole,
    resume_whole_alone,
    save_half_way,
)
from process_group import processes
from torch import Tensor

OPTIONS: dict[str, Any] = {"capture_gradients": True}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Tensor]]:
    folder = str(tmp_path_factory.mktemp("saved"))
    return folder, processes(2)(save_half_way, folder, OPTIONS)[0]


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], exact: bool = False) -> None:
    for name, value in expected.items():
        tolerance = 0 if exact else 1e-6
        torch.testing.assert_close(
            found[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_two_to_two_continues_bit_for_bit(saved: tuple[str, dict[str, Tensor]]) -> None:
    for found in processes(2)(resume, saved[0], OPTIONS):
        assert_same(found, saved[1], exact=True)


def test_two_to_one(saved: tuple[str, dict[str, Tensor]]) -> None:
    assert_same(resume_alone(saved[0], OPTIONS), saved[1])


@pytest.mark.slow
def test_two_to_four(saved: tuple[str, dict[str, Tensor]]) -> None:
    for found in processes(4)(resume, saved[0], OPTIONS):
        assert_same(found, saved[1])


def test_the_whole_state_dict_loads_in_one_process_and_in_shards(saved: tuple[str, dict[str, Tensor]]) -> None:
    assert_same(resume_whole_alone(saved[0], OPTIONS), saved[1])
    for found in processes(2)(resume_whole, saved[0], OPTIONS):
        assert_same(found, saved[1], exact=True)


def test_a_part_is_not_pickled_as_if_it_were_all(tmp_path: Path) -> None:
    for good, message in processes(2).outcomes(pickle_a_part, str(tmp_path / "state.pt")):
        assert not good
        assert "torch.distributed.checkpoint" in message
