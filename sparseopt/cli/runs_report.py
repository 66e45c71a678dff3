"""``sparseopt runs report``: flags; :mod:`sparseopt.runs.report` makes the page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparseopt.cli._command import DebugFlag, JsonFlag, example, print_json

__all__ = ["EXAMPLE", "report"]

EXAMPLE = example(
    "sparseopt runs report learning_rate_sweep",
    "sparseopt runs report learning_rate_sweep --metric accuracy --maximize --output report.html",
)


def report(
    sweep: Annotated[str, typer.Argument(metavar="SWEEP", help="The sweep_name of the runs.")],
    output: Annotated[
        Path | None, typer.Option("--output", help="The page (default: sweeps/SWEEP.html in the folder of the runs).")
    ] = None,
    metric: Annotated[str, typer.Option("--metric", help="The result of a run.")] = "final_valid_loss",
    maximize: Annotated[bool, typer.Option("--maximize", help="The largest result is the best.")] = False,
    base_dir: Annotated[Path, typer.Option("--base_dir", help="Folder of the runs.")] = Path("saved_models"),
    json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Write a sweep as one HTML page: curves, settings against result, a table of the runs.

    The page needs no network and no other file; point at a line or a row to see the run behind it.
    """
    from sparseopt.runs import report as reports
    from sparseopt.runs.registry import RunManager
    from sparseopt.runs.sweeps import PLANS, check_name

    check_name(sweep, "The sweep")
    data = reports.sweep_data(RunManager(base_dir), sweep, metric, maximize=maximize)
    target = base_dir / PLANS / f"{sweep}.html" if output is None else output
    reports.write(data, target)
    if json:
        print_json({"output": str(target), "runs": len(data["runs"]), "best": data["best"]})
    else:
        print(data["summary"])
        print(target)
