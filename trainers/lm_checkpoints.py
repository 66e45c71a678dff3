"""Checkpoints of ``sparseopt train lm``: which there are, which is the newest, which are kept.

    saved_models/{run_id}/checkpoint_{step}/
        model.safetensors, config.json, tokenizer    what from_pretrained loads
        gradients.pt                                 {parameter name: gradient of the whole step, before clipping}
        micro_gradients/{i:05d}.pt                   those of its micro-batches, on request
        accelerator_states/                          optimizer, scheduler, RNG, trainer state, data position

A checkpoint appears under its name when it is whole.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

__all__ = ["FINAL", "STATES", "newest", "processes_of", "retain", "states_of", "steps_of"]

FINAL, STATES, STATE = "final_checkpoint", "accelerator_states", "trainer_state.json"


def steps_of(folder: Path) -> list[int]:
    """Steps of the checkpoints in a run's folder, ascending."""
    found = (re.fullmatch(r"checkpoint_(\d+)", path.name) for path in folder.iterdir()) if folder.is_dir() else ()
    return sorted(int(match[1]) for match in found if match and (folder / match[0] / STATES / STATE).is_file())


def newest(folder: Path) -> Path | None:
    """The newest checkpoint of a run."""
    steps = steps_of(folder)
    return folder / f"checkpoint_{steps[-1]}" if steps else None


def states_of(checkpoint: Path) -> Path:
    """The folder with everything but the weights.

    Raises:
        FileNotFoundError: there is no such checkpoint, or it holds weights only.
    """
    if not checkpoint.is_dir():
        raise FileNotFoundError(f"There is no checkpoint {str(checkpoint)!r}.")
    if not (checkpoint / STATES / STATE).is_file():
        raise FileNotFoundError(
            f"{str(checkpoint)!r} is no checkpoint of `sparseopt train lm`: it has no {STATES}/{STATE}; to begin with its "
            "weights, name it as model.name with model.pretrained."
        )
    return checkpoint / STATES


def processes_of(states: Path) -> int:
    """How many processes wrote a checkpoint: each keeps its random state."""
    return max(1, len(list(states.glob("rng_state_*.pth"))))


def retain(
    folder: Path, losses: Mapping[int, float], last: int | None, best: int | None, every: int | None
) -> list[int]:
    """Removes the checkpoints that no rule keeps; without rules all stay. Returns the steps that were removed.

    Args:
        folder: of the run.
        losses: step of an evaluation -> loss; a checkpoint is as good as the last evaluation up to its step.
        last: so many newest are kept; the newest one always is, to go on from.
        best: so many of the lowest loss.
        every: those whose step is a multiple.
    """
    steps = steps_of(folder)
    if not steps or (last is None and best is None and every is None):
        return []
    kept = {*steps[-max(last or 1, 1) :]}
    if every is not None:
        kept |= {step for step in steps if step % every == 0}
    if best is not None:
        judged = {step: losses[max(e for e in losses if e <= step)] for step in steps if any(e <= step for e in losses)}
        judged = {step: loss for step, loss in judged.items() if loss == loss}
        kept |= {*sorted(judged, key=lambda step: (judged[step], step))[:best]}
    removed = [step for step in steps if step not in kept]
    for step in removed:
        # Under another name first: what a kill leaves is no checkpoint then, and cleared by the next start.
        giving_way = folder / f".checkpoint_{step}.removed_.tmp"
        os.replace(folder / f"checkpoint_{step}", giving_way)
        shutil.rmtree(giving_way)
    return removed
