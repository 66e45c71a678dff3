"""A process' range of a vector that is distributed unevenly, as torch.distributed.checkpoint saves and loads it.

The compact state of a sharded parameter is a vector over the active entries of the whole parameter, in the order of their
flat indices; a process holds one range of it. DTensor knows even splits only, so chunks tell the checkpoint planner about
themselves. A checkpoint then holds whole vectors: any number of processes, or one, loads the ranges that it needs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["Chunk"]

# What keeps the range; everything else gives ordinary tensors.
KEEPS = {Tensor.detach, Tensor.clone, Tensor.to, Tensor.cpu, Tensor.cuda, Tensor.contiguous}


class Chunk(Tensor):
    """Entries ``offset ..`` of a vector of ``total``; shares memory with the tensor that it is made of."""

    offset: int
    total: int

    @staticmethod
    def of(part: Tensor, offset: int, total: int) -> Chunk:
        chunk: Any = torch.Tensor._make_subclass(Chunk, part.detach())
        chunk.offset, chunk.total = offset, total
        return chunk

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        if func in KEEPS and isinstance(args[0], Chunk):
            return Chunk.of(result, args[0].offset, args[0].total)
        return result

    def plain(self) -> Tensor:
        """The same memory as an ordinary tensor."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(Tensor)

    def __deepcopy__(self, memo: Any) -> Chunk:
        return Chunk.of(self.plain().clone(), self.offset, self.total)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise RuntimeError(
            "the optimizer state of a sharded model is one part per process and cannot be pickled: save it with "
            "torch.distributed.checkpoint (fsdp_state_dict_type: SHARDED_STATE_DICT in accelerate), or save what "
            "SparseAdamW.full_state_dict() returns."
        )

    # ---- the protocol of torch.distributed.checkpoint ----------------------------------------------------------------
    def size(self, dim: int | None = None) -> Any:
        """Of the whole vector, as a DTensor says it too: the planner compares it with the checkpoint's."""
        return torch.Size([self.total]) if dim is None else self.total

    def _chunk_metadata(self) -> Any:
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

        return ChunkStorageMetadata(offsets=torch.Size([self.offset]), sizes=torch.Size([self.numel()]))

    def __create_write_items__(self, fqn: str, object: Any) -> list[Any]:
        from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
        from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

        if not self.numel() and self.total:
            return []
        data = TensorWriteData(
            chunk=self._chunk_metadata(), properties=TensorProperties.create_from_tensor(self.plain()),
            size=torch.Size([self.total]),
        )  # fmt: skip
        return [WriteItem(MetadataIndex(fqn, torch.Size([self.offset])), WriteItemType.SHARD, tensor_data=data)]

    def __create_chunk_list__(self) -> list[Any]:
        return [self._chunk_metadata()] if self.numel() else []

    def __get_tensor_shard__(self, index: Any) -> Tensor:
        return self.plain()
