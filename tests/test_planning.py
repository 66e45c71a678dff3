"""The plan: activations against what autograd keeps, state against what the optimizer keeps, peaks against a GPU's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from planned_models import config, kept_by_autograd, one_thread

from sparseopt import planning
from sparseopt.planning import Job
from sparseopt.shapes import shape_config

pytest.importorskip("transformers")

# Measured on an H100 (torch.cuda.max_memory_allocated, GiB): Llama-3.2-3B shapes, 1 x 512 tokens, eager, clipping.
# The sparse prototype had 2.5% of everything, embedding included, fp32 master weights and 4-byte indices. The plan says
# 25.48, 9.66, 7.11, 10.20 and 9.97.
PEAKS = [
    ("dense AdamW", False, 25.5),
    ("LoRA r=16", False, 9.74),
    ("LoRA r=16", True, 7.14),
    ("sparse 2.5%", False, 10.19),
    ("sparse 2.5%", True, 9.75),
]


single = pytest.fixture(autouse=True)(one_thread)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("arm", "adapter_bytes"), [("dense", 2), ("sparse", 2), ("lora", 2), ("lora", 4)])
@pytest.mark.parametrize("kind", ["llama", "llama-wide", "qwen2", "qwen3", "gpt2"])
def test_activations_are_what_autograd_keeps(kind: str, arm: str, adapter_bytes: int, checkpointing: bool) -> None:
    settings = config(kind)
    arch = planning.architecture(settings)
    for batch, seq in ((1, 64), (3, 96)):
        job = Job(batch, seq, gradient_checkpointing=checkpointing)
        found = planning.activations(
            arch, job, rank=16 if arm == "lora" else None, adapter_bytes=adapter_bytes, train_head=arm == "dense"
        )
        measured = kept_by_autograd(settings, job, arm, adapter_bytes)
        # What is left out or counted too much is a layer's norm at most, and here there are only two layers.
        assert found["layers"] + found["end"] + found["loss"] == pytest.approx(measured, rel=0.06), (batch, seq)


@pytest.mark.parametrize(("arm", "checkpointing", "gib"), PEAKS)
def test_peaks_that_were_measured_on_a_gpu(arm: str, checkpointing: bool, gib: float) -> None:
    found = planning.plan(
        shape_config("llama-3.2-3b"), Job(1, 512, gradient_checkpointing=checkpointing), train_embeddings=True,
        master="fp32", adapter_bytes=4,
    )  # fmt: skip
    peak = {row["name"]: row["peak"] / 2**30 for row in found["arms"]}[arm]
    assert peak == pytest.approx(gib, rel=0.03)


@pytest.mark.parametrize(("arm", "checkpointing", "milliseconds"), [
    ("dense AdamW", False, 81.5), ("dense AdamW", True, 137), ("LoRA r=16", False, 116), ("LoRA r=16", True, 201),
])  # fmt: skip
def test_step_times_are_estimates_of_what_was_measured(arm: str, checkpointing: bool, milliseconds: float) -> None:
    found = planning.plan(
        shape_config("llama-3.2-3b"), Job(1, 512, gradient_checkpointing=checkpointing), adapter_bytes=4
    )
    assert {row["name"]: row["step_ms"] for row in found["arms"]}[arm] == pytest.approx(milliseconds, rel=0.25)


@pytest.mark.parametrize("sparsity", [0.9, 0.975, 0.9975])
@pytest.mark.parametrize("master", ["residual", "fp32"])
def test_sparse_state_is_what_the_optimizer_keeps(sparsity: float, master: Any) -> None:
    import sparseopt as so

    param = torch.nn.Parameter(torch.zeros(2048, 2048, dtype=torch.bfloat16))
    mask = torch.rand(param.shape, generator=torch.Generator().manual_seed(0)) < 1 - sparsity
    optimizer = so.SparseAdamW([("w", param)], masks={"w": mask}, master_weights=master)
    arch = planning.Architecture(
        "gated", param.numel(), 0, ((2048, 2048),), param.numel(), 1, 2048, 16, 16, 128, 1, 1, True, 1
    )
    found = planning.plan(arch, Job(1, 1), sparsity=sparsity, master=master)["arms"][2]
    assert found["trained"] == pytest.approx(int(mask.sum()), rel=0.02)
    assert found["state"] == pytest.approx(optimizer.state_bytes(), rel=0.1)


def test_dense_and_lora_rows_are_counts() -> None:
    dense, lora, sparse, *structured = planning.plan(shape_config("tiny"), Job(1, 8), rank=4)["arms"]
    linears = 2 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))
    parameters = 256 * 64 + 64 + 2 * (2 * 64 + 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    assert (dense["trained"], dense["weights"], dense["gradients"], dense["state"]) == (
        parameters, 2 * parameters, 2 * parameters, 4 * parameters,
    )  # fmt: skip
    assert (lora["trained"], lora["state"]) == (4 * linears, 16 * linears)
    assert sparse["trained"] == round(0.025 * (parameters - 256 * 64))
    # 2.5% of 32, 64 and 128 rows or columns: 1, 2 and 3 of each layer.
    columns = 2 * (2 * (2 * 64) + 2 * (2 * 32) + 2 * (2 * 128) + 3 * 64)
    rows = 2 * (2 * (2 * 64) + 2 * (1 * 64) + 2 * (3 * 64) + 2 * 128)
    assert [arm["trained"] for arm in structured] == [columns, rows]


def test_architecture_is_read_from_the_configuration() -> None:
    arch = planning.architecture(shape_config("gpt2"))
    assert (arch.family, arch.parameters, arch.embeddings) == ("gpt2", 124_439_808, 50257 * 768 + 1024 * 768)
    assert (arch.layers, arch.intermediate, len(arch.linears), arch.gelu, arch.tied) == (12, 3072, 48, True, True)
    assert arch.linears[0] == (768, 2304)
    big = planning.architecture(shape_config("llama-3.1-8b"))
    assert (big.parameters, big.tied, big.largest) == (8_030_261_248, False, 4096 * 14336)


def test_jobs_grow_and_shrink_the_plan() -> None:
    arch = planning.architecture(shape_config("llama-3.2-1b"))

    def peaks(job: Job, **options: Any) -> list[int]:
        return [arm["peak"] for arm in planning.plan(arch, job, **options)["arms"]]

    small = peaks(Job(1, 1024))
    assert all(a < b for a, b in zip(small, peaks(Job(4, 1024)), strict=True))
    assert peaks(Job(1, 1024, "dpo"))[1] > small[1] > peaks(Job(1, 1024, "grpo"))[1]
    assert peaks(Job(4, 1024, gradient_checkpointing=True))[2] < peaks(Job(4, 1024))[2]
    assert peaks(Job(1, 1024), sparsity=0.5)[2] > small[2]
    assert peaks(Job(1, 1024), adapter_bytes=4)[1] > small[1]


def test_conclusion_names_the_smallest_card_that_tells_the_arms_apart() -> None:
    found = planning.plan(shape_config("llama-3.2-3b"), Job(1, 512))
    assert found["conclusion"] == (
        "Fits in 12 GiB: LoRA r=16, sparse 2.5%, columns 2.5%, rows 2.5%; not dense AdamW (32 GiB)."
    )
    assert planning.plan(shape_config("tiny"), Job(1, 8))["conclusion"].startswith("Fits in 8 GiB: dense AdamW, LoRA")
    assert "more than 141 GiB" in planning.plan(shape_config("llama-3.1-8b"), Job(13, 1024))["conclusion"]
    assert planning.plan(shape_config("llama-3.1-8b"), Job(8, 4096))["conclusion"] == "Nothing here fits in 141 GiB."


def test_wrong_arguments_are_named() -> None:
    import transformers

    tiny = shape_config("tiny")
    with pytest.raises(ValueError, match="unknown device 'tpu': expected one of h100"):
        planning.plan(tiny, Job(1, 8), device="tpu")
    with pytest.raises(ValueError, match=r"sparsity must be in \[0, 1\).* got 1.5"):
        planning.plan(tiny, Job(1, 8), sparsity=1.5)
    with pytest.raises(ValueError, match="got 0, 'residual', 2"):
        planning.plan(tiny, Job(1, 8), rank=0)
    with pytest.raises(ValueError, match="seq must be at least 1, got 0"):
        Job(1, 0)
    with pytest.raises(ValueError, match="unknown workload 'ppo'"):
        Job(1, 1, "ppo")
    with pytest.raises(ValueError, match="no plan for models of type 'mixtral'"):
        planning.architecture(transformers.MixtralConfig())


def stored_steps() -> list[tuple[str, dict, str, dict]]:
    """(suite, settings, arm, what was measured) of every training step in benchmarks/results that a plan speaks of."""
    folder = Path(__file__).parent.parent / "benchmarks" / "results"
    found = []
    for path in sorted(folder.glob("*.json")):
        for name, suite in json.loads(path.read_text()).get("suites", {}).items():
            step = suite.get("train_step", {"arms": {}})
            for arm, measured in step["arms"].items():
                if step["settings"]["mode"] == "eager" and step["settings"]["shape"] and "total" in measured:
                    found.append((name, step["settings"], arm, measured))
    return found


def test_planned_peaks_are_within_15_percent_of_every_stored_measurement() -> None:
    steps = stored_steps()
    assert len(steps) >= 9
    for name, settings, arm, measured in steps:
        name_of, _, unit = arm.partition("/")
        density = float(name_of.partition("@")[2].rstrip("%") or 2.5) / 100
        job = Job(settings["batch"], settings["seq"], settings["workload"], settings["gradient_checkpointing"])
        planned = planning.plan(
            shape_config(settings["shape"]), job, sparsity=1 - density, master=settings["master"],
            adapter_bytes=4 if arm == "lora" else 2,
        )  # fmt: skip
        kind = {"dense": "dense", "lora": "LoRA", "sparse": "sparse"}[name_of.partition("-")[0].partition("@")[0]]
        if unit in ("columns", "rows"):
            kind = unit
        row = next(r for r in planned["arms"] if r["name"].startswith(kind))
        assert row["peak"] == pytest.approx(measured["peak_allocated_bytes"], rel=0.15), (name, arm)
