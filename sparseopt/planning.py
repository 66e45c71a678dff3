"""Memory and time of a training step, before anything is launched: dense AdamW, LoRA and sparse AdamW, the latter under masks
of single entries and of whole columns or rows, side by side.

Everything is bf16 in eager transformers with flash attention (SDPA), gradients clipped; dense AdamW is torch's fused one
with bf16 moments. A step's peak is the largest of three moments, each weights + optimizer state + what is alive then:

* the loss: activations kept for the backward pass, and 12 bytes a logit (fp32 log-softmax, its gradient, and the
  gradient of the logits; the bf16 logits are gone by then);
* the backward pass, from its beginning (all activations) to its end (all gradients that are kept). A tied embedding's
  gradient is two tensors there, the head's waiting for the embedding's, and their sum a third. Captured gradients
  (SparseAdamW) are compact from the start; dense ones wait in a window of 256 MiB. Under columns and rows there are none: the
  parts, in the weights' dtype, wait at the end at most;
* the optimizer step: all gradients, no activations.

Activations are counted tensor by tensor in :mod:`sparseopt._activations`; under gradient checkpointing, everything of one
layer is there while it is computed again. Peaks that were measured on an H100 are in tests/test_planning.py.

Columns and rows (``sparse_linear``) of each linear layer train, nothing else: its backward computes gradients of inputs in full,
that of the weight times the density. Graphs and fused kernels have no launches: their time is near ``compute_ms`` +
``optimizer_ms``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparseopt._activations import WORKLOADS, Architecture, Job, Structure, activations, architecture

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = [
    "CARDS",
    "DEVICES",
    "WORKLOADS",
    "Architecture",
    "Device",
    "Job",
    "Structure",
    "activations",
    "architecture",
    "plan",
]

CAPTURE_WINDOW = 256 * 2**20  # gradients that wait to be gathered: optim.capture.WAITING_BYTES
LIBRARY_BYTES = 32 * 2**20  # cuBLAS workspace, taken from torch's allocator
BYTES_PER_LOGIT = 12
DENSEST_INT32 = 0.017  # below this density, offsets of 1024 entries do not fit 16 bits
RUNS = (64, 32, 16, 8)  # entries that share an offset where a mask is made of such runs, aligned
CARDS = (8, 12, 16, 24, 32, 40, 48, 80, 141)  # GiB

# Achievable shares and costs, each from a measurement on an H100 unless said.
COMPUTE_SHARE = 0.6  # of the bf16 peak, by matrix products of a training step
DENSE_STEP_SHARE = 0.72  # of the copy bandwidth, by torch's fused AdamW and by clip_grad_norm_
FORWARD_LAUNCH = 35e-6  # seconds a kernel of an eager transformers layer: Python, not the GPU
BACKWARD_LAUNCH = 7e-6  # seconds a kernel that autograd launches from C++
CAPTURE_HOOK = 3e-5  # seconds a captured parameter: its hook, and its share of launching gathers
# Kernels of one layer: (forward, backward).
KERNELS = {"gated": (38, 70), "gpt2": (18, 36)}
ADAPTER_KERNELS = {2: (4, 6), 4: (6, 8)}  # of one adapter, by the bytes of its dtype (fp32: with casts)
OTHER_KERNELS = (20, 30)  # embedding, rotary tables, final norm, head, loss
# More of a structured linear layer: picking features, and running in Python (0.8 to 1.25 forward kernels on a CPU, its backward
# with the gradient's delivery as much as a CAPTURE_HOOK).
STRUCTURED_KERNELS = (1, 1)


@dataclass(frozen=True)
class Device:
    """A GPU: bf16 peak in FLOP/s, copy bandwidth (read + write) in bytes/s, memory in GiB, and whether it was measured."""

    name: str
    flops: float
    bandwidth: float
    memory: int
    measured: bool


DEVICES = {
    "h100": Device("H100", 989e12, 3.0e12, 80, True),
    "h200": Device("H200", 989e12, 4.26e12, 141, True),
    # Data sheets; 88% of the memory bandwidth, as the H100 copies.
    "a100": Device("A100 80 GB", 312e12, 1.79e12, 80, False),
    "l40s": Device("L40S", 362e12, 0.76e12, 48, False),
    "rtx4090": Device("RTX 4090", 165e12, 0.89e12, 24, False),
}


# ---- memory and time of each arm -------------------------------------------------------------------------------------
def plan(
    config: PretrainedConfig | Architecture,
    job: Job,
    *,
    sparsity: float = 0.975,
    rank: int = 16,
    device: str = "h100",
    train_embeddings: bool = False,
    master: str = "residual",
    adapter_bytes: int = 2,
) -> dict[str, Any]:
    """Memory and expected time of a step of dense AdamW, LoRA and sparse AdamW: element masks, columns, rows.

    Args:
        config: of the model, bf16 weights.
        job: the step.
        sparsity: share of inactive entries.
        rank: of LoRA's adapters, in every linear layer but the head.
        device: a key of ``DEVICES``.
        train_embeddings: whether the mask of single entries covers embeddings and the head too (dense trains them always,
            LoRA, columns and rows never).
        master: "residual" (2 bytes an active entry) or "fp32" (4).
        adapter_bytes: 2 for adapters in bf16, 4 for PEFT's default of fp32.

    Returns:
        JSON-able: ``device``, ``model``, ``arms`` (each with ``trained``, bytes ``weights``, ``gradients``, ``state``,
        ``activations`` (those of the loss included), ``peak``, ``peak_at``, and ``step_ms`` with its parts),
        ``conclusion``, ``assumptions``.

    Raises:
        ValueError: an argument out of range, or a model type that is not known.
    """
    arch = config if isinstance(config, Architecture) else architecture(config)
    if device.lower() not in DEVICES:
        raise ValueError(f"unknown device {device!r}: expected one of {', '.join(DEVICES)}.")
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be in [0, 1), such as 0.975, got {sparsity}.")
    if rank < 1 or master not in ("residual", "fp32") or adapter_bytes not in (2, 4):
        raise ValueError(
            f"rank must be at least 1, master 'residual' or 'fp32', adapter_bytes 2 or 4; got {rank}, {master!r}, "
            f"{adapter_bytes}."
        )
    gpu = DEVICES[device.lower()]
    adapters = rank * sum(inputs + outputs for inputs, outputs in arch.linears)
    masked = arch.parameters - (0 if train_embeddings else arch.embeddings)
    density = 1 - sparsity
    active = round(density * masked)
    entry = 8 + (2 if master == "residual" else 4)  # moments and master weight of an active entry
    weights, embedding = 2 * arch.parameters, 2 * arch.embeddings
    sums = 2 * embedding if arch.tied else 0  # a tied embedding's second gradient, and their sum
    window = min(CAPTURE_WINDOW + 2 * arch.largest, 2 * masked)
    arms = [
        _arm(
            "dense AdamW", arch, job, gpu, trained=arch.parameters, weights=weights, gradients=2 * arch.parameters,
            compact=0, state=4 * arch.parameters, late=sums, update=_dense_update(arch.parameters, 2, gpu),
            train_head=True,
        ),
        _arm(
            f"LoRA r={rank}", arch, job, gpu, trained=adapters, weights=weights + adapter_bytes * adapters,
            gradients=adapter_bytes * adapters, compact=0, state=2 * adapter_bytes * adapters,
            update=_dense_update(adapters, adapter_bytes, gpu), rank=rank, adapter_bytes=adapter_bytes,
        ),
        _arm(
            f"sparse {100 * density:.3g}%", arch, job, gpu, trained=active, weights=weights, gradients=0,
            compact=4 * active, state=int(active * (entry + _index_bytes(density))),
            window=window, late=sums + embedding if train_embeddings else 0,
            update=_sparse_update(masked, active, density, entry - 8, gpu),
            train_head=train_embeddings,
        ),
        *(_structured_arm(Structure(kind, density), arch, job, gpu, entry) for kind in ("column", "row")),
    ]  # fmt: skip
    return {
        "device": {"name": gpu.name, "memory_gib": gpu.memory, "measured": gpu.measured},
        "model": {"parameters": arch.parameters, "embedding_parameters": arch.embeddings, "layers": arch.layers},
        "tokens": job.tokens,
        "arms": arms,
        "conclusion": _conclusion(arms),
        "assumptions": _assumptions(gpu, job, train_embeddings),
    }


def _structured_arm(structure: Structure, arch: Architecture, job: Job, gpu: Device, entry: int) -> dict[str, Any]:
    active, masked = structure.active(arch), sum(inputs * outputs for inputs, outputs in arch.linears)
    # Rows as they are stored: of outputs in Conv1D.
    width = math.gcd(*(outputs if arch.family == "gpt2" else inputs for inputs, outputs in arch.linears))
    run = next((r for r in RUNS if width % r == 0), 1) if structure.kind == "row" else 1
    return _arm(
        f"{structure.kind}s {100 * structure.density:.3g}%", arch, job, gpu, trained=active, weights=2 * arch.parameters,
        gradients=0, compact=4 * active, state=int(active * (entry + _index_bytes(structure.density, run))),
        late=min(CAPTURE_WINDOW, 2 * active),
        update=_structured_update(structure, masked, active, entry - 8, gpu), structure=structure,
    )  # fmt: skip


def _index_bytes(density: float, run: int = 1) -> float:
    """Offset of an active entry and its share of the chunk table."""
    offset, chunk = (2, 1024) if density >= DENSEST_INT32 or run > 1 else (4, 4096)
    return offset / run + 48 / chunk


def _arm(
    name: str,
    arch: Architecture,
    job: Job,
    gpu: Device,
    *,
    trained: int,
    weights: int,
    gradients: int,
    compact: int,
    state: int,
    update: float,
    window: int = 0,
    late: int = 0,
    rank: int | None = None,
    adapter_bytes: int = 2,
    train_head: bool = False,
    structure: Structure | None = None,
) -> dict[str, Any]:
    """One row: ``compact`` gradients are there all the time, dense ``gradients`` from backward to step; ``window`` waits to
    be gathered during backward, ``late`` comes at its end."""
    kept = activations(arch, job, rank=rank, adapter_bytes=adapter_bytes, train_head=train_head, structure=structure)
    always = weights + state + compact + LIBRARY_BYTES
    held = kept["layers"] + kept["end"]
    logits = BYTES_PER_LOGIT * job.predicted * arch.vocabulary
    again = kept["layer"] if job.gradient_checkpointing else 0
    # Gradients of a layer's widest tensors, and of the residual stream in fp32.
    working = job.tokens * (6 * arch.intermediate + 12 * arch.hidden)
    first = 2 * arch.vocabulary * arch.hidden if train_head else 0
    moments = {
        "the loss": always + held + logits,
        "the start of backward": always + held + again + working + first + window,
        "the end of backward": always + gradients + window + late + again + working,
        "the optimizer step": always + gradients,
    }
    peak_at = max(moments, key=lambda moment: moments[moment])
    timing = _times(arch, job, gpu, kept, rank, adapter_bytes, train_head, structure)
    if compact:
        timing["host"] += CAPTURE_HOOK * (arch.tensors if structure is None else len(arch.linears))
    return {
        "name": name,
        "trained": trained,
        "weights": weights,
        "gradients": gradients + compact,
        "state": state,
        "activations": held + logits,
        "peak": moments[peak_at],
        "peak_at": peak_at,
        "step_ms": round(1e3 * (max(timing["gpu"], timing["host"]) + update), 1),
        "compute_ms": round(1e3 * timing["gpu"], 1),
        "launch_ms": round(1e3 * timing["host"], 1),
        "optimizer_ms": round(1e3 * update, 2),
    }


def _times(
    arch: Architecture,
    job: Job,
    gpu: Device,
    kept: Mapping[str, int],
    rank: int | None,
    adapter_bytes: int,
    head: bool,
    structure: Structure | None,
) -> dict[str, float]:
    """Seconds of forward and backward: what the GPU works, and what the host needs to launch it."""
    n, predicted = job.tokens, job.predicted
    matrices = 2 * n * sum(inputs * outputs for inputs, outputs in arch.linears)
    top = 2 * predicted * arch.hidden * arch.vocabulary
    attention = 2 * n * job.seq * arch.heads * arch.head_dim * arch.layers  # causal: half of 4
    forward = matrices + top + attention
    backward = matrices + top + 2.5 * attention  # of inputs
    if structure is not None:
        backward += matrices * structure.active(arch) / sum(inputs * outputs for inputs, outputs in arch.linears)
        kept = activations(arch, job)  # what is not kept is written and read all the same
    elif rank is None:
        backward += matrices + (top if head else 0)  # of weights
    else:
        backward += 6 * n * rank * sum(inputs + outputs for inputs, outputs in arch.linears)
    repeats = 2 if job.gradient_checkpointing else 1
    traffic = (2 + 2 * repeats) * (kept["layer"] * arch.layers + kept["end"]) + 20 * predicted * arch.vocabulary
    work = (repeats * forward + backward) / (COMPUTE_SHARE * gpu.flops) + traffic / gpu.bandwidth

    ahead, back = KERNELS[arch.family]
    per_layer = len(arch.linears) // arch.layers
    if structure is not None:
        ahead, back = ahead + per_layer * STRUCTURED_KERNELS[0], back + per_layer * STRUCTURED_KERNELS[1]
    if rank is not None:
        more = ADAPTER_KERNELS[adapter_bytes]
        ahead, back = ahead + per_layer * more[0], back + per_layer * (more[1] - 1)  # no gradient of the weight
    host = arch.layers * (repeats * ahead * FORWARD_LAUNCH + back * BACKWARD_LAUNCH)
    return {"gpu": work, "host": host + OTHER_KERNELS[0] * FORWARD_LAUNCH + OTHER_KERNELS[1] * BACKWARD_LAUNCH}


def _dense_update(count: int, size: int, gpu: Device) -> float:
    """Seconds of clipping (norm: one read; scaling: read and write) and torch's fused AdamW (reads 4, writes 3)."""
    return count * size * (3 + 7) / (DENSE_STEP_SHARE * gpu.bandwidth)


def _sparse_update(masked: int, active: int, density: float, master: int, gpu: Device) -> float:
    """Seconds of gathering gradients and of the step: 64-byte pieces of gradients (read) and weights (read and written)
    that hold an active entry, and the compact arrays."""
    touched = 1 - (1 - density) ** 32
    compact = 4 + 4 + 2 * 2 + 16 + 2 * master  # gradient written and read, index twice, moments, master weight
    return (masked * touched * (2 + 4) + active * compact) / gpu.bandwidth


def _structured_update(structure: Structure, masked: int, active: int, master: int, gpu: Device) -> float:
    """The same where the parts of gradients (2 bytes an entry) are all that is read of them; rows are whole pieces."""
    density = active / masked
    touched = density if structure.kind == "row" else 1 - (1 - density) ** 32
    compact = 2 + 4 + 4 + 2 + 16 + 2 * master  # part, gradient written and read, index once, moments, master weight
    return (masked * touched * 4 + active * compact) / gpu.bandwidth


# ---- telling ---------------------------------------------------------------------------------------------------------
def fits(peak: int, card: int) -> bool:
    """Whether a peak fits a card of so many GiB: 5% for fragmentation and 0.7 GiB for CUDA and its libraries are added."""
    return 1.05 * peak + 0.7 * 2**30 <= card * 2**30


def _conclusion(arms: list[dict[str, Any]]) -> str:
    """The smallest card that tells the arms apart, or that holds them all."""
    for card in CARDS:
        inside = [arm["name"] for arm in arms if fits(arm["peak"], card)]
        outside = [arm["name"] for arm in arms if not fits(arm["peak"], card)]
        if not inside:
            continue
        text = f"Fits in {card} GiB: {', '.join(inside)}"
        if not outside:
            return f"{text}."
        sizes = []
        for arm in arms:
            if arm["name"] in outside:
                size = next((f"{c} GiB" for c in CARDS if fits(arm["peak"], c)), f"more than {CARDS[-1]} GiB")
                sizes.append(f"{arm['name']} ({size})")
        return f"{text}; not {', '.join(sizes)}."
    return f"Nothing here fits in {CARDS[-1]} GiB."


def _assumptions(gpu: Device, job: Job, train_embeddings: bool) -> list[str]:
    lines = [
        "bf16 weights, eager transformers with flash attention, gradients clipped, one micro-batch of full sequences; "
        "dense: fused AdamW with bf16 moments; sparse: captured gradients, embeddings and head "
        + ("in the mask." if train_embeddings else "not in the mask."),
        "Columns and rows: sparse_linear; that share of every linear layer's weight as it is stored (GPT-2's are transposed), "
        "embeddings, head, norms and biases frozen. Columns keep the input features that train only (GPT-2: rows do).",
        "Memory is what torch allocates (max_memory_allocated); fragmentation and some 0.7 GiB of CUDA and its libraries "
        "come on top.",
        f"Time is an estimate: the larger of GPU work ({100 * COMPUTE_SHARE:.0f}% of {gpu.flops / 1e12:.0f} TFLOP/s, "
        f"{gpu.bandwidth / 1e12:.2f} TB/s) and kernel launches ({1e6 * FORWARD_LAUNCH:.0f} us each in an eager forward, "
        f"{1e6 * BACKWARD_LAUNCH:.0f} us in backward, as on one test machine), plus the optimizer. Left out: data loading, "
        "generation, communication, compilation or CUDA graphs (which remove launches), and poor tile sizes of small batches.",
    ]
    if not gpu.measured:
        lines.append(f"Figures of the {gpu.name} come from its data sheet; nothing was measured on one.")
    if job.workload != "lm":
        lines.append("Reference log-probabilities and generation are not part of the step.")
    return lines
