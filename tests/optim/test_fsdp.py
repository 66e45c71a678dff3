"""SparseAdamW under FSDP2 (fully_shard): the same as one process on the whole batch, each rank with its part of the state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from distributed_training import (
    alone,
    infinite_on_one_rank,
    make_model,
    masks_of,
    refused_when_sharded,
    state_bytes,
    under_fsdp,
)
from process_group import processes


def assert_as_alone(results: list[Any], world: int, accumulate: int) -> None:
    expected, norms = alone(world, accumulate)
    for found, found_norms, *_ in results:
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
        torch.testing.assert_close(torch.tensor(found_norms), torch.tensor(norms), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("when", "accumulate", "no_sync", "capture"),
    [("before", 3, True, True), ("after", 3, False, True), ("after", 1, False, False), ("before", 3, True, False)],
)
def test_equals_one_process_on_the_whole_batch(when: str, accumulate: int, no_sync: bool, capture: bool) -> None:
    results = processes(2)(under_fsdp, when, accumulate, no_sync, {"capture_gradients": capture}, {})
    assert_as_alone(results, 2, accumulate)
    assert {active for *_, active in results} == {sum(int(m.sum()) for m in masks_of(make_model()).values())}


@pytest.mark.slow
@pytest.mark.parametrize("capture", [True, False])
def test_four_processes(capture: bool) -> None:
    """Rows 13 and 1 over four: uneven and empty shards."""
    results = processes(4)(under_fsdp, "after", 3, True, {"capture_gradients": capture}, {})
    assert_as_alone(results, 4, 3)


def test_mixed_precision_trains_fp32_weights_from_bf16_compute() -> None:
    expected, _ = alone(2)
    start = {n: p.detach() for n, p in make_model().named_parameters()}
    masks = masks_of(make_model())
    for found, *_ in processes(2)(under_fsdp, "after", 1, False, {"capture_gradients": True}, {"mixed": True}):
        moved = torch.cat([(found[n] - start[n])[masks[n]] for n in found])
        wanted = torch.cat([(expected[n] - start[n])[masks[n]] for n in found])
        assert torch.nn.functional.cosine_similarity(moved, wanted, dim=0) > 0.98
        assert all(torch.equal(found[n][~masks[n]], start[n][~masks[n]]) for n in found)


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_state_is_divided(world: int) -> None:
    whole = state_bytes(0, 1, False)
    assert max(processes(world)(state_bytes, True)) <= 1.1 * whole / world


def test_an_overflow_on_one_rank_skips_the_step_on_all() -> None:
    assert processes(2)(infinite_on_one_rank, True) == [(1, False)] * 2


def test_what_needs_the_whole_model_is_refused() -> None:
    for messages in processes(2)(refused_when_sharded):
        assert "its part of the masks" in messages[0]
        assert all("does not work on sharded parameters" in message for message in messages[1:])
