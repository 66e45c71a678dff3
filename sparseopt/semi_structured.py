"""2:4 weights in PyTorch's semi-structured format: inference on the sparse tensor cores of Ampere and newer GPUs.

The format keeps, of every group of four weights along the input dimension, two values and where they stood: 9/16 of the dense
bytes in 16-bit types. ``torch.sparse`` has two backends of it: cuSPARSELt, where the build of torch has it, and CUTLASS, for
GPUs of compute capability 8.x alone. Both flatten 3-D inputs to [tokens, inputs] and pad the tokens to a multiple of 8.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparseopt.masks.maskset import MaskSet, normalize_name
from sparseopt.optim.dynamic.layers import Layer, find_layers
from sparseopt.optim.dynamic.patterns import Pattern

if TYPE_CHECKING:
    from torch.sparse import SparseSemiStructuredTensor

__all__ = ["BACKENDS", "semi_structured_backend", "to_semi_structured"]

BACKENDS = ("auto", "cusparselt", "cutlass")
DTYPES = (torch.float16, torch.bfloat16)
CAPABILITY = (8, 0)
TWO_OF_FOUR = Pattern(2, 4)


def to_semi_structured(
    model: nn.Module, masks: MaskSet | Mapping[str, Tensor] | None = None, *, backend: str = "auto"
) -> list[str]:
    """Converts a model's 2:4 linear layers for faster inference, in place.

    Every linear layer (transformers' Conv1D too) with at most two nonzero weights in each group of four along the input
    dimension is converted; embeddings, output heads and all other layers stay dense. Call it under ``torch.no_grad()`` or
    after ``model.requires_grad_(False)``: converted weights neither train nor go into a ``state_dict`` file. Save the dense
    model, load it, then convert.

    Args:
        model: on a CUDA GPU of compute capability 8.0 or newer, in fp16 or bf16.
        masks: of the parameters that are meant to be 2:4, by name; those with every entry active stay dense. None: all that
            are 2:4.
        backend: "cusparselt", "cutlass" (compute capability 8.x only), or "auto": cuSPARSELt where torch has it.

    Returns:
        Names of the converted parameters, in the model's order. A 2:4 layer whose shape the backend does not take stays
        dense, with a warning.

    Raises:
        ValueError: a layer with a mask is not 2:4 or not zero outside of it, a mask for something that the model lacks, a CPU
            or an older GPU, another dtype, or no layer is left to convert. Nothing was converted then.
    """
    layers = find_layers(model)
    chosen = _two_of_four(model, layers) if masks is None else _masked(model, layers, masks)
    kind = semi_structured_backend(backend)
    for layer in chosen:
        _check_place(layer, kind.BACKEND)
    fitting = [layer for layer in chosen if _shape_problem(layer, kind) is None]
    misfits = [f"{layer.name!r} ({_shape_problem(layer, kind)})" for layer in chosen if layer not in fitting]
    if not fitting:
        raise ValueError(f"{kind.BACKEND} takes no 2:4 layer of {type(model).__name__}: {misfits[0]}.")
    if misfits:
        warnings.warn(f"{len(misfits)} 2:4 layers stay dense, {misfits[0]} first.", stacklevel=2)
    owners: dict[int, list[Any]] = {}
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            owners.setdefault(id(weight), []).append(module)
    for layer in fitting:
        dense = layer.param.detach()
        converted: Tensor = kind.from_dense((dense.t() if layer.transposed else dense).contiguous())
        # Conv1D computes addmm(bias, x, weight) with a weight [inputs, outputs]: what it gets is the transposed view of the
        # converted [outputs, inputs], whose product torch dispatches as it does for nn.Linear.
        converted = converted.t() if layer.transposed else converted
        weight = nn.Parameter(converted, requires_grad=False)
        for module in owners[id(layer.param)]:
            module.weight = weight
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(_with_plain_strides)
    return [layer.name for layer in fitting]


def semi_structured_backend(backend: str = "auto") -> type[SparseSemiStructuredTensor]:
    """torch's tensor class of a backend.

    Raises:
        ValueError: an unknown name, or cuSPARSELt was asked for and this build of torch lacks it.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}.")
    available = torch.backends.cusparselt.is_available()
    if backend == "cusparselt" and not available:
        raise ValueError(f"torch {torch.__version__} has no cuSPARSELt: choose backend 'cutlass' or 'auto'.")
    if backend == "cutlass" or not available:
        return torch.sparse.SparseSemiStructuredTensorCUTLASS
    return torch.sparse.SparseSemiStructuredTensorCUSPARSELT


def _two_of_four(model: nn.Module, layers: list[Layer]) -> list[Layer]:
    """Every 2:4 layer of the model."""
    problems = {layer.name: _pattern_problem(layer) for layer in layers}
    found = [layer for layer in layers if problems[layer.name] is None]
    if not found:
        name, problem = next(iter(problems.items()))
        raise ValueError(f"no linear layer of {type(model).__name__} is 2:4; {name!r} {problem}.")
    return found


def _masked(model: nn.Module, layers: list[Layer], masks: MaskSet | Mapping[str, Tensor]) -> list[Layer]:
    """The layers that masks are for, checked."""
    aliases: dict[int, list[str]] = {}
    for raw, param in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(param), []).append(normalize_name(raw))
    known = {name for names in aliases.values() for name in names}
    given = {normalize_name(name): name for name in (masks.names if isinstance(masks, MaskSet) else masks)}
    for name in given:
        if name not in known:
            raise ValueError(f"there is a mask for {name!r}, which {type(model).__name__} does not have.")
    found = []
    for layer in layers:
        alias = next((name for name in aliases[id(layer.param)] if name in given), None)
        if alias is None:
            continue
        mask = masks[given[alias]].to(layer.param.device, torch.bool)
        if tuple(mask.shape) != layer.shape:
            raise ValueError(f"the mask of {alias!r} has shape {tuple(mask.shape)}, the parameter {layer.shape}.")
        if bool(mask.all()):
            continue
        outside = int(torch.count_nonzero(layer.param.detach().masked_fill(mask, 0)))
        if outside:
            raise ValueError(
                f"{alias!r} has {outside} nonzero weights outside of its mask; to_semi_structured() needs weights that were "
                "trained sparse or zeroed (apply_masks_to_model(model, masks, mode='zero'))."
            )
        problem = _pattern_problem(layer)
        if problem is not None:
            raise ValueError(f"{alias!r} is not 2:4: it {problem}.")
        found.append(layer)
    if not found:
        raise ValueError(f"the masks name no linear layer of {type(model).__name__} to convert.")
    return found


def _pattern_problem(layer: Layer) -> str | None:
    """Why a layer is not 2:4, after its name; None if it is."""
    if layer.inputs % 4:
        return f"has {layer.inputs} inputs, which 4 does not divide"
    counts = (TWO_OF_FOUR.groups(layer, layer.param.detach()) != 0).sum(1)
    worst = int(counts.argmax())
    if int(counts[worst]) <= 2:
        return None
    output, group = divmod(worst, layer.inputs // 4)
    return (
        f"has {int(counts[worst])} nonzero weights at inputs {4 * group} to {4 * group + 3} of output {output}, "
        "where at most 2 may be"
    )


def _with_plain_strides(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The inputs with strides that torch flattens to a matrix.

    A dimension of size 1 may have any stride, and has when a cache generates token by token: nn.Linear then expands its weight
    to three dimensions, which the semi-structured format does not know.
    """
    return tuple(x.reshape(-1, x.shape[-1]).contiguous().view(x.shape) if x.dim() > 2 else x for x in args)


def _check_place(layer: Layer, backend: str) -> None:
    param = layer.param
    wanted = "to_semi_structured() needs a CUDA GPU of compute capability 8.0 or newer"
    if param.device.type != "cuda":
        raise ValueError(f"{wanted}; {layer.name!r} is on {param.device}.")
    capability = torch.cuda.get_device_capability(param.device)
    if capability < CAPABILITY:
        name = torch.cuda.get_device_name(param.device)
        raise ValueError(f"{wanted}; {layer.name!r} is on {name} ({capability[0]}.{capability[1]}).")
    if backend == "cutlass" and capability[0] != 8:
        raise ValueError(
            f"torch's CUTLASS kernels for 2:4 weights run on compute capability 8.x, {layer.name!r} is on "
            f"{torch.cuda.get_device_name(param.device)} ({capability[0]}.{capability[1]}): backend 'cusparselt' is needed, and "
            "a build of torch that has it."
        )
    if param.dtype not in DTYPES:
        raise ValueError(f"to_semi_structured() takes fp16 and bf16 weights, {layer.name!r} is {param.dtype}.")


def _shape_problem(layer: Layer, kind: type[SparseSemiStructuredTensor]) -> str | None:
    """Why a backend does not take a layer's shape; None if it does."""
    limits = kind._DTYPE_SHAPE_CONSTRAINTS[layer.param.dtype]  # torch states them nowhere else
    rows, columns = limits.sparse_min_rows, limits.sparse_min_cols
    if layer.outputs % rows or layer.inputs % columns:
        return f"{layer.outputs} outputs and {layer.inputs} inputs must be multiples of {rows} and {columns}"
    return None
