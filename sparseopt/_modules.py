"""Which modules multiply by a weight, and what they are called."""

from __future__ import annotations

from torch import nn

from sparseopt.masks._names import normalize_name

__all__ = ["module_kind", "module_name"]


def module_name(name: str) -> str:
    """A module's path without what wrappers add."""
    return normalize_name(f"{name}.weight").removesuffix("weight").removesuffix(".")


def module_kind(module: nn.Module) -> str | None:
    """Which of "Linear", "Conv1D", "Embedding" it is; None for others and for subclasses with a forward of their own."""
    for base in type(module).__mro__:
        conv1d = base.__name__ == "Conv1D" and base.__module__ == "transformers.pytorch_utils"
        if base in (nn.Linear, nn.Embedding) or conv1d:
            return base.__name__ if type(module).forward is vars(base).get("forward") else None
    return None
