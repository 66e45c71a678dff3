"""Settings of ``sparseopt train lm``: what makes no sense, and what they mean to transformers."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import socket
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

__all__ = ["check", "deepspeed_of", "split_batch", "training_arguments"]

Config = dict[str, dict[str, Any]]
# Renamed in transformers 5.2x; the old name warns there.
_CHECKPOINTING = next(
    field.name for field in dataclasses.fields(TrainingArguments)
    if field.name in ("activation_checkpointing", "gradient_checkpointing")
)  # fmt: skip
# What is counted, and the least that makes sense.
LEAST = {
    "model": {"context_length": 2},
    "training": {
        "batch_size": 1, "max_gpu_batch_size": 1, "eval_batch_size": 1, "gradient_accumulation_steps": 1, "max_steps": 1,
        "warmup_steps": 0, "save_steps": 0, "eval_steps": 0, "logging_steps": 1,
    },
    "checkpoints": {"keep_last": 1, "keep_best": 1, "keep_every": 1},
}  # fmt: skip


def split_batch(batch: int, most: int) -> tuple[int, int]:
    """(size, number) of the micro-batches of a batch: the largest size up to ``most`` that divides it."""
    size = max(size for size in range(1, min(batch, most) + 1) if batch % size == 0)
    return size, batch // size


def check(settings: Config) -> None:
    """Finds wrong values before anything is loaded."""
    for section, keys in LEAST.items():
        for key, low in keys.items():
            value = settings[section][key]
            if value is not None and value < low:
                raise ValueError(f"{section}.{key} must be at least {low}, got {value}.")
    training, optimizer, checkpoints = (settings[key] for key in ("training", "optimizer", "checkpoints"))
    if training["max_steps"] is None and not training["num_epochs"] > 0:
        raise ValueError(f"training.num_epochs must be more than 0, got {training['num_epochs']}.")
    if len(optimizer["betas"]) != 2:
        raise ValueError(f"optimizer.betas must be two numbers, got {optimizer['betas']}.")
    if optimizer["name"] == "adamw" and optimizer["mask"] is not None:
        raise ValueError("optimizer.mask needs the optimizer sparse_adamw: leave out optimizer.name.")
    if optimizer["capture_gradients"] and checkpoints["gradients"]:
        raise ValueError(
            "optimizer.capture_gradients frees the gradients that checkpoints.gradients saves: turn one of them off."
        )
    if checkpoints["micro_gradients"] and not checkpoints["gradients"]:
        raise ValueError("checkpoints.micro_gradients needs checkpoints.gradients.")


def deepspeed_of(value: Any, settings: Config) -> str | dict[str, Any] | None:
    """The configuration of DeepSpeed, a file or a dict; None: without.

    Raises:
        ValueError: something else, or together with SparseAdamW.
        ImportError: DeepSpeed is not installed.
    """
    if value is None:
        return None
    if not isinstance(value, (str, dict)):
        raise ValueError(f"deepspeed must be a file or a dict for DeepSpeed, got {value!r}.")
    optimizer = settings["optimizer"]
    if optimizer["mask"] is not None or optimizer["name"] == "sparse_adamw" or not settings["training"]["correct_bias"]:
        what = "training.correct_bias false is SparseAdamW's, and " if not settings["training"]["correct_bias"] else ""
        raise ValueError(
            f"{what}SparseAdamW does not run under DeepSpeed, which owns the optimizer: leave out one of them."
        )
    if settings["checkpoints"]["micro_gradients"]:
        raise ValueError("checkpoints.micro_gradients: DeepSpeed has no gradients of single micro-batches.")
    if isinstance(value, str) and not Path(value).is_file():
        raise FileNotFoundError(f"deepspeed: there is no file {value!r}.")
    if importlib.util.find_spec("deepspeed") is None:
        raise ImportError(
            "DeepSpeed is not installed; it belongs to the extra 'deepspeed': pip install 'sparseopt[deepspeed]'."
        )
    return value


def training_arguments(
    settings: Config, folder: Path, device: torch.device, micro: int, accumulation: int,
    deepspeed: str | dict[str, Any] | None,
) -> TrainingArguments:  # fmt: skip
    """transformers' arguments; makes this process one of a group where it was started as such.

    Args:
        settings: the sections of :data:`sparseopt.schemas.LM`.
        folder: of the runs; the run's own is set when it has one.
        device: CPU or CUDA.
        micro, accumulation: sequences of a micro-batch, and how many of these make a step.
        deepspeed: as :func:`deepspeed_of` gives it.
    """
    training, optimizer, names = (settings[key] for key in ("training", "optimizer", "tracking"))
    if deepspeed is not None:
        _single_process_environment()
    every, evaluated = training["save_steps"], training["eval_steps"]
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=micro,
        per_device_eval_batch_size=training["eval_batch_size"],
        gradient_accumulation_steps=accumulation,
        num_train_epochs=training["num_epochs"],
        max_steps=training["max_steps"] or -1,
        learning_rate=training["learning_rate"],
        adam_beta1=optimizer["betas"][0],
        adam_beta2=optimizer["betas"][1],
        adam_epsilon=optimizer["eps"],
        weight_decay=optimizer["weight_decay"],
        max_grad_norm=optimizer["max_grad_norm"],
        optim="adamw_torch_fused" if deepspeed is None else "adamw_torch",
        lr_scheduler_type=training["scheduler"],
        warmup_steps=training["warmup_steps"],
        logging_steps=training["logging_steps"],
        logging_nan_inf_filter=False,
        save_strategy="steps" if every else "no",
        save_steps=every or 1,
        eval_strategy="steps",
        eval_steps=evaluated or sys.maxsize,  # the end is always evaluated
        seed=training["seed"],
        bf16=training["precision"] == "bf16",
        fp16=training["precision"] == "fp16",
        prediction_loss_only=True,
        remove_unused_columns=False,
        report_to=names["report_to"] or [],
        run_name=names["run_name"] or settings["run"]["name"],
        disable_tqdm=True,
        use_cpu=device.type == "cpu",
        ddp_find_unused_parameters=False,
        deepspeed=deepspeed,
        **{_CHECKPOINTING: training["gradient_checkpointing"]},
    )
    if arguments.parallel_mode.value == "not_distributed" and arguments.n_gpu > 1:
        arguments._n_gpu = 1  # several GPUs are for several processes (torchrun), not for one with DataParallel
    if arguments.world_size > 1 and settings["checkpoints"]["micro_gradients"]:
        raise ValueError("checkpoints.micro_gradients are those of one process: turn them off, or train with one.")
    return arguments


def _single_process_environment() -> None:
    """DeepSpeed asks a launcher's variables; without a launcher this is the one process."""
    if "RANK" in os.environ:
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    single = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(single)
