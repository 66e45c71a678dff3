"""Layers whose masks are whole rows or columns: gradients and training equal those of whole gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from structured_model import group_mask, loss_of, make_masks, make_model
from torch import Tensor, nn

import sparseopt as so

CHECKPOINTING = [None, "reentrant", "non-reentrant"]
TOLERANCE = {
    torch.float32: {"rtol": 1e-6, "atol": 1e-7},
    torch.bfloat16: {"rtol": 1e-2, "atol": 1e-4},
    torch.float64: {"rtol": 1e-12, "atol": 1e-14},
}


def optimizer_for(model: nn.Module, masks: Any, capture: bool = True, **options: Any) -> so.SparseAdamW:
    return so.SparseAdamW(model.named_parameters(), lr=0.02, masks=masks, capture_gradients=capture, **options)


def captured(opt: so.SparseAdamW) -> dict[str, Tensor]:
    assert opt._capture is not None
    return {name: values.clone() for name, values in opt._capture.pending().items()}


# ---- gradients -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("grain", [None, "row", "column"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_captured_gradients_equal_dense_ones(dtype: torch.dtype, grain: str | None, checkpointing: str | None) -> None:
    model, dense = make_model(dtype, checkpointing=checkpointing), make_model(dtype)
    masks = make_masks(model, grain)
    opt = optimizer_for(model, masks)
    with so.sparse_linear(model, masks) as found:
        assert len(found.layers) == (8 if grain is None else 10)
        loss_of(model, 0).backward()
    loss_of(dense, 0).backward()
    values = captured(opt)
    for name, param in dense.named_parameters():
        if masks[name].any():
            assert param.grad is not None
            torch.testing.assert_close(values[name], param.grad[masks[name]].float(), **TOLERANCE[dtype])
    assert all(param.grad is None for param in model.parameters())
