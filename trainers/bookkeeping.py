"""What a run says about itself: to trackers, and in its results (cost, versions)."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

import sparseopt as so
from sparseopt.trainers.attachment import sparse_optimizer
from sparseopt.trainers.reference import reference_bytes

__all__ = ["cost_of", "tracking", "versions"]


@contextlib.contextmanager
def tracking(project: str, folder: Path) -> Iterator[None]:
    """Tells trackers where to write, unless the user's environment does; ends the W&B run that training began."""
    wanted = {
        "WANDB_PROJECT": project,
        "WANDB_DIR": str(folder),
        "TENSORBOARD_LOGGING_DIR": str(folder / "tensorboard"),
    }
    ours = {key: value for key, value in wanted.items() if key not in os.environ}
    wandb: Any = sys.modules.get("wandb")
    theirs = wandb is not None and wandb.run is not None
    os.environ.update(ours)
    try:
        yield
    finally:
        for key in ours:
            os.environ.pop(key, None)
        wandb = sys.modules.get("wandb")
        if wandb is not None and wandb.run is not None and not theirs:
            wandb.finish()


def cost_of(trainer: Trainer, masks: so.MaskSet | None) -> dict[str, Any]:
    """What training took: weights, optimizer state, gradients."""
    model: Any = trainer.model
    total = sum(p.numel() for p in model.parameters())
    if masks is not None:
        optimizer = sparse_optimizer(trainer)
        bases = reference_bytes(trainer)
        return {
            "steps": trainer.state.global_step,
            "total_parameters": total,
            "active_parameters": masks.active_parameters,
            "frozen_entries_bit_identical": True,
            "optimizer_state_bytes": optimizer.state_bytes(),
            "gradient_bytes": optimizer.gradient_bytes(),
            "skipped_steps": optimizer.skipped_steps,
            **(bases if bases["base_values_bytes"] else {}),
        }
    trained = [p for p in model.parameters() if p.requires_grad]
    states: list[dict[str, Any]] = list(trainer.optimizer.state.values()) if trainer.optimizer is not None else []
    return {
        "steps": trainer.state.global_step,
        "total_parameters": total,
        "active_parameters": sum(p.numel() for p in trained),
        "optimizer_state_bytes": sum(v.nbytes for s in states for v in s.values() if isinstance(v, torch.Tensor)),
        "gradient_bytes": sum(p.numel() * p.element_size() for p in trained),
        "skipped_steps": 0,
    }


def versions(device: torch.device) -> dict[str, str]:
    """Versions of what ran, and the device."""
    import transformers
    import trl

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    return {
        "sparseopt": so.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "trl": trl.__version__,
        "python": sys.version.split()[0],
        "device": name,
    }
