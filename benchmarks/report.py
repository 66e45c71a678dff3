"""Runs the suites and keeps their results: ``python -m sparseopt.benchmarks.report``.

    python -m sparseopt.benchmarks.report --run optimizer --run masks     # measure, store, and rewrite the tables
    python -m sparseopt.benchmarks.report measured.json                   # store a file of pytest --benchmark-json=
    python -m sparseopt.benchmarks.report                                 # rewrite the tables

Results are stored in ``results/<device>.json``, one file for each device, one entry for each suite; the tables of
``README.md`` are everything that those files hold. Runs of reduced size are shown, but neither stored nor judged.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparseopt._files import FormatError, atomic_write

__all__ = ["SUITES", "main", "merge", "read", "render", "run_suite", "summarize", "table"]

HERE = Path(__file__).resolve().parent
SUITES = {"optimizer": "bench_optimizer.py", "masks": "bench_masks.py"}
BEGIN, END = "<!-- results: begin (written by sparseopt.benchmarks.report) -->", "<!-- results: end -->"


# ---- measuring and reading -------------------------------------------------------------------------------------------
def run_suite(suite: str, *, rounds: int | None = None, scale: float | None = None) -> dict[str, Any]:
    """Runs a suite in a fresh process, its output on stderr, and returns its summary.

    Args:
        suite: a name of ``SUITES``.
        rounds: timed rounds of each case.
        scale: size of the problems against the published ones, at most 1.

    Raises:
        ValueError: unknown suite.
        RuntimeError: pytest failed: a check between the arms, or pytest-benchmark is missing.
    """
    if suite not in SUITES:
        raise ValueError(f"unknown benchmark suite {suite!r}; there are {', '.join(SUITES)}.")
    # Threads of all arms stay awake between calls, as they do when a backward pass comes before a step.
    variables = {"OMP_WAIT_POLICY": "active", **os.environ}
    variables.pop("PYTEST_XDIST_WORKER", None)  # pytest-benchmark measures nothing where it sees this
    if rounds is not None:
        variables["SPARSEOPT_BENCH_ROUNDS"] = str(rounds)
    if scale is not None:
        variables["SPARSEOPT_BENCH_SCALE"] = str(scale)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "benchmark.json"
        # -P: a source tree in the working directory must not shadow the installed package.
        command = [sys.executable, "-P", "-m", "pytest", str(HERE / SUITES[suite]), f"--benchmark-json={output}",
                   "--benchmark-disable-gc", "--benchmark-quiet", "-q", "-p", "no:cacheprovider"]  # fmt: skip
        code = subprocess.run(command, env=variables, stdout=sys.stderr, check=False).returncode
        if code:
            raise RuntimeError(f"the benchmark suite {suite!r} failed (pytest exit code {code}); nothing was recorded.")
        return read(output, command=f"python -m sparseopt.benchmarks.report --run {suite}")


def read(path: str | Path, command: str | None = None) -> dict[str, Any]:
    """Summary of a file that ``pytest --benchmark-json`` wrote: see :func:`summarize`."""
    path = Path(path)
    try:
        raw = json.loads(path.read_text())
        return summarize(raw, command or f"pytest --benchmark-json={path.name}")
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise FormatError(f"{path} is not a result of these suites (pytest --benchmark-json): {error!r}.") from error


def summarize(raw: Mapping[str, Any], command: str) -> dict[str, Any]:
    """Compact form of one run of one suite.

    Returns:
        ``suite``, ``date``, ``commit``, ``command``, ``scale``, ``environment``, and ``cases``: per case ``sparseopt``
        and ``baselines`` (milliseconds: ``median``, ``p20``, ``p80``; baselines with ``ratio`` to sparseopt), ``facts``
        and ``bars`` (``at_least``, ``measured``, ``met``; empty at reduced size).

    Raises:
        ValueError: a case that was not checked, or cases of several suites or settings.
    """
    cases: dict[str, Any] = {}
    runs = []
    for entry in raw["benchmarks"]:
        info = entry["extra_info"]
        if not info.get("checked"):
            raise ValueError(f"benchmark {entry['name']!r} did not pass its check: no speed is recorded.")
        runs.append((Path(entry["fullname"].partition("::")[0]).name, info["scale"], info["environment"]))
        cases[info["case"]] = _case(entry["stats"]["data"], info)
    if not runs or any(run != runs[0] for run in runs):
        raise ValueError("a result must hold the cases of one suite, measured under one setting.")
    names = {file: suite for suite, file in SUITES.items()}
    commit = raw.get("commit_info") or {}
    return {
        "suite": names[runs[0][0]],
        "date": raw["datetime"][:10],
        "commit": f"{commit.get('id') or 'unknown'}{' with changes' if commit.get('dirty') else ''}",
        "command": command,
        "scale": runs[0][1],
        "environment": runs[0][2],
        "cases": cases,
    }


def _case(seconds: Sequence[float], info: Mapping[str, Any]) -> dict[str, Any]:
    ours = _quantiles(seconds)
    baselines = {}
    for name, values in info["baselines"].items():
        baselines[name] = {
            **_quantiles(values),
            "ratio": round(statistics.median(values) / statistics.median(seconds), 2),
        }
        if "alone" in info:
            mine, other = (statistics.median(info["alone"][arm]) for arm in ("sparseopt", name))
            baselines[name]["back_to_back"] = round(other / mine, 2)
    facts = {name: round(value, 2) for name, value in info["facts"].items()}
    bars = {}
    for name, at_least in info["bars"].items() if info["scale"] == 1 else ():
        measured = facts[name] if name in facts else baselines[name]["ratio"]
        bars[name] = {"at_least": at_least, "measured": measured, "met": measured >= at_least}
    return {"rounds": len(seconds), "sparseopt": ours, "baselines": baselines, "facts": facts, "bars": bars}


def _quantiles(seconds: Sequence[float]) -> dict[str, float]:
    """Median, 20% and 80% quantiles in milliseconds."""
    milliseconds = sorted(1e3 * s for s in seconds)
    cuts = statistics.quantiles(milliseconds, n=5, method="inclusive") if len(milliseconds) > 1 else milliseconds * 4
    return {
        k: round(v, 4) for k, v in (("median", statistics.median(milliseconds)), ("p20", cuts[0]), ("p80", cuts[3]))
    }


# ---- storing ---------------------------------------------------------------------------------------------------------
def merge(summary: Mapping[str, Any], results: Path) -> Path:
    """Stores a summary in ``results/<device>.json`` in place of the suite's earlier one.

    Raises:
        ValueError: the run was of reduced size.
    """
    if summary["scale"] != 1:
        raise ValueError(f"results at {summary['scale']:g} of the full size are not stored.")
    device = f"{summary['environment']['device']} {summary['environment']['threads']} threads"
    path = results / f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.json"
    stored: dict[str, Any] = {"device": device, "suites": {}}
    if path.exists():
        stored = json.loads(path.read_text())
    stored["suites"][summary["suite"]] = {k: v for k, v in summary.items() if k not in ("suite", "scale")}
    atomic_write(path, json.dumps(stored, indent=1) + "\n")
    return path


# ---- tables ----------------------------------------------------------------------------------------------------------
def table(cases: Mapping[str, Any]) -> str:
    """Markdown table of a suite: one row per case, times in milliseconds, baselines with their ratio."""
    names = list(dict.fromkeys(name for case in cases.values() for name in case["baselines"]))
    shared = all(list(case["baselines"]) == names for case in cases.values())
    head = ["case", "sparseopt", *(names if shared else ["baselines"]), "bars"]
    lines = [head, ["---"] * len(head)]
    for name, case in cases.items():
        cells = {
            n: f"{_span(times)}, **{times['ratio']:.3g}x**{_alone(times)}" for n, times in case["baselines"].items()
        }
        baselines = [cells[n] for n in names] if shared else ["; ".join(f"{n} {cell}" for n, cell in cells.items())]
        lines.append([name, _span(case["sparseopt"]), *baselines, _bars(case)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _alone(times: Mapping[str, float]) -> str:
    return f" ({times['back_to_back']:.3g}x)" if "back_to_back" in times else ""


def _span(times: Mapping[str, float]) -> str:
    return f"{times['median']:.3g} ({times['p20']:.3g}-{times['p80']:.3g})"


def _bars(case: Mapping[str, Any]) -> str:
    cells = []
    for name, bar in case["bars"].items():
        warm = case["baselines"].get(name, {}).get("back_to_back", 0)
        found = "met" if bar["met"] else "**missed**, met back to back" if warm >= bar["at_least"] else "**missed**"
        value = f" ({bar['measured']:.3g}x)" if name in case["facts"] else ""
        cells.append(f"{name} {bar['at_least']:g}x: {found}{value}")
    return "; ".join(cells)


def _section(suite: str, run: Mapping[str, Any]) -> str:
    where = ", ".join(f"{key} {value}" for key, value in run["environment"].items() if key != "device")
    rounds = min(case["rounds"] for case in run["cases"].values())
    return (
        f"**{suite}**, {run['date']}, commit `{run['commit']}`, {where}; {rounds} rounds; `{run['command']}`\n\n"
        f"{table(run['cases'])}"
    )


def render(results: Path, readme: Path) -> None:
    """Rewrites what stands between the markers of a README from all ``results/*.json``.

    Raises:
        FormatError: the markers are missing.
    """
    text = readme.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise FormatError(f"{readme} lacks the markers {BEGIN!r} and {END!r} around its tables.")
    parts = []
    for path in sorted(results.glob("*.json")):
        stored = json.loads(path.read_text())
        if "suites" not in stored:  # of a benchmark that has a file of its own
            continue
        parts.append(f"### {stored['device']}")
        parts += [_section(suite, run) for suite, run in stored["suites"].items()]
    body = "\n\n".join(parts) or "No results are stored."
    atomic_write(readme, f"{before}{BEGIN}\n\n{body}\n\n{END}{after}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code: 1 when a suite failed, or a bar was missed under ``--check``."""
    parser = argparse.ArgumentParser(
        prog="python -m sparseopt.benchmarks.report", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("files", nargs="*", type=Path, help="results of pytest --benchmark-json=FILE")
    parser.add_argument("--run", action="append", default=[], choices=SUITES, help="measure a suite now; repeatable")
    parser.add_argument("--rounds", type=int, help="timed rounds of each case (15)")
    parser.add_argument("--scale", type=float, help="size against the published one; below 1 nothing is stored")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of results (%(default)s)")
    parser.add_argument("--readme", type=Path, default=HERE / "README.md", help="file with the tables (%(default)s)")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a bar is missed")
    options = parser.parse_args(arguments)
    missed = []
    try:
        summaries = [read(path) for path in options.files]
        summaries += [run_suite(suite, rounds=options.rounds, scale=options.scale) for suite in options.run]
        for summary in summaries:
            print(table(summary["cases"]))
            for name, case in summary["cases"].items():
                missed += [f"{name} against {bar}" for bar, value in case["bars"].items() if not value["met"]]
            if summary["scale"] == 1:
                print(f"stored in {merge(summary, options.results)}")
            else:
                print(f"at {summary['scale']:g} of the full size: not stored, bars not judged")
        render(options.results, options.readme)
    except (RuntimeError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if missed:
        print(f"bars missed: {'; '.join(missed)}", file=sys.stderr)
    return 1 if missed and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
