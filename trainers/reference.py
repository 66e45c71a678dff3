"""A reference model that costs nothing: the policy itself, with its active entries swapped back while it is asked.

DPO, and GRPO with beta > 0, compare the policy with the model it started from. Under a mask the two differ in the active
entries only, and :meth:`sparseopt.SparseAdamW.base_weights` has their old values: the reference's log-probabilities come
from the policy's own weights, equal to those of a second copy to the last bit, and a model's worth of memory is free.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from sparseopt.trainers.attachment import sparse_optimizer

__all__ = ["ReferenceBySwap", "reference_bytes", "share_reference"]


class ReferenceBySwap(nn.Module):
    """Stands where a GRPO trainer keeps its reference model; runs the policy with its weights before training."""

    def __init__(self, trainer: Trainer) -> None:
        super().__init__()
        self._owner = [trainer]  # in a list: the policy is not a part of this module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        trainer = self._owner[0]
        model: Any = trainer.model
        with base_policy(trainer):
            return model(*args, **kwargs)


@contextlib.contextmanager
def base_policy(trainer: Trainer) -> Iterator[None]:
    """Inside, the trainer's model has its weights from before training and is in evaluation mode."""
    model: Any = trainer.model
    training = model.training
    # Without an optimizer no step was taken: the weights are the base.
    with sparse_optimizer(trainer).base_weights() if trainer.optimizer is not None else contextlib.nullcontext():
        model.eval()
        try:
            yield
        finally:
            model.train(training)


class _KeepBase(TrainerCallback):
    """Has the optimizer keep the base values, before the first step changes them."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        with sparse_optimizer(self._trainer).base_weights():
            pass


def share_reference(trainer: Trainer, beta: float | None = None) -> None:
    """Makes a TRL trainer that :func:`sparseopt.attach` was called on use its own weights as the reference.

    A reference model that the trainer holds is dropped, which frees its memory. On one GPU or under DDP, for a
    :class:`trl.DPOTrainer` made with ``precompute_ref_log_probs=False`` and a :class:`trl.GRPOTrainer`.

    Args:
        trainer: a DPO or GRPO trainer that has not begun to train.
        beta: of GRPO. A trainer constructed with ``beta=0`` never loads a reference model; this is the beta to train
            with then. None: the trainer's own.

    Raises:
        ValueError: the trainer is of another kind or runs under FSDP, or its reference model is not bit-identical to the
            policy.
    """
    owner: Any = trainer
    model: Any = trainer.model
    if getattr(owner, "is_fsdp_enabled", False):
        raise ValueError(
            "share_reference() swaps weights of the whole model, which FSDP splits: leave it out, and TRL splits a reference "
            "model of its own; or let DPOConfig(precompute_ref_log_probs=True) measure the reference first."
        )
    held = getattr(owner, "ref_model", None)
    if isinstance(held, ReferenceBySwap):
        return
    if held is not None:
        _require_identical(model, held)
        # accelerate keeps what it prepared; nobody asks for this model again.
        owner.accelerator._models = [m for m in owner.accelerator._models if m is not held]
        del held
    if hasattr(owner, "compute_ref_log_probs") and hasattr(owner, "precompute_ref_logps"):
        _share_dpo(owner)
    elif hasattr(owner, "_get_per_token_logps_and_entropies") and hasattr(owner, "beta"):
        owner.beta = owner.beta if beta is None else beta
        owner.ref_model = ReferenceBySwap(trainer) if owner.beta else None
    else:
        raise ValueError(f"share_reference() takes TRL's DPOTrainer and GRPOTrainer, got {type(trainer).__name__}.")
    trainer.add_callback(_KeepBase(trainer))


def _share_dpo(owner: Any) -> None:
    """The reference's log-probabilities of a batch are measured before the policy's.

    The other way round the swap would come between the policy's forward and backward, whose saved weights must not be
    written to, not even with what is there already.
    """
    owner.ref_model = None
    owner.precompute_ref_logps = True  # what the loss looks for: columns of the batch
    compute_loss, reference = owner.compute_loss, owner.compute_ref_log_probs

    def with_reference(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if "ref_chosen_logps" not in inputs:
            with base_policy(owner), torch.no_grad():
                chosen, rejected = reference(model, inputs)
            inputs = {**inputs, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        return compute_loss(model, inputs, *args, **kwargs)

    owner.compute_loss = with_reference


def _require_identical(model: nn.Module, reference: nn.Module) -> None:
    ours, theirs = dict(model.named_parameters()), dict(reference.named_parameters())
    for name, value in ours.items():
        other = theirs.get(name)
        same = other is not None and other.dtype == value.dtype and torch.equal(other.to(value.device), value)
        if not same:
            raise ValueError(
                f"the trainer's reference model differs from the policy in {name!r}: it cannot be shared, since it is not "
                "what the policy started from."
            )


def reference_bytes(trainer: Trainer) -> dict[str, int]:
    """Bytes of a second copy of the model, and of the base values that stand in for it."""
    model: Any = trainer.model
    optimizer = sparse_optimizer(trainer)
    return {
        "second_model_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        "base_values_bytes": sum(a.base.nbytes for a in optimizer._arenas if a.base is not None),
    }
