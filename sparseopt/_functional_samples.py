"""The checked functions of per-sample gradients; :mod:`sparseopt.functional` has them too, beside all others."""

from __future__ import annotations

import torch
from torch import Tensor

from sparseopt import _schema  # noqa: F401  (registers the ops)

__all__ = ["ACTIVATION_DTYPES", "PROJECTION_RANK", "cross_entropy_", "describe", "grad_project"]

_ops = torch.ops.sparseopt

ACTIVATION_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PROJECTION_RANK = 256  # the most rows of a projection matrix


def grad_project(gradients: Tensor, inputs: Tensor, matrix: Tensor, scale: float = 1.0) -> Tensor:
    """Projects the per-sample weight gradients of a linear layer, without the weight gradients: P_o dW_b P_i^T.

    With dW_b = sum over tokens t of g_bt x_bt^T the slice is ``scale * sum_t (matrix g_bt) (inputs_bt)^T``, where
    ``inputs_bt = P_i x_bt`` was kept in the forward. Sums over d_out and over tokens are fp32 (fp32 arguments: no TF32);
    two runs give the same bits.

    Args:
        gradients: [B, T, d_out], fp32, bf16 or fp16: of the layer's output. Read where they are whatever the strides of
            the first two dimensions; copied only if the last is not contiguous (an expanded sum, say).
        inputs: [B, T, k_i], fp32, bf16 or fp16, k_i from 1 to 256 (ones for a bias, k_i = 1).
        matrix: [k_o, d_out], k_o from 1 to 256, in the gradients' dtype or fp32. fp32 beside 16-bit gradients is
            computed in fp32, without tensor cores: exact but slower, so entries of -1 and 1 are better kept in the
            gradients' dtype with ``scale`` apart.
        scale: multiplies the fp32 result.

    Returns:
        fp32[B, k_o, k_i] on the same device.
    """
    if gradients.dim() != 3 or gradients.dtype not in ACTIVATION_DTYPES:
        raise ValueError(f"gradients must be [B, T, d_out] of fp32, bf16 or fp16, got {describe(gradients)}.")
    batch, tokens, width = gradients.shape
    if (
        inputs.dim() != 3
        or inputs.shape[:2] != (batch, tokens)
        or not 1 <= inputs.shape[2] <= PROJECTION_RANK
        or inputs.dtype not in ACTIVATION_DTYPES
        or inputs.device != gradients.device
    ):
        raise ValueError(
            f"inputs must be [{batch}, {tokens}, 1..{PROJECTION_RANK}] of fp32, bf16 or fp16 on {gradients.device}, "
            f"got {describe(inputs)}."
        )
    if (
        matrix.dim() != 2
        or matrix.shape[1] != width
        or not 1 <= matrix.shape[0] <= PROJECTION_RANK
        or matrix.dtype not in (gradients.dtype, torch.float32)
        or matrix.device != gradients.device
    ):
        raise ValueError(
            f"matrix must be [1..{PROJECTION_RANK}, {width}] of {gradients.dtype} or fp32 on {gradients.device}, "
            f"got {describe(matrix)}."
        )
    return _ops.grad_project(_last_contiguous(gradients), _last_contiguous(inputs), _last_contiguous(matrix), scale)


def cross_entropy_(logits: Tensor, targets: Tensor, ignore_index: int = -100) -> Tensor:
    """Cross entropy of each row, and its gradient in place of the logits.

    Args:
        logits: [N, V], fp32, bf16 or fp16, last dimension contiguous; overwritten with d loss / d logits, softmax -
            onehot in their dtype (computed in fp32), zeros in ignored rows.
        targets: int64[N], entries from 0 to V - 1 or ``ignore_index``. On the CPU, outside ``torch.compile``, others
            are an error (two passes over N numbers). Elsewhere looking would wait for the device: there such a row's
            loss and gradient become NaN, and nothing outside the row is read.
        ignore_index: rows with this target have loss 0, whatever their logits.

    Returns:
        fp32[N], -log softmax(logits)[target].
    """
    if logits.dim() != 2 or logits.dtype not in ACTIVATION_DTYPES:
        raise ValueError(f"logits must be [N, V] of fp32, bf16 or fp16, got {describe(logits)}.")
    if logits.stride(1) != 1 and logits.shape[1] > 1:
        raise ValueError(f"logits must have a contiguous last dimension, got strides {logits.stride()}.")
    if targets.shape != logits.shape[:1] or targets.dtype != torch.int64 or targets.device != logits.device:
        raise ValueError(f"targets must be int64[{logits.shape[0]}] on {logits.device}, got {describe(targets)}.")
    if targets.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = ((targets < 0) | (targets >= logits.shape[1])) & (targets != ignore_index)
        if wrong.any():
            raise ValueError(
                f"targets must be from 0 to {logits.shape[1] - 1} or {ignore_index}, got {int(targets[wrong][0])}."
            )
    return _ops.cross_entropy_(logits, targets.contiguous(), ignore_index)


def describe(value: object) -> str:
    """A tensor in an error message: dtype, shape and device."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    dtype = str(value.dtype).removeprefix("torch.")
    return f"{dtype}{list(value.shape)} on {value.device}"


def _last_contiguous(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()
