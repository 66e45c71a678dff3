"""attach() in transformers' Trainer and TRL's SFT, DPO and GRPO trainers, on a tiny random Llama."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny_llama import (
    arguments,
    check_frozen,
    common,
    grpo_trainer,
    lm_data,
    text_rows,
    tiny_masks,
    tiny_model,
    tiny_tokenizer,
)
from transformers import Trainer
from transformers.trainer_callback import TrainerCallback

import sparseopt as so
from sparseopt.trainers.attachment import sparse_optimizer


class Norms(TrainerCallback):
    """Collects the logged norms and what the dense gradients look like before a step."""

    def __init__(self) -> None:
        self.logged: list[float] = []
        self.dense: list[int] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.dense.append(sum(p.grad is not None for p in model.parameters()))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "grad_norm" in logs:
            self.logged.append(logs["grad_norm"])


def test_trainer_trains_only_the_mask_and_logs_the_active_norm(tmp_path: Path) -> None:
    model, norms = tiny_model(), Norms()
    masks = tiny_masks(model)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainer = Trainer(model=model, args=arguments(tmp_path), train_dataset=lm_data(), callbacks=[norms])
    so.attach(trainer, masks)
    trainer.train()
    assert check_frozen(model, start, masks) == masks.active_parameters
    assert norms.dense == [0] * 6, "captured gradients leave nothing dense"
    assert len(norms.logged) == 6
    assert norms.logged[-1] == pytest.approx(float(sparse_optimizer(trainer).grad_norm()))
    assert Trainer._clip_grad_norm.__module__ == "transformers.trainer", "the class is untouched"


def test_equals_a_dense_run_with_masked_gradients(tmp_path: Path) -> None:
    """The same trainer with torch's AdamW on parameters whose frozen entries are reset after each step."""
    masks = tiny_masks(tiny_model())
    results, losses = [], []
    for sparse in (True, False):
        model = tiny_model()
        options = {"weight_decay": 0.0, "gradient_accumulation_steps": 2}
        trainer = Trainer(model=model, args=arguments(tmp_path, **options), train_dataset=lm_data(64))
        if sparse:
            so.attach(trainer, masks)
        else:
            for name, param in model.named_parameters():
                mask = masks[name]
                param.register_hook(lambda grad, m=mask: grad * m)
        trainer.train()
        results.append({n: p.detach().clone() for n, p in model.named_parameters()})
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "checkpoint", "reentrant"])
def test_resume_gives_the_same_weights(tmp_path: Path, dtype: torch.dtype, checkpointing: bool | None) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3, "learning_rate": 1e-3, "max_steps": 6}
    if checkpointing is not None:
        options.update(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": checkpointing})

    def run(folder: Path, resume: str | None) -> dict[str, torch.Tensor]:
        model = tiny_model(dtype=dtype)
        trainer = Trainer(model=model, args=arguments(folder, **options), train_dataset=lm_data())
        so.attach(trainer, tiny_masks(model))
        trainer.train(resume_from_checkpoint=resume)
        return {n: p.detach().clone() for n, p in model.named_parameters()}

    straight = run(tmp_path, None)
    resumed = run(tmp_path / "resumed", str(tmp_path / "checkpoint-3"))
    start = dict(tiny_model(dtype=dtype).named_parameters())
    assert any(not torch.equal(v, start[n]) for n, v in straight.items()), "nothing trained"
    for name, value in straight.items():
        assert torch.equal(value, resumed[name]), name


def test_fp16_scaling_turns_capture_off_by_default() -> None:
    model = tiny_model()

    class Stand:  # only what attach() reads; fp16 needs a GPU to run
        args = type("Args", (), {
            "deepspeed": None, "learning_rate": 1e-3, "adam_beta1": 0.9, "adam_beta2": 0.99, "adam_epsilon": 1e-8,
            "max_grad_norm": 0.0, "fp16": True, "world_size": 1,
        })()  # fmt: skip
        optimizer = None
        _clip_grad_norm = _get_grad_norm = train = None

        def add_callback(self, callback: Any) -> None:
            self.callback = callback

    trainer = Stand()
    trainer.model = model  # type: ignore[attr-defined]
    so.attach(trainer, tiny_masks(model))  # type: ignore[arg-type]
    assert trainer.callback._options["capture_gradients"] is False
    assert trainer.callback._options["max_grad_norm"] == float("inf")


def test_tied_names_and_errors(tmp_path: Path) -> None:
    model = tiny_model()
    shape = model.lm_head.weight.shape
    head = torch.zeros(shape, dtype=torch.bool)
    head[5] = True
    data, args = lm_data(), arguments(tmp_path)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainer = Trainer(model=model, args=args, train_dataset=data)
    so.attach(trainer, {"lm_head.weight": head}, unmasked="freeze")
    trainer.train()
    assert [g["param_names"] for g in sparse_optimizer(trainer).param_groups] == [["model.embed_tokens.weight"]]
    moved = model.lm_head.weight.detach() != start["model.embed_tokens.weight"]
    assert moved.any()
    assert not moved[~head].any()

    def attempt(masks: Any, **kwargs: Any) -> None:
        fresh = Trainer(model=tiny_model(), args=args, train_dataset=data)
        so.attach(fresh, masks, **kwargs)
        fresh.create_optimizer()

    with pytest.raises(ValueError, match="does not have"):
        attempt({"nope.weight": head})
    with pytest.raises(ValueError, match="shape"):
        attempt({"lm_head.weight": head[:3]})
    with pytest.raises(ValueError, match="tied"):
        attempt({"lm_head.weight": head, "model.embed_tokens.weight": ~head})
    with pytest.raises(ValueError, match="no mask"):
        attempt({"lm_head.weight": head})
    with pytest.raises(ValueError, match="nothing to train"):
        attempt(~so.MaskSet.full_like(tiny_model()))
    with pytest.raises(ValueError, match="before"):
        so.attach(trainer, {"lm_head.weight": head})


def test_sft_trainer(tmp_path: Path) -> None:
    from trl import SFTConfig, SFTTrainer

    model = tiny_model()
    masks = tiny_masks(model)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    data = Dataset.from_dict({"text": [a + b for a, b, _ in text_rows(32)]})
    args = SFTConfig(output_dir=str(tmp_path), max_length=16, bf16=False, **common())
    trainer = SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tiny_tokenizer())
    so.attach(trainer, masks)
    trainer.train()
    assert check_frozen(model, start, masks) > 0


def test_dpo_trainer_resumes_exactly(tmp_path: Path) -> None:
    from trl import DPOConfig, DPOTrainer

    rows = text_rows(32)
    columns = ("prompt", "chosen", "rejected")
    data = Dataset.from_dict({k: [row[i] for row in rows] for i, k in enumerate(columns)})
    masks = tiny_masks(tiny_model())

    def run(folder: Path, resume: str | None) -> torch.nn.Module:
        options = common(save_strategy="steps", save_steps=3, learning_rate=1e-3)
        args = DPOConfig(
            output_dir=str(folder), max_length=32, beta=0.1, bf16=False, precompute_ref_log_probs=True, **options
        )
        model = tiny_model()
        trainer = DPOTrainer(model=model, args=args, train_dataset=data, processing_class=tiny_tokenizer())
        so.attach(trainer, masks)
        trainer.train(resume_from_checkpoint=resume)
        return model

    straight = run(tmp_path, None)
    assert check_frozen(straight, dict(tiny_model().named_parameters()), masks) > 0
    resumed = dict(run(tmp_path / "b", str(tmp_path / "checkpoint-3")).named_parameters())
    for name, value in straight.named_parameters():
        assert torch.equal(value, resumed[name]), name


def test_grpo_trainer(tmp_path: Path) -> None:
    model = tiny_model()
    masks = tiny_masks(model)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainer = grpo_trainer(tmp_path, model)
    so.attach(trainer, masks)
    trainer.train()
    assert check_frozen(model, start, masks) > 0


def test_public_names_are_not_shadowed_by_modules() -> None:
    """`from sparseopt.trainers import attach` gives the function, whatever was imported before."""
    import importlib

    import sparseopt.trainers as package

    for name in package.__all__:
        importlib.import_module(package._PUBLIC[name])
        assert callable(getattr(package, name)), name
