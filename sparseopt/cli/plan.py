"""``sparseopt plan``: prints :func:`sparseopt.planning.plan`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparseopt.cli._command import DebugFlag, JsonFlag, example, print_json

if TYPE_CHECKING:
    from transformers import PretrainedConfig

EXAMPLE = example(
    "sparseopt plan --shape llama-3.2-3b --sparsity 0.975 --batch 1 --seq 512",
    "sparseopt plan --model smollm2 --batch 8 --seq 1024 --gradient_checkpointing --device h200",
)
_ADAPTERS = {"bf16": 2, "fp32": 4}


def plan(
    model: Annotated[
        str | None, typer.Option("--model", metavar="NAME_OR_PATH", help="smollm2, a local folder or a Hub name.")
    ] = None,
    shape: Annotated[
        str | None, typer.Option("--shape", metavar="NAME", help="A known model's shape, such as llama-3.2-3b.")
    ] = None,
    sparsity: Annotated[float, typer.Option("--sparsity", help="Share of inactive entries, [0, 1).")] = 0.975,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Sequences of a step (dpo: pairs).")] = 1,
    seq: Annotated[int, typer.Option("--seq", min=1, help="Tokens of a sequence.")] = 512,
    workload: Annotated[
        str, typer.Option("--workload", help="lm, dpo or grpo, as `sparseopt bench` runs them.")
    ] = "lm",
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient_checkpointing", help="Recompute activations in backward.")
    ] = False,
    rank: Annotated[int, typer.Option("--rank", min=1, help="Of LoRA's adapters, in every linear layer.")] = 16,
    adapters: Annotated[
        str, typer.Option("--adapters", help="dtype of LoRA's adapters: bf16, or fp32 as PEFT makes them by default.")
    ] = "bf16",
    master: Annotated[
        str, typer.Option("--master", help="Master weights of the sparse arm: residual or fp32.")
    ] = "residual",
    embeddings: Annotated[
        bool, typer.Option("--embeddings", help="The mask of single entries has embeddings and head too.")
    ] = False,
    device: Annotated[str, typer.Option("--device", help="h100, h200, a100, l40s or rtx4090.")] = "h100",
    json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Say what a training step needs before it is launched: memory and expected time of dense AdamW, LoRA and sparse.

    Sparse: a mask of single entries, and of whole columns or rows of every linear layer, whose work is skipped. One GPU, bf16,
    gradients clipped. Memory is what torch allocates at the peak of a whole step; time is an estimate.
    """
    if (model is None) == (shape is None):
        raise typer.BadParameter("give either --model or --shape.")
    if adapters not in _ADAPTERS:
        raise typer.BadParameter(f"--adapters must be bf16 or fp32, got {adapters!r}.")
    if master not in ("residual", "fp32"):
        raise typer.BadParameter(f"--master must be residual or fp32, got {master!r}.")
    from sparseopt import planning

    job = planning.Job(batch, seq, workload, gradient_checkpointing)
    if device.lower() not in planning.DEVICES:  # before a model is looked for
        raise ValueError(f"unknown device {device!r}: expected one of {', '.join(planning.DEVICES)}.")
    found = planning.plan(
        _config(model, shape), job, sparsity=sparsity, rank=rank, device=device, train_embeddings=embeddings,
        master=master, adapter_bytes=_ADAPTERS[adapters],
    )  # fmt: skip
    asked = {"model_name": model, "shape": shape, "batch": batch, "seq": seq, "workload": workload,
             "gradient_checkpointing": gradient_checkpointing, "sparsity": sparsity}  # fmt: skip
    if json:
        print_json({**asked, **found})
    else:
        _print(model or f"{shape} (shape)", job, found)


def _config(model: str | None, shape: str | None) -> PretrainedConfig:
    if shape is not None:
        from sparseopt.shapes import shape_config

        return shape_config(shape)
    assert model is not None
    from transformers import AutoConfig

    from sparseopt import models

    source, options = models._locate(model, None)
    with models._one_sentence(model):
        return AutoConfig.from_pretrained(source, **options)


def _print(name: str, job: Any, found: dict[str, Any]) -> None:
    what = f"{job.batch} x {job.seq} tokens" if job.workload != "dpo" else f"{job.batch} pairs of 2 x {job.seq} tokens"
    how = ", gradient checkpointing" if job.gradient_checkpointing else ""
    print(
        f"{name}: {found['model']['parameters']:,} parameters; {job.workload}, {what}{how}; {found['device']['name']}"
    )
    print()
    head = ("GiB", "trained", "weights", "gradients", "state", "activations", "peak", "at", "step, ms")
    rows = [head]
    for arm in found["arms"]:
        sizes = [f"{arm[key] / 2**30:.2f}" for key in ("weights", "gradients", "state", "activations", "peak")]
        rows.append((arm["name"], _count(arm["trained"]), *sizes, arm["peak_at"], f"{arm['step_ms']:.0f}"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        print("  ".join(cells))
    print()
    print(found["conclusion"])
    for line in found["assumptions"]:
        print(f"- {line}")


def _count(number: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)
