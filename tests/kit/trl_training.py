"""DPO and GRPO as a user's script for ``torchrun`` and ``accelerate launch``: TRL's trainer, attach(), train().

Several jobs one after another, since starting a process takes longer than they do.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import DistributedType, PartialState
from datasets import Dataset
from torch import distributed as dist
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

import sparseopt as so
from sparseopt import models
from sparseopt._files import atomic_write
from sparseopt.trainers import DeltaLogger, MaskCollector
from sparseopt.trainers.attachment import sparse_optimizer
from sparseopt.trainers.callbacks import MetricsFile

# Renamed in transformers 5.2x; the old name warns there.
CHECKPOINTING = next(n for n in ("activation_checkpointing", "gradient_checkpointing") if hasattr(DPOConfig, n))
RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def shard_on_a_cpu() -> None:
    """accelerate shards on accelerators only; this is what it knows of a CPU that could. After TrainingArguments."""
    if os.environ.get("ACCELERATE_USE_FSDP"):
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def reward(completions: list[str], **columns: Any) -> list[float]:
    return [float(text.count("1")) - 0.1 * len(text.split()) for text in completions]


class Replayed(GRPOTrainer):
    """Keeps what each process generated; one process alone takes what several have generated."""

    folder: Path
    calls = 0

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        kept = sorted(self.folder.glob(f"generated_{self.calls}_*.json"))
        if WORLD == 1 and kept:
            return [row for path in kept for row in json.loads(path.read_text())], None
        made, logps = super()._generate_single_turn(*args, **kwargs)
        (self.folder / f"generated_{self.calls}_{RANK}.json").write_text(json.dumps(made))
        return made, logps


def write_rows(folder: Path, rows: list[dict[str, str]]) -> Path:
    path = folder / "pairs.jsonl"
    if RANK == 0:
        atomic_write(path, "".join(json.dumps(row) + "\n" for row in rows))
    PartialState().wait_for_everyone()
    return path


def trainer_of(method: str, name: str, folder: Path, options: dict[str, Any]) -> Any:
    common = {
        "output_dir": str(folder), "max_steps": 4, "learning_rate": 1e-3, "logging_steps": 1, "report_to": [],
        "use_cpu": True, "seed": 0, "save_strategy": "no", "disable_tqdm": True, "bf16": False, "max_grad_norm": 0.1,
        "lr_scheduler_type": "constant", **{CHECKPOINTING: False}, **options,
    }  # fmt: skip
    model, tokenizer = models.load_model(name, "float32"), models.load_tokenizer(name)
    words = [tuple(3 + (7 * i + k) % 50 for k in (1, 5, 11)) for i in range(32)]
    if method in ("dpo", "dense"):
        rows = [{"prompt": f"w{a} w{b}", "chosen": f" w{b} w{a}", "rejected": f" w{c} w{c}"} for a, b, c in words]
        arguments = DPOConfig(**common, max_length=32)
        shard_on_a_cpu()
        # From a file: TRL keeps what it measures beforehand beside it, where the other processes look for it.
        pairs = Dataset.from_json(str(write_rows(folder, rows)), cache_dir=str(folder / "cache"))
        return DPOTrainer(model=model, args=arguments, train_dataset=pairs, processing_class=tokenizer)
    arguments = GRPOConfig(**{"num_generations": 4, "max_completion_length": 8, **common})
    shard_on_a_cpu()
    prompts = Dataset.from_list([{"prompt": f"w{a} w{b}"} for a, b, _ in words])
    trainer = Replayed(
        model=model, reward_funcs=reward, args=arguments, train_dataset=prompts, processing_class=tokenizer
    )
    trainer.folder = folder
    return trainer


def watch(trainer: Any, folder: Path, resume: str | None) -> None:
    """The weights of steps 1, 3 and 4, and the accumulated gradients; going on with those of the run that is resumed."""
    if resume is not None and RANK == 0:
        for part in ("log", "grad_acc"):
            shutil.copytree(Path(resume).parent / part, folder / part)
    PartialState().wait_for_everyone()
    trainer.add_callback(DeltaLogger(folder / "log", "1,3", final=True))
    trainer.add_callback(MaskCollector(folder, save_interval=2, tolerance=1e-6))


def work(name: str, method: str, folder: Path, resume: str | None, options: dict[str, Any]) -> None:
    folder.mkdir(exist_ok=True)
    trainer = trainer_of(method, name, folder, options)
    if method != "grpo":
        watch(trainer, folder, resume)
    if method == "dense":
        trainer.train()
        now = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in trainer.model.named_parameters()}
        if RANK == 0:
            torch.save({n: p.detach().clone() for n, p in now.items()}, folder / "weights.pt")
        return
    start = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    drawn = so.MaskSet.random(
        trainer.model, 0.2, seed=3
    )  # nothing of the embedding, which is the head too, nor of norms
    masks = so.MaskSet.from_bool({n: drawn[n] if "proj" in n else torch.zeros_like(drawn[n]) for n in drawn.names})
    so.attach(trainer, masks)
    if RANK == 0:
        trainer.add_callback(MetricsFile(folder / "metrics.jsonl"))
    trainer.train(resume_from_checkpoint=resume)
    optimizer = sparse_optimizer(trainer)
    now = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in trainer.model.named_parameters()}
    facts = {
        "sharded": optimizer.sharded, "captures": optimizer.captures, "state_bytes": optimizer.state_bytes(),
        "frozen": all(torch.equal(now[n][~masks[n]], start[n][~masks[n]]) for n in masks.names),
        "moved": sum(int((now[n] != start[n]).sum()) for n in masks.names),
        "digest": hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in now.values())).hexdigest(),
        "log": [entry for entry in trainer.state.log_history if "grad_norm" in entry],
    }  # fmt: skip
    (folder / f"facts_{RANK}.json").write_text(json.dumps(facts))
    if RANK == 0:
        torch.save({n: p.detach().clone() for n, p in now.items()}, folder / "weights.pt")


if __name__ == "__main__":
    for method, folder, resume, options in json.loads(sys.argv[2]):
        work(sys.argv[1], method, Path(folder), resume, options)
    if dist.is_initialized():  # one that ends while another still gathers aborts, and takes the connection along
        dist.barrier()
        dist.destroy_process_group()
