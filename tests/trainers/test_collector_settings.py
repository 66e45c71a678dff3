"""Settings of MaskCollector, given in code and in files, and runs of the training commands that collect."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from collecting import METRICS, names

import sparseopt as so
from sparseopt import config, hub, schemas
from sparseopt.trainers import MaskCollector, dpo


def test_chained_defaults_errors_and_warnings(tmp_path: Path) -> None:
    one = MaskCollector(tmp_path)
    assert (one.save_interval, one.mask_save_interval, one.hf_upload_interval) == (1, 1, 1)
    assert (one.tolerances, one.save_masks, one.upload_to_hf, one.hf_private) == ([1e-5], True, False, True)
    two = MaskCollector(tmp_path, save_interval=7)
    assert (two.mask_save_interval, two.hf_upload_interval) == (7, 7)
    three = MaskCollector(tmp_path, save_interval=7, mask_save_interval=20)
    assert three.hf_upload_interval == 20
    with pytest.raises(ValueError, match="needs hf_repo_id"):
        MaskCollector(tmp_path, upload_to_hf=True)
    for interval in (500, 1000):
        with pytest.warns(UserWarning, match=r"hf_upload_interval \(\d+\) is not above mask_save_interval \(1000\)"):
            MaskCollector(
                tmp_path, mask_save_interval=1000, upload_to_hf=True, hf_repo_id="u/m", hf_upload_interval=interval
            )
    wrong: list[dict[str, Any]] = [
        {"save_interval": 0}, {"mask_save_interval": -1}, {"hf_upload_interval": 2.5}, {"beta": 1.0}, {"epsilon": -1},
        {"tolerance": -1e-5}, {"tolerance": []}, {"keep_accumulations": 0},
    ]  # fmt: skip
    for options in wrong:
        with pytest.raises(ValueError, match=next(iter(options))):
            MaskCollector(tmp_path, **options)
    assert not (tmp_path / "grad_acc").exists()


@pytest.mark.parametrize("method", ["dpo", "grpo", "sft"])
@pytest.mark.parametrize("suffix", ["toml", "yaml"])
def test_the_settings_of_the_commands(tmp_path: Path, method: str, suffix: str) -> None:
    values = {
        "enabled": True, "beta": 0.9, "epsilon": 1e-6, "save_interval": 1000, "tolerance": 1e-4, "save_masks": False,
        "mask_save_interval": 2000, "upload_to_hf": True, "hf_repo_id": "username/model-gradient-masks",
        "hf_upload_interval": 4000, "hf_private": False, "bias_correction": True, "offload": True,
    }  # fmt: skip
    separator = " = " if suffix == "toml" else ": "
    lines = [f"{key}{separator}{json.dumps(value)}" for key, value in values.items()]
    path = tmp_path / f"settings.{suffix}"
    path.write_text("[grad_acc]\n" + "\n".join(lines) if suffix == "toml" else "grad_acc:\n  " + "\n  ".join(lines))
    loaded = config.load(schemas.METHODS[method], path)["grad_acc"]
    assert loaded == {**values, "keep_accumulations": 3}
    path.write_text("[grad_acc]\ntolerance = [1e-5, 1e-6]" if suffix == "toml" else "grad_acc: {tolerance: [1e-5, 1]}")
    several = config.load(schemas.METHODS[method], path)["grad_acc"]["tolerance"]
    assert several == ([1e-5, 1e-6] if suffix == "toml" else [1e-5, 1.0])
    with pytest.raises(ValueError, match=r"grad_acc\.tolerance must be of type float, got 'x'"):
        config.load(schemas.METHODS[method], None, ["grad_acc.tolerance=[x]"])
    assert config.load(schemas.METHODS[method])["grad_acc"]["enabled"] is False


def test_wrong_settings_are_errors_before_anything_is_loaded(tmp_path: Path, configure: Callable[..., Any]) -> None:
    def run(**changes: Any) -> Any:
        return configure(
            tmp_path / "run", {"model.name": "/no/such/model", **{k.replace("__", "."): v for k, v in changes.items()}}
        )

    with pytest.raises(ValueError, match="grad_acc: upload_to_hf=True needs hf_repo_id"):
        dpo.run(run(grad_acc__enabled=True, grad_acc__upload_to_hf=True))
    with pytest.raises(ValueError, match="grad_acc: a LoRA run"):
        dpo.run(run(grad_acc__enabled=True, lora__enabled=True, mask__method=None))
    with pytest.raises(ValueError, match=r"mask_loading\.enabled needs mask_loading\.hf_repo_id"):
        dpo.run(run(mask_loading__enabled=True, mask__method=None))
    with pytest.raises(ValueError, match=r"leave out mask\.path and mask\.method"):
        dpo.run(run(mask_loading__enabled=True, mask_loading__hf_repo_id="u/m"))
    assert not (tmp_path / "run").exists()


# ---- the training commands ---------------------------------------------------------------------------------------------
def test_a_dense_run_collects_and_a_sparse_one_trains_under_what_it_found(
    tmp_path: Path, configure: Callable[..., Any]
) -> None:
    grad_acc = {"grad_acc.enabled": True, "grad_acc.save_interval": 2, "grad_acc.tolerance": 1e-6}
    dense = dpo.run(configure(tmp_path / "dense", {
        "mask.method": None, "delta_log.schedule": "1,2", "delta_log.dir": tmp_path / "log", "training.n_steps": 4,
        **grad_acc,
    }))  # fmt: skip
    assert names(dense) == {f"grad_{kind}_step_{step}.safetensors" for kind in ("ema", "mask") for step in (2, 4)}
    masks = so.MaskSet.load(dense / "grad_acc" / "grad_mask_step_4.safetensors")
    assert 0 < masks.active_parameters < masks.total_parameters
    entries = [json.loads(line) for line in (dense / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries if entry.keys() >= METRICS] == [2, 4]
    assert so.DeltaLog(tmp_path / "log").steps() == [1, 2]  # both callbacks come first

    repository = tmp_path / "repository"  # a folder with a repository's layout
    for step in (2, 4):
        found = so.MaskSet.load(dense / "grad_acc" / f"grad_mask_step_{step}.safetensors")
        hub.push_masks(repository, found, step)
    for step, expected in ((None, masks), (2, so.MaskSet.load(dense / "grad_acc" / "grad_mask_step_2.safetensors"))):
        sparse = dpo.run(configure(tmp_path / f"sparse-{step}", {
            "mask.method": None, "mask_loading.enabled": True, "mask_loading.hf_repo_id": repository,
            "mask_loading.step": step, "training.n_steps": 2, **grad_acc,
        }))  # fmt: skip
        assert so.MaskSet.load(sparse / "mask.safetensors") == expected
        assert names(sparse) == {"grad_ema_step_2.safetensors", "grad_mask_step_2.safetensors"}
