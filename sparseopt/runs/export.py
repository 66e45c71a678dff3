"""Runs as other trackers keep them: offline runs of Weights & Biases, or a file store of MLflow.

The MLflow store is written as the plain folder of YAML and text files that ``mlflow.tracking`` reads; MLflow itself is
not needed. W&B files are written by ``wandb`` in offline mode, without a network; ``wandb sync`` uploads them.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from sparseopt._files import atomic_folder, atomic_write
from sparseopt.progress import track
from sparseopt.runs._record import flatten

__all__ = ["to_mlflow", "to_wandb"]

# RunStatus of MLflow
_STATUS = {"created": 2, "running": 1, "finished": 3, "failed": 4, "crashed": 5}
_LOCAL_SOURCE = 4
# What MLflow takes in names of parameters, metrics and tags.
_FORBIDDEN = re.compile(r"[^\w\-. /]")


Curves = Mapping[str, Mapping[str, Sequence[tuple[int | float, int | float]]]]


def to_wandb(
    records: Sequence[Mapping[str, Any]], output_dir: Path, project: str, logged: Curves | None = None
) -> list[Path]:
    """Writes runs (records of ``RunManager.get_run``) as offline runs, and returns their folders.

    What was logged (``logged``: run id -> curves of :func:`sparseopt.runs.log.curves`) becomes the history, metrics become the
    summary, the configuration the config, the sweep the group; ids stay, so that exporting again and syncing updates the
    same runs.

    Raises:
        ModuleNotFoundError: wandb is not installed.
    """
    try:
        import wandb
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Exporting to W&B needs the package 'wandb' (pip install wandb); --to mlflow needs nothing.", name=None
        ) from error
    output_dir.mkdir(parents=True, exist_ok=True)
    folders = []
    alone = wandb.run is None
    for record in track(records, "export", unit="run"):
        run = wandb.init(
            project=project,
            dir=str(output_dir),
            mode="offline",
            id=str(record["run_id"]),
            name=str(record["run_name"] or record["run_id"]),
            group=record["sweep_name"],
            config=dict(record["config"]),
            settings=wandb.Settings(
                console="off", silent=True, disable_git=True, save_code=False, x_disable_stats=True, x_disable_meta=True
            ),
        )
        for step, values in _by_step((logged or {}).get(str(record["run_id"]), {})).items():
            run.log(values, step=step)
        run.summary.update({**record["metrics"], "status": record["status"]})
        folders.append(Path(run.dir).parent)
        run.finish(exit_code=0 if record["status"] == "finished" else 1)
    if alone:  # else a run that this process begins later would find the settings of today's environment
        wandb.teardown()
    return folders


def _by_step(curves: Mapping[str, Sequence[tuple[int | float, int | float]]]) -> dict[int, dict[str, int | float]]:
    steps: dict[int, dict[str, int | float]] = {}
    for name, points in curves.items():
        for step, value in points:
            steps.setdefault(int(step), {})[name] = value
    return dict(sorted(steps.items()))


def to_mlflow(
    records: Sequence[Mapping[str, Any]], output_dir: Path, experiment: str, logged: Curves | None = None
) -> list[Path]:
    """Writes runs (records of ``RunManager.get_run``) into a file store of MLflow, and returns their folders.

    Numbers among the metrics become metrics (bools 0 and 1), and so does what was logged (``logged``: run id -> curves of
    :func:`sparseopt.runs.log.curves`), step by step; other values become tags, the configuration parameters by dotted
    keys. A run that is there already is replaced.

    Raises:
        ValueError: the name of the experiment is empty.
    """
    if not experiment.strip():
        raise ValueError("The name of an MLflow experiment must not be empty.")
    root = output_dir / _experiment_id(experiment)
    meta = root / "meta.yaml"
    if not meta.exists():
        times = [_milliseconds(record["timestamp"]) for record in records] or [0]
        content = {
            "artifact_location": root.absolute().as_uri(),
            "creation_time": min(times),
            "experiment_id": root.name,
            "last_update_time": max(times),
            "lifecycle_stage": "active",
            "name": experiment,
        }
        atomic_write(meta, _yaml(content))
    return [
        _write_run(record, root, (logged or {}).get(str(record["run_id"]), {}))
        for record in track(records, "export", unit="run")
    ]


def _experiment_id(name: str) -> str:
    """An id as MLflow makes them (18 digits), the same for the same name."""
    return str(10**17 + int(hashlib.sha256(name.encode()).hexdigest(), 16) % (9 * 10**17))


def _write_run(
    record: Mapping[str, Any], root: Path, curves: Mapping[str, Sequence[tuple[int | float, int | float]]]
) -> Path:
    run_id = str(record["run_id"])
    # MLflow's own ids have this form, whatever ours look like.
    uuid = hashlib.sha256(run_id.encode()).hexdigest()[:32]
    start, end = _milliseconds(record["timestamp"]), _milliseconds(record["heartbeat"])
    name = str(record["run_name"] or run_id)
    tags = {"mlflow.runName": name, "mlflow.source.type": "LOCAL", "run_id": run_id, "status": record["status"]}
    tags |= (
        {"mlflow.source.git.commit": str(record["git_commit"]).removesuffix("-dirty")} if record["git_commit"] else {}
    )
    tags |= {key: record[key] for key in ("sweep_name", "host", "error") if record.get(key) is not None}
    numbers = {key: value for key, value in record["metrics"].items() if isinstance(value, (int, float))}
    tags |= {key: value for key, value in record["metrics"].items() if key not in numbers}
    meta: dict[str, Any] = {
        "artifact_uri": f"{root.absolute().as_uri()}/{uuid}/artifacts",
        "end_time": None if record["status"] in ("created", "running") else end,
        "entry_point_name": "",
        "experiment_id": root.name,
        "lifecycle_stage": "active",
        "run_id": uuid,
        "run_name": name,
        "run_uuid": uuid,
        "source_name": "",
        "source_type": _LOCAL_SOURCE,
        "source_version": "",
        "start_time": start,
        "status": _STATUS[record["status"]],
        "tags": [],
        "user_id": "",
    }
    with atomic_folder(root / uuid, replace=True) as folder:
        for kind in ("artifacts", "metrics", "params", "tags"):
            (folder / kind).mkdir()
        (folder / "meta.yaml").write_text(_yaml(meta))
        for key in dict.fromkeys([*curves, *numbers]):
            points = list(curves.get(key, ()))
            if key in numbers:  # the result, at the end of what was logged under its name
                points.append((points[-1][0] if points else 0, numbers[key]))
            _put(folder / "metrics", key, "".join(f"{end} {float(value)!r} {int(step)}\n" for step, value in points))
        for key, value in flatten(record["config"]).items():
            _put(folder / "params", key, str(value))
        for key, value in tags.items():
            _put(folder / "tags", key, str(value))
    return root / uuid


def _put(folder: Path, key: str, text: str) -> None:
    # A name is a path within the folder: keep it inside.
    name = os.path.normpath("/" + _FORBIDDEN.sub("_", key)).lstrip("/") or "_"
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _milliseconds(time: str) -> int:
    return int(datetime.fromisoformat(time).timestamp() * 1000)


def _yaml(content: Mapping[str, Any]) -> str:
    import yaml

    return str(yaml.safe_dump(dict(content), default_flow_style=False))
