"""``sparseopt train lm``: language-model training from a configuration file, booked in the registry of runs.

    register -> tokenize -> build -> train (log, evaluate, checkpoint) -> final checkpoint -> final metrics

The run's folder ``{base_dir}/{run_id}/`` holds ``config.yaml``, ``run.json``, ``log.jsonl``, ``checkpoint_{step}/`` and
``final_checkpoint/`` (:mod:`sparseopt.trainers.lm_checkpoints`).
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.utils import logging as transformers_logging

import sparseopt as so
from sparseopt._files import atomic_folder, clear_leftovers
from sparseopt.progress import announce_device
from sparseopt.runs._worker import worker_lock
from sparseopt.runs.registry import RUN_ID_VARIABLE, RunManager
from sparseopt.trainers import lm_checkpoints, lm_data, lm_model, lm_settings, processes
from sparseopt.trainers.attachment import attach
from sparseopt.trainers.bookkeeping import tracking
from sparseopt.trainers.callbacks import InterruptGuard, MetricsFile, TrainProgress
from sparseopt.trainers.lm_trainer import Flow, Layout, LmTrainer, barrier

__all__ = ["train"]

Config = dict[str, dict[str, Any]]
LOG = "log.jsonl"


def train(
    settings: Config, given: dict[str, Any], base_dir: str | os.PathLike[str] = "saved_models",
    *, resume: str | None = None,
) -> Path:  # fmt: skip
    """Trains a language model; returns the run's folder.

    In a process that a sweep started, the run is the sweep's, and goes on from its newest checkpoint if it has one.

    Args:
        settings: the sections of :data:`sparseopt.schemas.LM`.
        given: the configuration as it is registered, with keys of any kind; ``deepspeed`` is a file or a dict for it.
        base_dir: folder of the runs.
        resume: id of a run to go on with, from its newest checkpoint.

    Raises:
        KeyboardInterrupt: stopped by the user, with a checkpoint to go on from.
        FileNotFoundError: text, model, mask or checkpoint are not there.
        ValueError: settings that make no sense, or a run that cannot be gone on with.
    """
    return LmRun(settings, given, RunManager(base_dir), resume).execute()


class LmRun:
    """One run."""

    def __init__(self, settings: Config, given: dict[str, Any], manager: RunManager, resume: str | None) -> None:
        self.settings, self.given, self.manager = settings, given, manager
        processes.refuse_sharding(allowed="DeepSpeed ZeRO")
        lm_settings.check(settings)
        self.sources = lm_data.find_sources(settings["data"])
        checkpoint = settings["run"]["checkpoint"]
        self.states = None if checkpoint is None else lm_checkpoints.states_of(Path(checkpoint).expanduser())
        self.masks = self._masks()
        self.deepspeed = lm_settings.deepspeed_of(given.get("deepspeed"), settings)
        self.resume = resume
        training = settings["training"]
        self.micro, pieces = lm_settings.split_batch(training["batch_size"], training["max_gpu_batch_size"])
        self.accumulation = pieces * training["gradient_accumulation_steps"]
        self.first = processes.is_first()

    def execute(self) -> Path:
        if not sys.stderr.isatty():
            transformers_logging.disable_progress_bar()
        with self._quiet():
            device = announce_device(self.settings["training"]["device"])
        arguments = self._arguments(device)
        with contextlib.ExitStack() as stack:
            run_id = self._begun(stack)
            self.folder = self.manager.base_dir / run_id
            arguments.output_dir = str(self.folder)
            try:
                self._train(run_id, arguments)
            except KeyboardInterrupt:
                self._say(f"Stopped: sparseopt train lm --resume {run_id} --base_dir {self.manager.base_dir} goes on.")
                raise
        return self.folder

    # ---- the books -----------------------------------------------------------------------------------------------------
    def _begun(self, stack: contextlib.ExitStack) -> str:
        """The run's id, on every process. What the first one cannot begin, none does: the others would wait for it."""
        told: tuple[str, ValueError | OSError | None] = "", None
        if self.first:
            try:
                told = self._begin(stack), None
            except (ValueError, OSError) as error:
                told = "", error
        run_id, refusal = processes.told_by_first(told)
        if refusal is not None:
            raise refusal
        return run_id

    def _begin(self, stack: contextlib.ExitStack) -> str:
        """Registers the run, and books its end; only the first process does."""
        manager, swept = self.manager, os.environ.get(RUN_ID_VARIABLE)
        # The others must not look: for them it runs already.
        run_id = manager.setup_run(self.given) if self.resume is None else self._resumable(self.resume)
        folder = manager.base_dir / run_id
        # A sweep's worker holds this lock for us.
        if run_id != swept and not stack.enter_context(worker_lock(folder, 1.0)):
            raise ValueError(f"Another process works on the run {run_id}.")
        if self.resume is not None:
            manager.register_run(run_id, self.given)
        stack.enter_context(self._booked(run_id))
        clear_leftovers(folder)
        self._say(f"Run: {folder}")
        return run_id

    @contextlib.contextmanager
    def _booked(self, run_id: str) -> Iterator[None]:
        manager = self.manager
        manager.start_run(run_id)
        try:
            with manager.beating(run_id):
                yield
        except KeyboardInterrupt:
            manager.finish_run(run_id, "crashed", "Interrupted; it can be resumed.")
            raise
        except BaseException as error:
            manager.finish_run(run_id, "failed", f"{type(error).__name__}: {' '.join(str(error).split())}")
            raise
        manager.finish_run(run_id)

    def _resumable(self, run_id: str) -> str:
        run_id = self.manager.resolve(run_id)
        status = self.manager.get_run(run_id)["status"]
        if status == "finished":
            raise ValueError(f"The run {run_id} is finished; run.checkpoint goes on from its final_checkpoint.")
        if status == "running":
            raise ValueError(f"The run {run_id} is running.")
        return run_id

    # ---- the way through -----------------------------------------------------------------------------------------------
    def _train(self, run_id: str, arguments: TrainingArguments) -> None:
        settings, began = self.settings, time.monotonic()
        own = lm_checkpoints.newest(self.folder)  # a run that goes on; every process sees the same
        states = lm_checkpoints.states_of(own) if own else self.states
        if own and states and (before := lm_checkpoints.processes_of(states)) != arguments.world_size:
            raise ValueError(
                f"The run {run_id} began with {before} process{'es' * (before > 1)}, which decides what a step is, now "
                f"{arguments.world_size}: go on with as many."
            )
        tokenizer, tokenizer_name = lm_model.load_tokenizer(settings["model"])
        with self._quiet():
            data, held_out = lm_data.load_blocks(
                self.sources, settings["data"], tokenizer, settings["model"]["context_length"]
            )
        about = {"blocks": len(data), "context_length": settings["model"]["context_length"], "tokens": data.fingerprint}
        _same_data(states, about)
        set_seed(settings["training"]["seed"])
        model = lm_model.build_model(settings, tokenizer, own=tokenizer_name == settings["model"]["name"])
        count = sum(p.numel() for p in model.parameters())
        self._say(
            f"Model: {settings['model']['name']}, {count:,} weights; {lm_model.weights_of(settings)}; tokenizer: "
            f"{tokenizer_name}.\nData: {data.tokens.size:,} tokens in {len(data):,} sequences; "
            f"{len(held_out) if held_out else 0:,} held out."
        )
        guard, progress = InterruptGuard(), TrainProgress()
        # Trackers look at the environment when the trainer is made.
        with tracking(settings["tracking"]["project"] or "sparseopt-lm", self.folder):
            trainer = self._trainer(arguments, model, tokenizer, data, held_out, about, guard)
            if self.first:
                trainer.add_callback(progress)
                trainer.add_callback(MetricsFile(self.folder / LOG, ("loss", "eval_loss")))
                trainer.add_callback(_Books(self.manager, run_id))
            if states is not None:
                self._say(f"Going on from {states.parent}.")
            self._metrics(run_id, parameters=count, tokenizer=tokenizer_name)
            if not self._finished(trainer, states):
                try:
                    with guard:
                        trainer.train(resume_from_checkpoint=None if states is None else str(states))
                except BaseException as error:
                    progress.close(error)
                    raise
                if guard.interrupted and trainer.state.global_step < trainer.state.max_steps:
                    barrier()  # launchers end all processes with the one that ends first
                    raise KeyboardInterrupt
                trainer.write(self.folder / lm_checkpoints.FINAL)
        self._report(run_id, trainer.state, time.monotonic() - began)

    def _trainer(
        self, arguments: TrainingArguments, model: Any, tokenizer: Any, data: lm_data.Blocks,
        held_out: lm_data.Blocks | None, about: dict[str, Any], guard: InterruptGuard,
    ) -> LmTrainer:  # fmt: skip
        settings, checkpoints = self.settings, self.settings["checkpoints"]
        layout = Layout(self.folder, settings["training"]["save_steps"], data=about, **checkpoints)
        if held_out is None:
            arguments.eval_strategy = "no"
        trainer = LmTrainer(
            model=model, args=arguments, train_dataset=data, eval_dataset=held_out, processing_class=tokenizer,
            data_collator=default_data_collator, layout=layout, guard=guard,
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(Flow(trainer))
        biased = not settings["training"]["correct_bias"]
        if self.masks is not None or biased or settings["optimizer"]["name"] == "sparse_adamw":
            optimizer = settings["optimizer"]
            capture = optimizer["capture_gradients"]
            masks = so.MaskSet.full_like(model) if self.masks is None else self.masks
            options: dict[str, Any] = {} if capture is not False and not checkpoints["gradients"] else {
                "capture_gradients": False
            }  # fmt: skip
            attach(
                trainer, masks, master_weights=optimizer["master_weights"], unmasked=optimizer["unmasked"],
                correct_bias=not biased, **options,
            )  # fmt: skip
            if self.masks is not None:
                self._say(f"Training {masks.active_parameters:,} of {masks.total_parameters:,} weights under the mask.")
        return trainer

    def _finished(self, trainer: LmTrainer, states: Path | None) -> bool:
        """Whether a checkpoint is the end already: then it becomes the final one, with the evaluation it had."""
        if states is None:
            return False
        state = TrainerState.load_from_json(str(states / lm_checkpoints.STATE))
        steps = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1]
        if state.global_step < steps:
            return False
        if states.parent.parent != self.folder:
            raise ValueError(
                f"{str(states.parent)!r} is at step {state.global_step} and the run ends at step {steps}: raise "
                "training.num_epochs or training.max_steps."
            )
        if self.first:
            with atomic_folder(self.folder / lm_checkpoints.FINAL, replace=True) as folder:
                shutil.copytree(states.parent, folder, dirs_exist_ok=True)
        barrier()
        trainer.state = state
        return True

    def _report(self, run_id: str, state: TrainerState, seconds: float) -> None:
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        valid = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
        metrics: dict[str, Any] = {"step": state.global_step, "epoch": state.epoch, "train_seconds": round(seconds, 1)}
        if losses:
            metrics["final_train_loss"] = losses[-1]
        if valid:
            metrics |= {"final_valid_loss": valid[-1], "final_valid_perplexity": perplexity(valid[-1])}
            metrics["best_valid_loss"] = min(valid)
        self._metrics(run_id, **metrics)
        shown = [f"training loss {losses[-1]:.4f}"] if losses else []
        shown += [f"validation loss {valid[-1]:.4f}, perplexity {perplexity(valid[-1]):.2f}"] if valid else []
        self._say(f"{state.global_step} steps: {', '.join(shown)}.")

    def _metrics(self, run_id: str, **metrics: Any) -> None:
        """Adds metrics to the run; only the first process does."""
        if self.first:
            self.manager.update_metrics(run_id, metrics)

    # ---- settings ------------------------------------------------------------------------------------------------------
    def _arguments(self, device: torch.device) -> TrainingArguments:
        """transformers' arguments; starts the processes' group where there are several."""
        arguments = lm_settings.training_arguments(
            self.settings, self.manager.base_dir, device, self.micro, self.accumulation, self.deepspeed
        )
        sequences = self.micro * self.accumulation * arguments.world_size
        self._say(
            f"Batches: {sequences:,} sequences a step, {self.accumulation} micro-batch{'es' * (self.accumulation > 1)} of "
            f"{self.micro}" + (f" in each of {arguments.world_size} processes." if arguments.world_size > 1 else ".")
        )
        return arguments

    def _masks(self) -> so.MaskSet | None:
        path = self.settings["optimizer"]["mask"]
        return None if path is None else so.MaskSet.load(path)

    def _quiet(self) -> contextlib.AbstractContextManager[Any]:
        """Only the first process tells of progress."""
        return contextlib.nullcontext() if self.first else contextlib.redirect_stderr(io.StringIO())

    def _say(self, text: str) -> None:
        if self.first:
            print(text, file=sys.stderr, flush=True)


class _Books(TrainerCallback):
    """Tells the registry how far a run is, with each evaluation."""

    def __init__(self, manager: RunManager, run_id: str) -> None:
        self._manager, self._run_id = manager, run_id

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
               logs: dict[str, float] | None = None, **kw: Any) -> None:  # fmt: skip
        if logs and "eval_loss" in logs:
            loss = logs["eval_loss"]
            metrics = {"step": state.global_step, "valid_loss": loss, "valid_perplexity": perplexity(loss)}
            self._manager.update_metrics(self._run_id, metrics)


def perplexity(loss: float) -> float:
    """e to the loss; infinite where that is too large for a number."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def _same_data(states: Path | None, about: dict[str, Any]) -> None:
    """Raises ValueError where a checkpoint's position is one in other data."""
    if states is None or not (states / "data.json").is_file():
        return
    before = json.loads((states / "data.json").read_text())
    if before != about:
        raise ValueError(
            f"{str(states.parent)!r} was trained on other data ({before['blocks']:,} sequences of "
            f"{before['context_length']:,} tokens; here {about['blocks']:,} of {about['context_length']:,}, or other text)."
        )
