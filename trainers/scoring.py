"""Scores of weights from real gradients of a trainer's own loss: what :func:`sparseopt.find_masks` chooses by."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch import distributed as dist
from transformers import Trainer

from sparseopt.masks.find import matches
from sparseopt.progress import Progress
from sparseopt.trainers.processes import several

__all__ = ["gradient_scores", "scored_parameters"]


def gradient_scores(
    trainer: Trainer, batches: int, include: list[str] | None = None, exclude: list[str] | None = None
) -> dict[str, Tensor]:
    """Sums squared gradients of the trainer's loss over batches of its training data.

    Every gradient is folded into its score as backward produces it, so dense gradients never coexist. The model is left
    as it was; its data order and random state too, so that training afterwards is what it would have been.

    Args:
        trainer: a trainer that has not begun to train.
        batches: micro-batches to score, at least 1.
        include, exclude: patterns as in :func:`sparseopt.find_masks`; other parameters need no score and get none
            (their gradients are not computed).

    Of several processes every one must call it; each scores batches of its own.

    Returns:
        name -> fp32 sum of squared gradients, of the parameter's shape, on its device; over all processes, the same on each.
    """
    if batches < 1:
        raise ValueError(f"scoring needs at least 1 batch, got {batches}.")
    model: Any = trainer.model
    was_training, required = model.training, {p: p.requires_grad for p in model.parameters()}
    scored = scored_parameters(model, include, exclude)
    scores = {name: torch.zeros_like(param, dtype=torch.float32) for name, param in scored.items()}
    handles = []
    for param in model.parameters():
        param.requires_grad_(False)
    for name, param in scored.items():
        param.requires_grad_(True)

        def fold(p: Tensor, score: Tensor = scores[name]) -> None:
            assert p.grad is not None
            grad = p.grad.float()
            score.addcmul_(grad, grad)
            p.grad = None

        handles.append(param.register_post_accumulate_grad_hook(fold))
    loader = trainer.get_train_dataloader()
    tokens = getattr(trainer, "_total_train_tokens", None)
    if not hasattr(trainer, "current_gradient_accumulation_steps"):  # some losses ask; the training loop sets it anew
        trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    try:
        model.train()
        with (
            _checkpointing(trainer),
            _random_state_kept(model.device),
            Progress("score", batches, unit="batch") as progress,
        ):
            for inputs in itertools.islice(_endless(loader), batches):
                with trainer.compute_loss_context_manager():
                    loss: Any = trainer.compute_loss(model, trainer._prepare_inputs(inputs))
                loss.backward()
                progress.update(loss=loss.item())
    finally:
        for handle in handles:
            handle.remove()
        for param, needed in required.items():
            param.requires_grad_(needed)
        model.train(was_training)
        if hasattr(loader, "end"):
            loader.end()  # accelerate still takes a loader that was left half-way for the active one
        # Trainers collect metrics while they compute losses; scoring is not part of training's log.
        metrics = getattr(trainer, "_metrics", None)
        if isinstance(metrics, dict):
            for collected in metrics.values():
                collected.clear()
        if tokens is not None:
            trainer._total_train_tokens = tokens  # type: ignore[attr-defined]
        if hasattr(trainer, "_buffered_inputs"):
            trainer._buffered_inputs = None  # GRPO's completions: training generates its own
    if several():
        for score in scores.values():
            dist.all_reduce(score)
    return scores


def scored_parameters(
    model: nn.Module, include: list[str] | None = None, exclude: list[str] | None = None
) -> dict[str, nn.Parameter]:
    """The trainable parameters that include and exclude patterns leave, by name.

    Raises:
        ValueError: they leave none.
    """
    scored = {
        name: param
        for name, param in model.named_parameters()
        if param.requires_grad
        and (not include or any(matches(name, pattern) for pattern in include))
        and not any(matches(name, pattern) for pattern in exclude or [])
    }
    if not scored:
        raise ValueError(
            f"the patterns (include {include or 'all'}, exclude {exclude or 'none'}) leave no parameter to choose from."
        )
    return scored


def _endless(loader: Iterable[Any]) -> Iterator[Any]:
    """The batches of the loader, over and over."""
    while True:
        empty = True
        for batch in loader:
            empty = False
            yield batch
        if empty:
            raise ValueError("the training data gives no batch to score.")


@contextlib.contextmanager
def _checkpointing(trainer: Trainer) -> Iterator[None]:
    """Recomputes activations where training will, so that scoring fits where training fits."""
    model: Any = trainer.model
    if not trainer.args.gradient_checkpointing or getattr(model, "is_gradient_checkpointing", True):
        yield
        return
    model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        yield
    finally:
        model.gradient_checkpointing_disable()


@contextlib.contextmanager
def _random_state_kept(device: torch.device) -> Iterator[None]:
    """Python's, numpy's and torch's random states are put back: data order and dropout use them."""
    python, arrays = random.getstate(), np.random.get_state()  # noqa: NPY002 (the state that libraries share)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(arrays)  # noqa: NPY002
