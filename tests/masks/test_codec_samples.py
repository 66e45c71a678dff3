"""What samples of a large mask decide: dense random masks are stored raw at once, others as before."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparseopt import functional
from sparseopt.masks import codec

N = 1 << 23  # above what is tried without samples


def stored_as(mask: Tensor) -> tuple[int, float]:
    """(kind, bytes against raw) of a mask, after decoding it again."""
    bits = functional.pack_mask(mask)
    stored = codec.encode(bits, mask.numel())
    again = torch.zeros_like(bits)
    codec.decode_(stored, again, mask.numel())
    assert torch.equal(again, bits)
    return int(stored[0]), stored.numel() / bits.numel()


@pytest.mark.parametrize("density", [0.42, 0.5, 0.58])
def test_dense_random_masks_are_raw_without_trying(density: float, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    encode_mask, decode_mask = codec._rice_functions()

    def noted(packed: codec.Bytes, n: int, limit: int) -> bytes:
        sizes.append(n)
        return encode_mask(packed, n, limit)

    monkeypatch.setattr(codec, "_rice_functions", lambda: (noted, decode_mask))
    assert stored_as(torch.rand(N) < density)[0] == codec.RAW
    assert sum(sizes) <= N // 8


@pytest.mark.parametrize(("density", "share"), [(0.025, 0.18), (0.3, 0.91), (0.7, 0.91), (0.975, 0.18)])
def test_others_are_coded_as_before(density: float, share: float) -> None:
    kind, size = stored_as(torch.rand(N) < density)
    assert kind == codec.RICE
    assert size < share


def test_structure_is_found_in_dense_masks() -> None:
    half = torch.arange(N) < N // 2
    for mask, kind, share in (
        (half, codec.RICE, 1e-4),
        (half & (torch.rand(N) < 0.5), codec.RICE, 1.01),  # dense in one half: tried, and raw is as good
        (torch.rand(N // 896 + 1).lt(0.5).repeat_interleave(896)[:N], codec.RICE, 0.01),
        (torch.rand(N // 32).lt(0.5).repeat_interleave(32), codec.RICE, 0.05),
        (torch.rand(1024).lt(0.5).repeat(N // 1024), codec.ZLIB, 0.02),  # whole columns
        (torch.rand(N // 4, 4).argsort(1).lt(2).reshape(-1), codec.ZLIB, 0.85),  # 2:4
    ):
        found, size = stored_as(mask)
        assert size < share
        assert found == kind or size > 0.5
