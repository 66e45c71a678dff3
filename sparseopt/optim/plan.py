"""The index plan: where the active entries of a list of tensors are, as kernels want it.

Offsets are stored relative to a chunk's base, one per entry, or one per aligned run where the mask is made of runs; a
fully active tensor stores none. The chunk table is described in :mod:`sparseopt._schema`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparseopt import functional
from sparseopt.reference import arena_positions

__all__ = ["CHUNK", "IndexPlan"]

# Arena entries per chunk: the unit of work of a thread block, and of a thread's share on the CPU. A power of two.
CHUNK = 4096
# Chunks never straddle these boundaries, so that offsets within a chunk fit int32 whatever the size of the tensor.
SEGMENT_BITS = 31
# Aligned runs that kernels use, longest first: 64 entries are one 64-bit word of the packed mask.
RUN_WORDS = ((64, torch.int64), (32, torch.int32), (16, torch.int16), (8, torch.uint8))


@dataclass(frozen=True)
class IndexPlan:
    """Where N active entries of T tensors are.

    Attributes:
        numels: entries of each tensor, T numbers.
        counts: active entries of each tensor, T numbers.
        starts: first arena entry of each tensor, T + 1 numbers; ``starts[T]`` is N.
        runs: length of the aligned runs that each tensor's mask is stored in (1: single entries; 0: all active).
        indices: int32 offsets, see :mod:`sparseopt._schema`.
        chunks: int64[C, 6], see :mod:`sparseopt._schema`.
        first_chunk: first row of each tensor in ``chunks``, T + 1 numbers.
    """

    numels: tuple[int, ...]
    counts: tuple[int, ...]
    starts: tuple[int, ...]
    runs: tuple[int, ...]
    indices: Tensor
    chunks: Tensor
    first_chunk: tuple[int, ...]

    @property
    def tensors(self) -> int:
        return len(self.numels)

    @property
    def active(self) -> int:
        return self.starts[-1]

    @property
    def nbytes(self) -> int:
        return self.indices.nbytes + self.chunks.nbytes

    def arena(self, tensor: int) -> slice:
        """The arena entries of a tensor."""
        return slice(self.starts[tensor], self.starts[tensor + 1])

    def positions(self, tensor: int) -> Tensor:
        """Sorted flat indices of a tensor's active entries, int64, on the plan's device."""
        rows = self.chunks[self.first_chunk[tensor] : self.first_chunk[tensor + 1]]
        return arena_positions(self.indices, rows)

    def to(self, device: torch.device) -> IndexPlan:
        if self.indices.device == device:
            return self
        fields = dict(vars(self), indices=self.indices.to(device), chunks=self.chunks.to(device))
        return IndexPlan(**fields)

    @staticmethod
    def build(packed: Sequence[Tensor | None], numels: Sequence[int]) -> IndexPlan:
        """Plan on the CPU from packed masks.

        Args:
            packed: per tensor uint8[ceil(n/8)] on the CPU, or None where every entry is active.
            numels: per tensor n.
        """
        offsets: list[Tensor] = [torch.zeros(1, dtype=torch.int32)]  # offset 0, shared by all contiguous chunks
        rows: list[Tensor] = []
        counts, starts, runs, first_chunk = [], [0], [], [0]
        stored = 1
        for tensor, (mask, numel) in enumerate(zip(packed, numels, strict=True)):
            if mask is None:
                run, count, table = 0, numel, _contiguous(numel)
            else:
                run, indices = _runs(mask, numel)
                count = indices.numel() * run
                table, relative = _chunked(indices, run)
                if count == numel:
                    run, table = 0, _contiguous(numel)
                else:
                    table[:, 4] += stored
                    offsets.append(relative)
                    stored += relative.numel()
            table[:, 0] = tensor
            table[:, 2] += starts[-1]
            rows.append(table)
            runs.append(run)
            counts.append(count)
            starts.append(starts[-1] + count)
            first_chunk.append(first_chunk[-1] + len(table))
        chunks = torch.cat(rows) if rows else torch.empty(0, 6, dtype=torch.int64)
        return IndexPlan(
            tuple(numels), tuple(counts), tuple(starts), tuple(runs), torch.cat(offsets), chunks, tuple(first_chunk)
        )


def _table(start: Tensor, count: Tensor) -> Tensor:
    table = torch.zeros(start.numel(), 6, dtype=torch.int64)
    table[:, 2], table[:, 3] = start, count
    return table


def _contiguous(numel: int) -> Tensor:
    """Chunks of a fully active tensor: base only, one run as long as the chunk."""
    start = torch.arange(0, numel, CHUNK)
    table = _table(start, (numel - start).clamp(max=CHUNK))
    table[:, 1] = start
    table[:, 5] = CHUNK.bit_length() - 1
    return table


def _runs(packed: Tensor, numel: int) -> tuple[int, Tensor]:
    """(run length, first flat index of each active run): the longest aligned runs that make up the mask."""
    if numel and _may_have_runs(packed):
        for run, word in RUN_WORDS:
            if numel % run or packed.storage_offset() % (run // 8):
                continue
            words = packed.view(word)
            full = words == (255 if word == torch.uint8 else -1)
            if torch.equal(full, words != 0):
                return run, full.nonzero().view(-1) * run
    return 1, functional.mask_indices(packed, numel)


def _may_have_runs(packed: Tensor) -> bool:
    """A cheap look at some bytes: could this be a mask of runs of 8? Spares random masks the full search."""
    sample = packed[: 1 << 16]
    return bool(((sample == 0) | (sample == 255)).all())


def _chunked(indices: Tensor, run: int) -> tuple[Tensor, Tensor]:
    """Rows (with index_start and start counted from 0) and int32 offsets for sorted first indices of runs."""
    total = indices.numel()
    per_chunk = CHUNK // run
    cuts = torch.arange(0, total, per_chunk)
    if total and int(indices[-1]) >> SEGMENT_BITS:
        boundaries = torch.arange(1, (int(indices[-1]) >> SEGMENT_BITS) + 1, dtype=torch.int64) << SEGMENT_BITS
        cuts = torch.cat([cuts, torch.searchsorted(indices.long(), boundaries)]).unique()
        cuts = cuts[cuts < total]
    ends = torch.cat([cuts[1:], torch.tensor([total])])[: cuts.numel()]
    table = _table(cuts * run, (ends - cuts) * run)
    base = indices[cuts].long()
    table[:, 1], table[:, 4], table[:, 5] = base, cuts, run.bit_length() - 1
    relative = indices - torch.repeat_interleave(base, ends - cuts).to(indices.dtype)
    return table, relative.to(torch.int32)
