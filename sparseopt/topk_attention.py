"""Top-k attention: only the most important heads of each layer reach the output projection.

With the input of a layer's output projection a = [a_1 ... a_H] (one slice of ``head_dim`` values for each query head) and a gate
g_h in {0, 1} for each head, the projection sees y = [g_1 a_1 ... g_H a_H]. A head's importance is

    I_h = sum over tokens |<a_h, dL/dy_h>|            (gradient x activation, per token: Michel et al., arXiv 1905.10650)

summed over training batches. Of each layer the max(1, round(ratio * H)) heads with the largest I_h keep g_h = 1 (ties: the lower
head): ranks are taken within a layer, since the size of gradients differs between layers, and no layer loses all its heads.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sparseopt.masks.maskset import normalize_name

__all__ = ["Attention", "TopKHeads", "check_ratio", "find_attention"]

# output projection -> the projections one of which stands beside it (GPT-2's MLP has a c_proj too, but no c_attn)
PROJECTIONS = {"o_proj": ("q_proj", "qkv_proj"), "c_proj": ("c_attn",)}
NEEDED = "an `o_proj` beside a `q_proj` or `qkv_proj` (Llama, Qwen), or a `c_proj` beside a `c_attn` (GPT-2)"


@dataclass(frozen=True, eq=False)
class Attention:
    """The output projection of one attention layer.

    Attributes:
        name: of the projection's module.
        module: the projection.
        heads: query heads (grouped-query attention has fewer of keys and values).
        head_dim: inputs of the projection for each head.
    """

    name: str
    module: nn.Module
    heads: int
    head_dim: int


def find_attention(model: nn.Module) -> list[Attention]:
    """The output projections of a model's attention layers, in its order.

    The number of heads is the attention module's own ``num_heads``, else that of its configuration (or the model's), which may
    have one for each layer.

    Raises:
        ValueError: there is none, or heads do not divide a projection's inputs.
    """
    found = []
    for name, attention in model.named_modules():
        children = dict(attention.named_children())
        for output, beside in PROJECTIONS.items():
            if output in children and any(other in children for other in beside):
                place = normalize_name(f"{name}.{output}" if name else output)
                found.append(_measure(model, attention, place, children[output]))
    if not found:
        raise ValueError(f"no attention output projection was found in {type(model).__name__}: looked for {NEEDED}.")
    return found


def _measure(model: nn.Module, attention: Any, name: str, projection: Any) -> Attention:
    inputs = getattr(projection, "in_features", None) or getattr(projection, "nx", None)
    heads = getattr(attention, "num_heads", None)
    if heads is None:
        config = getattr(attention, "config", None) or getattr(model, "config", None)
        heads = getattr(config, "num_attention_heads", None)
    if isinstance(heads, (list, tuple)):
        heads = heads[getattr(attention, "layer_idx", 0)]
    if not isinstance(heads, int) or not isinstance(inputs, int) or heads < 1 or inputs % heads:
        raise ValueError(
            f"the number of heads must divide the inputs of {name!r}, got {heads} heads and {inputs} inputs."
        )
    # Where values have a width of their own, it is theirs that the projection reads.
    declared = getattr(attention, "v_head_dim", None) or getattr(attention, "head_dim", None)
    if isinstance(declared, int) and declared * heads != inputs:
        raise ValueError(f"{name!r} has {inputs} inputs, but its attention {heads} heads of {declared}.")
    return Attention(name, projection, heads, inputs // heads)


def check_ratio(ratio: float) -> float:
    """The share of heads to keep.

    Raises:
        ValueError: it is not in (0, 1].
    """
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 < ratio <= 1:
        raise ValueError(f"the share of attention heads to keep (ratio) must be in (0, 1], got {ratio!r}.")
    return float(ratio)


class _Gate(torch.autograd.Function):
    """y = g a, and the importance of every head in the backward pass.

    Why the gradient with respect to y and the activation before the gate: sum_tokens <a_h, dL/dy_h> is dL/dg_h, how the loss
    changes with the gate, whether the gate is open or not. With the masked activation, or with dL/da = g dL/dy, a closed head would
    measure exactly zero and never return.

    Why a Function instead of a hook on the tensor: ``save_for_backward`` goes through gradient checkpointing, so nothing is kept
    that would be recomputed, and backward runs once for each forward pass whatever the checkpointing recomputes: nothing is counted
    twice.
    """

    @staticmethod
    def forward(
        ctx: Any, activation: Tensor, anchor: Tensor, gate: Tensor | None, fresh: Tensor, shape: tuple[int, int]
    ) -> Tensor:
        ctx.save_for_backward(activation)
        ctx.gate, ctx.fresh, ctx.heads = gate, fresh, shape
        return activation.view_as(activation) if gate is None else activation * gate

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        (activation,) = ctx.saved_tensors
        heads, head_dim = ctx.heads
        products = activation.float() * gradient.float()
        importance = products.reshape(-1, heads, head_dim).sum(2).abs().sum(0)
        ctx.fresh.add_(importance.to(ctx.fresh.device))
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None
        return gradient if ctx.gate is None else gradient * ctx.gate, None, None, None, None


class TopKHeads:
    """Masks and ranks the attention heads of a model; :class:`sparseopt.trainers.TopKAttention` does so in a trainer.

    >>> top = TopKHeads(model, ratio=0.5)
    >>> with top.installed():
    ...     for step, batch in enumerate(batches):
    ...         model(**batch).loss.backward()
    ...         optimizer.step(), optimizer.zero_grad()
    ...         top.commit()
    ...         if step % 100 == 9:
    ...             top.choose()
    >>> top.fold()

    A dropped head's own weights get no gradient, and neither do those that read it; a dense optimizer's weight decay goes on. Heads
    are masked in evaluation too. A layer with dropped heads keeps one activation more until its backward pass.

    Attributes:
        layers: what :func:`find_attention` found.
        heads: name of a projection -> bool[heads] on the CPU, True where a head is kept; all True before the first choice.
    """

    def __init__(self, model: nn.Module, ratio: float) -> None:
        """Finds the heads; nothing is changed before :meth:`install`.

        Args:
            model: Llama-, Qwen- or GPT-2-style.
            ratio: share of each layer's heads to keep, in (0, 1].

        Raises:
            ValueError: the ratio is out of range, or no output projection was found.
        """
        self.ratio = check_ratio(ratio)
        self.layers = find_attention(model)
        self.heads = {layer.name: torch.ones(layer.heads, dtype=torch.bool) for layer in self.layers}
        self._handles: list[RemovableHandle] = []
        self._gates: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}
        self._total = torch.zeros(sum(layer.heads for layer in self.layers), dtype=torch.float32)
        self._fresh = torch.zeros_like(self._total)  # of the step under way
        self._parts: dict[str, Tensor] = {}  # its views, one for each layer
        self._anchor = torch.zeros((), requires_grad=True)

    def kept(self, layer: Attention) -> int:
        """Heads that a layer keeps: ``max(1, round(ratio * heads))``."""
        return max(1, round(self.ratio * layer.heads))

    # ---- hooks -----------------------------------------------------------------------------------------------------------
    def install(self) -> None:
        """Puts a pre-hook on every output projection; measured importance starts at what :meth:`load_state_dict` gave, or zero."""
        self.remove()
        device = next(self.layers[0].module.parameters()).device
        self._total = self._total.to(device)
        self._fresh = torch.zeros_like(self._total)
        sizes = [layer.heads for layer in self.layers]
        self._parts = dict(zip(self.heads, self._fresh.split(sizes), strict=True))
        for layer in self.layers:
            self._handles.append(layer.module.register_forward_pre_hook(self._hook(layer)))

    def remove(self) -> None:
        """Takes the hooks away: all heads reach the projections again. What was chosen stays in :attr:`heads`."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._gates.clear()

    @contextmanager
    def installed(self) -> Iterator[TopKHeads]:
        """:meth:`install` on entering, :meth:`remove` on leaving."""
        self.install()
        try:
            yield self
        finally:
            self.remove()

    def _hook(self, layer: Attention) -> Any:
        # Compiled models call this between two graphs: a backward pass with a side effect is nothing that torch.compile takes.
        @torch.compiler.disable
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            activation, *others = inputs
            gate = self._gate(layer, activation)
            if torch.is_grad_enabled():
                # The anchor needs a gradient where everything below is frozen: its heads are measured all the same.
                shape = (layer.heads, layer.head_dim)
                gated: Tensor = _Gate.apply(activation, self._anchor, gate, self._parts[layer.name], shape)
            else:
                gated = activation if gate is None else activation * gate
            return (gated, *others)

        return hook

    def _gate(self, layer: Attention, activation: Tensor) -> Tensor | None:
        """[inputs of the projection] of zeros and ones; None where all heads are kept."""
        heads = self.heads[layer.name]
        if bool(heads.all()):
            return None
        key = (layer.name, activation.dtype, activation.device)
        if key not in self._gates:
            self._gates[key] = heads.repeat_interleave(layer.head_dim).to(activation.device, activation.dtype)
        return self._gates[key]

    # ---- ranking ---------------------------------------------------------------------------------------------------------
    @property
    def importance(self) -> dict[str, Tensor]:
        """Name of a projection -> fp32[heads] on the CPU: what :meth:`commit` has added up since the last choice."""
        sizes = [layer.heads for layer in self.layers]
        return dict(zip(self.heads, self._total.cpu().split(sizes), strict=True))

    def commit(self) -> None:
        """Adds the importance measured since the last call: once an optimizer step, on every process of a distributed run.

        The sum over the processes is taken, so all choose the same heads. What a layer measured is left out where it is not finite
        (a step that an fp16 loss scale makes overflow; the others weigh as much as their scale).
        """
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(self._fresh)
        sizes = [layer.heads for layer in self.layers]
        finite = torch.stack([part.isfinite().all() for part in self._fresh.split(sizes)])
        finite = finite.repeat_interleave(torch.tensor(sizes, device=finite.device))
        self._total += torch.where(finite, self._fresh, 0)
        self._fresh.zero_()

    def choose(self) -> dict[str, int]:
        """Ranks the heads by what was measured since the last choice, and starts measuring anew.

        A layer that no gradient reached keeps the heads it had, with a warning.

        Returns:
            Name of a projection -> heads that left or came.
        """
        changed: dict[str, int] = {}
        unseen: list[str] = []
        measured = self.importance
        for layer in self.layers:
            importance = measured[layer.name]
            if not importance.any():
                unseen.append(layer.name)
                changed[layer.name] = 0
                continue
            order = importance.sort(descending=True, stable=True).indices
            heads = torch.zeros(layer.heads, dtype=torch.bool)
            heads[order[: self.kept(layer)]] = True
            changed[layer.name] = int((heads != self.heads[layer.name]).sum())
            self.heads[layer.name] = heads
        if unseen:
            warnings.warn(f"no gradient reached the heads of {len(unseen)} layers ({unseen[0]!r} first): they stay as they are.",
                          stacklevel=2)  # fmt: skip
        self._total.zero_()
        self._gates.clear()
        return changed

    # ---- state -----------------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """Ratio, heads and committed importance as JSON takes them; fp32 values survive its decimals."""
        return {
            "ratio": self.ratio,
            "heads": {name: heads.tolist() for name, heads in self.heads.items()},
            "importance": {name: values.tolist() for name, values in self.importance.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state.

        Raises:
            ValueError: it belongs to another ratio or to other heads.
        """
        if state["ratio"] != self.ratio:
            raise ValueError(f"the checkpoint's top-k attention had ratio={state['ratio']}, this one has {self.ratio}.")
        sizes = {name: len(heads) for name, heads in state["heads"].items()}
        expected = {layer.name: layer.heads for layer in self.layers}
        if sizes != expected:
            raise ValueError(f"the checkpoint's attention layers have the heads {sizes}, this model's {expected}.")
        self.heads = {name: torch.tensor(state["heads"][name], dtype=torch.bool) for name in expected}
        self._total = torch.cat([torch.tensor(state["importance"][name]) for name in expected]).to(self._total.device)
        self._gates.clear()

    @torch.no_grad()
    def fold(self, model: nn.Module | None = None) -> None:
        """Zeroes what the output projections read from dropped heads, so that the model computes without hooks what it did with.

        Args:
            model: a model with the same layers; the one that was given at first if None.

        Raises:
            ValueError: the layers differ, or a projection's weight is no dense floating-point matrix (quantised, or an adapter's).
        """
        layers = self.layers if model is None else find_attention(model)
        if [(layer.name, layer.heads) for layer in layers] != [(layer.name, layer.heads) for layer in self.layers]:
            raise ValueError(f"the attention layers of {type(model).__name__} are not those whose heads were chosen.")
        weights = []
        for layer in layers:
            module: Any = layer.module
            weight: Any = getattr(module, "weight", None)
            conv1d = hasattr(module, "nx")
            size = layer.heads * layer.head_dim
            plain = (
                isinstance(weight, nn.Parameter) and not hasattr(module, "base_layer") and weight.is_floating_point()
            )
            if not plain or weight.dim() != 2 or weight.shape[0 if conv1d else 1] != size:
                raise ValueError(
                    f"fold() needs a floating-point weight with {size} inputs in {layer.name!r}, which is a "
                    f"{type(module).__name__}: merge adapters and dequantise first."
                )
            weights.append(weight.t() if conv1d else weight)
        for layer, weight in zip(layers, weights, strict=True):
            dropped = ~self.heads[layer.name].repeat_interleave(layer.head_dim)
            weight.masked_fill_(dropped.to(weight.device), 0)
