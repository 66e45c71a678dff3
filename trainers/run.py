"""What the training commands have in common: a run folder, one way through it, stopping and continuing, the outcome.

    load -> evaluate -> (find or load a mask) -> train -> check -> keep -> evaluate -> report

A method (:mod:`~sparseopt.trainers.dpo`, :mod:`~sparseopt.trainers.grpo`, :mod:`~sparseopt.trainers.sft`) supplies its
data, its TRL trainer and its evaluation. The run folder holds ``config.json``, ``mask.safetensors`` (under a mask),
``before.json``, ``metrics.jsonl``, ``timing_info.json``, ``grad_acc/`` (masks collected while training, if asked for),
``checkpoint-N/`` until training is done, ``training.json`` (its cost), the outcome (``trained_entries.safetensors``,
``adapter/`` or ``model/``), ``results.json``, ``training.png`` and ``report.md``.
"""

from __future__ import annotations

import abc
import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import disable_progress_bars
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, set_seed
from transformers.utils import logging as transformers_logging

import sparseopt as so
from sparseopt import models
from sparseopt._files import atomic_write
from sparseopt.progress import announce_device
from sparseopt.trainers import policy, processes
from sparseopt.trainers.attachment import attach, sparse_optimizer
from sparseopt.trainers.bookkeeping import cost_of, tracking, versions
from sparseopt.trainers.callbacks import InterruptGuard, MetricsFile, StepTimer, TrainProgress
from sparseopt.trainers.delta_logger import DeltaLogger, parse_schedule
from sparseopt.trainers.mask_collector import collector_of
from sparseopt.trainers.report import write_report
from sparseopt.trainers.run_folder import RunFolder

__all__ = ["Run", "say"]

Config = dict[str, dict[str, Any]]
MASK = "mask.safetensors"


class Run(abc.ABC):
    """One run of one method.

    Attributes:
        config: its settings (:mod:`sparseopt.schemas`).
        way: "sparse", "lora" or "dense".
        model, tokenizer, device: set before :meth:`load_data`.
    """

    method: ClassVar[str]
    # What is counted, and the least that makes sense; fewer would mean something else to a library further down.
    least: ClassVar[dict[str, dict[str, int]]] = {
        "data": {"n_train": 1, "n_eval": 2},
        "mask": {"batches": 1},
        "lora": {"rank": 1},
        "training": {
            "n_steps": 1, "batch_size": 1, "gradient_accumulation_steps": 1, "warmup_steps": 0, "max_length": 2,
            "logging_steps": 1, "save_steps": 0, "keep_checkpoints": -1,
        },
        "evaluation": {"batch_size": 1, "n_generate": 0, "max_new_tokens": 0},
    }  # fmt: skip

    def __init__(self, config: Config) -> None:
        self.config = config
        _check(config, self.least)
        self.way = policy.way_of(config)
        self.slug = models.sanitize_name(config["model"]["name"])
        self.folder = RunFolder(Path(config["output"]["dir"] or f"checkpoints_{self.slug}_{self.method}"), config)
        self.collector = collector_of(config, self.folder.path, self.way)
        self.model: PreTrainedModel
        self.tokenizer: Any
        self.device: torch.device

    # ---- what a method supplies ----------------------------------------------------------------------------------------
    @abc.abstractmethod
    def load_data(self) -> str:
        """Loads what to train on and what is held out; returns a sentence about both."""

    @abc.abstractmethod
    def arguments(self) -> Any:
        """TRL's arguments; wrong settings show here, before anything long begins."""

    @abc.abstractmethod
    def make_trainer(self, arguments: Any, **options: Any) -> Trainer:
        """The TRL trainer; ``options`` are processing_class, callbacks and, for LoRA, peft_config."""

    @abc.abstractmethod
    def evaluate(self, model: Any, when: str) -> dict[str, Any]:
        """Held-out figures, JSON-able; keys that begin with ``_`` are kept for later, not reported."""

    @abc.abstractmethod
    def summary(self, before: dict[str, Any], after: dict[str, Any]) -> str:
        """The outcome in a sentence."""

    def prepare(self, trainer: Trainer) -> None:  # noqa: B027 (most methods need nothing)
        """Changes the trainer before masks are found and attached."""

    # ---- the way through -----------------------------------------------------------------------------------------------
    def execute(self) -> Path:
        """Runs it all; returns the run folder.

        Raises:
            KeyboardInterrupt: stopped by the user; a checkpoint was saved and ``training.resume`` continues from it.
            RuntimeError: an entry outside the mask changed (never, unless something else writes to the model).
        """
        try:
            return self._execute()
        except KeyboardInterrupt:
            if self.folder.record.is_file() and not (self.folder.path / "results.json").is_file():
                say(f"Stopped: the same command with --resume --output_dir {self.folder.path} continues.")
            raise

    def _execute(self) -> Path:
        began, path, config = time.monotonic(), self.folder.path, self.config
        processes.refuse_sharding()
        if not sys.stderr.isatty():
            transformers_logging.disable_progress_bar()  # its bars of an instant would fill a log
        self.device = announce_device(processes.own_device(config["training"]["device"]))
        set_seed(config["training"]["seed"])
        schedule = self._schedule()
        self._load_model()
        resume = config["training"]["resume"]
        # A mask that the run has is not loaded again: the latest one on the Hub may be another by now.
        given = None if resume and (path / MASK).is_file() else policy.given_masks(config, self.model)
        described = self.load_data()
        arguments = self.arguments()
        say(described)
        if processes.is_first():
            self.folder.begin(resume)
        processes.wait()
        if resume:
            checkpoint = self.folder.checkpoint
            where = "its evaluation" if self.folder.trained else checkpoint.name if checkpoint else "its beginning"
            say(f"Resuming the run in {path} from {where}.")

        # Every process evaluates, so that none waits for another; the first one writes.
        before = self._before(path / "before.json")
        if self.folder.trained:
            self.model = policy.restore_outcome(self.way, self.model, path)
        else:
            with tracking(self.project, path):
                self._train(arguments, given, schedule)
        after = self.evaluate(self.model, "after")
        processes.wait()
        if not processes.is_first():
            return path
        if config["output"]["save_model"]:
            policy.save_folder(self.model, path / ("adapter" if self.way == "lora" else "model"), self.tokenizer)
        results = {
            "method": self.method,
            "way": self.way,
            "before": _reported(before),
            "after": _reported(after),
            **json.loads((path / "training.json").read_text()),
            "seconds": round(time.monotonic() - began, 1),
            "versions": versions(self.device),
        }
        atomic_write(path / "results.json", json.dumps(results, indent=2, allow_nan=False))
        write_report(path, config, results)
        self.folder.drop_checkpoints(config["training"]["keep_checkpoints"])
        if self.way == "dense" and not config["output"]["save_model"]:
            self.folder.drop_outcome()
        say(self.summary(before, after))
        return path

    def _load_model(self) -> None:
        settings = self.config["model"]
        self.tokenizer = models.load_tokenizer(settings["name"], revision=settings["revision"])
        self.model = policy.load_policy(self.config, self.device)

    def untrained(self, device: torch.device) -> Trainer:
        """The trainer as it is before training, for scores from gradients of this run's loss on its data."""
        self.device = device
        self.way = "sparse"  # as if to score for a mask: no pass over all data for a reference that is the model itself
        self._load_model()
        self.load_data()
        trainer = self.make_trainer(self.arguments(), processing_class=self.tokenizer)
        self.prepare(trainer)
        return trainer

    def _before(self, path: Path) -> dict[str, Any]:
        """The evaluation before training; a resumed run finds it, since the model is another by then."""
        kept = path.is_file()
        processes.wait()  # all of them evaluate, or none
        if not kept:
            found = json.dumps(self.evaluate(self.model, "before"))
            if processes.is_first():
                atomic_write(path, found)
            processes.wait()
        self.before: dict[str, Any] = json.loads(path.read_text())
        return self.before

    # ---- training ------------------------------------------------------------------------------------------------------
    def _train(self, arguments: Any, given: so.MaskSet | None, schedule: list[int]) -> None:
        path, settings = self.folder.path, self.config["optimizer"]
        timer, guard, progress = StepTimer(path / "timing_info.json"), InterruptGuard(), TrainProgress()
        logger = self._delta_logger(schedule) if schedule else None
        first = processes.is_first()
        callbacks: list[TrainerCallback] = [MetricsFile(path / "metrics.jsonl"), timer] if first else []
        callbacks += [callback for callback in (logger, self.collector) if callback is not None]
        # Tokenisation bars flash by; the long parts (reference, scoring, training, evaluation) have bars of their own.
        disable_progress_bars()
        lora = {"peft_config": policy.lora_config(self.config)} if self.way == "lora" else {}
        trainer = self.make_trainer(arguments, processing_class=self.tokenizer, callbacks=callbacks, **lora)
        trainer.remove_callback(PrinterCallback)
        # With every checkpoint TRL writes a model card into the run folder, which has a report instead.
        trainer.create_model_card = lambda *args, **kwargs: None  # type: ignore[method-assign]
        self.prepare(trainer)
        masks = self._masks(trainer, given) if self.way == "sparse" else None
        frozen = {}
        if masks is not None:
            frozen = policy.frozen_digest(self.model, masks)
            say(
                f"Training {masks.active_parameters:,} of {masks.total_parameters:,} weights; the others stay as they are."
            )
            # Masks are collected from gradients averaged over the processes, which capturing never makes.
            averaged = self.collector is not None and arguments.world_size > 1
            attach(
                trainer, masks, capture_gradients=settings["capture_gradients"] and not averaged,
                master_weights=settings["master_weights"], structured="auto" if settings["structured"] else False,
            )  # fmt: skip
        else:
            self._say_dense(trainer)
        for callback in (guard, progress) if first else (guard,):
            trainer.add_callback(callback)
        try:
            # As a context the logger tells of an error of its last record, whatever else ended training.
            with guard, logger or contextlib.nullcontext(), self.collector or contextlib.nullcontext():
                trainer.train(resume_from_checkpoint=str(self.folder.checkpoint) if self.folder.checkpoint else None)
        except BaseException as error:
            progress.close(error)
            raise
        state = trainer.state
        if guard.interrupted and state.global_step < state.max_steps:
            processes.wait()  # for the first one, which writes: launchers end all processes with the one that ends first
            say(f"A checkpoint was saved after step {state.global_step} of {state.max_steps}.")
            raise KeyboardInterrupt
        changed = [] if masks is None else _changed(frozen, policy.frozen_digest(self.model, masks))
        if changed:
            raise RuntimeError(f"entries outside the mask changed in {len(changed)} parameters, first {changed[0]!r}.")
        delta = sparse_optimizer(trainer).export_delta() if masks is not None else None
        self.model = trainer.model  # type: ignore[assignment]
        if not first:
            return
        policy.keep_outcome(self.way, trainer.model, delta, path)
        cost = {**cost_of(trainer, masks), "train_seconds": round(state.log_history[-1]["train_runtime"], 1)}
        if masks is not None:
            cost["mask_fingerprint"] = masks.fingerprint
            cost["mask"] = {k: v for k, v in masks.metadata.items() if isinstance(v, (str, int, float))}
        # Last: where this file is, training is done.
        atomic_write(path / "training.json", json.dumps({**cost, **timer.summary()}, indent=2))
        if guard.interrupted:  # during the last step
            raise KeyboardInterrupt

    def _masks(self, trainer: Trainer, given: so.MaskSet | None) -> so.MaskSet:
        """The masks of this run: what its folder has already, was given, or is found. They cover every parameter."""
        kept = self.folder.path / MASK
        found = kept.is_file()
        processes.wait()
        if found:
            return so.MaskSet.load(kept)
        masks = given if given is not None else policy.find_masks(self.config, trainer, self.model)
        if processes.is_first():
            masks.save(kept)
        processes.wait()
        return masks if processes.is_first() else so.MaskSet.load(kept)

    def _say_dense(self, trainer: Trainer) -> None:
        model: Any = trainer.model
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        what = f"a LoRA adapter of {trained:,} weights" if self.way == "lora" else f"all {trained:,} weights"
        say(f"Training {what}.")

    def _schedule(self) -> list[int]:
        """Steps of the delta log; empty: no log."""
        text = self.config["delta_log"]["schedule"]
        if text is None:
            text = {"sft": "dpo"}.get(self.method, self.method) if self.way == "dense" else "none"
        if text == "none":
            return []
        if self.way == "lora":
            raise ValueError("delta_log.schedule: a LoRA run changes no weight of the model, there is no delta to log.")
        return list(parse_schedule(text, self.config["training"]["n_steps"]))

    def _delta_logger(self, schedule: list[int]) -> DeltaLogger:
        settings, model = self.config["delta_log"], self.config["model"]
        save_base: dict[str, Any] = {"auto": "auto", "always": True, "never": False}
        ending = "" if self.method == "dpo" else f"_{self.method}"
        return DeltaLogger(
            settings["dir"] or f"delta_logs_{self.slug}{ending}",
            schedule,
            save_base[settings["save_base"]],
            # A checkpoint is a base of its own, which the model's name does not lead to.
            name=None if model["checkpoint"] else model["name"],
            revision=model["revision"],
            restart=self.config["training"]["resume"],
        )

    # ---- for the methods -----------------------------------------------------------------------------------------------
    def common_arguments(self) -> dict[str, Any]:
        """Arguments of every TRL trainer."""
        settings, optimizer, tracking = self.config["training"], self.config["optimizer"], self.config["tracking"]
        return {
            "output_dir": str(self.folder.path),
            "per_device_train_batch_size": settings["batch_size"],
            "gradient_accumulation_steps": settings["gradient_accumulation_steps"],
            "max_steps": settings["n_steps"],
            "learning_rate": optimizer["learning_rate"],
            "adam_beta1": optimizer["betas"][0],
            "adam_beta2": optimizer["betas"][1],
            "adam_epsilon": optimizer["eps"],
            "weight_decay": optimizer["weight_decay"],
            "max_grad_norm": optimizer["max_grad_norm"],
            "optim": "adamw_torch_fused",
            "lr_scheduler_type": settings["lr_scheduler"],
            "warmup_steps": settings["warmup_steps"],
            "logging_steps": settings["logging_steps"],
            "save_strategy": "steps" if settings["save_steps"] else "no",
            "save_steps": settings["save_steps"] or 1,
            "save_total_limit": None if settings["keep_checkpoints"] < 0 else max(1, settings["keep_checkpoints"]),
            "seed": settings["seed"],
            "gradient_checkpointing": self.config["model"]["gradient_checkpointing"],
            "bf16": False,
            "fp16": False,
            "report_to": tracking["report_to"] or [],
            "project": self.project,
            "run_name": tracking["run_name"] or self.folder.path.name,
            "disable_tqdm": True,
            "use_cpu": self.device.type == "cpu",
        }

    @property
    def project(self) -> str:
        """Name of the project at a tracker."""
        return self.config["tracking"]["project"] or f"{self.slug}-{self.method}-subnetwork-emergence"

    @property
    def data_seed(self) -> int:
        seed = self.config["data"]["seed"]
        return self.config["training"]["seed"] if seed is None else seed


def _check(config: Config, least: dict[str, dict[str, int]]) -> None:
    """Finds wrong values before anything is loaded."""
    for section, keys in least.items():
        for key, low in keys.items():
            value = config[section].get(key)
            if value is not None and value < low:
                raise ValueError(f"{section}.{key} must be at least {low}, got {value}.")
    if not 0 <= config["mask"]["sparsity"] < 1:
        raise ValueError(f"mask.sparsity must be in [0, 1), such as 0.975, got {config['mask']['sparsity']}.")
    if len(config["optimizer"]["betas"]) != 2:
        raise ValueError(f"optimizer.betas must be two numbers, got {config['optimizer']['betas']}.")
    known = ("wandb", "trackio", "tensorboard", "none")
    for tracker in config["tracking"]["report_to"]:
        if tracker not in known:
            raise ValueError(f"tracking.report_to must name {', '.join(known)}, got {tracker!r}.")
    config["tracking"]["report_to"] = [t for t in config["tracking"]["report_to"] if t != "none"]


def _reported(result: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in result.items() if not k.startswith("_")}


def _changed(before: dict[str, str], after: dict[str, str]) -> list[str]:
    return [name for name, digest in after.items() if digest != before[name]]


def say(text: str) -> None:
    """One line on stderr, where progress goes; from the first process."""
    if not processes.is_first():
        return
    print(text, file=sys.stderr, flush=True)
