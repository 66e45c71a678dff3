"""Experts held in 3-D weights, under masks of whole rows or columns of each expert's matrix.

How the module multiplies is its own affair: transformers has loops over the experts, batched and grouped products. Its own
forward runs, with objects in the place of the weights that stand for products to come: selecting experts and transposing
are noted, a product goes to :class:`~sparseopt.optim.expert_products.Product`, and anything else gets the weight itself,
whose gradient is whole then.
"""

from __future__ import annotations

import inspect
import logging
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparseopt.masks._structured import structure_of
from sparseopt.optim import structured
from sparseopt.optim.expert_products import CHOSEN, EACH, ONE, SORTED, Product, entries, grouped
from sparseopt.optim.structured import ALIGNMENT, Structured, StructuredUse

logger = logging.getLogger(__name__)

__all__ = ["ExpertsUse", "unfit"]

IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")


# ---- what stands for a weight ----------------------------------------------------------------------------------------
class _Weight:
    """An experts' weight, or some of its matrices, while its module's own forward runs."""

    def __init__(
        self, use: ExpertsUse, weight: Tensor, leaf: Tensor, chosen: Any = None, flipped: bool = False, of: Any = None
    ) -> None:
        self._use, self._weight, self._leaf = use, weight, leaf
        self._chosen = chosen  # None: all experts; the number of one; int64 [S]
        self._flipped = flipped
        self._parts: Any = None  # of the leaf, by expert
        self._first = self if of is None else of

    def _like(self, chosen: Any, flipped: bool) -> _Weight:
        return _Weight(self._use, self._weight, self._leaf, chosen, flipped, self._first)

    def __getitem__(self, key: Any) -> Any:
        if self._chosen is None:
            if isinstance(key, Tensor) and key.dtype in (torch.int64, torch.int32) and key.dim() <= 1:
                return self._like(key if key.dim() else int(key) % len(self), self._flipped)
            if isinstance(key, int) and -len(self) <= key < len(self):
                return self._like(key % len(self), self._flipped)
        return self._whole()[key]

    def __len__(self) -> int:
        return int(self._weight.shape[0])

    def __iter__(self) -> Iterator[Any]:
        return (self[expert] for expert in range(len(self)))

    def transpose(self, first: int, second: int) -> Any:
        dims = 2 if isinstance(self._chosen, int) else 3
        if {first % dims, second % dims} == {dims - 2, dims - 1}:
            return self._like(self._chosen, not self._flipped)
        return self._whole().transpose(first, second)

    @property
    def mT(self) -> _Weight:
        return self._like(self._chosen, not self._flipped)

    @property
    def dtype(self) -> torch.dtype:
        return self._weight.dtype

    @property
    def device(self) -> torch.device:
        return self._weight.device

    def _whole(self) -> Tensor:
        """The weight itself, for what is no product."""
        if not torch.compiler.is_compiling() and not self._use.told:
            self._use.told = True
            logger.info("%s is used otherwise than in products of experts: such gradients are whole.", self._use.name)
        return self._real()

    def _real(self) -> Tensor:
        weight = self._weight if self._chosen is None else self._weight[self._chosen]
        return weight.transpose(-1, -2) if self._flipped else weight

    def __getattr__(self, name: str) -> Any:
        plain = name in ("shape", "ndim", "size", "dim", "numel", "data_ptr", "requires_grad", "is_cuda")
        return getattr(self._real() if plain else self._whole(), name)

    def times(self, x: Tensor, how: int, flipped: bool, groups: Tensor | None = None) -> Tensor:
        """x M, or x M^T where ``flipped``, of the matrices M that this stands for."""
        use, expert = self._use, -1
        leaf: Any = self._leaf
        where, counts = use.where, use.counts
        if how == ONE:
            expert, counts = self._chosen, None
            first = self._first
            if first._parts is None:  # one gradient is put together of all experts'
                first._parts = self._leaf.split(use.sizes)
            leaf = first._parts[expert] if use.sizes[expert] else None
            where = where[expert, : use.filled[expert]]
        return Product.apply(
            x, self._weight, leaf, where, counts, groups, how, expert, self._flipped != flipped, use.kind == "row"
        )

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not kwargs and len(args) == 2:
            result = _product_of(function, *args)
            if result is not None:
                return result
        arguments = [value._whole() if isinstance(value, _Weight) else value for value in args]
        named = {k: v._whole() if isinstance(v, _Weight) else v for k, v in (kwargs or {}).items()}
        return function(*arguments, **named)


def _product_of(function: Any, left: Any, right: Any) -> Tensor | None:
    """The product of tokens and matrices that a function of torch's asks for, if it does."""
    if isinstance(left, Tensor) and isinstance(right, _Weight):
        chosen = right._chosen
        if isinstance(chosen, int):
            if function is F.linear and left.dim() > 1:
                return right.times(left, ONE, True)
            if function in (torch.matmul, Tensor.matmul, Tensor.__matmul__) and left.dim() > 1:
                return right.times(left, ONE, False)
        elif function in (torch.bmm, Tensor.bmm):
            if chosen is None:
                return right.times(left, EACH, False)
            if left.shape[1] == 1:
                return right.times(left.squeeze(1), CHOSEN, False, chosen)
    elif (
        function is torch.bmm and isinstance(left, _Weight) and isinstance(left._chosen, Tensor) and right.shape[2] == 1
    ):
        return left.times(right.squeeze(2), CHOSEN, True, left._chosen)
    return None


def _grouped_mm(input: Tensor, weight: Any, offs: Tensor) -> Tensor:
    """In the place of transformers' while there are structured experts."""
    if isinstance(weight, _Weight) and weight._chosen is None:
        return weight.times(input, SORTED, False, offs)
    return grouped.own(input, weight, offs)


# ---- modules ---------------------------------------------------------------------------------------------------------
class _Self:
    """The module, to its own forward: some weights are replaced."""

    def __init__(self, module: nn.Module, weights: dict[str, _Weight]) -> None:
        object.__setattr__(self, "_module", module)
        object.__setattr__(self, "_weights", weights)

    def __getattr__(self, name: str) -> Any:
        weights = self._weights
        return weights[name] if name in weights else getattr(self._module, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._module, name, value)


class _OfExperts(Structured):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        weights = {}
        if _implementation(self) in IMPLEMENTATIONS:
            for attribute, use in self._structured.items():  # type: ignore[attr-defined]
                weight = self._parameters[attribute]  # type: ignore[attr-defined]
                leaf = use.current_leaf(weight)
                if leaf is not None:
                    weights[attribute] = _Weight(use, weight, leaf)
        own: Callable[..., Any] = self._own.forward  # type: ignore[attr-defined]
        return own(_Self(self, weights) if weights else self, *args, **kwargs)  # type: ignore[arg-type]


class ExpertsUse(StructuredUse):
    """One 3-D weight of a module of experts.

    Attributes:
        where: int64 [E, K] on the device: each expert's rows or columns, filled up with its last (0 where it has none).
        counts: int64 [E] on the device, of each expert's own; None where all have as many.
        sizes: active entries of each expert.
        filled: numbers of rows or columns of each expert that are multiplied where it is alone.
    """

    def __init__(self, module: Any, name: str, attribute: str, kind: str, index: Tensor) -> None:
        self.attribute, self.told = attribute, False
        super().__init__(module, name, kind, index)

    def lay_out(self, weight: Tensor) -> tuple[int, ...]:
        experts = weight.shape[0]
        assert self.kind is not None
        groups, size = structure_of(weight.shape, self.kind)
        each = groups // experts
        counts = torch.bincount(self.index // each, minlength=experts)
        most, step = int(counts.max()), ALIGNMENT.get(weight.device.type, 1)
        numbers = torch.arange(most + -most % step).clamp(max=(counts - 1).clamp(min=0)[:, None])
        starts = (counts.cumsum(0) - counts)[:, None]
        # Experts with none look at a neighbour's, or at one before the end: they are told to look at 0.
        where = (self.index % each)[(starts + numbers).clamp(max=self.index.numel() - 1)]
        self.where = where.masked_fill(counts[:, None] == 0, 0).to(weight.device)
        self.counts = None if bool((counts == most).all()) else counts.to(weight.device)
        self.sizes = [int(count) * size for count in counts]
        self.filled = [int(count) + -int(count) % step for count in counts]
        return (self.index.numel() * size,)

    def add_to(self, gradient: Tensor, part: Tensor) -> None:
        experts, rows, columns = gradient.shape
        if self.kind == "row":
            gradient.view(-1, columns).index_add_(0, self.index.to(gradient.device), part.view(-1, columns))
            return
        counts = self.counts
        if counts is None:
            counts = torch.full((experts,), self.index.numel() // experts, device=gradient.device)
        of, row, number = entries(counts, rows, part.numel())
        gradient.view(-1).index_add_(0, (of * rows + row) * columns + self.where[of, number], part)

    def install(self) -> None:
        module = self.module
        if not structured.is_structured(module):
            module.__class__ = structured.class_of(type(module), _OfExperts)
            module._structured = {}
        module._structured[self.attribute] = self
        _uses.add(self)
        grouped.replace(_grouped_mm)

    def uninstall(self) -> None:
        uses = self.module.__dict__.get("_structured", {})
        if uses.get(self.attribute) is self:
            del uses[self.attribute]
            if not uses:
                del self.module._structured
                self.module.__class__ = self.module._own
        _uses.discard(self)
        if not _uses:
            grouped.put_back(_grouped_mm)


_uses: weakref.WeakSet[ExpertsUse] = weakref.WeakSet()


def _implementation(module: Any) -> str | None:
    """How transformers runs a module's experts."""
    return getattr(getattr(module, "config", None), "_experts_implementation", None) or "eager"


def unfit(module: nn.Module, name: str, param: Tensor) -> str | None:
    """Why a module with a 3-D weight cannot be structured."""
    kind = type(module)._own if structured.is_structured(module) else type(module)  # type: ignore[attr-defined]
    ours = kind.__module__.startswith("transformers.") and kind.__name__.endswith("Experts")
    if param.dim() != 3 or not (ours or (hasattr(module, "_apply_gate") and hasattr(module, "is_transposed"))):
        return f"{name} ({kind.__name__}) holds it in {param.dim()} dimensions"
    if _implementation(module) not in IMPLEMENTATIONS:
        return f"{name} runs its experts as {_implementation(module)!r}, not as one of {', '.join(IMPLEMENTATIONS)}"
    if "__class__" in inspect.unwrap(kind.forward).__code__.co_freevars:
        return f"the forward of {name} calls super()"
    if not param.is_contiguous():
        return "it is not contiguous"
    if not hasattr(sys.modules.get("transformers.integrations.moe"), "_grouped_mm"):
        return "this transformers release has no _grouped_mm in transformers.integrations.moe"
    return None
