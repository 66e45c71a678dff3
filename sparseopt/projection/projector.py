"""GradientProjector: low-dimensional projections of per-sample gradients, in one forward and backward of a frozen model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from sparseopt.projection._engine import Engine
from sparseopt.projection.layers import Layer, matrices_of, metadata, project_gradient, select_layers, sketch_of
from sparseopt.projection.matrices import SketchPlan, fold

__all__ = ["GradientProjector", "dtype_of"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def dtype_of(dtype: str | torch.dtype) -> torch.dtype:
    """What projections are stored in.

    Raises:
        ValueError: none of float32, bfloat16, float16.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise ValueError(f"Unknown dtype {dtype!r} for projections: expected one of {', '.join(_DTYPES)}.")
    return _DTYPES[name]


class GradientProjector:
    """Projects each sample's gradient of the chosen layers to ``P_o dW P_i^T``.

        p = GradientProjector(model, layers="mlp,attn", rank_total=256)
        with p:
            p.losses(input_ids, attention_mask).sum().backward()
        rows = p.collect()                                   # [batch, p.total_dim]

    Losses of one's own work too: anything whose sum over samples is differentiated, each sample's term depending on that
    sample alone (``model(..., labels=...)`` does not qualify: it averages over the batch).

    Inside ``with`` every parameter is frozen: weight gradients are never computed, and the backward ends at the lowest
    projected layer. On exit, after an exception too, the model is as it was. Its mode is left alone: with ``model.train()``
    dropout is active, and the projections are those of the thinned network. Layers that mix samples (batch norm) have no
    per-sample gradients.

    Every input of a projected layer has the sample as first dimension, [batch, ..., d_in]; 1 there means that all samples
    share it. A weight that is also used without its module, ``F.linear(x, embedding.weight)``, misses that term.

    ``torch.compile``: pass the compiled model, or compile it afterwards; leaves for the batch are made before each forward.
    Where the model is called inside a larger compiled function, call :meth:`prepare` first. Gradient checkpointing works,
    reentrant or not.

    Attributes:
        layers: what is projected, in the order of the columns.
        total_dim: number of columns.
        dtype: of the rows that :meth:`collect` returns.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: str | Sequence[str] = "mlp,attn",
        rank_total: int = 256,
        rank_min: int = 8,
        seed: int = 42,
        dtype: str | torch.dtype = "bfloat16",
        row_orthonormal: bool = False,
        include_embeddings: bool = False,
        *,
        method: str = "gaussian",
        include_biases: bool = False,
        shape_rule: str = "square",
        sketch: int | None = None,
    ) -> None:
        """Chooses the layers; the matrices are made when they are first needed.

        Args:
            model: a module, or ``torch.compile``'s wrapper of one.
            layers: patterns of paths, see :func:`sparseopt.projection.layers.select_layers`.
            rank_total: values wanted per layer.
            rank_min: the least k_i and k_o.
            seed: of the matrices.
            dtype: of the rows: "bfloat16", "float16", "float32", or the torch dtype. Sums are fp32 in any case.
            row_orthonormal: orthogonal rows instead of independent entries; the same as ``method="row_orthonormal"``.
            include_embeddings: project embeddings too; a head that shares its weight with one adds its term.
            method: "gaussian", "rademacher" or "row_orthonormal".
            include_biases: project the biases of the chosen layers too.
            shape_rule: "square" (k_i = k_o) or "aspect" (k_i / k_o = d_out / d_in).
            sketch: K for the two-stage sketch: K x K values inside, folded to ``rank_total`` by a count sketch. More work,
                and more accurate: with K = 128 and 256 values the relative error of a layer's squared norm is 20% in place of
                50% for rank-1 gradients, 14% in place of 33% for 64 tokens of text (``benchmarks.projection_accuracy``).

        Raises:
            ValueError: a pattern without a layer, an unknown name, or a number out of range.
            TypeError: not a module.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"GradientProjector expects a torch.nn.Module, got {type(model).__name__}.")
        if row_orthonormal and method not in ("gaussian", "row_orthonormal"):
            raise ValueError(f"row_orthonormal=True cannot go with method={method!r}: expected 'gaussian'.")
        self.dtype = dtype_of(dtype)
        self._outermost = model
        inner = getattr(model, "_orig_mod", model)
        assert isinstance(inner, nn.Module)
        self._model: nn.Module = inner
        options: dict[str, Any] = {
            "rank_total": rank_total,
            "rank_min": rank_min,
            "include_embeddings": include_embeddings,
            "include_biases": include_biases,
            "shape_rule": shape_rule,
            "sketch": sketch,
        }
        self.layers: list[Layer] = select_layers(self._model, layers, **options)
        self._metadata = metadata(
            self.layers,
            patterns=layers,
            seed=seed,
            dtype=str(self.dtype).removeprefix("torch."),
            kind="row_orthonormal" if row_orthonormal else method,
            total_parameters=sum(parameter.numel() for parameter in self._model.parameters()),
            **options,
        )
        self.total_dim: int = self._metadata["total_proj_dim"]
        self._engine = Engine(self._model, self.layers, self._metadata["proj_method"], seed)
        self._plans: dict[tuple[str, torch.device], SketchPlan | None] = {}
        self._stack: ExitStack | None = None
        self._forget_hooks: Callable[[], None] | None = None

    # ---- what is projected -------------------------------------------------------------------------------------------
    @property
    def metadata(self) -> dict[str, Any]:
        """What a store keeps beside the rows: plain JSON values from which every matrix can be rebuilt."""
        return copy.deepcopy(self._metadata)

    @property
    def coverage(self) -> float:
        """Share of the model's parameters that are projected, 0 to 1 (shared weights counted once)."""
        return self._metadata["coverage"]["share"]

    def summary(self) -> str:
        """One sentence: layers, parameters and their share, values per sample."""
        counts = self._metadata["coverage"]
        number = len(self.layers)
        return (
            f"Projecting {number} layer{'s' if number > 1 else ''} with {counts['projected_parameters']:,} of "
            f"{counts['total_parameters']:,} parameters ({counts['share']:.1%}) to {self.total_dim:,} values per sample."
        )

    def projection_matrices(self, layer: str) -> tuple[Tensor, Tensor]:
        """The matrices of a layer: (P_i [k_i, d_in], P_o [k_o, d_out]), fp32, scaled, on the CPU.

        With a two-stage sketch these are the inner ones, before folding.

        Raises:
            ValueError: no such layer.
        """
        return matrices_of(self._metadata, layer)

    def project(self, layer: str, gradient: Tensor) -> Tensor:
        """Projects an exact gradient of a layer, laid out as ``parameter.grad``, leading dimensions allowed.

        Returns:
            fp32 [..., width of the layer's slice].

        Raises:
            ValueError: no such layer, or another shape.
        """
        return project_gradient(self._metadata, layer, gradient)

    # ---- running -----------------------------------------------------------------------------------------------------
    def __enter__(self) -> GradientProjector:
        if self._stack is not None:
            raise ValueError("This GradientProjector is active already: leave its `with` block first.")
        with ExitStack() as stack:
            self._forget_hooks = stack.enter_context(self._engine.attached(self._outermost))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stack, self._stack = self._stack, None
        assert stack is not None
        stack.close()
        if kind is not None:  # half a backward is no result
            self._engine.reset()

    def prepare(self, batch_size: int) -> None:
        """Makes the leaves for batches of this size; from here to the end of the ``with`` block no forward does.

        Needed only where the model is called inside a larger function under ``torch.compile``.

        Raises:
            ValueError: outside ``with``, or projections wait to be collected.
        """
        if self._stack is None or self._forget_hooks is None:
            raise ValueError("prepare() works inside `with projector:` only.")
        self._forget_hooks()
        self._engine.start(batch_size)

    def losses(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        reduction: str = "mean",
    ) -> Tensor:
        """Next-token losses of a causal language model, one per sample; logits are never held whole.

        Args:
            input_ids: int64 [batch, T].
            attention_mask: [batch, T], 0 for padding.
            labels: int64 [batch, T], shifted inside; -100 is ignored. Default: ``input_ids`` without the padding.
            reduction: "mean" over the sample's own targets, or "sum".

        Returns:
            fp32 [batch].

        Raises:
            ValueError: outside ``with``, or a model without a known base and head.
        """
        from sparseopt.projection.losses import HeadSlice, per_sample_losses

        if self._stack is None:
            raise ValueError("losses() works inside `with projector:` only.")
        self._engine.start(input_ids.shape[0])
        # A projected head gets its slice from the chunks of logits: its module is not called.
        find_head = getattr(self._model, "get_output_embeddings", None)
        head = []
        for entry in self._engine.entries_of(find_head() if callable(find_head) else None):
            assert entry.leaf is not None
            inner = None if entry.layer.type == "bias" else entry.inner
            head.append(HeadSlice(entry.leaf, entry.outer, inner, entry.scale))
        return per_sample_losses(self._outermost, input_ids, attention_mask, labels, reduction, project=head)

    def collect(self) -> Tensor:
        """The projections of the last backward, which are handed over: the next batch may follow.

        Returns:
            [batch, total_dim] in ``dtype`` on the model's device, columns as in ``metadata["layers"]``.

        Raises:
            ValueError: there was no forward and backward, or a layer took no part in it.
        """
        taken = self._engine.take()
        missing = [name for name, value in taken.items() if value is None]
        if len(missing) == len(taken):
            raise ValueError(
                "Nothing to collect: run the forward and backward of a batch inside `with projector:` first."
            )
        if missing:
            raise ValueError(
                f"No gradient reached {len(missing)} projected layer(s), {', '.join(missing[:5])}"
                f"{', ...' if len(missing) > 5 else ''}: expected the losses to depend on each."
            )
        device = next(iter(taken.values())).device  # type: ignore[union-attr]
        slices = []
        for name, value in taken.items():
            assert value is not None
            values = value.flatten(1)
            plan = self._plan(name, values.device)
            slices.append((values if plan is None else fold(values, plan)).to(device))
        return torch.cat(slices, dim=1).to(self.dtype)

    def _plan(self, name: str, device: torch.device) -> SketchPlan | None:
        if (name, device) not in self._plans:
            self._plans[name, device] = sketch_of(self._metadata, name, device)
        return self._plans[name, device]
