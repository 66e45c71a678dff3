"""``sparseopt train lm`` on the command line, and as what a sweep starts."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from lm_training import gradients, settings_of
from safetensors.torch import load_file
from typer.testing import CliRunner

import sparseopt as so
from sparseopt import _yaml
from sparseopt.cli._main import app

SWEEP = "sweep_name: small\nparameters:\n  training.learning_rate: {values: [6e-4, 1e-3]}\n"


def write_config(folder: Path, **changes: object) -> Path:
    nested: dict[str, dict[str, object]] = {}
    for text in settings_of(folder, **changes):
        key, _, value = text.partition("=")
        section, _, name = key.partition(".")
        nested.setdefault(section, {})[name] = _yaml.parse(value)
    path = folder / "train.yaml"
    path.write_text(_yaml.dump(nested))
    return path


def test_usage(tmp_path: Path) -> None:
    def call(*args: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["train", "lm", *args, "--base_dir", str(tmp_path / "saved_models")])
        return result.exit_code, " ".join(result.stderr.replace("│", " ").split())

    path = str(write_config(tmp_path))
    assert call()[0] == 2
    assert call("--config", path, "--resume", "x")[0] == 2
    code, text = call("--config", path, "--set", "training.seed=x")
    assert (code, "training.seed must be of type int, got 'x'" in text) == (2, True)
    assert call("--config", "none.yaml") == (1, "Error: There is no configuration file 'none.yaml'.")
    assert call("--resume", "x")[0] == 1
    assert not (tmp_path / "saved_models").exists()


def test_a_run_by_the_command(tmp_path: Path) -> None:
    """What the seed documents: the folder, the tracked settings, the resumable checkpoint; new keys are columns."""
    base = tmp_path / "saved_models"
    command = ["train", "lm", "--config", str(write_config(tmp_path)), "--base-dir", str(base), "--json"]
    result = CliRunner().invoke(app, [*command, "--set", "training.max_steps=3", "augmentation.noise=0.5"])
    assert result.exit_code == 0, result.stderr
    folder = Path(json.loads(result.stdout)["output_dir"])
    config = _yaml.parse((folder / "config.yaml").read_text())
    assert (config["training"]["max_steps"], config["augmentation"]["noise"], config["run"]["name"]) == (3, 0.5, "test")
    (row,) = so.RunManager(base).rows()
    assert (row["augmentation.noise"], row["training.max_steps"], row["status"]) == (0.5, 3, "finished")
    assert len(gradients(folder / "checkpoint_3")) == 28


@pytest.mark.slow
def test_a_sweep_trains_and_a_killed_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    """Without --command; the run that was killed ends with the weights of one that was not."""
    config = write_config(tmp_path, data__dataset_size="40K")
    (tmp_path / "text.txt").write_text((tmp_path / "text.txt").read_text() * 5)
    (tmp_path / "sweep.yaml").write_text(SWEEP)
    command = [sys.executable, "-P", "-m", "sparseopt", "sweep", "run", str(config), str(tmp_path / "sweep.yaml")]
    ends = []
    for base in (tmp_path / "straight", tmp_path / "killed"):
        process = subprocess.Popen([*command, "--base_dir", str(base)], stdout=subprocess.PIPE, text=True)
        if base.name == "killed":
            deadline = time.monotonic() + 120
            while not list(base.glob("*/checkpoint_6")):
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.01)
            (first,) = (path.parent for path in base.glob("*/checkpoint_6"))
            os.kill(json.loads((first / "run.json").read_text())["pid"], signal.SIGKILL)
            assert process.wait() == 1
            again = subprocess.run([*command, "--base_dir", str(base)], capture_output=True, text=True, check=True)
            assert "2 runs: 2 finished." in again.stdout
            log = (first / "log.txt").read_text()
            assert "Going on from" in log
        else:
            assert process.wait() == 0
        process.communicate()
        rows = sorted(so.RunManager(base).rows(), key=lambda row: row["training.learning_rate"])
        assert [row["status"] for row in rows] == ["finished"] * 2
        assert {row["sweep_name"] for row in rows} == {"small"}
        ends.append([load_file(base / row["run_id"] / "final_checkpoint/model.safetensors") for row in rows])
    for one, other in zip(*ends, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(ends[0][0]["transformer.wte.weight"], ends[0][1]["transformer.wte.weight"])


@pytest.mark.slow
@pytest.mark.parametrize("deepspeed", [False, True])
def test_two_processes_train_as_one(tmp_path: Path, deepspeed: bool) -> None:
    """DDP, or DeepSpeed's ZeRO-2 where it is installed: the same batches, weights and gradients."""
    if deepspeed and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed (the extra `deepspeed`)")
    dropout = "resid_pdrop: 0.0, embd_pdrop: 0.0, attn_pdrop: 0.0"
    config = write_config(
        tmp_path, training__max_steps=4, model__config=f"{{n_layer: 2, n_head: 2, n_embd: 16, {dropout}}}"
    )
    zero2 = "{zero_optimization: {stage: 2}, zero_allow_untested_optimizer: true, train_batch_size: auto, " \
        "train_micro_batch_size_per_gpu: auto, gradient_accumulation_steps: auto, gradient_clipping: auto}"  # fmt: skip
    results = []
    for processes in (1, 2):
        launcher = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        command = [sys.executable, "-P", *launcher, "-m", "sparseopt", "train", "lm", "--config", str(config)]
        sets = [f"training.gradient_accumulation_steps={2 // processes}"]
        if deepspeed and processes == 2:
            sets.append(f"deepspeed={zero2}")
        base = tmp_path / f"by_{processes}"
        subprocess.run([*command, "--base_dir", str(base), "--set", *sets], check=True, stdout=subprocess.DEVNULL)
        (row,) = so.RunManager(base).rows()
        assert row["status"] == "finished"
        final = base / row["run_id"] / "final_checkpoint"
        results.append((row["final_valid_loss"], load_file(final / "model.safetensors"), gradients(final)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    for one, other in zip(results[0][1:], results[1][1:], strict=True):
        assert one.keys() == other.keys()
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=1e-6)
