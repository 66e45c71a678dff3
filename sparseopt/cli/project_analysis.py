"""``sparseopt project plot-error|query``: flags and printing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, cast

import typer

from sparseopt.cli._command import DebugFlag, DeviceOption, JsonFlag, example, print_json

__all__ = ["PLOT_EXAMPLE", "QUERY_EXAMPLE", "plot_error", "query"]

PLOT_EXAMPLE = example(
    "sparseopt project plot-error --results_dir Results --results_pattern '*min_8_seed_42*' --pattern_type glob \\",
    "    --reference full --num_ref 10",
)
QUERY_EXAMPLE = example(
    "sparseopt project query --query test_projections --base projections --k 5 --metric cosine",
    "sparseopt project query --query test_projections --base projections --influence --layers mlp",
)


def plot_error(
    results_dir: Annotated[
        Path, typer.Option("--results_dir", metavar="DIR", help="Folder of the folders with projections.")
    ],
    results_pattern: Annotated[
        str, typer.Option("--results_pattern", help="Of folder names that differ in rank_total_K only.")
    ],
    pattern_type: Annotated[str, typer.Option("--pattern_type", help="regex or glob.")] = "regex",
    num_ref: Annotated[int, typer.Option("--num_ref", min=1, help="Reference samples to average over.")] = 50,
    max_iters: Annotated[int, typer.Option("--max_iters", min=1, help="Most proj_iter files read per folder.")] = 100,
    reference: Annotated[
        str,
        typer.Option(
            "--reference",
            help="rank=NNN (projections of that rank), full or full_layers (exact gradients, from full-grads), or "
            "naive_proj_layers=NNN (exact gradients times rebuilt matrices).",
        ),
    ] = "rank=1024",
    plots_dir: Annotated[
        Path | None,
        typer.Option("--plots_dir", metavar="DIR", help="Where the files go (default: Plots beside the results)."),
    ] = None,
    device: DeviceOption = "auto",
    json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Draw how well dot products of projections match those of gradients, by rank: three PDFs and a JSON file."""
    if pattern_type not in ("regex", "glob"):
        raise typer.BadParameter(f"--pattern_type is regex or glob, got {pattern_type!r}.")
    if device not in ("auto", "cpu"):
        raise typer.BadParameter(f"errors are analysed on the CPU: --device is auto or cpu, got {device!r}.")
    from sparseopt.projection.errors import analyse

    found = analyse(
        results_dir, results_pattern, pattern_type=cast(Literal["regex", "glob"], pattern_type), num_ref=num_ref,
        max_iters=max_iters, reference=reference, plots_dir=plots_dir,
    )  # fmt: skip
    if json:
        print_json(found)
        return
    print(
        f"reference {found['reference']}, {found['num_ref_samples']} samples against {found['num_test_samples']} others each"
    )
    for rank, rmse, relative in zip(
        found["ranks"], found["rmse_values"], found["relative_errors_percent"], strict=True
    ):
        print(f"rank {rank}: rmse {rmse:.4g}, relative error {relative:.3g}%")
    for file in found["files"]:
        print(file)


def query(
    query: Annotated[Path, typer.Option("--query", metavar="DIR", help="Projections of the samples asked about.")],
    base: Annotated[Path, typer.Option("--base", metavar="DIR", help="Projections that are searched.")],
    k: Annotated[int, typer.Option("--k", min=1, help="How many samples for each.")] = 10,
    metric: Annotated[str, typer.Option("--metric", help="dot or cosine.")] = "dot",
    influence: Annotated[
        bool,
        typer.Option(
            "--influence", help="Instead: the samples of --base with the highest mean score over all of --query."
        ),
    ] = False,
    layers: Annotated[
        str | None, typer.Option("--layers", help="Only these layers: patterns as --proj_layers takes them.")
    ] = None,
    block: Annotated[
        int | None,
        typer.Option("--block", min=1, help="Rows of a store in memory at a time (default: by their length)."),
    ] = None,
    device: DeviceOption = "auto",
    json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Find the samples whose gradients are most alike, or those with the most influence."""
    if metric not in ("dot", "cosine"):
        raise typer.BadParameter(f"--metric is dot or cosine, got {metric!r}.")
    from sparseopt.progress import announce_device
    from sparseopt.projection import query as search
    from sparseopt.projection.store import ProjectionStore

    asked, searched = ProjectionStore(query), ProjectionStore(base)
    options: dict[str, Any] = {
        "metric": metric, "device": announce_device(device), "block": block, "layers": layers,
    }  # fmt: skip
    if influence:
        ids, scores = search.influence(asked, searched, **options)
        best = scores.sort(descending=True, stable=True).indices[:k]
        found: Any = [{"id": int(ids[i]), "score": float(scores[i])} for i in best]
        if json:
            print_json({"queries": len(asked), "influence": found})
            return
        for entry in found:
            print(f"{entry['id']}: {entry['score']:.6g}")
        return
    ids, scores = search.nearest(asked, searched, k, **options)
    found = [
        {"query": q, "nearest": [{"id": i, "score": s} for i, s in zip(row_ids, row_scores, strict=True)]}
        for q, row_ids, row_scores in zip(asked.completed.tolist(), ids.tolist(), scores.tolist(), strict=True)
    ]
    if json:
        print_json(found)
        return
    for entry in found:
        print(f"{entry['query']}: " + ", ".join(f"{near['id']} ({near['score']:.4g})" for near in entry["nearest"]))
