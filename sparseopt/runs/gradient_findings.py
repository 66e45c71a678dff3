"""What a series of gradients shows: layers that vanish or explode, and what goes with the validation loss.

A layer **vanishes** at a checkpoint where its rms is zero or under ``vanishing_below`` of the median layer's, and **explodes**
where it is not finite or over ``exploding_above`` times that; the run explodes where its whole norm is not finite or over
``spike_above`` times the median over the checkpoints.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Thresholds", "correlations", "flags", "loss_at", "pearson", "rank_correlation"]

FEWEST_POINTS = 3  # of a correlation


@dataclass(frozen=True)
class Thresholds:
    """When a gradient counts as vanishing or exploding; see the module."""

    vanishing_below: float = 1e-3
    exploding_above: float = 1e2
    spike_above: float = 10.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be a positive number, got {value!r}.")


def flags(checkpoints: Sequence[Mapping[str, Any]], limits: Thresholds) -> list[dict[str, Any]]:
    """What vanishes or explodes: ``step``, ``layer`` ("all": the run), ``kind``, the ``value`` and the ``limit`` it passes."""
    found: list[dict[str, Any]] = []
    typical = [c["total_norm"] for c in checkpoints if math.isfinite(c["total_norm"])]
    usual = statistics.median(typical) if typical else 0.0
    for checkpoint in checkpoints:
        rms = {label: values["rms"] for label, values in checkpoint["layers"].items()}
        finite = [value for value in rms.values() if math.isfinite(value)]
        median = statistics.median(finite) if finite else 0.0
        total = checkpoint["total_norm"]

        def flag(layer: str, kind: str, value: float, limit: float, step: int = checkpoint["step"]) -> None:
            found.append({"step": step, "layer": layer, "kind": kind, "value": value, "limit": limit})

        for label, value in rms.items():
            if not math.isfinite(value) or value > limits.exploding_above * median > 0:
                flag(label, "exploding", value, limits.exploding_above * median)
            elif value == 0 or value < limits.vanishing_below * median:
                flag(label, "vanishing", value, limits.vanishing_below * median)
        if not math.isfinite(total) or (len(typical) > 1 and total > limits.spike_above * usual):
            flag("all", "exploding", total, limits.spike_above * usual)
    return found


def loss_at(step: int, evaluations: Mapping[int, float]) -> float | None:
    """The validation loss at a step: as evaluated, else on the line between the evaluations around it."""
    if step in evaluations:
        return evaluations[step]
    before, after = [s for s in evaluations if s < step], [s for s in evaluations if s > step]
    if not before or not after:
        return None
    a, b = max(before), min(after)
    return evaluations[a] + (evaluations[b] - evaluations[a]) * (step - a) / (b - a)


def pearson(xs: Sequence[float], ys: Sequence[float]) -> float | None:
    """The correlation of two series; None where one of them is constant."""
    try:
        return statistics.correlation(xs, ys)
    except statistics.StatisticsError:
        return None


def rank_correlation(xs: Sequence[float], ys: Sequence[float]) -> float | None:
    """Spearman's: the correlation of the ranks, equal values sharing the mean of theirs."""

    def ranks(values: Sequence[float]) -> list[float]:
        ordered = sorted(values)
        return [ordered.index(value) + (ordered.count(value) - 1) / 2 for value in values]

    return pearson(ranks(xs), ranks(ys))


def correlations(checkpoints: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> list[dict[str, Any]]:
    """Of statistics of the gradients with the validation loss, over the checkpoints: ``statistic``, ``points``, ``pearson``,
    ``spearman`` (None under 3 points, or where nothing varies). Few points prove nothing, and both change with time.
    """

    def series(name: str, values: Sequence[float | None]) -> dict[str, Any]:
        pairs = [
            (value, checkpoint["eval_loss"])
            for value, checkpoint in zip(values, checkpoints, strict=True)
            if value is not None and checkpoint["eval_loss"] is not None
            and math.isfinite(value) and math.isfinite(checkpoint["eval_loss"])
        ]  # fmt: skip
        enough = len(pairs) >= FEWEST_POINTS
        xs, ys = [x for x, _ in pairs], [y for _, y in pairs]
        return {"statistic": name, "points": len(pairs), "pearson": pearson(xs, ys) if enough else None,
                "spearman": rank_correlation(xs, ys) if enough else None}  # fmt: skip

    def mean_next(checkpoint: Mapping[str, Any]) -> float | None:
        found = [pair["cosine"] for pair in checkpoint["next"] if pair["cosine"] is not None]
        return statistics.fmean(found) if found else None

    return [
        series("total norm", [c["total_norm"] for c in checkpoints]),
        series("cosine with the previous checkpoint", [(c["previous"] or {}).get("all") for c in checkpoints]),
        series("mean cosine of neighbouring layers", [mean_next(c) for c in checkpoints]),
        series("noise", [c["variance"]["all"]["noise"] if c["variance"] else None for c in checkpoints]),
        *(
            series(f"norm of {'layer ' * label.isdecimal()}{label}", [c["layers"][label]["norm"] for c in checkpoints])
            for label in labels
        ),
    ]
