"""``sparseopt runs``: the table of experiments, one run, and their export to other trackers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from sparseopt.cli import runs_gradients, runs_report
from sparseopt.cli._command import Command, DebugFlag, JsonFlag, example, group, print_json

app = group(
    "runs",
    help="Look at runs of experiments: list, filter, sort, show, export; analyse gradients; report on a sweep.",
    epilog=example("sparseopt runs list --sort_by final_valid_loss", "sparseopt runs show RUN"),
)

BaseDirOption = Annotated[Path, typer.Option("--base_dir", help="Folder of the runs.")]


def names(given: list[str] | None) -> list[str]:
    """Values after one flag, also separated by commas."""
    return [name.strip() for text in given or [] for name in text.split(",") if name.strip()]


def json_ready(value: Any) -> Any:
    """NaN and infinities as text, since JSON has no such numbers."""
    if isinstance(value, float) and value - value != 0:
        return str(value)
    if isinstance(value, dict):
        return {key: json_ready(item) for key, item in value.items()}
    return [json_ready(item) for item in value] if isinstance(value, list) else value


@app.command(
    "list",
    cls=Command,
    epilog=example(
        "sparseopt runs list --filter_sweep learning_rate_sweep --sort_by final_valid_loss --limit 10",
        'sparseopt runs list --filter model.name=gpt2 "training.learning_rate<=6e-4" "run.name~^test"',
        "sparseopt runs list --show run_id run_name final_valid_loss final_valid_perplexity --csv > table.csv",
    ),
)
def list_runs(
    list_columns: Annotated[bool, typer.Option("--list_columns", help="Print the names of all columns.")] = False,
    filter_sweep: Annotated[str | None, typer.Option("--filter_sweep", help="Only runs of this sweep.")] = None,
    filters: Annotated[
        list[str] | None,
        typer.Option(
            "--filter",
            metavar="FILTER...",
            help="COLUMN=VALUE, or with !=, <, <=, >, >=, ~ (regular expression), !~; =null: not there. All must hold.",
        ),
    ] = None,
    sort_by: Annotated[str | None, typer.Option("--sort_by", help="Column; what has no value comes last.")] = None,
    descending: Annotated[bool, typer.Option("--descending", help="The largest first.")] = False,
    show: Annotated[
        list[str] | None, typer.Option("--show", metavar="COLUMN...", help="Only these columns, in this order.")
    ] = None,
    hide: Annotated[list[str] | None, typer.Option("--hide", metavar="COLUMN...", help="All but these.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=0, help="Number of rows.")] = None,
    base_dir: BaseDirOption = Path("saved_models"),
    csv: Annotated[bool, typer.Option("--csv", help="Print CSV on stdout, every digit of every number.")] = False,
    json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """List runs with their settings and metrics.

    Without --show, a table leaves out empty columns, where a run was processed, and what is the same in all runs (said
    below it); --csv and --json leave out nothing.
    """
    if csv and json:
        raise typer.BadParameter("give --csv or --json, not both.")
    from sparseopt.runs import views
    from sparseopt.runs._table import columns_of, csv_text
    from sparseopt.runs.registry import RunManager

    try:
        tests = [views.parse_filter(text) for text in views.split_filters(filters or [])]
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    rows: Any = RunManager(base_dir).rows()
    columns = columns_of(rows)
    if list_columns:
        print_json(columns) if json else print("\n".join(columns))
        return
    wanted, unwanted = names(show), names(hide)
    if rows:
        used = [column for column, _ in tests] + ([sort_by] if sort_by else [])
        views.check_columns([*used, *wanted, *unwanted], columns)
    rows = views.select(rows, tests, filter_sweep)
    if sort_by:
        rows = views.sort_rows(rows, sort_by, descending=descending)
    elif descending:
        rows = rows[::-1]
    total, rows = len(rows), rows[:limit]
    common: dict[str, Any] = {}
    if wanted:
        columns = wanted
    elif not (csv or json):
        columns, common = views.default_columns(rows, columns)
    columns = [column for column in columns if column not in unwanted]
    if json:
        print_json([{column: json_ready(row.get(column)) for column in columns} for row in rows])
    elif csv:
        sys.stdout.write(csv_text(rows, columns))
    elif not rows:
        print(f"No runs in {str(base_dir)!r}" + (" match." if tests or filter_sweep is not None else "."))
    else:
        if columns:
            views.render(rows, columns)
        same = [
            f"{column}={views.cell_text(column, cell)}" for column, cell in common.items() if column not in unwanted
        ]
        if same:
            print(f"The same in all: {', '.join(same)}")
        if total > len(rows):
            print(f"{len(rows)} of {total} runs.")


@app.command("show", cls=Command, epilog=example("sparseopt runs show 20260101-1200", "sparseopt runs show RUN --json"))
def show(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The run's id, or the beginning of one.")],
    base_dir: BaseDirOption = Path("saved_models"),
    json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Show one run: state, where it ran, configuration, metrics, checkpoints."""
    from sparseopt.runs._record import flatten
    from sparseopt.runs.registry import RunManager
    from sparseopt.runs.views import cell_text

    manager = RunManager(base_dir)
    record = manager.get_run(run)
    folder = base_dir / record["run_id"]
    record["folder"] = str(folder)
    record["checkpoints"] = [path.name for path in checkpoints(folder)]
    if json:
        print_json(json_ready(record))
        return
    sections = ("config", "metrics", "versions", "checkpoints")
    technical = ("format", "version", "machine", "started", "command")
    for key, value in record.items():
        if key not in (*sections, *technical) and value is not None:
            print(f"{key}: {cell_text(key, value)}")
    print(f"command: {' '.join(map(str, record.get('command', [])))}")
    print(f"versions: {', '.join(f'{name} {version}' for name, version in record.get('versions', {}).items())}")
    for section in ("config", "metrics"):
        print(f"{section}:" if record[section] else f"{section}: none")
        for key, value in flatten(record[section]).items():
            print(f"  {key}: {'null' if value is None else repr(value) if isinstance(value, float) else value}")
    print(f"checkpoints: {', '.join(record['checkpoints']) or 'none'}")


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a run, by step, the final one last."""
    found = [path for path in folder.glob("checkpoint_*") if path.is_dir() and path.name[11:].isdigit()]
    final = folder / "final_checkpoint"
    return sorted(found, key=lambda path: int(path.name[11:])) + ([final] if final.is_dir() else [])


@app.command(
    "export",
    cls=Command,
    epilog=example(
        "sparseopt runs export --to mlflow --output_dir mlruns",
        "sparseopt runs export --filter_sweep learning_rate_sweep --to wandb --output_dir exported && wandb sync exported/wandb/*",
    ),
)
def export(
    runs: Annotated[
        list[str] | None, typer.Argument(metavar="RUN", help="Ids, or beginnings of ids (default: all runs).")
    ] = None,
    to: Annotated[str, typer.Option("--to", help="wandb (offline files) or mlflow (a file store).")] = "mlflow",
    output_dir: Annotated[
        Path | None,
        typer.Option("--output_dir", help="Where to write (default: mlruns, or for wandb the current folder)."),
    ] = None,
    filter_sweep: Annotated[str | None, typer.Option("--filter_sweep", help="Only runs of this sweep.")] = None,
    project: Annotated[str, typer.Option("--project", help="W&B project or MLflow experiment.")] = "sparseopt",
    base_dir: BaseDirOption = Path("saved_models"),
    json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Write runs into files of another tracker: configuration, logged curves, metrics, state.

    Recent versions of MLflow (seen: 3.17) open a file store with MLFLOW_ALLOW_FILE_STORE=true, or after `mlflow
    migrate-filestore`.
    """
    if to not in ("wandb", "mlflow"):
        raise typer.BadParameter(f"--to must be wandb or mlflow, got {to!r}.")
    from sparseopt.runs.export import to_mlflow, to_wandb
    from sparseopt.runs.log import curves, read_log
    from sparseopt.runs.registry import RunManager

    manager = RunManager(base_dir)
    wanted = runs or [row["run_id"] for row in manager.rows()]
    records = [manager.get_run(run) for run in wanted]
    records = [record for record in records if filter_sweep is None or record["sweep_name"] == filter_sweep]
    if not records:
        raise ValueError(f"There is no run to export in {str(base_dir)!r}.")
    logged = {record["run_id"]: curves(read_log(base_dir / record["run_id"])) for record in records}
    if to == "wandb":
        folders = to_wandb(records, output_dir or Path("."), project, logged)
    else:
        folders = to_mlflow(records, output_dir or Path("mlruns"), project, logged)
    if json:
        print_json({"folders": [str(folder) for folder in folders]})
    else:
        print(f"{len(folders)} runs written to {folders[0].parent}")


app.command("gradients", cls=Command, epilog=runs_gradients.EXAMPLE)(runs_gradients.gradients)
app.command("report", cls=Command, epilog=runs_report.EXAMPLE)(runs_report.report)
