"""Bit-packed masks of 2^30 entries on a CUDA GPU, beside a device copy of as many bytes and torch's own ops.

python -m sparseopt.benchmarks.gpu_masks [FOLDER]     writes FOLDER/<device>.json

Every result is compared with torch's before it is timed. Times are the GPU's, as in sparseopt.benchmarks.gpu_optimizer.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparseopt.benchmarks.gpu_optimizer import Arm, case, store, time_in_turns

N = 2**30
DENSITY = 0.025


def torch_pack(mask: Tensor) -> Tensor:
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=mask.device)
    return (mask.view(-1, 8).to(torch.uint8) * weights).sum(dim=1, dtype=torch.uint8)


def torch_unpack(packed: Tensor) -> Tensor:
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (((packed[:, None] >> shifts) & 1) != 0).view(-1)


def copy_of(nbytes: int) -> Callable[[], Any]:
    """A copy that reads and writes so many bytes in all."""
    source = torch.randint(0, 100, (nbytes // 2,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def check(name: str, ours: Tensor, theirs: Tensor) -> None:
    if not torch.equal(ours, theirs.to(ours.dtype)):
        raise SystemExit(f"{name} differs from torch's result; no speed is reported.")


def main(folder: str | None = None) -> None:
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA GPU; `make bench` measures the CPU.")
    from sparseopt import functional

    mask, other = (torch.rand(N, device="cuda") < DENSITY for _ in range(2))
    packed, second = functional.pack_mask(mask), functional.pack_mask(other)
    check("pack_mask", packed, torch_pack(mask))
    check("unpack_mask", functional.unpack_mask(packed, N), mask)
    check("mask_indices", functional.mask_indices(packed, N), mask.nonzero().view(-1))
    check("popcount", functional.popcount(packed), mask.sum())
    check(
        "mask_overlap",
        functional.mask_overlap(packed, second),
        torch.stack([(mask & other).sum(), (mask | other).sum()]),
    )
    del other
    active = int(functional.popcount(packed))
    work: dict[str, tuple[Callable[[], Any], int, dict[str, Callable[[], Any]], dict[str, float]]] = {
        "bool to bits": (lambda: functional.pack_mask(mask), N + N // 8, {"torch ops": lambda: torch_pack(mask)},
                         {"device copy": 0.85}),
        "bits to bool": (lambda: functional.unpack_mask(packed, N), N + N // 8, {"torch ops": lambda: torch_unpack(packed)},
                         {"device copy": 0.85}),
        "bits to indices, 2.5% active": (lambda: functional.mask_indices(packed, N), N // 8 + 4 * active,
                                         {"torch.nonzero": lambda: mask.nonzero()}, {"torch.nonzero": 20}),
        "count active": (lambda: functional.popcount(packed), N // 8,
                         {"torch.count_nonzero of bools": lambda: torch.count_nonzero(mask)}, {}),
        "intersection and union of two": (lambda: functional.mask_overlap(packed, second), N // 4, {}, {}),
    }  # fmt: skip
    results = {}
    for name, (ours, nbytes, baselines, bars) in work.items():
        arms = {
            "device copy": Arm(copy_of(nbytes)),
            **{k: Arm(v) for k, v in baselines.items()},
            "sparseopt": Arm(ours),
        }
        times = time_in_turns(arms)
        terabytes = nbytes / times["sparseopt"]["median"] / 1e9
        beside = ["device copy", *baselines]
        results[name] = case(times, "sparseopt", beside, {"tb_per_s": terabytes}, bars)
        print(name, {k: round(v["median"], 4) for k, v in times.items()}, f"{terabytes:.2f} TB/s", flush=True)
    if folder:
        print(
            "stored in",
            store(folder, {"masks, 1 G entries": results}, "python -m sparseopt.benchmarks.gpu_masks FOLDER"),
        )


if __name__ == "__main__":
    main(*sys.argv[1:2])
