"""The DynamicSparsity callback in transformers' Trainer, on tiny random models."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import tiny_llama
import torch
from tiny_llama import lm_data, tiny_model
from transformers import Trainer, TrainerCallback

import sparseopt as so
from sparseopt.trainers import DynamicSparsity
from sparseopt.trainers.attachment import sparse_optimizer

arguments = functools.partial(tiny_llama.arguments, max_steps=12)


class Zeros(TrainerCallback):
    """Looks at the weights before every forward."""

    def __init__(self, dynamic: DynamicSparsity) -> None:
        self.dynamic, self.seen = dynamic, 0

    def look(self, *_: Any) -> None:
        engine = self.dynamic.engine
        assert engine is not None
        for layer in engine.layers:
            assert not layer.param.detach()[~engine.masks[layer.name]].any()
        self.seen += 1

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kw: Any) -> None:
        model.register_forward_pre_hook(self.look)


def run(
    folder: Path, resume: Path | None = None, kind: str = "llama", dtype: torch.dtype = torch.float32,
    trainer_options: dict[str, Any] | None = None, attach_options: dict[str, Any] | None = None, **options: Any,
) -> tuple[Trainer, DynamicSparsity]:  # fmt: skip
    dynamic = DynamicSparsity(**{"interval": 2, "sparsity": 0.8, **options})
    trainer = Trainer(
        model=tiny_model(kind, dtype), args=arguments(folder, **(trainer_options or {})), train_dataset=lm_data(64)
    )
    dynamic.attach(trainer, **(attach_options or {}))
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer, dynamic


def weights_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    model: Any = trainer.model
    return {name: param.detach().clone() for name, param in model.named_parameters()}


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_trains_sparse_weights_and_logs(tmp_path: Path, kind: str, accumulation: int) -> None:
    dynamic = DynamicSparsity(interval=2, sparsity=0.8)
    zeros = Zeros(dynamic)
    args = arguments(tmp_path, gradient_accumulation_steps=accumulation)
    trainer = Trainer(model=tiny_model(kind), args=args, train_dataset=lm_data(64), callbacks=[zeros])
    start = weights_of(trainer)
    dynamic.attach(trainer)
    trainer.train()
    engine = dynamic.engine
    assert engine is not None
    assert zeros.seen == 12 * accumulation
    assert [record["step"] for record in engine.history] == [2, 4, 6, 8]  # at 9 = 75% nothing is left to exchange
    total = sum(layer.numel for layer in engine.layers)
    assert engine.masks.active_parameters == round(0.2 * total)
    assert sparse_optimizer(trainer).masks.select(engine.masks.names) == engine.masks
    changes = sparse_optimizer(trainer).state_dict()["sparseopt"]["mask_changes"]
    assert changes == 4, "state was never allocated for other masks than the first"
    logged = [entry for entry in trainer.state.log_history if "dynamic/step" in entry]
    assert [entry["dynamic/step"] for entry in logged] == [entry["step"] for entry in logged] == [2, 4, 6, 8]
    for entry, record in zip(logged, engine.history, strict=True):
        for key in ("sparsity", "churn", "regrown", "inactive_grad_norm"):
            assert entry[f"dynamic/{key}"] == record[key]
        assert entry["dynamic/churn"] > 0
        assert entry["dynamic/inactive_grad_norm"] > 0
    end = weights_of(trainer)
    dense = [name for name in end if name not in engine.masks]
    assert dense
    assert all(not torch.equal(end[name], start[name]) for name in dense), "all else trains densely"


def test_micro_batches_choose_as_one_big_batch(tmp_path: Path) -> None:
    found = []
    for size, accumulation in ((8, 1), (2, 4)):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation, "max_steps": 3}
        _, dynamic = run(tmp_path, trainer_options=options)
        assert dynamic.engine is not None
        found.append(dynamic.engine)
    assert found[0].masks == found[1].masks
    assert found[0].history[0]["inactive_grad_norm"] == pytest.approx(
        found[1].history[0]["inactive_grad_norm"], rel=1e-4
    )


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({}, torch.float32),
        ({}, torch.bfloat16),
        ({"policy": "set"}, torch.float32),
        ({"policy": "gradual", "distribution": "global"}, torch.float32),
        ({"pattern": "2:4", "sparsity": None}, torch.float32),
        ({"target": "updates", "dropped": "rewind"}, torch.bfloat16),
        ({"target": "updates"}, torch.float32),
    ],
    ids=str,
)
def test_a_resumed_training_has_the_same_weights(tmp_path: Path, options: dict[str, Any], dtype: torch.dtype) -> None:
    saving = {"save_strategy": "steps", "save_steps": 5, "gradient_accumulation_steps": 2}
    straight, first = run(tmp_path, dtype=dtype, trainer_options=saving, **options)
    resumed, second = run(tmp_path / "again", tmp_path / "checkpoint-5", dtype=dtype, trainer_options=saving, **options)
    assert first.engine is not None
    assert second.engine is not None
    assert len(first.engine.history) >= 4
    assert second.engine.history == first.engine.history
    assert second.engine.masks == first.engine.masks
    expected = weights_of(straight)
    assert all(torch.equal(value, expected[name]) for name, value in weights_of(resumed).items())
    assert second.engine.history[0]["step"] == 2, "what came before the checkpoint is known"


def test_other_settings_do_not_resume(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 5}
    run(tmp_path, trainer_options=saving)
    with pytest.raises(ValueError, match="had policy='rigl', this one has 'set'"):
        run(tmp_path, tmp_path / "checkpoint-5", trainer_options=saving, policy="set")


def test_updates_leave_the_base_and_freeze_the_rest(tmp_path: Path) -> None:
    start = weights_of(Trainer(model=tiny_model(), args=arguments(tmp_path)))
    trainer, dynamic = run(tmp_path, target="updates", dropped="rewind", sparsity=0.9)
    engine = dynamic.engine
    assert engine is not None
    end = weights_of(trainer)
    for name, value in end.items():
        changed = value != start[name]
        assert int(changed.sum()) == 0 if name not in engine.masks else not (changed & ~engine.masks[name]).any()
    assert sum(int((end[name] != start[name]).sum()) for name in engine.masks.names) == engine.masks.active_parameters
    assert sparse_optimizer(trainer).active_parameters == engine.masks.active_parameters


def test_begins_with_attached_masks(tmp_path: Path) -> None:
    model = tiny_model()
    masks = so.MaskSet.random(model, 0.3, seed=2)
    names = [name for name in masks.names if "proj" in name]
    trainer = Trainer(model=model, args=arguments(tmp_path), train_dataset=lm_data(64))
    so.attach(trainer, masks.select(names), unmasked="freeze")
    dynamic = DynamicSparsity(interval=2, initial="attached")
    trainer.add_callback(dynamic)
    trainer.train()
    assert dynamic.engine is not None
    assert dynamic.engine.masks.counts == masks.select(names).counts
    assert len(dynamic.engine.history) == 4


def test_state_is_that_of_the_active_entries(tmp_path: Path) -> None:
    per_entry = []
    for sparsity in (0.5, 0.9):
        trainer, dynamic = run(tmp_path, sparsity=sparsity, attach_options={"unmasked": "freeze"})
        optimizer = sparse_optimizer(trainer)
        assert dynamic.engine is not None
        assert optimizer.active_parameters == dynamic.engine.masks.active_parameters
        per_entry.append(sum(v.nbytes for s in optimizer.state.values() for k, v in s.items() if "exp" in k))
    assert per_entry[0] / per_entry[1] == pytest.approx(5, rel=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, r"\[0, 1\), got 1.0"),
        ({"pattern": "2to4"}, "'unstructured' or 'N:M'"),
        ({"interval": 0}, "interval"),
        ({"policy": "none"}, "the policy must be"),
    ],
)
def test_bad_numbers_are_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DynamicSparsity(**options)


def test_misuse(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="no argument 'sparsty'"):
        DynamicSparsity(sparsty=0.5)
    with pytest.raises(TypeError, match="no argument 'total_steps'"):
        DynamicSparsity(total_steps=5)
    trainer = Trainer(
        model=tiny_model(), args=arguments(tmp_path), train_dataset=lm_data(64), callbacks=[DynamicSparsity(interval=2)]
    )
    with pytest.raises(ValueError, match="needs a SparseAdamW"):
        trainer.train()
    other = Trainer(model=tiny_model(), args=arguments(tmp_path), train_dataset=lm_data(64))
    with pytest.raises(ValueError, match=r"divisible by 7; 'model.layers.0"):
        DynamicSparsity(pattern="3:7").attach(other)
    with pytest.raises(ValueError, match="'attached' needs masks"):
        DynamicSparsity(initial="attached").attach(other)
