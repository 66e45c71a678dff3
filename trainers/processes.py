"""Training on several processes, as ``torchrun`` and ``accelerate launch`` start them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import distributed as dist

from sparseopt._processes import is_first, own_device, refuse_several
from sparseopt._sharded import any_sharded, held_entries

__all__ = ["Anyone", "in_shards", "is_first", "own_device", "put_together", "refuse_several", "refuse_sharding", "several",
           "share_of", "splits_model", "told_by_first", "wait"]  # fmt: skip

T = TypeVar("T")

# What accelerate sets where it splits the model over the processes.
SPLITTING = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed ZeRO"}


def several() -> bool:
    """Whether this process trains with others."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def wait() -> None:
    """Until every process is here."""
    if several():
        dist.barrier()


def share_of(items: Sequence[T]) -> Sequence[T]:
    """The items that this process is to work on: every n-th, or all of them where there are fewer than processes."""
    if not several() or len(items) < dist.get_world_size():
        return items
    return items[dist.get_rank() :: dist.get_world_size()]


def put_together(own: torch.Tensor, count: int) -> torch.Tensor:
    """What all processes found for their :func:`share_of` ``count`` items: [..., own items] -> [..., count], on the CPU."""
    if own.shape[-1] == count:
        return own
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, own.cpu())
    whole = parts[0].new_empty(*own.shape[:-1], count)
    for rank, part in enumerate(parts):
        whole[..., rank :: len(parts)] = part
    return whole


class Anyone:
    """Whether something was the case on any process: every process learns the same, and no GPU waits for it.

    On GPUs the answer is that of the question before, which is known by then without stopping the host.
    """

    def __init__(self) -> None:
        self._before: tuple[torch.Tensor, torch.cuda.Event] | None = None

    def ask(self, here: bool, device: torch.device) -> bool:
        """Every process asks equally often, with what is the case on it."""
        if not several():
            return here
        flag = torch.tensor(int(here), device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        if device.type != "cuda":
            return bool(flag)
        before, event = self._before, torch.cuda.Event()
        host = torch.empty((), dtype=flag.dtype, pin_memory=True)
        host.copy_(flag, non_blocking=True)
        event.record()
        self._before = host, event
        if before is None:
            return False
        before[1].synchronize()
        return bool(before[0])


def _splitting() -> str | None:
    """What splits the model in this environment."""
    return next((what for name, what in SPLITTING.items() if os.environ.get(name, "").lower() in ("1", "true")), None)


def splits_model(args: Any) -> bool:
    """Whether a trainer with these arguments splits weights over processes.

    transformers' own settings say so in ``args``; a configuration of accelerate does not.
    """
    return bool(getattr(args, "fsdp", None) or getattr(args, "deepspeed", None) or _splitting())


def in_shards(args: Any, model: Any, who: str) -> bool:
    """Whether FSDP2 keeps a trainer's model in shards of rows: then all processes take part in putting it together.

    Args:
        args: of the trainer.
        model: which it trains; shards that a forward pass left whole are shards again.
        who: is named in the error.

    Raises:
        ValueError: something splits the model in another way. Every process finds that, so that none waits for another.
    """
    splits = splits_model(args)
    if splits:
        from torch.distributed.fsdp import FSDPModule

        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
    if not any_sharded(model):
        if splits:
            raise ValueError(
                f"{who} takes models in the shards of FSDP2, not of FSDP1 or DeepSpeed ZeRO: use FSDP2 (fsdp_version: 2), "
                "DDP or one GPU."
            )
        return False
    for name, param in model.named_parameters():
        held_entries(name, param)
    return True


def told_by_first(value: T) -> T:
    """What the first process says, on every process; each calls it."""
    if not several():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def refuse_sharding(allowed: str | None = None) -> None:
    """Raises ValueError under configurations of accelerate that split the model, but for an allowed one."""
    what = _splitting()
    if what is not None and what != allowed:
        raise ValueError(
            f"sparseopt train keeps the whole model on every GPU and does not run under {what}: launch it with torchrun "
            "or configs/accelerate/ddp.yaml, or use attach() in a script of your own for FSDP2."
        )
