"""``sparseopt sweep``: run many combinations of settings, see how far they are, and go on after an interruption."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparseopt.cli._command import Command, DebugFlag, JsonFlag, example, group, print_json
from sparseopt.cli.runs import BaseDirOption, json_ready

if TYPE_CHECKING:
    from sparseopt.runs.sweeps import Plan

app = group(
    "sweep",
    help="Run many combinations of settings, as a sweep file asks for them; resumable.",
    epilog=example(
        "sparseopt sweep run configs/train_config.yaml configs/sweep_config.yaml --jobs 2",
        "sparseopt sweep status learning_rate_sweep",
    ),
)

NameArgument = Annotated[str, typer.Argument(metavar="SWEEP", help="The sweep_name of the sweep file.")]
ConfigArgument = Annotated[Path, typer.Argument(metavar="CONFIG", help="Configuration of every run (YAML or TOML).")]
FileArgument = Annotated[
    Path, typer.Argument(metavar="SWEEP_FILE", help="What varies: sweep_name, parameters, strategy.")
]
CommandOption = Annotated[
    str | None,
    typer.Option(
        "--command",
        help="What to run, with {config}, {run_dir}, {run_id}, {base_dir}, {python} filled in"
        " (default: sparseopt train lm --config {config}).",
    ),
]
DryRunFlag = Annotated[bool, typer.Option("--dry_run", help="Only print the combinations.")]
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
    config: ConfigArgument,
    sweep: FileArgument,
    jobs: JobsOption = 1,
    command: CommandOption = None,
    skip_failed: SkipFlag = False,
    dry_run: DryRunFlag = False,
    base_dir: BaseDirOption = Path("saved_models"),
    json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Run a sweep: every combination of a grid, or random ones.

    Run again, it leaves alone what is finished (the same configuration under the same sweep_name) and does the rest.
    """
    plan = _plan(config, sweep, command, base_dir)
    if dry_run:
        _print_plan(plan, json)
        return
    _go(base_dir, plan, jobs, skip_failed, json)


@app.command(
    "submit",
    cls=Command,
    epilog=example(
        "sparseopt sweep submit configs/train_config.yaml configs/sweep_config.yaml --partition gpu --gpus 1 --time 4:00:00",
        "sparseopt sweep submit base.yaml sweep.yaml --command 'python train.py {config}' --jobs 4 --extra account=lab qos=high",
        "sparseopt sweep status learning_rate_sweep",
    ),
)
def submit(
    config: ConfigArgument,
    sweep: FileArgument,
    command: CommandOption = None,
    partition: Annotated[str | None, typer.Option("--partition", help="Partition (default: the cluster's).")] = None,
    time: Annotated[
        str | None, typer.Option("--time", help="Limit of a run: minutes, H:M:S or D-H:M:S (default: the partition's).")
    ] = None,
    cpus: Annotated[int | None, typer.Option("--cpus", min=1, help="CPUs of a run.")] = None,
    gpus: Annotated[int | None, typer.Option("--gpus", min=0, help="GPUs of a run, on one node.")] = None,
    mem: Annotated[str | None, typer.Option("--mem", help="Memory of a run, such as 16G.")] = None,
    jobs: Annotated[
        int | None, typer.Option("--jobs", "--array_parallelism", min=1, help="Runs at a time (default: 256).")
    ] = None,
    setup: Annotated[
        list[str] | None,
        typer.Option("--setup", metavar="LINE", help="Line of shell before the run, 'module load cuda'; repeatable."),
    ] = None,
    extra: Annotated[
        list[str] | None,
        typer.Option("--extra", metavar="OPTION=VALUE...", help="Other options of sbatch, by their long names."),
    ] = None,
    skip_failed: SkipFlag = False,
    dry_run: DryRunFlag = False,
    base_dir: BaseDirOption = Path("saved_models"),
    json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Submit a sweep to Slurm as an array of jobs, one a run, and return.

    Submitted again, it leaves alone what is finished, running or in the queue, and submits the rest. A run that comes to
    its time limit is interrupted 90 s before (SIGINT, so that it can write a checkpoint).
    """
    from sparseopt.runs import slurm
    from sparseopt.runs.registry import RunManager

    try:
        pairs = [text.partition("=") for text in extra or []]
        wrong = [name for name, equals, _ in pairs if not (name and equals)]
        if wrong:
            raise ValueError(f"--extra takes OPTION=VALUE, got {wrong[0]!r}.")
        resources = slurm.Resources(
            partition=partition,
            minutes=None if time is None else slurm.parse_time(time),
            cpus=cpus,
            gpus=gpus,
            mem=mem,
            parallel=jobs,
            setup=tuple(setup or ()),
            extra={name.lstrip("-"): value for name, _, value in pairs},
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    plan = _plan(config, sweep, command, base_dir)
    if dry_run:
        _print_plan(plan, json)
        return
    array, states = slurm.submit_plan(RunManager(base_dir), plan, resources, skip_failed=skip_failed)
    sent = sum(state["job"] is not None and state["job"].partition("_")[0] == array for state in states)
    if json:
        print_json({**_report(plan.name, states), "array": array, "submitted": sent})
        return
    if array is None:
        print(f"Sweep {plan.name}: nothing to submit. {_summary(states)}")
    else:
        print(f"Sweep {plan.name}: {sent} of {len(states)} runs submitted as the Slurm job {array}.")
        folder = "" if str(base_dir) == "saved_models" else f" --base_dir {shlex.quote(str(base_dir))}"
        print(f"sparseopt sweep status {shlex.quote(plan.name)}{folder} says how far they are.")


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
    """Say how far a sweep is: each combination with its run and state, and its Slurm job where it was submitted."""
    from sparseopt.runs import slurm, sweeps, views
    from sparseopt.runs.registry import RunManager

    plan = sweeps.load_plan(base_dir, name)
    states = slurm.state_with_jobs(RunManager(base_dir), plan)
    if json:
        print_json(_report(name, states))
        return
    shown = ["run_id", "status", *(["job", "job_state"] if plan.jobs else []), "final_valid_loss"]
    settings = list(dict.fromkeys(key for state in states for key in state["values"]))
    views.render([{**state["values"], **{key: state[key] for key in shown}} for state in states], [*shown, *settings])
    print(_summary(states))


def _plan(config: Path, sweep: Path, command: str | None, base_dir: Path) -> Plan:
    from sparseopt.runs import launching, sweeps

    try:
        words = launching.split_command(launching.DEFAULT_COMMAND if command is None else command)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    spec, base = sweeps.read_sweep(sweep), sweeps.read_config(config)
    return sweeps.make_plan(base_dir, spec, base, words)


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
    names = ("finished", "running", "queued", "pending", "failed", "crashed")
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
