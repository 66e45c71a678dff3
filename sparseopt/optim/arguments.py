"""Checks of SparseAdamW's arguments and parameters; the messages about hyper-parameters are torch's own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparseopt.masks.maskset import MaskSet

__all__ = [
    "check_dtypes",
    "check_hyperparameters",
    "check_options",
    "new_masks",
    "refuse_shared_storage",
    "resolve_masks",
]


def check_hyperparameters(group: Mapping[str, Any]) -> None:
    """Raises ValueError for values that torch.optim.AdamW refuses as well."""
    lr, betas, eps, weight_decay = group["lr"], group["betas"], group["eps"], group["weight_decay"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    if not isinstance(lr, Tensor) and not lr >= 0.0:
        raise ValueError(f"Invalid learning rate: {lr}")
    if not eps >= 0.0:
        raise ValueError(f"Invalid epsilon value: {eps}")
    if isinstance(betas[0], Tensor) != isinstance(betas[1], Tensor):
        raise ValueError("betas must be either both floats or both Tensors")
    for index, beta in enumerate(betas):
        if isinstance(beta, Tensor):
            if beta.numel() != 1:
                raise ValueError(f"Tensor betas[{index}] must be 1-element")
        elif not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {index}: {beta}")
    if not weight_decay >= 0.0:
        raise ValueError(f"Invalid weight_decay value: {weight_decay}")


def check_options(
    unmasked: object, master_weights: object, max_grad_norm: float | None, reduce_dtype: torch.dtype
) -> None:
    """Raises ValueError for options of the whole optimizer that are out of range."""
    if unmasked not in ("error", "freeze", "dense"):
        raise ValueError(f"unmasked must be 'error', 'freeze' or 'dense', got {unmasked!r}.")
    if master_weights not in (True, False, "residual", "fp32"):
        raise ValueError(f"master_weights must be True, False, 'residual' or 'fp32', got {master_weights!r}.")
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise ValueError(f"max_grad_norm must be positive or None, got {max_grad_norm}.")
    if reduce_dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"reduce_dtype must be torch.float32 or torch.bfloat16, got {reduce_dtype}.")


def check_dtypes(params: Iterable[Tensor]) -> None:
    """Raises TypeError for parameters of a dtype that there is no kernel for."""
    for param in params:
        if param.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise TypeError(f"SparseAdamW trains fp32, bf16, fp16 and fp64 parameters, got one of {param.dtype}.")


def refuse_shared_storage(params: Iterable[tuple[str, Tensor]]) -> None:
    """Raises ValueError for two names of one memory: every entry would be stepped twice."""
    owner: dict[tuple[torch.device, int], str] = {}
    for name, param in params:
        if param.numel() and param.data_ptr():
            first = owner.setdefault((param.device, param.data_ptr()), name)
            if first != name:
                raise ValueError(f"parameters {first!r} and {name!r} share memory (tied weights): pass one of them.")


def resolve_masks(
    masks: MaskSet | Mapping[str, Tensor] | Sequence[Tensor] | None,
    names: Sequence[str],
    params: Sequence[Tensor],
    unmasked: str,
    named: bool,
) -> dict[str, Tensor | None]:
    """name -> packed mask on the CPU; None where every entry is active."""
    if masks is None:
        return dict.fromkeys(names)
    if isinstance(masks, Sequence):
        if len(masks) != len(params):
            raise ValueError(
                f"masks is a list of {len(masks)} for {len(params)} parameters; give one bool tensor for each."
            )
        masks = MaskSet.from_bool(dict(zip(names, masks, strict=True)))
    elif not isinstance(masks, (MaskSet, Mapping)):
        raise TypeError(f"masks must be a MaskSet, a dict, a list of bool tensors or None, got {type(masks).__name__}.")
    elif not named:
        raise ValueError(
            "masks are given by name but the parameters came without names: pass model.named_parameters() instead of "
            "model.parameters(), or masks as a list aligned with the parameters."
        )
    given = masks if isinstance(masks, MaskSet) else MaskSet.from_bool(masks)
    unknown = [name for name in given.names if name not in set(names)]
    if unknown:
        raise ValueError(
            f"{len(unknown)} masks are for parameters that the optimizer does not have: {_some(unknown)}; "
            f"its parameters are {_some(names)}."
        )
    missing = [name for name in names if name not in given]
    if missing and unmasked == "error":
        raise ValueError(
            f"{len(missing)} of {len(names)} parameters have no mask: {_some(missing)}. Pass unmasked='freeze' to leave them "
            "as they are or unmasked='dense' to train all of them."
        )
    result: dict[str, Tensor | None] = {}
    for name, param in zip(names, params, strict=True):
        if name in given:
            if given.shapes[name] != tuple(param.shape):
                raise ValueError(
                    f"the mask of {name!r} has shape {given.shapes[name]}, the parameter {tuple(param.shape)}."
                )
            result[name] = given.packed(name)
        elif unmasked == "freeze":
            result[name] = torch.zeros((param.numel() + 7) // 8, dtype=torch.uint8)
        else:
            result[name] = None
    return result


def _some(names: Sequence[str], limit: int = 5) -> str:
    shown = ", ".join(repr(n) for n in names[:limit])
    return shown + (f", ... ({len(names)} in all)" if len(names) > limit else "")


def new_masks(masks: MaskSet | Mapping[str, Tensor], params: Mapping[str, Tensor]) -> MaskSet:
    """Masks that replace those of some of the optimizer's parameters.

    Raises:
        ValueError: one is for another parameter or another shape.
    """
    given = masks if isinstance(masks, MaskSet) else MaskSet.from_bool(masks)
    for name in given.names:
        if name not in params:
            raise ValueError(f"a mask came for {name!r}, which is not among the optimizer's parameters.")
        if given.shapes[name] != tuple(params[name].shape):
            raise ValueError(
                f"the mask of {name!r} has shape {given.shapes[name]}, the parameter {tuple(params[name].shape)}."
            )
    return given
