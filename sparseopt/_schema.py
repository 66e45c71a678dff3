"""Schemas and shape-only implementations of every ``torch.ops.sparseopt`` op; nothing else.

Terms used by all ops:

* A *packed* mask is ``uint8[ceil(n/8)]``, little bit order (entry ``i`` is bit ``i % 8`` of byte ``i // 8``, as in
  ``numpy.packbits(bitorder="little")``); the unused bits of the last byte are zero.
* The *arena* order is the order of the active entries: tensor by tensor, sorted by flat index. All optimizer state is
  flat in this order, ``N`` entries.
* The *chunk table* ``chunks`` is ``int64[C, 6]`` with rows ``(tensor, base, start, count, index_start, shift)``: arena
  entries ``start .. start+count`` belong to tensor ``tensor``; entry ``start + k`` is the tensor's flat element
  ``base + indices[index_start + (k >> shift)] + (k & (2**shift - 1))``. ``shift = 0`` is one stored offset per entry;
  larger shifts store one offset per aligned run of ``2**shift`` entries. ``indices`` is ``int32`` (chunks of at most 4096
  entries) or ``int16`` (at most 1024 entries; offsets are signed); tensors may be of any size.
* ``run`` is 8, 16, 32 or 64 where every chunk is made of whole aligned runs of that many entries, else 1: kernels may
  then move whole runs at once.
* ``hyper`` is ``float64[G, 8]``: ``lr, beta1, beta2, eps, weight_decay, maximize, correct_bias, amsgrad`` (the last
  three 0 or 1) per parameter group; ``groups`` is ``int32[T]``, the row of each tensor.
* ``values`` of ``scatter_values_`` is ``[N]`` in the parameters' dtype.
* ``remap_entries_`` takes two plans: ``targets`` are vectors ``[N]`` in the arena order of ``indices`` and ``chunks``,
  ``sources`` ``[M]`` in that of ``old_indices`` and ``old_chunks``; rows hold at most 4096 entries.
* ``accumulate_squares_`` knows no masks: ``stored`` is T fp32 tensors, ``grads`` T gradients of their sizes (one dtype),
  ``decay`` and ``inverse`` are fp32[] on the device.
* ``select_entries`` takes T tensors ``scores`` (one dtype, sizes n), their masks ``packed`` one behind the other in one
  vector, each from a multiple of :data:`MASK_ALIGNMENT` bytes on (:func:`mask_begins`), ``counts int64[T]``, and instead of
  scores that count ``seeds int64[T]``; all on one device. It returns ``chosen`` (packed as the masks are), ``odd int64[T]``
  and ``squares fp64[]``.
* ``grad_project`` takes ``gradients [B, T, d_out]``, ``inputs [B, T, k_i]`` and ``matrix [k_o, d_out]``, each with a
  contiguous last dimension, and returns ``fp32[B, k_o, k_i]``; ``cross_entropy_`` takes ``logits [N, V]`` with a
  contiguous last dimension and ``targets int64[N]``, and returns ``fp32[N]``.
* An empty tensor in ``params`` or ``grads`` stands for "no gradient this time": its entries and step are left alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["HYPER_COLUMNS", "MASK_ALIGNMENT", "MUTABLE_OPS", "NAMESPACE", "OPS", "TensorList", "library", "mask_begins"]


class TensorList(list[Tensor]):
    """A list of tensors that does not change: launchers keep on it, by stream, what they found out about it."""

    found: tuple[int, Any] | None = None


NAMESPACE = "sparseopt"
HYPER_COLUMNS = ("lr", "beta1", "beta2", "eps", "weight_decay", "maximize", "correct_bias", "amsgrad")

# Masks of several tensors in one vector begin at multiples of so many bytes.
MASK_ALIGNMENT = 64

# numel above this needs int64 flat indices.
INT32_NUMEL = 2**31

OPS = {
    "pack_mask": "(Tensor mask) -> Tensor",
    "unpack_mask": "(Tensor packed, SymInt numel) -> Tensor",
    "popcount": "(Tensor packed) -> Tensor",
    "mask_indices": "(Tensor packed, SymInt numel) -> Tensor",
    "mask_overlap": "(Tensor a, Tensor b) -> Tensor",
    "gather_grads_": (
        "(Tensor(a!) compact, Tensor[] grads, Tensor indices, Tensor chunks, int tensor_offset, bool accumulate, int run, "
        "Tensor(b!)? squares) -> ()"
    ),
    "clip_coefficient_": (
        "(Tensor squares, float max_norm, Tensor? inverse_scale, Tensor? found_inf, Tensor(a!) norm, "
        "Tensor(b!) multiplier, Tensor(c!) skip) -> ()"
    ),
    "scatter_values_": "(Tensor(a!)[] params, Tensor values, Tensor indices, Tensor chunks, int run) -> ()",
    "remap_entries_": (
        "(Tensor(a!)[] targets, Tensor[] sources, Tensor indices, Tensor chunks, Tensor old_indices, Tensor old_chunks) "
        "-> ()"
    ),
    "select_entries": (
        "(Tensor[] scores, Tensor packed, Tensor counts, bool grow, Tensor? seeds) -> (Tensor, Tensor, Tensor)"
    ),
    "accumulate_squares_": (
        "(Tensor(a!)[] stored, Tensor[] grads, float weight, Tensor? decay, Tensor? inverse) -> ()"
    ),
    "sparse_adamw_": (
        "(Tensor(a!)[] params, Tensor[] grads, Tensor? compact_grad, Tensor indices, Tensor chunks, Tensor groups, "
        "Tensor hyper, Tensor(b!) steps, Tensor(c!) exp_avg, Tensor(d!) exp_avg_sq, Tensor(e!)? max_exp_avg_sq, "
        "Tensor(f!)? residual, Tensor(g!)? master, Tensor? cohorts, Tensor? births, Tensor? multiplier, Tensor? skip, "
        "int run, bool follow) -> ()"
    ),
    "grad_project": "(Tensor gradients, Tensor inputs, Tensor matrix, float scale) -> Tensor",
    "cross_entropy_": "(Tensor(a!) logits, Tensor targets, int ignore_index) -> Tensor",
}


def mask_begins(sizes: Sequence[int]) -> list[int]:
    """The byte at which each of T masks of ``sizes`` entries begins in one vector, and the length of that: T + 1 numbers."""
    begins = [0]
    for size in sizes:
        begins.append(begins[-1] + -(-size // (8 * MASK_ALIGNMENT)) * MASK_ALIGNMENT)
    return begins


MUTABLE_OPS = tuple(name for name in OPS if name.endswith("_"))

library = torch.library.Library(NAMESPACE, "DEF")
for _name, _signature in OPS.items():
    library.define(_name + _signature, tags=(torch.Tag.pt2_compliant_tag,))


def _fake(name: str):  # type: ignore[no-untyped-def]
    return torch.library.register_fake(f"{NAMESPACE}::{name}", lib=library)


@_fake("pack_mask")
def _(mask: Tensor) -> Tensor:
    return mask.new_empty(((mask.numel() + 7) // 8,), dtype=torch.uint8)


@_fake("unpack_mask")
def _(packed: Tensor, numel: int) -> Tensor:
    return packed.new_empty((numel,), dtype=torch.bool)


@_fake("popcount")
def _(packed: Tensor) -> Tensor:
    return packed.new_empty((), dtype=torch.int64)


@_fake("mask_indices")
def _(packed: Tensor, numel: int) -> Tensor:
    count = torch.library.get_ctx().new_dynamic_size()
    return packed.new_empty((count,), dtype=torch.int32 if numel <= INT32_NUMEL else torch.int64)


@_fake("mask_overlap")
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty((2,), dtype=torch.int64)


@_fake("gather_grads_")
def _(
    compact: Tensor, grads: Sequence[Tensor], indices: Tensor, chunks: Tensor, tensor_offset: int, accumulate: bool,
    run: int, squares: Tensor | None,
) -> None:  # fmt: skip
    return None


@_fake("clip_coefficient_")
def _(
    squares: Tensor, max_norm: float, inverse_scale: Tensor | None, found_inf: Tensor | None, norm: Tensor,
    multiplier: Tensor, skip: Tensor,
) -> None:  # fmt: skip
    return None


@_fake("scatter_values_")
def _(params: Sequence[Tensor], values: Tensor, indices: Tensor, chunks: Tensor, run: int) -> None:
    return None


@_fake("remap_entries_")
def _(
    targets: Sequence[Tensor], sources: Sequence[Tensor], indices: Tensor, chunks: Tensor, old_indices: Tensor,
    old_chunks: Tensor,
) -> None:  # fmt: skip
    return None


@_fake("select_entries")
def _(
    scores: Sequence[Tensor], packed: Tensor, counts: Tensor, grow: bool, seeds: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(packed), torch.empty_like(counts), counts.new_empty((), dtype=torch.float64)


@_fake("accumulate_squares_")
def _(
    stored: Sequence[Tensor], grads: Sequence[Tensor], weight: float, decay: Tensor | None, inverse: Tensor | None
) -> None:
    return None


@_fake("sparse_adamw_")
def _(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    compact_grad: Tensor | None,
    indices: Tensor,
    chunks: Tensor,
    groups: Tensor,
    hyper: Tensor,
    steps: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    residual: Tensor | None,
    master: Tensor | None,
    cohorts: Tensor | None,
    births: Tensor | None,
    multiplier: Tensor | None,
    skip: Tensor | None,
    run: int,
    follow: bool,
) -> None:
    return None


@_fake("grad_project")
def _(gradients: Tensor, inputs: Tensor, matrix: Tensor, scale: float) -> Tensor:
    shape = (gradients.shape[0], matrix.shape[0], inputs.shape[2])
    return gradients.new_empty(shape, dtype=torch.float32)


@_fake("cross_entropy_")
def _(logits: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    return logits.new_empty((logits.shape[0],), dtype=torch.float32)


def _register_version_bumps() -> None:
    """Kernels write raw memory, which bumps no version counter: autograd would miss the change. Bump them here, once
    for every backend, where PyTorch does it for its own in-place ops (the ADInplaceOrView key)."""

    def bump(name: str):  # type: ignore[no-untyped-def]
        overload = getattr(torch.ops.sparseopt, name).default
        arguments = overload._schema.arguments
        written = [i for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write]

        def implementation(keyset, *args):  # type: ignore[no-untyped-def]
            for position in written:
                argument = args[position]
                tensors = argument if isinstance(argument, (list, tuple)) else [argument]
                present = [t for t in tensors if t is not None]
                if present:
                    torch.autograd.graph.increment_version(present)
            return overload.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)

        library.impl(name, implementation, "ADInplaceOrView", with_keyset=True)

    for name in MUTABLE_OPS:
        bump(name)


_register_version_bumps()
