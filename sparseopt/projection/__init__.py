"""Low-dimensional projections of per-sample gradients: making, storing and comparing them.

:class:`~sparseopt.projection.projector.GradientProjector` makes them, :class:`~sparseopt.projection.store.ProjectionStore`
keeps them, :mod:`~sparseopt.projection.query` finds neighbours and influence, :mod:`~sparseopt.projection.full_gradients` and
:mod:`~sparseopt.projection.errors` say how good they are. Names load on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparseopt.projection.layers import Layer as Layer
    from sparseopt.projection.layers import matrices_of as matrices_of
    from sparseopt.projection.layers import project_gradient as project_gradient
    from sparseopt.projection.layers import select_layers as select_layers
    from sparseopt.projection.matrices import projection_matrix as projection_matrix
    from sparseopt.projection.projector import GradientProjector as GradientProjector
    from sparseopt.projection.store import ProjectionStore as ProjectionStore

_PUBLIC = {
    "GradientProjector": "sparseopt.projection.projector",
    "Layer": "sparseopt.projection.layers",
    "ProjectionStore": "sparseopt.projection.store",
    "matrices_of": "sparseopt.projection.layers",
    "project_gradient": "sparseopt.projection.layers",
    "projection_matrix": "sparseopt.projection.matrices",
    "select_layers": "sparseopt.projection.layers",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'sparseopt.projection' has no attribute {name!r}")
