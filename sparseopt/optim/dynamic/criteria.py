"""What decides which active entries stay: |w|, a score function, or one of torch's pruning methods."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.utils.prune import BasePruningMethod

from sparseopt.optim.dynamic.layers import Layer

__all__ = ["Criterion", "check_criterion", "is_pruning_method", "keep_scores"]

Score = Callable[[str, Tensor, Tensor | None], Tensor]
Criterion: TypeAlias = "Score | BasePruningMethod | type[BasePruningMethod] | None"


def is_pruning_method(criterion: object) -> bool:
    if isinstance(criterion, type):
        return issubclass(criterion, BasePruningMethod)
    return isinstance(criterion, BasePruningMethod)


def check_criterion(criterion: object) -> None:
    """Raises TypeError or ValueError for what cannot score entries."""
    if criterion is None:
        return
    if is_pruning_method(criterion):
        kind: Any = criterion
        if getattr(kind, "PRUNING_TYPE", None) not in ("unstructured", "structured"):
            raise ValueError(
                f"a pruning method must have PRUNING_TYPE 'unstructured' or 'structured', got "
                f"{getattr(kind, 'PRUNING_TYPE', None)!r}."
            )
    elif isinstance(criterion, type) or not callable(criterion):
        raise TypeError(
            "a criterion is a function score(name, weight, gradient) or a subclass of "
            f"torch.nn.utils.prune.BasePruningMethod, got {criterion!r}."
        )


def keep_scores(
    criterion: Criterion, layer: Layer, mask: Tensor | None, gradient: Tensor | None, leaving: int
) -> Tensor:
    """fp32 of the layer's shape: of the active entries the lowest leave.

    A pruning method is asked to prune the share that has to leave; counts being exact, |w| decides among what it prunes and
    among what it keeps. An unstructured one has to prune that many, give or take the one of rounding; one that sets what it
    keeps instead of clearing what it prunes is given a mask of zeros.

    Args:
        criterion: None: |w|.
        layer: the layer.
        mask: bool, active entries; None: all.
        gradient: accumulated dense gradient, where there is one.
        leaving: how many entries will leave.

    Raises:
        ValueError: the criterion returned something of another shape, or a pruning method kept a wrong number of entries.
        TypeError: or no tensor.
    """
    weight = layer.param.detach()
    magnitude = weight.float().abs()
    if criterion is None:
        return magnitude
    if not is_pruning_method(criterion):
        score: Any = criterion
        return _checked(layer, score(layer.name, weight, gradient), weight).float()
    active = torch.ones_like(weight, dtype=torch.bool) if mask is None else mask
    whole = getattr(criterion, "PRUNING_TYPE", None) == "structured"
    entries = weight if whole else weight[active]
    before = active.to(weight.dtype) if whole else torch.ones_like(entries)
    method = _method(criterion, leaving / max(1, int(active.sum())))
    kept = torch.zeros_like(active)
    verdict = _checked(layer, method.compute_mask(entries, before), entries) != 0
    if not whole and not _pruned(verdict, leaving):
        # Masks begin as all ones: a method that only sets what it keeps prunes nothing of them.
        only_set = _checked(layer, method.compute_mask(entries, torch.zeros_like(before)), entries) != 0
        if not _pruned(only_set, leaving):
            raise ValueError(
                f"the pruning method {type(method).__name__} kept {int(verdict.sum())} of {verdict.numel()} entries of "
                f"{layer.name!r} where {verdict.numel() - leaving} were to stay: compute_mask() must return 0 for the "
                "share `amount`."
            )
        verdict = only_set
    kept[active] = verdict[active] if whole else verdict
    # -1/|w| has the order of |w|, below every kept entry.
    return torch.where(kept, magnitude, -1 / magnitude)


def _pruned(verdict: Tensor, leaving: int) -> bool:
    return abs(verdict.numel() - int(verdict.sum()) - leaving) <= 1


def _method(criterion: Any, amount: float) -> Any:
    if not isinstance(criterion, type):
        method = copy.copy(criterion)
    elif "amount" in inspect.signature(criterion).parameters:
        return criterion(amount=amount)
    else:
        method = criterion()
    method.amount = amount
    return method


def _checked(layer: Layer, scores: object, like: Tensor) -> Tensor:
    if not isinstance(scores, Tensor):
        raise TypeError(f"the criterion must return a tensor for {layer.name!r}, got {type(scores).__name__}.")
    if scores.shape != like.shape:
        raise ValueError(
            f"the criterion returned shape {tuple(scores.shape)} for {layer.name!r}, expected {tuple(like.shape)}."
        )
    return scores.detach().to(like.device)
