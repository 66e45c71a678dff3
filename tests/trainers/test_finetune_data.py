"""What sparse_finetune takes as data and as model: every form of them, classification, quantised weights."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict, load_from_disk
from finetuning import finetune, text
from torch import nn
from transformers import AutoModelForSequenceClassification

import sparseopt as so
from sparseopt import models
from sparseopt.optim.dynamic.layers import find_layers
from sparseopt.trainers import finetune_data, finetune_model
from sparseopt.trainers.finetune_settings import FinetuneSettings

DEFAULTS = {
    name: parameter.default for name, parameter in inspect.signature(so.sparse_finetune).parameters.items()
    if parameter.default is not inspect.Parameter.empty
}  # fmt: skip


def samples(tokenizer: Any, data: Any, **changes: Any) -> finetune_data.Samples:
    settings = FinetuneSettings(**{**DEFAULTS, "model_name": "x", "dataset": data, "max_length": 16, **changes})
    source = finetune_data.open_source(data, settings.dataset_split, settings.text_column, settings.task, settings.seed)
    labels = source.labels(settings.label_column) if settings.task == "sequence-classification" else None
    return finetune_data.sample_sets(source, settings, tokenizer, settings.max_length, labels)


@pytest.fixture(scope="module")
def tokenizer(tiny_folder: Path) -> Any:
    return models.load_tokenizer(str(tiny_folder))


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ---- language models -------------------------------------------------------------------------------------------------
def test_text_becomes_blocks_and_the_end_is_held_out(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(text(330))
    found = samples(tokenizer, tmp_path / "a.txt", eval_fraction=0.1)
    assert (len(found.train), len(found.held_out)) == (18, 2)  # 331 tokens with the last one: 20 blocks of 16
    everything = torch.cat([sample["input_ids"] for sample in (*found.train, *found.held_out)])
    assert everything.tolist() == tokenizer(text(330), add_special_tokens=False)["input_ids"][:320]
    assert all(torch.equal(sample["input_ids"], sample["labels"]) for sample in found.train)
    folder = samples(tokenizer, str(tmp_path), eval_fraction=0.1)
    table = samples(tokenizer, Dataset.from_dict({"text": [text(330)]}), eval_fraction=0.1)
    named = samples(tokenizer, Dataset.from_dict({"body": [text(330)]}), eval_fraction=0.1, text_column="body")
    assert folder.digest == table.digest == named.digest == found.digest


def test_answers_are_learned_and_questions_are_not(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"prompt": "w1 w2", "completion": " w3 w4"}, {"prompt": "w5", "completion": " w6"}]
    found = samples(tokenizer, write(tmp_path / "rows.jsonl", rows), eval_fraction=0.0)
    assert not found.held_out
    # w0 is token 4, and an answer ends with the end-of-sequence token, 2.
    assert [sample["input_ids"].tolist() for sample in found.train] == [[5, 6, 7, 8, 2], [9, 10, 2]]
    assert [sample["labels"].tolist() for sample in found.train] == [[-100, -100, 7, 8, 2], [-100, 10, 2]]
    with pytest.warns(UserWarning, match="1 of 2 rows have nothing to predict"):
        short = samples(tokenizer, str(tmp_path / "rows.jsonl"), eval_fraction=0.0, max_length=2)
    assert len(short.train) == 1


def test_tokens_are_taken_as_they_are(tmp_path: Path) -> None:
    rows = {"input_ids": [[5, 6, 7, 0], [8, 9, 10, 11]], "attention_mask": [[1, 1, 1, 0], [1, 1, 1, 1]]}
    found = samples(None, Dataset.from_dict(rows), eval_fraction=0.0)
    assert [sample["input_ids"].tolist() for sample in found.train] == [[5, 6, 7], [8, 9, 10, 11]]
    labelled = samples(
        None, Dataset.from_dict({**rows, "labels": [[-100, 6, 7, -100], [-100] * 3 + [11]]}), eval_fraction=0
    )
    assert labelled.train[1]["labels"].tolist() == [-100, -100, -100, 11]
    batch = finetune_data.collate(0)(labelled.train)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 0], [8, 9, 10, 11]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100], [-100, -100, -100, 11]]


def test_splits_of_their_own_are_held_out(tokenizer: Any, tmp_path: Path) -> None:
    parts = DatasetDict(
        {"train": Dataset.from_dict({"text": [text(400)]}), "test": Dataset.from_dict({"text": [text(60)]})}
    )
    found = samples(tokenizer, parts)
    assert (len(found.train), len(found.held_out)) == (25, 3)
    parts.save_to_disk(tmp_path / "saved")
    assert load_from_disk(str(tmp_path / "saved")).keys() == parts.keys()
    assert samples(tokenizer, tmp_path / "saved").digest == found.digest
    (tmp_path / "other.txt").write_text(text(60))
    given = samples(tokenizer, parts["train"], eval_dataset=tmp_path / "other.txt")
    assert given.digest == found.digest


def test_a_model_object_trains(tiny_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    model = models.load_model(str(tiny_folder))
    rows = Dataset.from_dict({"input_ids": [[3 + (i + j) % 50 for j in range(12)] for i in range(20)]})
    same = finetune(model, rows, tmp_path / "tokens", max_steps=2, tokenizer=tokenizer)
    assert same is model
    assert (tmp_path / "tokens" / "tokenizer.json").is_file()
    model.name_or_path = ""
    model.config._name_or_path = ""
    with pytest.raises(ValueError, match="is text and the model object names no tokenizer: pass tokenizer="):
        finetune(model, Dataset.from_dict({"text": [text(400)]}), tmp_path / "text", max_steps=2)


# ---- classification --------------------------------------------------------------------------------------------------
def reviews(size: int = 60) -> list[dict[str, Any]]:
    return [{"text": f"w{1 + 9 * (i % 2)} w{20 + i % 7}", "label": ("bad", "good")[i % 2]} for i in range(size)]


@pytest.mark.parametrize("target", ["weights", "updates"])
def test_classification(tiny_folder: Path, tmp_path: Path, target: str) -> None:
    data = write(tmp_path / "reviews.jsonl", reviews())
    folder = tmp_path / "out"
    model = finetune(str(tiny_folder), data, folder, task="sequence-classification", target=target, max_steps=30,
                     learning_rate=2e-2, eval_fraction=0.3, lr_scheduler_type="constant_with_warmup")  # fmt: skip
    found = json.loads((folder / "results.json").read_text())
    assert found["after"]["accuracy"] == 1.0
    assert found["after"]["loss"] < found["before"]["loss"]
    loaded = AutoModelForSequenceClassification.from_pretrained(folder)
    assert loaded.config.id2label == {0: "bad", 1: "good"}
    masks = so.MaskSet.load(folder / "masks.safetensors")
    assert "score.weight" not in masks
    assert (loaded.score.weight == 0).sum() == 0, "the head trains whole"
    assert torch.equal(loaded.score.weight, model.score.weight)
    base = models.load_model(str(tiny_folder)).state_dict()["model.embed_tokens.weight"]
    assert torch.equal(model.model.embed_tokens.weight, base) == (target == "updates")


def test_labels(tokenizer: Any, tmp_path: Path) -> None:
    def classes(rows: Any, **changes: Any) -> finetune_data.Samples:
        return samples(tokenizer, rows, task="sequence-classification", eval_fraction=0.0, **changes)

    numbers = Dataset.from_dict({"a": ["w1", "w2 w3"], "b": ["w4", "w5"], "class": [2, 0]})
    found = classes(numbers, text_column="a, b", label_column="class")
    assert sorted((int(s["labels"]), s["input_ids"].tolist()) for s in found.train) == [(0, [6, 7, 9]), (2, [5, 8])]
    batch = finetune_data.collate(0)(found.train)
    assert batch["labels"].shape == (2,)
    with pytest.raises(ValueError, match="has no column 'label'"):
        classes(numbers, text_column="a")
    with pytest.raises(ValueError, match=r"whole numbers from 0 on, got -1"):
        classes(Dataset.from_dict({"text": ["w1"], "label": [-1]}))
    with pytest.raises(ValueError, match="needs labels"):
        classes(write(tmp_path / "a.txt", []))
    with pytest.raises(ValueError, match=r"label 'ugly' of .* is none of bad, good"):
        classes(
            write(tmp_path / "r.jsonl", reviews()),
            eval_dataset=write(tmp_path / "e.jsonl", [{"text": "w1", "label": "ugly"}]),
        )


# ---- quantised weights -----------------------------------------------------------------------------------------------
class Params4bit(nn.Parameter):
    """Stands in for bitsandbytes' class of this name: packed integers that never train."""


class Linear4bit(nn.Linear):
    def __init__(self, dense: nn.Linear) -> None:
        super().__init__(dense.in_features, dense.out_features, bias=False)
        self.scale = dense.weight.detach().abs().max() / 7
        codes = (dense.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = Params4bit(codes, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale)


def quantise(folder: Path, layers: tuple[str, ...]) -> Any:
    model: Any = models.load_model(str(folder))
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and path.endswith(layers):
            parent = model.get_submodule(path.rpartition(".")[0])
            setattr(parent, path.rpartition(".")[2], Linear4bit(module))
    model.is_quantized = True
    return model


def test_quantised_weights_cannot_be_pruned(tiny_folder: Path, tmp_path: Path) -> None:
    model = quantise(tiny_folder, ("q_proj", "k_proj"))
    assert len(finetune_model.quantised(model)) == 4
    data = Dataset.from_dict({"text": [text(600)]})
    with pytest.raises(
        ValueError, match=r"target='weights' cannot prune quantised weights \(4 of them, first 'model.layers.0"
    ):
        finetune(model, data, tmp_path)
    everything = quantise(tiny_folder, tuple(f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")))
    with pytest.raises(ValueError, match=r"all linear weights are quantised \(14, first"):
        finetune(everything, data, tmp_path, target="updates")


def test_updates_train_what_is_not_quantised(
    tiny_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = quantise(tiny_folder, ("q_proj", "k_proj"))
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    monkeypatch.setattr(
        type(model), "save_pretrained", lambda self, folder, **kw: Path(folder, "config.json").write_text("{}")
    )
    finetune(model, Dataset.from_dict({"text": [text(600)]}), tmp_path, target="updates", sparsity_ratio=0.9)
    assert "Quantised: 4 weights stay as they are; only unquantised ones train." in capfd.readouterr().err
    masks = so.MaskSet.load(tmp_path / "masks.safetensors")
    assert len(masks.names) == 10
    changed = {name for name, param in model.named_parameters() if not torch.equal(param, before[name])}
    assert changed == set(masks.names)
    assert model.is_quantized
    assert not find_layers(model)[0].param.requires_grad
