"""Projected layers: forwards that keep A P_i^T instead of A, and backwards that project instead of making dW.

Per sample and layer with inputs A [T, d_in] and output gradients G [T, d_out]

    P_o dW P_i^T = (G P_o^T)^T (A P_i^T)          [k_o, k_i]

so the forward saves A P_i^T [T, k_i], the backward computes dA = G W (where something below needs it) and the projection,
and dW never exists. The projection is returned as the gradient of a leaf [batch, k_o, k_i] whose values nobody reads.
Autograd does the rest: it adds up the uses of a weight, stops below the lowest projected layer, recomputes under
checkpointing, and traces under ``torch.compile``.

P_i is held as entries of variance 2^-2m with 2^m near sqrt(d_in), so that A P_i^T is as large as A and fits fp16; P_o has
entries of variance 1. Powers of two are exact; the scale is applied to the fp32 result.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparseopt import functional
from sparseopt.projection._weights import module_kind, module_name
from sparseopt.projection.layers import Layer
from sparseopt.projection.matrices import unscaled_matrix

__all__ = ["Engine", "Entry"]


def _project(gradients: Tensor, inputs: Tensor, matrix: Tensor, scale: float) -> Tensor:
    """[B, T, d], [B, T, k_i], [k_o, d] -> fp32 [B, k_o, k_i] = scale * sum_t (matrix g_t) outer (inputs_t)."""
    if gradients.dtype == torch.float64:  # which the op does not take
        small = F.linear(gradients, matrix).to(torch.float32)
        return (small.transpose(1, 2) @ inputs.to(torch.float32)) * scale
    limit = functional.PROJECTION_RANK
    if max(matrix.shape[0], inputs.shape[2]) <= limit:
        return functional.grad_project(gradients, inputs, matrix, scale)
    rows = [
        torch.cat([functional.grad_project(gradients, part, piece, scale) for part in inputs.split(limit, 2)], 2)
        for piece in matrix.split(limit)
    ]
    return torch.cat(rows, 1)


# ---- autograd --------------------------------------------------------------------------------------------------------
class _Dense(torch.autograd.Function):
    """y = x W^T + b for nn.Linear and Conv1D; the leaves get the projections as gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [B, ..., d_in]
        weight: Tensor,
        bias: Tensor | None,
        projected: Tensor,  # [B, ..., k_i]
        leaf: Tensor,  # [B, k_o, k_i]
        outer: Tensor,  # [k_o, d_out]
        scale: float,
        bias_leaf: Tensor | None,  # [B, k_o of the bias, 1]
        bias_outer: Tensor | None,
        bias_scale: float,
        conv1d: bool,
    ) -> Tensor:
        ctx.scale, ctx.bias_scale, ctx.conv1d, ctx.dtype = scale, bias_scale, conv1d, x.dtype
        ctx.save_for_backward(weight, projected, outer, bias_outer)
        if not conv1d:
            return F.linear(x, weight, bias)
        flat = x.reshape(-1, x.shape[-1])
        y = flat @ weight if bias is None else torch.addmm(bias, flat, weight)
        return y.view(*x.shape[:-1], weight.shape[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, projected, outer, bias_outer = ctx.saved_tensors
        # Under autocast the gradient comes in its dtype while weights are held in theirs; otherwise these are no-ops.
        dtype = grad.dtype
        gradients = grad.reshape(grad.shape[0], -1, grad.shape[-1])
        inputs = projected.to(dtype).reshape(gradients.shape[0], gradients.shape[1], -1)
        slices = _project(gradients, inputs, outer.to(dtype), ctx.scale)
        bias_slices = dx = None
        if bias_outer is not None:
            summed = gradients.sum(1, dtype=torch.float32)
            bias_slices = (F.linear(summed, bias_outer.to(torch.float32)) * ctx.bias_scale).unsqueeze(-1)
        if ctx.needs_input_grad[0]:
            matrix = weight.to(dtype)
            dx = (grad @ (matrix.t() if ctx.conv1d else matrix)).to(ctx.dtype)
        return dx, None, None, None, slices, None, None, bias_slices, None, None, None


class _Lookup(torch.autograd.Function):
    """nn.Embedding: dW sums g_t into row ids_t, so the slice is the transpose of sum_t (P_i g_t) outer P_o[:, ids_t]."""

    @staticmethod
    def forward(
        ctx: Any,
        ids: Tensor,  # [B, ...]
        weight: Tensor,  # [V, d]
        table: Tensor,  # [V, k_o]: P_o^T, zero in the row that trains never (padding_idx)
        leaf: Tensor,  # [B, k_o, k_i]
        inner: Tensor,  # [k_i, d]
        scale: float,
    ) -> Tensor:
        ctx.scale = scale
        ctx.save_for_backward(ids, table, inner)
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ids, table, inner = ctx.saved_tensors
        gradients = grad.reshape(grad.shape[0], -1, grad.shape[-1])
        rows = F.embedding(ids.reshape(gradients.shape[0], -1), table).to(grad.dtype)
        slices = _project(gradients, rows, inner.to(grad.dtype), ctx.scale).transpose(1, 2)
        return None, None, None, slices, None, None


# ---- state -----------------------------------------------------------------------------------------------------------
class Entry:
    """One projected weight or bias: its matrices and the leaf that receives its projections.

    Attributes:
        layer: what it is.
        leaf: fp32 [batch, k_o, k_i], requires grad; None before the first batch.
        inner, outer: P_i [k_i, d_in] and P_o [k_o, d_out] without their scale, in the weight's dtype.
        scale: ``scale * outer dW inner^T`` is the slice (before a sketch folds it).
    """

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self.leaf: Tensor | None = None
        self.inner: Tensor
        self.outer: Tensor
        self.scale: float


class _Use:
    """One module that uses a projected weight; ``forward`` stands in for the module's own."""

    def __init__(self, engine: Engine, module: nn.Module, name: str, entry: Entry, bias: Entry | None) -> None:
        self.engine, self.module, self.name, self.entry, self.bias = engine, module, name, entry, bias
        self.kind = module_kind(module)
        self.table: Tensor
        # Made once: a compiled graph is found again when the projector is entered again.
        self.replacement = (
            self.lookup if self.kind == "Embedding" else self.conv1d if self.kind == "Conv1D" else self.linear
        )

    def linear(self, input: Tensor) -> Tensor:
        return self._dense(input, conv1d=False)

    def conv1d(self, x: Tensor) -> Tensor:
        return self._dense(x, conv1d=True)

    def _dense(self, x: Tensor, conv1d: bool) -> Tensor:
        module, entry, bias = self.module, self.entry, self.bias
        if not torch.is_grad_enabled():  # evaluation, and the first pass of reentrant checkpointing
            return type(module).forward(module, x)
        x, leaf = self._samples(x)
        return _Dense.apply(
            x,
            module.weight,
            module.bias,
            self.engine.project_input(x, entry),
            leaf,
            entry.outer,
            entry.scale,
            None if bias is None else bias.leaf,
            None if bias is None else bias.outer,
            0.0 if bias is None else bias.scale,
            conv1d,
        )

    def lookup(self, input: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return type(self.module).forward(self.module, input)
        ids, leaf = self._samples(input)
        return _Lookup.apply(ids, self.module.weight, self.table, leaf, self.entry.inner, self.entry.scale)

    def _samples(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The input with one row per sample, and the leaf."""
        if x.dim() < 2:  # one dimension could be the samples or the tokens
            raise ValueError(
                f"Layer {self.name!r} got an input of shape {tuple(x.shape)}: expected at least two "
                "dimensions, the sample first."
            )
        leaf = self.entry.leaf
        if leaf is None:
            leaf = self.engine.start(x.shape[0], self.entry)
        batch = leaf.shape[0]
        if x.shape[0] == batch:
            return x, leaf
        if x.shape[0] == 1:  # shared by all samples (position ids): each sample gets a gradient of its own
            return x.expand(batch, *x.shape[1:]), leaf
        raise ValueError(
            f"Layer {self.name!r} got an input whose first dimension is {x.shape[0]}, expected the batch of {batch} samples "
            "or 1: per-sample gradients need the sample as first dimension."
        )


class Engine:
    """All projected layers of a model."""

    def __init__(self, model: nn.Module, layers: Sequence[Layer], kind: str, seed: int) -> None:
        self.model, self.kind, self.seed = model, kind, seed
        self.entries = {layer.name: Entry(layer) for layer in layers}
        self.uses: list[_Use] = []
        self.batch: int | None = None
        self._replaced: list[Tensor] = []  # leaves of forwards with another batch size since the last collect()
        self._last: tuple[str, weakref.ref[Tensor], int, Tensor] | None = None
        self._placed: dict[str, tuple[torch.device, torch.dtype]] = {}
        modules = {module_name(name): module for name, module in model.named_modules()}
        biases = {name: e for e in self.entries.values() if e.layer.type == "bias" for name in e.layer.modules}
        for entry in self.entries.values():
            if entry.layer.type != "bias":
                for name in entry.layer.modules:
                    self.uses.append(_Use(self, modules[name], name, entry, biases.get(name)))

    # -- matrices --
    def place(self) -> None:
        """Makes the matrices where the weights are now, in their dtype; nothing if they are there."""
        made: dict[tuple[str, int, int, torch.device, torch.dtype], tuple[Tensor, float]] = {}
        for use in self.uses:
            weight = use.module.weight
            assert isinstance(weight, Tensor)
            if not weight.dtype.is_floating_point or weight.is_meta:
                raise ValueError(
                    f"Layer {use.name!r} cannot be projected: its weight is {weight.dtype} on {weight.device}."
                )
            where = weight.device, weight.dtype
            for entry in (use.entry, use.bias):
                if entry is None or self._placed.get(entry.layer.name) == where:
                    continue
                layer = entry.layer
                d_out, d_in = layer.shape
                outer, scale = unscaled_matrix(self.kind, layer.k_o, d_out, self.seed, layer.output_key, "o", where[0])
                entry.outer, entry.scale = outer.to(where[1]), scale
                if layer.type != "bias":
                    group = (layer.input_key, layer.k_i, d_in, *where)
                    if group not in made:
                        made[group] = self._inner(layer, *where)
                    entry.inner = made[group][0]
                    entry.scale *= made[group][1]
                self._placed[layer.name] = where
                entry.leaf = None
            if use.kind == "Embedding" and (not hasattr(use, "table") or (use.table.device, use.table.dtype) != where):
                use.table = use.entry.outer.t().contiguous()
                if isinstance(padding := use.module.padding_idx, int):  # that row of an embedding never gets a gradient
                    use.table[padding] = 0

    def _inner(self, layer: Layer, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, float]:
        d_in = layer.shape[1]
        inner, scale = unscaled_matrix(self.kind, layer.k_i, d_in, self.seed, layer.input_key, "i", device)
        power = 1.0 if self.kind == "row_orthonormal" else 2.0 ** round(0.5 * math.log2(d_in))
        return (inner / power).to(dtype), scale * power

    def project_input(self, x: Tensor, entry: Entry) -> Tensor:
        """A P_i^T, without gradient. Layers called one after another with the same tensor share one."""
        if torch.compiler.is_compiling() or x.is_inference():  # a compiler finds common products itself
            return F.linear(x.detach(), entry.inner)
        key, last = entry.layer.input_key, self._last
        if last is not None and last[0] == key and last[1]() is x and last[2] == x._version:
            return last[3]
        projected = F.linear(x.detach(), entry.inner)
        # A weak reference: the input is not kept alive.
        self._last = key, weakref.ref(x), x._version, projected
        return projected

    def entries_of(self, module: nn.Module | None) -> list[Entry]:
        """The entries of the module's weight and bias, for those who compute with them and not through the module."""
        found = [(use.entry, use.bias) for use in self.uses if use.module is module]
        return [entry for pair in found for entry in pair if entry is not None]

    # -- leaves --
    def start(self, batch: int, entry: Entry | None = None) -> Tensor:
        """Makes the leaves for ``batch`` samples, unless they are there; returns that of ``entry``.

        Raises:
            ValueError: projections wait to be collected, or a graph is being traced.
        """
        if torch.compiler.is_compiling():
            raise ValueError("Call prepare(batch_size) before a compiled forward: leaves cannot be made while tracing.")
        entries = list(self.entries.values())
        if any(e.leaf is not None and e.leaf.grad is not None for e in entries):
            raise ValueError(
                "The projections of the last batch were not collected: call collect() after each backward."
            )
        if self.batch != batch or any(e.leaf is None for e in entries):
            self._replaced += [e.leaf for e in entries if e.leaf is not None]
            for e in entries:
                shape = (batch, e.layer.k_o, e.layer.k_i)
                e.leaf = torch.zeros(shape, dtype=torch.float32, device=e.outer.device, requires_grad=True)
            self.batch = batch
        leaf = (entry or entries[0]).leaf
        assert leaf is not None
        return leaf

    def take(self) -> dict[str, Tensor | None]:
        """The gradients of the leaves, [batch, k_o, k_i] each, which are reset.

        Raises:
            ValueError: the backward went through forwards with different batch sizes.
        """
        mixed = any(leaf.grad is not None for leaf in self._replaced)
        taken = {name: None if e.leaf is None else e.leaf.grad for name, e in self.entries.items()}
        self.reset()
        if mixed:
            raise ValueError("One backward went through batches of different sizes: call collect() after each batch.")
        return taken

    def reset(self) -> None:
        """Forgets what was not collected."""
        self._last = None
        self._replaced.clear()
        for entry in self.entries.values():
            if entry.leaf is not None:
                entry.leaf.grad = None

    # -- the model --
    @contextmanager
    def attached(self, outermost: nn.Module) -> Iterator[Callable[[], None]]:
        """Freezes and patches the model inside, and leaves it as it was.

        Args:
            outermost: what the user calls: the model, or ``torch.compile``'s wrapper of it.

        Yields:
            A function that removes the hooks which learn the batch size.
        """
        with ExitStack() as stack:
            self.place()
            for use in self.uses:
                if "forward" in use.module.__dict__:
                    raise ValueError(
                        f"Layer {use.name!r} has a patched forward (another projector, or offloading): expected its own."
                    )
            for parameter in self.model.parameters():
                stack.callback(parameter.requires_grad_, parameter.requires_grad)
                parameter.requires_grad_(False)
            for use in self.uses:
                stack.callback(delattr, use.module, "forward")
                use.module.forward = use.replacement
            handles = [self._watch(module) for module in {id(m): m for m in (outermost, self.model)}.values()]
            for handle in handles:
                stack.callback(handle.remove)
            if _reentrant(self.model):
                for module in self.model.modules():
                    if isinstance(module, nn.Embedding):
                        stack.callback(module.register_forward_hook(_require_grad).remove)

            def forget() -> None:
                for handle in handles:
                    handle.remove()

            yield forget

    def _watch(self, module: nn.Module) -> Any:
        """Makes the leaves before each forward of ``module``. Never traced: leaves of autograd cannot be made in a graph."""

        @torch.compiler.disable
        def learn_batch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            batch = _batch_size(args, kwargs)
            if batch is not None and torch.is_grad_enabled():
                self.start(batch)

        return module.register_forward_pre_hook(learn_batch, with_kwargs=True)


def _batch_size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    named = [kwargs[name] for name in ("input_ids", "inputs_embeds") if name in kwargs]
    for value in (*named, *args, *kwargs.values()):
        if isinstance(value, Tensor) and value.dim() > 0:
            return value.shape[0]
    return None


def _reentrant(model: nn.Module) -> bool:
    """Whether transformers' layers of the model use reentrant checkpointing, which needs an input with a gradient."""
    for module in model.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if getattr(module, "gradient_checkpointing", False) and isinstance(function, functools.partial):
            return bool(function.keywords.get("use_reentrant", True))
    return False


def _require_grad(_: nn.Module, __: Any, output: Any) -> None:
    if isinstance(output, Tensor) and torch.is_grad_enabled() and not output.requires_grad:
        output.requires_grad_(True)
