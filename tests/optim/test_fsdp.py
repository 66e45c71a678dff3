"""SparseAdamW under FSDP2 (fully_shard): the same as one process on the whole batch, each rank with its part of the state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from distributed_training import alone, make_model, masks_of, under_fsdp
from process_group import processes


def assert_as_alone(results: list[Any], world: int, accumulate: int) -> None:
    expected, norms = alone(world, accumulate)
    for found, found_norms, *_ in results:
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
        torch.testing.assert_close(torch.tensor(found_norms), torch.tensor(norms), rtol=1e-4, atol=0)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("accumulate", "no_sync"), [(1, False), (3, False), (3, True)])
@pytest.mark.parametrize("capture", [True, False])
def test_equals_one_process_on_the_whole_batch(when: str, accumulate: int, no_sync: bool, capture: bool) -> None:
    results = processes(2)(under_fsdp, when, accumulate, no_sync, {"capture_gradients": capture}, {})
    assert_as_alone(results, 2, accumulate)
    assert {active for *_, active in results} == {sum(int(m.sum()) for m in masks_of(make_model()).values())}
