"""MaskCollector: gradient masks from any transformers or TRL trainer, while it trains."""

from __future__ import annotations

import datetime
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

import sparseopt as so
from sparseopt._background import Background
from sparseopt._sharded import is_sharded
from sparseopt.masks.collect import GradientEMA, check_tolerances
from sparseopt.trainers.accumulation_files import AccumulationFiles
from sparseopt.trainers.callbacks import NextEntry, calling, come_first
from sparseopt.trainers.delta_logger import sparse_of
from sparseopt.trainers.processes import in_shards, told_by_first

__all__ = ["MaskCollector", "collector_of"]

FLUSH_SECONDS = 120.0  # how long the end of training waits for uploads; the rest stays in the spool folder
LARGE = 1 << 28  # bytes: an accumulation that should not be written at every step


class MaskCollector(NextEntry):
    """Accumulates squared gradients and makes masks of them: ``callbacks=[MaskCollector(folder, save_interval=1000)]``.

    In ``folder/grad_acc/``: ``grad_ema_step_N.safetensors``, the accumulation (4 bytes per trained entry; a resumed
    training continues from it, and ``sparseopt masks find --method gradient`` reads it), and ``grad_mask_step_N.safetensors``,
    the masks. Gradients are taken before clipping, averaged over a step's micro-batches and processes, and without the loss
    scale of fp16. Masks are computed only at the steps where they are saved, logged or uploaded. The first process of a
    distributed run collects.

    Under FSDP2 each process collects for its rows (4 bytes for each of their entries), and the first one writes the same
    files. Whatever is saved is gathered on all processes, one parameter at a time: 4 bytes per trained entry for an
    accumulation, 1 for a mask. To resume, every process must see the folder.

    ``grad_ema/rms_mean`` and ``grad_mask/active_fraction``, ``active_count``, ``total_count``, ``sparsity`` and ``step``
    (which they belong to) join the trainer's next log entry, for trackers and ``log_history`` alike; metadata goes into the
    summary of a Weights & Biases run.

    Mask files are written, and uploads begun, in another thread: training waits only where the masks before are not
    written yet. What goes wrong there is raised at the next masks, at the latest at the end of training. A file is written
    whole or not at all; masks that a killed process lacked are made when training resumes at their step.

    A trainer tells nobody when it fails: as a context manager the collector lets go of the trainer then, and of its memory.

    Attributes:
        ema: the :class:`~sparseopt.GradientEMA`, from the beginning of training on.
    """

    def __init__(
        self,
        output_dir: str | Path,
        *,
        beta: float = 0.99,
        epsilon: float = 1e-8,
        save_interval: int = 1,
        tolerance: float | Sequence[float] = 1e-5,
        save_masks: bool = True,
        mask_save_interval: int | None = None,
        upload_to_hf: bool = False,
        hf_repo_id: str | None = None,
        hf_upload_interval: int | None = None,
        hf_private: bool = True,
        bias_correction: bool = False,
        offload: bool = False,
        keep_accumulations: int = 3,
        base_model: str | None = None,
    ) -> None:
        """Nothing is written before training begins.

        Args:
            output_dir: ``grad_acc/`` is made in it.
            beta, epsilon, bias_correction, offload: see :class:`~sparseopt.GradientEMA`.
            save_interval: steps between two saved accumulations. One is saved with every checkpoint, too.
            tolerance: accumulated squared gradients above it are active. Of several the first gives the metrics and
                ``grad_mask_step_N``, the others ``grad_mask_step_N_tolerance_T``.
            save_masks: save masks (uploads are saved in any case).
            mask_save_interval: steps between two masks; default ``save_interval``.
            upload_to_hf: upload masks beside training (:class:`sparseopt.hub.Uploader`).
            hf_repo_id: repository to upload to.
            hf_upload_interval: steps between two uploads; default ``mask_save_interval``.
            hf_private: whether a repository that is made is private.
            keep_accumulations: saved accumulations to keep, the newest, beside those of checkpoints that still exist; -1:
                all.
            base_model: name for the metadata; default: what the model's configuration says.

        Raises:
            ValueError: a value out of range, or ``upload_to_hf`` without ``hf_repo_id``.
        """
        mask_interval = save_interval if mask_save_interval is None else mask_save_interval
        upload_interval = mask_interval if hf_upload_interval is None else hf_upload_interval
        intervals = {"save_interval": save_interval, "mask_save_interval": mask_interval,
                     "hf_upload_interval": upload_interval}  # fmt: skip
        for key, value in intervals.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{key} must be a whole number of steps, 1 or more, got {value!r}.")
        if keep_accumulations < -1 or keep_accumulations == 0:
            raise ValueError(f"keep_accumulations must be 1 or more, or -1 for all, got {keep_accumulations}.")
        if not 0 <= beta < 1:
            raise ValueError(f"beta must lie in [0, 1), got {beta}.")
        if not 0 <= epsilon < float("inf"):
            raise ValueError(f"epsilon must be a finite number, 0 or more, got {epsilon}.")
        if upload_to_hf and not hf_repo_id:
            raise ValueError("upload_to_hf=True needs hf_repo_id, such as 'user/model-gradient-masks'.")
        if upload_to_hf and upload_interval <= mask_interval:
            warnings.warn(
                f"hf_upload_interval ({upload_interval}) is not above mask_save_interval ({mask_interval}): every mask "
                "is uploaded; a larger interval makes fewer commits.",
                stacklevel=2,
            )
        super().__init__()
        self.folder = Path(output_dir) / "grad_acc"
        self.save_interval, self.mask_save_interval, self.hf_upload_interval = intervals.values()
        self.tolerances = check_tolerances(tolerance)
        self.save_masks, self.upload_to_hf = save_masks, upload_to_hf
        self.hf_repo_id, self.hf_private = hf_repo_id, hf_private
        self.keep_accumulations, self.base_model = keep_accumulations, base_model
        self._accumulations = AccumulationFiles(self.folder, keep_accumulations)
        self.ema: GradientEMA | None = None
        self._options: dict[str, Any] = {
            "beta": beta, "epsilon": epsilon, "bias_correction": bias_correction, "offload": offload,
        }  # fmt: skip
        self._uploader: Any = None
        self._writer: Background | None = None
        self._undo: list[Callable[[], None]] = []
        self._active = self._collected = self._warned = self._writes = False

    # ---- what the trainer calls ------------------------------------------------------------------------------------------
    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
                       model: Any = None, optimizer: Any = None, **kw: Any) -> None:  # fmt: skip
        self.close()  # an earlier training of this trainer may have ended in an error
        shards, self._writes = in_shards(args, model, "MaskCollector"), state.is_world_process_zero
        for name, param in model.named_parameters() if shards else ():
            if param.requires_grad and not is_sharded(param):
                raise ValueError(f"MaskCollector needs gradients averaged over processes: FSDP2 leaves {name!r} out.")
        sparse = sparse_of(optimizer)
        if sparse is not None and sparse.captures and args.world_size > 1 and not shards:
            raise ValueError(
                "MaskCollector needs gradients averaged over processes, which capture_gradients=True never makes: "
                "attach(..., capture_gradients=False)."
            )
        if not (self._writes or shards):
            return
        come_first(self)  # on every process that takes part: callbacks that gather must be in one order everywhere
        self._accumulations.together, self._accumulations.tidies = shards, self._writes
        self.ema = GradientEMA(model, **self._options)
        if self.base_model is None:
            self.base_model = getattr(getattr(model, "config", None), "_name_or_path", None) or None
        exact = self._accumulations.resume(self.ema, state.global_step)
        if self._writes:
            self._warn(self.ema.nbytes * (args.world_size if shards else 1), state.max_steps, self.ema.frozen)
        self._hook(args, self.ema, optimizer)
        if self.upload_to_hf and self._writes:
            from sparseopt.hub import Uploader

            assert self.hf_repo_id is not None
            self._uploader = Uploader(
                self.hf_repo_id, private=self.hf_private, spool_dir=self.folder / "spool", base_model=self.base_model,
                say=_say,
            )  # fmt: skip
        self._writer = Background("sparseopt-masks") if self._writes else None
        self._active, self._collected, self._warned = True, False, False
        step = state.global_step
        missing = not all(path.is_file() for path in self._mask_files(step))
        if exact and self._masks_due(step) and (told_by_first(missing) if shards else missing):
            self._make_masks(args, self.ema, step)  # the checkpoint was complete before the masks were

    def _warn(self, written: int, max_steps: int, frozen: list[str]) -> None:
        """Of what a user may not expect: bytes of an accumulation, no masks, parameters without any."""
        if self.save_interval == 1 and written >= LARGE:
            warnings.warn(f"save_interval=1 writes {written / 2**30:.1f} GiB of accumulation at every step.",
                          stacklevel=3)  # fmt: skip
        if max_steps < self.mask_save_interval:
            warnings.warn(f"training ends after {max_steps} steps, before the first mask: mask_save_interval is "
                          f"{self.mask_save_interval}.", stacklevel=3)  # fmt: skip
        if frozen:
            _say(f"{len(frozen)} parameters are frozen (such as {frozen[0]}): inactive in every mask.")

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        self._collected = False

    def on_pre_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
                              optimizer: Any = None, **kw: Any) -> None:  # fmt: skip
        self._collect(optimizer)  # where nobody clipped dense gradients

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        step, ema = state.global_step, self.ema
        if not self._active or ema is None:
            return
        ema.discard()  # what the optimizer showed within its step (shards in the host's memory) was in .grad before it
        save = step % self.save_interval == 0
        masks = self._masks_due(step)
        if not (save or masks) or not ema.count:
            return
        rms = ema.rms_mean()
        if self._writes:
            self._values = {**self._values, "grad_ema/rms_mean": rms}
            _say(f"Step {step} | EMA RMS Mean: {rms:.4g}")
        if self._writes and rms != rms and not self._warned:
            self._warned = True
            warnings.warn(
                f"the accumulated gradients hold NaN at step {step}: those entries stay inactive.", stacklevel=2
            )
        if masks:
            self._make_masks(args, ema, step)
        if save:
            self._save(args, ema, step)

    def _save(self, args: TrainingArguments, ema: GradientEMA, step: int) -> None:
        self._accumulations.save(ema, step, self.base_model, checkpoints=Path(args.output_dir or "."))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """A checkpoint was written: what continues from it needs the accumulation of its step."""
        step, ema = state.global_step, self.ema
        if self._active and ema is not None and ema.count and not self._accumulations.exists(step):
            self._save(args, ema, step)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        try:
            if self._writer is not None:
                self._writer.flush()
            if self._uploader is not None:
                self._uploader.flush(FLUSH_SECONDS)
        finally:
            self.close()

    # ---- gradients -------------------------------------------------------------------------------------------------------
    def _hook(self, args: TrainingArguments, ema: GradientEMA, optimizer: Any) -> None:
        """Callbacks come after clipping: dense gradients are read when the trainer asks accelerate to clip them.

        A SparseAdamW clips within its step; what it captures it shows before dropping it.
        """
        sparse = sparse_of(optimizer)
        if sparse is not None:
            sparse.observe_gradients(ema.take)
            self._undo.append(lambda: sparse.observe_gradients(None))
            return
        trainer = calling(Trainer)
        if trainer is None:
            if args.max_grad_norm > 0:
                raise ValueError(
                    "MaskCollector must be called by a transformers.Trainer, else it sees clipped gradients."
                )
            return
        accelerator: Any = trainer.accelerator
        clip, own = accelerator.clip_grad_norm_, vars(accelerator).get("clip_grad_norm_")

        def collect_and_clip(*arguments: Any, **options: Any) -> Any:
            self._collect(optimizer)
            return clip(*arguments, **options)

        def undo() -> None:
            if own is None:
                del accelerator.clip_grad_norm_
            else:
                accelerator.clip_grad_norm_ = own

        accelerator.clip_grad_norm_ = collect_and_clip
        self._undo.append(undo)

    def _collect(self, optimizer: Any) -> None:
        if not self._active or self._collected or self.ema is None:
            return
        self._collected = True
        scaler: Any = getattr(optimizer, "scaler", None)  # accelerate's wrapper; it unscales when it clips, or steps
        scaling = scaler is not None and scaler.is_enabled()
        self.ema.update(scaler._scale if scaling else None)

    # ---- masks -----------------------------------------------------------------------------------------------------------
    def _uploads_at(self, step: int) -> bool:
        return self.upload_to_hf and step % self.hf_upload_interval == 0

    def _masks_due(self, step: int) -> bool:
        return self._uploads_at(step) or step % self.mask_save_interval == 0

    def _mask_files(self, step: int) -> list[Path]:
        """The files of a step, in the order of the tolerances."""
        first = self.folder / f"grad_mask_step_{step}.safetensors"
        if not self.save_masks:
            return [first] if self._uploads_at(step) else []
        return [first, *(first.with_stem(f"{first.stem}_tolerance_{limit:g}") for limit in self.tolerances[1:])]

    def _make_masks(self, args: TrainingArguments, ema: GradientEMA, step: int) -> None:
        stamp = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        collected = ema.masks(self.tolerances)
        if not self._writes:
            return
        found = [masks.with_metadata(step=step, timestamp=stamp, base_model=self.base_model) for masks in collected]
        first = found[0]
        self._values |= {**_metrics(first, "grad_mask"), "grad_mask/step": step}
        for limit, masks in zip(self.tolerances[1:], found[1:], strict=True):
            self._values |= _metrics(masks, f"grad_mask/tolerance_{limit:g}")
        _say(f"Step {step} | Active Fraction: {first.density:.4f} | Sparsity: {first.sparsity:.4f}")
        _summarize(args, first)
        files = self._mask_files(step)
        if files and self._writer is not None:
            uploader = self._uploader if self._uploads_at(step) else None
            self._writer.submit(_write, files, found[: len(files)], step, uploader)

    # ---- ending ----------------------------------------------------------------------------------------------------------
    def close(self) -> None:
        """Lets go of the trainer, waits for masks that are being written and raises their error; uploads that are not done
        stay in ``grad_acc/spool``. ``ema`` stays."""
        self._active, self._values = False, {}
        while self._undo:
            self._undo.pop()()
        writer, self._writer = self._writer, None
        uploader, self._uploader = self._uploader, None
        try:
            if writer is not None:
                writer.close()
        finally:
            if uploader is not None:
                uploader.close()

    def __enter__(self) -> MaskCollector:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.close()
        finally:
            self.ema = None


def collector_of(config: dict[str, dict[str, Any]], folder: Path, way: str) -> MaskCollector | None:
    """The collector that the section ``grad_acc`` asks for; None if it is not enabled.

    Raises:
        ValueError: see :class:`MaskCollector`; or the run trains an adapter.
    """
    settings = dict(config["grad_acc"])
    if not settings.pop("enabled"):
        return None
    if way == "lora":
        raise ValueError("grad_acc: a LoRA run has no gradients of the model's weights to collect.")
    try:
        return MaskCollector(folder, **settings, base_model=config["model"]["name"])
    except ValueError as error:
        raise ValueError(f"grad_acc: {error}") from None


def _write(files: list[Path], found: list[so.MaskSet], step: int, uploader: Any) -> None:
    """In the writer's thread."""
    for path, masks in zip(files, found, strict=True):
        masks.save(path, compress=True)
        if path is files[0]:
            _say(f"Saved gradient masks to {path}")
    if uploader is not None:
        uploader.submit(step, files[0], found[0].metadata)


def _metrics(masks: so.MaskSet, prefix: str) -> dict[str, float | int]:
    values = {"active_fraction": masks.density, "active_count": masks.active_parameters,
              "total_count": masks.total_parameters, "sparsity": masks.sparsity}  # fmt: skip
    return {f"{prefix}/{key}": value for key, value in values.items()}


def _summarize(args: TrainingArguments, masks: so.MaskSet) -> None:
    """Puts the metadata of the newest masks into the summary of the W&B run that reports this training."""
    wandb: Any = sys.modules.get("wandb")  # its own callback imported it
    if "wandb" in (args.report_to or []) and wandb is not None and wandb.run is not None:
        wandb.run.summary.update({f"grad_mask/metadata/{key}": value for key, value in masks.metadata.items()})


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
