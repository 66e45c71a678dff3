"""The ops as Triton kernels for GPUs: ``sparseopt.triton_kernels``."""

if __name__ != "sparseopt.triton_kernels":
    raise ImportError(
        "This folder installs as `sparseopt.triton_kernels`; the name `triton_kernels` alone belongs to Triton. "
        "Import it under its full name (pip install first)."
    )

from collections.abc import Callable
from typing import Any

from sparseopt.triton_kernels.accumulate import accumulate_squares_
from sparseopt.triton_kernels.cross_entropy import cross_entropy_
from sparseopt.triton_kernels.gather import clip_coefficient_, gather_grads_
from sparseopt.triton_kernels.masks import mask_indices, mask_overlap, pack_mask, popcount, unpack_mask
from sparseopt.triton_kernels.project import grad_project
from sparseopt.triton_kernels.remap import remap_entries_
from sparseopt.triton_kernels.scatter import scatter_values_
from sparseopt.triton_kernels.select import select_entries
from sparseopt.triton_kernels.sparse_adamw import sparse_adamw_

__all__ = ["IMPLEMENTATIONS"]

# Op name -> launcher, as `sparseopt._backend` registers them.
IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "pack_mask": pack_mask,
    "unpack_mask": unpack_mask,
    "popcount": popcount,
    "mask_indices": mask_indices,
    "mask_overlap": mask_overlap,
    "gather_grads_": gather_grads_,
    "clip_coefficient_": clip_coefficient_,
    "scatter_values_": scatter_values_,
    "remap_entries_": remap_entries_,
    "select_entries": select_entries,
    "accumulate_squares_": accumulate_squares_,
    "sparse_adamw_": sparse_adamw_,
    "grad_project": grad_project,
    "cross_entropy_": cross_entropy_,
}
