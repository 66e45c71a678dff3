"""gradient_scores: the sum of squared gradients, and nothing else changed by it."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, set_seed

import sparseopt as so
from sparseopt import models
from sparseopt.trainers.dpo import DpoRun
from sparseopt.trainers.scoring import gradient_scores, scored_parameters

Configure = Callable[..., dict[str, dict[str, Any]]]


def dpo_trainer(config: dict[str, dict[str, Any]], folder: Path) -> Any:
    set_seed(0)
    config["output"]["dir"] = str(folder)
    return DpoRun(config).untrained(torch.device("cpu"))


def plain_trainer(model: Any, folder: Path, size: int = 8, **options: Any) -> Trainer:
    ids = torch.randint(3, 64, (size, 6), generator=torch.Generator().manual_seed(2)).tolist()
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=2, report_to=[], use_cpu=True, disable_tqdm=True, **options
    )
    return Trainer(model=model, args=arguments, train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}))


def snapshot(model: torch.nn.Module) -> dict[str, Any]:
    return {
        "weights": {n: p.detach().clone() for n, p in model.named_parameters()},
        "required": [p.requires_grad for p in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "hooks": [len(p._post_accumulate_grad_hooks or ()) for p in model.parameters()],
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1].tolist(),  # noqa: NPY002
        "python": random.getstate(),
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("batches", [3, 9], ids=["part", "more than an epoch"])
def test_equals_a_plain_loop(dtype: str, batches: int, tmp_path: Path, configure: Configure) -> None:
    trainer = dpo_trainer(configure(tmp_path, {"model.dtype": dtype}), tmp_path)
    model = trainer.model
    used: list[Any] = []
    compute = trainer.compute_loss

    def record(model: Any, inputs: Any, **kwargs: Any) -> Any:
        used.append((inputs, torch.get_rng_state()))
        return compute(model, inputs, **kwargs)

    trainer.compute_loss = record
    scores = gradient_scores(trainer, batches)
    trainer.compute_loss = compute
    assert len(used) == batches
    seen = [tuple(inputs["input_ids"].flatten().tolist()) for inputs, _ in used]
    assert len(set(seen)) >= min(batches, 7), "different batches, every one of an epoch"

    expected = {name: torch.zeros(p.shape) for name, p in model.named_parameters()}
    model.train()
    for inputs, state in used:
        torch.set_rng_state(state)  # dropout
        model.zero_grad()
        compute(model, inputs).backward()
        for name, param in model.named_parameters():
            expected[name] += param.grad.float() ** 2
    assert scores.keys() == expected.keys()
    for name, value in expected.items():
        assert scores[name].dtype == torch.float32
        assert value.sum() > 0, name
        torch.testing.assert_close(scores[name], value, rtol=1e-5, atol=0)


def test_uses_checkpointing_where_training_will(tiny_folder: Path, tmp_path: Path) -> None:
    """Scoring must fit where training fits: activations are recomputed, and only while it scores."""
    scores, forwards = [], []
    for checkpointing in (False, True):
        model = AutoModelForCausalLM.from_pretrained(tiny_folder)
        trainer = plain_trainer(model, tmp_path, gradient_checkpointing=checkpointing)
        calls: list[Any] = []
        model.model.layers[0].mlp.register_forward_pre_hook(lambda layer, args, calls=calls: calls.append(layer))
        scores.append(gradient_scores(trainer, 2, exclude=["embed_tokens"]))
        forwards.append(len(calls))
        assert not model.is_gradient_checkpointing
    assert forwards == [2, 4], "once more per batch, in backward"
    for name, score in scores[0].items():
        torch.testing.assert_close(scores[1][name], score)


def test_patterns_and_frozen_parameters(tiny_folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    trainer = plain_trainer(model, tmp_path)
    everything = gradient_scores(trainer, 2)
    assert "model.layers.0.mlp.up_proj.weight" not in everything
    part = gradient_scores(trainer, 2, include=["mlp"], exclude=["down_proj"])
    assert sorted(part) == [n for n in sorted(everything) if "mlp" in n and "down_proj" not in n]
    assert len(part) == 3
    for name, score in part.items():
        torch.testing.assert_close(score, everything[name])
    for patterns in ({"include": ["nope"]}, {"exclude": ["*"]}):
        with pytest.raises(ValueError, match="leave no parameter"):
            scored_parameters(model, **patterns)
    with pytest.raises(ValueError, match="at least 1 batch, got 0"):
        gradient_scores(trainer, 0)
    with pytest.raises(ValueError, match="no batch"):
        gradient_scores(plain_trainer(model, tmp_path, size=1, dataloader_drop_last=True), 1)
    assert not model.model.layers[0].mlp.up_proj.weight.requires_grad


def test_leaves_everything_as_it_was(tmp_path: Path, configure: Configure) -> None:
    trainer = dpo_trainer(configure(tmp_path), tmp_path)
    model = trainer.model
    model.lm_head.requires_grad_(True)
    model.model.norm.weight.requires_grad_(False)
    model.eval()
    loaders = trainer.accelerator.gradient_state  # one for all trainers of a process
    active = loaders.active_dataloader
    before = snapshot(model)
    gradient_scores(trainer, 3)
    after = snapshot(model)
    for name, value in before.pop("weights").items():
        assert torch.equal(value, after["weights"][name]), name
    after.pop("weights")
    assert torch.equal(before.pop("torch"), after.pop("torch"))
    assert before == after
    assert all(p.grad is None for p in model.parameters())
    assert not any(trainer._metrics["train"].values())
    assert trainer._total_train_tokens == 0
    assert trainer.state.log_history == []
    assert loaders.active_dataloader is active, "a loader left half-way"


def test_is_undone_when_a_loss_fails(tiny_folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    model.model.norm.weight.requires_grad_(False)
    trainer = plain_trainer(model, tmp_path)
    before = snapshot(model)

    def fail(*args: Any, **kwargs: Any) -> Any:
        torch.rand(3), np.random.rand(3), random.random()  # noqa: NPY002 (what libraries draw from)
        raise RuntimeError("out of memory")

    trainer.compute_loss = fail  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="out of memory"):
        gradient_scores(trainer, 1, include=["mlp"])
    after = snapshot(model)
    for key in ("required", "modes", "hooks", "python", "numpy"):
        assert before[key] == after[key], key
    assert torch.equal(before["torch"], after["torch"])


def test_training_is_the_same_with_and_without_scoring(tmp_path: Path, configure: Configure) -> None:
    """Same mask; the model has dropout, so that a shifted random state would show."""
    config = configure(tmp_path, {"training.n_steps": 4})
    trained, losses = [], []
    for scoring in (0, 2, 9):
        trainer = dpo_trainer(config, tmp_path / str(scoring))
        if scoring:
            gradient_scores(trainer, scoring)
        so.attach(trainer, so.MaskSet.random(trainer.model, 0.1, seed=3))
        trainer.train()
        trained.append({n: p.detach().clone() for n, p in trainer.model.named_parameters()})
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == 4
    assert losses[0] == losses[1] == losses[2]
    start = dict(models.load_model(config["model"]["name"]).named_parameters())
    assert any(not torch.equal(value, start[name]) for name, value in trained[0].items())
    for name, value in trained[0].items():
        assert torch.equal(value, trained[1][name]), name
        assert torch.equal(value, trained[2][name]), name


def test_dense_gradients_never_coexist(tiny_folder: Path, tmp_path: Path) -> None:
    """When a gradient is complete, no other parameter has one."""
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    trainer = plain_trainer(model, tmp_path)
    held: list[int] = []
    for param in model.parameters():
        # Registered before scoring's own hooks: at this moment the gradient is there and not folded yet.
        param.register_post_accumulate_grad_hook(
            lambda p: held.append(sum(q.grad is not None for q in model.parameters()))
        )
    gradient_scores(trainer, 2)
    assert held == [1] * (2 * sum(1 for _ in model.parameters()))
