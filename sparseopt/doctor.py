"""What is installed, what runs where and why, and whether it works: the data behind ``sparseopt doctor``."""

from __future__ import annotations

import importlib
import importlib.util
import platform
import shlex
import sys
import warnings
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["extra_of", "report", "shadowed_extension"]

PACKAGES = (
    *("torch", "triton", "numpy", "safetensors", "huggingface_hub", "transformers", "trl", "accelerate", "datasets"),
    *("peft", "reasoning-gym", "gguf", "omegaconf", "matplotlib", "pandas"),
)
# Extras that users install; `dev` and the unions are left out of the report.
EXTRAS = ("train", "runs", "plot", "demo")


def report(device: str = "auto") -> dict[str, Any]:
    """Collects everything; primitives only, so that it can be written as JSON.

    Args:
        device: ``auto`` checks the CPU and every CUDA device, another name that device only.

    Returns:
        ``versions``, ``location``, ``devices`` (device, name, backend, reason, self_check), ``extension`` (path,
        build), ``extras`` (extra, missing, command), ``notes``, and ``problems``: what is broken, empty if all is well.

    Raises:
        ValueError: ``device`` is not a device of this machine.
    """
    package = Path(importlib.util.find_spec("sparseopt").origin).parent  # type: ignore[union-attr, arg-type]
    result: dict[str, Any] = {
        "versions": {"sparseopt": _version("sparseopt"), "python": platform.python_version()},
        "location": str(package),
        "devices": [],
        "extension": {"path": None, "build": {}},
        "extras": _extras(),
        "notes": [],
        "problems": [],
    }
    result["versions"] |= {name: _version(name) for name in PACKAGES}
    problems = result["problems"]
    shadowed = shadowed_extension()
    if shadowed is not None:
        problems.append(
            f"Python imports the source tree {package}, which has no compiled kernels, while the installed package has "
            f"them ({shadowed}). Run from another folder, or use the command `sparseopt`."
        )
    elif importlib.util.find_spec("sparseopt.trainers") is None:
        problems.append(
            f"Python imports the source tree {package}, which is not installed: its sub-packages are missing. "
            "Install it with `pip install --no-build-isolation -e .`."
        )
    if result["versions"]["torch"] is None:
        problems.append("The package 'torch' is not installed: pip install torch")
        return result

    from sparseopt import _backend

    extension = importlib.util.find_spec("sparseopt._C")
    if extension is not None:
        result["extension"]["path"] = extension.origin
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            _backend.load()
    except _backend.BackendError as error:
        problems.append(str(error))
        return result
    result["notes"] += [str(w.message) for w in caught]
    if extension is not None:
        result["extension"]["build"] = _build_info(result["notes"])
    for found, name in _devices(device):
        chosen = _backend.selection(found)
        outcome = self_check(found)
        if outcome != "ok":
            problems.append(f"{found}: {outcome}")
        result["devices"].append(
            {
                "device": str(found),
                "name": name,
                "backend": chosen.backend,
                "reason": chosen.reason,
                "self_check": outcome,
            }
        )
    return result


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


# ---- extras ----------------------------------------------------------------------------------------------------------
def _requirements() -> dict[str, list[str]]:
    """Extra -> its requirements such as ``trl>=1.0``; extras within extras are listed under their own names."""
    from packaging.requirements import Requirement

    result: dict[str, list[str]] = {}
    try:
        lines = metadata.requires("sparseopt") or []
    except metadata.PackageNotFoundError:
        return result
    parsed = [Requirement(line) for line in lines]
    for extra in EXTRAS:
        for requirement in parsed:
            here = requirement.marker is not None and requirement.marker.evaluate({"extra": extra})
            if here and not requirement.marker.evaluate({"extra": ""}) and requirement.name != "sparseopt":  # type: ignore[union-attr]
                result.setdefault(extra, []).append(f"{requirement.name}{requirement.specifier}")
    return result


def _name(requirement: str) -> str:
    from packaging.requirements import Requirement

    return Requirement(requirement).name


def _command(requirements: list[str]) -> str:
    return "pip install " + " ".join(shlex.quote(r) for r in requirements)


def _extras() -> list[dict[str, Any]]:
    result = []
    for extra, requirements in _requirements().items():
        missing = [r for r in requirements if _version(_name(r)) is None]
        result.append(
            {
                "extra": extra,
                "missing": [_name(r) for r in missing],
                "command": _command(missing) if missing else None,
            }
        )
    return result


def extra_of(module: str) -> tuple[str, str] | None:
    """The extra that a top-level module belongs to and the pip command for what is missing of it; None if to none."""
    for extra, requirements in _requirements().items():
        if module.replace("_", "-").lower() in (_name(r).replace("_", "-").lower() for r in requirements):
            missing = [r for r in requirements if _version(_name(r)) is None]
            return extra, _command(missing or requirements)
    return None


# ---- compiled kernels ------------------------------------------------------------------------------------------------
def shadowed_extension() -> Path | None:
    """The compiled module of an installed sparseopt that the imported source tree hides, or None.

    Happens with ``python -m sparseopt`` in the root of a clone after a normal (not editable) install: Python puts the
    working directory first.
    """
    if importlib.util.find_spec("sparseopt._C") is not None:
        return None
    here = Path(__file__).resolve().parent
    for entry in sys.path:
        folder = Path(entry or ".").resolve() / "sparseopt"
        if folder != here:
            compiled = sorted(folder.glob("_C*.so"))
            if compiled:
                return compiled[0]
    return None


def _build_info(notes: list[str]) -> dict[str, Any]:
    import torch

    module: ModuleType = importlib.import_module("sparseopt._C")
    info = {k: v if isinstance(v, (int, float, str)) else str(v) for k, v in module.build_info().items()}
    built, running = str(info.get("torch", "")), torch.__version__
    if built.partition("+")[0] != running.partition("+")[0]:
        notes.append(f"The compiled kernels were built with torch {built}, and torch {running} runs.")
    return info


# ---- devices ---------------------------------------------------------------------------------------------------------
def _devices(asked: str) -> list[tuple[torch.device, str]]:
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = [(torch.device("cpu"), f"{torch.get_num_threads()} threads")]
    found += [(torch.device("cuda", i), torch.cuda.get_device_name(i)) for i in range(count)]
    if asked == "auto":
        return found
    wanted = "cuda:0" if asked == "cuda" else asked
    chosen = [(device, name) for device, name in found if str(device) == wanted]
    if not chosen:
        raise ValueError(f"device must be auto or one of {', '.join(str(d) for d, _ in found)}, got {asked!r}.")
    return chosen


def self_check(device: torch.device) -> str:
    """Packs, unpacks and takes one sparse AdamW step on ``device``, against plain PyTorch on the CPU.

    Returns:
        ``ok``, or what differed or failed.
    """
    import torch

    from sparseopt import reference

    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(1009, generator=generator) < 0.1
    ops = torch.ops.sparseopt
    try:
        packed = ops.pack_mask(mask.to(device))
        if not torch.equal(packed.cpu(), reference.pack_mask(mask)):
            return "pack_mask differs from the reference"
        if not torch.equal(ops.unpack_mask(packed, mask.numel()).cpu(), mask):
            return "unpack_mask does not invert pack_mask"
        indices = ops.mask_indices(packed, mask.numel())
        if not torch.equal(indices.cpu(), reference.mask_indices(packed.cpu(), mask.numel())):
            return "mask_indices differs from the reference"
        generator.manual_seed(1)
        expected = _step(reference.sparse_adamw_, mask, indices.cpu(), generator, torch.device("cpu"))
        generator.manual_seed(1)
        got = _step(ops.sparse_adamw_, mask, indices, generator, device)
    except RuntimeError as error:
        return f"an op failed: {' '.join(str(error).split())}"
    if not torch.equal(got[~mask], expected[~mask]):
        return "sparse_adamw_ changed inactive entries"
    if not torch.allclose(got, expected, rtol=1e-6, atol=1e-7):
        return f"sparse_adamw_ differs from the reference by {(got - expected).abs().max().item():.3g}"
    return "ok"


def _step(
    op: Any, mask: torch.Tensor, indices: torch.Tensor, generator: torch.Generator, device: torch.device
) -> torch.Tensor:
    """One step of ``op`` on one fp32 tensor with random values from ``generator`` -> the tensor, on the CPU."""
    import torch

    param = torch.randn(mask.numel(), generator=generator).to(device)
    grad = torch.randn(mask.numel(), generator=generator).to(device)
    active = indices.numel()
    chunks = torch.tensor([[0, 0, 0, active, 0, 0]], device=device)
    # lr, beta1, beta2, eps, weight_decay, maximize, correct_bias, amsgrad
    hyper = torch.tensor([[1e-2, 0.9, 0.999, 1e-8, 1e-2, 0.0, 1.0, 0.0]], dtype=torch.float64, device=device)
    groups = torch.zeros(1, dtype=torch.int32, device=device)
    steps = torch.zeros(1, device=device)
    first, second = torch.zeros(active, device=device), torch.zeros(active, device=device)
    op([param], [grad], None, indices.to(device), chunks, groups, hyper, steps, first, second,
       *(None,) * 7, 1, False)  # fmt: skip
    return param.cpu()
