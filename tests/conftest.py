"""For all tests: fixed seeds, poisoned memory, and no empty GPU run."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator

import pytest

GPU_PASSED = pytest.StashKey[int]()


@pytest.fixture(autouse=True)
def _seeds_and_poison() -> Iterator[None]:
    """`torch.empty` returns NaNs (integers: their largest value), so that reading what nobody wrote shows.

    Where torch is not imported yet there is nothing to do: tests of the lean import stay lean.
    """
    random.seed(0)
    if "torch" not in sys.modules:
        yield
        return
    import torch

    torch.manual_seed(0)
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    # Filling belongs to this mode. warn_only: other ops keep working as users run them.
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    if report.when == "call" and report.passed and item.get_closest_marker("gpu"):
        item.config.stash[GPU_PASSED] = item.config.stash.get(GPU_PASSED, 0) + 1


def pytest_sessionfinish(session: pytest.Session) -> None:
    """`pytest -m gpu` beside a GPU fails when no GPU test passed: skipping everything is no success."""
    if session.config.option.markexpr.strip() != "gpu" or session.config.option.collectonly:
        return
    import torch

    if torch.cuda.is_available() and not session.config.stash.get(GPU_PASSED, 0):
        print("\nA CUDA device is present, but no test marked `gpu` passed.", file=sys.stderr)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
