"""The layers whose weights are made sparse: linear ones, those of transformers' Conv1D included."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from sparseopt.masks.find import matches
from sparseopt.masks.kinds import kind_of
from sparseopt.masks.maskset import normalize_name

__all__ = ["Layer", "find_layers"]


@dataclass(frozen=True, eq=False)
class Layer:
    """One weight matrix.

    Attributes:
        name: of the parameter, as the masks have it.
        param: [outputs, inputs], or [inputs, outputs] where ``transposed``.
        transposed: stored as transformers' Conv1D does.
    """

    name: str
    param: nn.Parameter
    transposed: bool = False

    @property
    def numel(self) -> int:
        return self.param.numel()

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.param.shape)

    @property
    def inputs(self) -> int:
        return self.param.shape[0 if self.transposed else 1]

    @property
    def outputs(self) -> int:
        return self.param.shape[1 if self.transposed else 0]


def find_layers(model: nn.Module, exclude: str | Iterable[str] = ()) -> list[Layer]:
    """Weights of linear layers in the model's order, each tied one once.

    Output heads and what is tied to an embedding are not among them: growing needs their dense gradient, the largest of all.

    Args:
        model: the model.
        exclude: patterns of parameter names (as in :func:`sparseopt.find_masks`) that stay dense.

    Raises:
        ValueError: a pattern that fits no parameter, or no layer is left.
    """
    patterns = [exclude] if isinstance(exclude, str) else list(exclude)
    names: dict[int, list[str]] = {}  # a tied weight has several; the first is the masks' own
    for raw, param in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(param), []).append(normalize_name(raw))
    embedded = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    layers: dict[int, Layer] = {}
    for pattern in patterns:
        if not any(matches(name, pattern) for aliases in names.values() for name in aliases):
            raise ValueError(f"the exclude pattern {pattern!r} fits no parameter of {type(model).__name__}.")
    for module in model.modules():
        weight = getattr(module, "weight", None)
        conv1d = type(module).__name__ == "Conv1D" and hasattr(module, "nf")
        if not (isinstance(module, nn.Linear) or conv1d) or not isinstance(weight, nn.Parameter) or weight.dim() != 2:
            continue
        aliases = names[id(weight)]
        excluded = any(matches(name, pattern) for name in aliases for pattern in patterns)
        head = id(weight) in embedded or any(kind_of(name) == "embedding" for name in aliases)
        if not (excluded or head) and weight.numel():
            layers.setdefault(id(weight), Layer(aliases[0], weight, conv1d))
    if not layers:
        raise ValueError(f"{type(model).__name__} has no linear layer to make sparse (exclude: {patterns}).")
    return list(layers.values())
