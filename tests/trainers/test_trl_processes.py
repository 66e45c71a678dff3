"""TRL's DPO and GRPO under accelerate's FSDP2 on two processes: the same as one process on the whole batch, in shards."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainingArguments

import sparseopt as so
from sparseopt.deltas.base import open_base
from sparseopt.trainers import DynamicSparsity
from sparseopt.trainers.reference import share_reference

KIT = Path(__file__).parents[1] / "kit"
FSDP2 = Path(__file__).parents[2] / "configs" / "accelerate" / "fsdp2.yaml"
# So many tokens end a completion that the processes' are of different lengths: each must wait for the longest of all.
ENDS = {"generation_kwargs": {"eos_token_id": list(range(2, 22))}, "beta": 0.1}
# name: (method, options of each of two processes, options of one)
JOBS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "dpo": ("dpo", {"per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 2},
            {"per_device_train_batch_size": 4}),
    "dense": ("dense", {"per_device_train_batch_size": 2}, {"per_device_train_batch_size": 4}),
    "precompute": ("dpo", {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2,
                           "precompute_ref_log_probs": True}, {}),
    "grpo": ("grpo", {"per_device_train_batch_size": 4, **ENDS}, {"per_device_train_batch_size": 8, **ENDS}),
}  # fmt: skip
EQUALS = {"dpo": "dpo", "resumed": "dpo", "precompute": "dpo", "grpo": "grpo"}


def run(launcher: list[str], model: Path, jobs: list[list[Any]]) -> None:
    command = [sys.executable, "-P", *launcher, str(KIT / "trl_training.py"), str(model), json.dumps(jobs)]
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=variables, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, build_llama: Callable[..., Path]) -> tuple[Path, Path]:
    """What two processes trained in shards, with the configuration that is shipped, and what one did."""
    sharded, alone = tmp_path_factory.mktemp("sharded"), tmp_path_factory.mktemp("alone")
    model = build_llama(attention_dropout=0.0)
    jobs = [[method, str(sharded / name), None, options] for name, (method, options, _) in JOBS.items()]
    jobs.append(["dpo", str(sharded / "resumed"), str(sharded / "dpo" / "checkpoint-2"), JOBS["dpo"][1]])
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(FSDP2), "--main_process_port", "0"]
    run(launcher, model, jobs)
    shutil.copytree(
        sharded / "grpo", alone / "grpo", ignore=lambda _, names: [n for n in names if "generated" not in n]
    )
    run([], model, [[JOBS[n][0], str(alone / n), None, JOBS[n][2]] for n in ("dpo", "dense", "grpo")])
    return sharded, alone


def facts(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("facts_*.json"))]


@pytest.mark.slow
@pytest.mark.parametrize("name", EQUALS)
def test_fsdp2_equals_one_process(folders: tuple[Path, Path], name: str) -> None:
    sharded, alone = folders[0] / name, folders[1] / EQUALS[name]
    found, expected = (torch.load(folder / "weights.pt", weights_only=True) for folder in (sharded, alone))
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-6, atol=1e-6, msg=lambda m, n=key: f"{n}: {m}")
    (whole,), ranks = facts(alone), facts(sharded)
    assert len(ranks) == 2
    assert ranks[0]["digest"] == ranks[1]["digest"]
    for each in ranks:
        assert each["sharded"] and each["captures"] and each["frozen"]  # noqa: PT018
        assert each["moved"] == whole["moved"] > 1000
        assert each["state_bytes"] <= 1.1 * whole["state_bytes"] / 2
    for mine, other in zip(ranks[0]["log"], whole["log"], strict=True):
        for key in (
            "loss",
            "grad_norm",
            *(("reward", "kl") if name == "grpo" else ("rewards/margins", "logps/chosen")),
        ):
            assert mine[key] == pytest.approx(other[key], rel=1e-3, abs=1e-5), key


@pytest.mark.slow
def test_metrics_are_written_once(folders: tuple[Path, Path]) -> None:
    for name in ("dpo", "precompute", "grpo"):
        lines = (folders[0] / name / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dpo", "resumed", "dense"])
def test_the_log_and_the_accumulations_are_those_of_one_process(folders: tuple[Path, Path], name: str) -> None:
    """Under SparseAdamW that captures, resumed, and with AdamW, whose gradients accelerate clips."""
    sharded, alone = folders[0] / name, folders[1] / EQUALS.get(name, name)
    base, log = open_base(sharded / "log"), so.DeltaLog(sharded / "log")
    assert log.chain() == [1, 3, 4]
    state = {key: base.tensor(key).clone() for key in base.names}
    for step in log.chain():
        log.load(step).apply_(state)
    weights = torch.load(sharded / "weights.pt", weights_only=True)
    assert all(torch.equal(state[key], weights[key]) for key in weights)
    assert (sharded / "log" / "base.json").read_bytes() == (alone / "log" / "base.json").read_bytes()
    found, expected = (sorted(path.name for path in (folder / "grad_acc").iterdir()) for folder in (sharded, alone))
    assert found == expected
    assert len(found) == 4
    for step in (2, 4):
        mine, other = (load_file(f / "grad_acc" / f"grad_ema_step_{step}.safetensors") for f in (sharded, alone))
        assert mine.keys() == other.keys()
        for key, value in other.items():
            torch.testing.assert_close(mine[key], value, rtol=5e-3, atol=1e-9, msg=lambda m, n=key: f"{n}: {m}")
        masks, whole = (
            so.MaskSet.load(f / "grad_acc" / f"grad_mask_step_{step}.safetensors") for f in (sharded, alone)
        )
        for key in whole.names:
            differs = masks[key] != whole[key]
            near = (other[key] - 1e-6).abs() < 1e-8 if key in other else torch.zeros_like(differs)
            assert not bool((differs & ~near).any()), key
        assert 0 < masks.active_parameters < masks.total_parameters


@pytest.mark.slow
def test_completions_were_of_different_lengths_on_the_processes(folders: tuple[Path, Path]) -> None:
    """Else nothing was shown about waiting for the longest."""
    longest = [
        [max(map(len, json.loads(path.read_text()))) for path in sorted((folders[0] / "grpo").glob(f"generated_{i}_*"))]
        for i in (1, 2, 3, 4)
    ]
    assert all(len(each) == 2 for each in longest)
    assert any(one != other for one, other in longest)


# ---- what is refused -----------------------------------------------------------------------------------------------------
def test_a_shared_reference_is_refused_under_fsdp() -> None:
    class Sharded:
        model, is_fsdp_enabled = None, True

    trainer: Any = Sharded()
    with pytest.raises(ValueError, match=r"which FSDP splits: leave it out.*precompute_ref_log_probs=True"):
        share_reference(trainer)


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
@pytest.mark.parametrize("first", [True, False])
def test_dynamic_sparsity_refuses_sharded_weights_on_every_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, first: bool
) -> None:
    """accelerate's configuration is not in the trainer's arguments."""
    arguments: Any = TrainingArguments(str(tmp_path), use_cpu=True)
    state: Any = types.SimpleNamespace(is_world_process_zero=first, global_step=0, max_steps=4)
    control: Any = None
    monkeypatch.setenv(variable, "true")
    with pytest.raises(ValueError, match=r"sharded .*: train on one GPU or with DDP"):
        DynamicSparsity(sparsity=0.5).on_train_begin(arguments, state, control, model=torch.nn.Linear(2, 2))
