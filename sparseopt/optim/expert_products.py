"""Products of tokens with the matrices of experts, held in 3-D weights, under masks of rows or columns of each matrix.

A mixture's weight W [E, A, B] is E matrices, each multiplied with the tokens X_e of one expert. With their output gradients
G_e, one of L_e [T_e, A], R_e [T_e, B] is X_e and the other G_e (which depends on how W is stored), and dW_e = L_e^T R_e.
Of it

    rows r_e:       L_e[:, r_e]^T R_e
    columns c_e:    L_e^T R_e[:, c_e]

are computed, and where the restricted side is X_e only that is kept of it. Experts may have other rows or columns, other
numbers of them, or none. Products of all experts at once are padded to the largest number, and the padding dropped after:
one expert that trains whole makes the others compute as much.
Nothing here waits for a GPU, but for products in other dtypes than bfloat16, which loop over the experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["CHOSEN", "EACH", "ONE", "SORTED", "Grouped", "Product", "entries", "grouped"]


class Grouped:
    """transformers' product of sorted tokens with their experts' matrices, while something else is in its place.

    torch.compile does not see what stands for a weight in the arguments of ``torch._grouped_mm``, which it calls.
    """

    def __init__(self) -> None:
        self.own: Any = None

    def replace(self, other: Callable[..., Tensor]) -> None:
        from transformers.integrations import moe

        if moe._grouped_mm is not other:
            self.own, moe._grouped_mm = moe._grouped_mm, other

    def put_back(self, other: Callable[..., Tensor]) -> None:
        from transformers.integrations import moe

        if moe._grouped_mm is other:
            moe._grouped_mm = self.own


grouped = Grouped()

# How a product's tokens belong to experts.
ONE, EACH, CHOSEN, SORTED = range(4)


# ---- products --------------------------------------------------------------------------------------------------------
def _multiply(
    x: Tensor, weight: Tensor, transposed: bool, how: int, expert: int, groups: Tensor | None, backward: bool = False
) -> Tensor:
    """x W_e or x W_e^T, by the same product as the module itself or, ``backward``, as autograd for it.

    Args:
        x: ONE: [..., d_in], of one expert. EACH: [E, T, d_in]. CHOSEN: [S, d_in]. SORTED: [S, d_in].
        expert: which, of ONE.
        groups: the experts of the rows, int64 [S], of CHOSEN; where each expert's rows end, int32 [E], of SORTED.
    """
    if how == CHOSEN:
        weight = weight[groups]
    elif how == ONE:
        weight = weight[expert]
    if backward and weight.dtype != x.dtype:  # in the forward that is autocast's affair
        weight = weight.to(x.dtype)
    if how == ONE:
        return F.linear(x, weight) if transposed else x @ weight
    if how == CHOSEN and transposed != backward:
        return torch.bmm(weight if transposed else weight.transpose(1, 2), x.unsqueeze(-1))
    if transposed:
        weight = weight.transpose(1, 2)
    if how == CHOSEN:
        return torch.bmm(x.unsqueeze(1), weight)
    return torch.bmm(x, weight) if how == EACH else grouped.own(x, weight, groups)


@torch.library.custom_op("sparseopt_experts::grouped_outer", mutates_args=())
def _grouped_outer(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """L_e^T R_e of each expert: [S, A], [S, B], int32 [E] -> [E, A, B]. Opaque to torch.compile: rows per expert are data."""
    if (
        left.dtype == torch.bfloat16
        and left.device.type == "cuda"
        and torch.cuda.get_device_capability(left.device)[0] >= 8
    ):
        result = F.grouped_mm(left.t(), right, offs=ends)
        tokens = ends.diff(prepend=ends.new_zeros(1))
        return result.masked_fill_((tokens == 0)[:, None, None], 0)
    result = left.new_zeros(ends.numel(), left.shape[1], right.shape[1])
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            torch.mm(left[start:end].t(), right[start:end], out=result[expert])
        start = end
    return result


@_grouped_outer.register_fake
def _(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    return left.new_empty(ends.shape[0], left.shape[1], right.shape[1])


def _restrict(values: Tensor, where: Tensor, how: int, expert: int, groups: Tensor | None) -> Tensor:
    """The features of each row that its expert trains. ``where``: [E, K], of ONE [k]."""
    if how == ONE:
        return values.index_select(-1, where)
    if how == EACH:
        return values.gather(2, where[:, None].expand(-1, values.shape[1], -1))
    assert groups is not None
    if how == SORTED:  # the expert of each row; rows behind the last expert's belong to none
        rows = torch.arange(values.shape[0], device=values.device, dtype=groups.dtype)
        groups = torch.searchsorted(groups, rows, right=True).clamp(max=where.shape[0] - 1)
    return values.gather(1, where[groups])


def _outer(left: Tensor, right: Tensor, how: int, groups: Tensor | None, experts: int) -> Tensor:
    """L_e^T R_e: [A, B] of ONE, else [E, A, B]."""
    if how == ONE:
        return left.flatten(0, -2).t() @ right.flatten(0, -2)
    if how == EACH:
        return torch.bmm(left.transpose(1, 2), right)
    assert groups is not None
    if how == CHOSEN:
        groups, order = groups.sort(stable=True)
        numbers = torch.arange(experts, device=groups.device, dtype=groups.dtype)
        groups = torch.searchsorted(groups, numbers, right=True).to(torch.int32)
        left, right = left[order], right[order]
    return _grouped_outer(left.contiguous(), right.contiguous(), groups)


def _places(counts: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Of ``total`` things, ``counts`` [E] of each expert, one after the other -> their experts, their numbers there."""
    ends = counts.cumsum(0)
    numbers = torch.arange(total, device=counts.device)
    experts = torch.searchsorted(ends, numbers, right=True)
    return experts, numbers - (ends - counts)[experts]


def entries(counts: Tensor, rows: int, total: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of the entries of columns in memory order -> their experts, rows, and which of the expert's columns."""
    experts, numbers = _places(counts * rows, total)
    each = counts[experts]
    return experts, numbers // each, numbers % each


def _drop_padding(part: Tensor, by_row: bool, counts: Tensor | None, total: int) -> Tensor:
    """[E, K, B] or [E, A, K] -> the entries that train, in memory order. ``counts`` None: every expert has as many."""
    experts, rows, columns = part.shape
    if counts is None:
        each = total // (experts * (columns if by_row else rows))
        return (part[:, :each] if by_row else part[:, :, :each]).reshape(-1)
    if by_row:
        of, number = _places(counts, total // columns)
        return part.view(-1, columns).index_select(0, of * rows + number).view(-1)
    of, row, number = entries(counts, rows, total)
    return part.view(-1).index_select(0, (of * rows + row) * columns + number)


class Product(torch.autograd.Function):
    """Tokens times their experts' matrices; the leaf gets the part of dW that trains, flat."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # as in _multiply
        weight: Tensor,  # [E, A, B]
        leaf: Tensor | None,  # [active entries], of ONE those of the expert; None if it has none
        where: Tensor,  # int64 [E, K], of ONE [k]: the rows or columns, filled up
        counts: Tensor | None,  # int64 [E]: how many are not filling, where experts differ
        groups: Tensor | None,
        how: int,
        expert: int,
        transposed: bool,
        by_row: bool,
    ) -> Tensor:
        y = _multiply(x, weight, transposed, how, expert, groups)
        ctx.by_input = by_row != transposed
        kept = None
        if leaf is not None:
            kept = _restrict(x, where, how, expert, groups) if ctx.by_input else x
            if kept.dtype != y.dtype:  # under autocast
                kept = kept.to(y.dtype)
            ctx.total = leaf.shape[0]
        ctx.how, ctx.expert, ctx.transposed, ctx.by_row = how, expert, transposed, by_row
        ctx.dtype, ctx.shape = x.dtype, x.shape
        where_needed = None if ctx.by_input or leaf is None else where
        ctx.experts = weight.shape[0]
        ctx.save_for_backward(weight if ctx.needs_input_grad[0] else None, kept, where_needed, counts, groups)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, kept, where, counts, groups = ctx.saved_tensors
        how, expert = ctx.how, ctx.expert
        if how == CHOSEN:
            grad = grad.flatten(1)  # [S, d_out, 1] or [S, 1, d_out]
        elif how == SORTED:
            grad = grad.contiguous()
        dx = part = None
        if ctx.needs_input_grad[0]:
            dx = _multiply(grad, weight, not ctx.transposed, how, expert, groups, True).reshape(ctx.shape)
            if dx.dtype != ctx.dtype:
                dx = dx.to(ctx.dtype)
        if kept is not None:
            if where is not None:
                grad = _restrict(grad, where, how, expert, groups)
            left, right = (grad, kept) if ctx.transposed else (kept, grad)
            part = _outer(left, right, how, groups, ctx.experts)
            part = _drop_padding(part if how != ONE else part[None], ctx.by_row, counts, ctx.total)
        return dx, None, part, None, None, None, None, None, None, None
