"""From a method's name to a mask file: which scores, which entries, what the file is called, and the Jaccard report.

Memory, whatever the model: the mask (1 bit a parameter) and pieces of some 50 MB; 256 MB of keys more for granularities 8
to 32, which keep them between passes. The Jaccard report holds three masks at a time, all others on disk.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from sparseopt._files import atomic_write
from sparseopt.deltas.model_scores import RandomScores, model_parameters, weight_scores
from sparseopt.deltas.reader import LogReader
from sparseopt.deltas.scores import METHODS as LOG_METHODS
from sparseopt.deltas.scores import LogScores
from sparseopt.masks import jaccard
from sparseopt.masks._pieces import Scores, SelectedScores
from sparseopt.masks.find import check_arguments, find_masks, is_mlp, matches
from sparseopt.masks.gradient_stats import GradientScores
from sparseopt.masks.granularity import Granularity
from sparseopt.masks.maskset import MaskSet
from sparseopt.progress import Progress

__all__ = ["METHODS", "Search", "find", "jaccard_report", "write_jaccard"]

METHODS = (*LOG_METHODS, "gradient", "weight_magnitude", "random")
SPARE = 1.5  # a scratch file is used unasked where the disk has this many times its size left


@dataclass(frozen=True)
class Search:
    """What mask is looked for.

    Attributes:
        method: one of ``METHODS``; ``fisher`` takes gradient statistics where there are some, else the delta log.
        sparsity_percent: share of inactive entries, 0 to 100.
        delta_log_dir: folder of a delta log, which the first four methods and the Jaccard report need.
        target_step: logged step that scores are taken at; None = the last.
        momentum_window: training steps that ``momentum`` looks back; None = back to the base.
        gradient_stats: file of squared gradients (:mod:`sparseopt.masks.gradient_stats`).
        model_name: where the log's base is read from instead of where the log says; without a log, the model.
        mlp_only: choose from parameters of MLP blocks only.
        seed: of ``random``.
        scratch_dir: folder for a file of the scores (4 bytes an entry): computed once, not in every pass. None: none.
        scope, granularity, min_layer_keep_ratio, include, exclude, allow_zero_scores: see
            :func:`sparseopt.find_masks`.
    """

    method: str
    sparsity_percent: float = 97.5
    delta_log_dir: Path | None = None
    target_step: int | None = None
    momentum_window: int | None = None
    gradient_stats: Path | None = None
    model_name: str | None = None
    scope: str = "global"
    granularity: Granularity = 1
    min_layer_keep_ratio: float = 0.0
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    mlp_only: bool = False
    allow_zero_scores: bool = False
    seed: int = 0
    scratch_dir: Path | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}.")
        if not 0 <= self.sparsity_percent <= 100:
            raise ValueError(f"sparsity_percent must lie in 0..100, got {self.sparsity_percent}.")
        check_arguments(self.sparsity_percent / 100, self.scope, self.min_layer_keep_ratio)
        if self.method == "gradient" and self.gradient_stats is None:
            raise ValueError("method 'gradient' needs gradient statistics: give a file (gradient_stats).")
        if self.from_log and self.delta_log_dir is None:
            also = " or gradient statistics" if self.method == "fisher" else ""
            raise ValueError(f"method {self.method!r} needs a delta log{also}: give its folder (delta_log_dir).")
        if self.method in ("weight_magnitude", "random") and self.delta_log_dir is None and self.model_name is None:
            raise ValueError(f"method {self.method!r} needs a model (model_name) or a delta log (delta_log_dir).")
        if self.gradient_stats is not None and self.method not in ("gradient", "fisher"):
            raise ValueError(f"method {self.method!r} does not use gradient statistics ('{self.gradient_stats}').")

    @property
    def from_log(self) -> bool:
        """Whether the scores come from the delta log."""
        return self.method in LOG_METHODS and self.gradient_stats is None

    @property
    def sparsity(self) -> float:
        return self.sparsity_percent / 100

    def open_log(self) -> LogReader | None:
        """The log, with its base checked; None without one."""
        return None if self.delta_log_dir is None else LogReader(self.delta_log_dir, self.model_name)

    def file_name(self, target_step: int | None) -> str:
        """``sparsity_97.5pct_fisher_step50.safetensors``, ``sparsity_90.0pct_momentum_w25_step25.safetensors``.

        Masks that do not depend on a step have none in their names; ``random`` has its seed instead.
        """
        percent = f"{self.sparsity_percent:.1f}"
        if float(percent) != self.sparsity_percent:
            percent = str(float(self.sparsity_percent))
        name = f"sparsity_{percent}pct_{self.method}"
        if self.method == "momentum":
            name += f"_w{self.momentum_window or target_step}"
        if self.method == "random":
            name += f"_seed{self.seed}"
        return f"{name}_step{target_step}.safetensors" if self.from_log else f"{name}.safetensors"


def find(search: Search, reader: LogReader | None = None) -> MaskSet:
    """The mask that is looked for; its metadata say how it was found.

    Args:
        search: what to look for.
        reader: ``search.open_log()``, where that was done already.

    Raises:
        ValueError: a step that was not logged, a gap in the chain, a delta or base of another model, nothing to choose
            from, too many entries of score zero.
        FileNotFoundError: no log, model or file of statistics there.
        sparseopt.FormatError: a damaged file.
    """
    if reader is None and search.delta_log_dir is not None:
        reader = search.open_log()
    scores = _scores(search, reader)
    with _spooled(search, scores) as ready:
        return _choose(search, ready)


def _scores(search: Search, reader: LogReader | None) -> Scores:
    if search.gradient_stats is not None:
        return GradientScores(search.gradient_stats, search.method)
    if search.from_log:
        assert reader is not None
        target = reader.resolve(search.target_step)
        window = (search.momentum_window or max(1, target)) if search.method == "momentum" else None
        return LogScores(reader, search.method, target, window)
    if search.method == "weight_magnitude":
        return weight_scores(reader.base if reader is not None else str(search.model_name))
    known = {"base_model": search.model_name} if reader is None else {}
    shapes = reader.base if reader is not None else model_parameters(str(search.model_name))
    return RandomScores(shapes, search.seed, known)


@contextlib.contextmanager
def _spooled(search: Search, scores: Scores, progress: bool = True) -> Iterator[Scores]:
    # Scores that do not come from a log cost no more to compute than to read.
    if search.scratch_dir is None or not search.from_log:
        yield scores
        return
    with scores.spool(search.scratch_dir, progress) as spooled:
        yield spooled


def _choose(search: Search, scores: Scores) -> MaskSet:
    include: list[str] | None = list(search.include) or None
    if search.mlp_only:
        include = [
            name
            for name in scores
            if is_mlp(name) and (include is None or any(matches(name, pattern) for pattern in include))
        ]
        if not include:
            raise ValueError(
                f"mlp_only leaves nothing: none of the {len(scores)} parameters is of an MLP block by name."
            )
    asked = {"mlp_only": search.mlp_only, "include": list(search.include), "exclude": list(search.exclude)}
    return find_masks(
        scores,
        search.sparsity,
        search.scope,
        search.granularity,
        search.min_layer_keep_ratio,
        include,
        list(search.exclude) or None,
        search.allow_zero_scores,
        metadata={key: value for key, value in asked.items() if value},
    )


def scratch_for(scores_bytes: int, folder: Path) -> Path | None:
    """``folder`` if its disk has room to spare for a scratch file of that size, else None."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    return folder if shutil.disk_usage(existing).free > SPARE * scores_bytes else None


def log_bytes(reader: LogReader) -> int:
    """Bytes of a scratch file of the log's scores."""
    return 4 * sum(math.prod(reader.shapes[name]) for name in reader.parameters)


# ---- Jaccard ---------------------------------------------------------------------------------------------------------
def jaccard_report(search: Search, found: MaskSet, reader: LogReader) -> dict[str, Any]:
    """``found`` beside the ground truth at the last logged step, and masks of its method across the logged steps.

    All masks are found as ``found`` was (sparsity, scope, granularity, ...), but whatever their share of zero scores,
    which the report tells.

    Returns:
        ``ground_truth``: :func:`sparseopt.masks.jaccard.against` with ``step`` and ``zero_score_share``; ``steps``:
        :func:`sparseopt.masks.jaccard.across_steps`, None for methods that do not look at the log; what was asked for.

    Raises:
        ValueError: the log holds other parameters than ``found``.
    """
    last = reader.resolve()
    known = set(reader.parameters)
    for name in found:
        if name not in known:
            raise ValueError(f"the delta log '{reader.path}' has no parameter {name!r}, which the mask has.")

    def at(method: str, step: int) -> MaskSet:
        one = replace(search, method=method, target_step=step, gradient_stats=None, allow_zero_scores=True)
        scores = SelectedScores(_scores(one, reader), found)
        with warnings.catch_warnings(), _spooled(one, scores, progress=False) as ready:
            warnings.simplefilter("ignore", UserWarning)  # the report tells the share of zero scores
            mask = _choose(one, ready)
        progress.update()
        return mask

    steps = None
    with Progress("Jaccard", 1 + (len(reader.steps) if search.from_log else 0), unit="mask") as progress:
        truth = at("ground_truth", last)
        if search.from_log:
            with tempfile.TemporaryDirectory(dir=search.scratch_dir) as folder:
                steps = jaccard.across_steps(partial(at, search.method), reader.steps, truth, folder)
    return {
        "format": "sparseopt.jaccard",
        "version": 1,
        "method": search.method,
        "fingerprint": found.fingerprint,
        "log_fingerprint": reader.base.fingerprint,
        "base_model": reader.base.name,
        "sparsity": search.sparsity,
        "scope": search.scope,
        "granularity": search.granularity,
        "target_step": found.metadata.get("target_step"),
        "momentum_window": search.momentum_window if search.method == "momentum" else None,
        "ground_truth": {
            "step": last,
            "zero_score_share": truth.metadata["zero_score_share"],
            **jaccard.against(found, truth),
        },
        "steps": steps,
    }


def write_jaccard(report: dict[str, Any], mask_file: Path) -> tuple[Path, Path]:
    """Writes ``*_jaccard.json`` and ``*_jaccard.png`` beside a mask file -> their paths."""
    text, picture = (mask_file.with_name(f"{mask_file.stem}_jaccard.{suffix}") for suffix in ("json", "png"))
    atomic_write(text, json.dumps(report, indent=1, allow_nan=False) + "\n")
    jaccard.plot(report, picture, f"{mask_file.stem}, ground truth of step {report['ground_truth']['step']}")
    return text, picture


def require_plotting() -> None:
    """Raises ModuleNotFoundError, before long work, where matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ModuleNotFoundError("the Jaccard report draws a picture with matplotlib", name="matplotlib")
