"""The index plan: where the active entries of a list of tensors are, as kernels want it.

Offsets are stored relative to a chunk's base, one per entry, or one per aligned run where the mask is made of runs; a
fully active tensor stores none. They take 2 bytes where chunks of 1024 entries span less than 2^16 elements (densities
above some 2%), else 4 bytes in chunks of 4096. The chunk table is described in :mod:`sparseopt._schema`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparseopt import functional
from sparseopt.reference import arena_positions

__all__ = ["CHUNK", "IndexPlan", "contiguous_rows"]

# Arena entries per chunk at most, by the dtype of the offsets: powers of two. A chunk is the unit of work of a thread
# block, and of a thread's share on the CPU.
CHUNK = {torch.int16: 1024, torch.int32: 4096}
# A chunk spans less than 2^bits elements: int16 offsets are signed, from a base in the middle.
SPAN_BITS = {torch.int16: 16, torch.int32: 31}
ROW_BYTES = 48
# Sums of squares are kept for this many entries at most each, the first for the start of a chunk.
SQUARES = 1024
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
        indices: int16 or int32 offsets, see :mod:`sparseopt._schema`.
        chunks: int64[C, 6], see :mod:`sparseopt._schema`.
        first_chunk: first row of each tensor in ``chunks``, T + 1 numbers.
        run: the longest run (8 to 64) that every chunk is made of, aligned; 1 if there is none.
    """

    numels: tuple[int, ...]
    counts: tuple[int, ...]
    starts: tuple[int, ...]
    runs: tuple[int, ...]
    indices: Tensor
    chunks: Tensor
    first_chunk: tuple[int, ...]
    run: int = 1

    @property
    def tensors(self) -> int:
        return len(self.numels)

    @property
    def active(self) -> int:
        return self.starts[-1]

    @property
    def squares_per_chunk(self) -> int:
        """Sums of squares that gathering keeps for each row of ``chunks``."""
        return CHUNK[self.indices.dtype] // SQUARES

    @property
    def nbytes(self) -> int:
        return self.indices.nbytes + self.chunks.nbytes

    def arena(self, tensor: int) -> slice:
        """The arena entries of a tensor."""
        return slice(self.starts[tensor], self.starts[tensor + 1])

    def positions(self, tensor: int) -> Tensor:
        """Sorted flat indices of a tensor's active entries, int64, on the plan's device."""
        rows = self.chunks[self.first_chunk[tensor] : self.first_chunk[tensor + 1]]
        return arena_positions(self.indices, rows, self.counts[tensor])

    def part(self, first: int, last: int) -> IndexPlan:
        """The plan of the tensors ``first .. last - 1``, whose arena begins at 0; tensors keep their numbers in ``chunks``."""
        chunks = self.chunks[self.first_chunk[first] : self.first_chunk[last]].clone()
        chunks[:, 2] -= self.starts[first]
        start, row = self.starts[first], self.first_chunk[first]
        return IndexPlan(
            self.numels[first:last], self.counts[first:last], tuple(s - start for s in self.starts[first : last + 1]),
            self.runs[first:last], self.indices, chunks, tuple(r - row for r in self.first_chunk[first : last + 1]),
            self.run,
        )  # fmt: skip

    def compact_chunks(self) -> Tensor:
        """``chunks`` for tensors that hold nothing but their active entries: the same rows, each one contiguous."""
        rows = self.chunks.clone()
        starts = torch.tensor(self.starts).to(
            rows.device, non_blocking=True
        )  # within backward: nobody waits for the device
        rows[:, 1] = rows[:, 2] - starts[rows[:, 0]]
        rows[:, 4] = 0  # offset 0
        rows[:, 5] = CHUNK[self.indices.dtype].bit_length() - 1
        return rows

    def to(self, device: torch.device) -> IndexPlan:
        if self.indices.device == device:
            return self
        fields = dict(vars(self), indices=self.indices.to(device), chunks=self.chunks.to(device))
        return IndexPlan(**fields)

    @staticmethod
    def build(packed: Sequence[Tensor | None], numels: Sequence[int]) -> IndexPlan:
        """Plan from packed masks, where they are.

        Args:
            packed: per tensor uint8[ceil(n/8)], all on one device, or None where every entry is active.
            numels: per tensor n.
        """
        device = next((mask.device for mask in packed if mask is not None), torch.device("cpu"))
        found = [None if mask is None else _runs(mask, numel) for mask, numel in zip(packed, numels, strict=True)]
        # What is fully active needs no offsets.
        found = [
            None if item is not None and numel and item[0] * item[1].numel() == numel else item
            for item, numel in zip(found, numels, strict=True)
        ]
        dtype = _offset_dtype([item for item in found if item is not None])
        offsets: list[Tensor] = [
            torch.zeros(1, dtype=dtype, device=device)
        ]  # offset 0, shared by all contiguous chunks
        rows: list[Tensor] = []
        counts, starts, runs, first_chunk = [], [0], [], [0]
        stored = 1
        for tensor, (item, numel) in enumerate(zip(found, numels, strict=True)):
            if item is None:
                run, count, table = 0, numel, contiguous_rows(numel, CHUNK[dtype], device)
            else:
                run, indices = item
                found[tensor] = None  # all tensors' indices at once take more than the plan
                count = indices.numel() * run
                table, relative = _chunked(indices, run, dtype)
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
        # Fully active tensors are whole runs of whatever divides them: kernels move runs as a whole, the last one too.
        common = min((run or math.gcd(count, 64) for run, count in zip(runs, counts, strict=True) if count), default=1)
        return IndexPlan(
            tuple(numels), tuple(counts), tuple(starts), tuple(runs), torch.cat(offsets), chunks, tuple(first_chunk),
            common if common >= 8 else 1,
        )  # fmt: skip


def _table(start: Tensor, count: Tensor) -> Tensor:
    table = torch.zeros(start.numel(), 6, dtype=torch.int64, device=start.device)
    table[:, 2], table[:, 3] = start, count
    return table


def contiguous_rows(numel: int, size: int, device: torch.device) -> Tensor:
    """Chunks of a fully active tensor: base only, one run as long as the chunk."""
    start = torch.arange(0, numel, size, device=device)
    table = _table(start, (numel - start).clamp(max=size))
    table[:, 1] = start
    table[:, 5] = size.bit_length() - 1
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


def _cuts(indices: Tensor, run: int, dtype: torch.dtype) -> Tensor:
    """Where chunks begin: every CHUNK entries, and within chunks that span too much also at multiples of the span."""
    total, per_chunk, bits = indices.numel(), CHUNK[dtype] // run, SPAN_BITS[dtype]
    cuts = torch.arange(0, total, per_chunk, device=indices.device)
    last = indices[(cuts + per_chunk).clamp(max=total) - 1].long() + (run - 1)
    wide = (last - indices[cuts].long()) >> bits != 0
    if bool(wide.any()):
        segment = indices.long() >> bits
        changes = (segment[1:] != segment[:-1]).nonzero().view(-1) + 1
        cuts = torch.cat([cuts, changes[wide[changes // per_chunk]]]).unique()
    return cuts


def _offset_dtype(found: Sequence[tuple[int, Tensor]]) -> torch.dtype:
    """int16 where it saves a fifth of the bytes, without many short chunks; else int32."""
    stored = sum(indices.numel() for _, indices in found)
    rows = {d: sum(_cuts(indices, run, d).numel() for run, indices in found) for d in CHUNK}
    nbytes = {d: d.itemsize * stored + ROW_BYTES * rows[d] for d in CHUNK}
    least = sum(-(-indices.numel() * run // CHUNK[torch.int16]) for run, indices in found)
    narrow = nbytes[torch.int16] < 0.8 * nbytes[torch.int32] and rows[torch.int16] <= 2 * least
    return torch.int16 if narrow else torch.int32


def _chunked(indices: Tensor, run: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows (with index_start and start counted from 0) and offsets for sorted first indices of runs."""
    cuts = _cuts(indices, run, dtype)
    ends = torch.cat([cuts[1:], cuts.new_full((1,), indices.numel())])[: cuts.numel()]
    table = _table(cuts * run, (ends - cuts) * run)
    base = indices[cuts].long() + (1 << 15 if dtype == torch.int16 else 0)
    table[:, 1], table[:, 4], table[:, 5] = base, cuts, run.bit_length() - 1
    bases = torch.repeat_interleave(base.to(indices.dtype), ends - cuts, output_size=indices.numel())
    return table, (indices - bases).to(dtype)
