"""A user's training script for ``torchrun`` and ``accelerate launch``: a tiny model, a trainer, attach(), train()."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import sparseopt as so
from sparseopt.trainers.attachment import sparse_optimizer


def main(folder: str, steps: int, resume: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, pad_token_id=0)
    )  # fmt: skip
    masks = so.MaskSet.random(model, 0.1, seed=3)
    masks = so.MaskSet.from_bool({n: masks[n] if "proj" in n else torch.zeros_like(masks[n]) for n in masks.names})
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 64, (64, 12), generator=generator).tolist()
    arguments = TrainingArguments(
        output_dir=folder, max_steps=steps, learning_rate=1e-3, weight_decay=0.1, logging_steps=1, report_to=[],
        use_cpu=True, seed=0, save_strategy="steps", save_steps=3, disable_tqdm=True, max_grad_norm=0.1,
        lr_scheduler_type="constant", **options,
    )  # fmt: skip
    if os.environ.get("ACCELERATE_USE_FSDP"):
        # accelerate shards on accelerators only; this is what it knows of a CPU that could.
        from accelerate.state import DistributedType, PartialState

        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainer = Trainer(model=model, args=arguments, train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}))
    so.attach(trainer, masks)
    trainer.train(resume_from_checkpoint=resume or None)
    optimizer = sparse_optimizer(trainer)
    now = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in trainer.model.named_parameters()}
    frozen = all(torch.equal(now[n][~masks[n]], start[n][~masks[n]]) for n in masks.names)
    if arguments.process_index == 0:
        torch.save({n: p.detach().clone() for n, p in now.items()}, f"{folder}/weights.pt")
        facts = {
            "frozen": frozen, "world": arguments.world_size, "sharded": optimizer.sharded, "captures": optimizer.captures,
            "trainable": all(p.requires_grad for p in trainer.model.parameters()),
            "norms": [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry],
        }  # fmt: skip
        with open(f"{folder}/facts.json", "w") as file:
            json.dump(facts, file)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4]))
