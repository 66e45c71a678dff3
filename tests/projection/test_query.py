"""nearest and influence against whole matrices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparseopt.projection.query import influence, nearest
from sparseopt.projection.store import ProjectionStore


def layer(name: str, start: int, k_i: int = 2, k_o: int = 4, **changes: Any) -> dict[str, Any]:
    return {"name": name, "type": "Linear", "original_shape": [8, 8], "k_i": k_i, "k_o": k_o, "d_in": 8, "d_out": 8,
            "input_key": name, "output_key": name, "slice_start": start, "slice_end": start + k_i * k_o, **changes}  # fmt: skip


LAYERS = [layer("h.0.mlp.up", 0), layer("h.0.self_attn.q", 8), layer("h.1.mlp.up", 16), layer("h.10.mlp.up", 24)]


def metadata(layers: list[dict[str, Any]] = LAYERS, **changes: Any) -> dict[str, Any]:
    return {"proj_seed": 42, "proj_method": "gaussian", "proj_dtype": "float32", "layers": layers, "sketch": None,
            "total_proj_dim": layers[-1]["slice_end"], **changes}  # fmt: skip


def filled(path: Path, rows: Tensor, ids: Tensor | None = None, **changes: Any) -> ProjectionStore:
    dtype = str(rows.dtype).removeprefix("torch.")
    with ProjectionStore(path, metadata(**{"proj_dtype": dtype, **changes}), shard_rows=32) as store:
        store.write(torch.arange(len(rows)) if ids is None else ids, rows)
    return ProjectionStore(path)


def expected(query: Tensor, base: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """By sorting everything by (-score, id), in float64."""
    scores = query.double() @ base.double().T
    chosen = [sorted(range(len(ids)), key=lambda j: (-row[j], ids[j]))[:k] for row in scores.tolist()]
    places = torch.tensor(chosen)
    return ids[places], scores.gather(1, places).float()


@pytest.mark.parametrize("block", [7, 64, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dot(tmp_path: Path, block: int, dtype: torch.dtype) -> None:
    query, base = torch.randn(20, 32).to(dtype), torch.randn(150, 32).to(dtype)
    ids = torch.randperm(1000)[:150].sort().values
    q, b = filled(tmp_path / "q", query), filled(tmp_path / "b", base, ids)
    found, scores = nearest(q, b, k=5, block=block)
    wanted, values = expected(query, base, ids, 5)
    assert (found.dtype, found.shape, scores.dtype) == (torch.int64, (20, 5), torch.float32)
    assert found.equal(wanted)
    torch.testing.assert_close(scores, values)
    where, means = influence(q, b, block=block)
    assert where.equal(ids)
    torch.testing.assert_close(means, (query.double() @ base.double().T).mean(0).float(), atol=1e-5, rtol=1e-5)


def test_cosine(tmp_path: Path) -> None:
    query, base = torch.randn(9, 32), torch.randn(50, 32) * torch.logspace(-9, 9, 50)[:, None]
    base[3] = 0
    q, b = filled(tmp_path / "q", query), filled(tmp_path / "b", base)

    def unit(rows: Tensor) -> Tensor:
        return torch.nn.functional.normalize(rows.double(), dim=1, eps=1e-300)

    found, scores = nearest(q, b, k=50, metric="cosine", block=8)
    wanted, values = expected(unit(query), unit(base), torch.arange(50), 50)
    assert found.equal(wanted)
    torch.testing.assert_close(scores, values, atol=1e-6, rtol=1e-5)
    assert scores[found == 3].eq(0).all()
    means = influence(q, b, metric="cosine", block=8)[1]
    torch.testing.assert_close(means, (unit(query) @ unit(base).T).mean(0).float(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("block", [3, 10, 64, 500])
def test_ties_go_to_the_smaller_id(tmp_path: Path, block: int) -> None:
    patterns = torch.randn(3, 32)
    kinds = torch.randint(3, (400,))
    base = patterns[kinds]  # every score occurs more than a hundred times
    b = filled(tmp_path / "b", base)
    q = filled(tmp_path / "q", torch.randn(11, 32))
    found, scores = nearest(q, b, k=200, block=block)
    products = q.rows(range(11)) @ patterns.T
    for row, product in zip(found, products, strict=True):
        order = product.argsort(descending=True)
        wanted = torch.cat([(kinds == kind).nonzero()[:, 0] for kind in order])[:200]
        assert row.equal(wanted)
    assert (scores[:, 1:] <= scores[:, :-1]).all()


def test_memory_is_bounded_by_the_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    q, b = filled(tmp_path / "q", torch.randn(45, 32)), filled(tmp_path / "b", torch.randn(500, 32))
    whole = nearest(q, b, k=3), influence(q, b)
    sizes, read = [], ProjectionStore.rows

    def watched(self: ProjectionStore, ids: Tensor) -> Tensor:
        sizes.append(len(ids))
        return read(self, ids)

    monkeypatch.setattr(ProjectionStore, "rows", watched)
    for one, other in zip(whole, (nearest(q, b, k=3, block=16), influence(q, b, block=16)), strict=True):
        assert one[0].equal(other[0])
        torch.testing.assert_close(one[1], other[1])
    assert max(sizes) == 16
    assert sum(sizes) == (45 + 3 * 500) + (45 + 500)


def test_layers(tmp_path: Path) -> None:
    query, base = torch.randn(6, 32), torch.randn(40, 32)
    q, b = filled(tmp_path / "q", query), filled(tmp_path / "b", base)
    for layers, columns in (
        ("mlp", [*range(8), *range(16, 32)]), ("h.1", range(16, 24)), ("attn", range(8, 16)),
        (["h.10", "h.0.mlp"], [*range(8), *range(24, 32)]), ("h.0,h.10.mlp.up", [*range(16), *range(24, 32)]),
    ):  # fmt: skip
        part = list(columns)
        wanted, values = expected(query[:, part], base[:, part], torch.arange(40), 4)
        found, scores = nearest(q, b, k=4, layers=layers)
        assert found.equal(wanted)
        torch.testing.assert_close(scores, values)
        means = influence(q, b, layers=layers)[1]
        torch.testing.assert_close(means, (query[:, part] @ base[:, part].T).mean(0), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=r"'h\.2' matches no layer .* h\.0\.mlp\.up"):
        nearest(q, b, layers="mlp,h.2")
    with pytest.raises(ValueError, match="names no layer"):
        nearest(q, b, layers="")


def test_common_layers_of_different_choices(tmp_path: Path) -> None:
    query, base = torch.randn(6, 8), torch.randn(40, 32)
    q = filled(tmp_path / "q", query, layers=[layer("h.1.mlp.up", 0)])
    b = filled(tmp_path / "b", base)
    with pytest.raises(ValueError, match=r"layers\[0\]\.name is 'h\.1\.mlp\.up' there and 'h\.0\.mlp\.up' here"):
        nearest(q, b)
    wanted, values = expected(query, base[:, 16:24], torch.arange(40), 4)
    found, scores = nearest(q, b, k=4, layers="h.1")
    assert found.equal(wanted)
    torch.testing.assert_close(scores, values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"proj_seed": 1}, "proj_seed is 1 there and 42 here"),
        ({"proj_method": "rademacher"}, "proj_method is 'rademacher' there"),
        ({"sketch": 64}, "sketch is 64 there and None here"),
        ({"layers": [*LAYERS[:3], layer("h.10.mlp.up", 24, 4, 2)]}, r"layers\[3\]\.k_i is 4 there and 2 here"),
        ({"layers": [*LAYERS[:3], layer("h.10.mlp.up", 24, input_key="x")]}, r"layers\[3\]\.input_key is 'x' there"),
    ],
)
def test_other_matrices_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    q, b = filled(tmp_path / "q", torch.randn(2, 32), **changes), filled(tmp_path / "b", torch.randn(2, 32))
    for ask in (nearest, influence):
        with pytest.raises(ValueError, match=message):
            ask(q, b)


def test_coverage_and_dtype_may_differ(tmp_path: Path) -> None:
    rows = torch.randn(4, 32).bfloat16()
    q = filled(tmp_path / "q", rows, coverage={"share": 0.1})
    b = filled(tmp_path / "b", rows.float(), coverage={"share": 0.2})
    assert nearest(q, b, k=1, metric="cosine")[0].flatten().tolist() == [0, 1, 2, 3]


def test_small_and_empty_stores(tmp_path: Path) -> None:
    q, b = filled(tmp_path / "q", torch.randn(2, 32)), filled(tmp_path / "b", torch.randn(3, 32))
    assert nearest(q, b, k=10)[0].shape == (2, 3)
    empty = filled(tmp_path / "e", torch.empty(0, 32))
    ids, scores = nearest(empty, b, k=2)
    assert (ids.shape, scores.shape) == ((0, 2), (0, 2))
    with pytest.raises(ValueError, match="nothing to search"):
        nearest(q, empty)
    with pytest.raises(ValueError, match="nothing to compare with"):
        influence(empty, b)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_scores_that_are_not_finite_are_told(tmp_path: Path, value: float) -> None:
    rows = torch.rand(50, 32) + 1
    good = filled(tmp_path / "good", rows)
    rows[37, 5] = value
    bad = filled(tmp_path / "bad", rows)
    with pytest.raises(ValueError, match=r"sample 37 of '.*bad'"):
        influence(good, bad, block=20)
    with pytest.raises(ValueError, match=r"sample 37 of '.*bad'"):
        influence(bad, good, block=20)
    with pytest.raises(ValueError, match=r"sample 37 of '.*bad'"):
        nearest(bad, good, k=50, block=20)
    with pytest.raises(ValueError, match=r"with sample 37 of '.*bad'"):
        nearest(good, bad, k=50, block=20)


def test_wrong_arguments(tmp_path: Path) -> None:
    q = filled(tmp_path / "q", torch.randn(2, 32))
    for arguments, message in (({"k": 0}, "k must be"), ({"metric": "l2"}, "metric"), ({"block": 0}, "block")):
        with pytest.raises(ValueError, match=message):
            nearest(q, q, **arguments)  # type: ignore[arg-type]
