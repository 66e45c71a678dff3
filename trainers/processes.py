"""Training commands on several processes, as ``torchrun`` and ``accelerate launch`` start them."""

from __future__ import annotations

import os

import torch
from torch import distributed as dist

__all__ = ["is_first", "own_device", "refuse_sharding", "wait"]


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


def refuse_sharding() -> None:
    """Raises ValueError under configurations of accelerate that split the model."""
    for variable, name in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed ZeRO")):
        if os.environ.get(variable, "false").lower() == "true":
            raise ValueError(
                f"sparseopt train keeps the whole model on every GPU and does not run under {name}: launch it with torchrun "
                "or configs/accelerate/ddp.yaml, or use attach() in a script of your own for FSDP2."
            )
