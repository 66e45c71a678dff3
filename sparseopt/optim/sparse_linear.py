"""``sparse_linear``: finds the layers of a model that :mod:`sparseopt.optim.structured` can compute, and swaps their classes."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from sparseopt._modules import module_kind, module_name
from sparseopt.masks._structured import whole_groups
from sparseopt.masks.maskset import MaskSet, normalize_name
from sparseopt.optim import distributed, structured, structured_experts
from sparseopt.optim.structured import StructuredUse
from sparseopt.optim.structured_experts import ExpertsUse

__all__ = ["SparseLinear", "sparse_linear"]


class SparseLinear:
    """The structured layers of a model, until :meth:`remove` or the end of ``with``.

    Attributes:
        layers: weight -> "row" or "column": what is computed in part.
        left: weight with active entries -> why its gradient is computed whole.
        frozen: parameters with nothing active, which need no gradient meanwhile.
    """

    def __init__(self, model: nn.Module, masks: MaskSet | Mapping[str, Tensor]) -> None:
        self.model = model
        self.layers: dict[str, str] = {}
        self.left: dict[str, str] = {}
        self.frozen: list[str] = []
        self._uses: list[StructuredUse] = []
        self._thaw: list[nn.Parameter] = []
        self._install(masks)

    def update(self, masks: MaskSet | Mapping[str, Tensor]) -> None:
        """Takes other masks. ``SparseAdamW.update_masks`` tells layers that are structured already by itself."""
        self.remove()
        self._install(masks)

    def remove(self) -> None:
        """Leaves the model as it was; between backward and step as well."""
        for use in self._uses:
            structured.restore(use)
        for param in self._thaw:
            structured.thaw(param)
        self._uses.clear()
        self._thaw.clear()
        self.layers, self.left, self.frozen = {}, {}, []

    def __enter__(self) -> SparseLinear:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        rows = sum(kind == "row" for kind in self.layers.values())
        return (
            f"SparseLinear({rows} layers by row, {len(self.layers) - rows} by column, {len(self.left)} weights left whole, "
            f"{len(self.frozen)} parameters frozen)"
        )

    # ---- finding -----------------------------------------------------------------------------------------------------
    def _install(self, masks: MaskSet | Mapping[str, Tensor]) -> None:
        if distributed.several_processes():
            raise ValueError(
                "sparse_linear works in one process; under DDP and FSDP2 leave it out, and weight gradients are computed whole."
            )
        if not isinstance(masks, MaskSet):
            masks = MaskSet.from_bool(masks)
        aliases = {normalize_name(n): p for n, p in self.model.named_parameters(remove_duplicate=False)}
        owners = _owners(self.model)
        for name in masks.names:
            param = aliases.get(name)
            if param is None:
                raise ValueError(
                    f"there is a mask for {name!r}, which {type(self.model).__name__} does not have "
                    f"(it has {', '.join(sorted(aliases)[:3])}, ...)."
                )
            if masks.shapes[name] != tuple(param.shape):
                raise ValueError(
                    f"the mask of {name!r} has shape {masks.shapes[name]}, the parameter {tuple(param.shape)}."
                )
        try:
            for name in masks.names:
                self._take(name, aliases[name], masks, owners[id(aliases[name])])
        except BaseException:
            self.remove()  # nothing stays changed
            raise

    def _take(self, name: str, param: Any, masks: MaskSet, owners: list[tuple[nn.Module, str, str]]) -> None:
        active = masks.count(name)
        if active == 0:
            if param.requires_grad:
                structured.freeze(param)
                self._thaw.append(param)
                self.frozen.append(name)
            return
        if param.dim() < 2 or not param.requires_grad:
            return
        why = _unfit(param, owners)
        groups = whole_groups(masks.packed(name), param.shape) if why is None else None
        if why is None and active == param.numel():
            why = "every entry is active"
        elif why is None and groups is None:
            why = "its active entries are not whole rows or columns"
        if why is not None or groups is None:
            self.left[name] = str(why)
            return
        module, _, attribute = owners[0]
        if param.dim() > 2:
            use: StructuredUse = ExpertsUse(module, name, attribute, *groups)
        else:
            use = StructuredUse(module, name, *groups)
        structured.attach(param, use)
        structured.swap(use)
        self._uses.append(use)
        self.layers[name] = groups[0]


def sparse_linear(model: nn.Module, masks: MaskSet | Mapping[str, Tensor]) -> SparseLinear:
    """Makes linear layers whose mask is made of whole rows or columns compute, and keep, only what trains.

    For ``nn.Linear`` and transformers' Conv1D, fused q/k/v layers included, and transformers' experts in 3-D weights, run as
    "eager", "batched_mm" or "grouped_mm", where each expert's matrix has rows or columns of its own. Columns of a Linear (rows
    of a Conv1D): only those input features are kept for the backward. A :class:`~sparseopt.SparseAdamW` with
    ``capture_gradients=True`` takes the gradients into its compact buffer, and follows ``update_masks``; without one
    ``param.grad`` is dense, and 0 outside of the masks. Parameters keep name, shape and storage, state dicts and ``generate``
    are as ever, copies of the model have its own classes' forwards. Parameters whose mask is empty need no gradient meanwhile,
    so that the backward ends at the lowest layer that trains.

    Left to compute all of dW, as :attr:`SparseLinear.left` says: embeddings, weights that several modules share (tied heads),
    experts in 3-D weights of other libraries or run by other kernels, layers with a forward of their own, masks of other kinds.

    Call it when the model is where it trains and before ``torch.compile``d code runs.

    Args:
        model: changed in place until ``remove()``.
        masks: by parameter name; those of the optimizer. Parameters without a mask are left alone.

    Returns:
        What was found; ``with`` it, or its ``remove()``, restores the model.

    Raises:
        ValueError: a mask for a parameter that the model lacks or of another shape, or other masks than the optimizer's.
    """
    return SparseLinear(model, masks)


def _owners(model: nn.Module) -> dict[int, list[tuple[nn.Module, str, str]]]:
    """id(parameter) -> every (module, its name, attribute) that holds it."""
    found: dict[int, list[tuple[nn.Module, str, str]]] = {}
    for name, module in model.named_modules():
        for attribute, param in module._parameters.items():
            if param is not None:
                found.setdefault(id(param), []).append((module, module_name(name), attribute))
    return found


def _unfit(param: Tensor, owners: list[tuple[nn.Module, str, str]]) -> str | None:
    """Why a parameter's layer cannot be structured, whatever its mask."""
    module, name, attribute = owners[0]
    if len(owners) > 1:
        return f"{' and '.join(other for _, other, _ in owners)} share it"
    if structured.is_structured(module) and structured.use_of(param) is not None:
        return f"{name} is structured already"
    if param.dim() > 2:
        why = structured_experts.unfit(module, name, param)
        if why is not None:
            return why
    elif attribute != "weight" or module_kind(module) not in ("Linear", "Conv1D"):
        return f"{name} ({type(module).__name__}) is not an nn.Linear or Conv1D with its own forward"
    if "forward" in module.__dict__:
        return f"the forward of {name} is patched already"
    if type(param) not in (nn.Parameter, Tensor) or param.layout is not torch.strided:
        return f"it is a {type(param).__name__}"
    return None
