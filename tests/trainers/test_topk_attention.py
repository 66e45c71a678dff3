"""TopKAttention in transformers' Trainer, on tiny random models."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny_llama
import torch
from tiny_llama import lm_data, tiny_model
from transformers import Trainer, TrainerCallback

import sparseopt as so
from sparseopt.trainers import TopKAttention

arguments = functools.partial(tiny_llama.arguments, max_steps=12)


class Recorder(TrainerCallback):
    """Heads and importance after every step."""

    def __init__(self, top: TopKAttention) -> None:
        self.top = top
        self.heads: list[dict[str, list[bool]]] = []
        self.importance: list[dict[str, torch.Tensor]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
        if self.top._top is None:  # the trainer restored another one from a checkpoint
            return
        self.heads.append({name: heads.tolist() for name, heads in self.top.heads.items()})
        self.importance.append({name: values.clone() for name, values in self.top._top.importance.items()})


def run(
    folder: Path, kind: str = "llama", resume: Path | None = None, ratio: float = 0.5, interval: int = 3, **options: Any
) -> tuple[Trainer, TopKAttention, Recorder]:
    top = TopKAttention(ratio, interval)
    recorder = Recorder(top)
    trainer = Trainer(
        model=tiny_model(kind), args=arguments(folder, **options), train_dataset=lm_data(64), callbacks=[top, recorder]
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer, top, recorder


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_trains_with_half_of_the_heads_and_folds(tmp_path: Path, kind: str) -> None:
    trainer, top, recorder = run(tmp_path, kind)
    model: Any = trainer.model
    assert len(recorder.heads) == 12
    assert all(sum(heads) == 2 for step in recorder.heads for heads in step.values())
    assert [i + 1 for i in range(1, 12) if not any(v.any() for v in recorder.importance[i].values())] == [3, 6, 9], (
        "ranked after the first step (a tenth of the training), then every 3, and not after the last"
    )
    changes = [entry for entry in trainer.state.log_history if "topk_attention/kept" in entry]
    assert [entry["step"] for entry in changes] == [1, 3, 6, 9]
    assert all(entry["topk_attention/kept"] == 4 for entry in changes)
    assert changes[0]["topk_attention/changed"] == 4
    assert any(entry["topk_attention/changed"] for entry in changes[1:]), "dropped heads return"
    assert {name: heads.tolist() for name, heads in top.heads.items()} == recorder.heads[-1]
    # Nothing is left of the hooks; folding gives what training saw.
    assert not any(module._forward_pre_hooks for module in model.modules())
    model.eval()
    ids = torch.tensor(lm_data(4)["input_ids"])
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        assert top._top is not None
        with top._top.installed():
            masked = model(input_ids=ids).logits
        assert not torch.allclose(plain, masked, atol=1e-4)
        top.fold(model)
        torch.testing.assert_close(model(input_ids=ids).logits, masked, rtol=1e-6, atol=1e-6)
        trainer.save_model(str(tmp_path / "folded"))
        again = type(model).from_pretrained(tmp_path / "folded").eval()
        torch.testing.assert_close(again(input_ids=ids).logits, masked, rtol=1e-6, atol=1e-6)


def test_micro_batches_and_checkpointing_measure_the_same(tmp_path: Path) -> None:
    found = []
    checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    whole = {"per_device_train_batch_size": 8}
    for options in (
        whole,
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        {**whole, **checkpointing},
    ):
        top = TopKAttention(0.5, 5, warmup=3)
        recorder = Recorder(top)
        args = arguments(tmp_path, max_steps=4, **options)
        Trainer(model=tiny_model(), args=args, train_dataset=lm_data(64), callbacks=[top, recorder]).train()
        found.append(recorder)
    for other in found[1:]:
        for step in (0, 1, 3):
            for name, values in other.importance[step].items():
                torch.testing.assert_close(values, found[0].importance[step][name], rtol=1e-3, atol=1e-6)
        assert other.heads == found[0].heads


@pytest.mark.parametrize("restore", [False, True])
def test_a_resumed_training_has_the_same_heads_and_weights(tmp_path: Path, restore: bool) -> None:
    saving = {"save_strategy": "steps", "save_steps": 4, "gradient_accumulation_steps": 2}
    straight, _, recorder = run(tmp_path, **saving)
    saved = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert saved["stateful_callbacks"]["TopKAttention"]["saved"]["heads"] == recorder.heads[3]
    resumed, _, _ = run(
        tmp_path / "again", resume=tmp_path / "checkpoint-4", restore_callback_states_from_checkpoint=restore, **saving
    )
    again: Any = next(c for c in resumed.callback_handler.callbacks if isinstance(c, TopKAttention))
    assert len(recorder.heads) == 12
    assert {name: heads.tolist() for name, heads in again.heads.items()} == recorder.heads[-1]
    assert any(step != recorder.heads[3] for step in recorder.heads[4:]), "heads changed after the checkpoint"
    first, second = straight.model, resumed.model
    assert first is not None
    assert second is not None
    expected = dict(first.named_parameters())
    assert all(torch.equal(param, expected[name]) for name, param in second.named_parameters())
    state = json.loads((tmp_path / "again" / "checkpoint-12" / "trainer_state.json").read_text())
    last = json.loads((tmp_path / "checkpoint-12" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["TopKAttention"] == last["stateful_callbacks"]["TopKAttention"]


def test_resuming_where_nothing_was_saved_or_another_ratio_was(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 4}
    Trainer(model=tiny_model(), args=arguments(tmp_path, **saving), train_dataset=lm_data(64)).train()
    with pytest.warns(UserWarning, match=r"checkpoint of step 4 has no attention heads: all are kept until step 6"):
        _, top, recorder = run(tmp_path / "again", resume=tmp_path / "checkpoint-4", **saving)
    assert all(all(heads) for heads in recorder.heads[0].values())
    assert all(int(heads.sum()) == 2 for heads in top.heads.values())
    assert (tmp_path / "again" / "checkpoint-8").is_dir()
    with pytest.raises(ValueError, match=r"had ratio=0.5, this one has 0.75"):
        run(tmp_path / "more", resume=tmp_path / "again" / "checkpoint-8", ratio=0.75)


def test_with_sparse_weights(tmp_path: Path) -> None:
    """Beside an attached SparseAdamW with captured gradients."""
    from sparseopt.trainers import DynamicSparsity, sparse_optimizer

    top, dynamic = TopKAttention(0.5, 3), DynamicSparsity(interval=3, sparsity=0.5)
    trainer = Trainer(model=tiny_model(), args=arguments(tmp_path), train_dataset=lm_data(64), callbacks=[top])
    dynamic.attach(trainer)
    trainer.train()
    assert isinstance(sparse_optimizer(trainer), so.SparseAdamW)
    assert all(int(heads.sum()) == 2 for heads in top.heads.values())
    assert dynamic.engine is not None
    assert abs(dynamic.engine.masks.density - 0.5) < 1e-3


SCRIPT = """
import json, pathlib, sys, torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from sparseopt.trainers import TopKAttention
folder, model, batch = sys.argv[1:]
ids = torch.randint(3, 64, (32, 12), generator=torch.Generator().manual_seed(1)).tolist()
arguments = TrainingArguments(folder, per_device_train_batch_size=int(batch), max_steps=4, learning_rate=1e-3, seed=0,
                              report_to=[], use_cpu=True, save_strategy="steps", save_steps=3, disable_tqdm=True)
model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attention_dropout=0.0)
top = TopKAttention(0.5, interval=2)
trainer = Trainer(model=model, args=arguments, train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}), callbacks=[top])
trainer.train()
heads = {name: values.tolist() for name, values in top.heads.items()}
pathlib.Path(folder, f"heads-{trainer.args.process_index}.json").write_text(json.dumps(heads))
"""


@pytest.mark.slow
def test_processes_choose_the_same_heads(tmp_path: Path, tiny_folder: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    importance: list[torch.Tensor] = []
    for processes, batch in ((1, 8), (2, 4)):
        folder = tmp_path / str(processes)
        subprocess.run(
            [sys.executable, "-P", *launch, str(processes), "train.py", str(folder), str(tiny_folder), str(batch)],
            cwd=tmp_path, check=True, timeout=300,
        )  # fmt: skip
        state = json.loads((folder / "checkpoint-3" / "trainer_state.json").read_text())
        saved = state["stateful_callbacks"]["TopKAttention"]["saved"]["importance"]
        importance.append(torch.tensor(list(saved.values())))
    found = [json.loads((tmp_path / n).read_text()) for n in ("1/heads-0.json", "2/heads-0.json", "2/heads-1.json")]
    assert found[0] == found[1] == found[2]
    shares = [
        values / values.sum() for values in importance
    ]  # how a mean over processes scales the loss is the trainer's
    torch.testing.assert_close(shares[0], shares[1], rtol=1e-3, atol=1e-6)


def test_few_heads_warn_and_half_do_not() -> None:
    with pytest.warns(UserWarning, match=r"keeps 10% of the attention heads: .* keeping 10% destroys most"):
        TopKAttention()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TopKAttention(0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0}, r"\(0, 1\], got 0"),
        ({"ratio": 1.5}, r"\(0, 1\], got 1.5"),
        ({"ratio": 0.5, "interval": 0}, "interval must be a whole number of steps, at least 1, got 0"),
        ({"ratio": 0.5, "interval": None}, "interval must be a whole number"),
        ({"ratio": 0.5, "warmup": 0.5}, "warmup must be a whole number"),
    ],
)
def test_bad_numbers_are_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TopKAttention(**options)


def test_misuse(tmp_path: Path) -> None:
    def train(*callbacks: TrainerCallback, model: Any = None) -> None:
        Trainer(
            model=model or tiny_model(), args=arguments(tmp_path), train_dataset=lm_data(64), callbacks=list(callbacks)
        ).train()

    with pytest.raises(ValueError, match="needs heads that training has chosen"):
        TopKAttention(0.5).fold(tiny_model())
    with pytest.raises(ValueError, match="warmup must be at most the training's 12 steps, got 13"):
        train(TopKAttention(0.5, warmup=13))
    with pytest.raises(ValueError, match="this trainer has 2 TopKAttention callbacks"):
        train(TopKAttention(0.5), TopKAttention(0.5))

    class NoAttention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(4, 4)

        def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": self.linear(torch.ones(4)).sum()}

    with pytest.raises(ValueError, match=r"found in NoAttention: looked for an `o_proj`"):
        train(TopKAttention(0.5), model=NoAttention())
