"""``sparseopt masks find``: flags and printing; :mod:`sparseopt.deltas.find` does the work."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparseopt.cli._command import DebugFlag, DeviceOption, JsonFlag, example, print_json

if TYPE_CHECKING:
    from sparseopt.deltas.find import Search
    from sparseopt.deltas.reader import LogReader

__all__ = ["EXAMPLE", "find"]

EXAMPLE = example(
    "sparseopt masks find --delta_log_dir delta_logs_smollm2 --method fisher --sparsity_percent 97.5 \\",
    "    --target_step 50 --exclude embed_tokens --compute_jaccard",
    "sparseopt masks find --delta_log_dir delta_logs_smollm2 --method momentum --momentum_window 25 --target_step 25",
    "sparseopt masks find --model_name smollm2 --method weight_magnitude --sparsity_percent 90",
)


def find(
    method: Annotated[
        str,
        typer.Option(
            "--method",
            help="From a delta log: magnitude, momentum, fisher, ground_truth. From gradient statistics: gradient, "
            "fisher. From a model or a log's base: weight_magnitude, random.",
        ),
    ],
    delta_log_dir: Annotated[
        Path | None, typer.Option("--delta_log_dir", metavar="DIR", help="Folder of the delta log.")
    ] = None,
    sparsity_percent: Annotated[
        float, typer.Option("--sparsity_percent", min=0, max=100, help="Share of inactive entries; counts are exact.")
    ] = 97.5,
    target_step: Annotated[
        int | None, typer.Option("--target_step", help="Logged step that scores are taken at (default: the last).")
    ] = None,
    momentum_window: Annotated[
        int | None,
        typer.Option("--momentum_window", min=1, help="Training steps momentum looks back (default: to the base)."),
    ] = None,
    compute_jaccard: Annotated[
        bool,
        typer.Option(
            "--compute_jaccard",
            help="Compare with the ground truth of the last logged step, and masks of this method across the logged "
            "steps: *_jaccard.json and *_jaccard.png beside the mask.",
        ),
    ] = False,
    mlp_only: Annotated[
        bool, typer.Option("--mlp_only", help="Choose in MLP blocks only; elsewhere nothing is active.")
    ] = False,
    scope: Annotated[
        str, typer.Option("--scope", help="global or per_tensor: budget over all, or of each.")
    ] = "global",
    min_layer_keep_ratio: Annotated[
        float, typer.Option("--min_layer_keep_ratio", min=0, max=1, help="Least active share of each parameter.")
    ] = 0.0,
    granularity: Annotated[
        str,
        typer.Option(
            "--granularity", help="Entries chosen together: 1, 8, 16, 32 (aligned runs), row, column or auto."
        ),
    ] = "1",
    include: Annotated[
        list[str] | None,
        typer.Option("--include", metavar="PATTERN...", help="Only parameters whose names match one of these."),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            "--exclude",
            metavar="PATTERN...",
            help="No parameters whose names match one of these. Embeddings take part unless excluded; the training "
            "commands leave embedding and head out where they find a mask themselves.",
        ),
    ] = None,
    allow_zero_scores: Annotated[
        bool, typer.Option("--allow_zero_scores", help="Accept a mask of which more than half has score zero.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", help="Of method random.")] = 0,
    gradient_stats: Annotated[
        Path | None,
        typer.Option("--gradient_stats", metavar="FILE", help="safetensors: parameter -> squared gradients summed."),
    ] = None,
    model_name: Annotated[
        str | None,
        typer.Option(
            "--model_name", help="smollm2, a folder or a Hub name: the log's base, or the model without a log."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="FILE", help="Mask file (default: a name in --output_dir that says all)."),
    ] = None,
    output_dir: Annotated[Path, typer.Option("--output_dir", metavar="DIR", help="Folder of mask files.")] = Path(
        "masks"
    ),
    scratch_dir: Annotated[
        Path | None,
        typer.Option(
            "--scratch_dir",
            metavar="DIR",
            help="Folder for a scratch file of the scores, 4 bytes an entry (default: that of the mask, if its disk has "
            "room; else scores are computed again in each pass).",
        ),
    ] = None,
    device: DeviceOption = "auto",
    json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Find the entries worth training: from a delta log, from gradients, from the weights, or at random.

    Logs are streamed: memory is the mask (1 bit a parameter) and some 100 MB, whatever the model. The mask's metadata say
    how it was found.
    """
    if device not in ("auto", "cpu"):
        raise typer.BadParameter(f"masks are found on the CPU: --device is auto or cpu, got {device!r}.")
    if output is not None and output.suffix not in (".safetensors", ".pt"):
        raise typer.BadParameter(f"--output must end in .safetensors or .pt, got {str(output)!r}.")
    if compute_jaccard and delta_log_dir is None:
        raise typer.BadParameter("--compute_jaccard needs --delta_log_dir.")
    if 0 < sparsity_percent < 1:
        warnings.warn(
            f"--sparsity_percent {sparsity_percent:g} leaves {100 - sparsity_percent:g}% of the entries active; the share "
            f"{sparsity_percent:g} is --sparsity_percent {100 * sparsity_percent:g}.",
            stacklevel=2,
        )
    from sparseopt.deltas.find import Search, require_plotting
    from sparseopt.masks.granularity import granularity_of

    if compute_jaccard:
        require_plotting()
    try:
        search = Search(
            method=method,
            sparsity_percent=sparsity_percent,
            delta_log_dir=delta_log_dir,
            target_step=target_step,
            momentum_window=momentum_window,
            gradient_stats=gradient_stats,
            model_name=model_name,
            scope=scope,
            granularity=granularity_of(granularity),
            min_layer_keep_ratio=min_layer_keep_ratio,
            include=_split(include),
            exclude=_split(exclude),
            mlp_only=mlp_only,
            allow_zero_scores=allow_zero_scores,
            seed=seed,
            scratch_dir=scratch_dir,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    result = _run(search, output, output_dir, compute_jaccard)
    if json:
        print_json(result)
    else:
        _print(result, debug)


def _split(patterns: list[str] | None) -> tuple[str, ...]:
    return tuple(pattern for given in patterns or () for pattern in given.split(",") if pattern)


def _run(search: Search, output: Path | None, output_dir: Path, compute_jaccard: bool) -> dict[str, Any]:
    from dataclasses import replace

    from sparseopt.deltas import find as finding

    reader: LogReader | None = search.open_log()
    step = reader.resolve(search.target_step) if reader is not None and search.from_log else None
    path = output if output is not None else output_dir / search.file_name(step)
    if reader is not None and search.scratch_dir is None:
        search = replace(search, scratch_dir=finding.scratch_for(finding.log_bytes(reader), path.parent))
    masks = finding.find(search, reader)
    masks.save(path)
    result: dict[str, Any] = {
        "output": str(path),
        "active_parameters": masks.active_parameters,
        "total_parameters": masks.total_parameters,
        "density": masks.density,
        "sparsity": masks.sparsity,
        "fingerprint": masks.fingerprint,
        "metadata": masks.metadata,
    }
    if compute_jaccard and reader is not None:
        report = {"mask": path.name, **finding.jaccard_report(search, masks, reader)}
        text, picture = finding.write_jaccard(report, path)
        result |= {"jaccard": report, "jaccard_json": str(text), "jaccard_png": str(picture)}
    return result


def _print(result: dict[str, Any], debug: bool) -> None:
    about = result["metadata"]
    print(f"{result['output']}: {result['active_parameters']:,} of {result['total_parameters']:,} entries active")
    print(f"scores: {about['formula'] if 'formula' in about else about['method']}")
    kept = f", {about['kept_score']:.2%} of the score total" if "kept_score" in about else ""
    print(
        f"{about['zero_score_share']:.2%} of the active entries have score zero, {about['tie_share']:.2%} are ties{kept}"
    )
    if debug:
        for key, value in about.items():
            print(f"  {key}: {value}")
    if "jaccard" not in result:
        return
    truth, steps = result["jaccard"]["ground_truth"], result["jaccard"]["steps"]
    print(
        f"Jaccard with the ground truth of step {truth['step']}: {truth['jaccard']:.4f} "
        f"(by chance {truth['chance_jaccard']:.4f}); parameters: {_spread(truth)}"
    )
    if steps is not None:
        print(f"Jaccard across steps {', '.join(map(str, steps['steps']))}: {_spread(steps)}")
        for step, reason in steps["left_out"].items():
            print(f"  step {step} is left out: {reason}")
    if debug:
        for name, values in truth["per_layer"].items():
            print(f"  {name}: {values['jaccard']:.4f} (by chance {values['chance_jaccard']:.4f})")
    print(f"{result['jaccard_json']}, {result['jaccard_png']}")


def _spread(values: dict[str, Any]) -> str:
    return ", ".join(
        f"{key} {values[key]:.4f}" if values[key] is not None else f"{key} none" for key in ("mean", "min", "max")
    )
