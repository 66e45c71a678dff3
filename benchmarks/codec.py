"""Size and speed of the mask codec, one thread: ``python -m sparseopt.benchmarks.codec``.

Every case is one tensor of ``--entries`` entries. Sizes are bits per entry, beside the entropy of independent draws of that
density (of whole groups where the mask is made of groups); speeds are medians, in 1e9 entries/s, of decoding into zeros
that are in memory already (for the difference: into its parent), without reading a file and its checksum; those are in
``load``. What was decoded is compared with what was encoded. The bars: at most 0.18 bits per entry at 2.5%, and decoding
at 1e9 entries/s at the densities up to 10%, with the extension.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sparseopt as so
from sparseopt import _backend
from sparseopt._files import atomic_write
from sparseopt.masks import codec

__all__ = ["CASES", "main", "measure", "run"]

BITS_BAR, SPEED_BAR = 0.18, 1.0  # bits per entry at 2.5%; 1e9 entries/s
ROW = 2048
MODEL = 3_000_000_000  # entries of the model that sizes are extrapolated to
KINDS = {codec.RAW: "raw", codec.ZLIB: "zlib", codec.RICE: "rice"}
# Name -> (density, entries of a group)
CASES: dict[str, tuple[float, int]] = {
    "2.5%": (0.025, 1),
    "0.25%": (0.0025, 1),
    "10%": (0.1, 1),
    "50%": (0.5, 1),
    "2.5%, rows": (0.025, ROW),
    "2.5%, runs of 16": (0.025, 16),
    "2:4": (0.5, 0),
    "2.5%, 5% of it moved since the parent": (0.025, 1),
}


def entropy(density: float) -> float:
    """Bits of one draw."""
    return -sum(p * math.log2(p) for p in (density, 1 - density) if p)


def bits_of(case: str, entries: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
    """A packed mask, and its parent for a difference."""
    density, group = CASES[case]
    if group == 0:  # 2:4: one of the six pairs in every four
        pairs = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 0, 1], [0, 0, 1, 1]])
        return so.pack_mask(pairs.bool()[torch.randint(6, (entries // 4,), generator=generator)].view(-1)), None
    mask = torch.rand(entries // group, generator=generator) < density
    if "moved" not in case:
        return so.pack_mask(mask.repeat_interleave(group) if group > 1 else mask), None
    parent = so.pack_mask(mask)
    active = mask.nonzero().view(-1)
    leaving = active[torch.rand(active.numel(), generator=generator) < 0.05]
    mask[leaving] = False
    mask[torch.randint(entries, (leaving.numel(),), generator=generator)] = True
    return so.pack_mask(mask), parent


def measure(case: str, entries: int, rounds: int) -> dict[str, Any]:
    """One case -> kind of coding, bits per entry, entropy, seconds of encoding, speeds of decoding and loading.

    Raises:
        RuntimeError: what was decoded is not what was encoded.
    """
    bits, parent = bits_of(case, entries, torch.Generator().manual_seed(0))
    start = time.perf_counter()
    stored = codec.encode(bits, entries) if parent is None else codec.encode_difference(bits, parent, entries)
    encoding = time.perf_counter() - start
    if stored is None:
        raise RuntimeError(f"the case {case!r} has no difference to its parent.")
    seconds = []
    for _ in range(rounds):
        target = torch.zeros_like(bits).fill_(0) if parent is None else parent.clone()
        start = time.perf_counter()
        codec.decode_(stored, target, entries)
        seconds.append(time.perf_counter() - start)
        if not torch.equal(target, bits):
            raise RuntimeError(f"the case {case!r} was decoded to another mask.")
    density, group = CASES[case]
    found: dict[str, Any] = {
        "kind": KINDS[int(stored[0]) & ~codec.FRESH],
        "bits_per_entry": 8 * stored.numel() / entries,
        "bytes_of_3b": round(stored.numel() / entries * MODEL),
        "encode_seconds": round(encoding, 3),
        "decode_entries_per_second": entries / statistics.median(seconds),
    }
    if parent is None:
        found["entropy"] = entropy(density) / group if group else math.log2(6) / 4
        found["load_entries_per_second"] = entries / _load_seconds(bits, entries)
    return found


def _load_seconds(bits: Tensor, entries: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mask.safetensors"
        so.MaskSet({"w": bits}, {"w": (entries,)}, copy_bits=False).save(path, compress=True)
        start = time.perf_counter()
        so.MaskSet.load(path)
        return time.perf_counter() - start


def run(entries: int, rounds: int) -> dict[str, Any]:
    """All cases, one thread, with ``met``: whether the bars were (None where they say nothing)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        cases = {}
        for case, (density, group) in CASES.items():
            found = measure(case, entries, rounds)
            met = None
            if group == 1 and density <= 0.1:
                small = found["bits_per_entry"] <= BITS_BAR or case != "2.5%"
                met = bool(small and found["decode_entries_per_second"] >= SPEED_BAR * 1e9)
            cases[case] = {**found, "met": met}
            print(f"{case}: {cases[case]}", file=sys.stderr)
    finally:
        torch.set_num_threads(threads)
    return {"entries": entries, "rounds": rounds, "backend": _backend.selection("cpu").backend, "cases": cases}


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code: 1 when a bar was missed."""
    parser = argparse.ArgumentParser(
        prog="python -m sparseopt.benchmarks.codec", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument(
        "--entries", type=int, default=102_400_000, help="of each case, a multiple of 4096 (%(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=15, help="timed (%(default)s)")
    parser.add_argument("--output", type=Path, help="folder for codec-DEVICE.json")
    options = parser.parse_args(arguments)
    if options.entries <= 0 or options.entries % 4096 or options.rounds <= 0:
        parser.error("--entries must be a positive multiple of 4096, --rounds positive")

    from sparseopt.benchmarks.train_results import commit, environment, slug

    found = run(options.entries, options.rounds)
    where = {**environment(torch.device("cpu")), "threads": 1}
    result = {
        "benchmark": "mask codec", "device": where["device"], "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "command": f"python -m sparseopt.benchmarks.codec --entries {options.entries} --rounds {options.rounds}",
        "environment": where, **found,
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    if options.output is not None:
        atomic_write(options.output / f"codec-{slug(str(where['device']))}.json", json.dumps(result, indent=1) + "\n")
    return 0 if all(case["met"] is not False for case in found["cases"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
