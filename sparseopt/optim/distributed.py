"""SparseAdamW on several processes that each hold the whole model: one reduction of the captured gradients per step.

DistributedDataParallel (DDP) averages dense gradients in buckets. With ``capture_gradients=True`` only active entries are
of use: captured parameters are left out of DDP's buckets, whose memory is freed, every process captures its own gradients,
over as many micro-batches as it likes, and :func:`reduce_gradients` averages the compact buffers at the step. That needs
no ``no_sync()``, comes before the norm and the test for overflow, and moves (density x 4 or 2 bytes) per entry. A DDP
communication hook would save the same traffic, but neither the dense gradients nor their buckets.

Without capture DDP works as with any optimizer: the averaged dense gradients are masked by the step.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from sparseopt._sharded import is_sharded
from sparseopt.optim import sharding

if TYPE_CHECKING:
    from sparseopt.optim.arena import Arena
    from sparseopt.optim.sparse_adamw import SparseAdamW

__all__ = [
    "broadcast_parameters",
    "check_agreement",
    "forget_left_out",
    "leave_out_of_ddp",
    "reduce_gradients",
    "release_from_ddp",
    "several_processes",
    "wrapper_of",
]

BROADCAST_BYTES = 250 * 2**20
IGNORED = "_ddp_params_and_buffers_to_ignore"  # where DDP looks for names, on the module that it is given


def several_processes(optimizer: SparseAdamW | None = None) -> bool:
    """Whether torch.distributed runs with more than one process in the optimizer's group."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    return dist.get_world_size(None if optimizer is None else optimizer.process_group) > 1


def plain_parameters(optimizer: SparseAdamW) -> list[Tensor]:
    """Parameters that every process holds as a whole."""
    return [p for group in optimizer.param_groups for p in group["params"] if not is_sharded(p)]


# ---- finding and changing DDP --------------------------------------------------------------------------------------------
def wrapper_of(params: Sequence[Tensor]) -> DistributedDataParallel | None:
    """The DDP instance that reduces gradients of these parameters, of more than the one that it always keeps.

    Parameters do not know their modules, and modules not their wrappers: Python's garbage collector knows them all.

    Raises:
        RuntimeError: they belong to a wrapper of FSDP1, which flattens parameters.
    """
    wanted = {id(p) for p in params}
    found = None
    for thing in gc.get_objects():
        kind = type(thing)
        if issubclass(kind, DistributedDataParallel):
            if sum(id(p) in wanted for p in _reduced(thing)) > 1:
                found = thing
        elif kind.__name__ == "FullyShardedDataParallel" and any(id(p) in wanted for p in thing.parameters()):
            raise RuntimeError(
                "SparseAdamW does not run under FSDP1 (FullyShardedDataParallel), which flattens parameters: use FSDP2 "
                "(torch.distributed.fsdp.fully_shard, fsdp_version: 2 in accelerate)."
            )
    return found


def _reduced(ddp: DistributedDataParallel) -> list[nn.Parameter]:
    # An instance under construction has no module yet.
    if "module" not in getattr(ddp, "_modules", {}) or not hasattr(ddp, "parameters_to_ignore"):
        return []
    ignored = ddp.parameters_to_ignore
    return [p for n, p in ddp.module.named_parameters() if p.requires_grad and n not in ignored]


def _names_to_ignore(module: nn.Module, optimizer: SparseAdamW) -> set[str]:
    """The names of the optimizer's parameters as DDP compares them; one stays if nothing else would: DDP needs one.

    The one that stays, the smallest, is captured like the others before DDP sees its gradient: DDP then reduces zeros. They
    may overwrite what was captured (``gradient_as_bucket_view`` puts gradients into DDP's own memory), so that must not wait.
    """
    chosen = {id(p) for p in plain_parameters(optimizer)}
    trained = [p for p in module.parameters() if p.requires_grad]
    if trained and all(id(p) in chosen for p in trained):
        stays = min(trained, key=lambda p: p.numel())
        chosen.discard(id(stays))
        if optimizer._capture is not None:
            optimizer._capture.gather_at_once(stays)
    # Tied weights have several names; DDP writes the name of a parameter of the outermost module with a leading dot.
    names = {n for n, p in module.named_parameters(remove_duplicate=False) if id(p) in chosen}
    return names | {f".{n}" for n in names if "." not in n}


def leave_out_of_ddp(model: nn.Module, optimizer: SparseAdamW) -> None:
    """Makes a later ``DistributedDataParallel(model)`` ignore what the optimizer captures, its first broadcast included."""
    names = _names_to_ignore(model, optimizer)
    setattr(model, IGNORED, sorted(names | set(getattr(model, IGNORED, ()))))


def forget_left_out(model: nn.Module) -> None:
    """Undoes :func:`leave_out_of_ddp`."""
    if hasattr(model, IGNORED):
        delattr(model, IGNORED)


def release_from_ddp(optimizer: SparseAdamW, ddp: DistributedDataParallel) -> None:
    """Takes the optimizer's parameters out of the buckets of a DDP instance, between two backward passes.

    Raises:
        RuntimeError: this release of torch builds its buckets in another way.
    """
    builders = ("_build_params_for_reducer", "_build_debug_param_to_name_mapping", "_ddp_init_helper")
    if not all(hasattr(ddp, name) for name in builders):
        raise RuntimeError(
            "SparseAdamW(capture_gradients=True) cannot change the buckets of this torch release's "
            "DistributedDataParallel: make the optimizer first and leave the model unwrapped, or set capture_gradients=False."
        )
    ddp.parameters_to_ignore = set(ddp.parameters_to_ignore) | _names_to_ignore(ddp.module, optimizer)
    kept: Any = ddp
    kept._module_parameters = [p for n, p in ddp.module.named_parameters() if n not in ddp.parameters_to_ignore]
    parameters, sparse = kept._build_params_for_reducer()
    mapping = kept._build_debug_param_to_name_mapping(parameters)
    kept._ddp_init_helper(parameters, sparse, mapping, ddp.static_graph)  # the old reducer takes its hooks along
    if ddp.static_graph:
        kept.reducer._set_static_graph()
        kept.logger._set_static_graph()
    hooks, kept._comm_hooks = getattr(ddp, "_comm_hooks", []), []
    for hook, state in hooks:
        ddp.register_comm_hook(state, hook)


# ---- agreement -----------------------------------------------------------------------------------------------------------
@torch.no_grad()
def broadcast_parameters(optimizer: SparseAdamW) -> None:
    """Gives every process the parameters of the group's first one (not those that are sharded)."""
    group = optimizer.process_group or dist.group.WORLD
    params = [p.detach() for p in plain_parameters(optimizer)]
    if not params or group is None:
        return
    by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for param in params:
        by_kind.setdefault((param.device, param.dtype), []).append(param)
    for members in by_kind.values():
        dist._broadcast_coalesced(group, members, BROADCAST_BYTES, 0)


def _digest(params: Sequence[Tensor]) -> list[int]:
    """A sum over the bits of each parameter: different weights give different sums, but for a coincidence."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = [p.detach().contiguous().view(-1).view(integer[p.element_size()]).sum(dtype=torch.int64) for p in params]
    return [] if not sums else torch.stack([s.to(sums[0].device) for s in sums]).tolist()


@torch.no_grad()
def check_agreement(optimizer: SparseAdamW) -> None:
    """Before the first step under new masks: every process has the same masks and, where nobody else sees to it, weights.

    Raises:
        RuntimeError: they differ, on every process.
    """
    from sparseopt.optim.checkpoint import fingerprint

    if not several_processes(optimizer):
        return
    plain = plain_parameters(optimizer)
    sharded = optimizer.sharded
    if not sharded and optimizer._capture is None and wrapper_of(plain) is None:
        return  # processes that train models of their own
    group = sharding.group_of(optimizer) if sharded else optimizer.process_group
    weights = _digest(plain) if optimizer._capture is not None else []
    mine = (fingerprint(optimizer), optimizer._capture is not None, weights)
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    for rank, other in enumerate(everyone):
        if other[0] != everyone[0][0]:
            raise RuntimeError(
                f"the masks differ between processes: rank 0 has fingerprint {everyone[0][0][:12]}, rank {rank} has "
                f"{other[0][:12]}; load the same mask file on every rank."
            )
        if other[1] != everyone[0][1]:
            raise RuntimeError(
                f"capture_gradients is {everyone[0][1]} on rank 0 and {other[1]} on rank {rank}: give every rank the same."
            )
        if other[2] != everyone[0][2]:
            names = [name for name, param, _ in optimizer._layout() if not is_sharded(param)]
            first = next(i for i, (a, b) in enumerate(zip(everyone[0][2], other[2], strict=True)) if a != b)
            raise RuntimeError(
                f"the weights differ between rank 0 and rank {rank} (parameter {names[first]!r}): wrap the model in "
                "DistributedDataParallel, or load the same weights on every rank, before training."
            )


# ---- the reduction -------------------------------------------------------------------------------------------------------
def reduce_gradients(optimizer: SparseAdamW, arena: Arena, present: list[bool]) -> list[bool]:
    """Averages an arena's compact gradients over the processes.

    A tensor that has a gradient on some processes only counts as zero on the others; only there the host waits, to learn
    which tensors those are.

    Returns:
        which tensors have a gradient on any process.
    """
    group = optimizer.process_group
    world = dist.get_world_size(group)
    buffer, plan = arena.gradient_buffer(), arena.plan
    for tensor, here in enumerate(present):
        if not here:
            buffer[plan.arena(tensor)] = 0
    buffer /= world
    wire: torch.dtype = optimizer._options["reduce_dtype"]
    sent = buffer if arena.state_dtype == torch.float64 else buffer.to(wire)
    if sent.numel():
        dist.all_reduce(sent, group=group)
        if sent is not buffer:
            buffer.copy_(sent)
    flags = torch.tensor(present, dtype=torch.uint8, device=arena.device)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=group)
    # The sums of squares that gathering kept are of this process' own gradients.
    arena.squares.zero_()
    if optimizer.max_grad_norm is not None and buffer.numel():
        arena.squares[0] = torch.linalg.vector_norm(buffer, dtype=torch.float64).square()
    return present if all(present) else flags.bool().tolist()
