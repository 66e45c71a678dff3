"""The quickstart as a user runs it, on the real model, scaled down: 4 steps, 2 scoring batches, 8 held-out pairs."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import sparseopt as so
from sparseopt import models

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
SCALED = (
    "data.n_train=16", "data.n_eval=8", "mask.batches=2", "training.n_steps=4", "training.warmup_steps=1",
    "evaluation.n_generate=8", "evaluation.batch_size=8", "training.device=cpu", "output.save_model=true",
)  # fmt: skip
TOTAL, EMBEDDING = 134_515_008, 49_152 * 576


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_quickstart_trains_a_sparse_part_of_the_real_model(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = subprocess.run(
        [sys.executable, "-m", "sparseopt", "train", "dpo", "--config", str(CONFIG), "--output_dir", str(folder),
         "--json", "--set", *SCALED],
        capture_output=True, text=True, timeout=850, check=False,
        env={"OMP_NUM_THREADS": str(min(2, os.cpu_count() or 1)), **os.environ},
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout) == {"output_dir": str(folder)}
    for part in ("score: 2/2 batches", "train: 4/4 steps", "evaluate after: 8/8 pairs", "generate after: 8/8 answers"):
        assert part in process.stderr, part

    # The mask: 2.5% of all but the embedding, by real gradients.
    masks = so.MaskSet.load(folder / "mask.safetensors")
    assert masks.total_parameters == TOTAL
    assert masks.active_parameters == round(0.025 * (TOTAL - EMBEDDING))
    assert masks.count("model.embed_tokens.weight") == 0
    assert masks.metadata["method"] == "gradient"
    assert masks.metadata["zero_score_share"] == 0
    assert masks.metadata["kept_score"] > 0.1, "the best 2.5% hold far more than 2.5% of the squared gradients"

    # The weights: nearly every active entry moved, and nothing else did.
    delta = so.Delta.load(folder / "trained_entries.safetensors")
    assert delta.changed_parameters == masks.active_parameters
    changed, files = 0, list((folder / "model").glob("*.safetensors"))
    assert len(files) == 1
    with safe_open(files[0], framework="pt") as trained:
        for name, param in models.load_model("smollm2").named_parameters():
            before, after = param.detach().view(-1), trained.get_tensor(name).view(-1)
            moved = (before.view(torch.int32) != after.view(torch.int32)).nonzero().view(-1)
            assert torch.isin(moved, masks.indices(name).long()).all(), name
            if name in delta:
                assert torch.equal(after[delta.indices(name).long()], delta.values(name)), name
            changed += moved.numel()
    assert changed > 0.9 * masks.active_parameters

    # The numbers.
    results = json.loads((folder / "results.json").read_text())
    assert results["frozen_entries_bit_identical"]
    assert results["steps"] == 4
    assert results["skipped_steps"] == 0
    assert results["before"]["reward_accuracy"] == 0.5
    assert results["after"]["n"] == results["after"]["greedy"]["n"] == 8
    assert results["after"]["margin"] > 0, "four steps already part right from wrong a little"
    # Moments of the active entries alone: under 1/20 of what AdamW keeps for all.
    assert 8 * masks.active_parameters <= results["optimizer_state_bytes"] < 8 * TOTAL / 20
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [1, 2, 3, 4]
    assert all(math.isfinite(entry["loss"]) and entry["grad_norm"] > 0 for entry in entries)
    # The first step has the reference's weights: DPO's loss is ln 2 there, and half an SFT loss comes on top.
    assert entries[0]["loss"] > math.log(2)
    assert entries[0]["rewards/margins"] == pytest.approx(0, abs=1e-4)
    page = (folder / "report.md").read_text()
    assert f"{masks.active_parameters:,}" in page
    assert f"{results['after']['margin']:.3f}" in page
    assert (folder / "training.png").read_bytes().startswith(b"\x89PNG")
