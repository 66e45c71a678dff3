"""Masks applied to a model in place: gradients of inactive entries dropped, or inactive weights set to 0."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sparseopt import functional
from sparseopt.masks._bits import unpack_range
from sparseopt.masks.maskset import MaskSet, normalize_name

__all__ = ["AppliedMasks", "apply_masks_to_model", "zero_inactive"]

MODES = ("freeze", "zero")
BLOCK = 1 << 24  # entries whose mask is unpacked at a time while weights are set to 0


@dataclass
class AppliedMasks:
    """What :func:`apply_masks_to_model` did; with ``"freeze"`` also the handle that undoes it.

    Attributes:
        mode: "freeze" or "zero".
        active_parameters, total_parameters: entries of the masked parameters, tied ones once.
        inactive_share: share of them that is frozen, or was set to 0.
        frozen: names of the parameters with nothing active, whose ``requires_grad`` is now False ("freeze").
        untouched: names of the model's parameters that were left as they are.
    """

    mode: str
    active_parameters: int
    total_parameters: int
    frozen: list[str]
    untouched: list[str]
    _hooks: list[torch.utils.hooks.RemovableHandle] = field(default_factory=list, repr=False)
    _stopped: list[nn.Parameter] = field(default_factory=list, repr=False)

    @property
    def inactive_share(self) -> float:
        return 1 - self.active_parameters / self.total_parameters if self.total_parameters else 0.0

    def remove(self) -> None:
        """Lets every entry train again: takes the hooks away and restores ``requires_grad``. A second call does nothing.

        Raises:
            ValueError: after ``mode="zero"``, whose old weights nobody has kept.
        """
        if self.mode == "zero":
            raise ValueError("weights that were set to 0 cannot be brought back: load the model again.")
        for hook in self._hooks:
            hook.remove()
        for param in self._stopped:
            param.requires_grad_(True)
        self._hooks.clear()
        self._stopped.clear()

    def __str__(self) -> str:
        what = "frozen" if self.mode == "freeze" else "set to 0"
        inactive = self.total_parameters - self.active_parameters
        return f"{inactive:,} of {self.total_parameters:,} masked weights {what} ({self.inactive_share:.2%})"


def apply_masks_to_model(
    model: nn.Module,
    masks: MaskSet | Mapping[str, Tensor],
    mode: str = "freeze",
    *,
    keep_unmasked: bool = False,
) -> AppliedMasks:
    """Applies masks to a model, in place.

    ``"freeze"`` (the default) drops the gradients of inactive entries: a hook sets them to 0 as soon as backward has
    accumulated them (one packed bit an entry is kept), and parameters with nothing active stop requiring gradients.
    Any optimizer can follow, but a dense AdamW still decays frozen entries, and momentum from before moves them; its
    state is as large as ever. To fine-tune only the important entries, with all others bit-identical and state for the
    active ones only, no call is needed::

        masks = load_masks_from_hf("username/pretrained-masks", 10000)
        optimizer = sparseopt.SparseAdamW(model.named_parameters(), masks=masks, lr=1e-5)

    With an optimizer of torch::

        handle = apply_masks_to_model(model, masks)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, weight_decay=0.0)
        ...
        handle.remove()

    ``"zero"`` sets inactive weights to 0, which usually destroys a model unless it was trained so.

    Args:
        model: its parameters are found by name (wrappers' prefixes do not matter); tied parameters count once, under any
            of their names. Parameters without a mask are left alone.
        masks: a MaskSet, or name -> bool tensor of the parameter's shape. Each must belong to a parameter.
        mode: "freeze" or "zero".
        keep_unmasked: also leave parameters alone whose mask has nothing active, as that of a parameter that was excluded
            when the mask was found (embeddings, say).

    Returns:
        Counts, and ``remove()`` for "freeze".

    Raises:
        ValueError: unknown mode; a mask that fits no parameter, or not its shape; two different masks for one tied
            parameter; sharded parameters. Nothing has changed then.
        TypeError: a mask is not a bool tensor.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be 'freeze' or 'zero', got {mode!r}.")
    if not isinstance(masks, MaskSet):
        masks = MaskSet.from_bool(masks)
    found, untouched = _match(model, masks)
    chosen = {}
    for name, param in found.items():
        if keep_unmasked and not masks.count(name):
            untouched.append(name)
        else:
            chosen[name] = param
    active, total = (
        sum(masks.count(name) for name in chosen),
        sum(math.prod(masks.shapes[name]) for name in chosen),
    )
    applied = AppliedMasks(mode, active, total, [], untouched)
    if mode == "zero":
        emptied = [name for name, param in chosen.items() if param.numel() and not masks.count(name)]
        for name, param in chosen.items():
            zero_inactive(param, masks.packed(name))
        if emptied:
            warnings.warn(
                f"{len(emptied)} parameters have nothing active and are 0 throughout now, {emptied[0]!r} among them; "
                "keep_unmasked=True leaves such parameters as they are.",
                stacklevel=2,
            )
        return applied
    for name, param in chosen.items():
        _freeze(name, param, masks, applied)
    rest = ', unmasked="dense"' if untouched else ""
    warnings.warn(
        "the gradients of inactive entries are dropped, but a dense AdamW still decays those weights, and momentum from "
        f"before moves them: sparseopt.SparseAdamW(model.named_parameters(), masks=masks{rest}) does neither.",
        stacklevel=2,
    )
    return applied


def _match(model: nn.Module, masks: MaskSet) -> tuple[dict[str, nn.Parameter], list[str]]:
    """-> parameter by the name of its mask, tied ones once; names of parameters without a mask."""
    names: dict[str, nn.Parameter] = {}
    for raw, param in model.named_parameters(remove_duplicate=False):
        names[normalize_name(raw)] = param
    owners: dict[int, str] = {}
    found: dict[str, nn.Parameter] = {}
    for name, shape in masks.shapes.items():
        parameter = names.get(name)
        if parameter is None:
            raise ValueError(f"the mask of {name!r} fits no parameter of the model, which has {len(names)}.")
        if hasattr(parameter, "to_local"):
            raise ValueError(f"parameter {name!r} is sharded: apply masks before the model is sharded.")
        if tuple(parameter.shape) != shape:
            raise ValueError(f"parameter {name!r} has shape {list(parameter.shape)}, its mask has {list(shape)}.")
        owner = owners.setdefault(id(parameter), name)
        if owner == name:
            found[name] = parameter
        elif not torch.equal(masks.packed(name), masks.packed(owner)):
            raise ValueError(f"parameters {owner!r} and {name!r} are tied, but their masks differ.")
    untouched = []
    for name, parameter in names.items():
        if owners.setdefault(id(parameter), name) == name and name not in found:
            untouched.append(name)
    return found, untouched


# ---- freeze ----------------------------------------------------------------------------------------------------------
class _DropInactive:
    """Sets the gradients of inactive entries to 0, where the gradient is."""

    __slots__ = ("bits", "name", "shape")

    def __init__(self, name: str, bits: Tensor, shape: tuple[int, ...]) -> None:
        self.name, self.bits, self.shape = name, bits, shape

    def __call__(self, param: Tensor) -> None:
        gradient = param.grad
        if gradient is None:  # another hook has taken it
            return
        if gradient.layout is not torch.strided:
            raise ValueError(f"the gradient of {self.name!r} is {gradient.layout}: masks need dense gradients.")
        if self.bits.device != gradient.device:  # the model was moved
            self.bits = self.bits.to(gradient.device)
        # NaN and inf go as well, which a product would keep.
        gradient.detach().masked_fill_(~functional.unpack_mask(self.bits, self.shape), 0)


def _freeze(name: str, param: nn.Parameter, masks: MaskSet, applied: AppliedMasks) -> None:
    active = masks.count(name)
    if not active and param.numel():
        applied.frozen.append(name)
        if param.requires_grad:
            applied._stopped.append(param)
        param.requires_grad_(False)
        param.grad = None  # or the next step would still use it
    elif param.requires_grad and active < param.numel():
        hook = _DropInactive(name, masks.packed(name).to(param.device), tuple(param.shape))
        hook(param)
        applied._hooks.append(param.register_post_accumulate_grad_hook(hook))


# ---- zero ------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def zero_inactive(param: nn.Parameter, packed: Tensor) -> None:
    """Sets inactive weights to 0, in place and through the version counter: an optimizer with master weights notices."""
    weights = param.detach()
    if not weights.is_contiguous():
        weights.masked_fill_(~functional.unpack_mask(packed, tuple(param.shape)).to(weights.device), 0)
        return
    flat = weights.view(-1)
    for start in range(0, flat.numel(), BLOCK):
        stop = min(start + BLOCK, flat.numel())
        flat[start:stop].masked_fill_(~unpack_range(packed, start, stop).to(flat.device), 0)
