"""Losses per token and per sample over a frozen head, chunk by chunk: logits are never stored whole.

A head's logits are the largest activation of a small model (8 x 1024 tokens x 50,257 bf16: 0.8 GB, several times over in
a plain backward). Since the head is frozen, a chunk's logits are done with once they have given the chunk's losses and
d loss / d hidden, so both are computed in the forward, and the backward only multiplies by what comes in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparseopt import functional

__all__ = ["HeadSlice", "linear_cross_entropy", "per_sample_losses"]

# Logits at a time. A GPU multiplies few rows by a large vocabulary slowly: it reads the head again for each chunk.
CHUNK_BYTES = {"cpu": 64 * 2**20, "cuda": 256 * 2**20}
ROW_BYTES = 128  # GPUs multiply matrices with rows of another length several times slower: GPT-2's vocabulary is odd
CHUNK_ROWS = 128  # chunks are multiples of it, at least two
_TOKENS = 32  # rows that `_project_rows` gives to one sample of the op

# Configuration entries with these in their names change logits unless they are neutral; attention's and routers' do not.
_AFTER_HEAD = ("logit", "softcap", "soft_cap", "output_multiplier", "lm_head_multiplier")
_ELSEWHERE = ("attn", "attention", "router", "logits_to_keep", "z_loss")


class HeadSlice(NamedTuple):
    """What projects the gradient of a head's weight or bias: its slice is the gradient of ``leaf``.

    Attributes:
        leaf: [B, k_o, k_i], any values, requires grad: gets ``scale * sum_t u_t (output d_t) (input h_t)^T`` over the
            tokens of each sample, with d_t = d loss_t / d logits and u_t the incoming gradient of loss_t.
        output: P_o [k_o, V], in the logits' dtype or fp32.
        input: P_i [k_i, d]; None for the bias, whose inputs are ones (k_i = 1).
        scale: multiplies the fp32 result.
    """

    leaf: Tensor
    output: Tensor
    input: Tensor | None = None
    scale: float = 1.0


# ---- per token -------------------------------------------------------------------------------------------------------
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    chunk: int | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    project: Sequence[HeadSlice] = (),
) -> Tensor:
    """Cross entropy of ``hidden @ weight.T + bias`` for each row, differentiable in ``hidden`` alone.

    Equals ``F.cross_entropy(F.linear(hidden, weight, bias), targets, reduction="none")`` with logits in ``hidden``'s
    dtype (autocast's where that is on) and everything after them in fp32. The head is frozen: weight and bias get no
    gradient. d loss / d hidden is computed with the losses and kept in ``hidden``'s dtype; neither is done where nothing
    requires it.

    Args:
        hidden: [N, d] fp32, bf16 or fp16.
        weight: [V, d], not requiring grad.
        targets: int64[N], entries from 0 to V - 1 or ``ignore_index``.
        bias: [V] or None.
        ignore_index: rows with this target have loss 0 and no gradient.
        chunk: rows at a time; by default as many as make 64 MiB of logits (256 MiB on a GPU), a multiple of 128, at least 256.
        scale: multiplies the logits.
        softcap: then makes them ``softcap * tanh(logits / softcap)`` (Gemma 2).
        project: slices of the head's own gradient; rows are then B samples of N / B consecutive rows each.

    Returns:
        fp32[N].

    Raises:
        ValueError: shapes that do not fit, or a weight, bias or projection matrix that requires grad.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"expected hidden [N, d] and weight [V, d], got {_shape(hidden)} and {_shape(weight)}.")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets must be int64[{hidden.shape[0]}], got {_shape(targets)}.")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have {weight.shape[0]} entries, got {_shape(bias)}.")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1 row, got {chunk}.")
    frozen: list[tuple[str, Tensor | None]] = [("weight", weight), ("bias", bias)]
    for part in project:
        frozen += [("projection matrix", part.output), ("projection matrix", part.input)]
        _check_slice(part, hidden, weight)
    if torch.is_grad_enabled():
        for name, tensor in frozen:
            if tensor is not None and tensor.requires_grad:
                raise ValueError(f"the {name} of linear_cross_entropy gets no gradient: freeze or detach it first.")
    else:  # a Function is told what requires grad, not whether anybody will ask
        hidden, project = hidden.detach(), ()
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    if chunk is None:
        most = CHUNK_BYTES.get(kind, CHUNK_BYTES["cpu"])
        chunk = max(2, most // (max(1, weight.shape[0]) * dtype.itemsize) // CHUNK_ROWS) * CHUNK_ROWS
    slices = tuple(tensor for part in project for tensor in (part.leaf, part.output, part.input))
    scales = tuple(part.scale for part in project)
    cast = weight.to(dtype), None if bias is None else bias.to(dtype)
    return _LinearCrossEntropy.apply(hidden, *cast, targets, ignore_index, chunk, scale, softcap, scales, *slices)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        ignore_index: int,
        chunk: int,
        scale: float,
        softcap: float | None,
        scales: tuple[float, ...],
        *slices: Tensor | None,
    ) -> Tensor:
        rows = hidden.shape[0]
        wanted = ctx.needs_input_grad[0]
        parts = [i for i in range(len(scales)) if ctx.needs_input_grad[9 + 3 * i]]
        losses, gradients = [], []
        projected: list[list[Tensor]] = [[] for _ in scales]
        width = weight.shape[0]
        weight, bias = _whole_rows(weight, bias)
        for first in range(0, rows, chunk):
            part = hidden[first : first + chunk].to(weight.dtype)
            logits = F.linear(part, weight, bias)
            if scale != 1.0:
                logits.mul_(scale)
            slope = None
            if softcap is not None:
                ratio = torch.tanh(logits / softcap)
                logits = ratio * softcap
                slope = ratio.square_().neg_().add_(1) if wanted or parts else None
            losses.append(functional.cross_entropy_(logits[:, :width], targets[first : first + chunk], ignore_index))
            if not wanted and not parts:
                continue
            if slope is not None:  # from the logits back to what the head returned
                logits.mul_(slope)
            if scale != 1.0:
                logits.mul_(scale)
            if wanted:
                gradients.append((logits @ weight).to(hidden.dtype))
            for i in parts:
                projected[i].append(_project_rows(logits[:, :width], slices[3 * i + 1]))
        saved: list[Tensor | None] = [_joined(gradients, hidden) if wanted else None]
        for i in parts:
            matrix = slices[3 * i + 2]
            ones = hidden.new_ones((rows, 1), dtype=torch.float32)
            inputs = ones if matrix is None else F.linear(hidden.to(weight.dtype).to(matrix.dtype), matrix)
            saved += [_joined(projected[i], inputs), inputs]
        ctx.save_for_backward(*saved)
        ctx.parts, ctx.scales = parts, scales
        ctx.shapes = tuple(None if t is None else t.shape for t in slices[::3])
        return _joined(losses, hidden.new_empty((0,), dtype=torch.float32))

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients, *projected = ctx.saved_tensors
        to_hidden = None
        if gradients is not None:
            to_hidden = (gradients * upstream[:, None]).to(gradients.dtype)
        to_slices: list[Tensor | None] = [None] * (3 * len(ctx.scales))
        for place, i in enumerate(ctx.parts):
            outputs, inputs = projected[2 * place : 2 * place + 2]
            batch, k_o, k_i = ctx.shapes[i]
            weighted = (outputs * upstream[:, None]).view(batch, -1, k_o)
            # fp32 whatever autocast and TF32 say.
            to_slices[3 * i] = functional.grad_project(
                weighted, inputs.view(batch, -1, k_i), torch.eye(k_o, device=weighted.device), ctx.scales[i]
            )
        return (to_hidden, *(None,) * 8, *to_slices)


def _whole_rows(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """A head with tokens of weight zero added on a GPU, so that rows of logits are multiples of ROW_BYTES.

    Their logits are 0 and nobody's target; no loss sees them and they stay as they are, so the product with the gradient
    of the others gets nothing from them. The copy costs what reading the weight twice costs.
    """
    missing = -weight.shape[0] % _row_unit(weight)
    if not missing:
        return weight, bias
    return F.pad(weight, (0, 0, 0, missing)), None if bias is None else F.pad(bias, (0, missing))


def _row_unit(weight: Tensor) -> int:
    return ROW_BYTES // weight.element_size() if weight.is_cuda else 1


def _project_rows(gradients: Tensor, matrix: Tensor | None) -> Tensor:
    """[n, V] x [k_o, V] -> fp32 [n, k_o], sums in fp32 whatever the dtype: the op, with unit vectors for inputs."""
    assert matrix is not None
    whole = gradients.shape[0] // _TOKENS * _TOKENS
    found = []
    for block, tokens in ((gradients[:whole], _TOKENS), (gradients[whole:], gradients.shape[0] - whole)):
        if block.shape[0]:
            samples = block.view(-1, tokens, block.shape[1])
            units = torch.eye(tokens, device=gradients.device).expand(samples.shape[0], tokens, tokens)
            slices = functional.grad_project(samples, units, matrix)  # [n / tokens, k_o, tokens]
            found.append(slices.transpose(1, 2).reshape(-1, matrix.shape[0]))
    return torch.cat(found)


def _joined(chunks: list[Tensor], like: Tensor) -> Tensor:
    """Chunks put together; none where there were no rows."""
    return torch.cat(chunks) if chunks else torch.zeros_like(like)


def _shape(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _check_slice(part: HeadSlice, hidden: Tensor, weight: Tensor) -> None:
    batch, k_o, k_i = part.leaf.shape
    if batch < 1 or hidden.shape[0] % batch:
        raise ValueError(f"a head's leaf has {batch} samples, which {hidden.shape[0]} rows are no multiple of.")
    if part.output.shape != (k_o, weight.shape[0]):
        raise ValueError(f"a head's output matrix must be [{k_o}, {weight.shape[0]}], got {_shape(part.output)}.")
    expected = (1,) if part.input is None else tuple(part.input.shape)
    if expected != ((1,) if part.input is None else (k_i, hidden.shape[1])) or (part.input is None and k_i != 1):
        raise ValueError(f"a head's input matrix must be [{k_i}, {hidden.shape[1]}], got {list(expected)}.")


# ---- per sample ------------------------------------------------------------------------------------------------------
def per_sample_losses(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    reduction: str = "mean",
    *,
    project: Sequence[HeadSlice] = (),
) -> Tensor:
    """Loss of each sample on its own next tokens, the same alone and in a batch (padded on the right).

    Runs the model without its head (``model.base_model``), then the head in chunks; a model's own ``labels`` loss would
    store all logits and average over the batch.

    Args:
        model: a causal language model in transformers' manner; its head's parameters must be frozen, or gradients off.
        input_ids: int64[B, T].
        attention_mask: [B, T], 0 on padding.
        labels: int64[B, T], shifted here as transformers does; -100 is ignored. By default ``input_ids``, without
            padding and without tokens predicted from padding.
        reduction: "mean" over the sample's own targets, or "sum". A sample without any has loss 0.
        project: slices of the head's own gradient (:class:`HeadSlice`), B samples each.

    Returns:
        fp32[B].

    Raises:
        ValueError: arguments that do not fit, or a model whose logits are not its head's output on its base's (but for
            soft-capping and the scales of Cohere and Granite, which are applied).
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}.")
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids must be [B, T], got {_shape(input_ids)}.")
    for name, given in (("attention_mask", attention_mask), ("labels", labels)):
        if given is not None and given.shape != input_ids.shape:
            raise ValueError(f"{name} must have the shape of input_ids {list(input_ids.shape)}, got {_shape(given)}.")
    base, head = _base_and_head(model)
    scale, softcap = _after_head(model)
    if labels is None:
        labels = input_ids
        if attention_mask is not None:
            present = attention_mask != 0
            predicted = present & F.pad(present, (1, 0))[:, :-1]
            labels = labels.masked_fill(~predicted, -100)
    # The last position stays, as an ignored row: dropping it would copy all hidden states.
    targets = F.pad(labels, (0, 1), value=-100)[:, 1:]
    output = base(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, return_dict=True)
    hidden = output.last_hidden_state
    losses = linear_cross_entropy(
        hidden.reshape(-1, hidden.shape[-1]), head.weight, targets.reshape(-1), bias=getattr(head, "bias", None),
        scale=scale, softcap=softcap, project=project,
    ).view(targets.shape)  # fmt: skip
    total = losses.sum(1)
    return total if reduction == "sum" else total / (targets != -100).sum(1).clamp(min=1)


def _base_and_head(model: nn.Module) -> tuple[Any, Any]:
    """The model without its head, and the head."""
    name = type(model).__name__
    find: Any = getattr(model, "get_output_embeddings", None)
    head: Any = None if find is None else find()
    if not isinstance(getattr(head, "weight", None), Tensor) or head.weight.dim() != 2:
        raise ValueError(f"per_sample_losses needs a causal language model with a linear head, got {name}.")
    config = getattr(model, "config", None)
    base = getattr(model, "base_model", None)
    if base is None or base is model or getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"per_sample_losses needs a decoder that `base_model` holds without its head, got {name}.")
    return base, head


def _after_head(model: nn.Module) -> tuple[float, float | None]:
    """(scale, soft cap) of the logits after the head; what else the configuration says of logits is refused."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    if config is None:
        return 1.0, None
    family = str(getattr(config, "model_type", ""))
    scale, softcap = 1.0, None
    for name, value in vars(config).items():
        if value is None or isinstance(value, (bool, dict, list)) or any(word in name for word in _ELSEWHERE):
            continue
        if value == 1 or not any(word in name for word in _AFTER_HEAD):
            continue
        if name == "final_logit_softcapping":
            softcap = float(value)
        elif name == "logit_scale" and family.startswith("cohere"):
            scale = float(value)
        elif name == "logits_scaling" and family.startswith("granite"):
            scale = 1.0 / float(value)
        else:
            raise ValueError(
                f"per_sample_losses does not know how {type(model).__name__} changes its logits: {name} is {value!r}."
            )
    return scale, softcap
