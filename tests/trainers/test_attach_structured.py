"""attach() under masks of whole rows or columns: layers compute in part while training runs, and only then."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny_experts import IMPLEMENTATIONS, expert_masks, make_moe
from tiny_llama import arguments, check_frozen, common, grpo_trainer, lm_data, text_rows, tiny_model, tiny_tokenizer
from transformers import Trainer
from transformers.trainer_callback import TrainerCallback

import sparseopt as so
from sparseopt.optim import structured


def group_masks(model: torch.nn.Module, kinds: tuple[str, ...] = ("row", "column")) -> so.MaskSet:
    """Three rows or columns of each projection of the second layer, by turns; all else is frozen."""
    generator = torch.Generator().manual_seed(3)
    bits = {}
    for number, (name, param) in enumerate(model.named_parameters()):
        bits[name] = torch.zeros(param.shape, dtype=torch.bool)
        if "layers.1" in name and "proj" in name:
            dim = 0 if kinds[number % len(kinds)] == "row" else 1
            bits[name].index_fill_(dim, torch.randperm(param.shape[dim], generator=generator)[:3], True)
    return so.MaskSet.from_bool(bits)


class Watch(TrainerCallback):
    """What the layers are and which dense gradients exist at each step."""

    def __init__(self) -> None:
        self.parts: list[int] = []
        self.dense: list[int] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.parts.append(sum(structured.is_structured(module) for module in model.modules()))
        self.dense.append(sum(param.grad is not None for param in model.parameters()))


def check_restored(model: torch.nn.Module) -> None:
    assert not any(structured.is_structured(module) for module in model.modules())
    assert all(param.requires_grad for param in model.parameters())


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "checkpoint", "reentrant"])
def test_trains_as_with_whole_gradients(tmp_path: Path, checkpointing: bool | None) -> None:
    options: dict[str, Any] = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5, "learning_rate": 1e-3}
    if checkpointing is not None:
        options.update(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
    found = []
    for kind in ("auto", False):
        model, watch = tiny_model(), Watch()
        masks = group_masks(model)
        start = {n: p.detach().clone() for n, p in model.named_parameters()}
        trainer = Trainer(
            model=model, args=arguments(tmp_path, **options), train_dataset=lm_data(64), callbacks=[watch]
        )
        so.attach(trainer, masks, structured=kind)  # type: ignore[arg-type]
        trainer.train()
        assert watch.parts == [7 if kind == "auto" else 0] * 6
        assert watch.dense == [0] * 6
        assert check_frozen(model, start, masks) == masks.active_parameters
        check_restored(model)
        found.append((model, [e["grad_norm"] for e in trainer.state.log_history if "grad_norm" in e]))
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-4)
    for ours, theirs in zip(found[0][0].parameters(), found[1][0].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_experts_train_as_with_whole_gradients(tmp_path: Path, implementation: str) -> None:
    found = []
    for kind in ("auto", False):
        model, watch = make_moe("mixtral", implementation), Watch()
        bits = {n: m if m.dim() == 3 else torch.zeros_like(m) for n, m in expert_masks(model, "column").items()}
        masks = so.MaskSet.from_bool(bits)
        start = {n: p.detach().clone() for n, p in model.named_parameters()}
        trainer = Trainer(
            model=model, args=arguments(tmp_path, learning_rate=1e-3), train_dataset=lm_data(), callbacks=[watch]
        )
        so.attach(trainer, masks, structured=kind)  # type: ignore[arg-type]
        trainer.train()
        assert watch.parts == [2 if kind == "auto" else 0] * 6
        assert watch.dense == [0] * 6
        assert check_frozen(model, start, masks) > 0
        check_restored(model)
        found.append(model)
    for ours, theirs in zip(found[0].parameters(), found[1].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_an_error_leaves_nothing_changed_either(tmp_path: Path) -> None:
    model = tiny_model()

    class Stop(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

    trainer = Trainer(model=model, args=arguments(tmp_path), train_dataset=lm_data(), callbacks=[Stop()])
    so.attach(trainer, group_masks(model))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    check_restored(model)


def test_resume_and_saved_model_are_as_ever(tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3, "learning_rate": 1e-3}

    def run(folder: Path, resume: str | None) -> Any:
        model = tiny_model()
        trainer = Trainer(model=model, args=arguments(folder, **options), train_dataset=lm_data())
        so.attach(trainer, group_masks(model))
        trainer.train(resume_from_checkpoint=resume)
        return model

    straight = run(tmp_path, None)
    resumed = dict(run(tmp_path / "b", str(tmp_path / "checkpoint-3")).named_parameters())
    saved = type(straight).from_pretrained(tmp_path / "checkpoint-6")
    for (name, value), kept in zip(straight.named_parameters(), saved.parameters(), strict=True):
        assert torch.equal(value, resumed[name]), name
        assert torch.equal(value, kept), name


def test_who_needs_whole_gradients_gets_them(tmp_path: Path) -> None:
    from sparseopt.trainers import DynamicSparsity

    model, watch = tiny_model(), Watch()
    dynamic = DynamicSparsity(sparsity=0.9, target="updates", interval=2)
    trainer = Trainer(model=model, args=arguments(tmp_path), train_dataset=lm_data(), callbacks=[watch])
    dynamic.attach(trainer)
    trainer.train()
    assert watch.parts == [0] * 6

    model, watch = tiny_model(), Watch()
    trainer = Trainer(model=model, args=arguments(tmp_path), train_dataset=lm_data(), callbacks=[watch])
    so.attach(trainer, group_masks(model), capture_gradients=False)
    trainer.train()
    assert watch.parts == [0] * 6
    assert watch.dense == [7] * 6
    trainer = Trainer(model=model, args=arguments(tmp_path), train_dataset=lm_data())
    with pytest.raises(ValueError, match="'auto' or False, got 'yes'"):
        so.attach(trainer, group_masks(model), structured="yes")  # type: ignore[arg-type]


def test_dpo_trainer(tmp_path: Path) -> None:
    from trl import DPOConfig, DPOTrainer

    rows = text_rows(32)
    data = Dataset.from_dict({k: [row[i] for row in rows] for i, k in enumerate(("prompt", "chosen", "rejected"))})
    losses = []
    for kind in ("auto", False):
        model, watch = tiny_model(), Watch()
        masks = group_masks(model)
        start = {n: p.detach().clone() for n, p in model.named_parameters()}
        args = DPOConfig(
            output_dir=str(tmp_path),
            max_length=32,
            beta=2.0,
            bf16=False,
            precompute_ref_log_probs=True,
            **common(max_steps=16),
        )
        trainer = DPOTrainer(
            model=model, args=args, train_dataset=data, processing_class=tiny_tokenizer(), callbacks=[watch]
        )
        so.attach(trainer, masks, structured=kind)  # type: ignore[arg-type]
        trainer.train()
        assert watch.parts == [7 if kind == "auto" else 0] * 16
        assert check_frozen(model, start, masks) == masks.active_parameters
        check_restored(model)
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0][-1] < 0.9 * losses[0][0], "it learns"


def test_grpo_trainer(tmp_path: Path) -> None:
    model, watch = tiny_model(), Watch()
    masks = group_masks(model)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainer = grpo_trainer(tmp_path, model, [watch])
    so.attach(trainer, masks)
    trainer.train()
    assert watch.parts == [7] * 3
    assert check_frozen(model, start, masks) > 0
    check_restored(model)


@pytest.mark.parametrize("structured_setting", [True, False])
def test_train_command(
    tmp_path: Path, configure: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, structured_setting: bool
) -> None:
    """`sparseopt train dpo` finds a mask of rows and columns and trains it."""
    from sparseopt.trainers import dpo

    made: list[int] = []
    swap = structured.swap
    monkeypatch.setattr(structured, "swap", lambda use: (made.append(1), swap(use)))
    changes = {"mask.granularity": "auto", "mask.sparsity": 0.8, "optimizer.structured": structured_setting}
    folder = dpo.run(configure(tmp_path / "run", changes))
    kinds = set(so.MaskSet.load(folder / "mask.safetensors").metadata["granularities"].values())
    assert kinds & {"row", "column"}
    assert bool(made) == structured_setting
    assert json.loads((folder / "results.json").read_text())["after"]
