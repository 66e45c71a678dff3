"""``sparseopt project``: per-sample gradient projections, exact gradients, their errors, and searches."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparseopt._processes import own_device, position
from sparseopt.cli import project_analysis
from sparseopt.cli._command import Command, DebugFlag, DeviceOption, JsonFlag, example, group, print_json

if TYPE_CHECKING:
    from sparseopt.projection.pipeline import Data, ModelSource

app = group("project", help="Project per-sample gradients of a language model to few dimensions, and use them.")

ArchitectureOption = Annotated[
    str, typer.Option("--architecture", help="GPT2-Small, GPT2-Medium or GPT2-Large, with the published weights.")
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model", help="Instead of an architecture: smollm2, a model folder or a Hub name of a causal model."
    ),
]
WeightsOption = Annotated[
    str | None, typer.Option("--weights", help="Folder or Hub name with other weights of the architecture.")
]
RandomFlag = Annotated[
    bool,
    typer.Option(
        "--random_weights", help="Draw the weights (by --seed): for speed and tests; --model then names a shape."
    ),
]
TokenizerOption = Annotated[
    str | None,
    typer.Option("--tokenizer", help="Folder or name (default: the model's; bytes where weights are random)."),
]
DataOption = Annotated[
    str,
    typer.Option(
        "--data",
        help="Text: a .txt, .md, .jsonl, .json, .parquet or .csv file, a folder of texts, pile, or a Hub dataset.",
    ),
]
ColumnOption = Annotated[str, typer.Option("--text_column", help="Column of a table that holds the text.")]
SamplesOption = Annotated[
    int | None, typer.Option("--max_samples", min=1, help="Number of samples (default: the whole data set).")
]
BlockOption = Annotated[int, typer.Option("--block_size", min=2, help="Tokens of a sample.")]
DocumentFlag = Annotated[
    bool,
    typer.Option("--per_document", help="A document is a sample, cut at --block_size, instead of blocks of the text."),
]
SeedOption = Annotated[int, typer.Option("--seed", help="Of the order of the documents, and of random weights.")]
ModelDtypeOption = Annotated[str, typer.Option("--model_dtype", help="float32, float16 or bfloat16.")]
VerboseFlag = Annotated[bool, typer.Option("--verbose", help="Print the layers that are projected, and all settings.")]
PILE = "pile"


def _source(architecture: str, model: str | None, weights: str | None, random_weights: bool, tokenizer: str | None,
            dtype: str) -> ModelSource:  # fmt: skip
    from sparseopt.projection.pipeline import ModelSource

    if dtype not in ("float32", "float16", "bfloat16"):
        raise typer.BadParameter(f"--model_dtype is float32, float16 or bfloat16, got {dtype!r}.")
    return ModelSource(architecture, model, weights, random_weights, tokenizer, dtype)


def _data(source: str, column: str, block_size: int, max_samples: int | None, per_document: bool, seed: int) -> Data:
    from sparseopt.projection.pipeline import Data

    return Data(source, column, block_size, max_samples, per_document, seed)


@app.command(
    "run",
    cls=Command,
    epilog=example(
        "sparseopt project run --model smollm2 --data docs/ --block_size 256 --max_samples 1000 --output_dir projections",
        "sparseopt project run --architecture GPT2-Small --batch_size 4 --proj_layers mlp,attn --proj_rank_total 256",
        "torchrun --nproc_per_node 8 -m sparseopt project run --model smollm2 --data docs/ --block_size 256",
        "sparseopt project run --random_weights --data notes.txt --block_size 128 --max_samples 8   # no download",
    ),
)
def run(
    architecture: ArchitectureOption = "GPT2-Small",
    model: ModelOption = None,
    weights: WeightsOption = None,
    random_weights: RandomFlag = False,
    tokenizer: TokenizerOption = None,
    data: DataOption = PILE,
    text_column: ColumnOption = "text",
    per_document: DocumentFlag = False,
    proj_layers: Annotated[
        str,
        typer.Option(
            "--proj_layers",
            help="Comma-separated parts of layer paths: mlp, attn, mlp.c_fc, transformer.h.1 (not h.10).",
        ),
    ] = "mlp,attn",
    proj_rank_total: Annotated[int, typer.Option("--proj_rank_total", min=1, help="Values per layer.")] = 256,
    proj_rank_min: Annotated[int, typer.Option("--proj_rank_min", min=1, help="Least k_i and k_o.")] = 8,
    proj_seed: Annotated[int, typer.Option("--proj_seed", help="Seed of the projection matrices.")] = 42,
    proj_dtype: Annotated[
        str, typer.Option("--proj_dtype", help="Of the stored projections: float16, bfloat16 or float32.")
    ] = "bfloat16",
    proj_row_orthonormal: Annotated[
        bool, typer.Option("--proj_row_orthonormal", help="Matrices with orthogonal rows.")
    ] = False,
    proj_method: Annotated[
        str, typer.Option("--proj_method", help="Entries of the matrices: gaussian or rademacher.")
    ] = ("gaussian"),
    proj_shape_rule: Annotated[
        str, typer.Option("--proj_shape_rule", help="square (k_i = k_o), or aspect (k_i / k_o = d_out / d_in).")
    ] = "square",
    proj_sketch: Annotated[
        int | None,
        typer.Option(
            "--proj_sketch",
            min=1,
            help="Two-stage sketch: K x K values inside, folded to --proj_rank_total. With 128 and 256 values, the error of "
            "a layer's squared norm falls from 50% to 20% (rank-1 gradients), from 33% to 14% (64 tokens of text); more work.",
        ),
    ] = None,
    include_embeddings: Annotated[bool, typer.Option("--include_embeddings", help="Project embeddings too.")] = False,
    include_biases: Annotated[bool, typer.Option("--include_biases", help="Project biases of the layers too.")] = False,
    proj_save_interval: Annotated[
        int, typer.Option("--proj_save_interval", min=1, help="Batches that are saved together; none is lost.")
    ] = 1,
    batch_size: Annotated[int, typer.Option("--batch_size", min=1, help="Samples of a batch.")] = 2,
    max_samples: SamplesOption = None,
    block_size: BlockOption = 1024,
    seed: SeedOption = 42,
    output_dir: Annotated[
        Path,
        typer.Option("--output_dir", metavar="DIR", help="Folder of the projections; an unfinished run goes on there."),
    ] = Path("./projections"),
    results_dir: Annotated[
        Path | None,
        typer.Option(
            "--results_dir", metavar="DIR", help="Instead: a folder in here, named by the settings (plot-error)."
        ),
    ] = None,
    model_dtype: ModelDtypeOption = "bfloat16",
    worker: Annotated[
        int | None,
        typer.Option("--worker", min=0, help="Number of this process, from 0 (default: what torchrun says)."),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option("--workers", min=1, help="Processes that fill the folder (default: what torchrun says)."),
    ] = None,
    cuda_graph: Annotated[
        bool, typer.Option("--cuda_graph", help="Replay full batches as a CUDA graph: faster where batches are small.")
    ] = False,
    export_pt: Annotated[
        bool, typer.Option("--export_pt/--no_export_pt", help="Write proj_iter_000001.pt ... at the end.")
    ] = True,
    verbose: VerboseFlag = False,
    device: DeviceOption = "auto",
    json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Project each sample's gradient; the same command goes on after Ctrl-C or a kill.

    Weight gradients are never computed: projecting takes less time than an ordinary forward and backward pass.
    """
    from sparseopt.progress import announce_device
    from sparseopt.projection.pipeline import Projection, ProjectRun

    rank, world = position()
    launched = worker is None and workers is None
    number, count = rank if worker is None else worker, world if workers is None else workers
    settings = Projection(
        proj_layers, proj_rank_total, proj_rank_min, proj_seed, proj_dtype, proj_row_orthonormal, include_embeddings,
        proj_method, include_biases, proj_shape_rule, proj_sketch,
    )  # fmt: skip
    job = ProjectRun(
        _source(architecture, model, weights, random_weights, tokenizer, model_dtype),
        _data(data, text_column, block_size, max_samples, per_document, seed),
        announce_device(own_device(device)), settings,
        output_dir=None if results_dir is not None else output_dir, results_dir=results_dir or Path(),
        batch_size=batch_size, save_interval=proj_save_interval, worker=number, workers=count, together=launched,
        cuda_graph=cuda_graph, export=export_pt,
    )  # fmt: skip
    found = job.execute()
    if launched and number:
        return
    if json:
        print_json(found)
        return
    if verbose:
        _tell(found)
    share = found["coverage"]["share"]
    print(
        f"{found['output_dir']}: {found['samples_stored']:,} samples, {found['total_proj_dim']:,} values each, of {share:.1%} "
        f"of the parameters; weights: {found['weights']}"
    )
    if "mean_loss" in found:
        print(f"mean loss {found['mean_loss']:.4f}, {found['tokens_per_second']:,.0f} tokens/s")
    if "exported_files" in found:
        print(f"{found['exported_files']} new files proj_iter_*.pt")


def _tell(found: dict[str, Any]) -> None:
    from sparseopt.projection.store import ProjectionStore

    metadata = ProjectionStore(found["output_dir"]).metadata
    for key, value in metadata.items():
        if key != "layers":
            print(f"{key}: {value}")
    for layer in metadata["layers"]:
        print(
            f"{layer['name']}: {layer['type']} {layer['original_shape']}, k_o {layer['k_o']}, k_i {layer['k_i']}, "
            f"columns {layer['slice_start']} to {layer['slice_end']}"
        )


@app.command(
    "full-grads",
    cls=Command,
    epilog=example("sparseopt project full-grads --model smollm2 --data docs/ --block_size 256 --max_samples 20"),
)
def full_grads(
    architecture: ArchitectureOption = "GPT2-Small",
    model: ModelOption = None,
    weights: WeightsOption = None,
    random_weights: RandomFlag = False,
    tokenizer: TokenizerOption = None,
    data: DataOption = PILE,
    text_column: ColumnOption = "text",
    per_document: DocumentFlag = False,
    batch_size: Annotated[int, typer.Option("--batch_size", help="1: gradients are of single samples.")] = 1,
    max_samples: SamplesOption = None,
    block_size: BlockOption = 1024,
    seed: SeedOption = 42,
    model_dtype: ModelDtypeOption = "bfloat16",
    train_dtype: Annotated[
        str, typer.Option("--train_dtype", help="Of the weights while gradients are computed; files are fp32.")
    ] = "bfloat16",
    output_dir: Annotated[
        Path, typer.Option("--output_dir", metavar="DIR", help="fullgrads_... is made in here.")
    ] = Path("./Results"),
    device: DeviceOption = "auto",
    json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Write exact gradients of single samples, which plot-error compares projections with (4 bytes a parameter each)."""
    if batch_size != 1:
        raise typer.BadParameter(f"--batch_size must be 1: gradients are of single samples, got {batch_size}.")
    if max_samples is None:
        raise typer.BadParameter("--max_samples is needed: a file takes 4 bytes a parameter.")
    if train_dtype not in ("float32", "float16", "bfloat16"):
        raise typer.BadParameter(f"--train_dtype is float32, float16 or bfloat16, got {train_dtype!r}.")
    from sparseopt.progress import announce_device
    from sparseopt.projection.pipeline import FullRun

    found = FullRun(
        _source(architecture, model, weights, random_weights, tokenizer, model_dtype),
        _data(data, text_column, block_size, max_samples, per_document, seed),
        announce_device(device), train_dtype, output_dir,
    ).execute()  # fmt: skip
    if json:
        print_json(found)
        return
    print(f"{found['output_dir']}: {found['samples']} samples, {found['total_param_dim']:,} entries each")


app.command("plot-error", cls=Command, epilog=project_analysis.PLOT_EXAMPLE)(project_analysis.plot_error)
app.command("query", cls=Command, epilog=project_analysis.QUERY_EXAMPLE)(project_analysis.query)
