"""Collect -> pack -> push -> list -> pull -> train sparse, on the real model, as configs/collect.toml documents it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import sparseopt as so
from sparseopt import config, schemas
from sparseopt import hub as so_hub

CONFIG = Path(__file__).parents[2] / "configs" / "collect.toml"
REPO = "user/smollm2-gradient-masks"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_masks_collected_in_one_run_train_another(hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    from sparseopt.trainers import dpo

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)  # TRL's, which the server does not know

    short = [
        "data.n_train=8", "data.n_eval=4", "training.n_steps=2", "training.device=cpu", "evaluation.n_generate=0",
        "grad_acc.save_interval=1", "grad_acc.mask_save_interval=1", "grad_acc.hf_upload_interval=2",
        f"grad_acc.hf_repo_id={REPO}",
    ]  # fmt: skip
    collected = dpo.run(config.load(schemas.DPO, CONFIG, short, {"output.dir": str(tmp_path / "collect")}))
    assert so_hub.list_available_mask_steps(REPO) == [2]
    assert hub.repos[REPO].private
    info = so_hub.load_mask_metadata_from_hf(REPO, 2)
    assert (info["base_model"], info["tolerance"], info["beta"], info["step"]) == ("smollm2", 1e-6, 0.9, 2)
    pulled = so_hub.load_masks_from_hf(REPO, 2)
    local = so.MaskSet.load(collected / "grad_acc" / "grad_mask_step_2.safetensors")
    assert pulled == local
    assert 0 < pulled.active_parameters == info["active_parameters"] < 0.5 * pulled.total_parameters
    packed = (collected / "grad_acc" / "grad_mask_step_2.safetensors").stat().st_size
    assert packed < pulled.total_parameters / 8, "less than a bit an entry"

    under = ["grad_acc.enabled=false", "mask_loading.enabled=true", f"mask_loading.hf_repo_id={REPO}"]
    sparse = dpo.run(config.load(schemas.DPO, CONFIG, [*short, *under], {"output.dir": str(tmp_path / "sparse")}))
    results = json.loads((sparse / "results.json").read_text())
    assert results["way"] == "sparse"
    assert results["active_parameters"] == pulled.active_parameters
    assert results["frozen_entries_bit_identical"]
    assert so.MaskSet.load(sparse / "mask.safetensors") == pulled
    trained = so.Delta.load(sparse / "trained_entries.safetensors")
    assert trained.changed_parameters == pulled.active_parameters
