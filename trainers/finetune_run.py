"""One run of :func:`sparseopt.sparse_finetune`, from its settings to its folder."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import disable_progress_bars
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.utils import logging as transformers_logging

from sparseopt._files import atomic_write
from sparseopt.masks.maskset import MaskSet
from sparseopt.models import sanitize_name
from sparseopt.optim.dynamic.policy import Plan
from sparseopt.progress import announce_device
from sparseopt.trainers import finetune_data, finetune_model, processes
from sparseopt.trainers.attachment import sparse_optimizer
from sparseopt.trainers.bookkeeping import tracking, versions
from sparseopt.trainers.callbacks import InterruptGuard, MetricsFile, StepTimer, TrainProgress
from sparseopt.trainers.finetune_callbacks import HISTORY, EvaluationProgress, MaskHistory, TimedSparsity
from sparseopt.trainers.finetune_plot import plot_run
from sparseopt.trainers.finetune_settings import FinetuneSettings, check_schedule, is_static, pruning_name
from sparseopt.trainers.policy import save_folder
from sparseopt.trainers.run import say
from sparseopt.trainers.run_folder import RunFolder

__all__ = ["MASKS", "PICTURE", "FinetuneRun"]

MASKS, PICTURE, RESULTS = "masks.safetensors", "finetune.png", "results.json"


class FinetuneFolder(RunFolder):
    """A folder that becomes a model folder: its config.json is the model's."""

    RECORD = "finetune.json"
    REPORT = RESULTS
    LEFTOVERS = ("before.json", "data.json", "metrics.jsonl", "timing_info.json", HISTORY, MASKS, PICTURE)
    LEFTOVER_FOLDERS = ()


class FinetuneRun:
    """Everything between the settings and the saved model.

    Attributes:
        settings: what was asked for.
        folder: the output folder.
    """

    def __init__(self, settings: FinetuneSettings) -> None:
        self.settings = settings
        processes.refuse_several(
            "sparse_finetune", "for several GPUs use the callback DynamicSparsity in your own script"
        )
        path = Path(settings.output_dir)
        self.folder = FinetuneFolder(path, settings.record())
        foreign = [name for name in ("config.json", "model.safetensors") if (path / name).exists()]
        if foreign and not self.folder.record.is_file():
            raise ValueError(f"{str(path)!r} holds files that no run made ({foreign[0]}): choose another --output_dir.")

    def execute(self) -> PreTrainedModel:
        """Runs it all; returns the model."""
        try:
            return self._execute()
        except KeyboardInterrupt:
            if self.folder.record.is_file() and not (self.folder.path / RESULTS).is_file():
                say(f"Stopped: the same command with --resume continues the run in {self.folder.path}.")
            raise

    def _execute(self) -> PreTrainedModel:
        settings, path = self.settings, self.folder.path
        disable_progress_bars()
        if not sys.stderr.isatty():
            transformers_logging.disable_progress_bar()
        device = announce_device(settings.device)
        set_seed(settings.seed)
        classify = settings.task == "sequence-classification"
        source = finetune_data.open_source(
            settings.dataset, settings.dataset_split, settings.text_column, settings.task, settings.seed
        )
        labels = source.labels(settings.label_column) if classify else None
        tokenizer = finetune_model.load_tokenizer(settings)
        given = isinstance(settings.model_name, PreTrainedModel)
        dtype, autocast, said = finetune_model.precision(settings.fp16, device, given)
        model = finetune_model.load(settings, dtype, device, labels)
        say(said)
        exclude, note = finetune_model.check_layers(model, settings)
        if note:
            say(note)
        length = finetune_model.most_tokens(model, settings.max_length)
        if length < settings.max_length:
            say(f"max_length is {length}: the model reads no more.")
        pad = _pad_id(model, tokenizer)
        samples = finetune_data.sample_sets(source, settings, tokenizer, length, labels)
        say(samples.described)
        steps = self._steps(len(samples.train))
        self._begin(samples.digest)

        arguments = self._arguments(steps, device, autocast, bool(samples.held_out))
        timer, guard, progress = StepTimer(path / "timing_info.json"), InterruptGuard(), TrainProgress()
        dynamic = TimedSparsity(**{**settings.engine_options(), "exclude": exclude})
        history = MaskHistory(dynamic, path / HISTORY)
        evaluation = EvaluationProgress()
        callbacks: list[TrainerCallback] = [MetricsFile(path / "metrics.jsonl"), timer, evaluation]
        with _not_quantised(model):
            trainer = Trainer(
                model=model, args=arguments, data_collator=finetune_data.collate(pad), callbacks=callbacks,
                train_dataset=samples.train, eval_dataset=samples.held_out or None,
                compute_metrics=_accuracy if classify else None,
            )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        dropout, memory = finetune_model.Dropout(model, settings.dropout), finetune_model.checkpointing(model)
        with _training(model, settings, exclude), dropout, memory:
            dynamic.attach(trainer, unmasked="dense")
            attention = self._topk_attention(trainer)
            for callback in (progress, guard, history):  # the bar of the steps is there first
                trainer.add_callback(callback)
            evaluation.stage = "dense model"
            before = self._before(trainer)
            evaluation.stage = None
            say(self._plan(steps))
            set_seed(settings.seed)  # whether or not something was evaluated before
            project = f"{sanitize_name(_name(settings.model_name))}-sparse-finetune"
            with tracking(project, path):
                self._train(trainer, guard, progress, history)
        model.eval()
        if attention is not None:
            attention.fold(model)
        after = self._after(trainer, changed=attention is not None)
        results = {"before": before, "after": after, **self._results(trainer, dynamic, timer, samples, device)}
        self._save(model, tokenizer, trainer, dynamic, results)
        say(_summary(results))
        return model

    # ---- parts ---------------------------------------------------------------------------------------------------------
    def _steps(self, samples: int) -> int:
        settings = self.settings
        batches = math.ceil(samples / settings.batch_size)
        epoch = math.ceil(batches / settings.gradient_accumulation_steps)
        steps = settings.max_steps or epoch * settings.num_epochs
        options = settings.engine_options()
        plan = Plan(
            options["policy"], steps, options["interval"], options["fraction"], settings.sparsity_ratio,
            schedule=options["sparsity_schedule"],
        )  # fmt: skip
        check_schedule(plan)
        if not is_static(settings) and not any(map(plan.updates, range(1, steps + 1))):
            warnings.warn(
                f"masks never change: the first update would come after step {plan.interval}, the last may after "
                f"{plan.last_exchange} of {steps}; lower mask_update_interval or train longer.", stacklevel=2,
            )  # fmt: skip
        if settings.warmup_steps >= steps:
            warnings.warn(
                f"the learning rate never reaches its peak: warmup_steps={settings.warmup_steps}, but the run has {steps} steps.",
                stacklevel=2,
            )
        return steps

    def _begin(self, digest: str) -> None:
        settings, record = self.settings, self.folder.path / "data.json"
        self.folder.begin(settings.resume)
        if settings.resume:
            if record.is_file() and json.loads(record.read_text())["digest"] != digest:
                raise ValueError(f"the data are not those that the run in {str(self.folder.path)!r} began with.")
            checkpoint = self.folder.checkpoint
            say(f"Resuming the run in {self.folder.path} from {checkpoint.name if checkpoint else 'its beginning'}.")
        atomic_write(record, json.dumps({"digest": digest}))

    def _arguments(self, steps: int, device: torch.device, autocast: bool, evaluates: bool) -> TrainingArguments:
        settings = self.settings
        name = "activation" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient"
        options: dict[str, Any] = {
            f"{name}_checkpointing": settings.gradient_checkpointing,
            f"{name}_checkpointing_kwargs": {"use_reentrant": False} if settings.gradient_checkpointing else None,
        }
        if evaluates:
            options |= {
                "eval_strategy": "steps",
                "eval_steps": settings.eval_steps or max(1, steps // 10),
                "eval_on_start": self.folder.checkpoint is None,  # under the first masks
            }
        arguments = TrainingArguments(
            output_dir=str(self.folder.path), per_device_train_batch_size=settings.batch_size,
            per_device_eval_batch_size=settings.batch_size, max_steps=steps, learning_rate=settings.learning_rate,
            gradient_accumulation_steps=settings.gradient_accumulation_steps, warmup_steps=settings.warmup_steps,
            weight_decay=settings.weight_decay, lr_scheduler_type=settings.lr_scheduler_type,
            max_grad_norm=settings.max_grad_norm, logging_steps=settings.logging_steps,
            save_strategy="steps" if settings.save_steps else "no", save_steps=settings.save_steps or 1, save_total_limit=1,
            seed=settings.seed, bf16=autocast, report_to=settings.trackers, run_name=self.folder.path.name,
            remove_unused_columns=False, label_names=["labels"], disable_tqdm=True, use_cpu=device.type == "cpu",
            prediction_loss_only=settings.task == "causal-lm", dataloader_pin_memory=device.type == "cuda", **options,
        )  # fmt: skip
        arguments._n_gpu = min(1, arguments.n_gpu)  # on several GPUs transformers would copy the model to all of them
        return arguments

    def _topk_attention(self, trainer: Trainer) -> Any:
        settings = self.settings
        if not settings.use_topk_attention:
            return None
        from sparseopt.trainers.topk_attention import TopKAttention

        attention = TopKAttention(ratio=settings.topk_ratio, interval=settings.mask_update_interval)
        trainer.add_callback(attention)
        return attention

    def _before(self, trainer: Trainer) -> dict[str, float] | None:
        """Held-out figures of the dense model; a resumed run finds them."""
        path = self.folder.path / "before.json"
        if not path.is_file():
            found = _figures(trainer.evaluate()) if trainer.eval_dataset is not None else None
            atomic_write(path, json.dumps(found))
        return json.loads(path.read_text())

    def _after(self, trainer: Trainer, changed: bool) -> dict[str, float] | None:
        """Held-out figures of the trained model: those of its last step, unless it changed since."""
        if trainer.eval_dataset is None:
            return None
        step = trainer.state.global_step
        last = [entry for entry in trainer.state.log_history if entry["step"] == step and "eval_loss" in entry]
        return _figures(trainer.evaluate() if changed or not last else last[-1])

    def _plan(self, steps: int) -> str:
        settings = self.settings
        how = settings.sparsity_type if settings.sparsity_type != "unstructured" else settings.distribution
        kind = f"{settings.masks_policy}, {how}, by {pruning_name(settings.score)}"
        share = "a schedule of" if settings.sparsity_schedule is not None else f"{settings.sparsity_ratio:.1%}"
        what = "updates" if settings.target == "updates" else "weights"
        return f"Training {steps:,} steps with {share} sparse {what} ({kind})."

    def _train(self, trainer: Trainer, guard: InterruptGuard, progress: TrainProgress, history: MaskHistory) -> None:
        checkpoint = self.folder.checkpoint
        try:
            with guard:
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except BaseException as error:
            history.close(error)
            progress.close(error)
            raise
        state = trainer.state
        if guard.interrupted and state.global_step < state.max_steps:
            say(f"A checkpoint was saved after step {state.global_step} of {state.max_steps}.")
            raise KeyboardInterrupt

    def _results(
        self, trainer: Trainer, dynamic: TimedSparsity, timer: StepTimer, samples: Any, device: torch.device
    ) -> dict[str, Any]:
        engine, optimizer = dynamic.engine, sparse_optimizer(trainer)
        model: Any = trainer.model
        assert engine is not None
        log = trainer.state.log_history
        first = next((entry for entry in log if entry["step"] == 0 and "eval_loss" in entry), None)
        nonzero = [layer.name for layer in engine.layers if _outside(layer, engine.masks)]
        if self.settings.target == "weights" and nonzero:
            raise RuntimeError(f"inactive weights of {len(nonzero)} layers are not 0, first {nonzero[0]!r}.")
        return {
            "first_masks": None if first is None else _figures(first),
            "held_out_samples": len(samples.held_out),
            "steps": trainer.state.global_step,
            "policy": engine.plan.policy,
            "target": engine.target,
            "pattern": str(engine.pattern),
            "distribution": engine.distribution,
            "sparsity": engine.sparsity,
            "layers": len(engine.layers),
            "layer_entries": engine.masks.total_parameters,
            "active_entries": engine.masks.active_parameters,
            "total_parameters": sum(param.numel() for param in model.parameters()),
            "mask_updates": len(engine.history),
            "mask_fingerprint": engine.masks.fingerprint,
            "optimizer_state_bytes": optimizer.state_bytes(),
            "trained_entries": optimizer.active_parameters,
            **timer.summary(),
            "mask_update_seconds": dynamic.summary(),
            "versions": versions(device),
        }

    def _save(
        self, model: PreTrainedModel, tokenizer: Any, trainer: Trainer, dynamic: TimedSparsity, results: dict[str, Any]
    ) -> None:
        """Everything into a folder beside, then each file under its name; ``results.json`` is the last."""
        path, engine = self.folder.path, dynamic.engine
        assert engine is not None
        saved = path / "model.saved"
        save_folder(model, saved, tokenizer if hasattr(tokenizer, "save_pretrained") else None)
        for file in sorted(saved.iterdir()):
            os.replace(file, path / file.name)
        saved.rmdir()
        found = {key: results[key] for key in ("policy", "target", "pattern", "distribution")}
        found |= {"step": results["steps"], "base_model": _name(self.settings.model_name)}
        masks = engine.masks
        MaskSet({name: masks.packed(name) for name in masks.names}, masks.shapes, found).save(path / MASKS)
        plot_run(trainer.state.log_history, engine, results, path / PICTURE, _name(self.settings.model_name))
        atomic_write(path / RESULTS, json.dumps(results, indent=2, allow_nan=False))
        self.folder.drop_checkpoints()
        for name in ("before.json", "data.json"):
            (path / name).unlink(missing_ok=True)


# ---- small things ------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def _training(model: PreTrainedModel, settings: FinetuneSettings, exclude: list[str]) -> Iterator[None]:
    """Which parameters train at all: under ``target="updates"`` the sparse layers, and a classifier's head."""
    if settings.target != "updates":
        yield
        return
    from sparseopt.optim.dynamic.layers import find_layers

    kept = {layer.name for layer in find_layers(model, exclude)}
    if settings.task == "sequence-classification":
        kept |= finetune_model.task_head(model)
    frozen = [param for name, param in model.named_parameters() if name not in kept and param.requires_grad]
    for param in frozen:
        param.requires_grad_(False)
    try:
        yield
    finally:
        for param in frozen:
            param.requires_grad_(True)


@contextlib.contextmanager
def _not_quantised(model: Any) -> Iterator[None]:
    """transformers refuses to train a model with quantised weights, whatever else of it trains."""
    marked = getattr(model, "is_quantized", False)
    if marked:
        model.is_quantized = False
    try:
        yield
    finally:
        if marked:
            model.is_quantized = True


def _outside(layer: Any, masks: Any) -> bool:
    return bool(layer.param.detach().masked_fill(masks[layer.name].to(layer.param.device), 0).any())


def _pad_id(model: PreTrainedModel, tokenizer: Any) -> int:
    pad = getattr(tokenizer, "pad_token_id", None)
    if pad is None:
        pad = getattr(model.config, "pad_token_id", None)
    pad = 0 if pad is None else int(pad)
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = pad  # classifiers look for the last token that is none
    return pad


def _accuracy(predictions: Any) -> dict[str, float]:
    scores = predictions.predictions
    scores = scores[0] if isinstance(scores, tuple) else scores
    return {"accuracy": float((np.argmax(scores, -1) == predictions.label_ids).mean())}


def _figures(entry: dict[str, float]) -> dict[str, float]:
    return {key.removeprefix("eval_"): entry[key] for key in ("eval_loss", "eval_accuracy") if key in entry}


def _name(model_name: Any) -> str:
    if isinstance(model_name, (str, os.PathLike)):
        return os.fspath(model_name)
    return getattr(model_name, "name_or_path", "") or type(model_name).__name__


def _summary(results: dict[str, Any]) -> str:
    parts = []
    if results["after"] is not None:
        stages = (("dense", "before"), ("first masks", "first_masks"), ("trained", "after"))
        for figure in results["after"]:
            found = [(name, results[key][figure]) for name, key in stages if results[key]]
            parts.append(f"Held-out {figure} " + " -> ".join(f"{value:.4g} ({name})" for name, value in found) + ".")
    zero = "are 0" if results["target"] == "weights" else "did not train"
    count = results["layer_entries"] - results["active_entries"]
    parts.append(f"{count:,} of {results['layer_entries']:,} weights in {results['layers']} layers {zero} "
                 f"({results['sparsity']:.1%}); {results['mask_updates']} mask updates.")  # fmt: skip
    return " ".join(parts)
