"""A tiny random Llama (or GPT-2) with its tokenizer, data and trainers, for tests of attached trainers and callbacks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainerCallback,
    TrainingArguments,
)

import sparseopt as so


def tiny_model(kind: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
    """``kind``: llama, with a tied embedding, or gpt2, whose layers are Conv1D."""
    torch.manual_seed(0)
    tokens = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_positions=32, n_embd=16, n_layer=2, n_head=4, **tokens)).to(dtype)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, tie_word_embeddings=True, **tokens,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(60))]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def tiny_masks(model: LlamaForCausalLM, density: float = 0.1) -> so.MaskSet:
    """Random masks; embedding and norms are in the set with nothing active."""
    masks = so.MaskSet.random(model, density, seed=3)
    bits = {n: masks[n] if "proj" in n else torch.zeros_like(masks[n]) for n in masks.names}
    return so.MaskSet.from_bool(bits)


def lm_data(size: int = 32) -> Dataset:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 64, (size, 12), generator=generator)
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})


def arguments(folder: Path, **kwargs: Any) -> TrainingArguments:
    return TrainingArguments(output_dir=str(folder), **common(**kwargs))


def common(**kwargs: Any) -> dict[str, Any]:
    return {
        "per_device_train_batch_size": 4, "max_steps": 6, "learning_rate": 1e-2, "weight_decay": 0.1, "logging_steps": 1,
        "report_to": [], "use_cpu": True, "seed": 0, "save_strategy": "no", "disable_tqdm": True, **kwargs,
    }  # fmt: skip


def grpo_trainer(folder: Path, model: LlamaForCausalLM, callbacks: Sequence[TrainerCallback] = ()) -> Any:
    """TRL's GRPOTrainer for three steps; an answer is worth the number of its different words."""
    from trl import GRPOConfig, GRPOTrainer

    def reward(completions: list[str], **kwargs: Any) -> list[float]:
        return [float(len(set(text.split()))) for text in completions]

    args = GRPOConfig(
        output_dir=str(folder), num_generations=4, max_completion_length=6, bf16=False, **common(max_steps=3)
    )
    return GRPOTrainer(
        model=model, reward_funcs=reward, args=args, processing_class=tiny_tokenizer(), callbacks=list(callbacks),
        train_dataset=Dataset.from_dict({"prompt": [a for a, _, _ in text_rows(16)]}),
    )  # fmt: skip


def check_frozen(model: torch.nn.Module, start: dict[str, torch.Tensor], masks: so.MaskSet) -> int:
    """Everything outside the masks is bitwise as at the start; returns how many entries moved."""
    moved = 0
    for name, param in model.named_parameters():
        changed = param.detach() != start[name]
        assert not (changed & ~masks[name]).any(), name
        assert param.requires_grad, name
        moved += int(changed.sum())
    return moved


def text_rows(size: int) -> list[tuple[str, str, str]]:
    rows = []
    for i in range(size):
        a, b, c = (3 + (7 * i + k) % 50 for k in (1, 5, 11))
        rows.append((f"w{a} w{b}", f" w{b} w{a}", f" w{c} w{c}"))
    return rows
