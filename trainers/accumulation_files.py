"""The saved accumulations of a :class:`sparseopt.trainers.mask_collector.MaskCollector`: one file a step, the newest are kept."""

from __future__ import annotations

import re
import sys
import warnings
from pathlib import Path
from typing import TypeVar

from sparseopt._files import FormatError
from sparseopt.masks.collect import GradientEMA
from sparseopt.trainers.processes import told_by_first

__all__ = ["AccumulationFiles"]

T = TypeVar("T")


class AccumulationFiles:
    """``grad_ema_step_N.safetensors`` in a folder.

    Args:
        folder: made when the first one is saved.
        keep: how many to keep, the newest, beside those that a checkpoint continues from; -1: all.

    Attributes:
        together: every process calls :meth:`save`, :meth:`resume` and :meth:`exists` (FSDP2); the first one's files count.
        tidies: whether this process removes files and talks.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep
        self.together, self.tidies = False, True

    def path(self, step: int) -> Path:
        return self.folder / f"grad_ema_step_{step}.safetensors"

    def steps(self) -> list[int]:
        """Steps with a saved accumulation, ascending."""
        found = (
            re.fullmatch(r"grad_ema_step_(\d+)\.safetensors", path.name) for path in self.folder.glob("grad_ema_*")
        )
        return sorted(int(match[1]) for match in found if match)

    def exists(self, step: int) -> bool:
        return self._told(self.path(step).is_file())

    def _told(self, value: T) -> T:
        # Files come and go while processes look: the first one's view is everyone's.
        return told_by_first(value) if self.together else value

    def save(self, ema: GradientEMA, step: int, base_model: str | None, checkpoints: Path) -> None:
        """Saves the accumulation of a step; old ones go, unless ``checkpoints`` still has the checkpoint of their step."""
        ema.save(self.path(step), step=str(step), base_model=base_model or "")
        if self.keep > 0 and self.tidies:
            for old in self.steps()[: -self.keep]:
                if not (checkpoints / f"checkpoint-{old}").is_dir():
                    self.path(old).unlink(missing_ok=True)

    def resume(self, ema: GradientEMA, step: int) -> bool:
        """Continues from the newest accumulation that is not later than ``step``; later ones belong to a past that is not.

        Returns:
            Whether it is that of ``step``.
        """
        saved = self._told(self.steps())
        later = [other for other in saved if other > step]
        for other in later if self.tidies else ():
            self.path(other).unlink()
        if later and self.tidies:
            line = f"Removed {len(later)} saved accumulations of steps after {step} from {self.folder}."
            print(line, file=sys.stderr, flush=True)
        for found in reversed(saved[: len(saved) - len(later)]):
            try:
                ema.load(self.path(found))
            except FormatError as error:
                self._warn(f"{error} An older accumulation is looked for.")
                continue
            if found < step:
                self._warn(f"the accumulation of step {found} is the newest of this training, which resumes at step {step}: "
                           "the gradients between are missing from it.")  # fmt: skip
            return found == step
        if step:
            self._warn(f"training resumes at step {step}, but '{self.folder}' holds no accumulation up to there: the "
                       "accumulation starts anew.")  # fmt: skip
        return False

    def _warn(self, text: str) -> None:
        if self.tidies:
            warnings.warn(text, stacklevel=4)
