"""What the error analysis reads: folders of projections that differ in their rank, and dot products of exact gradients."""

from __future__ import annotations

import copy
import fnmatch
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparseopt._files import FormatError
from sparseopt.progress import track
from sparseopt.projection._store_export import exported
from sparseopt.projection._store_files import METADATA_FILE, difference, is_store, layers_problem, without
from sparseopt.projection.full_gradients import FullGradients
from sparseopt.projection.layers import _ranks, matrices_of, project_gradient
from sparseopt.projection.store import ProjectionStore

__all__ = [
    "Folder",
    "at_rank",
    "check_same_samples",
    "find_folders",
    "find_full_gradients",
    "layer_slices",
    "naive_rows",
    "products",
]

RANK = re.compile(r"rank_total_(\d+)")
COLUMNS = 1 << 16  # entries of every sample's gradient in memory at a time
ROWS = 1024  # projections in memory at a time

# What a rank changes.
_OF_RANK = ("proj_rank_total", "total_proj_dim", "layers", "coverage")
_OF_RANK_IN_LAYERS = ("k_i", "k_o", "slice_start", "slice_end", "input_key")
# What of a run must agree besides, where both say it: the model, and which sample an id is.
_OF_RUN = ("architecture", "model", "model_dtype", "data", "dataset", "seed", "block_size")


@dataclass(frozen=True)
class Folder:
    """One rank's projections: a store, or exported ``.pt`` files."""

    path: Path
    rank: int
    metadata: dict[str, Any]

    @property
    def template(self) -> str:
        """The name without its rank."""
        return RANK.sub("rank_total_ALL", self.path.name)

    def ids(self, max_iters: int) -> list[int]:
        """Samples of the first iterations: files, or in a store batches of the run's size (1 where it is not known)."""
        if is_store(self.path):
            size = _run_config(self.path).get("batch_size", 1)
            size = size if isinstance(size, int) and size > 0 else 1
            return ProjectionStore(self.path).completed[: max_iters * size].tolist()
        return [i for _, ids, _ in exported(self.path, self.columns, max_iters) for i in ids]

    @property
    def columns(self) -> int:
        return int(self.metadata["total_proj_dim"])

    def rows(self, ids: Sequence[int], max_iters: int) -> Iterable[Tensor]:
        """Rows of these samples, in blocks, in this order."""
        if is_store(self.path):
            store = ProjectionStore(self.path)
            for start in range(0, len(ids), ROWS):
                yield store.rows(ids[start : start + ROWS])
            return
        places = {sample: i for i, sample in enumerate(ids)}
        result: Tensor | None = None
        for _, found, rows in exported(self.path, self.columns, max_iters):
            result = torch.empty(len(ids), self.columns, dtype=rows.dtype) if result is None else result
            for sample, row in zip(found, rows, strict=True):
                if sample in places:
                    result[places[sample]] = row
        if result is not None:
            yield from result.split(ROWS)

    def products(self, ids: Sequence[int], references: int, max_iters: int) -> Tensor:
        """float64 [references, n]: of the first samples with all."""
        first: list[Tensor] = []
        for block in self.rows(ids[:references], max_iters):
            first.append(block.double())
        wanted = torch.cat(first)
        result = torch.cat([wanted @ block.double().T for block in self.rows(ids, max_iters)], dim=1)
        if not result.isfinite().all():
            raise ValueError(f"projections in '{self.path}' are not finite.")
        return result


# ---- folders ---------------------------------------------------------------------------------------------------------
def find_folders(results_dir: Path, pattern: str, pattern_type: str) -> dict[int, Folder]:
    """Folders by rank, ascending; they are alike but for the rank.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: a pattern that is none or matches nothing, a match without rank, or matches that differ in more.
        FormatError: a match without projections.
    """
    if not results_dir.is_dir():
        raise FileNotFoundError(f"the results folder '{results_dir}' does not exist.")
    names = sorted(path.name for path in results_dir.iterdir() if path.is_dir())
    matched = [name for name in names if _matcher(pattern, pattern_type).search(name)]
    if not matched:
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        raise ValueError(
            f"no folder in '{results_dir}' matches the {pattern_type} {pattern!r}; there are: {shown or 'none'}."
        )
    folders: dict[int, Folder] = {}
    for name in matched:
        folder = open_folder(results_dir / name)
        check_alike(next(iter(folders.values()), folder), folder)
        if folder.rank in folders:
            raise ValueError(f"'{folders[folder.rank].path.name}' and '{name}' have the same rank.")
        folders[folder.rank] = folder
    return dict(sorted(folders.items()))


def _matcher(pattern: str, pattern_type: str) -> re.Pattern[str]:
    if pattern_type == "glob":
        return re.compile(fnmatch.translate(pattern))
    if pattern_type != "regex":
        raise ValueError(f"pattern_type must be 'regex' or 'glob', got {pattern_type!r}.")
    try:
        # '\\d' in a shell's single quotes arrives with both backslashes; a folder's name has none.
        return re.compile(pattern.replace("\\\\", "\\"))
    except re.error as error:
        hint = "; with --pattern_type glob it may be right" if set(pattern) & set("*?[") else ""
        raise ValueError(f"{pattern!r} is not a regular expression ({error}){hint}.") from error


def open_folder(path: Path) -> Folder:
    """One folder of projections; its name must tell the rank that its metadata has."""
    token = RANK.search(path.name)
    if token is None:
        raise ValueError(f"'{path.name}' matches, but has no rank_total_K in its name.")
    place = path / METADATA_FILE
    if is_store(path):
        metadata = ProjectionStore(path).metadata
    else:
        try:
            metadata = json.loads(place.read_bytes())
        except FileNotFoundError:
            raise FormatError(f"'{path}' holds no projections: it has no {METADATA_FILE}.") from None
        except ValueError as error:
            raise FormatError(f"'{place}' is damaged: {error}.") from error
    layers, columns = (
        metadata.get(key) if isinstance(metadata, dict) else None for key in ("layers", "total_proj_dim")
    )
    if not layers or not isinstance(columns, int):
        raise FormatError(f"'{place}' is not the metadata of projections: expected layers and total_proj_dim.")
    problem = layers_problem(layers, columns)
    if problem:
        raise FormatError(f"'{place}' is damaged: it {problem}.")
    rank = int(token[1])
    if metadata.get("proj_rank_total", rank) != rank:
        raise ValueError(f"'{path.name}' has rank {metadata['proj_rank_total']} in its metadata.")
    return Folder(path, rank, metadata)


def check_alike(one: Folder, other: Folder) -> None:
    """Raises a ValueError unless the two differ in nothing but what the rank changes."""
    if one.template != other.template:
        raise ValueError(
            f"'{one.path.name}' and '{other.path.name}' differ in more than rank_total; narrow the pattern."
        )
    found = difference(_without_rank(one.metadata), _without_rank(other.metadata))
    if not found:
        found = _run_difference(_run_config(one.path), _run_config(other.path), _OF_RUN)
    if found:
        raise ValueError(
            f"'{one.path.name}' (there) and '{other.path.name}' (here) differ in more than rank_total: {found}."
        )


def _without_rank(metadata: Mapping[str, Any]) -> dict[str, Any]:
    own = {key: value for key, value in metadata.items() if key not in _OF_RANK}
    layers = [{key: x[key] for key in x if key not in _OF_RANK_IN_LAYERS} for x in metadata["layers"]]
    return {**own, "layers": layers}


def _run_difference(one: Mapping[str, Any], other: Mapping[str, Any], keys: Sequence[str]) -> str | None:
    shared = [key for key in keys if key in one and key in other]
    # How many samples were wanted is no difference: they are the first ones of one order.
    return difference(*(without({key: run[key] for key in shared}, "max_samples") for run in (one, other)))


def check_same_samples(folder: Folder, gradients: FullGradients) -> None:
    """Raises a ValueError where the runs say that the samples of the projections and of the exact gradients differ.

    The models are not compared: theirs may differ in the dtype.
    """
    found = _run_difference(
        _run_config(folder.path), gradients.metadata, ("architecture", "data", "seed", "block_size")
    )
    if found:
        raise ValueError(
            f"'{folder.path.name}' (there) and '{gradients.folder.name}' (here) are of other samples: {found}."
        )


def _run_config(path: Path) -> dict[str, Any]:
    try:
        contents = json.loads((path / "run_config.json").read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise FormatError(f"'{path / 'run_config.json'}' is damaged: {error}.") from error
    return contents if isinstance(contents, dict) else {}


def at_rank(folder: Folder, rank: int) -> dict[str, Any]:
    """The metadata that the same settings give at another rank.

    Raises:
        ValueError: the shape rule's sizes do not follow from the metadata.
    """
    found = copy.deepcopy(folder.metadata)
    rule, sketch, least = found.get("shape_rule"), found.get("sketch"), found.get("proj_rank_min")
    if rule != "square" or sketch is not None or not isinstance(least, int):
        raise ValueError(
            f"there is no folder of rank {rank} beside '{folder.path.name}', and its metadata (shape rule {rule!r}, "
            f"sketch {sketch!r}) does not say what the sizes at that rank are: project at that rank first."
        )
    end = 0
    for layer in found["layers"]:
        if layer["type"] == "bias":
            layer["k_i"], layer["k_o"] = 1, min(rank, layer["d_out"])
        else:
            # As in select_layers. Layers with one input share their k_i too under this rule, so their keys stay.
            layer["k_i"], layer["k_o"] = _ranks((layer["d_out"], layer["d_in"]), rank, least, rule, None)
        layer["slice_start"], end = end, end + layer["k_i"] * layer["k_o"]
        layer["slice_end"] = end
    found["proj_rank_total"], found["total_proj_dim"] = rank, end
    return found


# ---- exact gradients -------------------------------------------------------------------------------------------------
def find_full_gradients(results_dir: Path) -> FullGradients:
    """The ``fullgrads*`` folder among the results.

    Raises:
        FileNotFoundError: none.
        ValueError: several.
    """
    found = sorted(path for path in results_dir.iterdir() if path.is_dir() and path.name.startswith("fullgrads"))
    if not found:
        raise FileNotFoundError(
            f"'{results_dir}' has no folder fullgrads*: compute exact gradients first (sparseopt project full-grads)."
        )
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise ValueError(f"'{results_dir}' has several folders of exact gradients ({names}): keep one there.")
    return FullGradients(found[0])


def layer_slices(gradients: FullGradients, metadata: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Where the projected layers' gradients are in the exact ones, in the order of the layers.

    Raises:
        ValueError: a layer that was not trainable when the exact gradients were made, or of another shape.
    """
    slices, result = gradients.metadata["param_slices"], []
    for layer in metadata["layers"]:
        name, size = layer["name"], math.prod(layer["original_shape"])
        found = slices.get(f"{name}.weight", slices.get(name))
        if found is None:
            raise ValueError(f"'{gradients.folder}' has no gradient of the projected layer {name!r}.")
        if found["end"] - found["start"] != size:
            raise ValueError(
                f"'{gradients.folder}' has {found['end'] - found['start']} gradients of {name!r}, the projected layer "
                f"has {layer['original_shape']}."
            )
        result.append((found["start"], found["end"]))
    return result


def products(
    gradients: FullGradients, ids: Sequence[int], references: int, slices: Sequence[tuple[int, int]]
) -> Tensor:
    """float64 [references, n]: dot products over these slices, of the first samples with all.

    Files are memory-mapped and walked through column by column: each is read once, whatever its size.
    """
    mapped = [gradients.grad(i) for i in ids]
    result = torch.zeros(references, len(ids), dtype=torch.float64)
    spans = [(at, min(at + COLUMNS, end)) for start, end in slices for at in range(start, end, COLUMNS)]
    for start, end in track(spans, "exact dot products", unit="block"):
        block = torch.stack([grad[start:end] for grad in mapped]).double()
        result += block[:references] @ block.T
    if not result.isfinite().all():
        raise ValueError(f"gradients in '{gradients.folder}' are not finite.")
    return result


def naive_rows(gradients: FullGradients, ids: Sequence[int], metadata: Mapping[str, Any]) -> Tensor:
    """fp32 [n, total_proj_dim]: exact gradients of the layers, projected with matrices rebuilt from the metadata."""
    for layer in metadata["layers"]:
        lacking = [key for key in ("d_in", "d_out", "input_key", "output_key") if key not in layer]
        if lacking:
            raise ValueError(f"the metadata of {layer['name']!r} lacks {', '.join(lacking)}: P cannot be rebuilt.")
    mapped = [gradients.grad(i) for i in ids]
    parts = []
    spans = layer_slices(gradients, metadata)
    for layer, (start, end) in zip(track(metadata["layers"], "naive projection", unit="layer"), spans, strict=True):
        matrices = matrices_of(metadata, layer["name"])
        shape = layer["original_shape"]
        parts.append(
            torch.stack(
                [project_gradient(metadata, layer["name"], grad[start:end].view(shape), matrices) for grad in mapped]
            )
        )
    return torch.cat(parts, dim=1)
