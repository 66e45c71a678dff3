"""Several processes, one a GPU: bytes reduced per step, step time and memory of SparseAdamW against dense AdamW.

    torchrun --nproc-per-node=2 -m sparseopt.benchmarks.scale_out --shape llama-3.2-3b --output FOLDER

Arms: DDP and FSDP2 (``fully_shard``, one group a decoder layer) with torch's fused AdamW, and each with SparseAdamW; under DDP
its compact gradients are averaged in fp32 or in bf16 ("fsdp2 sparse offloaded" keeps weights and state in the host's
memory). Random weights and tokens. Bytes are those that torch's profiler reads off the collectives of one step of rank 0: what
all-reduce and reduce-scatter are given, what all-gather gives. Before anything is timed, SparseAdamW must give the same weights
captured under DDP, captured under FSDP2 (also where the last step is resumed from a checkpoint of torch.distributed.checkpoint),
and masked from DDP's dense gradients, over two micro-batches a step.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

import sparseopt as so
from sparseopt._files import atomic_write
from sparseopt.benchmarks import train_results
from sparseopt.benchmarks.train_settings import positive, share
from sparseopt.shapes import SHAPES, build_shape

__all__ = ["main", "measure", "traffic"]

Built = tuple[nn.Module, Any]
ITEM = {
    "float": 4, "Float": 4, "c10::BFloat16": 2, "BFloat16": 2, "c10::Half": 2, "Half": 2, "double": 8, "Double": 8,
    "unsigned char": 1, "Byte": 1, "long int": 8, "Long": 8, "int": 4, "Int": 4, "bool": 1, "Bool": 1,
}  # fmt: skip
ARMS = ("ddp dense", "ddp sparse fp32", "ddp sparse bf16", "fsdp2 dense", "fsdp2 sparse")
OFFLOADED = "fsdp2 sparse offloaded"


# ---- models and optimizers -----------------------------------------------------------------------------------------------
def random_masks(model: nn.Module, density: float, device: torch.device) -> so.MaskSet:
    """The same on every process: drawn on the device, packed tensor by tensor."""
    generator = torch.Generator(device).manual_seed(0)
    packed, shapes = {}, {}
    for name, param in model.named_parameters():
        mask = torch.rand(param.numel(), generator=generator, device=device) < density
        packed[name], shapes[name] = so.pack_mask(mask).cpu(), tuple(param.shape)
    return so.MaskSet(packed, shapes, copy_bits=False)


def _model(shape: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    model: Any = build_shape(shape, device=device, dtype=dtype)
    if shape != "tiny":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def _sharded(model: Any, offload: bool) -> nn.Module:
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    options: dict[str, Any] = {"offload_policy": CPUOffloadPolicy()} if offload else {}
    for layer in model.model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def _replicated(model: nn.Module, device: torch.device) -> nn.Module:
    ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)


def build(arm: str, shape: str, masks: so.MaskSet, device: torch.device, dtype: torch.dtype, **options: Any) -> Built:
    """(wrapped model, optimizer) of an arm."""
    model = _model(shape, device, dtype)
    kind, way = arm.split(" ")[:2]
    if way != "dense" and kind == "ddp":  # optimizer first: DDP makes no buckets
        optimizer = _sparse(arm, model, masks, **options)
        optimizer.prepare_ddp(model)
        return _replicated(model, device), optimizer
    wrapped = _replicated(model, device) if kind == "ddp" else _sharded(model, "offloaded" in arm)
    if way == "dense":
        return wrapped, torch.optim.AdamW(wrapped.parameters(), lr=1e-5, weight_decay=0.01, fused=True)
    return wrapped, _sparse(arm, wrapped, masks, **options)


def _sparse(arm: str, model: nn.Module, masks: so.MaskSet, **options: Any) -> so.SparseAdamW:
    reduce_dtype = torch.bfloat16 if arm.endswith("bf16") else torch.float32
    settings = {"lr": 1e-5, "max_grad_norm": 1.0, "capture_gradients": True, "reduce_dtype": reduce_dtype, **options}
    return so.SparseAdamW(model.named_parameters(), masks=masks, **settings)


def stepper(built: Built, tokens: Callable[[int], Tensor], accumulate: int = 1) -> Callable[[int], Tensor]:
    model, optimizer = built

    def step(number: int) -> Tensor:
        for micro in range(accumulate):
            batch = tokens(accumulate * number + micro)
            loss = model(input_ids=batch, labels=batch).loss
            (loss / accumulate).backward()
        if not isinstance(optimizer, so.SparseAdamW):
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def batches(shape: str, batch: int, seq: int, device: torch.device) -> Callable[[int], Tensor]:
    """Tokens of a step, others on every process."""
    from sparseopt.shapes import get_shape

    def tokens(number: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * number + dist.get_rank())
        return torch.randint(0, get_shape(shape).vocabulary, (batch, seq), generator=generator).to(device)

    return tokens


# ---- what is measured ----------------------------------------------------------------------------------------------------
def traffic(run: Callable[[], Any]) -> dict[str, int]:
    """Bytes of this process' collectives while ``run()``: reduced (given to them) and gathered (given by them)."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        run()
    with tempfile.TemporaryDirectory() as folder:
        recorded.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    result = {"reduced": 0, "gathered": 0, "collectives": 0}
    world = dist.get_world_size()
    for event in events:
        facts, name = event.get("args", {}), event.get("name", "")
        if "Collective name" in facts:  # NCCL
            kind, size = facts["Collective name"], ITEM.get(facts.get("dtype", ""), 0)
            given, got = (size * int(facts.get(f"{way} msg nelems", 0)) for way in ("In", "Out"))
        elif name.startswith("gloo:"):
            kind = name
            given = sum(
                ITEM[type_] * torch.Size(dims).numel()
                for type_, dims in zip(facts["Input type"], facts["Input Dims"], strict=True) if type_ in ITEM
            )  # fmt: skip
            got = given * world
        else:
            continue
        if "reduce" in kind:
            result["reduced"] += given
        elif "gather" in kind:
            result["gathered"] += got
        else:
            continue
        result["collectives"] += 1
    return result


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _of_all(value: Any) -> list[Any]:
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def measure(
    arm: str, shape: str, masks: so.MaskSet, device: torch.device, dtype: torch.dtype, tokens: Any, steps: int
) -> dict[str, Any]:
    """One arm: traffic, milliseconds of a step (the slowest process'), peak memory and state by process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    built = build(arm, shape, masks, device, dtype)
    step = stepper(built, tokens)
    losses = [float(step(0)), float(step(1))]
    moved = traffic(lambda: step(2))
    times = []
    for number in range(steps):
        dist.barrier()
        _synchronize(device)
        began = time.perf_counter()
        losses.append(float(step(3 + number)))
        _synchronize(device)
        times.append(max(_of_all(1000 * (time.perf_counter() - began))))
    optimizer = built[1]
    if isinstance(optimizer, so.SparseAdamW):
        state = optimizer.state_bytes()
    else:
        held = [getattr(v, "_local_tensor", v) for s in optimizer.state.values() for v in s.values()]
        state = sum(tensor.nbytes for tensor in held)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    low, *_, high = statistics.quantiles(times, n=5)
    return {
        "bytes_reduced_per_step": moved["reduced"], "bytes_gathered_per_step": moved["gathered"],
        "collectives_per_step": moved["collectives"],
        "step_ms": {"20%": low, "median": statistics.median(times), "80%": high},
        "peak_memory_bytes": _of_all(peak), "state_bytes": _of_all(state), "last_loss": losses[-1],
    }  # fmt: skip


def _resumed(saved: Built, fresh: Built) -> Built:
    """``fresh``, with the weights (made different first) and the state of ``saved``, through a checkpoint of all processes."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    def state(built: Built) -> dict[str, Any]:
        weights, optimizer = get_state_dict(built[0], built[1])
        return {"model": weights, "optimizer": optimizer}

    with torch.no_grad():
        for param in fresh[0].parameters():
            param.zero_()
    with tempfile.TemporaryDirectory() as own:
        folder = [own]
        dist.broadcast_object_list(folder)
        dcp.save(state(saved), checkpoint_id=f"{folder[0]}/checkpoint")
        read = state(fresh)
        dcp.load(read, checkpoint_id=f"{folder[0]}/checkpoint")
        set_state_dict(fresh[0], fresh[1], model_state_dict=read["model"], optim_state_dict=read["optimizer"])
        dist.barrier()  # the first process' folder goes with it
    return fresh


def check(device: torch.device) -> float:
    """The largest difference between weights of the ways that must agree, after three steps of a small fp32 model.

    Raises:
        SystemExit: they do not.
    """
    from torch.distributed.tensor import DTensor

    masks = random_masks(_model("tiny", device, torch.float32), 0.1, device)
    tokens = batches("tiny", 2, 32, device)
    results: list[dict[str, Tensor]] = []
    ways: dict[str, dict[str, Any]] = {"ddp masked": {"capture_gradients": False}, "ddp sparse": {}, "fsdp2 sparse": {}}
    ways["fsdp2 sparse resumed"] = {}
    if device.type == "cuda":
        ways["fsdp2 sparse offloaded"] = {}
    for arm, options in ways.items():
        built = build(arm, "tiny", masks, device, torch.float32, lr=1e-3, **options)
        for number in range(3):
            if number == 2 and arm.endswith("resumed"):
                built = _resumed(built, build(arm, "tiny", masks, device, torch.float32, lr=1e-3, **options))
            stepper(built, tokens, accumulate=2)(number)
        whole = {n.removeprefix("module."): p.full_tensor() if isinstance(p, DTensor) else p
                 for n, p in built[0].named_parameters()}  # fmt: skip
        results.append({name: value.detach().to(device) for name, value in whole.items()})
    apart = {arm: max(float((found[n] - results[0][n]).abs().max()) for n in found)
             for arm, found in zip(ways, results, strict=True)}  # fmt: skip
    worst = max(apart, key=lambda arm: apart[arm])
    if not apart[worst] <= 1e-5:
        raise SystemExit(
            f"{worst!r} gives weights that differ by {apart[worst]:.1e} from 'ddp masked': nothing is measured."
        )
    return apart[worst]


# ---- the command ---------------------------------------------------------------------------------------------------------
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="torchrun --nproc-per-node=2 -m sparseopt.benchmarks.scale_out", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--shape", default="llama-3.2-3b", choices=sorted(SHAPES))
    parser.add_argument("--density", type=share, default=0.025, help="share of entries that train (%(default)s)")
    parser.add_argument("--batch", type=positive, default=1, help="sequences a process (%(default)s)")
    parser.add_argument("--seq", type=positive, default=1024, help="tokens of a sequence (%(default)s)")
    parser.add_argument("--steps", type=positive, default=10, help="timed steps an arm (%(default)s)")
    parser.add_argument("--arms", default=",".join(ARMS), help=f"of {', '.join((*ARMS, OFFLOADED))} (all but the last)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--output", type=Path, default=Path("build/scale_out"), metavar="FOLDER")
    options = parser.parse_args(arguments)
    unknown = [arm for arm in options.arms.split(",") if arm not in (*ARMS, OFFLOADED)]
    if unknown:
        parser.error(f"argument --arms: unknown arm {unknown[0]!r} (choose from {', '.join((*ARMS, OFFLOADED))})")
    if "RANK" not in os.environ:
        parser.error("this runs in several processes: start it as above, with torchrun.")
    on_gpu = options.device == "cuda" or (options.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    # Weights that FSDP2 keeps in the host's memory are gathered there.
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)
    try:
        return _run(options, device)
    finally:
        dist.destroy_process_group()


def _run(options: argparse.Namespace, device: torch.device) -> int:
    first = dist.get_rank() == 0
    say = (lambda text: print(text, file=sys.stderr, flush=True)) if first else (lambda text: None)
    difference = check(device)
    say(f"The ways to train agree within {difference:.1e}.")
    masks = random_masks(_model(options.shape, device, torch.bfloat16), options.density, device)
    tokens = batches(options.shape, options.batch, options.seq, device)
    result: dict[str, Any] = {
        "benchmark": "scale_out", "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "commit": train_results.commit(), "environment": train_results.environment(device),
        "shape": options.shape, "weights": "random", "dtype": "bfloat16",
        "processes": dist.get_world_size(), "backend": dist.get_backend(), "density": masks.density,
        "active_parameters": masks.active_parameters, "total_parameters": masks.total_parameters,
        "batch": options.batch, "seq": options.seq, "timed_steps": options.steps,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "largest_difference_of_ways": difference, "arms": {},
    }  # fmt: skip
    for arm in options.arms.split(","):
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            found = measure(arm, options.shape, masks, device, torch.bfloat16, tokens, options.steps)
        except torch.OutOfMemoryError as error:  # on all processes alike: they hold the same
            found = {"failed": str(error).split(".")[0]}
        result["arms"][arm] = found
        say(f"{arm}: {json.dumps(found)}")
        if first:
            _write(result, options.output)
    return 0


def _write(result: dict[str, Any], folder: Path) -> None:
    arms = result["arms"]
    for arm, facts in arms.items():
        base = arms.get(f"{arm.split(' ')[0]} dense", {})
        if "sparse" in arm and "step_ms" in facts and "step_ms" in base:
            if arm.startswith("ddp"):
                facts["bytes_below_dense"] = base["bytes_reduced_per_step"] / facts["bytes_reduced_per_step"]
            facts["step_time_of_dense"] = facts["step_ms"]["median"] / base["step_ms"]["median"]
    name = "".join(c if c.isalnum() or c in ".-" else "-" for c in f"{result['device']}-x{result['processes']}").lower()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"scale-out-{result['shape']}-{name}"
    atomic_write(path.with_name(path.name + ".json"), json.dumps(result, indent=2) + "\n")
    atomic_write(path.with_name(path.name + ".md"), _markdown(result))


def _markdown(result: dict[str, Any]) -> str:
    lines = [
        f"### {result['shape']}, {result['processes']} x {result['device']}: {result['date']}, commit `{result['commit']}`", "",
        f"{result['batch']} x {result['seq']} tokens a process, {result['density']:.1%} active, random weights in bf16, decoder "
        "layers checkpointed. Bytes are those that a process gives to (reduced) or gets from (gathered) collectives in a step.", "",
        "| arm | step ms (20% - 80%) | of dense | reduced MB | below dense | gathered MB | peak GiB | state GiB |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for arm, facts in result["arms"].items():
        if "failed" in facts:
            lines.append(f"| {arm} | {facts['failed']} | | | | | | |")
            continue
        took = facts["step_ms"]
        of_dense = f"{facts['step_time_of_dense']:.2f}" if "step_time_of_dense" in facts else ""
        below = f"{facts['bytes_below_dense']:.1f}x" if "bytes_below_dense" in facts else ""
        peak, state = (max(facts[key]) / 2**30 for key in ("peak_memory_bytes", "state_bytes"))
        lines.append(
            f"| {arm} | {took['median']:.1f} ({took['20%']:.1f} - {took['80%']:.1f}) | {of_dense} "
            f"| {facts['bytes_reduced_per_step'] / 1e6:.1f} | {below} | {facts['bytes_gathered_per_step'] / 1e6:.1f} "
            f"| {peak:.2f} | {state:.3f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
