"""Writes the entries of a delta into live tensors: one kernel for all tensors of a device and dtype."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sparseopt import functional

__all__ = ["chunk_table", "write_entries"]

CHUNK = 4096  # entries of a chunk with int32 offsets, as in sparseopt.optim.plan
SPAN_BITS = 31  # a chunk spans less than 2^31 elements, so that int32 offsets from its base suffice


@torch.no_grad()
def write_entries(tensors: Mapping[str, Tensor], entries: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Writes values to flat (row-major) positions, bit by bit, and bumps the tensors' versions.

    Args:
        tensors: name -> the tensor to write to, on any device, of any layout.
        entries: name -> (sorted distinct indices int32 or int64 [k], values [k] in the tensor's dtype), on the CPU, within
            the tensor. Where two names share memory, the later one is written later.
    """
    groups: defaultdict[tuple[torch.device, torch.dtype], list[str]] = defaultdict(list)
    apart: list[str] = []
    for name, (indices, _) in entries.items():
        tensor = tensors[name]
        if not indices.numel():
            continue
        if tensor.is_contiguous() and tensor.dtype in functional.PARAMETER_DTYPES and tensor.device.type != "meta":
            groups[tensor.device, tensor.dtype].append(name)
        else:
            apart.append(name)
    for (device, _), names in groups.items():
        # A kernel writes its tensors in no particular order: those that overlap are written one by one.
        alone = _overlapping([tensors[name] for name in names])
        apart += [name for name, later in zip(names, alone, strict=True) if later]
        together = [name for name, later in zip(names, alone, strict=True) if not later]
        if not together:
            continue
        offsets, chunks = chunk_table([entries[name][0] for name in together])
        values = torch.cat([entries[name][1] for name in together])
        functional.scatter_values_(
            [tensors[name].detach() for name in together], values.to(device), offsets.to(device), chunks.to(device)
        )
    order = {name: place for place, name in enumerate(entries)}
    for name in sorted(apart, key=order.__getitem__):
        indices, values = entries[name]
        tensor = tensors[name]
        # By coordinates, since strides are arbitrary; put_ takes flat positions, but not in deterministic mode.
        coordinates = torch.unravel_index(indices.to(tensor.device, torch.int64), tensor.shape)
        tensor[coordinates] = values.to(tensor.device)


def chunk_table(indices: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(int32 offsets [N], chunk table int64 [C, 6]) of sorted flat indices per tensor, see :mod:`sparseopt._schema`.

    int32 indices are the offsets themselves, from base 0. int64 ones (tensors past 2^31 entries) are taken relative to
    the first of their chunk, and chunks that would span too much are cut at multiples of the span.
    """
    offsets: list[Tensor] = [torch.empty(0, dtype=torch.int32)]
    rows: list[Tensor] = [torch.empty(0, 6, dtype=torch.int64)]
    first = 0
    for tensor, positions in enumerate(indices):
        count = positions.numel()
        cuts = torch.arange(0, count, CHUNK)
        if positions.dtype == torch.int64 and count:
            segment = positions >> SPAN_BITS
            cuts = torch.cat([cuts, (segment[1:] != segment[:-1]).nonzero().view(-1) + 1]).unique()
        sizes = torch.cat([cuts[1:], torch.tensor([count])])[: cuts.numel()] - cuts
        table = torch.zeros(cuts.numel(), 6, dtype=torch.int64)
        table[:, 0], table[:, 2], table[:, 3], table[:, 4] = tensor, first + cuts, sizes, first + cuts
        if positions.dtype == torch.int64 and count:
            table[:, 1] = positions[cuts]
            positions = positions - torch.repeat_interleave(table[:, 1], sizes)
        offsets.append(positions.to(torch.int32))
        rows.append(table)
        first += count
    return torch.cat(offsets), torch.cat(rows)


def _overlapping(tensors: Sequence[Tensor]) -> list[bool]:
    """Per contiguous tensor: does its memory overlap another's (tied parameters, views)?"""
    result = [False] * len(tensors)
    spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes, i) for i, t in enumerate(tensors) if t.numel())
    end, cluster = 0, -1
    for begin, stop, i in spans:
        if begin < end:
            result[cluster] = result[i] = True
        end, cluster = max(end, stop), i
    return result
