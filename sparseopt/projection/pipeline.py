"""``sparseopt project run``: samples of a text through a model into a ProjectionStore; and exact gradients beside it.

The output folder holds the store (``metadata.json``, ``shards/``), ``run_config.json``, ``projection_stats.json`` and, unless
declined, ``proj_iter_000001.pt`` ...: batch i of the samples. A batch is always made of the same samples, so that a run that
was killed computes what is missing to the last bit as if it had not been. Several processes may fill one folder: each takes
every n-th batch, and keeps ``projection_stats_{worker}.json``, unless a launcher started them all.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor
from torch.nn import functional as F

from sparseopt._files import atomic_write
from sparseopt._processes import launch_group, refuse_several
from sparseopt.progress import Progress
from sparseopt.projection import full_gradients, sources, text
from sparseopt.projection._statistics import STATISTICS, Statistics, merge, reported
from sparseopt.projection.errors import results_folder_name
from sparseopt.projection.projector import GradientProjector, dtype_of
from sparseopt.projection.store import ProjectionStore

__all__ = ["Data", "FullRun", "ModelSource", "Projection", "ProjectRun", "Run"]


@dataclass(frozen=True)
class ModelSource:
    """Arguments of :func:`sparseopt.projection.sources.load`."""

    architecture: str = "GPT2-Small"
    model: str | None = None
    weights: str | None = None
    random_weights: bool = False
    tokenizer: str | None = None
    dtype: str = "bfloat16"


@dataclass(frozen=True)
class Data:
    """Where samples come from (:mod:`sparseopt.projection.text`).

    Attributes:
        max_samples: None: all.
        block_size: tokens of a sample; at most the positions of the model.
    """

    source: str = text.PILE
    column: str = "text"
    block_size: int = 1024
    max_samples: int | None = None
    per_document: bool = False
    seed: int = 42


@dataclass(frozen=True)
class Projection:
    """Arguments of :class:`sparseopt.GradientProjector`."""

    layers: str = "mlp,attn"
    rank_total: int = 256
    rank_min: int = 8
    seed: int = 42
    dtype: str = "bfloat16"
    row_orthonormal: bool = False
    include_embeddings: bool = False
    method: str = "gaussian"
    include_biases: bool = False
    shape_rule: str = "square"
    sketch: int | None = None

    def __post_init__(self) -> None:
        dtype_of(self.dtype)  # before a model is loaded


@dataclass(frozen=True)
class Run:
    """What both kinds of run have: a model, samples, and where things are."""

    model: ModelSource
    data: Data
    device: torch.device

    def load(self) -> sources.LoadedModel:
        """The model; checks the block size against its positions.

        Raises:
            FileNotFoundError: the samples are not there, said before the model is built.
            ValueError: blocks longer than the model can read; see also :func:`sources.load`.
        """
        text.check_source(self.data.source)
        loaded = sources.load(**asdict(self.model), device=self.device, seed=self.data.seed)
        positions = getattr(loaded.model.config, "max_position_embeddings", None)
        if positions is not None and self.data.block_size > positions:
            raise ValueError(
                f"block_size is {self.data.block_size}, but {loaded.name} reads at most {positions} tokens."
            )
        return loaded

    def batches(self, tokenizer: Any, size: int) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        data = self.data
        texts, _ = text.documents(data.source, column=data.column, seed=data.seed)
        samples = text.token_samples(
            texts, tokenizer, data.block_size, limit=data.max_samples, per_document=data.per_document
        )
        return text.batches(samples, size)

    def described(self, loaded: sources.LoadedModel) -> dict[str, Any]:
        """What of the run decides its results, as JSON."""
        return {
            "model": {**asdict(self.model), "name": loaded.name, "weights": loaded.weights},
            "data": asdict(self.data),
        }


# ---- projections -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class ProjectRun(Run):
    """A run of projections.

    Attributes:
        output_dir: its folder; None: ``results_dir`` with a name made of the settings, as ``plot-error`` expects.
        batch_size: samples of a batch.
        save_interval: batches that are handed to the store together. None is lost at the end or on Ctrl-C; a kill costs
            those that were not handed over, and the next run computes them.
        worker, workers: this process takes batches worker, worker + workers, ... (from 0).
        together: a launcher (``torchrun``) started all workers: they wait for each other, and the first one adds up the
            statistics and exports.
        cuda_graph: replay the passes of full batches as one CUDA graph.
        export: write ``proj_iter_*.pt`` once all samples are there.
    """

    projection: Projection = Projection()
    output_dir: Path | None = None
    results_dir: Path = Path("Results")
    batch_size: int = 2
    save_interval: int = 1
    worker: int = 0
    workers: int = 1
    together: bool = False
    cuda_graph: bool = False
    export: bool = True

    def execute(self) -> dict[str, Any]:
        """Runs, or goes on; returns the statistics.

        Raises:
            ValueError: a number out of range, or a folder of other projections.
            FormatError: the folder's files are damaged.
        """
        for name, least in (("batch_size", 1), ("save_interval", 1), ("workers", 1), ("worker", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}.")
        if self.worker >= self.workers:
            raise ValueError(f"worker must be below workers ({self.workers}), got {self.worker}.")
        if self.cuda_graph and self.device.type != "cuda":
            raise ValueError(f"cuda_graph needs a CUDA device, this is {self.device}.")
        with launch_group() if self.together and self.workers > 1 else contextlib.nullcontext() as wait:
            return self._execute(wait)

    def _execute(self, wait: Callable[[], object] | None) -> dict[str, Any]:
        loaded = self.load()
        projector = GradientProjector(loaded.model, **asdict(self.projection))
        if wait is None or self.worker == 0:
            print(projector.summary(), file=sys.stderr, flush=True)
        folder = self.output_dir or self.results_dir / results_folder_name(projector.metadata)
        config = {**self.described(loaded), "projection": asdict(self.projection), "batch_size": self.batch_size}
        with ProjectionStore(folder, projector.metadata) as store:
            _keep_config(folder, config)
            seen = self._fill(loaded, projector, store)
            if wait is not None:
                wait()
                if self.worker == 0:
                    merge(folder, self.device)
                wait()
            statistics = {
                "output_dir": str(folder), "samples_stored": len(store), "total_proj_dim": store.total_dim,
                "coverage": projector.metadata["coverage"], "weights": loaded.weights,
                **reported(self._statistics_file(folder) if wait is None else folder / STATISTICS),
            }  # fmt: skip
            if self.export and (wait is None or self.worker == 0) and store.done(range(seen)):
                with FileLock(folder / ".export.lock"):
                    statistics["exported_files"] = store.export_pt(folder, self.batch_size)
        return statistics

    def _fill(self, loaded: sources.LoadedModel, projector: GradientProjector, store: ProjectionStore) -> int:
        """Computes what is missing of this worker's batches; returns the number of samples of the source."""
        done = set(store.completed.tolist())
        limit, seen = self.data.max_samples, 0
        statistics = Statistics(self._statistics_file(store.path), self.device, whole=store.path / STATISTICS)
        pending: list[tuple[list[int], Tensor]] = []

        def hand_over() -> None:
            if pending:
                store.write([i for ids, _ in pending for i in ids], torch.cat([rows for _, rows in pending]))
                pending.clear()
                statistics.save()

        project = self._passes(projector)
        what = "project" if self.workers == 1 else f"project (process {self.worker + 1} of {self.workers})"
        total = None if limit is None else self._own(range(limit))
        with (
            projector,
            Progress(what, total, unit="sample", completed=self._own(i for i in done if i < (limit or 0))) as progress,
        ):
            try:
                for number, (ids, tokens, mask) in enumerate(self.batches(loaded.tokenizer, self.batch_size)):
                    seen += len(ids)
                    missing = [row for row, i in enumerate(ids) if i not in done]
                    if number % self.workers != self.worker or not missing:
                        continue
                    with statistics.batch(tokens, mask):
                        rows, losses = project(tokens.to(self.device), mask.to(self.device))
                        statistics.add(losses[missing], mask[missing])
                    pending.append(([ids[row] for row in missing], rows[missing]))
                    if len(pending) >= self.save_interval:
                        hand_over()
                    shown: dict[str, Any] = {"loss": statistics.last, "tokens/s": statistics.rate}
                    progress.update(len(missing), **shown)
            finally:  # Ctrl-C included: what is computed is kept
                hand_over()
                store.flush()
        return seen

    def _own(self, ids: Iterable[int]) -> int:
        """How many of these samples are this worker's."""
        return sum(i // self.batch_size % self.workers == self.worker for i in ids)

    def _passes(self, projector: GradientProjector) -> Any:
        def eager(tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
            losses = projector.losses(tokens, mask)
            losses.sum().backward()
            return projector.collect(), losses.detach()

        if not self.cuda_graph:
            return eager
        from sparseopt.projection.graph import GraphedProjection

        graphed = GraphedProjection(projector, self.batch_size, self.data.block_size)

        def replayed(tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
            return graphed(tokens, mask) if graphed.fits(tokens) else eager(tokens, mask)

        return replayed

    def _statistics_file(self, folder: Path) -> Path:
        return folder / (STATISTICS if self.workers == 1 else f"projection_stats_{self.worker}.json")


def _keep_config(folder: Path, config: dict[str, Any]) -> None:
    """Writes run_config.json, or compares: rows of other samples or another model must not come into one store.

    Raises:
        ValueError: the folder's run had other settings (the first is named).
    """
    path, given = folder / "run_config.json", json.loads(json.dumps(config))
    with FileLock(folder / ".run_config.lock"):
        if not path.is_file():
            atomic_write(path, json.dumps(given, indent=2))
            return
        kept = json.loads(path.read_text())
    # How many samples are wanted may grow from run to run: they are the first ones of the same order.
    for config_ in (kept, given):
        config_.get("data", {}).pop("max_samples", None)
    for section in {**kept, **given}:
        if kept.get(section) != given.get(section):
            raise ValueError(
                f"'{folder}' holds a run with other settings: {section} is {kept.get(section)} there, {given.get(section)} here."
            )


# ---- exact gradients -------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class FullRun(Run):
    """Exact gradients of the first ``data.max_samples`` samples, for ``plot-error``.

    Attributes:
        train_dtype: of the weights while gradients are computed; gradients are stored in fp32.
        output_dir: ``fullgrads_seed_{seed}_arch_{architecture}_dtype_{train_dtype}`` is made in it.
    """

    train_dtype: str = "bfloat16"
    output_dir: Path = Path("Results")

    def execute(self) -> dict[str, Any]:
        """Runs, or goes on; returns what was written.

        Raises:
            ValueError: no positive ``max_samples``, or a folder of other gradients.
            OSError: the disk has too little room.
        """
        refuse_several("full-grads", "start it without a launcher")
        if self.data.max_samples is None or self.data.max_samples < 1:
            raise ValueError(
                "full gradients take 4 bytes a parameter and sample: say with max_samples how many you want."
            )
        loaded = self.load()
        model = loaded.model.to(getattr(torch, self.train_dtype))
        samples = list(self.batches(loaded.tokenizer, 1))
        folder = self.output_dir / full_gradients.folder_name(self.data.seed, loaded.name, self.train_dtype)
        written = full_gradients.write_full_gradients(
            model,
            (
                {"input_ids": tokens.to(self.device), "attention_mask": mask.to(self.device)}
                for _, tokens, mask in samples
            ),
            folder,
            ids=[ids[0] for ids, _, _ in samples],
            loss_fn=_exact_loss,
            metadata={**self.described(loaded), "train_dtype": self.train_dtype},
        )
        parameters = sum(p.numel() for p in model.parameters())
        return {"output_dir": str(folder), "written": written, "samples": len(samples), "total_param_dim": parameters}


def _exact_loss(model: Any, sample: Mapping[str, Tensor]) -> Tensor:
    """The loss that projections are of, by the model's own forward: the head trains here."""
    ids, mask = sample["input_ids"], sample["attention_mask"]
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    targets = ids.masked_fill(mask == 0, -100)[:, 1:]
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
