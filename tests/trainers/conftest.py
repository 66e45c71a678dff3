"""A tiny model with its tokenizer in a folder, and preference pairs in a file: what a DPO run needs, in milliseconds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

Config = dict[str, dict[str, Any]]


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama (hidden 32, tied embedding) and a tokenizer of 64 words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, attention_dropout=0.1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(60))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 pairs of plain text; 14 train and 6 are held out: 7 batches of 2 an epoch."""
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = []
    for i in range(20):
        a, b, c = (3 + (7 * i + k) % 50 for k in (1, 5, 11))
        rows.append({"prompt": f"w{a} w{b}", "chosen": f" w{b} w{a}", "rejected": f" w{c} w{c}"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def settings(tiny_folder: Path, pairs_file: Path) -> Callable[..., list[str]]:
    """``section.key=value`` of a run of 10 steps (more than an epoch) in a folder; keyword arguments change some."""

    def build(folder: Path, changes: dict[str, Any] | None = None) -> list[str]:
        values: dict[str, Any] = {
            "model.name": tiny_folder, "data.name": pairs_file, "data.n_train": 14, "data.n_eval": 6,
            "mask.method": "gradient", "mask.batches": 3, "mask.exclude": "[]",
            "optimizer.learning_rate": 0.01, "optimizer.weight_decay": 0.1,
            "training.n_steps": 10, "training.batch_size": 2, "training.max_length": 32, "training.device": "cpu",
            "evaluation.n_generate": 3, "evaluation.max_new_tokens": 4, "output.dir": folder, **(changes or {}),
        }  # fmt: skip
        return [f"{key}={'null' if value is None else value}" for key, value in values.items()]

    return build


@pytest.fixture(scope="session")
def configure(settings: Callable[..., list[str]]) -> Callable[..., Config]:
    """The configuration of such a run."""

    def build(folder: Path, changes: dict[str, Any] | None = None) -> Config:
        from sparseopt import config, schemas

        return config.load(schemas.DPO, None, settings(folder, changes))

    return build
