"""Which samples of one projection store are nearest to those of another, and how much influence they have.

Scores are dot products (or cosines) of projections, which estimate those of the gradients. Both stores are read in blocks:
memory holds one block of each and the results, whatever the size of the stores.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from sparseopt.progress import Progress
from sparseopt.projection._store_files import difference
from sparseopt.projection.layers import _matches, _split
from sparseopt.projection.store import ProjectionStore

__all__ = ["influence", "nearest"]

Metric = Literal["dot", "cosine"]

BLOCK = 1 << 24  # entries of a block

# What decides about the matrices. Positions of slices may differ (another choice of layers), and so may the dtype.
_OF_MATRICES = ("proj_seed", "proj_method", "proj_row_orthonormal", "sketch")
_OF_LAYERS = ("name", "type", "original_shape", "d_in", "d_out", "k_i", "k_o", "input_key", "output_key")


def nearest(
    query: ProjectionStore,
    base: ProjectionStore,
    k: int = 10,
    metric: Metric = "dot",
    *,
    device: str | torch.device = "cpu",
    block: int | None = None,
    layers: str | Sequence[str] | None = None,
) -> tuple[Tensor, Tensor]:
    """The ``k`` samples of ``base`` with the highest score for each sample of ``query``.

    Args:
        query: n finished rows; row i of the results belongs to ``query.completed[i]``.
        base: m finished rows, of the same projection.
        k: how many; where ``base`` has fewer samples, that many.
        metric: ``dot``, or ``cosine`` (0 where a row is zero).
        device: of the products.
        block: rows of each store in memory at a time; default: 16 Mi entries (128 MiB in float64), 64 rows at least.
        layers: only the slices of these layers: names or patterns as the projector takes them, comma-separated or several.

    Returns:
        (ids int64 [n, k], scores fp32 [n, k]) on the CPU, scores descending, the smaller id first among equal ones.

    Raises:
        ValueError: the stores hold different projections (the difference is named), a pattern that matches no layer, an
            empty ``base``, or a best score that is not finite (its samples are named).
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"k must be a positive integer, got {k!r}.")
    reader = _Pair(query, base, metric, torch.device(device), block, layers)
    k = min(k, len(reader.base_ids))
    all_ids, all_scores = [], []
    with reader.progress("nearest", -(-len(reader.query_ids) // reader.block) * len(reader.base_ids)) as progress:
        for _, wanted in reader.query_blocks():
            ids = torch.empty(len(wanted), 0, dtype=torch.int64, device=wanted.device)
            scores = torch.empty(len(wanted), 0, device=wanted.device)
            for found, rows in reader.base_blocks():
                new = _product(wanted, rows, len(found))
                scores = torch.cat([scores, new], dim=1)
                ids = torch.cat([ids, found.to(ids.device).expand(len(wanted), -1)], dim=1)
                ids, scores = _best(ids, scores, k)
                progress.update(len(found))
            all_ids.append(ids.cpu())
            all_scores.append(scores.cpu())
            reader.check(all_scores[-1], len(all_ids) - 1, all_ids[-1])
    if not all_ids:
        return torch.empty(0, k, dtype=torch.int64), torch.empty(0, k)
    return torch.cat(all_ids), torch.cat(all_scores)


def influence(
    query: ProjectionStore,
    base: ProjectionStore,
    metric: Metric = "dot",
    *,
    device: str | torch.device = "cpu",
    block: int | None = None,
    layers: str | Sequence[str] | None = None,
) -> tuple[Tensor, Tensor]:
    """The mean score of each sample of ``base`` with all samples of ``query``.

    Both scores are linear in the query's rows (scaled to length 1 for ``cosine``), so their mean is taken first: each store
    is read once. Arguments and errors as :func:`nearest`; also a ValueError where ``query`` is empty.

    Returns:
        (ids int64 [m], ascending; scores fp32 [m]) on the CPU.
    """
    reader = _Pair(query, base, metric, torch.device(device), block, layers)
    if not len(reader.query_ids):
        raise ValueError(f"'{query.path}' holds no finished row: there is nothing to compare with.")
    total, scores = torch.zeros(reader.columns, dtype=torch.float64, device=reader.device), []
    with reader.progress("influence", len(reader.query_ids) + len(reader.base_ids)) as progress:
        for start, rows in reader.query_blocks():
            total += rows.sum(0, dtype=torch.float64)
            progress.update(len(rows))
            if not total.isfinite().all():
                ids = reader.query_ids[start : start + len(rows)]
                raise _not_finite(query, ids[~rows.isfinite().all(1).cpu()].tolist() or ids.tolist())
        mean = (total / len(reader.query_ids))[None]
        for found, rows in reader.base_blocks():
            scores.append(_product(mean.to(rows.dtype), rows, len(found))[0].cpu())
            progress.update(len(found))
            bad = ~scores[-1].isfinite()
            if bad.any():
                raise _not_finite(base, found[bad].tolist())
    return reader.base_ids, torch.cat(scores)


def _product(wanted: Tensor, rows: Tensor, count: int) -> Tensor:
    """Scores fp32 [n, count] of the block's first ``count`` rows."""
    return (wanted @ rows.T)[:, :count].float()


def _best(ids: Tensor, scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best columns of each row, equal scores in the order of the columns: ids ascend within equal scores.

    topk promises nothing about ties, so it only finds the k-th score; a NaN counts as the highest, so that it is seen.
    """
    order = torch.where(scores.isnan(), torch.inf, scores)
    k = min(k, scores.shape[1])
    last = order.topk(k, dim=1).values[:, -1:]
    above, equal = order > last, order == last
    kept = above | (equal & (equal.cumsum(1) <= k - above.sum(1, keepdim=True)))
    columns = kept.nonzero()[:, 1].view(len(scores), k)
    columns = columns.gather(1, order.gather(1, columns).sort(dim=1, descending=True, stable=True).indices)
    return ids.gather(1, columns), scores.gather(1, columns)


def _not_finite(store: ProjectionStore, ids: list[int]) -> ValueError:
    return ValueError(
        f"a score of sample {ids[0]} of '{store.path}' is not finite ({len(ids)} such samples in its block)."
    )


class _Pair:
    """Two stores of one projection, read in blocks."""

    def __init__(
        self,
        query: ProjectionStore,
        base: ProjectionStore,
        metric: str,
        device: torch.device,
        block: int | None,
        layers: str | Sequence[str] | None,
    ) -> None:
        if metric not in ("dot", "cosine"):
            raise ValueError(f"metric must be 'dot' or 'cosine', got {metric!r}.")
        if block is not None and (isinstance(block, bool) or not isinstance(block, int) or block < 1):
            raise ValueError(f"block must be a positive integer, got {block!r}.")
        self.device, self.metric = device, metric
        self.query, self.base = query, base
        chosen = {store: _slices(store, layers) for store in (query, base)}
        found = difference(_matrices(query, chosen[query]), _matrices(base, chosen[base]))
        if found:
            raise ValueError(
                f"'{query.path}' (there) and '{base.path}' (here) hold different projections, whose products mean "
                f"nothing: {found}."
            )
        self._spans = {store: [(x["slice_start"], x["slice_end"]) for x in chosen[store]] for store in chosen}
        self.columns = sum(end - start for start, end in self._spans[base])
        self.block = block if block is not None else max(BLOCK // self.columns, 64)
        self.query_ids, self.base_ids = query.completed, base.completed
        if not len(self.base_ids):
            raise ValueError(f"'{base.path}' holds no finished row: there is nothing to search.")

    def progress(self, description: str, total: int) -> contextlib.AbstractContextManager[Progress]:
        return Progress(description, total, unit="row")

    def query_blocks(self) -> Iterator[tuple[int, Tensor]]:
        """(number of the first row, rows [n, columns])."""
        for start in range(0, len(self.query_ids), self.block):
            yield start, self._read(self.query, self.query_ids[start : start + self.block])

    def base_blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(ids [n], rows [block, columns], zeros past n): one shape, so that equal rows get equal scores in any block."""
        size = min(self.block, len(self.base_ids))
        for ids in self.base_ids.split(size):
            rows = self._read(self.base, ids)
            yield ids, torch.nn.functional.pad(rows, (0, 0, 0, size - len(ids))) if len(ids) < size else rows

    def _read(self, store: ProjectionStore, ids: Tensor) -> Tensor:
        rows = store.rows(ids)
        spans = self._spans[store]
        if sum(end - start for start, end in spans) < store.total_dim:
            rows = torch.cat([rows[:, start:end] for start, end in spans], dim=1)
        rows = rows.to(self.device)
        if self.metric == "cosine":
            rows = rows.double()
            norms = rows.norm(dim=1, keepdim=True)
            rows = rows / torch.where(norms > 0, norms, 1.0)
        # A CPU's fp32 product rounds a column by its place in the matrix, and equal rows would not tie.
        return rows.to(torch.float64 if self.device.type == "cpu" else torch.float32)

    def check(self, scores: Tensor, number: int, ids: Tensor) -> None:
        bad = ~scores.isfinite().all(1)
        if not bad.any():
            return
        which = int(bad.nonzero()[0])
        sample = int(self.query_ids[number * self.block + which])
        other = int(ids[which][~scores[which].isfinite()][0])
        raise ValueError(
            f"the score of sample {sample} of '{self.query.path}' with sample {other} of '{self.base.path}' is not finite."
        )


def _slices(store: ProjectionStore, layers: str | Sequence[str] | None) -> list[Mapping[str, Any]]:
    entries = store.metadata.get("layers")
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"the metadata of '{store.path}' lists no layers.")
    if layers is None:
        return entries
    chosen: set[str] = set()
    patterns = _split(layers)
    for pattern in patterns:
        names = [x["name"] for x in entries if _matches(pattern.split("."), x["name"].split("."))]
        if not names:
            raise ValueError(f"{pattern!r} matches no layer of '{store.path}'; it has {_some(entries)}.")
        chosen.update(names)
    if not patterns:
        raise ValueError("layers names no layer; leave it out for all of them.")
    return [x for x in entries if x["name"] in chosen]


def _some(entries: list[Mapping[str, Any]]) -> str:
    shown = ", ".join(x["name"] for x in entries[:8])
    return shown + (f" and {len(entries) - 8} more" if len(entries) > 8 else "")


def _matrices(store: ProjectionStore, entries: list[Mapping[str, Any]]) -> dict[str, Any]:
    """What the matrices of these slices are made from, for a comparison."""
    layers = []
    for x in entries:
        layers.append({key: x[key] for key in _OF_LAYERS if key in x} | {"size": x["slice_end"] - x["slice_start"]})
    return {**{key: store.metadata[key] for key in _OF_MATRICES if key in store.metadata}, "layers": layers}
