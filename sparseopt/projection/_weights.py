"""The weights of a model that can be projected, with every module that uses them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn

from sparseopt._modules import module_kind, module_name
from sparseopt.masks._names import normalize_name

__all__ = ["Weight", "check_usable", "find_weights", "module_kind", "module_name", "parameter_layer"]


@dataclass
class Weight:
    """A weight that could be projected, with every module that uses it."""

    name: str
    parameter: nn.Parameter
    modules: list[tuple[nn.Module, str, list[str]]] = field(default_factory=list)  # module, kind, its names

    @property
    def kind(self) -> str:
        return self.modules[0][1]

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.parameter.shape
        return (columns, rows) if self.kind == "Conv1D" else (rows, columns)

    def names(self, *, embeddings: bool) -> Iterator[str]:
        for _, kind, names in self.modules:
            if embeddings or kind != "Embedding":
                yield from names


def find_weights(model: nn.Module, *, include_embeddings: bool) -> list[Weight]:
    """Every weight that can be projected, in module order.

    Raises:
        ValueError: embeddings are asked for, and one computes something of its own.
    """
    parameters = {id(p): (parameter_layer(n), p) for n, p in model.named_parameters()}
    found: dict[int, Weight] = {}
    seen: dict[int, list[str]] = {}
    for raw, module in model.named_modules(remove_duplicate=False):
        name = module_name(raw)
        if id(module) in seen:
            if name not in seen[id(module)]:
                seen[id(module)].append(name)
            continue
        seen[id(module)] = [name]
        kind = module_kind(module)
        if kind is None and include_embeddings and isinstance(module, nn.Embedding):
            raise ValueError(
                f"Embedding {name!r} ({type(module).__name__}) cannot be projected: it has a forward of its own, expected "
                "nn.Embedding's."
            )
        own = id(getattr(module, "weight", None))
        if kind is not None and own in parameters:
            weight = found.setdefault(own, Weight(*parameters[own]))
            weight.modules.append((module, kind, seen[id(module)]))
    return list(found.values())


def parameter_layer(parameter_name: str) -> str:
    """A parameter's name as layers are called: without what wrappers add and without ``.weight``."""
    return normalize_name(parameter_name).removesuffix(".weight")


def check_usable(model: nn.Module, weight: Weight) -> None:
    """Refuses weights whose gradient would miss a term."""
    known = {id(module) for module, _, _ in weight.modules}
    for raw, module in model.named_modules():
        mine = any(p is weight.parameter for p in module.parameters(recurse=False))
        if mine and id(module) not in known:
            raise ValueError(
                f"Layer {weight.name!r} cannot be projected: its weight is also used by {module_name(raw)!r} "
                f"({type(module).__name__}), expected nn.Linear, nn.Embedding or transformers' Conv1D with its own forward."
            )
    kinds = {kind for _, kind, _ in weight.modules}
    if "Conv1D" in kinds and len(kinds) > 1:
        raise ValueError(f"Layer {weight.name!r} cannot be projected: a Conv1D shares its weight with another type.")
    for module, kind, names in weight.modules:
        if kind == "Embedding" and (module.max_norm is not None or module.scale_grad_by_freq):
            raise ValueError(f"Embedding {names[0]!r} cannot be projected with max_norm or scale_grad_by_freq.")
