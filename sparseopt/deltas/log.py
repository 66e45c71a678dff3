"""DeltaLog: what changed, step by step, in a folder that is valid at every moment.

``base.json`` (and ``base.safetensors`` where the base cannot be read again), ``delta_step_N.safetensors`` with the entries
that differ from the step logged before, ``stats_step_N.json``. A step exists when its delta file does; every file appears
whole, in one rename, and the statistics before the delta.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from sparseopt._background import Background
from sparseopt._files import FormatError, atomic_write
from sparseopt.deltas._chain import check_chain, check_delta, delta_path, require_step
from sparseopt.deltas._file import DeltaFile
from sparseopt.deltas._recording import DenseTracker, SparseTracker, Staged, Tracker
from sparseopt.deltas.base import JSON_FILE, Base, Header, SaveBase, describe_model, open_base, read_header, write_base
from sparseopt.deltas.delta import Delta
from sparseopt.deltas.reader import list_steps
from sparseopt.deltas.statistics import Statistics, to_json
from sparseopt.optim.sparse_adamw import SparseAdamW

__all__ = ["DeltaLog"]


class DeltaLog:
    """A folder of deltas, to be read (at once) or written (after :meth:`start`).

    Recording costs the caller a copy of what may have changed: with a :class:`~sparseopt.SparseAdamW` its active entries,
    with a model all of it. On a GPU the copy runs beside training. Comparing, statistics and writing happen in a thread;
    at most one record is on its way, the next one waits for it. Memory on the CPU: with a SparseAdamW some 10 bytes per
    bf16 entry that ever was active (14 in fp32); with a model two copies of it, and one delta.

    Attributes:
        path: the folder.
        newest: statistics of the last record that this process finished (as :meth:`stats`), or None.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Names a folder; nothing is read or made yet."""
        self.path = Path(path)
        self.newest: dict[str, Any] | None = None
        self._base: Base | None = None
        self._last: int | None = None
        self._fresh = True
        self._tracker: Tracker | None = None
        self._thread: Background | None = None

    # ---- reading -----------------------------------------------------------------------------------------------------
    def steps(self) -> list[int]:
        """The logged steps, ascending; none where there is no folder."""
        return list_steps(self.path) if self.path.is_dir() else []

    def load(self, step: int) -> Delta:
        """The delta of one step: what differs from the step logged before it.

        Raises:
            ValueError: no such step, or its file is of another base or of other parameters.
            sparseopt.FormatError: the file is damaged.
        """
        path = delta_path(self.path, require_step(self.path, self.steps(), step))
        header, delta = read_header(self.path), Delta.load(path)
        check_delta(path, step, delta, header)
        return delta

    def stats(self, step: int) -> dict[str, Any]:
        """What ``stats_step_N.json`` says (:meth:`sparseopt.deltas.statistics.Statistics.result`).

        Raises:
            ValueError: no such step.
            sparseopt.FormatError: the file is damaged.
        """
        require_step(self.path, self.steps(), step)
        path = self.path / f"stats_step_{step}.json"
        try:
            content = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise FormatError(f"'{path}' is damaged: it is no JSON.") from error
        if not isinstance(content, dict) or content.get("step") != step:
            raise FormatError(f"'{path}' is damaged: it does not hold the statistics of step {step}.")
        return content

    def chain(self, step: int | None = None) -> list[int]:
        """The steps that lead from the base to ``step`` (None: the last one), after checking that none is missing.

        Only headers are read; :meth:`sparseopt.deltas.reader.LogReader.check` checks content too.

        Raises:
            ValueError: no such step, a step is missing (it is named), or a file is of another base or of other parameters.
            sparseopt.FormatError: a file is damaged.
        """
        steps = self.steps()
        if step is not None:
            require_step(self.path, steps, step)
        header = read_header(self.path)

        def open_file(number: int) -> DeltaFile:
            file = DeltaFile(delta_path(self.path, number))
            check_delta(file.path, number, file, header)
            return file

        return check_chain(self.path, steps, step or steps[-1], open_file) if steps else []

    def scores(
        self,
        method: str,
        target_step: int | None = None,
        momentum_window: int | None = None,
        base: torch.nn.Module | Mapping[str, Tensor] | str | os.PathLike[str] | None = None,
    ) -> Any:
        """Scores for :func:`sparseopt.find_masks`; see :func:`sparseopt.deltas.scores.scores`."""
        from sparseopt.deltas.scores import scores

        return scores(self, method, target_step, momentum_window, base=base)

    # ---- writing -----------------------------------------------------------------------------------------------------
    def start(
        self,
        model: torch.nn.Module | Mapping[str, Tensor],
        save_base: SaveBase = "auto",
        *,
        name: str | None = None,
        revision: str | None = None,
        resume_step: int | None = None,
        module: torch.nn.Module | None = None,
    ) -> None:
        """Opens the log for writing.

        Args:
            model: as it is before training, the base; when resuming after step 0, as it is then.
            save_base, name, revision: see :func:`sparseopt.deltas.base.write_base`.
            resume_step: training goes on after this step: later steps are dropped from the log, and recording goes on
                from what is left. 0 drops all. None: the log must have no steps.
            module: the model that a state dict is of, which tells its name and its buffers.

        Raises:
            ValueError: the folder holds a log of another base (both are named) or, without ``resume_step``, of earlier
                steps; its chain has a gap; ``save_base=False`` and the base cannot be read again.
            FileNotFoundError: there is nothing to resume.
        """
        if self._base is not None:
            raise RuntimeError(f"the delta log '{self.path}' was started already.")
        steps = self.steps()
        if steps and not (self.path / JSON_FILE).is_file():
            raise FileNotFoundError(f"'{self.path}' holds deltas but no {JSON_FILE}: use another folder.")
        if resume_step:
            now = describe_model(model, name, revision, fingerprint=False, module=module)
            self._check_same(read_header(self.path), now, name)
            base = open_base(self.path)
        else:
            base = write_base(self.path, model, save_base, name, revision, module)
            if steps and resume_step is None:
                raise ValueError(
                    f"'{self.path}' holds a delta log with steps up to {steps[-1]} already: resume it (resume_step), or "
                    "use another folder."
                )
        self._clean()
        for step in reversed(steps):  # the last one first: whenever this is cut short, a whole chain remains
            if step > (resume_step or 0):
                delta_path(self.path, step).unlink()
                (self.path / f"stats_step_{step}.json").unlink(missing_ok=True)
        chain = self.chain()
        self._base, self._last, self._fresh = base, chain[-1] if chain else None, not resume_step
        self._thread = Background("sparseopt-delta-log")

    def record(self, step: int, source: torch.nn.Module | Mapping[str, Tensor] | SparseAdamW) -> None:
        """Logs the weights of this moment as those of ``step``; returns before they are written.

        Args:
            step: greater than all before.
            source: the model (or its state dict), or the SparseAdamW that trains it. The latter takes for granted that
                nothing else writes the model.

        Raises:
            ValueError: a step that is not greater, or a source that does not fit the base.
            OSError or another error of the record before this one, which is not in the log then. Recording can go on.
        """
        if self._base is None or self._thread is None:
            raise RuntimeError(f"the delta log '{self.path}' takes records between start() and close() only.")
        self.flush()
        if not isinstance(step, int) or step <= (self._last or 0):
            expected = f"greater than {self._last}, the last one logged" if self._last is not None else "1 or more"
            raise ValueError(f"the step to log must be {expected}, got {step!r}.")
        tracker = self._tracker_for(source, self._base)
        staged = tracker.stage(source)
        self._thread.submit(self._write, step, self._base, tracker, staged)

    def flush(self) -> None:
        """Waits for the record on its way; raises its error, once."""
        if self._thread is not None:
            self._thread.flush()

    @property
    def pending(self) -> bool:
        """Whether a record is on its way."""
        return self._thread is not None and self._thread.pending

    def close(self) -> None:
        """Waits for the last record and ends writing; raises that record's error."""
        thread, self._thread = self._thread, None
        try:
            if thread is not None:
                thread.close()
        finally:
            self._base = self._tracker = None

    def __enter__(self) -> DeltaLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        steps = self.steps()
        return f"DeltaLog: '{self.path}', {len(steps)} steps" + (f", {steps[0]} to {steps[-1]}" if steps else "")

    # ---- in the thread -----------------------------------------------------------------------------------------------
    @torch.no_grad()
    def _write(self, step: int, base: Base, tracker: Tracker, staged: Staged) -> None:
        try:
            staged.wait()
            statistics = Statistics(base)
            entries = tracker.compare(staged, statistics)
            delta = Delta(
                entries, {name: base.shapes[name] for name in entries}, step=step, parent_step=self._last,
                base_fingerprint=base.fingerprint,
            )  # fmt: skip
            result = statistics.result(step, self._last)
            atomic_write(self.path / f"stats_step_{step}.json", to_json(result))
            delta.save(delta_path(self.path, step))
        except BaseException:
            # Renamed already, but perhaps not on the disk: the next step will not build on it.
            delta_path(self.path, step).unlink(missing_ok=True)
            tracker.failed()
            raise
        tracker.commit(entries)
        self._last, self.newest = step, result

    # ---- helpers -----------------------------------------------------------------------------------------------------
    def _tracker_for(self, source: object, base: Base) -> Tracker:
        if isinstance(source, SparseAdamW):
            if not isinstance(self._tracker, SparseTracker):
                self._tracker = SparseTracker(base, self._deltas, fresh=self._fresh)
        elif not isinstance(self._tracker, DenseTracker):
            self._tracker = DenseTracker(base, self._deltas)
        self._fresh = False
        return self._tracker

    def _deltas(self) -> Iterator[Delta]:
        """Everything logged so far, in order."""
        return (self.load(step) for step in self.chain())

    def _check_same(self, known: Header, model: Header, name: str | None) -> None:
        """A resumed model is no longer its base: its tensors and, if given, its name must be the same."""
        same = known.shapes == model.shapes and known.dtypes == model.dtypes and known.tied == model.tied
        if same and (name is None or known.name is None or known.name == model.name):
            return
        difference = "" if same else ": their tensors differ"
        raise ValueError(
            f"'{self.path}' holds the delta log of {known}, not of {model.name or 'an unnamed model'!r}{difference}; "
            "use another folder."
        )

    def _clean(self) -> None:
        """Removes what killed writes left: temporary files, and statistics of steps that do not exist."""
        steps = set(self.steps())
        for path in self.path.iterdir():
            unfinished = path.name.startswith((".delta_step_", ".stats_step_", ".base.")) and path.name.endswith(".tmp")
            number = path.name.removeprefix("stats_step_").removesuffix(".json")
            orphan = path.name == f"stats_step_{number}.json" and number.isdecimal() and int(number) not in steps
            if unfinished or orphan:
                path.unlink()
