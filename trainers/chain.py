"""``sparseopt train chain``: the whole way from full training to a sparse one, as one resumable job.

    dense DPO with a delta log -> masks by every method -> how much they agree -> sparse DPO and sparse GRPO
    -> timing baseline -> reconstruct and compare bit by bit -> report

Each stage leaves its outcome in the chain's folder and is skipped when it is there, so that the same command continues
after Ctrl-C or a kill: ``dense_dpo/``, ``delta_log/``, ``gradient_stats.safetensors``, ``masks/``, ``jaccard.json`` and
``jaccard.png``, ``sparse_dpo/`` with ``delta_log_sparse/``, ``sparse_grpo/``, ``dense_grpo/`` (if asked for),
``results/``, ``reconstructed/``, ``chain.json`` (what was found, seconds of each stage), ``report.md``, ``curves.png``.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

import sparseopt as so
from sparseopt import config as configuration
from sparseopt import schemas
from sparseopt._files import atomic_write
from sparseopt.deltas.find import Search, find
from sparseopt.deltas.reconstruct import write_checkpoint
from sparseopt.masks.gradient_stats import save_gradient_stats
from sparseopt.masks.granularity import granularity_of
from sparseopt.progress import announce_device
from sparseopt.trainers import dpo, grpo, processes
from sparseopt.trainers.bookkeeping import versions
from sparseopt.trainers.chain_report import write_chain_report
from sparseopt.trainers.run import say
from sparseopt.trainers.scoring import gradient_scores

__all__ = ["Chain", "run"]

Config = dict[str, dict[str, Any]]


def run(config: Config) -> Path:
    """Runs the whole chain; returns its folder.

    Args:
        config: the sections of :data:`sparseopt.schemas.CHAIN`.

    Raises:
        KeyboardInterrupt: stopped by the user; the same command continues.
        RuntimeError: the reconstructed model differs from the trained one (never, unless a file was changed).
    """
    return Chain(config).execute()


class Chain:
    """The stages, their settings and where they write."""

    def __init__(self, config: Config) -> None:
        processes.refuse_several(
            "sparseopt train chain", "run its stages one by one (train dpo, masks find, train dpo --mask)"
        )
        self.config, self.settings = config, config["chain"]
        self.folder = Path(self.settings["dir"])
        self.record = self.folder / "chain.json"
        known = schemas.CHAIN["chain"]["methods"].default
        for method in [*self.settings["methods"], self.settings["train_with"]]:
            if method not in known:
                raise ValueError(f"chain.methods must name {', '.join(known)}, got {method!r}.")
        if self.settings["train_with"] not in self.settings["methods"]:
            raise ValueError(f"chain.train_with={self.settings['train_with']!r} must be among chain.methods.")
        # All settings are checked before anything runs.
        self.dense_dpo = self._run_settings("dpo", "dense_dpo", delta_log="delta_log")
        for method in self.settings["methods"]:
            self._search(method)
        self.sparse_dpo = self._run_settings("dpo", "sparse_dpo", self.mask_file(), delta_log="delta_log_sparse")
        self.sparse_grpo = self._run_settings("grpo", "sparse_grpo", self.mask_file())
        self.dense_grpo = self._run_settings("grpo", "dense_grpo") if self.settings["dense_grpo"] else None

    def execute(self) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.found: dict[str, Any] = json.loads(self.record.read_text()) if self.record.is_file() else {}
        same = {"config": json.loads(json.dumps(self.config))}
        if self.found.setdefault("config", same["config"]) != same["config"]:
            raise ValueError(f"the chain in {str(self.folder)!r} began with other settings: choose another chain.dir.")
        self.device = announce_device(self.settings["device"])
        stages = {
            "dense DPO": lambda: self._train("dpo", self.dense_dpo),
            "masks": self._masks,
            "agreement": self._agreement,
            "sparse DPO": lambda: self._train("dpo", self.sparse_dpo),
            "sparse GRPO": lambda: self._train("grpo", self.sparse_grpo),
            "dense GRPO": lambda: self._train("grpo", self.dense_grpo),
            "timing": self._timing,
            "reconstruction": self._reconstruct,
        }
        for number, (name, stage) in enumerate(stages.items(), 1):
            with self._stage(f"{number}/{len(stages)} {name}", name):
                stage()
        self.found["versions"] = versions(self.device)
        self.found.setdefault("date", datetime.date.today().isoformat())
        self.found["seconds"] = round(sum(self.found["stage_seconds"].values()), 1)
        self._keep()
        write_chain_report(self.folder, self.found)
        say(f"The chain is complete: {self.folder / 'report.md'}")
        return self.folder

    @contextlib.contextmanager
    def _stage(self, title: str, name: str) -> Iterator[None]:
        say(f"--- {title}")
        began = time.monotonic()
        try:
            yield
        finally:
            taken = self.found.setdefault("stage_seconds", {})
            taken[name] = round(taken.get(name, 0.0) + time.monotonic() - began, 1)
            self._keep()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _keep(self) -> None:
        atomic_write(self.record, json.dumps(self.found, indent=2))

    # ---- settings ------------------------------------------------------------------------------------------------------
    def _run_settings(
        self, method: str, section: str, mask: Path | None = None, delta_log: str | None = None
    ) -> Config:
        """Settings of one training run: the method's section of the file, then the run's own, then what the chain fixes."""
        logged: dict[str, Any] = {"dir": str(self.folder / delta_log)} if delta_log else {"schedule": "none"}
        fixed: dict[str, dict[str, Any]] = {
            "model": {},
            "output": {"dir": str(self.folder / section)},
            "training": {"device": self.settings["device"]},
            "mask": {"path": str(mask) if mask is not None else None, "method": None},
            "delta_log": logged,
        }
        if method == "grpo" and self.settings["grpo_after_dpo"]:
            fixed["model"]["checkpoint"] = str(self.folder / section.replace("grpo", "dpo"))
        if section == "dense_dpo":
            fixed["output"]["save_model"] = True  # the reconstruction is compared with it
        try:
            return configuration.compose(schemas.METHODS[method], self.config[method], self.config[section], fixed)
        except ValueError as error:
            raise ValueError(f"section {method!r} or {section!r}: {error}") from error

    def mask_file(self, method: str | None = None) -> Path:
        search = self._search(method or self.settings["train_with"])
        return self.folder / "masks" / search.file_name(self.dense_dpo["training"]["n_steps"])

    # ---- stages --------------------------------------------------------------------------------------------------------
    def _train(self, method: str, settings: Config | None) -> None:
        if settings is None:
            say("Not asked for (chain.dense_grpo).")
            return
        folder = Path(settings["output"]["dir"])
        if (folder / "results.json").is_file():
            say(f"Done already: {folder}")
            return
        resume = (folder / "config.json").is_file()
        configured = {**settings, "training": {**settings["training"], "resume": resume}}
        (dpo.run if method == "dpo" else grpo.run)(configured)

    def _masks(self) -> None:
        kept = self.found.setdefault("masks", {})
        for method in self.settings["methods"]:
            search, path = self._search(method), self.mask_file(method)
            if method in kept and path.is_file():
                continue
            if search.gradient_stats is not None and not search.gradient_stats.is_file():
                self._gradient_stats(search.gradient_stats)
            masks = find(search)
            path.parent.mkdir(exist_ok=True)
            masks.save(path)
            about: dict[str, Any] = {
                k: masks.metadata[k] for k in ("kept_score", "zero_score_share") if k in masks.metadata
            }
            kept[method] = {"file": path.name, "active_parameters": masks.active_parameters, **about}
            self._keep()
            say(f"{method}: {masks.active_parameters:,} of {masks.total_parameters:,} weights -> {path}")

    def _search(self, method: str) -> Search:
        settings = self.settings
        return Search(
            method, 100 * settings["sparsity"], self.folder / "delta_log",
            granularity=granularity_of(settings["granularity"]), exclude=tuple(settings["exclude"]),
            gradient_stats=self.folder / "gradient_stats.safetensors" if method == "gradient" else None,
            scratch_dir=self.folder, seed=self.dense_dpo["training"]["seed"],
        )  # fmt: skip

    def _gradient_stats(self, path: Path) -> None:
        """Squared gradients of the untrained model on the DPO data."""
        output = {**self.dense_dpo["output"], "dir": str(self.folder / "none")}
        trainer = dpo.DpoRun({**self.dense_dpo, "output": output}).untrained(self.device)
        count = self.settings["gradient_batches"]
        save_gradient_stats(path, gradient_scores(trainer, count), "batch", count)

    def _agreement(self) -> None:
        """Every method with every other: Jaccard index, and the value that chance gives."""
        if "jaccard" in self.found:
            return
        methods = self.settings["methods"]
        sets = {method: so.MaskSet.load(self.mask_file(method)) for method in methods}
        matrix, chance = [], 0.0
        for first in methods:
            row = [so.compare(sets[first], sets[second]) for second in methods]
            matrix.append([entry["jaccard"] for entry in row])
            chance = row[0]["chance_jaccard"]
        self.found["jaccard"] = {"methods": methods, "jaccard": matrix, "chance": chance}
        atomic_write(self.folder / "jaccard.json", json.dumps(self.found["jaccard"], indent=2))

    def _timing(self) -> None:
        """A process of its own: what training left in memory must not be in the baseline's."""
        steps = self.settings["timing_steps"]
        if not steps:
            say("Not asked for (chain.timing_steps).")
            return
        settings, sparse = self.dense_dpo, 100 * (1 - self.settings["sparsity"])
        target = self.folder / "results" / "dpo" / "timing_info.json"
        if not target.is_file():
            command = [
                sys.executable, "-m", "sparseopt", "bench", "dpo", "--model", settings["model"]["name"],
                "--data", settings["data"]["name"], "--n_steps", str(steps), "--passes", str(min(2, steps)), "--warmup", "1",
                "--batch_size", str(settings["training"]["batch_size"]), "--subset_size", str(4 * steps),
                "--dtype", settings["model"]["dtype"], "--arms", f"dense-fused,lora,sparse@{sparse:g}%",
                "--seq", str(settings["training"]["max_length"]), "--device", self.settings["device"], "--run_name", "dpo",
                "--results_dir", str(self.folder / "results"),
            ]  # fmt: skip
            say(" ".join(["sparseopt", *command[3:]]))
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        self.found["timing"] = json.loads(target.read_text())

    def _reconstruct(self) -> None:
        log = so.DeltaLog(self.folder / "delta_log")
        last, target = log.steps()[-1], self.folder / "reconstructed"
        if last != self.dense_dpo["training"]["n_steps"]:
            raise ValueError(
                f"the delta log ends at step {last}, the dense run at {self.dense_dpo['training']['n_steps']}: log the last "
                "step (dense_dpo.delta_log.schedule), so that the reconstruction can be compared."
            )
        if not target.is_dir():
            write_checkpoint(log, last, target)
        compared = same_weights(self.folder / "dense_dpo" / "model", target)
        self.found["reconstruction"] = {"step": last, "tensors": compared, "bit_identical": True}
        self.found["delta_bytes"] = {
            name: {
                str(step): (Path(log.path) / f"delta_step_{step}.safetensors").stat().st_size for step in log.steps()
            }
            for name, log in (("dense", log), ("sparse", so.DeltaLog(self.folder / "delta_log_sparse")))
        }
        say(f"The model of step {last} was rebuilt from the log: {compared} tensors, bit by bit the same.")


def same_weights(first: Path, second: Path) -> int:
    """Compares two model folders tensor by tensor, bit by bit; returns how many tensors there are.

    Raises:
        RuntimeError: one differs (it is named).
    """
    ours, theirs = _files(first), _files(second)
    if ours.keys() != theirs.keys():
        name = sorted(ours.keys() ^ theirs.keys())[0]
        raise RuntimeError(f"only one of {str(first)!r} and {str(second)!r} has the tensor {name!r}.")
    for name, file in ours.items():
        with safe_open(file, "pt") as a, safe_open(theirs[name], "pt") as b:
            x, y = a.get_tensor(name), b.get_tensor(name)
        if x.dtype != y.dtype or not torch.equal(x.view(torch.uint8), y.view(torch.uint8)):
            raise RuntimeError(f"{name!r} of {str(second)!r} differs from {str(first)!r}.")
    return len(ours)


def _files(folder: Path) -> dict[str, Path]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found.update(dict.fromkeys(file.keys(), path))
    return found
