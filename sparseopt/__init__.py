"""sparseopt: train only the weights that matter.

Importing the package is free: names load on first use (PEP 562), and not even torch is imported before that.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sparseopt._files import FormatError
from sparseopt._version import __version__

if TYPE_CHECKING:
    from sparseopt.deltas.delta import Delta as Delta
    from sparseopt.deltas.log import DeltaLog as DeltaLog
    from sparseopt.deltas.reconstruct import reconstruct as reconstruct
    from sparseopt.functional import mask_indices as mask_indices
    from sparseopt.functional import mask_overlap as mask_overlap
    from sparseopt.functional import pack_mask as pack_mask
    from sparseopt.functional import popcount as popcount
    from sparseopt.functional import unpack_mask as unpack_mask
    from sparseopt.masks.collect import GradientEMA as GradientEMA
    from sparseopt.masks.find import find_masks as find_masks
    from sparseopt.masks.maskset import MaskSet as MaskSet
    from sparseopt.masks.operations import compare as compare
    from sparseopt.masks.operations import merge as merge
    from sparseopt.optim.sparse_adamw import SparseAdamW as SparseAdamW
    from sparseopt.optim.sparse_linear import SparseLinear as SparseLinear
    from sparseopt.optim.sparse_linear import sparse_linear as sparse_linear
    from sparseopt.projection.projector import GradientProjector as GradientProjector
    from sparseopt.projection.store import ProjectionStore as ProjectionStore
    from sparseopt.runs.registry import RunManager as RunManager
    from sparseopt.semi_structured import to_semi_structured as to_semi_structured
    from sparseopt.trainers.attachment import attach as attach
    from sparseopt.trainers.finetune import sparse_finetune as sparse_finetune

# public name -> module that defines it
_PUBLIC = {
    "Delta": "sparseopt.deltas.delta",
    "DeltaLog": "sparseopt.deltas.log",
    "GradientEMA": "sparseopt.masks.collect",
    "GradientProjector": "sparseopt.projection.projector",
    "MaskSet": "sparseopt.masks.maskset",
    "ProjectionStore": "sparseopt.projection.store",
    "RunManager": "sparseopt.runs.registry",
    "SparseAdamW": "sparseopt.optim.sparse_adamw",
    "SparseLinear": "sparseopt.optim.sparse_linear",
    "attach": "sparseopt.trainers.attachment",
    "compare": "sparseopt.masks.operations",
    "find_masks": "sparseopt.masks.find",
    "mask_indices": "sparseopt.functional",
    "mask_overlap": "sparseopt.functional",
    "merge": "sparseopt.masks.operations",
    "pack_mask": "sparseopt.functional",
    "popcount": "sparseopt.functional",
    "reconstruct": "sparseopt.deltas.reconstruct",
    "sparse_linear": "sparseopt.optim.sparse_linear",
    "sparse_finetune": "sparseopt.trainers.finetune",
    "to_semi_structured": "sparseopt.semi_structured",
    "unpack_mask": "sparseopt.functional",
}

__all__ = ["FormatError", "__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(importlib.import_module(_PUBLIC[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'sparseopt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
