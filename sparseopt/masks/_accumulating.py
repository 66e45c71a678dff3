"""The memory of an accumulation, and one launch that adds squares to it: see :class:`sparseopt.GradientEMA`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sparseopt import functional

__all__ = ["accumulate", "by_device", "zeros_like"]


def accumulate(
    stored: list[Tensor], gradients: list[Tensor], decay: float | Tensor | None, weight: float, inverse: Tensor | None
) -> None:
    """One launch, all on one device; ``inverse`` is 0 where the step overflowed: then nothing is added."""
    device = stored[0].device
    if isinstance(decay, Tensor):
        decay = decay.to(device, torch.float32)
    functional.accumulate_squares_(
        stored, gradients, weight, decay=decay, inverse=None if inverse is None else inverse.to(device)
    )


def zeros_like(params: Sequence[Tensor], offload: bool) -> list[Tensor]:
    """fp32 zeros of the parameters' shapes, beside them or in the host's memory."""
    if not offload or not any(param.is_cuda for param in params):
        return [
            torch.zeros(param.shape, dtype=torch.float32, device="cpu" if offload else param.device) for param in params
        ]
    # Pinned, in one block: the allocator rounds every pinned block up to a power of two.
    whole = torch.zeros(sum(param.numel() for param in params), dtype=torch.float32, pin_memory=True)
    parts = whole.split([param.numel() for param in params])
    return [part.view(param.shape) for part, param in zip(parts, params, strict=True)]


def by_device(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    found: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        found.setdefault(tensor.device, []).append(tensor)
    yield from found.values()
