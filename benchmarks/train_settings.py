"""What :mod:`sparseopt.benchmarks.train_step` is asked to do: its arms, settings and command line."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparseopt.models import sanitize_name
from sparseopt.shapes import get_shape

if TYPE_CHECKING:
    import torch

__all__ = ["MASK_ARM", "Arm", "Settings", "device_of", "parse", "parse_arms", "parse_density", "positive", "share"]

WORKLOADS = {
    "lm": "Next-token loss.",
    "dpo": "DPO on pairs with precomputed reference log-probabilities: one forward over chosen and rejected.",
    "grpo": "GRPO update on given completions; generation is not part of the step.",
}
ARMS = "dense-fused,dense-foreach,lora,lora-bf16,adamw8bit,sparse,sparse/runs16"
DTYPES = ("bfloat16", "float32")
DENSE = ("dense-fused", "dense-foreach", "lora", "lora-bf16", "adamw8bit")
MASK_ARM = "sparse@mask"
# What real rows are by default: the data, and how many of them.
MODEL = "google/gemma-3-270m-it"
DATA = {"dpo": ("Light-R1", 100), "grpo": ("OpenR1", 10)}
NUM_GENERATIONS, MAX_COMPLETION_LENGTH = 8, 256


@dataclass(frozen=True)
class Arm:
    """One way to train: a name of ``DENSE``, or ``sparse@DENSITY`` with ``/runsN`` for masks of aligned runs, ``/rows`` or
    ``/columns`` for whole ones of the matrices, of which only what trains is computed.

    ``sparse@mask`` has no density of its own: its mask comes from a file.
    """

    name: str
    density: float | None = None
    run: int = 1
    structure: str | None = None  # "row" or "column"

    @property
    def sparse(self) -> bool:
        return self.density is not None or self.name == MASK_ARM


def parse_density(text: str) -> float:
    """``2.5%`` or ``0.025``; raises ValueError outside (0, 1]."""
    try:
        value = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise ValueError(f"density must be a share in (0, 1], such as 2.5% or 0.025, got {text!r}.")
    return value


def parse_arms(names: Sequence[str], densities: Sequence[str], mask: str | None = None) -> list[Arm]:
    """Arms by name; ``sparse``, ``sparse/runsN``, ``sparse/rows`` and ``sparse/columns`` stand for one of each density.

    Args:
        names: as on the command line.
        densities: of arms that name none.
        mask: a mask file: adds the arm ``sparse@mask``, unless it is among the names.

    Raises:
        ValueError: unknown name or density out of range, or ``sparse@mask`` without a mask file.
    """
    arms: list[Arm] = []
    for name in [*names, MASK_ARM] if mask and names else names:
        match = re.fullmatch(r"sparse(?:@([^/]+))?(/(?:runs([1-9]\d*)|rows|columns))?", name)
        if name == MASK_ARM and mask is None:
            raise ValueError(f"the arm {MASK_ARM} needs --mask FILE.")
        if name in (*DENSE, MASK_ARM):
            arms.append(Arm(name))
        elif match is not None:
            unit, run = match[2] or "", int(match[3] or 1)
            structure = {"/rows": "row", "/columns": "column"}.get(unit)
            unit = unit if structure or run > 1 else ""
            for text in [match[1]] if match[1] else densities:
                density = parse_density(text)
                arms.append(Arm(f"sparse@{100 * density:g}%{unit}", density, run, structure))
        else:
            choices = ", ".join(
                (*DENSE, "sparse", "sparse/runs16", "sparse/columns", "sparse/rows", "sparse@2.5%/columns", MASK_ARM)
            )
            raise ValueError(f"unknown arm {name!r}: expected some of {choices}.")
    return list(dict.fromkeys(arms))


@dataclass(frozen=True)
class Settings:
    """One run: see ``--help``; ``shape`` or ``model`` is None. Without ``data`` it trains on random tokens.

    Attributes:
        data: where real rows come from; ``subset`` of them, None: as many as ``DATA`` says, if there are.
        results: where the folder of the run goes, named ``run`` or by default :meth:`run_name`; None: nowhere.
    """

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
    data: str | None = None
    subset: int | None = None
    checkpoint: str | None = None
    mask: str | None = None
    num_generations: int = NUM_GENERATIONS
    max_completion_length: int = MAX_COMPLETION_LENGTH
    results: str | None = None
    run: str | None = None
    together: bool = False

    def label(self) -> str:
        """The model's name for tables and titles: without a path, and with what its weights are."""
        if self.shape:
            return f"{self.shape} shapes, random weights"
        assert self.model is not None
        return _base(self.model)

    def name(self, mode: str) -> str:
        """Name of the suite of one mode."""
        unit = {"dpo": "pair " if self.batch == 1 else "pairs "}.get(self.workload, "")
        size = f"{self.batch} {unit}x {self.seq}"
        if self.data:
            each = f"x {self.num_generations} completions " if self.workload == "grpo" else ""
            unit = unit or ("prompt " if self.batch == 1 else "prompts ")
            size = f"{self.batch} {unit}{each}of {_base(self.data)} up to {self.seq} tokens"
        more = [
            f"from {_base(self.checkpoint)}" if self.checkpoint else "",
            "gradient checkpointing" if self.gradient_checkpointing else "",
            f"accumulation {self.accumulation}" if self.accumulation > 1 else "",
            "fp32 master" if self.master == "fp32" else "",
            self.dtype if self.dtype != "bfloat16" else "",
        ]
        return f"training step ({self.workload}), {', '.join(p for p in (self.label(), mode, size, *more) if p)}"

    def run_name(self, mode: str) -> str:
        """Folder of one mode's results: what was given, or what tells this run from others."""
        if self.run:
            return f"{self.run}_{mode}" if len(self.modes) > 1 else self.run
        parts = [
            self.workload, sanitize_name(self.shape or self.model or ""), f"bs{self.batch}",
            f"acc{self.accumulation}" if self.accumulation > 1 else "",
            f"from_{sanitize_name(_base(self.checkpoint))}" if self.checkpoint else "",
            "gc" if self.gradient_checkpointing else "", "fp32_master" if self.master == "fp32" else "",
            self.dtype if self.dtype != "bfloat16" else "", mode if mode != "eager" else "",
        ]  # fmt: skip
        return "_".join(part for part in parts if part)

    def command(self, mode: str) -> str:
        """The command that repeats this, free of paths."""
        source = f"--shape {self.shape}" if self.shape else f"--model {self.label()}"
        parts = ["sparseopt bench", self.workload, source]
        if self.data:
            parts += [f"--data {_base(self.data)}"]
            parts += [f"--subset_size {self.subset}"] * (self.subset is not None)
            parts += [f"--checkpoint {_base(self.checkpoint)}"] if self.checkpoint else []
            if self.workload == "grpo":
                parts += [f"--num_generations {self.num_generations}"]
                parts += [f"--max_completion_length {self.max_completion_length}"]
        parts += [f"--mask {_base(self.mask)}"] if self.mask else []
        parts += ["--arms", ",".join(a.name for a in self.arms),
                  f"--batch {self.batch} --seq {self.seq} --rounds {self.rounds} --warmup {self.warmup}",
                  f"--passes {self.passes} --mode {mode}"]  # fmt: skip
        parts += ["--gradient_checkpointing"] * self.gradient_checkpointing
        parts += [f"--accumulation {self.accumulation}"] * (self.accumulation > 1)
        parts += [f"--master {self.master}"] * (self.master != "residual")
        parts += [f"--dtype {self.dtype}"] * (self.dtype != "bfloat16")
        parts += ["--together"] * self.together
        return " ".join(parts)

    def record(self, mode: str) -> dict[str, Any]:
        """What is kept with the results."""
        values = asdict(self) | {"model": self.label(), "mode": mode, "arms": [a.name for a in self.arms]}
        dropped = ["modes", "device", "results", "run"]
        if not self.data:
            dropped += ["data", "subset", "checkpoint"]
        dropped += ["mask"] * (self.mask is None) + ["together"] * (not self.together)
        if not self.data or self.workload != "grpo":
            dropped += ["num_generations", "max_completion_length"]
        for key in dropped:
            values.pop(key)
        values |= {key: _base(values[key]) for key in ("data", "checkpoint", "mask") if values.get(key)}
        random = "Random weights. " if self.shape else ""
        note = f"{random}{WORKLOADS[self.workload]}"
        return values | {"random_weights": bool(self.shape), "note": note, "seed": 0}


def _base(name: str) -> str:
    """A name that tells nothing about the machine: of what exists here, the last part of its path."""
    return Path(name).resolve().name if os.path.exists(name) or os.path.isabs(name) else name


def positive(text: str) -> int:
    """An option's value: a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def share(text: str) -> float:
    """An option's value: a density, as :func:`parse_density` reads it."""
    try:
        return parse_density(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def device_of(name: str, parser: argparse.ArgumentParser) -> torch.device:
    """The device of an option, said on stderr; a bad one ends the program with code 2."""
    from sparseopt.progress import announce_device

    try:
        return announce_device(name)
    except ValueError as error:
        parser.error(str(error))


def parse(arguments: Sequence[str] | None = None, prog: str | None = None) -> tuple[Settings, argparse.Namespace]:
    """Settings and the options of output; bad usage ends the program, called ``prog`` in the message, with code 2."""
    parser = argparse.ArgumentParser(
        prog=prog or "python -m sparseopt.benchmarks.train_step",
        description="Whole training steps in time and memory: dense AdamW, LoRA, 8-bit AdamW, sparse AdamW.",
    )

    parser.add_argument("--workload", choices=WORKLOADS, default="lm", help="the loss (%(default)s)")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--shape", help="a known model's shape with random weights")
    source.add_argument(
        *_spellings("--model", "--model_name"), help=f"smollm2, a local folder or a Hub name ({MODEL} for real rows)"
    )
    parser.add_argument("--data", metavar="SOURCE", help="real rows: reasoning_gym:TASK, a local file or a Hub dataset")
    parser.add_argument(*_spellings("--subset_size"), type=positive, help="real rows: how many (dpo 100, grpo 10)")
    parser.add_argument("--checkpoint", help="real rows: begin with the weights of this folder, or None")
    parser.add_argument("--mask", metavar="FILE", help=f"adds the arm {MASK_ARM} with this mask")
    parser.add_argument("--arms", action="append", help=f"comma-separated ({ARMS})")
    parser.add_argument("--density", action="append", help="of sparse arms, comma-separated (2.5%%,0.25%%)")
    parser.add_argument(
        *_spellings("--batch", "--batch_size"),
        type=positive,
        default=1,
        help="sequences, or pairs, of a micro-batch (%(default)s)",
    )
    parser.add_argument("--seq", type=positive, default=512, help="tokens of a sequence (%(default)s)")
    parser.add_argument(
        *_spellings("--rounds", "--n_steps"), type=positive, default=20, help="timed steps of each arm (%(default)s)"
    )
    parser.add_argument(
        "--warmup", type=positive, default=5, help="untimed steps before them in each pass (%(default)s)"
    )
    parser.add_argument("--passes", type=positive, default=2, help="turns over all arms (%(default)s)")
    parser.add_argument(
        "--mode", choices=("eager", "compiled", "whole", "graphs", "both"), help="eager unless --compile is given; compiled: "
        "each decoder layer by itself, whole: the model in one piece, graphs: the same as CUDA graphs (reduce-overhead)",
    )  # fmt: skip
    parser.add_argument(
        "--together",
        action="store_true",
        help="a process for each arm: all compile at the same time, and are timed in turns",
    )
    parser.add_argument("--compile", action="store_true", help="compile each decoder layer: --mode compiled")
    parser.add_argument(*_spellings("--gradient_checkpointing"), action="store_true")
    parser.add_argument(
        *_spellings("--num_generations"), type=positive, help=f"completions of a prompt ({NUM_GENERATIONS})"
    )
    parser.add_argument(
        *_spellings("--max_completion_length"), type=positive, help=f"tokens of one ({MAX_COMPLETION_LENGTH})"
    )
    parser.add_argument("--accumulation", type=positive, default=1, help="micro-batches of a step (%(default)s)")
    parser.add_argument(
        "--master", choices=("residual", "fp32"), default="residual", help="of sparse arms (%(default)s)"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the weights (%(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (%(default)s)")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="store JSON, Markdown and PNG here")
    parser.add_argument(
        *_spellings("--results_dir"), metavar="FOLDER", help="timing_info.json, report.md and timing.png of the run go to "
        "FOLDER/RUN; with real rows or --run_name also where it is not given (results)",
    )  # fmt: skip
    parser.add_argument(*_spellings("--run_name"), metavar="RUN", help="name of that folder (workload, model, batch)")
    parser.add_argument("--commit", help="recorded with the results (default: what git says)")
    parser.add_argument("--json", action="store_true", help="print JSON on stdout instead of a table")
    parser.add_argument("--debug", action="store_true", help="tracebacks of errors")
    options = parser.parse_args(arguments)
    if options.compile and options.mode == "eager":
        parser.error("--compile contradicts --mode eager: ask for --mode both to have the two.")
    mode = options.mode or ("compiled" if options.compile else "eager")
    given = [f"--{key}" for key in ("data", "subset_size", "checkpoint") if getattr(options, key) is not None]
    if given and options.workload == "lm":
        parser.error(f"{given[0]} is for dpo and grpo: lm trains on random tokens.")
    if given and options.shape:
        parser.error(f"{given[0]} asks for real rows, which need --model: --shape {options.shape} has no tokenizer.")
    if not given and not options.shape and not options.model:
        parser.error("give one of --shape and --model, or real rows with --data, --subset_size or --checkpoint.")
    if options.together and (given or options.mask):
        parser.error(f"--together is for random tokens and masks: leave out {given[0] if given else '--mask'}.")
    generated = given and options.workload == "grpo"
    for key in ("num_generations", "max_completion_length"):
        if getattr(options, key) is not None and not generated:
            parser.error(f"--{key} is for grpo on real rows: give --data or --subset_size.")
    try:
        names = _several(options.arms, ARMS)
        arms = parse_arms(names, _several(options.density, "2.5%,0.25%"), options.mask)
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
    run = options.run_name
    if run is not None and (run in ("", ".", "..") or re.search(r"[/\\\0]", run)):
        parser.error(f"--run_name must be the plain name of a folder, got {run!r}.")
    if options.subset_size is not None and options.subset_size < options.batch:
        parser.error(f"--subset_size {options.subset_size} is less than one batch of {options.batch}.")
    generations = options.num_generations or NUM_GENERATIONS
    completion = options.max_completion_length or MAX_COMPLETION_LENGTH
    if generated and generations < 2:
        parser.error(
            f"--num_generations must be at least 2, since completions of a prompt are compared, got {generations}."
        )
    if generated and completion >= options.seq:
        parser.error(f"--max_completion_length {completion} leaves no room for a prompt in --seq {options.seq}.")
    return Settings(
        workload=options.workload, shape=options.shape and options.shape.lower(),
        model=options.model or (None if options.shape else MODEL), arms=tuple(arms), batch=options.batch, seq=options.seq,
        rounds=options.rounds, warmup=options.warmup, passes=options.passes,
        modes=("eager", "compiled") if mode == "both" else (mode,), accumulation=options.accumulation,
        gradient_checkpointing=options.gradient_checkpointing, master=options.master, dtype=options.dtype,
        device=options.device, data=(options.data or DATA[options.workload][0]) if given else None,
        subset=options.subset_size,
        checkpoint=None if options.checkpoint == "None" else options.checkpoint, mask=options.mask,
        num_generations=generations, max_completion_length=completion,
        results=options.results_dir or ("results" if given or run else None), run=run,
        together=options.together,
    ), options  # fmt: skip


def _spellings(*flags: str) -> list[str]:
    """Flags in both spellings; the first names the value."""
    return list(dict.fromkeys(s for flag in flags for s in (flag, f"--{flag[2:].replace('_', '-')}")))


def _several(given: Sequence[str] | None, default: str) -> list[str]:
    return [part.strip() for text in given or [default] for part in text.split(",") if part.strip()]
