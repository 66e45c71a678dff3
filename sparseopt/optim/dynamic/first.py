"""The masks that a training begins with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sparseopt.masks.maskset import MaskSet
from sparseopt.optim.dynamic.criteria import Criterion, is_pruning_method, keep_scores
from sparseopt.optim.dynamic.distribution import distribute
from sparseopt.optim.dynamic.layers import Layer
from sparseopt.optim.dynamic.patterns import Pattern
from sparseopt.optim.dynamic.policy import Plan, random_scores

__all__ = ["first_masks", "layer_counts"]


def layer_counts(
    layers: Sequence[Layer], pattern: Pattern, distribution: str, sparsity: float, scores: Callable[[int], Tensor]
) -> list[int]:
    """Active entries of each layer at a sparsity; ``scores`` by position of the layer, for ``"global"``."""
    if pattern.m:
        return [layer.numel // pattern.m * pattern.per_group(sparsity) for layer in layers]
    return distribute(layers, sparsity, distribution, scores)


@torch.no_grad()
def first_masks(
    layers: Sequence[Layer], plan: Plan, pattern: Pattern, distribution: str, criterion: Criterion,
    initial: str | MaskSet | None, seed: int,
) -> MaskSet:  # fmt: skip
    """Chooses, or checks, the first masks; the arguments are those of ``DynamicSparsity``.

    Raises:
        ValueError: an unknown way to choose, or masks that do not fit the layers or the pattern.
    """
    if isinstance(initial, MaskSet):
        return _given(layers, plan, pattern, initial)
    initial = initial or ("criterion" if is_pruning_method(criterion) else "magnitude")
    if initial not in ("magnitude", "random", "criterion"):
        raise ValueError(f"initial must be 'magnitude', 'random', 'criterion' or a MaskSet, got {initial!r}.")
    if initial == "criterion" and criterion is None:
        raise ValueError("initial='criterion' needs a criterion.")
    if plan.policy == "static" and criterion is not None and initial != "criterion":
        raise ValueError("policy='static' would never ask the criterion: set initial='criterion'.")
    sparsity = plan.sparsity_at(0)

    def scores(i: int) -> Tensor:
        layer = layers[i]
        if initial == "random":
            return random_scores(layer.shape, seed, 0, layer.name).to(layer.param.device)
        leaving = layer.numel - round((1 - sparsity) * layer.numel)
        return keep_scores(criterion if initial == "criterion" else None, layer, None, None, leaving)

    counts = layer_counts(layers, pattern, distribution, sparsity, scores)
    return MaskSet.from_bool(
        {
            layer.name: pattern.select(layer, scores(i), count)
            for i, (layer, count) in enumerate(zip(layers, counts, strict=True))
        }
    )


def _given(layers: Sequence[Layer], plan: Plan, pattern: Pattern, masks: MaskSet) -> MaskSet:
    for layer in layers:
        name = layer.name
        if name not in masks:
            raise ValueError(f"the first masks have none for {name!r}: exclude it, or give one.")
        if masks.shapes[name] != layer.shape:
            raise ValueError(f"the first mask of {name!r} has shape {masks.shapes[name]}, the layer {layer.shape}.")
        if not masks.count(name):
            raise ValueError(f"the first mask of {name!r} has nothing active: exclude the layer.")
        if pattern.m:
            active = pattern.groups(layer, masks[name]).sum(1)
            if bool((active != pattern.per_group(plan.sparsity_at(0))).any()):
                raise ValueError(f"the first mask of {name!r} is not {pattern}.")
    return masks.select([layer.name for layer in layers])
