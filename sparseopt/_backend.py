"""Loads the kernels, registers them with the dispatcher, and says what runs where and why.

Per device: CPU -> the compiled extension ``sparseopt._C``, else the reference; CUDA -> Triton, else the reference.
``SPARSEOPT_BACKEND=cpp|triton|reference`` forces one and fails if it is absent. There is no fallback after a failure:
a kernel that raises, raises.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from sparseopt import _schema, reference

__all__ = ["BackendError", "Selection", "load", "selection"]

CHOICES = ("cpp", "triton", "reference")
NO_EXTENSION = (
    "sparseopt's compiled CPU kernels are not installed, so the slower PyTorch reference runs on CPUs. To compile them: "
    "`pip install setuptools ninja` and `pip install --no-build-isolation --force-reinstall --no-deps <sparseopt>`."
)


class BackendError(RuntimeError):
    """The backend asked for cannot be used; the message says why."""


@dataclass(frozen=True)
class Selection:
    """What runs on a device type and why."""

    device: str
    backend: str
    reason: str


_selected: dict[str, Selection] = {}


def _forced() -> str | None:
    value = os.environ.get("SPARSEOPT_BACKEND", "").strip().lower()
    if not value:
        return None
    if value not in CHOICES:
        raise BackendError(f"SPARSEOPT_BACKEND={value!r} is not one of {', '.join(CHOICES)}.")
    return value


def _extension_present() -> bool:
    return importlib.util.find_spec("sparseopt._C") is not None


def _load_extension() -> None:
    try:
        importlib.import_module("sparseopt._C")
    except ImportError as error:
        raise BackendError(
            f"sparseopt's compiled kernels are installed but cannot be loaded ({error}); they were probably built for "
            f"another torch than {torch.__version__}. Reinstall sparseopt with `pip install --no-build-isolation "
            "--force-reinstall --no-deps`, or set SPARSEOPT_BACKEND=reference."
        ) from error


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@cache
def _launchers() -> dict[str, Callable[..., Any]]:
    from sparseopt.triton_kernels import IMPLEMENTATIONS

    return IMPLEMENTATIONS


def _register_triton(key: str) -> None:
    """Registers the launchers under ``key``; Triton itself is imported at the first call."""
    for name in _schema.OPS:

        def launch(*args: Any, _name: str = name) -> Any:
            return _launchers()[_name](*args)

        _schema.library.impl(name, launch, key)


def _select_cpu(forced: str | None) -> Selection:
    if forced == "triton" and interpreting():
        if importlib.util.find_spec("triton") is None:
            raise BackendError("SPARSEOPT_BACKEND=triton, but the package `triton` is not installed.")
        _register_triton("CPU")
        return Selection("cpu", "triton", "forced by SPARSEOPT_BACKEND, in Triton's interpreter")
    if forced == "triton" and not _gpu_build():
        raise BackendError(
            "SPARSEOPT_BACKEND=triton, but this torch was built without GPU support; TRITON_INTERPRET=1 runs the "
            "kernels on the CPU, for tests."
        )
    if forced == "reference":
        return Selection("cpu", "reference", "forced by SPARSEOPT_BACKEND")
    if _extension_present():
        _load_extension()
        return Selection("cpu", "cpp", "compiled extension loaded" + (", forced" if forced == "cpp" else ""))
    if forced == "cpp":
        raise BackendError("SPARSEOPT_BACKEND=cpp, but the compiled extension sparseopt._C is not installed.")
    warnings.warn(NO_EXTENSION, stacklevel=3)
    return Selection("cpu", "reference", "compiled extension not installed")


def _gpu_build() -> bool:
    # torch.version tells how torch was built without waking the driver.
    return torch.version.cuda is not None or torch.version.hip is not None


def _select_cuda(forced: str | None) -> Selection:
    if not _gpu_build():
        return Selection("cuda", "none", "this torch was built without GPU support")
    if forced == "reference":
        return Selection("cuda", "reference", "forced by SPARSEOPT_BACKEND")
    if importlib.util.find_spec("triton") is None:
        if forced == "triton":
            raise BackendError("SPARSEOPT_BACKEND=triton, but the package `triton` is not installed.")
        return Selection("cuda", "reference", "the package `triton` is not installed")
    _register_triton("CUDA")
    return Selection("cuda", "triton", "triton installed" + (", forced" if forced == "triton" else ""))


@cache
def load() -> dict[str, Selection]:
    """Registers every op once; called by the first use of a public name."""
    forced = _forced()
    for name, implementation in reference.IMPLEMENTATIONS.items():
        _schema.library.impl(name, implementation, "CompositeExplicitAutograd")
    for select in (_select_cpu, _select_cuda):
        chosen = select(forced)
        _selected[chosen.device] = chosen
    return dict(_selected)


def direct(device: torch.device) -> Callable[[str], Callable[..., Any]]:
    """Op name -> the function to call for tensors on ``device`` where nothing is traced and versions are kept by the
    caller: Triton's launcher itself, since the dispatcher costs more time on the host than the launch; else the op."""
    if selection(device).backend == "triton":
        return _launchers().__getitem__
    return lambda name: getattr(torch.ops.sparseopt, name)


def selection(device: torch.device | str) -> Selection:
    """What runs on ``device`` and why."""
    kind = torch.device(device).type
    chosen = load().get(kind)
    return chosen or Selection(kind, "reference", f"no kernels for {kind}; plain PyTorch runs")
