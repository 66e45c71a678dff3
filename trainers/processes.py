"""Training on several processes, as ``torchrun`` and ``accelerate launch`` start them."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import distributed as dist

__all__ = ["is_first", "own_device", "refuse_sharding", "splits_model", "wait"]

# What accelerate sets where it splits the model over the processes.
SPLITTING = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed ZeRO"}


def is_first() -> bool:
    """Whether this process writes files and talks: rank 0, or the only one."""
    return int(os.environ.get("RANK", "0")) == 0


def own_device(asked: str) -> str:
    """The GPU of this process where there are several processes and ``asked`` is any GPU, else what was asked for."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or asked not in ("auto", "cuda") or not torch.cuda.is_available():
        return asked
    index = int(os.environ.get("LOCAL_RANK", "0"))
    torch.cuda.set_device(index)
    return f"cuda:{index}"


def wait() -> None:
    """Until every process is here."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def _splitting() -> str | None:
    """What splits the model in this environment."""
    return next((what for name, what in SPLITTING.items() if os.environ.get(name, "").lower() in ("1", "true")), None)


def splits_model(args: Any) -> bool:
    """Whether a trainer with these arguments splits weights over processes.

    transformers' own settings say so in ``args``; a configuration of accelerate does not.
    """
    return bool(getattr(args, "fsdp", None) or getattr(args, "deepspeed", None) or _splitting())


def refuse_sharding() -> None:
    """Raises ValueError under configurations of accelerate that split the model."""
    what = _splitting()
    if what is not None:
        raise ValueError(
            f"sparseopt train keeps the whole model on every GPU and does not run under {what}: launch it with torchrun "
            "or configs/accelerate/ddp.yaml, or use attach() in a script of your own for FSDP2."
        )
