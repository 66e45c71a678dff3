"""``torchrun`` and ``accelerate launch`` on two and four processes of a CPU: attach() and ``sparseopt train``, end to end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.slow
KIT = Path(__file__).parents[1] / "kit"
CONFIGS = Path(__file__).parents[2] / "configs" / "accelerate"
SHARDED = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT", "FSDP_RESHARD_AFTER_FORWARD": "true",
}  # fmt: skip


def torchrun(processes: int, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return launch([*launcher, *command], environment)


def launch(arguments: list[str], environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
    return subprocess.run(
        [sys.executable, "-P", *arguments], capture_output=True, text=True, timeout=240, env=variables, check=False
    )


def trained(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    return json.loads((folder / "facts.json").read_text()), torch.load(folder / "weights.pt", weights_only=True)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("alone")
    done = launch([str(KIT / "attached_training.py"), str(folder), "6", "", '{"per_device_train_batch_size": 8}'])
    assert done.returncode == 0, done.stderr
    return trained(folder)


def assert_same(folder: Path, alone: tuple[dict[str, Any], dict[str, torch.Tensor]]) -> dict[str, Any]:
    facts, weights = trained(folder)
    for name, value in alone[1].items():
        torch.testing.assert_close(weights[name], value, rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert facts["norms"] == pytest.approx(alone[0]["norms"][-len(facts["norms"]) :], rel=1e-4)
    assert facts["frozen"]
    assert facts["captures"]
    assert facts["trainable"]
    return facts


@pytest.mark.parametrize(
    ("processes", "options"),
    [(2, {"per_device_train_batch_size": 4}), (2, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}),
     (4, {"per_device_train_batch_size": 2})],
)  # fmt: skip
@pytest.mark.parametrize("environment", [{}, SHARDED], ids=["ddp", "fsdp2"])
def test_attach_equals_one_process(
    tmp_path: Path, alone: Any, processes: int, options: dict[str, int], environment: dict[str, str]
) -> None:
    script, settings = str(KIT / "attached_training.py"), json.dumps(options)
    done = torchrun(processes, script, str(tmp_path), "6", "", settings, **environment)
    assert done.returncode == 0, done.stderr
    assert assert_same(tmp_path, alone)["sharded"] == bool(environment)


@pytest.mark.parametrize("environment", [{}, SHARDED], ids=["ddp", "fsdp2"])
def test_a_checkpoint_of_two_processes_resumes_on_two(tmp_path: Path, alone: Any, environment: dict[str, str]) -> None:
    script, settings = str(KIT / "attached_training.py"), json.dumps({"per_device_train_batch_size": 4})
    done = torchrun(2, script, str(tmp_path), "6", "", settings, **environment)
    assert done.returncode == 0, done.stderr
    done = torchrun(2, script, str(tmp_path), "6", str(tmp_path / "checkpoint-3"), settings, **environment)
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path, alone)


def test_accelerate_launch_with_the_shipped_configuration(tmp_path: Path, alone: Any) -> None:
    script, settings = str(KIT / "attached_training.py"), json.dumps({"per_device_train_batch_size": 4})
    command = [
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(CONFIGS / "cpu.yaml"),
        "--main_process_port",
        "0",
    ]
    done = launch([*command, script, str(tmp_path), "6", "", settings])
    assert done.returncode == 0, done.stderr
    assert assert_same(tmp_path, alone)["world"] == 2


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_train_refuses_sharding(tmp_path: Path, settings: Callable[..., list[str]], variable: str) -> None:
    pairs = [word for setting in settings(tmp_path / "run") for word in ("--set", setting)]
    done = launch(["-m", "sparseopt", "train", "dpo", *pairs], {variable: "true"})
    assert done.returncode == 1
    assert "every GPU" in done.stderr


def test_train_dpo_writes_once(tmp_path: Path, settings: Callable[..., list[str]]) -> None:
    folder = tmp_path / "run"
    changes = {"delta_log.schedule": "2,10", "delta_log.dir": tmp_path / "log", "training.batch_size": 1,
               "grad_acc.tolerance": "1e-12", "grad_acc.mask_save_interval": 5}  # fmt: skip
    pairs = [word for setting in settings(folder, changes) for word in ("--set", setting)]
    done = torchrun(2, "-m", "sparseopt", "train", "dpo", *pairs)
    assert done.returncode == 0, done.stderr
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))
    assert steps[-1] == 10
    assert (folder / "results.json").is_file()
    assert (folder / "trained_entries.safetensors").is_file()
    assert sorted(p.name for p in (tmp_path / "log").glob("delta_step_*.safetensors")) == [
        "delta_step_10.safetensors", "delta_step_2.safetensors",
    ]  # fmt: skip
    assert done.stderr.count("Training ") == 1
