"""Tensors of which a process holds a part: the DTensors that FSDP2 (``fully_shard``) makes of parameters.

Other tensors count as held whole: nothing here changes them, and nothing is sent for them. What puts parts together is a
collective call: every process makes it, in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch import distributed as dist

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["any_sharded", "group_of_shards", "held_entries", "is_sharded", "like", "local", "mesh_of", "offloaded",
           "reduce_over_shards", "whole", "writes"]  # fmt: skip


def _dtensor_type() -> Any:
    # Importing it takes long: who has a DTensor has imported it.
    import sys

    module = sys.modules.get("torch.distributed.tensor")
    return None if module is None else getattr(module, "DTensor", None)


def is_sharded(param: Tensor) -> bool:
    """Whether a parameter is a DTensor."""
    if type(param) in (Tensor, torch.nn.Parameter):
        return False
    kind = _dtensor_type()
    return kind is not None and isinstance(param, kind)


def any_sharded(model: torch.nn.Module) -> bool:
    """Whether a model has a parameter that is a DTensor."""
    return any(is_sharded(param) for param in model.parameters())


def local(tensor: Any) -> Tensor:
    """What this process holds of a tensor: the tensor itself, or a DTensor's own shard."""
    return tensor._local_tensor if is_sharded(tensor) else tensor


def mesh_of(param: Any) -> DeviceMesh | None:
    return param.device_mesh if is_sharded(param) else None


def offloaded(param: Any) -> bool:
    """Whether this process keeps its part of a sharded parameter in the host's memory (``CPUOffloadPolicy``)."""
    return is_sharded(param) and param._local_tensor.device.type != param.device_mesh.device_type


def group_of_shards(param: Any) -> Any:
    """The process group over which a DTensor is split; processes of other groups hold copies."""
    from torch.distributed.tensor import Replicate

    mesh = param.device_mesh
    dims = [i for i, p in enumerate(param.placements) if not isinstance(p, Replicate)]
    return mesh.get_group(dims[0] if dims else mesh.ndim - 1)


def held_entries(name: str, param: Any) -> tuple[int, int]:
    """(begin, end) of the flat entries of a parameter that this process holds.

    Raises:
        ValueError: it is split in another way than by rows over one dimension of the mesh.
    """
    if not is_sharded(param):
        return 0, param.numel()
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    split = [p for p in param.placements if not isinstance(p, Replicate)]
    if any(type(p) is not Shard or p.dim != 0 for p in split) or len(split) > 1:
        raise ValueError(
            f"parameter {name!r} is distributed as {tuple(param.placements)}; sparseopt takes rows over one mesh "
            "dimension, (Shard(0),) or (Replicate(), Shard(0)), as fully_shard makes them."
        )
    shape, offset = compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)
    row = 1
    for size in tuple(param.shape)[1:]:
        row *= size
    count = row * shape[0] if param.dim() else 1
    begin = min(row * offset[0] if param.dim() else 0, param.numel())
    return begin, begin + count if count else begin


# ---- collective calls ----------------------------------------------------------------------------------------------------
def like(param: Any, values: Tensor) -> Tensor:
    """Values of this process' entries of a parameter as a tensor that is split as the parameter is.

    Args:
        param: a parameter.
        values: of the shape of its local part, in any dtype; themselves the result where the parameter is whole.
    """
    if not is_sharded(param):
        return values
    from torch.distributed.tensor import DTensor

    # Told the shape, it does not take for granted that all shards are as long as this one.
    return DTensor.from_local(
        _where_they_talk(values, param.device_mesh),
        param.device_mesh,
        param.placements,
        run_check=False,
        shape=param.shape,
        stride=param.stride(),
    )


@torch.no_grad()
def whole(tensor: Any) -> Tensor:
    """A tensor with all of its entries, on the device where its processes talk: every process gets it."""
    if not is_sharded(tensor):
        return tensor
    result: Tensor = like(tensor, local(tensor.detach())).full_tensor()  # type: ignore[attr-defined]
    return result


def reduce_over_shards(params: Sequence[Tensor], values: Sequence[Tensor], op: Any) -> Tensor:
    """One number for each parameter, of this process' part of it -> the same of the whole parameters: [params].

    Args:
        params: any parameters, one at least.
        values: one number on some device for each; the result is on the first one's.
        op: how they are reduced, such as ``torch.distributed.ReduceOp.SUM``.
    """
    groups: dict[Any, list[int]] = {}
    for i, param in enumerate(params):
        if is_sharded(param):
            groups.setdefault(group_of_shards(param), []).append(i)
    # Picked one by one: with a tensor of positions the host would wait for the device.
    parts = [value.to(values[0].device) for value in values]
    for group, places in groups.items():
        mesh = mesh_of(params[places[0]])
        assert mesh is not None
        together = _where_they_talk(torch.stack([parts[i] for i in places]), mesh)
        dist.all_reduce(together, op=op, group=group)
        for i, value in zip(places, together.to(parts[0].device).unbind(), strict=True):
            parts[i] = value
    return torch.stack(parts)


def _where_they_talk(tensor: Tensor, mesh: DeviceMesh) -> Tensor:
    """On the device through which the processes of a mesh talk; shards in the host's memory are not there."""
    return tensor if tensor.device.type == mesh.device_type else tensor.to(mesh.device_type)


def writes(params: Sequence[Tensor]) -> bool:
    """Whether this process writes the file of what all of them put together: the first one does."""
    return not any(is_sharded(param) for param in params) or dist.get_rank() == 0
