"""How far a model has moved from its base, per parameter and on average: ``stats_step_N.json``."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparseopt.deltas.base import Base
from sparseopt.masks.find import is_mlp

__all__ = ["AGGREGATES", "THRESHOLD", "Statistics"]

FORMAT = "sparseopt.delta_stats"
VERSION = 1
# An entry counts as moved far when |value - base| exceeds this: RL learning rates are 1e-7 to 1e-5, so that it takes
# several updates in one direction, and it lies above the rounding of fp32 weights below 100.
THRESHOLD = 1e-5
AGGREGATES = ("mean_l2_from_init", "mean_frac_big_from_init", "attn_mean_l2", "mlp_mean_l2")
ATTENTION = re.compile(r"attn|attention")  # in components of parameter names: self_attn, attention, attn


class Statistics:
    """Sums over entries, parameter by parameter; entries that nobody adds are at their base value."""

    def __init__(self, base: Base) -> None:
        self._sizes = {
            name: math.prod(shape)
            for name, shape in base.shapes.items()
            if name not in base.buffers and base.dtypes[name].is_floating_point
        }
        self._squares = dict.fromkeys(self._sizes, 0.0)
        self._big = dict.fromkeys(self._sizes, 0)
        self._changed: dict[str, int] = {}

    def add(self, name: str, values: Tensor, base: Tensor) -> None:
        """Entries of one parameter (each entry once): their values, and what the base has there."""
        if name in self._sizes and values.numel():
            difference = values.double() - base.double()
            self._squares[name] += float(difference.square().sum())
            self._big[name] += int((difference.abs() > THRESHOLD).sum())

    def count(self, name: str, changed: int) -> None:
        """Entries that differ from the parent step."""
        if name in self._sizes:
            self._changed[name] = self._changed.get(name, 0) + changed

    def result(self, step: int, parent_step: int | None) -> dict[str, Any]:
        """What ``stats_step_N.json`` holds.

        Per parameter ``l2_from_init`` (fp64 L2 norm of value - base over all entries), ``frac_big_from_init`` (share of
        entries with ``|value - base| > threshold``) and ``changed`` (entries unlike the parent step's). The aggregates are
        means over parameters, each counting once; None where a model has none of a kind, or a norm is not finite.
        """
        parameters = {
            name: {
                "l2_from_init": math.sqrt(self._squares[name]),
                "frac_big_from_init": self._big[name] / max(1, n),
                "changed": self._changed.get(name, 0),
            }
            for name, n in self._sizes.items()
        }
        norms = {name: entry["l2_from_init"] for name, entry in parameters.items()}
        aggregates = {
            "mean_l2_from_init": _mean(norms),
            "mean_frac_big_from_init": _mean({name: p["frac_big_from_init"] for name, p in parameters.items()}),
            "attn_mean_l2": _mean({name: norm for name, norm in norms.items() if ATTENTION.search(name)}),
            "mlp_mean_l2": _mean({name: norm for name, norm in norms.items() if is_mlp(name)}),
        }
        return {
            "format": FORMAT, "version": VERSION, "step": step, "parent_step": parent_step, "threshold": THRESHOLD,
            "changed": sum(self._changed.values()), "total": sum(self._sizes.values()), **aggregates,
            "parameters": parameters,
        }  # fmt: skip


def to_json(statistics: Mapping[str, Any]) -> str:
    """As JSON, which knows no infinities and NaNs: null."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(entry) for key, entry in value.items()}
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(dict(statistics)), indent=1, allow_nan=False) + "\n"


def _mean(values: Mapping[str, float]) -> float | None:
    if not values:
        return None
    mean = math.fsum(values.values()) / len(values) if all(map(math.isfinite, values.values())) else math.nan
    return mean if math.isfinite(mean) else None


def bits(tensor: Tensor) -> Tensor:
    """The same memory as integers: equality of bits is what counts (-0.0 is not 0.0, a NaN equals itself)."""
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
