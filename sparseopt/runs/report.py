"""A sweep as one HTML page: curves, parallel coordinates of settings and result, a table. It needs no network.

The page is a template (``report.html``), a script (``report.js``) and the numbers as JSON. Nothing that a user named becomes
markup: the JSON has no character that ends a script, the script writes texts as texts, and the page's own policy lets
nothing but this script run (by its hash) and nothing be loaded.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from sparseopt._files import atomic_write
from sparseopt.progress import track
from sparseopt.runs._record import RESERVED, flatten, now
from sparseopt.runs.log import curves, is_number, read_log
from sparseopt.runs.registry import RunManager
from sparseopt.runs.sweeps import PLANS, load_plan

__all__ = ["page", "sweep_data", "write"]

# Points of a curve in the page: more than there are pixels.
POINTS = 1000
SERIES = ("eval_loss", "loss", "grad_norm", "learning_rate")  # shown first, in this order
NO_SERIES = ("epoch",)


def sweep_data(
    manager: RunManager, sweep: str, metric: str = "final_valid_loss", *, maximize: bool = False
) -> dict[str, Any]:
    """What the page shows of the runs of a sweep: settings that vary, results, logged curves.

    Args:
        manager: of the folder of the runs.
        sweep: name of the sweep.
        metric: the result: a metric of the runs.
        maximize: the largest is the best.

    Raises:
        FileNotFoundError: no run belongs to this sweep.
        ValueError: no run has that metric, but another one.
    """
    rows = [row for row in manager.rows() if row["sweep_name"] == sweep]
    if not rows:
        known = sorted({str(row["sweep_name"]) for row in manager.rows() if row["sweep_name"] is not None})
        there = f"; there are {', '.join(known)}." if known else "."
        raise FileNotFoundError(f"No run in {str(manager.base_dir)!r} belongs to a sweep {sweep!r}{there}")
    records = {str(row["run_id"]): manager.get_run(str(row["run_id"])) for row in rows}
    metrics = list(dict.fromkeys(name for record in records.values() for name in record["metrics"]))
    if metrics and metric not in metrics:
        raise ValueError(f"No run of the sweep {sweep!r} has the metric {metric!r}; there are {', '.join(metrics)}.")
    configs = {run_id: flatten(record["config"]) for run_id, record in records.items()}
    settings = _settings(manager, sweep, list(configs.values()))
    runs = []
    for run_id, record in track(records.items(), "report", total=len(records), unit="run"):
        result = record["metrics"].get(metric)
        runs.append(
            {
                "run_id": run_id,
                "run_name": record["run_name"],
                "status": record["status"],
                "error": record["error"],
                "values": {key: configs[run_id].get(key) for key in settings},
                "result": result if is_number(result) and math.isfinite(result) else None,
                "metrics": record["metrics"],
                "curves": _curves(read_log(manager.base_dir / run_id)),
            }
        )
    results = [run for run in runs if run["result"] is not None]
    best = (max if maximize else min)(results, key=lambda run: run["result"], default=None)
    found = dict.fromkeys(name for run in runs for name in run["curves"])
    series = [name for name in SERIES if name in found] + [name for name in found if name not in SERIES]
    return {
        "title": f"Sweep {sweep}",
        "summary": _summary(runs, metric, best),
        "metric": metric,
        "maximize": maximize,
        "best": best["run_id"] if best else None,
        "settings": settings,
        "metrics": [name for name in metrics if name != metric],
        "series": series,
        "runs": runs,
    }


def _settings(manager: RunManager, sweep: str, configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The swept settings: those of the plan, else what differs between the runs."""
    if (manager.base_dir / PLANS / f"{sweep}.json").is_file():
        planned = dict.fromkeys(key for c in load_plan(manager.base_dir, sweep).combinations for key in c.values)
        return list(planned)
    keys = dict.fromkeys(key for config in configs for key in config)
    varying = [key for key in keys if any(config.get(key) != configs[0].get(key) for config in configs)]
    return [key for key in varying if key not in RESERVED]


def _curves(entries: Sequence[Mapping[str, Any]]) -> dict[str, list[list[float]]]:
    """Logged numbers by name as [step, value], thinned evenly where there are many; ends stay."""
    thinned = {}
    for name, points in curves(entries).items():
        finite = [[step, value] for step, value in points if math.isfinite(value)]
        if name not in NO_SERIES and finite:
            every = -(-len(finite) // POINTS)
            thinned[name] = finite[::every] + ([finite[-1]] if (len(finite) - 1) % every else [])
    return thinned


def _summary(runs: Sequence[Mapping[str, Any]], metric: str, best: Mapping[str, Any] | None) -> str:
    states: dict[str, int] = {}
    for run in runs:
        states[run["status"]] = states.get(run["status"], 0) + 1
    text = f"{len(runs)} runs: {', '.join(f'{count} {state}' for state, count in states.items())}."
    if best is not None:
        how = ", ".join(f"{key} = {value}" for key, value in best["values"].items())
        text += f" Best {metric}: {best['result']:.5g}" + (f" with {how}" if how else "") + f" (run {best['run_id']})."
    return f"{text} Written {now()[:16].replace('T', ' ')} UTC."


def page(data: Mapping[str, Any]) -> str:
    """The HTML page of :func:`sweep_data`."""
    folder = resources.files("sparseopt.runs")
    template, script = ((folder / name).read_text(encoding="utf-8") for name in ("report.html", "report.js"))
    policy = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    parts = {
        "@HASH@": policy,
        "@TITLE@": html.escape(str(data["title"])),
        "@DATA@": _script_json(data),
        "@SCRIPT@": script,
    }
    # Each is filled in once, from left to right: what a part holds is never searched for another.
    text, result = template, []
    for mark, part in parts.items():
        before, text = text.split(mark, 1)
        result += [before, part]
    return "".join([*result, text])


def _script_json(value: Any) -> str:
    """JSON that cannot end, or be mistaken for, markup."""

    def finite(item: Any) -> Any:
        if isinstance(item, float) and not math.isfinite(item):
            return str(item)
        if isinstance(item, Mapping):
            return {str(key): finite(inner) for key, inner in item.items()}
        return [finite(inner) for inner in item] if isinstance(item, (list, tuple)) else item

    text = json.dumps(finite(value), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def write(data: Mapping[str, Any], path: Path) -> None:
    """Writes the page of :func:`sweep_data`."""
    atomic_write(path, page(data))
