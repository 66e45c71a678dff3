"""Rows that come from a GPU, and queries on one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sparseopt.projection.query import influence, nearest
from sparseopt.projection.store import ProjectionStore

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DIM = 3000


def metadata(dtype: str) -> dict[str, object]:
    layers = [{"name": "mlp", "type": "Linear", "original_shape": [8, 8], "k_i": 50, "k_o": 60, "slice_start": 0,
               "slice_end": DIM}]  # fmt: skip
    return {"proj_dtype": dtype, "total_proj_dim": DIM, "layers": layers, "proj_seed": 1}


def test_rows_are_those_at_the_time_of_the_call(tmp_path: Path) -> None:
    """On a stream of its own, with work queued before and the buffer overwritten after."""
    expected, stream = [], torch.cuda.Stream()
    with ProjectionStore(tmp_path, metadata("bfloat16"), shard_rows=100) as store, torch.cuda.stream(stream):
        buffer = torch.empty(64, DIM, dtype=torch.bfloat16, device="cuda")
        for i in range(20):
            torch.cuda._sleep(5_000_000)
            buffer.copy_(torch.randn(64, DIM, device="cuda"))
            keep = buffer.clone()
            store.write(range(64 * i, 64 * i + 64), buffer)
            buffer.fill_(float("nan"))
            expected.append(keep)
    torch.cuda.synchronize()
    assert ProjectionStore(tmp_path).rows(range(1280)).equal(torch.cat(expected).cpu())


def test_queries_agree_with_the_cpu(tmp_path: Path) -> None:
    stores = []
    for name, count in (("q", 70), ("b", 900)):
        with ProjectionStore(tmp_path / name, metadata("float32")) as store:
            rows = torch.randn(count, DIM)
            rows[count // 2 :] = rows[: count - count // 2]  # equal rows: ties
            store.write(range(count), rows)
        stores.append(ProjectionStore(tmp_path / name))
    for metric in ("dot", "cosine"):
        one = nearest(*stores, k=20, metric=metric, block=128)  # type: ignore[arg-type]
        other = nearest(*stores, k=20, metric=metric, block=128, device="cuda")  # type: ignore[arg-type]
        torch.testing.assert_close(one[1], other[1], rtol=1e-4, atol=1e-3)
        assert (one[0] == other[0]).float().mean() > 0.99  # scores closer than fp32 can tell may swap
        pairs = other[0][:, ::2], other[0][:, 1::2]
        assert (pairs[1] - pairs[0]).eq(450).all()  # equal rows one after the other, the smaller id first
        means = influence(*stores, metric=metric, block=128, device="cuda")[1]  # type: ignore[arg-type]
        torch.testing.assert_close(influence(*stores, metric=metric)[1], means, rtol=1e-4, atol=1e-3)  # type: ignore[arg-type]
