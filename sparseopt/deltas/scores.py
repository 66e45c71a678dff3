"""Scores of a model's entries from a delta log: how much training moved them.

With the base's value v[0] (step 0) and the values v[1] .. v[m] at the logged steps s[1] < .. < s[m] = target, in fp32:

* ``magnitude``: sum over i of |v[i] - v[0]|.
* ``momentum``: |mean| (1 + |mean| / (std + 1e-8)) of the differences v[i] - v[i-1] (the differences of consecutive deltas)
  of consecutive points in the window; std is that of the population. Points are the logged steps s with
  target - momentum_window <= s <= target, and the base, as step 0, where the window reaches back to it. Differences are
  not divided by the number of steps between.
* ``fisher``: mean over i of (v[i] - v[i-1])^2 / (s[i] - s[i-1]): the mean squared update per step, which estimates E[g^2]
  up to Adam's scaling.
* ``ground_truth``: |v[m] - v[0]|.

Mean and variance are Welford's. A piece costs memory for a few fp32 numbers of each of its entries, and for what the log
holds of it; where few entries ever changed, only those are worked on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sparseopt.deltas.reader import LogReader, Source
from sparseopt.masks._pieces import Scores

__all__ = ["METHODS", "LogScores", "scores"]

METHODS = ("magnitude", "momentum", "fisher", "ground_truth")
EPSILON = 1e-8
DENSE_ABOVE = 0.5  # share of changed entries of a piece from which all of its entries are worked on

FORMULAS = {
    "magnitude": "sum over logged steps of |delta|",
    "momentum": "|mean v| (1 + |mean v| / (std v + 1e-8)), v = differences of consecutive deltas in the window",
    "fisher": "mean squared update per step, from the delta log (no Fisher information of gradients)",
    "ground_truth": "|final delta|",
}


def scores(
    log: Any,
    method: str,
    target_step: int | None = None,
    momentum_window: int | None = None,
    base: Source = None,
) -> LogScores:
    """Scores of every floating-point parameter of a delta log; see the module for the formulas.

    Args:
        log: folder, :class:`sparseopt.DeltaLog`, or an opened :class:`LogReader` (``base`` is not looked at then).
        method: ``"magnitude"``, ``"momentum"``, ``"fisher"`` or ``"ground_truth"``.
        target_step: last step that counts; None = the last logged one.
        momentum_window: training steps that ``momentum`` looks back from the target; None = all of them.
        base: where the base is: None = what the log says; a model's name or folder, a module or a state dict.

    Returns:
        A mapping name -> fp32 scores of the parameter's shape, computed when asked for; :func:`sparseopt.find_masks`
        takes it in pieces. ``.spool(folder)`` computes everything once, into a scratch file.

    Raises:
        ValueError: unknown method, no such step, a window that holds fewer than two points, a gap in the chain, or a
            delta of another base.
        sparseopt.FormatError: a damaged file.
        FileNotFoundError: no log there, or no base.
    """
    return LogScores(log if isinstance(log, LogReader) else LogReader(log, base), method, target_step, momentum_window)


class LogScores(Scores):
    """See :func:`scores`."""

    def __init__(
        self, reader: LogReader, method: str, target_step: int | None = None, momentum_window: int | None = None
    ) -> None:
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}.")
        if momentum_window is not None and momentum_window < 1:
            raise ValueError(f"momentum_window must be at least 1 step, got {momentum_window}.")
        self.reader, self.method = reader, method
        self.target_step = reader.resolve(target_step)
        self.momentum_window = momentum_window if method == "momentum" else None
        steps = [step for step in reader.steps if step <= self.target_step]
        self.points = _window(reader, steps, self.target_step, self.momentum_window) if method == "momentum" else steps
        self.chain = reader.check(self.target_step)
        provenance: dict[str, object] = {
            "method": method,
            "formula": FORMULAS[method],
            "target_step": self.target_step,
            "steps": self.points,
            "log_fingerprint": reader.base.fingerprint,
            "base_model": reader.base.name,
            "base_revision": reader.base.revision,
        }
        if method == "momentum":
            provenance["momentum_window"] = momentum_window
        super().__init__({name: reader.shapes[name] for name in reader.parameters}, provenance)

    def piece(self, name: str, start: int, stop: int) -> Tensor:
        found = [(step, *self.reader.file(step).entries(name, start, stop)) for step in self.chain]
        touched = torch.zeros(stop - start, dtype=torch.bool)
        for _, positions, _ in found:
            touched[positions] = True
        count = int(touched.count_nonzero())
        out = torch.zeros(stop - start, dtype=torch.float32)
        if not count:
            return out
        base = self.reader.base.piece(name, start, stop)
        if count > DENSE_ABOVE * (stop - start):
            return self._score(base.to(torch.float32, copy=True), iter(found))
        where = touched.nonzero().view(-1)
        rank = torch.empty(stop - start, dtype=torch.int64)
        rank[where] = torch.arange(count)
        out[where] = self._score(base[where].float(), ((step, rank[at], values) for step, at, values in found))
        return out

    def _score(self, base: Tensor, changes: Iterator[tuple[int, Tensor, Tensor]]) -> Tensor:
        """fp32[n] values of the base, (step, positions, values) in order -> fp32[n] scores."""
        if self.method == "fisher":
            return _fisher(base, changes, len(self.chain))
        if self.method == "momentum":
            return _momentum(base, changes, self.points)
        current, total = base.clone(), torch.zeros_like(base)
        for _, positions, values in changes:
            current[positions] = values.float()
            if self.method == "magnitude":
                total += (current - base).abs_()
        return total if self.method == "magnitude" else current.sub_(base).abs_()


def _window(reader: LogReader, steps: Sequence[int], target: int, window: int | None) -> list[int]:
    """Points of the momentum, 0 being the base."""
    first = 0 if window is None else target - window
    points = [0] if first <= 0 and 0 not in steps else []
    points += [step for step in steps if step >= first]
    if len(points) < 2:
        raise ValueError(
            f"momentum needs two logged steps in its window, but of the steps {', '.join(map(str, reader.steps))} only "
            f"{points[0]} lies in {first}..{target}; widen momentum_window={window}."
        )
    return points


def _fisher(base: Tensor, changes: Iterator[tuple[int, Tensor, Tensor]], count: int) -> Tensor:
    total, previous = torch.zeros_like(base), 0
    for step, positions, values in changes:
        new = values.float()
        # Entries that did not change add nothing: only the others are touched.
        total[positions] += (new - base[positions]).square_() / max(1, step - previous)
        base[positions] = new
        previous = step
    return total / count


def _momentum(base: Tensor, changes: Iterator[tuple[int, Tensor, Tensor]], points: Sequence[int]) -> Tensor:
    mean, squares = torch.zeros_like(base), torch.zeros_like(base)
    count = 0
    for step, positions, values in changes:
        new = values.float()
        if step <= points[0]:
            base[positions] = new
            continue
        update = torch.zeros_like(base)
        update[positions] = new - base[positions]
        base[positions] = new
        count += 1
        apart = update - mean
        mean += apart / count
        squares += apart.mul_(update.sub_(mean))
    size = mean.abs_()
    return size * (1 + size / (squares.div_(count).clamp_(min=0).sqrt_() + EPSILON))
