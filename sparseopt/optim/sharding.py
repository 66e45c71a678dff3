"""Parameters of which a process holds a shard (FSDP2): which part of a mask and of the state belongs to it.

``fully_shard`` makes parameters DTensors with placement ``Shard(0)``: a process holds consecutive rows, so a range of flat
indices, so a range of the sorted active entries. A range may be empty, and ranges differ in length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch import distributed as dist

from sparseopt import functional
from sparseopt._sharded import group_of_shards, held_entries, is_sharded

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from sparseopt.optim.arena import Saved
    from sparseopt.optim.sparse_adamw import SparseAdamW

__all__ = [
    "Region",
    "count_of",
    "cut_state",
    "group_of",
    "refuse",
    "region_of",
    "settle",
    "slice_bits",
    "sum_over_shards",
]


@dataclass(frozen=True)
class Region:
    """Which flat entries of a parameter a process holds.

    Attributes:
        begin, end: the range.
        numel: entries of the whole parameter.
        first, active: how many active entries come before the range, and how many the whole parameter has.
        tail: the byte of the whole packed mask that holds bit ``end - 1``, whose later bits are another process' (0 if the
            range is empty).
    """

    begin: int
    end: int
    numel: int
    first: int = 0
    active: int = 0
    tail: int = 0

    @property
    def byte_range(self) -> tuple[int, int]:
        """Bytes of the whole packed mask that are this process' to write: those whose first bit is in the range."""
        return -(-self.begin // 8), max(-(-self.end // 8), -(-self.begin // 8))

    def of_mask(self, packed: Tensor | None) -> tuple[Region, Tensor | None]:
        """(the region with what it needs to know of the mask, its part of the mask) from the whole packed mask."""
        if packed is None:
            return Region(self.begin, self.end, self.numel, self.begin, self.numel, 255), None
        before = slice_bits(packed, 0, self.begin)
        region = Region(
            self.begin, self.end, self.numel, int(functional.popcount(before)), int(functional.popcount(packed)),
            int(packed[(self.end - 1) // 8]) if self.end > self.begin else 0,
        )  # fmt: skip
        return region, slice_bits(packed, self.begin, self.end)

    def mask_bytes(self, bits: Tensor) -> Tensor:
        """This process' bytes of the whole packed mask, from its part (packed from its own first bit on)."""
        first, last = self.byte_range
        if first == last:
            return bits[:0].clone()
        shift = 8 * first - self.begin
        result = slice_bits(bits, shift, self.end - self.begin)
        result[-1] = self.tail
        return result


def slice_bits(packed: Tensor, begin: int, end: int) -> Tensor:
    """Bits ``begin .. end - 1`` of a packed mask, packed anew."""
    if end <= begin:
        return packed[:0].clone()
    if begin % 8 == 0:
        result = packed[begin // 8 : -(-end // 8)].clone()
        if end % 8:
            result[-1] &= (1 << (end % 8)) - 1
        return result
    first = begin // 8
    piece = functional.unpack_mask(packed[first : -(-end // 8)].clone(), (end - 8 * first,))
    return functional.pack_mask(piece[begin - 8 * first :].clone())


def region_of(name: str, param: Any) -> Region | None:
    """The range of a sharded parameter; None for a whole one.

    Raises:
        ValueError: it is split in another way than by rows over one dimension of the mesh.
    """
    if not is_sharded(param):
        return None
    return Region(*held_entries(name, param), param.numel())


def refuse(optimizer: SparseAdamW, what: str) -> None:
    """Raises RuntimeError where parameters are sharded."""
    if optimizer.sharded:
        raise RuntimeError(f"{what} does not work on sharded parameters (FSDP2): use DDP or one GPU.")


def group_of(optimizer: SparseAdamW) -> Any:
    """The process group over which the optimizer's sharded parameters are split.

    Raises:
        ValueError: several groups.
    """
    groups = {group_of_shards(p) for g in optimizer.param_groups for p in g["params"] if is_sharded(p)}
    if len(groups) != 1:
        raise ValueError(f"SparseAdamW takes parameters that are sharded over one process group, got {len(groups)}.")
    return groups.pop()


def sum_over_shards(optimizer: SparseAdamW, mesh: DeviceMesh, squares: Tensor) -> Tensor:
    """Adds sums of squares up, over this process' entries and then over the processes: fp64[1]."""
    total = squares.sum(dtype=torch.float64).reshape(1)
    device = total.device
    if device.type != mesh.device_type:  # parameters offloaded to the CPU; their group talks between GPUs
        total = total.to(mesh.device_type)
    dist.all_reduce(total, group=group_of(optimizer))
    return total.to(device)


# ---- following fully_shard -----------------------------------------------------------------------------------------------
def settle(optimizer: SparseAdamW) -> None:
    """Cuts masks and state of parameters that became sharded down to this process' part, and remembers the parts.

    Raises:
        RuntimeError: a parameter was flattened or partitioned by something else, or is sharded in another way than before.
    """
    changed: list[tuple[str, Region]] = []
    for name, param, _ in optimizer._layout():
        if tuple(param.shape) != optimizer._shapes.setdefault(name, tuple(param.shape)):
            raise RuntimeError(
                f"parameter {name!r} had shape {optimizer._shapes[name]} when SparseAdamW was made and now has "
                f"{tuple(param.shape)}: SparseAdamW runs under DDP and FSDP2 (fully_shard), not under DeepSpeed ZeRO, which "
                "owns the optimizer, nor FSDP1, which flattens parameters."
            )
        region, known = region_of(name, param), optimizer._regions.get(name)
        if region is not None and (known is None or (known.begin, known.end) != (region.begin, region.end)):
            if known is not None:
                raise RuntimeError(
                    f"parameter {name!r} was sharded again while it was trained: save with torch.distributed.checkpoint, "
                    "and load after sharding."
                )
            changed.append((name, region))
    if not changed:
        return
    from sparseopt.optim.checkpoint import fingerprint

    optimizer._whole_fingerprint = fingerprint(optimizer)  # of whole masks, which no process has any more after this
    masks, states = optimizer._current_masks(), {**optimizer._extract(), **optimizer._saved}
    for name, bounds in changed:
        region, part = bounds.of_mask(masks[name])
        optimizer._regions[name], optimizer._masks[name] = region, part
        optimizer._known.pop(name, None)
        if name in states:
            optimizer._saved[name] = cut_state(states[name], region, part)
    optimizer._dirty = True


def count_of(region: Region, part: Tensor | None) -> int:
    """Active entries of this process' part."""
    return region.end - region.begin if part is None else int(functional.popcount(part))


def cut_state(saved: Saved, region: Region, part: Tensor | None) -> Saved:
    """This process' entries of the state of a whole parameter."""
    from sparseopt.optim.arena import Arena

    entries = slice(region.first, region.first + count_of(region, part))
    values = {k: v.reshape(-1)[entries].clone() if k in Arena.PER_ENTRY else v for k, v in saved.values.items()}
    return type(saved)(values)
