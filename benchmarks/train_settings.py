"""What :mod:`sparseopt.benchmarks.train_step` is asked to do: its arms, settings and command line."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sparseopt.shapes import get_shape

__all__ = ["Arm", "Settings", "parse", "parse_arms", "parse_density"]

WORKLOADS = {
    "lm": "Next-token loss.",
    "dpo": "DPO on pairs with precomputed reference log-probabilities: one forward over chosen and rejected.",
    "grpo": "GRPO update on given completions; generation is not part of the step.",
}
ARMS = "dense-fused,dense-foreach,lora,lora-bf16,adamw8bit,sparse,sparse/runs16"
DTYPES = ("bfloat16", "float32")
DENSE = ("dense-fused", "dense-foreach", "lora", "lora-bf16", "adamw8bit")


@dataclass(frozen=True)
class Arm:
    """One way to train: a name of ``DENSE``, or ``sparse@DENSITY`` with ``/runsN`` for masks of aligned runs."""

    name: str
    density: float | None = None
    run: int = 1

    @property
    def sparse(self) -> bool:
        return self.density is not None


def parse_density(text: str) -> float:
    """``2.5%`` or ``0.025``; raises ValueError outside (0, 1]."""
    try:
        value = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise ValueError(f"density must be a share in (0, 1], such as 2.5% or 0.025, got {text!r}.")
    return value


def parse_arms(names: Sequence[str], densities: Sequence[str]) -> list[Arm]:
    """Arms by name; ``sparse`` and ``sparse/runsN`` stand for one arm of each density.

    Raises:
        ValueError: unknown name or density out of range.
    """
    arms: list[Arm] = []
    for name in names:
        match = re.fullmatch(r"sparse(?:@([^/]+))?(?:/runs([1-9]\d*))?", name)
        if name in DENSE:
            arms.append(Arm(name))
        elif match is not None:
            run = int(match[2] or 1)
            for text in [match[1]] if match[1] else densities:
                density = parse_density(text)
                arms.append(Arm(f"sparse@{100 * density:g}%" + (f"/runs{run}" if run > 1 else ""), density, run))
        else:
            choices = ", ".join((*DENSE, "sparse", "sparse/runs16", "sparse@2.5%", "sparse@2.5%/runs16"))
            raise ValueError(f"unknown arm {name!r}: expected some of {choices}.")
    return list(dict.fromkeys(arms))


@dataclass(frozen=True)
class Settings:
    """One run: see ``--help``; ``shape`` or ``model`` is None."""

    workload: str
    shape: str | None
    model: str | None
    arms: tuple[Arm, ...]
    batch: int
    seq: int
    rounds: int
    warmup: int
    passes: int
    modes: tuple[str, ...]
    gradient_checkpointing: bool
    accumulation: int
    master: str
    dtype: str
    device: str

    def label(self) -> str:
        """The model's name for tables and titles: without a path, and with what its weights are."""
        if self.shape:
            return f"{self.shape} shapes, random weights"
        assert self.model is not None
        return Path(self.model).resolve().name if os.path.isdir(self.model) else self.model

    def name(self, mode: str) -> str:
        """Name of the suite of one mode."""
        unit = {"dpo": "pair " if self.batch == 1 else "pairs "}.get(self.workload, "")
        size = f"{self.batch} {unit}x {self.seq}"
        more = [
            "gradient checkpointing" if self.gradient_checkpointing else "",
            f"accumulation {self.accumulation}" if self.accumulation > 1 else "",
            "fp32 master" if self.master == "fp32" else "",
            self.dtype if self.dtype != "bfloat16" else "",
        ]
        return f"training step ({self.workload}), {', '.join(p for p in (self.label(), mode, size, *more) if p)}"

    def command(self, mode: str) -> str:
        """The command that repeats this, free of paths."""
        source = f"--shape {self.shape}" if self.shape else f"--model {self.label()}"
        parts = ["sparseopt bench", self.workload, source, "--arms", ",".join(a.name for a in self.arms),
                 f"--batch {self.batch} --seq {self.seq} --rounds {self.rounds} --warmup {self.warmup}",
                 f"--passes {self.passes} --mode {mode}"]  # fmt: skip
        parts += ["--gradient_checkpointing"] * self.gradient_checkpointing
        parts += [f"--accumulation {self.accumulation}"] * (self.accumulation > 1)
        parts += [f"--master {self.master}"] * (self.master != "residual")
        parts += [f"--dtype {self.dtype}"] * (self.dtype != "bfloat16")
        return " ".join(parts)

    def record(self, mode: str) -> dict[str, Any]:
        """What is kept with the results."""
        values = asdict(self) | {"model": self.label(), "mode": mode, "arms": [a.name for a in self.arms]}
        for key in ("modes", "device"):
            values.pop(key)
        random = "Random weights. " if self.shape else ""
        return values | {"random_weights": bool(self.shape), "note": f"{random}{WORKLOADS[self.workload]}"}


def parse(arguments: Sequence[str] | None = None, prog: str | None = None) -> tuple[Settings, argparse.Namespace]:
    """Settings and the options of output; bad usage ends the program, called ``prog`` in the message, with code 2."""
    parser = argparse.ArgumentParser(
        prog=prog or "python -m sparseopt.benchmarks.train_step",
        description="Whole training steps in time and memory: dense AdamW, LoRA, 8-bit AdamW, sparse AdamW.",
    )

    def positive(text: str) -> int:
        if not text.isdecimal() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
        return int(text)

    parser.add_argument("--workload", choices=WORKLOADS, default="lm", help="the loss (%(default)s)")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--shape", help="a known model's shape with random weights")
    source.add_argument("--model", help="smollm2, a local folder or a Hub name")
    parser.add_argument("--arms", action="append", help=f"comma-separated ({ARMS})")
    parser.add_argument("--density", action="append", help="of sparse arms, comma-separated (2.5%%,0.25%%)")
    parser.add_argument("--batch", type=positive, default=1, help="sequences, or pairs, of a micro-batch (%(default)s)")
    parser.add_argument("--seq", type=positive, default=512, help="tokens of a sequence (%(default)s)")
    parser.add_argument("--rounds", type=positive, default=20, help="timed steps of each arm (%(default)s)")
    parser.add_argument(
        "--warmup", type=positive, default=5, help="untimed steps before them in each pass (%(default)s)"
    )
    parser.add_argument("--passes", type=positive, default=2, help="turns over all arms (%(default)s)")
    parser.add_argument("--mode", choices=("eager", "compiled", "both"), help="eager unless --compile is given")
    parser.add_argument("--compile", action="store_true", help="compile each decoder layer: --mode compiled")
    parser.add_argument("--gradient-checkpointing", "--gradient_checkpointing", action="store_true")
    parser.add_argument("--accumulation", type=positive, default=1, help="micro-batches of a step (%(default)s)")
    parser.add_argument(
        "--master", choices=("residual", "fp32"), default="residual", help="of sparse arms (%(default)s)"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the weights (%(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (%(default)s)")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="store JSON, Markdown and PNG here")
    parser.add_argument("--commit", help="recorded with the results (default: what git says)")
    parser.add_argument("--json", action="store_true", help="print JSON on stdout instead of a table")
    parser.add_argument("--debug", action="store_true", help="tracebacks of errors")
    options = parser.parse_args(arguments)
    if options.compile and options.mode == "eager":
        parser.error("--compile contradicts --mode eager: ask for --mode both to have the two.")
    mode = options.mode or ("compiled" if options.compile else "eager")
    try:
        arms = parse_arms(_several(options.arms, ARMS), _several(options.density, "2.5%,0.25%"))
        longest = get_shape(options.shape).positions if options.shape else None
    except ValueError as error:
        parser.error(str(error))
    if not arms:
        parser.error("--arms names no arm.")
    if options.seq < 2 or (longest is not None and options.seq > longest):
        most = f" and at most {longest}, the positions of {options.shape}" if longest else ""
        parser.error(f"--seq must be at least 2{most}, got {options.seq}.")
    if options.rounds < options.passes:
        parser.error(f"--rounds {options.rounds} cannot be split over --passes {options.passes}.")
    return Settings(
        workload=options.workload, shape=options.shape and options.shape.lower(), model=options.model, arms=tuple(arms),
        batch=options.batch, seq=options.seq, rounds=options.rounds, warmup=options.warmup, passes=options.passes,
        modes=("eager", "compiled") if mode == "both" else (mode,), accumulation=options.accumulation,
        gradient_checkpointing=options.gradient_checkpointing, master=options.master, dtype=options.dtype,
        device=options.device,
    ), options  # fmt: skip


def _several(given: Sequence[str] | None, default: str) -> list[str]:
    return [part.strip() for text in given or [default] for part in text.split(",") if part.strip()]
