"""The trainer of ``sparseopt train lm``: transformers' Trainer with checkpoints in our layout, gradients among them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from sparseopt._files import atomic_folder
from sparseopt.trainers import lm_checkpoints
from sparseopt.trainers.callbacks import InterruptGuard
from sparseopt.trainers.lm_checkpoints import STATES
from sparseopt.trainers.processes import told_by_first

__all__ = ["Flow", "Layout", "LmTrainer", "barrier", "shared"]

GRADIENTS, MICRO = "gradients.pt", "micro_gradients"


@dataclass(frozen=True)
class Layout:
    """What a run's folder gets.

    Attributes:
        folder: of the run.
        save_steps: steps between two checkpoints; 0: none but the final one.
        gradients, micro_gradients: whether checkpoints hold them.
        keep_last, keep_best, keep_every: as :func:`sparseopt.trainers.lm_checkpoints.retain` takes them.
        data: what tells the data apart, kept with every checkpoint.
    """

    folder: Path
    save_steps: int
    gradients: bool
    micro_gradients: bool
    keep_last: int | None
    keep_best: int | None
    keep_every: int | None
    data: dict[str, Any]


class LmTrainer(Trainer):
    """Keeps the gradients of steps that end with a checkpoint, and writes and reads checkpoints of our layout.

    Gradients are those of the whole step, all micro-batches and processes together, before clipping and, in fp16, without
    the loss scale; of frozen parameters there are none.
    """

    def __init__(self, *args: Any, layout: Layout, guard: InterruptGuard, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.layout, self.guard = layout, guard
        self.kept: dict[str, Tensor] = {}
        self.kept_step = -1  # of which step they are
        self._micro_index = 0

    # ---- gradients -----------------------------------------------------------------------------------------------------
    def saves_after(self, step: int) -> bool:
        """Whether a checkpoint follows a step: by the interval, at the end, or since training is to stop."""
        every = self.layout.save_steps
        return step >= self.state.max_steps or bool(every and step % every == 0) or self.guard.interrupted

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        step = self.state.global_step + 1
        if not self.layout.gradients or not self.saves_after(step):
            return super().training_step(model, inputs, num_items_in_batch)
        complete = self.accelerator.sync_gradients
        if self.is_deepspeed_enabled:
            with self._before_engine_step(step) if complete else contextlib.nullcontext():
                return super().training_step(model, inputs, num_items_in_batch)
        if self.layout.micro_gradients:
            loss = self._micro_step(model, inputs, num_items_in_batch)
        else:
            loss = super().training_step(model, inputs, num_items_in_batch)
        if complete:
            self._keep(step, lambda param: param.grad)
            self._micro_index = 0
        return loss

    def _keep(self, step: int, gradient: Callable[[nn.Parameter], Tensor | None]) -> None:
        self.kept = self._named(gradient)
        self.kept_step = step

    def _named(self, gradient: Callable[[nn.Parameter], Tensor | None], factor: float = 1.0) -> dict[str, Tensor]:
        """Name -> gradient on the CPU, the loss scale of fp16 taken out."""
        model: Any = self.model
        scaler = getattr(self.accelerator, "scaler", None)
        factor = factor if scaler is None else factor / scaler.get_scale()
        found = {}
        for name, param in model.named_parameters():
            grad = gradient(param)
            if grad is not None and self.args.should_save:
                grad = grad.detach().to("cpu", copy=True)
                found[name] = grad if factor == 1.0 else grad.mul_(factor)
        return found

    def _micro_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any) -> Tensor:
        """One micro-batch with its own gradient written, scaled as if it were the whole batch; sums stay bit-identical."""
        folder = self.layout.folder / f".{MICRO}"
        if self._micro_index == 0:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        params = [p for p in model.parameters() if p.requires_grad]
        before = [p.grad for p in params]
        for param in params:
            param.grad = None
        items = inputs["labels"][..., 1:].ne(-100).sum()
        loss = super().training_step(model, inputs, num_items_in_batch)
        whole = self.current_gradient_accumulation_steps if num_items_in_batch is None else num_items_in_batch / items
        torch.save(self._named(lambda p: p.grad, float(whole)), folder / f"{self._micro_index:05d}.pt")
        for param, earlier in zip(params, before, strict=True):
            if earlier is not None:
                param.grad = earlier if param.grad is None else earlier.add_(param.grad)
        self._micro_index += 1
        return loss

    @contextlib.contextmanager
    def _before_engine_step(self, step: int) -> Iterator[None]:
        """DeepSpeed steps inside backward, and has its gradients in parts: they are gathered in between."""
        from deepspeed.utils import safe_get_full_grad

        engine: Any = self.model_wrapped
        original = engine.step

        def stepping(*args: Any, **kwargs: Any) -> Any:
            self._keep(step, safe_get_full_grad)
            return original(*args, **kwargs)

        engine.step = stepping
        try:
            yield
        finally:
            del engine.step

    # ---- checkpoints ---------------------------------------------------------------------------------------------------
    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        layout = self.layout
        self.write(layout.folder / f"checkpoint_{self.state.global_step}")
        if self.args.should_save:
            losses = {int(e["step"]): e["eval_loss"] for e in self.state.log_history if "eval_loss" in e}
            lm_checkpoints.retain(layout.folder, losses, layout.keep_last, layout.keep_best, layout.keep_every)

    def write(self, target: Path) -> None:
        """Writes a checkpoint of this moment; every process calls it."""
        self.store_flos()
        with shared(target, self.args.should_save) as folder:
            states = folder / STATES
            if self.args.should_save:
                states.mkdir()
            barrier()
            self._save_weights(folder)
            self._save_optimizer_and_scheduler(str(states))
            self._save_scaler(str(states))
            self._save_rng_state(str(states))
            if self.args.should_save:
                (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle that only this release reads
                self._write_gradients(folder)
                (states / "data.json").write_text(json.dumps(self.layout.data))
                self.state.save_to_json(str(states / TRAINER_STATE_NAME))

    def _save_weights(self, folder: Path) -> None:
        if not self.is_deepspeed_enabled:
            self.save_model(str(folder), _internal_call=True)
            return
        # The engine's copies of tied weights share no storage any more: each is stored once all the same.
        state = self.accelerator.get_state_dict(self.model_wrapped)
        tied = self._tied()
        self._save(str(folder), {name: value for name, value in state.items() if name not in tied})

    def _tied(self) -> set[str]:
        """Second names of parameters."""
        model: Any = self.model
        names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        return names - {name for name, _ in model.named_parameters()}

    def _write_gradients(self, folder: Path) -> None:
        if self.kept_step != self.state.global_step:
            return
        torch.save(self.kept, folder / GRADIENTS)
        micro = self.layout.folder / f".{MICRO}"
        if micro.is_dir():
            shutil.copytree(micro, folder / MICRO)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(str(Path(resume_from_checkpoint).parent), model)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """A checkpoint stores tied weights once; anything else that is missing or too much is an error."""
        tied = self._tied()
        wrong = [*(name for name in load_result.missing_keys if name not in tied), *load_result.unexpected_keys]
        if wrong:
            raise ValueError(
                f"The checkpoint is one of another architecture: {len(wrong)} weights differ, first {wrong[0]!r}."
            )


class Flow(TrainerCallback):
    """When to log, save and stop, where it differs from transformers' own flow. It must come after that.

    Args:
        save_steps: steps between two checkpoints; 0: none.
        guard: after the first signal the next step whose gradients are kept is the last.
    """

    def __init__(self, trainer: LmTrainer) -> None:
        self._trainer = trainer

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        trainer, step = self._trainer, state.global_step
        trainer.guard.agree(args.device)
        every = trainer.layout.save_steps
        # Of the last step there is the final checkpoint, and one of its own only where the interval says so.
        control.should_save = bool(every and step % every == 0)
        if trainer.guard.interrupted and step < state.max_steps:
            ready = not trainer.layout.gradients or trainer.kept_step == step
            control.should_save |= ready
            control.should_training_stop = ready
        # Logged losses are means since the last entry: a run that goes on from here logs the same ones.
        control.should_log |= control.should_save or step >= state.max_steps


# ---- several processes -----------------------------------------------------------------------------------------------
def barrier() -> None:
    """Waits for the other processes, where there are any."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()


@contextlib.contextmanager
def shared(target: Path, writes: bool) -> Iterator[Path]:
    """A folder that appears under its name when all processes have written into it; one that is there gives way."""
    if not writes:
        path = Path(told_by_first(""))
        yield path
        barrier()
        barrier()
        return
    with atomic_folder(target, replace=True) as folder:
        told_by_first(os.fspath(folder))
        yield folder
        barrier()
    barrier()
