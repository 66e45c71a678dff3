"""sparse_finetune on a tiny model: what it saves, what it shows, and that every option does what it says."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from finetuning import finetune, first_masks, metrics, records, same_weights, text
from torch import Tensor
from torch.nn.utils import prune
from transformers import AutoModelForCausalLM, AutoTokenizer

import sparseopt as so
from sparseopt import models
from sparseopt.trainers import finetune_callbacks, finetune_model
from sparseopt.trainers.finetune_plot import explored
from sparseopt.trainers.finetune_settings import parse_schedule


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "chain.txt"
    path.write_text(text())
    return path


def test_saves_a_model_folder_with_masks_history_and_picture(
    tiny_folder: Path, text_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "sparse"
    model = finetune(str(tiny_folder), text_file, folder, max_steps=30, mask_update_interval=4)
    said = capfd.readouterr().err
    assert same_weights(model, AutoModelForCausalLM.from_pretrained(folder))
    assert AutoTokenizer.from_pretrained(folder).pad_token == "<pad>"
    assert not model.training
    masks = so.MaskSet.load(folder / "masks.safetensors")
    assert masks.active_parameters == round(0.25 * masks.total_parameters)
    assert (masks.metadata["policy"], masks.metadata["step"], masks.metadata["base_model"]) == (
        "rigl",
        30,
        str(tiny_folder),
    )
    weights = dict(model.named_parameters())
    assert all(not weights[name].detach()[~masks[name]].any() for name in masks.names)
    assert not any("embed" in name or "norm" in name for name in masks.names)

    history, found = records(folder), json.loads((folder / "results.json").read_text())
    assert [record["step"] for record in history["updates"]] == [4, 8, 12, 16, 20]
    assert history["first"] == {"step": 0, "active": masks.active_parameters, "sparsity": 0.75}
    for record in history["updates"]:
        assert record["active"] == masks.active_parameters
        assert record["inactive_grad_norm"] > 0
    assert history["updates"][0]["churn"] > history["updates"][-1]["churn"] > 0
    assert history["updates"][-1]["regrown"] > 0
    assert found["mask_fingerprint"] == masks.fingerprint
    assert found["after"]["loss"] < found["before"]["loss"]
    assert found["first_masks"] is not None
    assert found["mask_update_seconds"]["median"] > 0
    logged = [entry for entry in metrics(folder) if "dynamic/churn" in entry]
    assert [entry["dynamic/churn"] for entry in logged] == [record["churn"] for record in history["updates"]]
    picture = (folder / "finetune.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n")
    assert int.from_bytes(picture[16:20], "big") > 1500, "wide enough for six panels"

    assert "fp16=True is for GPUs, it is off on cpu" in said
    assert "masks: update 5/5 after step 20 took" in said
    assert "train: 30/30 steps (100%) done" in said
    assert "Held-out loss" in said
    assert not list(folder.glob("checkpoint-*"))
    assert not (folder / "before.json").exists()


@pytest.mark.parametrize(
    ("changes", "policy", "updates"),
    [
        ({}, "rigl", 4),
        ({"use_rigl": False}, "static", 0),
        ({"policy": "set"}, "set", 4),
        ({"policy": "gradual", "distribution": "global"}, "gradual", 4),
        ({"policy": "static", "use_rigl": True}, "static", 0),
        ({"use_rigl": False, "sparsity_schedule": "linear:0.2:0.6"}, "gradual", 6),
        ({"mask_update_fraction": 0.0, "distribution": "erk"}, "rigl", 4),
    ],
    ids=str,
)
def test_policies(
    tiny_folder: Path, text_file: Path, tmp_path: Path, changes: dict[str, Any], policy: str, updates: int
) -> None:
    finetune(str(tiny_folder), text_file, tmp_path, eval_fraction=0.0, **changes)
    found, history = json.loads((tmp_path / "results.json").read_text()), records(tmp_path)["updates"]
    assert (found["policy"], len(history)) == (policy, updates)
    assert found["before"] is found["after"] is None
    assert all(record["inactive_grad_norm"] is not None for record in history)
    assert found["sparsity"] == pytest.approx(0.6 if "sparsity_schedule" in changes else 0.75, abs=1e-3)
    moved = sum(record["grown"] for record in history)
    assert (moved > 0) == (policy in ("rigl", "set") and changes.get("mask_update_fraction") != 0.0)
    assert (tmp_path / "finetune.png").stat().st_size > 10_000


@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
def test_patterns_are_exact(tiny_folder: Path, text_file: Path, tmp_path: Path, pattern: str) -> None:
    finetune(str(tiny_folder), text_file, tmp_path, sparsity_type=pattern, sparsity_ratio=0.5)
    masks, (n, m) = so.MaskSet.load(tmp_path / "masks.safetensors"), map(int, pattern.split(":"))
    assert all((masks[name].reshape(-1, m).sum(1) == n).all() for name in masks.names)


def test_updates_leave_the_base(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    model = finetune(str(tiny_folder), text_file, tmp_path, target="updates", dropped="rewind", sparsity_ratio=0.9,
                     exclude="down_proj")  # fmt: skip
    masks, base = so.MaskSet.load(tmp_path / "masks.safetensors"), models.load_model(str(tiny_folder)).state_dict()
    assert not any("down_proj" in name for name in masks.names)
    changed = 0
    for name, param in model.named_parameters():
        differs = param.detach() != base[name]
        assert not (differs & ~masks[name] if name in masks else differs).any(), name
        assert param.requires_grad, "nothing stays frozen"
        changed += int(differs.sum())
    assert changed > 0.9 * masks.active_parameters


# ---- schedules and criteria ------------------------------------------------------------------------------------------
def test_a_schedule_is_a_function_of_steps(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    def sparsity_schedule(step: int, total_steps: int) -> float:
        """Linear increase in sparsity from 0.1 to 0.9"""
        return 0.1 + 0.8 * min(1.0, step / total_steps)

    finetune(str(tiny_folder), text_file, tmp_path / "function", sparsity_schedule=sparsity_schedule)
    finetune(str(tiny_folder), text_file, tmp_path / "text", sparsity_schedule="linear:0.1:0.9")
    history = records(tmp_path / "function")
    assert history["first"]["sparsity"] == pytest.approx(0.1, abs=1e-4)
    assert [record["step"] for record in history["updates"]] == [2, 4, 6, 8, 10, 12]
    for record in history["updates"]:
        assert record["sparsity"] == pytest.approx(0.1 + 0.8 * record["step"] / 12, abs=1e-4)
    assert records(tmp_path / "text") == history
    late = parse_schedule("linear:0.1:0.9", interval=5)
    assert late is not None
    assert [late(step, 14) for step in (0, 5, 10)] == pytest.approx([0.1, 0.5, 0.9]), "the last update reaches the end"


class MagnitudePruning(prune.BasePruningMethod):
    """As documents give it: sets what it keeps in a mask that is all ones."""

    PRUNING_TYPE = "unstructured"

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        mask = default_mask.clone()
        num_params = t.numel()
        k = int(num_params * (1 - self.amount))
        if k == 0:
            return mask
        topk = torch.topk(t.abs().view(-1), k=k, largest=True)
        mask.view(-1)[topk.indices] = 1
        return mask


class Smallest(prune.BasePruningMethod):
    """Keeps the smallest."""

    PRUNING_TYPE = "unstructured"

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        mask = default_mask.clone()
        mask[torch.topk(t.abs(), k=round(self.amount * t.numel())).indices] = 0
        return mask


class Lazy(prune.BasePruningMethod):
    """Prunes half of what it was asked to."""

    PRUNING_TYPE = "unstructured"

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        mask = default_mask.clone()
        mask[torch.topk(-t.abs(), k=round(self.amount * t.numel() / 2)).indices] = 0
        return mask


def test_pruning_methods_choose(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    for name, method in (
        ("seed", MagnitudePruning),
        ("torch", prune.L1Unstructured),
        ("small", Smallest),
        ("no", None),
    ):
        finetune(str(tiny_folder), text_file, tmp_path / name, policy="static", criterion=method, max_steps=2)
    assert first_masks(tmp_path / "seed") == first_masks(tmp_path / "no") == first_masks(tmp_path / "torch")
    both = first_masks(tmp_path / "small") & first_masks(tmp_path / "no")
    assert both.active_parameters == 0, "the largest quarter and the smallest quarter"
    with pytest.raises(ValueError, match=r"Lazy kept \d+ of \d+ entries of 'model.layers.0.* where \d+ were to stay"):
        finetune(str(tiny_folder), text_file, tmp_path / "lazy", criterion=Lazy)
    assert not (tmp_path / "lazy").exists(), "found before anything was written"


def test_a_score_function_decides_what_leaves(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    seen = set()

    def score(name: str, weight: Tensor, gradient: Tensor | None) -> Tensor:
        seen.add(name)
        return weight.abs() if gradient is None else (weight * gradient).abs()

    finetune(str(tiny_folder), text_file, tmp_path / "score", criterion=score)
    finetune(str(tiny_folder), text_file, tmp_path / "magnitude")
    assert seen == set(first_masks(tmp_path / "score").names)
    assert first_masks(tmp_path / "score") != first_masks(tmp_path / "magnitude")


# ---- training options ------------------------------------------------------------------------------------------------
def test_training_options_reach_the_trainer(
    tiny_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def on_train_begin(self: Any, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None,
                       **kw: Any) -> None:  # fmt: skip
        inner = optimizer.optimizer
        seen.update(args=args, steps=state.max_steps, decay={group["weight_decay"] for group in inner.param_groups})
        seen["dropout"] = model.model.layers[0].self_attn.attention_dropout
        seen["checkpointing"] = model.model.layers[0].gradient_checkpointing

    monkeypatch.setattr(finetune_callbacks.EvaluationProgress, "on_train_begin", on_train_begin)
    model = finetune(
        str(tiny_folder), text_file, tmp_path, max_steps=None, num_epochs=2, weight_decay=0.3, dropout=0.25,
        lr_scheduler_type="cosine", warmup_steps=3, seed=7, gradient_checkpointing=True, batch_size=8, learning_rate=1e-3,
        max_grad_norm=0.5, eval_fraction=0.2,
    )  # fmt: skip
    samples = 4001 // 16
    held_out = round(0.2 * samples)
    batches = math.ceil((samples - held_out) / 8)
    assert seen["steps"] == 2 * math.ceil(batches / 2)
    assert seen["decay"] == {0.3, 0.0}
    assert (seen["dropout"], model.model.layers[0].self_attn.attention_dropout) == (0.25, 0.1), "and put back"
    assert seen["checkpointing"]
    assert not model.model.layers[0].gradient_checkpointing
    args = seen["args"]
    assert (args.seed, args.max_grad_norm, args.per_device_train_batch_size) == (7, 0.5, 8)
    rates = [entry["learning_rate"] for entry in metrics(tmp_path)]
    assert max(rates) == pytest.approx(1e-3)
    assert rates[1] < rates[2] < rates[3]
    assert rates[-1] < 1e-5, "a cosine ends near 0"
    assert json.loads((tmp_path / "results.json").read_text())["held_out_samples"] == held_out


def test_what_would_do_nothing_is_said(
    tiny_folder: Path, text_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.warns(UserWarning, match="masks never change: the first update would come after step 100"), \
         pytest.warns(UserWarning, match="warmup_steps=100, but the run has 3 steps"):  # fmt: skip
        finetune(str(tiny_folder), text_file, tmp_path, mask_update_interval=100, warmup_steps=100, max_steps=3,
                 max_length=512)  # fmt: skip
    assert "max_length is 64: the model reads no more." in capfd.readouterr().err


@pytest.mark.parametrize(
    ("fp16", "device", "bf16", "given", "expected"),
    [
        (True, "cpu", False, False, ("float32", False, "off on cpu")),
        (True, "cuda", True, False, ("bfloat16", False, "fp16=True means bf16 here")),
        (True, "cuda", True, True, ("float32", True, "autocast")),
        (True, "cuda", False, False, ("float32", False, "this GPU has no bf16")),
        (False, "cuda", True, False, ("float32", False, "Precision: fp32.")),
    ],
)
def test_precision(
    fp16: bool, device: str, bf16: bool, given: bool, expected: tuple[str, bool, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16)
    dtype, autocast, said = finetune_model.precision(fp16, torch.device(device), given)
    assert (dtype, autocast) == expected[:2]
    assert expected[2] in said


def test_bf16_weights_train(
    tiny_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU gets, here on the CPU."""
    monkeypatch.setattr(finetune_model, "precision", lambda *_: ("bfloat16", False, "Precision: bf16."))
    model = finetune(str(tiny_folder), text_file, tmp_path)
    assert {param.dtype for param in model.parameters()} == {torch.bfloat16}
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["after"]["loss"] < found["before"]["loss"]


def test_topk_attention_is_folded_into_what_is_saved(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    """Two of four heads: the others' inputs of the output projection are zero in the saved model, which is the returned one."""
    with pytest.warns(UserWarning, match="attention heads"):
        model = finetune(str(tiny_folder), text_file, tmp_path, use_topk_attention=True, topk_ratio=0.25)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    heads = saved.config.num_attention_heads
    for layer in saved.model.layers:
        weight = layer.self_attn.o_proj.weight
        used = weight.view(len(weight), heads, -1).abs().sum((0, 2)) > 0
        assert used.sum() == max(1, heads // 4)
    tokens = torch.arange(8)[None]
    torch.testing.assert_close(model(tokens).logits, saved(tokens).logits)


def test_a_foreign_model_folder_is_left_alone(tiny_folder: Path, text_file: Path) -> None:
    with pytest.raises(ValueError, match=r"holds files that no run made \(config.json\)"):
        finetune(str(tiny_folder), text_file, tiny_folder)


def test_explored_counts_each_entry_once() -> None:
    history = [{"grown": 10, "regrown": 0.0}, {"grown": 8, "regrown": 0.25}, {"grown": 0, "regrown": 0.0}]
    assert explored(history, 20) == [20, 30, 36, 36]
