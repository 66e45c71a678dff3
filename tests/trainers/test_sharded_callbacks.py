"""DeltaLogger and MaskCollector under FSDP2: the files of one process, written once, by the first of two."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from process_group import processes
from safetensors import safe_open
from sharded_callbacks import (
    STEPS,
    TOLERANCES,
    put_together,
    refused,
    stop_and_resume,
    train,
    under_a_loss_scale,
)
from torch import Tensor
from transformers import TrainingArguments

import sparseopt as so
from sparseopt.deltas.base import open_base
from sparseopt.optim import capture
from sparseopt.trainers import DeltaLogger, MaskCollector

LOGGED = [2, 4, 5, 6]
pytestmark = pytest.mark.filterwarnings("ignore:training ends after")


def reconstructed(log: Path) -> dict[str, Tensor]:
    """The weights that the log ends with."""
    base, found = open_base(log), so.DeltaLog(log)
    assert found.chain() == LOGGED
    state = {name: base.tensor(name).clone() for name in base.names}
    for step in LOGGED:
        found.load(step).apply_(state)
    return state


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def contents(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    with safe_open(path, "pt") as file:
        return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def assert_same_files(one: Path, two: Path) -> None:
    """The same but for the order in which gradients were added, and the time of day."""
    assert files(one) == files(two)
    assert (one / "log" / "base.json").read_bytes() == (two / "log" / "base.json").read_bytes()
    assert (one / "log" / "base.safetensors").read_bytes() == (two / "log" / "base.safetensors").read_bytes()
    for path in (one / "grad_acc").iterdir():
        other = two / "grad_acc" / path.name
        if "mask" in path.name:
            mine, its = so.MaskSet.load(path), so.MaskSet.load(other)
            assert mine == its, path.name
            assert 0 < mine.active_parameters < mine.total_parameters
            assert {**mine.metadata, "timestamp": ""} == {**its.metadata, "timestamp": ""}
        else:
            (about, mine), (its_about, its) = contents(path), contents(other)  # type: ignore[assignment]
            assert about == its_about
            for name, value in mine.items():  # type: ignore[attr-defined]
                torch.testing.assert_close(its[name], value, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("captures", [False, True])
def test_two_processes_write_what_one_writes(tmp_path: Path, captures: bool) -> None:
    alone, sharded = tmp_path / "alone", tmp_path / "sharded"
    expected, logs = train(0, 1, str(alone), captures, False)
    (weights, first), (_, other) = processes(2)(train, str(sharded), captures, True)
    assert_same_files(alone, sharded)
    header = json.loads((sharded / "log" / "base.json").read_text())
    assert (header["name"], header["revision"], header["buffers"]) == ("nobody/nothing", "0123abc", ["counts"])
    assert header["tied"] == {"head.weight": "embedding.weight"}
    state = reconstructed(sharded / "log")
    for name, value in weights.items():
        assert torch.equal(state[name], value), name
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5)
    assert other == {}
    assert (
        first.keys()
        == logs.keys()
        >= {"subnet/step", "grad_ema/rms_mean", f"grad_mask/tolerance_{TOLERANCES[1]:g}/sparsity"}
    )
    for key, value in logs.items():
        assert first[key] == pytest.approx(value, rel=1e-4), key


def test_resumed_they_go_on_where_the_checkpoint_was(tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    processes(2)(train, str(whole), False, True)
    weights, _ = processes(2)(stop_and_resume, str(stopped))
    assert_same_files(whole, stopped)
    state = reconstructed(stopped / "log")
    assert all(torch.equal(state[name], value) for name, value in weights.items())
    for step in LOGGED:
        assert so.DeltaLog(stopped / "log").load(step) == so.DeltaLog(whole / "log").load(step)
    last = f"grad_ema_step_{STEPS}.safetensors"
    (_, mine), (_, its) = (contents(folder / "grad_acc" / last) for folder in (whole, stopped))
    assert all(torch.equal(mine[name], its[name]) for name in mine)


def test_uneven_and_empty_shards_come_together() -> None:
    first, second = processes(2)(put_together, 1)
    assert [found[0] for found in first] == [(0, 35), (0, 1), (0, 7), (0, 12)]
    assert [found[0] for found in second] == [(35, 65), (1, 1), (7, 7), (12, 24)]
    for mine, its in zip(first, second, strict=True):
        assert mine[1] and its[1] and mine[3] and its[3]  # noqa: PT018
        (_, held), (_, whole) = mine[0], its[0]
        assert mine[2] == its[2] == [1] * held + [2] * (max(held, whole) - held)


def test_copies_of_a_shard_count_once() -> None:
    for found in processes(2)(put_together, 2):
        assert [its_range for its_range, *_ in found] == [(0, 65), (0, 1), (0, 7), (0, 24)]
        assert all(together and right for _, together, _, right in found)


def test_gradients_that_the_step_captures_count_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with shards in the host's memory: they stay in .grad until the step, which shows them to the collector again."""
    train(0, 1, str(tmp_path / "in backward"), True, False)
    monkeypatch.setattr(capture, "offloaded", lambda param: True)
    train(0, 1, str(tmp_path / "in the step"), True, False)
    assert_same_files(tmp_path / "in backward", tmp_path / "in the step")


@pytest.mark.parametrize("offload", [False, True])
def test_an_overflow_on_one_process_skips_the_step_on_all(offload: bool) -> None:
    count, expected, nbytes = under_a_loss_scale(0, 1, offload)
    found = processes(2)(under_a_loss_scale, offload)
    assert count == 2
    assert sum(size for *_, size in found) == nbytes
    for its_count, value, _ in found:
        assert its_count == 2
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-12)


# ---- what is refused -----------------------------------------------------------------------------------------------------
def test_other_shards_than_rows_are_refused() -> None:
    for messages in processes(2)(refused, True):
        assert all("rows over one mesh dimension" in message for message in messages)


def test_gradients_that_nobody_averages_are_refused() -> None:
    for messages in processes(2)(refused, False):
        assert messages == ["MaskCollector needs gradients averaged over processes: FSDP2 leaves 'bias' out."]


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
@pytest.mark.parametrize(
    "make",
    [lambda folder: DeltaLogger(folder, "1"), lambda folder: MaskCollector(folder, tolerance=1e-8)],
    ids=["delta logger", "mask collector"],
)
@pytest.mark.parametrize("first", [True, False])
def test_models_that_are_split_otherwise_are_refused_on_every_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[..., Any], variable: str, first: bool
) -> None:
    """accelerate's configuration is not in the trainer's arguments; FSDP1 and DeepSpeed make no DTensors."""
    callback, arguments = make(tmp_path / "folder"), TrainingArguments(str(tmp_path), use_cpu=True)

    class State:
        is_world_process_zero, global_step, max_steps = first, 0, 4

    monkeypatch.setenv(variable, "true")
    with pytest.raises(ValueError, match=r"in the shards of FSDP2, not of FSDP1 or DeepSpeed ZeRO: use FSDP2"):
        callback.on_train_begin(arguments, State(), None, model=torch.nn.Linear(2, 2))
    assert not (tmp_path / "folder").exists()
