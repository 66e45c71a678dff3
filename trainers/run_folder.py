"""The folder of a training run: its settings, what a continuation may differ in, and its newest whole checkpoint."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from sparseopt._files import atomic_write, clear_leftovers
from sparseopt._processes import position

__all__ = ["RunFolder"]

Config = dict[str, dict[str, Any]]
PROCESSES = "processes"  # in the record, where there were several


class RunFolder:
    """A run folder, new or to be continued.

    Attributes:
        path: the folder; made by :meth:`begin`.
        checkpoint: the newest whole checkpoint to continue from, or None.
        trained: training was completed earlier; its outcome is in the folder.
    """

    RECORD = "config.json"
    REPORT = "report.md"  # where a finished run is described
    # Left by a run that ended before its first checkpoint: a new run in the same folder makes its own.
    LEFTOVERS: tuple[str, ...] = (
        "before.json", "mask.safetensors", "metrics.jsonl", "completions.jsonl", "timing_info.json", "training.json",
        "trained_entries.safetensors",
    )  # fmt: skip
    LEFTOVER_FOLDERS: tuple[str, ...] = ("model", "adapter")

    def __init__(self, path: Path, config: Config) -> None:
        """Looks at the folder and writes nothing.

        Raises:
            FileNotFoundError: nothing to resume.
            ValueError: the folder holds a run and ``training.resume`` is off, or the run is finished or had other settings.
        """
        self.path = path
        self.checkpoint: Path | None = None
        self.trained = False
        self._settings = _comparable(config)
        if path.exists() and not path.is_dir():
            raise ValueError(f"output.dir must be a folder, but {str(path)!r} is a file.")
        finished, newest = (path / "results.json").is_file(), _newest_checkpoint(path)
        trained = (path / "training.json").is_file()
        if not config["training"]["resume"]:
            if finished or trained or newest is not None:
                what = "a finished run" if finished else "an unfinished run"
                way = "choose another --output_dir" if finished else "--resume it or choose another --output_dir"
                raise ValueError(f"{str(path)!r} holds {what}: {way}.")
            return
        if not self.record.is_file():
            raise FileNotFoundError(f"There is no run to resume in {str(path)!r}: it has no {self.RECORD}.")
        if finished:
            raise ValueError(
                f"The run in {str(path)!r} is finished, there is nothing to resume: see its {self.REPORT}."
            )
        earlier = json.loads(self.record.read_text())
        _require_same(earlier, self._settings, path)
        began, now = earlier.get(PROCESSES, 1), position()[1]
        if began != now and not trained:
            raise ValueError(
                f"the run in {str(path)!r} began with {_several(began)}, which decides what a step is, now {_several(now)}: "
                "resume with as many."
            )
        self.checkpoint, self.trained = newest, trained

    @property
    def record(self) -> Path:
        return self.path / self.RECORD

    def begin(self, resume: bool) -> None:
        """Makes the folder and records the settings; of a run that is continued, drops checkpoints that are not whole.

        Either way clears up after writes that a kill cut short; an outcome that was being replaced then is there again.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if self.record.is_file():  # in a folder without a run nothing is ours
            clear_leftovers(self.path)
        if resume:
            for step in _checkpoints(self.path):
                if self.checkpoint is None or step > _step(self.checkpoint):
                    shutil.rmtree(self.path / f"checkpoint-{step}")
            return
        for name in self.LEFTOVERS:
            (self.path / name).unlink(missing_ok=True)
        for name in self.LEFTOVER_FOLDERS:
            shutil.rmtree(self.path / name, ignore_errors=True)
        for step in _checkpoints(self.path):
            shutil.rmtree(self.path / f"checkpoint-{step}")
        world = position()[1]
        several = {PROCESSES: world} if world > 1 else {}
        atomic_write(self.record, json.dumps({**self._settings, **several}, indent=2))

    def drop_checkpoints(self, keep: int = 0) -> None:
        """Removes all but the newest ``keep`` checkpoints (-1: none) of a finished run, whose outcome is kept apart."""
        steps = _checkpoints(self.path)
        for step in steps[: len(steps) - keep] if keep >= 0 else ():
            shutil.rmtree(self.path / f"checkpoint-{step}")

    def drop_outcome(self) -> None:
        """Removes the trained model of a full training that was told not to save it."""
        shutil.rmtree(self.path / "model", ignore_errors=True)


def _several(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"


def _comparable(config: Config) -> Config:
    """What must not differ between a run and its continuation, as JSON gives it back."""
    kept = {section: dict(keys) for section, keys in config.items() if section != "output"}
    for key in ("resume", "device"):
        kept["training"].pop(key)
    kept.pop("tracking", None)
    return json.loads(json.dumps(kept))


def _require_same(earlier: Config, now: Config, path: Path) -> None:
    for section, keys in now.items():
        for key, value in keys.items():
            before = earlier.get(section, {}).get(key)
            if before != value:
                raise ValueError(
                    f"{section}.{key} is {value!r}, but the run in {str(path)!r} began with {before!r}: "
                    "resume with the same settings."
                )


def _checkpoints(path: Path) -> list[int]:
    """Steps of the checkpoint folders, ascending."""
    found = path.glob("checkpoint-*") if path.is_dir() else ()
    return sorted(_step(p) for p in found if p.is_dir() and re.fullmatch(r"checkpoint-\d+", p.name))


def _newest_checkpoint(path: Path) -> Path | None:
    """The newest checkpoint that is whole: the trainer writes its state last, so a kill leaves it missing or cut off."""
    for step in reversed(_checkpoints(path)):
        candidate = path / f"checkpoint-{step}"
        try:
            state = json.loads((candidate / "trainer_state.json").read_text())
        except (FileNotFoundError, ValueError):
            continue
        if state.get("global_step") == step:
            return candidate
    return None


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))
