"""Runs as files of other trackers."""

from __future__ import annotations

import json
import math
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

import sparseopt as so
from sparseopt.cli._main import app


@pytest.fixture
def base(tmp_path: Path) -> Path:
    manager = so.RunManager(tmp_path / "saved_models")
    manager.register_run("a", {"training": {"learning_rate": 6e-4}, "run": {"name": "first"}}, sweep_name="s")
    manager.update_metrics("a", {"final_valid_loss": 2.5, "eval/nan": math.nan, "note": "text", "../up: 100%": 1})
    manager.finish_run("a")
    # Step 5 was done again after a restart.
    (manager.base_dir / "a" / "log.jsonl").write_text(
        '{"step": 5, "loss": 4.0}\n{"step": 10, "loss": 3.0}\n{"step": 5, "loss": 3.5, "final_valid_loss": 2.75}\n{"note": 1}\n'
    )
    manager.register_run("b", {})
    return manager.base_dir


def export(base: Path, *args: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["runs", "export", *args, "--base_dir", str(base)])
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else " ".join(result.stderr.replace("│", " ").split())


def test_mlflow(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "mlruns"
    folders = [Path(f) for f in json.loads(export(base, "--output_dir", str(out), "--json"))["folders"]]
    (experiment,) = out.iterdir()
    meta = yaml.safe_load((experiment / "meta.yaml").read_text())
    assert (meta["name"], meta["experiment_id"], meta["lifecycle_stage"]) == ("sparseopt", experiment.name, "active")
    first = folders[0]
    meta = yaml.safe_load((first / "meta.yaml").read_text())
    assert (meta["run_name"], meta["status"], meta["run_id"], meta["run_uuid"]) == ("first", 3, first.name, first.name)
    assert meta["start_time"] <= meta["end_time"]
    assert (first / "params" / "training.learning_rate").read_text() == "0.0006"
    end = meta["end_time"]
    assert (first / "metrics" / "final_valid_loss").read_text() == f"{end} 2.75 5\n{end} 2.5 5\n"
    assert (first / "metrics" / "loss").read_text() == f"{end} 3.5 5\n{end} 3.0 10\n"
    assert (first / "metrics" / "eval" / "nan").read_text().split()[1] == "nan"
    assert (first / "metrics" / "up_ 100_").exists()
    assert (first / "tags" / "note").read_text() == "text"
    assert (first / "tags" / "sweep_name").read_text() == "s"
    assert yaml.safe_load((folders[1] / "meta.yaml").read_text())["end_time"] is None
    before = sorted(path.relative_to(out) for path in out.rglob("*"))
    export(base, "--output_dir", str(out))
    assert sorted(path.relative_to(out) for path in out.rglob("*")) == before


def test_selection_and_errors(base: Path, tmp_path: Path) -> None:
    out = ("--output_dir", str(tmp_path / "out"))
    assert len(json.loads(export(base, "--filter_sweep", "s", *out, "--json"))["folders"]) == 1
    assert "1 runs written to" in export(base, "b", *out)
    assert "There is no run to export" in export(base, "--filter_sweep", "x", *out, code=1)
    assert "There is no run 'c'" in export(base, "c", *out, code=1)
    assert "--to must be wandb or mlflow, got 'x'" in export(base, "--to", "x", code=2)
    assert "must not be empty" in export(base, "--project", " ", *out, code=1)


def test_without_wandb(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert "needs the package 'wandb'" in export(base, "--to", "wandb", "--output_dir", str(tmp_path), code=1)


def log_records(data: bytes) -> Iterator[bytes]:
    """The records of a .wandb file: after 7 bytes, blocks of 32 KiB of (crc, length, type) and a piece of a record."""
    position, record = 7, b""
    while position < len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
        _, length, kind = struct.unpack_from("<IHB", data, position)
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""


def test_wandb(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    out = json.loads(export(base, "a", "--to", "wandb", "--output_dir", str(tmp_path / "out"), "--json"))
    (file,) = Path(out["folders"][0]).glob("*.wandb")
    summary, history, run = {}, [], None
    for data in log_records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "run":
            run = record.run
        if record.WhichOneof("record_type") == "history":
            items = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            history.append((record.history.step.num, items["loss"]))
        for item in record.summary.update:
            summary[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
    assert run is not None
    assert (run.run_id, run.display_name, run.run_group, run.project) == ("a", "first", "s", "sparseopt")
    assert {item.key: json.loads(item.value_json) for item in run.config.update}["training"] == {"learning_rate": 6e-4}
    assert (summary["final_valid_loss"], summary["status"]) == (2.5, "finished")
    assert history == [(5, 3.5), (10, 3.0)]
