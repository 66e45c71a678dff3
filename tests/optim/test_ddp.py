"""SparseAdamW under DistributedDataParallel: the same as one process on the whole batch, with compact communication."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from distributed_training import (
    alone,
    disagree,
    infinite_on_one_rank,
    under_ddp,
    under_ddp_with_gradients_that_wait,
    used_on_one_rank,
    without_ddp,
)
from process_group import processes

CAPTURED: dict[str, Any] = {"capture_gradients": True}


def assert_as_alone(results: list[Any], world: int, accumulate: int, **model: Any) -> None:
    expected, norms = alone(world, accumulate, **model)
    for found, found_norms, _ in results:
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
        torch.testing.assert_close(torch.tensor(found_norms), torch.tensor(norms), rtol=1e-4, atol=0)
        assert all(torch.equal(found[name], results[0][0][name]) for name in found), "ranks differ"


@pytest.mark.parametrize(
    ("when", "accumulate", "no_sync", "capture"),
    [
        ("before", 1, False, True),
        ("after", 3, True, True),
        ("before", 3, True, True),
        ("prepared", 3, False, True),
        ("after", 3, True, False),
    ],
)
def test_equals_one_process_on_the_whole_batch(when: str, accumulate: int, no_sync: bool, capture: bool) -> None:
    results = processes(2)(under_ddp, when, accumulate, no_sync, {"capture_gradients": capture}, {}, {})
    assert_as_alone(results, 2, accumulate)
    for _, _, reduced in results:
        # DDP needs one parameter, the smallest; without capture it reduces all of them.
        assert (reduced == [1]) == capture


@pytest.mark.parametrize(
    ("ddp", "model"),
    [
        ({"gradient_as_bucket_view": True}, {}),
        ({"static_graph": True}, {}),
        ({"find_unused_parameters": True}, {}),
        ({}, {"tied": True}),
        ({}, {"checkpointing": "non-reentrant"}),
        ({}, {"checkpointing": "reentrant"}),
    ],
    ids=["bucket-view", "static", "find-unused", "tied", "non-reentrant", "reentrant"],
)
@pytest.mark.parametrize("when", ["before", pytest.param("after", marks=pytest.mark.slow)])
def test_ddp_options_and_models(ddp: dict, model: dict, when: str) -> None:
    no_sync = "static_graph" not in ddp  # torch does not take both
    results = processes(2)(under_ddp, when, 2, no_sync, CAPTURED, ddp, model)
    assert_as_alone(results, 2, 2, **model)


@pytest.mark.parametrize("ddp", [{}, {"gradient_as_bucket_view": True}], ids=["own-memory", "bucket-view"])
@pytest.mark.parametrize("when", ["before", "after", "prepared"])
def test_gradients_that_wait_are_not_overwritten(when: str, ddp: dict[str, Any]) -> None:
    """The parameter that stays in DDP has its gradient in DDP's memory, which DDP fills with zeros in the same pass."""
    assert_as_alone(processes(2)(under_ddp_with_gradients_that_wait, when, ddp), 2, 2)


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "after", "prepared"])
def test_four_processes(when: str) -> None:
    assert_as_alone(processes(4)(under_ddp, when, 3, True, CAPTURED, {}, {}), 4, 3)


def test_captured_gradients_are_averaged_without_ddp_too() -> None:
    expected, _ = alone(2)
    for found in processes(2)(without_ddp, torch.float32):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6)


def test_bf16_on_the_wire_is_close_and_the_same_everywhere() -> None:
    exact = processes(2)(without_ddp, torch.float32)[0]
    found = processes(2)(without_ddp, torch.bfloat16)
    for name, value in exact.items():
        assert torch.equal(found[0][name], found[1][name]), name
        torch.testing.assert_close(found[0][name], value, rtol=0, atol=5e-3)
    assert any(not torch.equal(found[0][name], exact[name]) for name in exact)


@pytest.mark.parametrize(
    ("what", "message"),
    [("masks", "masks differ between processes"), ("weights", "weights differ between rank 0 and rank 1"),
     ("capture", "capture_gradients is True on rank 0 and False on rank 1")],
)  # fmt: skip
def test_processes_that_differ_are_told(what: str, message: str) -> None:
    assert all(message in error for error in processes(2)(disagree, what))


def test_a_parameter_used_on_one_rank_steps_on_all_and_an_unused_one_nowhere() -> None:
    results = processes(2)(used_on_one_rank)
    for found, counted, start in results:
        assert counted["head.weight"] == 2
        assert counted["blocks.2.up.weight"] == 0
        assert torch.equal(found["blocks.2.up.weight"], start["blocks.2.up.weight"])
        assert not torch.equal(found["head.weight"], start["head.weight"])
        assert all(torch.equal(found[name], results[0][0][name]) for name in found)


def test_an_overflow_on_one_rank_skips_the_step_on_all() -> None:
    assert processes(2)(infinite_on_one_rank, False) == [(1, False)] * 2


def test_other_reduce_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match="reduce_dtype"):
        without_ddp(0, 1, torch.float16)
