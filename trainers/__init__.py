"""Thin adapters over transformers and TRL: ``sparseopt.trainers``."""

import importlib
from typing import TYPE_CHECKING, Any

if __name__ != "sparseopt.trainers":
    raise ImportError("This folder installs as `sparseopt.trainers`; import it under that name (pip install first).")

if TYPE_CHECKING:
    from sparseopt.trainers.attachment import attach as attach
    from sparseopt.trainers.attachment import sparse_optimizer as sparse_optimizer
    from sparseopt.trainers.delta_logger import DeltaLogger as DeltaLogger
    from sparseopt.trainers.delta_logger import parse_schedule as parse_schedule
    from sparseopt.trainers.dynamic import DynamicSparsity as DynamicSparsity
    from sparseopt.trainers.finetune import sparse_finetune as sparse_finetune
    from sparseopt.trainers.mask_collector import MaskCollector as MaskCollector
    from sparseopt.trainers.reference import share_reference as share_reference
    from sparseopt.trainers.scoring import gradient_scores as gradient_scores
    from sparseopt.trainers.topk_attention import TopKAttention as TopKAttention

# public name -> module; loaded on first use, since each brings transformers
_PUBLIC = {
    "DeltaLogger": "sparseopt.trainers.delta_logger",
    "DynamicSparsity": "sparseopt.trainers.dynamic",
    "MaskCollector": "sparseopt.trainers.mask_collector",
    "TopKAttention": "sparseopt.trainers.topk_attention",
    "attach": "sparseopt.trainers.attachment",
    "gradient_scores": "sparseopt.trainers.scoring",
    "parse_schedule": "sparseopt.trainers.delta_logger",
    "share_reference": "sparseopt.trainers.reference",
    "sparse_finetune": "sparseopt.trainers.finetune",
    "sparse_optimizer": "sparseopt.trainers.attachment",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'sparseopt.trainers' has no attribute {name!r}")
