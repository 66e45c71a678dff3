"""``sparseopt sweep``: run many combinations of settings, see how far they are, and go on after an interruption."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparseopt.cli._command import Command, DebugFlag, JsonFlag, example, group, print_json
from sparseopt.cli.runs import BaseDirOption, json_ready

if TYPE_CHECKING:
    from sparseopt.runs.sweeps import Plan

app = group("sweep", help="Run many combinations of settings, as a sweep file asks for them; resumable.")

NameArgument = Annotated[str, typer.Argument(metavar="SWEEP", help="The sweep_name of the sweep file.")]
JobsOption = Annotated[int, typer.Option("--jobs", min=1, help="Runs at a time.")]
SkipFlag = Annotated[bool, typer.Option("--skip_failed", help="Do not try again what failed or crashed before.")]


@app.command(
    "run",
    cls=Command,
    epilog=example(
        "sparseopt sweep run configs/train_config.yaml configs/sweep_config.yaml --jobs 2",
        "sparseopt sweep run base.yaml sweep.yaml --dry_run",
        "sparseopt sweep run base.yaml sweep.yaml --command 'python my_training.py {config} --output {run_dir}'",
    ),
)
def run(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="Configuration of every run (YAML or TOML).")],
    sweep: Annotated[Path, typer.Argument(metavar="SWEEP_FILE", help="What varies: sweep_name, parameters, strategy.")],
    jobs: JobsOption = 1,
    command: Annotated[
        str | None,
        typer.Option(
            "--command",
            help="What to run, with {config}, {run_dir}, {run_id}, {base_dir}, {python} filled in"
            " (default: sparseopt train lm --config {config}).",
        ),
    ] = None,
    skip_failed: SkipFlag = False,
    dry_run: Annotated[bool, typer.Option("--dry_run", help="Only print the combinations.")] = False,
    base_dir: BaseDirOption = Path("saved_models"),
    json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Run a sweep: every combination of a grid, or random ones.

    Run again, it leaves alone what is finished (the same configuration under the same sweep_name) and does the rest.
    """
    from sparseopt.runs import launching, sweeps

    try:
        words = launching.split_command(launching.DEFAULT_COMMAND if command is None else command)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    spec, base = sweeps.read_sweep(sweep), sweeps.read_config(config)
    plan = sweeps.make_plan(base_dir, spec, base, words)
    if dry_run:
        _print_plan(plan, json)
        return
    _go(base_dir, plan, jobs, skip_failed, json)


@app.command("resume", cls=Command, epilog=example("sparseopt sweep resume learning_rate_sweep --jobs 2"))
def resume(
    name: NameArgument,
    jobs: JobsOption = 1,
    skip_failed: SkipFlag = False,
    base_dir: BaseDirOption = Path("saved_models"),
    json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Go on with a sweep: what is not finished is run, in the folders it already has."""
    from sparseopt.runs import sweeps

    _go(base_dir, sweeps.load_plan(base_dir, name), jobs, skip_failed, json)


@app.command("status", cls=Command, epilog=example("sparseopt sweep status learning_rate_sweep"))
def status(
    name: NameArgument,
    base_dir: BaseDirOption = Path("saved_models"),
    json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Say how far a sweep is: each combination with its run and state."""
    from sparseopt.runs import launching, sweeps, views
    from sparseopt.runs.registry import RunManager

    plan = sweeps.load_plan(base_dir, name)
    states = launching.state_of(RunManager(base_dir), plan)
    if json:
        print_json(_report(name, states))
        return
    shown = ["run_id", "status", "final_valid_loss"]
    settings = list(dict.fromkeys(key for state in states for key in state["values"]))
    views.render([{**state["values"], **{key: state[key] for key in shown}} for state in states], [*shown, *settings])
    print(_summary(states))


def _go(base_dir: Path, plan: Plan, jobs: int, skip_failed: bool, json: bool) -> None:
    from sparseopt.runs import launching
    from sparseopt.runs.registry import RunManager

    states = launching.run_plan(RunManager(base_dir), plan, jobs=jobs, skip_failed=skip_failed)
    if json:
        print_json(_report(plan.name, states))
    else:
        print(f"Sweep {plan.name}: {_summary(states)}")
    missed = [state for state in states if state["status"] != "finished"]
    if missed:
        first = f"{missed[0]['run_id']}: {missed[0]['error'] or missed[0]['status']}"
        print(f"Error: {len(missed)} of {len(states)} runs did not finish; the first is {first}", file=sys.stderr)
        raise typer.Exit(1)


def _counts(states: list[dict[str, Any]]) -> dict[str, int]:
    names = ("finished", "running", "pending", "failed", "crashed")
    return {name: sum(state["status"] == name for state in states) for name in names}


def _summary(states: list[dict[str, Any]]) -> str:
    counts = ", ".join(f"{count} {name}" for name, count in _counts(states).items() if count)
    return f"{len(states)} runs: {counts}."


def _report(name: str, states: list[dict[str, Any]]) -> dict[str, Any]:
    report: dict[str, Any] = json_ready({"sweep_name": name, "counts": _counts(states), "runs": states})
    return report


def _print_plan(plan: Plan, json: bool) -> None:
    if json:
        print_json(json_ready([{"values": c.values, "hash": c.hash, "run_id": plan.runs.get(c.hash)}
                               for c in plan.combinations]))  # fmt: skip
        return
    for combination in plan.combinations:
        print(" ".join(f"{key}={value}" for key, value in combination.values.items()))
    print(f"{len(plan.combinations)} runs.")
