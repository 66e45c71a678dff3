"""A fine-tuning that is killed, or stopped with Ctrl-C, ends with the weights of one that never was."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from finetuning import finetune, options, same_weights, text
from slow_steps import start, until_training
from transformers import AutoModelForCausalLM

import sparseopt as so

KILLS = 5

CHANGES: dict[str, Any] = {"max_steps": 40, "save_steps": 3, "mask_update_interval": 4, "dropout": 0.1}


def continued(model: Path, data: Path, folder: Path) -> subprocess.Popen[str]:
    """The run in a folder, from where it is."""
    values = options(folder, model_name=model, dataset=data, **CHANGES)
    flags = [part for name, value in values.items() for part in (f"--{name}", str(value))]
    resume = ["--resume"] if (folder / "finetune.json").is_file() else []
    return start("finetune_run", 0.1, "finetune", *flags, *resume)


def same_outcome(first: Path, second: Path) -> None:
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (first, second)]
    assert same_weights(*models)
    masks = [so.MaskSet.load(folder / "masks.safetensors") for folder in (first, second)]
    assert masks[0] == masks[1]
    histories = [json.loads((folder / "mask_history.json").read_text()) for folder in (first, second)]
    assert histories[0] == histories[1]
    assert len(histories[0]["updates"]) == 7


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kills_change_nothing(tiny_folder: Path, tmp_path: Path) -> None:
    data, folder, seed = tmp_path / "chain.txt", tmp_path / "killed", random.randrange(2**32)
    data.write_text(text(3000))
    finetune(str(tiny_folder), data, tmp_path / "straight", **CHANGES)
    rng, reached = random.Random(seed), []
    for _ in range(KILLS):
        process = continued(tiny_folder, data, folder)
        until_training(process)
        time.sleep(rng.uniform(0.2, 1.0))
        process.send_signal(signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL, (seed, errors)
        reached.append(max((int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*")), default=0))
    assert 0 < reached[-1] < 40, (seed, reached)
    assert not (folder / "results.json").exists()
    process = continued(tiny_folder, data, folder)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, (seed, errors)
    same_outcome(folder, tmp_path / "straight")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ctrl_c_leaves_a_run_to_continue(tiny_folder: Path, tmp_path: Path) -> None:
    data, folder = tmp_path / "chain.txt", tmp_path / "stopped"
    data.write_text(text(3000))
    finetune(str(tiny_folder), data, tmp_path / "straight", **CHANGES)
    process = continued(tiny_folder, data, folder)
    until_training(process)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "A checkpoint was saved after step" in errors
    assert "the same command with --resume continues the run in" in errors
    assert "Traceback" not in errors
    process = continued(tiny_folder, data, folder)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "Resuming the run in" in errors
    same_outcome(folder, tmp_path / "straight")
