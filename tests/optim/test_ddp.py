"""SparseAdamW under DistributedDataParallel: the same as one process on the whole batch, with compact communication."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from distributed_training import alone, under_ddp
from process_group import processes

CAPTURED: dict[str, Any] = {"capture_gradients": True}


def assert_as_alone(results: list[Any], world: int, accumulate: int, **model: Any) -> None:
    expected, norms = alone(world, accumulate, **model)
    for found, found_norms, _ in results:
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
        torch.testing.assert_close(torch.tensor(found_norms), torch.tensor(norms), rtol=1e-4, atol=0)
        assert all(torch.equal(found[name], results[0][0][name]) for name in found), "ranks differ"


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("accumulate", "no_sync"), [(1, False), (3, False), (3, True)])
@pytest.mark.parametrize("capture", [True, False])
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
@pytest.mark.parametrize("when", ["before", "after"])
def test_ddp_options_and_models(ddp: dict, model: dict, when: str) -> None:
    no_sync = "static_graph" not in ddp  # torch does not take both
    results = processes(2)(under_ddp, when, 2, no_sync, CAPTURED, ddp, model)
    assert_as_alone(results, 2, 2, **model)
