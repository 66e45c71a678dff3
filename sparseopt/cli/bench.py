"""``sparseopt bench``: flags are handed on; :mod:`sparseopt.benchmarks` measures."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from sparseopt.cli._command import Command, DebugFlag, DeviceOption, JsonFlag, example, group, print_json

app = group(
    "bench",
    help="Measure speed and memory against the best of what people have.",
    epilog=example("sparseopt bench optimizer", "sparseopt bench lm --help"),
)

Shape = Annotated[
    str | None,
    typer.Option(
        "--shape",
        help="llama-3.2-1b, llama-3.2-3b, llama-3.1-8b, qwen2.5-0.5b or gpt2: that model's shapes with random weights.",
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "--model_name",
        help="smollm2, a local folder or a Hub name (google/gemma-3-270m-it where real rows are asked for).",
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="SOURCE",
        help="Real rows: reasoning_gym:TASK, a local file or a Hub dataset (Light-R1 for dpo, OpenR1 for grpo).",
    ),
]
Subset = Annotated[
    int | None, typer.Option("--subset_size", help="Real rows: how many; batches go round them (dpo 100, grpo 10).")
]
Checkpoint = Annotated[
    str | None,
    typer.Option(
        "--checkpoint", metavar="FOLDER", help="Real rows: begin with these weights (a model's or a run's), or None."
    ),
]
Mask = Annotated[str | None, typer.Option("--mask", metavar="FILE", help="Mask file: adds the arm sparse@mask.")]
Generations = Annotated[int | None, typer.Option("--num_generations", help="Completions of a real prompt (grpo: 8).")]
Completion = Annotated[
    int | None, typer.Option("--max_completion_length", help="Tokens of a completion (grpo, real prompts: 256).")
]
Arms = Annotated[
    list[str] | None,
    typer.Option(
        "--arms",
        metavar="NAME...",
        help="dense-fused, dense-foreach, lora, adamw8bit, sparse, sparse/runs16, sparse/columns, sparse/rows, sparse@2.5%, "
        "sparse@2.5%/columns; also comma-separated. Default: the first six.",
    ),
]
Density = Annotated[
    list[str] | None,
    typer.Option("--density", metavar="SHARE...", help="Densities of sparse arms (default 2.5% 0.25%)."),
]
Batch = Annotated[
    int,
    typer.Option(
        "--batch", "--batch_size", help="Sequences of a micro-batch (dpo: pairs; grpo on real rows: prompts)."
    ),
]
Seq = Annotated[int, typer.Option("--seq", help="Tokens of a sequence; of real rows at most.")]
Rounds = Annotated[int, typer.Option("--rounds", "--n_steps", help="Timed steps of each arm.")]
Warmup = Annotated[int, typer.Option("--warmup", help="Untimed steps of each arm before them, in each pass.")]
Passes = Annotated[int, typer.Option("--passes", help="Turns over the list of arms; rounds are split over them.")]
Mode = Annotated[
    str | None,
    typer.Option(
        "--mode",
        help="eager (default), compiled (by layer), whole, graphs (whole, as CUDA graphs), or both (the first two).",
    ),
]
Compile = Annotated[bool, typer.Option("--compile", help="Compile each decoder layer: --mode compiled.")]
Together = Annotated[
    bool, typer.Option("--together", help="All arms at once, a process each: they compile together, timed in turns.")
]
Checkpointing = Annotated[bool, typer.Option("--gradient_checkpointing", help="Recompute activations in backward.")]
Accumulation = Annotated[int, typer.Option("--accumulation", help="Micro-batches of a step.")]
Master = Annotated[str, typer.Option("--master", help="Master weights of sparse arms: residual or fp32.")]
Dtype = Annotated[str, typer.Option("--dtype", help="Of the weights: bfloat16 or float32.")]
Output = Annotated[
    str | None, typer.Option("--output", metavar="FOLDER", help="Store JSON, a Markdown table and a PNG here.")
]
ResultsDir = Annotated[
    str | None,
    typer.Option(
        "--results_dir",
        metavar="FOLDER",
        help="Write FOLDER/RUN/timing_info.json, report.md and timing.png (default with real rows or --run_name: results).",
    ),
]
RunName = Annotated[
    str | None, typer.Option("--run_name", metavar="RUN", help="That folder's name (workload, model, batch size).")
]


EXAMPLES = {
    "dpo": (
        "sparseopt bench dpo --n_steps 100 --batch_size 1 --subset_size 100",
        "sparseopt bench dpo --model smollm2 --data reasoning_gym:chain_sum --mask masks/found.safetensors --n_steps 20",
        "sparseopt bench dpo --shape llama-3.2-1b --batch 2 --seq 1024 --output results",
        "sparseopt bench dpo --model smollm2 --arms dense-fused lora sparse@2.5% --device cpu --seq 64",
    ),
    "grpo": (
        "sparseopt bench grpo --checkpoint None --n_steps 50 --batch_size 1 --subset_size 10",
        "sparseopt bench grpo --model smollm2 --data reasoning_gym:chain_sum --num_generations 4 --arms dense-fused lora sparse",
        "sparseopt bench grpo --shape qwen2.5-0.5b --batch 8 --seq 1024 --mode both",
        "sparseopt bench grpo --model smollm2 --batch 4 --gradient_checkpointing --json",
    ),
    "lm": (
        "sparseopt bench lm --shape llama-3.2-3b --batch 1 --seq 512 --output results",
        "sparseopt bench lm --shape llama-3.2-3b --arms dense-fused sparse --density 2.5% 10% --compile",
        "sparseopt bench lm --shape llama-3.2-3b --arms dense-fused sparse/columns lora --density 2.5% --mode graphs --together",
    ),
}
COMMON = """

    Arms: dense AdamW of torch (fused, foreach), LoRA (PEFT, r=16, all linear layers), 8-bit AdamW (bitsandbytes), and
    SparseAdamW with gradient capture at several densities; embeddings and the head are left out of its masks, as LoRA
    leaves them. Every sparse arm is checked against dense AdamW first: if that fails, no speed is shown (exit code 1).
    """
REAL = """

    --data, --subset_size or --checkpoint time it on real rows in place of random tokens, and keep
    results/RUN/timing_info.json, report.md and timing.png.
    """


def _train_step(workload: str, text: str) -> None:
    """Adds the command that measures whole training steps of one workload."""

    def command(
        shape: Shape = None,
        model: Model = None,
        arms: Arms = None,
        density: Density = None,
        batch: Batch = 1,
        seq: Seq = 512,
        rounds: Rounds = 20,
        warmup: Warmup = 5,
        passes: Passes = 2,
        mode: Mode = None,
        compile_: Compile = False,
        together: Together = False,
        gradient_checkpointing: Checkpointing = False,
        accumulation: Accumulation = 1,
        master: Master = "residual",
        dtype: Dtype = "bfloat16",
        device: DeviceOption = "auto",
        data: Data = None,
        subset_size: Subset = None,
        checkpoint: Checkpoint = None,
        mask: Mask = None,
        num_generations: Generations = None,
        max_completion_length: Completion = None,
        output: Output = None,
        results_dir: ResultsDir = None,
        run_name: RunName = None,
        json: JsonFlag = False,
        debug: DebugFlag = False,
    ) -> None:
        real = any(value is not None for value in (data, subset_size, checkpoint))
        if (shape and model) or not (shape or model or real):
            raise typer.BadParameter("give one of --shape and --model, or real rows by --data or --subset_size.")
        values = {
            "workload": workload, "shape": shape, "model": model, "arms": ",".join(arms or []) or None,
            "density": ",".join(density or []) or None, "batch": batch, "seq": seq, "rounds": rounds,
            "warmup": warmup, "passes": passes, "mode": mode, "accumulation": accumulation, "master": master,
            "dtype": dtype, "device": device, "data": data, "subset_size": subset_size, "checkpoint": checkpoint,
            "mask": mask, "num_generations": num_generations, "max_completion_length": max_completion_length,
            "output": output, "results_dir": results_dir, "run_name": run_name,
        }  # fmt: skip
        flags = {
            "compile": compile_, "together": together, "gradient_checkpointing": gradient_checkpointing, "json": json,
            "debug": debug,
        }  # fmt: skip
        arguments = [f"--{name}={value}" for name, value in values.items() if value is not None]
        arguments += [f"--{name}" for name, given in flags.items() if given]

        from sparseopt.benchmarks import train_step

        _exit(train_step.main(arguments, prog=f"sparseopt bench {workload}"))

    command.__doc__ = text + (COMMON if workload == "lm" else COMMON + REAL)
    app.command(workload, cls=Command, epilog=example(*EXAMPLES[workload]))(command)


_train_step("dpo", "Whole DPO training steps in time and memory: pairs of real rows or random tokens, given reference.")
_train_step(
    "grpo", "Whole GRPO updates in time and memory, on sampled or random completions; generation is timed apart."
)
_train_step("lm", "Whole training steps with the next-token loss, in time and memory, on random tokens.")


def _suite(suite: str, text: str) -> None:
    """Adds the command that measures one suite of kernels."""

    def command(
        device: DeviceOption = "auto",
        output: Annotated[
            str | None, typer.Option("--output", metavar="FOLDER", help="Store FOLDER/<device>.json.")
        ] = None,
        json: JsonFlag = False,
        debug: DebugFlag = False,
    ) -> None:
        from sparseopt.progress import announce_device

        if announce_device(device).type == "cuda":
            _on_gpu(suite, output, json)
        else:
            _on_cpu(suite, output, json)

    command.__doc__ = text
    lines = (f"sparseopt bench {suite} --output results", f"sparseopt bench {suite} --device cpu")
    app.command(suite, cls=Command, epilog=example(*lines))(command)


def _on_gpu(suite: str, output: str | None, json: bool) -> None:
    from sparseopt.benchmarks import gpu_masks, gpu_optimizer

    run = {"optimizer": gpu_optimizer.main, "masks": gpu_masks.main}[suite]
    if not json:
        run(output)
        return
    with tempfile.TemporaryDirectory() as temporary, contextlib.redirect_stdout(sys.stderr):
        run(output or temporary)
        newest = max(Path(output or temporary).glob("*.json"), key=lambda path: path.stat().st_mtime)
        text = newest.read_text()
    print(text, end="")


def _on_cpu(suite: str, output: str | None, json: bool) -> None:
    from sparseopt.benchmarks import report

    summary = report.run_suite(suite)
    if output is not None:
        print(f"stored in {report.merge(summary, Path(output))}", file=sys.stderr)
    if json:
        print_json(summary)
    else:
        print(report.table(summary["cases"]))


_suite("optimizer", "One optimizer step: SparseAdamW at several densities against torch's fused and default AdamW.")
_suite("masks", "Packing, unpacking and indices of masks against numpy and torch.")


@app.command(
    "projection",
    cls=Command,
    epilog=example(
        "sparseopt bench projection --shape gpt2 --batch 16 --seq 1024 --mode eager compiled --output results",
        "sparseopt bench projection --model smollm2 --batch 4 --seq 256 --dtype float32 --device cpu --rounds 7",
    ),
)
def projection(
    shape: Shape = None,
    model: Annotated[
        str | None, typer.Option("--model", "--model_name", help="smollm2, a local folder or a Hub name.")
    ] = None,
    batch: Annotated[int, typer.Option("--batch", "--batch_size", help="Samples of a pass.")] = 16,
    seq: Annotated[int, typer.Option("--seq", help="Tokens of a sample.")] = 1024,
    layers: Annotated[str, typer.Option("--layers", help="Patterns, as --proj_layers takes them.")] = "mlp,attn",
    rank_total: Annotated[int, typer.Option("--rank_total", help="Values per layer.")] = 256,
    dtype: Annotated[str, typer.Option("--dtype", help="Of the weights: bfloat16, float16 or float32.")] = "bfloat16",
    mode: Annotated[
        list[str] | None, typer.Option("--mode", metavar="NAME...", help="eager (default), compiled, graph.")
    ] = None,
    arms: Annotated[
        list[str] | None,
        typer.Option(
            "--arms",
            metavar="NAME...",
            help="plain, 'no weight gradients', 'naive hooks', sparseopt (default: all; plain and sparseopt are needed).",
        ),
    ] = None,
    rounds: Annotated[int, typer.Option("--rounds", help="Timed passes of each arm.")] = 15,
    device: DeviceOption = "auto",
    output: Annotated[
        str | None, typer.Option("--output", metavar="FOLDER", help="Store FOLDER/<device>.json.")
    ] = None,
    json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Projecting per-sample gradients against a plain forward and backward pass, in time and memory.

    Projections are compared with exact gradients of single samples first: if that fails, no speed is shown.
    """
    if (shape is None) == (model is None):
        raise typer.BadParameter("give one of --shape and --model.")
    values = {
        "shape": shape, "model": model, "batch": batch, "seq": seq, "layers": layers, "rank_total": rank_total,
        "dtype": dtype, "rounds": rounds, "device": device, "output": output,
    }  # fmt: skip
    arguments = [f"--{name}={value}" for name, value in values.items() if value is not None]
    for name, given in (("mode", mode), ("arms", arms)):
        arguments += [f"--{name}", *given] if given else []

    from sparseopt.benchmarks import projection as benchmark

    benchmark.main([*arguments, *(["--json"] if json else [])], prog="sparseopt bench projection")


@app.command(
    "report",
    cls=Command,
    epilog=example(
        "sparseopt bench report",
        "sparseopt bench report --results results --readme results/README.md",
    ),
)
def report(
    results: Annotated[
        str | None, typer.Option("--results", metavar="FOLDER", help="Result files (default: benchmarks/results).")
    ] = None,
    readme: Annotated[
        str | None, typer.Option("--readme", metavar="FILE", help="File with the tables (benchmarks/README.md).")
    ] = None,
    debug: DebugFlag = False,
) -> None:
    """Rewrites the tables of benchmarks/README.md from the stored results."""
    from sparseopt.benchmarks import report as reporting

    target = Path(readme) if readme else reporting.HERE / "README.md"
    source = Path(results) if results else reporting.HERE / "results"
    if not source.is_dir():  # tables of nothing would take the place of those that are there
        raise FileNotFoundError(f"there is no folder of results '{source}'.")
    reporting.render(source, target)
    print(f"Tables: {target}")


def _exit(code: int) -> None:
    if code:
        raise typer.Exit(code)
