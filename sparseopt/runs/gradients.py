"""What the gradients that a run saved with its checkpoints tell: norms, directions, variance, and what goes with the loss.

For the gradient g of a layer (all its parameters together, or one parameter) at a checkpoint:

    norm        ||g||_2,      rms = ||g||_2 / sqrt(number of entries)
    next        cos(g_l, g_{l+1}): over the parameters of one name and one shape in a layer and in its next neighbour
    previous    cos(g at this checkpoint, g at the one before), over the same parameters
    variance    sum_i ||g_i - mean||^2 / (k - 1) over the gradients g_1 .. g_k of the step's micro-batches;
    noise       sqrt(variance) / ||mean||: 1 where a micro-batch's gradient is as much noise as signal
    noise_scale variance / (||mean||^2 - variance / k), in micro-batches: the batch size at which noise and signal are
                equal (the simple noise scale of McCandlish et al., arXiv 1812.06162); None where the signal is not seen

What vanishes, what explodes and what goes with the loss: :mod:`sparseopt.runs.gradient_findings`.

Files are mapped into memory and read one parameter at a time: nothing is ever held but a parameter of two checkpoints.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparseopt._files import FormatError
from sparseopt.progress import track
from sparseopt.runs.gradient_findings import Thresholds, correlations, flags, loss_at
from sparseopt.runs.log import read_log

if TYPE_CHECKING:
    import torch

__all__ = ["analyse", "gradient_files"]

GRADIENTS, MICRO = "gradients.pt", "micro_gradients"
FORMAT = "sparseopt.gradients/1"


# ---- files -----------------------------------------------------------------------------------------------------------
def gradient_files(folder: Path) -> dict[int, Path]:
    """Step -> checkpoint folder with gradients, ascending. ``final_checkpoint`` counts unless its step is there already.

    Raises:
        FileNotFoundError: the run has saved no gradients.
    """
    found = {
        int(match[1]): path
        for path in folder.iterdir()
        if (match := re.fullmatch(r"checkpoint_(\d+)", path.name)) and (path / GRADIENTS).is_file()
    }
    final = folder / "final_checkpoint"
    if (final / GRADIENTS).is_file():
        found.setdefault(_final_step(folder, final, max(found, default=0)), final)
    if not found:
        raise FileNotFoundError(
            f"The run {folder.name} has saved no gradients ({folder}/checkpoint_STEP/{GRADIENTS}): train it with "
            "checkpoints.gradients=true."
        )
    return dict(sorted(found.items()))


def _final_step(folder: Path, final: Path, last: int) -> int:
    state = final / "accelerator_states" / "trainer_state.json"
    if state.is_file():
        return int(json.loads(state.read_text())["global_step"])
    return max([last + 1, *(entry["step"] for entry in read_log(folder) if "step" in entry)])


def _open(path: Path) -> dict[str, torch.Tensor]:
    """Gradients by parameter name, mapped: read when used.

    Raises:
        FormatError: it holds something else than named floating-point tensors, or is damaged.
    """
    import pickle

    import torch

    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError) as error:
        raise FormatError(
            f"{path} holds no gradients: {str(error).splitlines()[0] if str(error) else error!r}"
        ) from error
    if not isinstance(loaded, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) and value.is_floating_point()
        for name, value in loaded.items()
    ):
        raise FormatError(f"{path} holds no gradients: expected a dict of parameter name -> floating-point tensor.")
    return loaded


# ---- layers ----------------------------------------------------------------------------------------------------------
def layer_of(name: str) -> tuple[int | None, str, str]:
    """-> (number of the layer or None, label of the layer, the parameter's name within it).

    ``transformer.h.3.mlp.c_fc.weight`` -> (3, "3", "mlp.c_fc.weight"); ``transformer.wte.weight`` -> (None, "wte", "weight").
    """
    match = re.search(r"(?:^|\.)(\d+)\.", name)
    if match is not None:
        return int(match[1]), match[1], name[match.end() :]
    *path, last = name.split(".")
    return None, path[-1] if path else last, last


def _layers(names: Sequence[str]) -> dict[str, list[str]]:
    """Label -> parameters, in the order of the model: what comes before the numbered layers, these, the rest."""
    found: dict[str, list[str]] = {}
    numbered: dict[str, int] = {}
    for name in names:
        number, label, _ = layer_of(name)
        found.setdefault(label, []).append(name)
        if number is not None:
            numbered[label] = number
    ordered = iter(sorted(numbered, key=numbered.__getitem__))  # a file may be sorted by text, 10 before 2
    labels = [next(ordered) if label in numbered else label for label in found]
    return {label: found[label] for label in labels}


@dataclass
class _Sums:
    """Of two vectors: squares, product, entries; the cosine between them."""

    aa: float = 0.0
    bb: float = 0.0
    ab: float = 0.0

    def add(self, other: _Sums) -> None:
        self.aa, self.bb, self.ab = self.aa + other.aa, self.bb + other.bb, self.ab + other.ab

    @property
    def cosine(self) -> float | None:
        size = math.sqrt(self.aa) * math.sqrt(self.bb)
        return max(-1.0, min(1.0, self.ab / size)) if size > 0 and math.isfinite(size) else None


def _products(a: torch.Tensor, b: torch.Tensor) -> _Sums:
    import torch

    # In pieces: sums of squares in fp64, without a copy of the whole parameter in it.
    total = _Sums()
    for x, y in zip(a.flatten().split(1 << 22), b.flatten().split(1 << 22), strict=True):
        x, y = x.to(torch.float64), y.to(torch.float64)
        total.add(_Sums(float(x @ x), float(y @ y), float(x @ y)))
    return total


def _square(a: torch.Tensor) -> float:
    import torch

    return sum(float(x @ x) for x in (piece.to(torch.float64) for piece in a.flatten().split(1 << 22)))


# ---- one checkpoint --------------------------------------------------------------------------------------------------
def _norms(gradients: Mapping[str, torch.Tensor], layers: Mapping[str, list[str]]) -> dict[str, Any]:
    squares = {name: _square(value) for name, value in gradients.items()}
    sizes = {name: value.numel() for name, value in gradients.items()}

    def measure(names: Sequence[str]) -> dict[str, float]:
        square, count = sum(squares[name] for name in names), sum(sizes[name] for name in names)
        return {"norm": math.sqrt(square), "rms": math.sqrt(square / count) if count else 0.0}

    return {
        "total_norm": math.sqrt(sum(squares.values())),
        "layers": {label: measure([n for n in names if n in squares]) for label, names in layers.items()},
        "parameters": {name: math.sqrt(square) for name, square in squares.items()},
    }


def _next_cosines(gradients: Mapping[str, torch.Tensor]) -> list[dict[str, Any]]:
    """Between each numbered layer and the next one there is, with the parameters that both have in one shape."""
    inside: dict[int, dict[str, str]] = {}
    for name in gradients:
        number, _, rest = layer_of(name)
        if number is not None:
            inside.setdefault(number, {})[rest] = name
    pairs = []
    for low, high in itertools.pairwise(sorted(inside)):
        shared = {
            rest: (gradients[name], gradients[inside[high][rest]])
            for rest, name in inside[low].items()
            if rest in inside[high] and gradients[name].shape == gradients[inside[high][rest]].shape
        }
        total, by_name = _Sums(), {}
        for rest, (a, b) in shared.items():
            sums = _products(a, b)
            total.add(sums)
            by_name[rest] = sums.cosine
        pairs.append({"layers": [str(low), str(high)], "cosine": total.cosine, "parameters": by_name})
    return pairs


def _previous_cosines(
    gradients: Mapping[str, torch.Tensor], before: Mapping[str, torch.Tensor], layers: Mapping[str, list[str]]
) -> dict[str, float | None]:
    found = {}
    whole = _Sums()
    for label, names in layers.items():
        total = _Sums()
        for name in names:
            if name in gradients and name in before and gradients[name].shape == before[name].shape:
                total.add(_products(gradients[name], before[name]))
        whole.add(total)
        found[label] = total.cosine
    return {"all": whole.cosine, **found}


def _variance(folder: Path, layers: Mapping[str, list[str]]) -> dict[str, Any] | None:
    """Over the micro-batches of a checkpoint's step; None where fewer than two were saved."""
    import torch

    files = sorted((folder / MICRO).glob("*.pt"))
    if len(files) < 2:
        return None
    batches, count = [_open(path) for path in files], len(files)

    def measure(mean: float, spread: float) -> dict[str, Any]:
        variance = spread / (count - 1)
        signal = mean - variance / count
        return {
            "variance": variance,
            "mean_norm": math.sqrt(mean),
            "noise": math.sqrt(variance / mean) if mean > 0 else None,
            "noise_scale": variance / signal if signal > 0 else None,
        }

    found, whole = {}, [0.0, 0.0]
    for label, names in layers.items():
        sums = [0.0, 0.0]  # ||mean||^2, sum of ||g_i - mean||^2
        for name in names:
            parts = [batch[name] for batch in batches if name in batch]
            if len(parts) != count or any(part.shape != parts[0].shape for part in parts):
                continue
            mean = torch.zeros(parts[0].shape, dtype=torch.float32)
            for part in parts:
                mean += part.float() / count
            sums[0] += _square(mean)
            sums[1] += sum(_square(part.float() - mean) for part in parts)
        found[label] = measure(*sums)
        whole = [whole[0] + sums[0], whole[1] + sums[1]]
    return {"batches": count, "all": measure(*whole), "layers": found}


# ---- a run -----------------------------------------------------------------------------------------------------------
def analyse(folder: Path, thresholds: Thresholds | None = None) -> dict[str, Any]:
    """Everything above about the run in a folder, as plain numbers (NaN and infinities as such).

    Returns:
        ``run_id``, ``steps``, ``layers`` (labels in order), ``checkpoints`` (for each step: ``total_norm``, ``eval_loss``,
        ``layers`` with norm and rms, ``parameters`` with norms, ``next``, ``previous``, ``variance``), ``flags``,
        ``thresholds``, ``correlations`` with the validation loss over the checkpoints.

    Raises:
        FileNotFoundError: the run has saved no gradients.
        FormatError: a file is damaged or holds something else.
    """
    limits = thresholds or Thresholds()
    files = gradient_files(folder)
    evaluations = {
        int(entry["step"]): float(entry["eval_loss"])
        for entry in read_log(folder)
        if "step" in entry and isinstance(entry.get("eval_loss"), (int, float))
    }
    names: dict[str, None] = {}
    for path in files.values():
        names.update(dict.fromkeys(_open(path / GRADIENTS)))
    layers = _layers(list(names))
    checkpoints: list[dict[str, Any]] = []
    before: dict[str, torch.Tensor] | None = None
    for step, path in track(files.items(), "gradients", total=len(files), unit="checkpoint"):
        gradients = _open(path / GRADIENTS)
        checkpoints.append(
            {
                "step": step,
                "checkpoint": path.name,
                "eval_loss": loss_at(step, evaluations),
                **_norms(gradients, layers),
                "next": _next_cosines(gradients),
                "previous": None if before is None else _previous_cosines(gradients, before, layers),
                "variance": _variance(path, layers),
            }
        )
        before = gradients
    return {
        "format": FORMAT,
        "run_id": folder.name,
        "steps": list(files),
        "layers": list(layers),
        "thresholds": asdict(limits),
        "flags": flags(checkpoints, limits),
        "correlations": correlations(checkpoints, list(layers)),
        "checkpoints": checkpoints,
    }
