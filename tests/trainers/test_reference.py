"""A reference by swapping active entries back: equal to a second copy to the last bit, for DPO and GRPO."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

import sparseopt as so
from sparseopt import data, models
from sparseopt.trainers import dpo
from sparseopt.trainers.attachment import sparse_optimizer
from sparseopt.trainers.reference import ReferenceBySwap, reference_bytes, share_reference


class Losses(TrainerCallback):
    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            timeless = {k: v for k, v in logs.items() if "time" not in k and "speed" not in k}
            self.seen.append(timeless)


def common(folder: Path, **options: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder), "max_steps": 4, "learning_rate": 1e-2, "logging_steps": 1, "report_to": [],
        "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "seed": 0, "bf16": False, **options,
    }  # fmt: skip


def dpo_trainer(folder: Path, tiny_folder: Path, pairs_file: Path, dtype: str, **options: Any) -> DPOTrainer:
    rows = [json.loads(line) for line in pairs_file.read_text().splitlines()]
    torch.manual_seed(0)
    return DPOTrainer(
        model=models.load_model(str(tiny_folder), dtype),
        ref_model=models.load_model(str(tiny_folder), dtype),
        args=DPOConfig(**common(folder, per_device_train_batch_size=2, max_length=32, **options)),
        train_dataset=Dataset.from_list(rows),
        processing_class=models.load_tokenizer(str(tiny_folder)),
    )


def reward(completions: list[str], **columns: Any) -> list[float]:
    return [float(text.count("w1")) - 0.1 * len(text.split()) for text in completions]


def grpo_trainer(folder: Path, tiny_folder: Path, dtype: str, **options: Any) -> GRPOTrainer:
    rows = [{"prompt": f"w{i} w{i + 1}"} for i in range(8)]
    torch.manual_seed(0)
    return GRPOTrainer(
        model=models.load_model(str(tiny_folder), dtype),
        reward_funcs=reward,
        args=GRPOConfig(
            **common(
                folder, per_device_train_batch_size=4, num_generations=4, max_completion_length=6, beta=0.2, **options
            )
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=models.load_tokenizer(str(tiny_folder)),
    )


def trained(trainer: Any, shared: bool) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    losses = Losses()
    trainer.add_callback(losses)
    masks = so.MaskSet.random(trainer.model, 0.1, seed=1)
    so.attach(trainer, masks)
    if shared:
        share_reference(trainer)
    trainer.train()
    return losses.seen, {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def assert_same(ours: Any, theirs: Any) -> None:
    assert ours[0] == theirs[0]
    assert len(ours[0]) == 4
    for name, value in theirs[1].items():
        assert torch.equal(ours[1][name], value), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}, {"gradient_checkpointing": True}])
def test_dpo_equals_a_second_copy(
    tmp_path: Path, tiny_folder: Path, pairs_file: Path, dtype: str, options: dict[str, Any]
) -> None:
    runs = [
        trained(dpo_trainer(tmp_path / str(shared), tiny_folder, pairs_file, dtype, **options), shared)
        for shared in (True, False)
    ]
    assert_same(*runs)
    assert abs(runs[0][0][-1]["rewards/margins"]) > 0, "policy and reference have parted"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("options", [{}, {"num_iterations": 2}])
def test_grpo_equals_a_second_copy(tmp_path: Path, tiny_folder: Path, dtype: str, options: dict[str, Any]) -> None:
    runs = [
        trained(grpo_trainer(tmp_path / str(shared), tiny_folder, dtype, **options), shared) for shared in (True, False)
    ]
    assert_same(*runs)
    assert runs[0][0][-1]["kl"] > 0, "policy and reference have parted"


def test_second_copy_is_freed(tmp_path: Path, tiny_folder: Path, pairs_file: Path) -> None:
    trainer = dpo_trainer(tmp_path, tiny_folder, pairs_file, "float32")
    copy = weakref.ref(trainer.ref_model.model.layers[0].mlp.up_proj.weight)
    masks = so.MaskSet.random(trainer.model, 0.1, seed=1)
    so.attach(trainer, masks)
    share_reference(trainer)
    gc.collect()
    assert copy() is None
    trainer.train()
    known = reference_bytes(trainer)
    assert known["base_values_bytes"] == 4 * masks.active_parameters
    assert known["second_model_bytes"] == 4 * masks.total_parameters


def test_a_reference_that_is_another_model_is_refused(tmp_path: Path, tiny_folder: Path, pairs_file: Path) -> None:
    trainer = dpo_trainer(tmp_path, tiny_folder, pairs_file, "float32")
    with torch.no_grad():
        trainer.ref_model.model.norm.weight += 1
    so.attach(trainer, so.MaskSet.random(trainer.model, 0.1, seed=1))
    with pytest.raises(ValueError, match=r"differs from the policy in 'model\.norm\.weight'"):
        share_reference(trainer)


def test_other_trainers_are_refused(tmp_path: Path, tiny_folder: Path) -> None:
    from transformers import Trainer, TrainingArguments

    trainer = Trainer(models.load_model(str(tiny_folder)), TrainingArguments(str(tmp_path), use_cpu=True))
    with pytest.raises(ValueError, match=r"DPOTrainer and GRPOTrainer, got Trainer"):
        share_reference(trainer)


def test_weights_are_back_after_an_error(tmp_path: Path, tiny_folder: Path) -> None:
    trainer = grpo_trainer(tmp_path, tiny_folder, "float32")
    so.attach(trainer, so.MaskSet.random(trainer.model, 0.1, seed=1))
    share_reference(trainer)
    share_reference(trainer)  # again: nothing more
    trainer.train()
    assert isinstance(trainer.ref_model, ReferenceBySwap)
    model: Any = trainer.model
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.train()
    with pytest.raises(ValueError, match="input_ids"):
        trainer.ref_model(no_such_argument=1)
    assert model.training
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]), name
    with sparse_optimizer(trainer).base_weights():
        base = models.load_model(str(tiny_folder))
        for name, p in base.named_parameters():
            assert torch.equal(p, dict(model.named_parameters())[name]), name


def test_command_swaps_under_a_mask_and_measures_the_same_as_beforehand(tmp_path: Path, configure: Any) -> None:
    swap = dpo.run(configure(tmp_path / "swap", {"training.n_steps": 3}))
    once = dpo.run(configure(tmp_path / "once", {"training.n_steps": 3, "training.reference": "precompute"}))
    results = [json.loads((folder / "results.json").read_text()) for folder in (swap, once)]
    assert results[0]["base_values_bytes"] == 4 * results[0]["active_parameters"]
    assert "base_values_bytes" not in results[1]
    assert "MiB saved" in (swap / "report.md").read_text()
    first, second = ([json.loads(line) for line in (f / "metrics.jsonl").open()] for f in (swap, once))
    for a, b in zip(first, second, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)
    with pytest.raises(ValueError, match="swap needs a mask"):
        dpo.run(configure(tmp_path / "full", {"mask.method": None, "training.reference": "swap"}))


def test_reference_is_trls_own(tmp_path: Path, configure: Callable[..., Any]) -> None:
    """Measured with shared prompt beginnings or by TRL: the same log-probabilities, row by row."""
    run = dpo.DpoRun(configure(tmp_path / "run", {"training.reference": "precompute"}))
    name = run.config["model"]["name"]
    run.device, run.model, run.tokenizer = torch.device("cpu"), models.load_model(name), models.load_tokenizer(name)
    run.load_data()
    pairs, arguments = run.pairs, run.arguments()
    ours = run.make_trainer(arguments, processing_class=run.tokenizer).train_dataset
    theirs = DPOTrainer(
        model=models.load_model(name), args=arguments, train_dataset=data.to_dataset(pairs),
        processing_class=run.tokenizer,
    ).train_dataset  # fmt: skip
    assert len(ours) == len(theirs) == len(pairs)
    for column in ("ref_chosen_logps", "ref_rejected_logps"):
        torch.testing.assert_close(torch.tensor(ours[column]), torch.tensor(theirs[column]), rtol=1e-4, atol=1e-4)
