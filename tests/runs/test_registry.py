"""The registry: ids, run.json, metrics, crashed runs, the best run, errors."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

import sparseopt as so
from sparseopt.runs._record import config_hash, unflatten

CONFIG: dict[str, Any] = {
    "model": {"name": "gpt2", "context_length": 1024},
    "training": {"learning_rate": 0.0006, "correct_bias": True, "seed": 42},
    "run": {"name": "test", "init_type": "normal", "checkpoint": None},
}


@pytest.fixture
def manager(tmp_path: Path) -> so.RunManager:
    return so.RunManager(tmp_path / "saved_models")


def table(manager: so.RunManager) -> list[dict[str, str]]:
    with open(manager.base_dir / "runs.csv", newline="") as file:
        return list(csv.DictReader(file))


def script(code: str, *args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, timeout=60, check=False
    )


def test_the_seeds_workflow(manager: so.RunManager) -> None:
    run_id = manager.setup_run(CONFIG)
    assert yaml.safe_load((manager.base_dir / run_id / "config.yaml").read_text()) == CONFIG
    (row,) = table(manager)
    assert (row["run_id"], row["run_name"], row["status"]) == (run_id, "test", "created")
    assert (row["model.name"], row["training.learning_rate"], row["run.checkpoint"]) == ("gpt2", "0.0006", "")
    run_manager, value, another_value = manager, 3, "text"
    run_manager.update_metrics(run_id, {"my_custom_metric": value, "another_metric": another_value})
    run_manager.update_metrics(run_id, {"final_valid_loss": 2.5, "final_valid_perplexity": math.exp(2.5)})
    (row,) = table(manager)
    assert (row["my_custom_metric"], row["another_metric"], row["final_valid_loss"]) == ("3", "text", "2.5")
    assert float(row["final_valid_perplexity"]) == math.exp(2.5)
    assert manager.get_run_config(run_id) == CONFIG
    record = json.loads((manager.base_dir / run_id / "run.json").read_text())
    assert record["metrics"]["my_custom_metric"] == 3
    assert record["config"] == CONFIG
    assert {"host", "pid", "git_commit", "versions", "heartbeat", "status"} <= record.keys()
    assert {"python", "sparseopt", "torch"} <= record["versions"].keys()


def test_ids_sort_by_time_and_never_collide(manager: so.RunManager) -> None:
    ids = [manager.setup_run({}) for _ in range(3)]
    assert ids == sorted(ids)
    with ThreadPoolExecutor(4) as pool:
        more = list(pool.map(lambda _: manager.setup_run({}), range(8)))
    assert len({*ids, *more}) == 11
    assert [row["run_id"] for row in manager.rows()] == sorted([*ids, *more])
    assert len(table(manager)) == 11


def test_register_again_keeps_metrics(manager: so.RunManager) -> None:
    run_id = manager.setup_run(CONFIG, sweep_name="lr")
    manager.update_metrics(run_id, {"loss": 1})
    manager.register_run(run_id, {"new": {"key": [1, 2]}})
    (row,) = manager.rows()
    assert (row["loss"], row["new.key"], row["sweep_name"]) == (1, [1, 2], "lr")
    assert "model.name" not in row
    manager.register_run("abcd1234", CONFIG)
    assert manager.get_run("abcd")["config"] == CONFIG
    assert table(manager)[1]["run_id"] == "abcd1234"


def test_values(manager: so.RunManager) -> None:
    import numpy as np
    import torch

    run_id = manager.setup_run({"a": np.float32(0.5), "path": Path("x/y"), "t": (1, 2)})
    assert manager.get_run_config(run_id) == {"a": 0.5, "path": "x/y", "t": [1, 2]}
    given = {
        "nan": math.nan,
        "inf": -math.inf,
        "tensor": torch.tensor(2.0),
        "int": np.int64(3),
        "many": [1.0, math.inf],
    }
    manager.update_metrics(run_id, given)
    metrics = manager.get_run(run_id)["metrics"]
    assert math.isnan(metrics.pop("nan"))
    assert metrics == {"inf": -math.inf, "tensor": 2.0, "int": 3, "many": [1.0, math.inf]}
    json.loads((manager.base_dir / run_id / "run.json").read_text(), parse_constant=pytest.fail)  # strict JSON
    assert table(manager)[0]["inf"] == "-inf"


def test_config_file_says_the_same_to_every_reader(manager: so.RunManager) -> None:
    from sparseopt._yaml import parse

    texts = ["1e-4", "10:80:10", "null", "yes", "010", "0.5", "", "2020-01-01", "~", ".nan", "a: b", "0x1f", "1_0"]
    config = {"texts": texts, "numbers": [1e-5, 6e-4, 1e20, 3, -0.0, 1e300], "none": None, "bool": True, "ü": "ß"}
    text = (manager.base_dir / manager.setup_run(config) / "config.yaml").read_text()
    assert parse(text) == yaml.safe_load(text) == config
    assert list(parse(text)) == list(config)


def test_omegaconf(manager: so.RunManager) -> None:
    from omegaconf import OmegaConf

    run_id = manager.setup_run(OmegaConf.create({"a": 1, "b": "${a}"}))
    assert manager.get_run_config(run_id) == {"a": 1, "b": 1}


def test_a_metric_never_hides_a_column(manager: so.RunManager) -> None:
    run_id = manager.setup_run({"seed": 1, "status": "mine"})
    manager.update_metrics(run_id, {"seed": 2, "run_id": "x"})
    (row,) = manager.rows()
    assert (row["seed"], row["metrics.seed"], row["metrics.run_id"], row["run_id"]) == (1, 2, "x", run_id)
    assert (row["status"], row["config.status"]) == ("created", "mine")


def test_status(manager: so.RunManager) -> None:
    run_id = manager.setup_run({})
    with manager.tracking(run_id, interval=0.01):
        assert manager.get_run(run_id)["status"] == "running"
    assert manager.get_run(run_id)["status"] == table(manager)[0]["status"] == "finished"
    with pytest.raises(ZeroDivisionError), manager.tracking(run_id):
        _ = 1 / 0
    record = manager.get_run(run_id)
    assert (record["status"], record["error"]) == ("failed", "ZeroDivisionError: division by zero")
    manager.start_run(run_id)
    assert manager.get_run(run_id)["error"] is None


def test_heartbeat_in_the_background(manager: so.RunManager) -> None:
    run_id = manager.setup_run({})
    before = manager.get_run(run_id)["heartbeat"]
    with manager.tracking(run_id, interval=0.001):
        first = manager.get_run(run_id)["heartbeat"]
        while manager.get_run(run_id)["heartbeat"] == first:
            pass
    assert manager.get_run(run_id)["heartbeat"] > first > before


SETUP = "import os, signal, sys, sparseopt as so\nr = so.RunManager(sys.argv[1])\ni = r.setup_run({})\n"


@pytest.mark.parametrize(
    ("end", "status"),
    [("", "finished"), ("r.start_run(i); raise ValueError('bad')", "failed"), ("os.kill(os.getpid(), 9)", "crashed")],
)
def test_how_a_process_ends(manager: so.RunManager, end: str, status: str) -> None:
    script(SETUP + "r.update_metrics(i, {'final_valid_loss': 1})\n" + end, manager.base_dir)
    (row,) = manager.rows()
    assert (row["status"], row["final_valid_loss"]) == (status, 1)
    assert row["error"] == ("ValueError: bad" if status == "failed" else None)
    assert manager.get_run(row["run_id"])["status"] == status


def test_whoever_registers_for_another_does_not_book_its_end(manager: so.RunManager) -> None:
    script("import sys, sparseopt as so\nso.RunManager(sys.argv[1]).register_run('x', {})\n", manager.base_dir)
    assert [row["status"] for row in manager.rows()] == ["crashed"]


def test_crashed_elsewhere_is_told_by_the_heartbeat(manager: so.RunManager) -> None:
    run_id = manager.setup_run({})
    path = manager.base_dir / run_id / "run.json"
    record = json.loads(path.read_text()) | {"machine": "another", "pid": 1}
    path.write_text(json.dumps(record))
    assert manager.rows()[0]["status"] == "created"
    path.write_text(json.dumps(record | {"heartbeat": "2020-01-01T00:00:00+00:00"}))
    assert manager.rows()[0]["status"] == "crashed"
    assert so.RunManager(manager.base_dir, stale_after=1e12).rows()[0]["status"] == "created"


def test_a_reused_process_id_is_another_process(manager: so.RunManager) -> None:
    run_id = manager.setup_run({})
    path = manager.base_dir / run_id / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"started": "1"}))
    assert manager.rows()[0]["status"] == "crashed"
    manager.start_run(run_id)
    assert manager.rows()[0]["status"] == "running"


def test_best_run(manager: so.RunManager) -> None:
    ids = [manager.setup_run({"lr": lr}, sweep_name=name) for lr, name in ((1, "a"), (2, "a"), (3, "b"), (4, None))]
    for run_id, loss in zip(ids, (2.0, math.nan, 1.0, "none"), strict=True):
        manager.update_metrics(run_id, {"final_valid_loss": loss})
    assert manager.get_best_run()["run_id"] == ids[2]
    assert manager.get_best_run(sweep_name="a")["lr"] == 1
    assert manager.get_best_run("lr", maximize=True)["run_id"] == ids[3]
    with pytest.raises(ValueError, match=r"No run of the sweep 'c' .* has a number in the column 'final_valid_loss'"):
        manager.get_best_run(sweep_name="c")


def test_data_frame(manager: so.RunManager) -> None:
    manager.base_dir.mkdir()
    assert list(manager.get_runs_df().columns)[:2] == ["run_id", "run_name"]
    manager.update_metrics(manager.setup_run(CONFIG), {"final_valid_loss": 2.0})
    manager.setup_run({})
    frame = manager.get_runs_df()
    assert frame["final_valid_loss"].tolist()[0] == 2.0
    assert frame["final_valid_loss"].isna().tolist() == [False, True]
    assert frame["training.learning_rate"].dtype == float


def test_csv_is_only_a_view(manager: so.RunManager) -> None:
    manager.update_metrics(manager.setup_run({"text": 'a, "b"\nc', "list": [1, "x"]}), {"m": 1e-300})
    before = (manager.base_dir / "runs.csv").read_bytes()
    assert (table(manager)[0]["text"], json.loads(table(manager)[0]["list"])) == ('a, "b"\nc', [1, "x"])
    (manager.base_dir / "runs.csv").write_text("damaged")
    assert manager.rows()[0]["m"] == 1e-300
    assert manager.refresh_csv().read_bytes() == before


def test_a_kill_within_a_rebuild_is_made_up_for(manager: so.RunManager) -> None:
    manager.setup_run({})
    (manager.base_dir / "runs.csv").unlink()
    (manager.base_dir / ".runs.refreshing").touch()  # as whoever is killed leaves it
    manager.refresh_csv()
    assert len(table(manager)) == 1
    assert not list(manager.base_dir.glob(".runs.[sr]*"))


def test_errors(manager: so.RunManager) -> None:
    with pytest.raises(FileNotFoundError, match="There is no folder of runs"):
        manager.rows()
    run_id = manager.setup_run({})
    for call in (manager.get_run_config, manager.finish_run, manager.start_run, manager.heartbeat):
        with pytest.raises(FileNotFoundError, match="There is no run 'nowhere' in"):
            call("nowhere")
    with pytest.raises(FileNotFoundError, match="There is no run 'nowhere' in"):
        manager.update_metrics("nowhere", {"a": 1})
    for wrong in ("../x", "", ".hidden", "a/b"):
        with pytest.raises(ValueError, match="A run id must be the name of a folder"):
            manager.update_metrics(wrong, {})
    with pytest.raises(TypeError, match=r"metric a must be a number, .* got object"):
        manager.update_metrics(run_id, {"a": object()})
    with pytest.raises(TypeError, match=r"metric a must be .* got a dict"):
        manager.update_metrics(run_id, {"a": {}})
    with pytest.raises(TypeError, match=r"training\.lr must be .* got set"):
        manager.setup_run({"training": {"lr": {1}}})
    with pytest.raises(TypeError, match="The configuration must be a dict, got list"):
        manager.setup_run([])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="status must be finished, failed or crashed, got 'done'"):
        manager.finish_run(run_id, "done")
    with pytest.raises(ValueError, match="stale_after must be a positive number"):
        so.RunManager("x", stale_after=0)
    manager.setup_run({})
    with pytest.raises(ValueError, match="2 runs begin with '20"):
        manager.get_run("20")
    assert len(manager.rows()) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        ("{}", "is not a run's record"),
        ('{"format": "sparseopt.run", "version": 2}', "has version 2; this release reads version 1"),
        ('{"format": "sparseopt.run", "version": 1}', "must hold the dicts"),
        ('{"format": "sparseopt.run", "version": 1, "config": {}, "metrics": {}, "status": "x"}', "has the status 'x'"),
    ],
)
def test_a_damaged_record_hides_no_other_run(manager: so.RunManager, content: str, message: str) -> None:
    good, bad = manager.setup_run({}), manager.setup_run({})
    (manager.base_dir / bad / "run.json").write_text(content)
    with pytest.warns(UserWarning, match=message):
        assert [row["run_id"] for row in manager.rows()] == [good]
    with pytest.raises(so.FormatError, match=message):
        manager.update_metrics(bad, {"a": 1})
    manager.update_metrics(good, {"a": 1})
    assert table(manager)[0]["a"] == "1"


def test_read_only_needs_no_heavy_import(manager: so.RunManager) -> None:
    run_id = manager.setup_run(CONFIG)
    code = (
        "import sys, sparseopt as so\n"
        "r = so.RunManager(sys.argv[1]); r.rows(); r.update_metrics(sys.argv[2], {'a': 1}); r.get_best_run('a')\n"
        "print([m for m in ('torch', 'numpy', 'pandas', 'omegaconf', 'rich', 'typer') if m in sys.modules])"
    )
    assert script(code, manager.base_dir, run_id).stdout == "[]\n"


def test_config_hash() -> None:
    assert config_hash({"a": 1, "b": {"c": 2.0}}) == config_hash({"b": {"c": 2}, "a": 1.0})
    assert len({config_hash(c) for c in ({"a": 1}, {"a": "1"}, {"a": True}, {"a": 1.5}, {"a": None}, {})}) == 6
    assert unflatten({"a.b": 1, "a.c": 2, "d": 3}) == {"a": {"b": 1, "c": 2}, "d": 3}
    with pytest.raises(ValueError, match=r"'a\.b\.c' needs a section 'b'"):
        unflatten({"a.b": 1, "a.b.c": 2})


def test_runs_of_a_forked_child_stay_open(manager: so.RunManager) -> None:
    code = SETUP + (
        "pid = os.fork()\n"
        "if pid == 0:\n    sys.exit()\n"  # with the handlers of the parent
        "os.waitpid(pid, 0)\nprint(r.get_run(i)['status'])"
    )
    assert script(code, manager.base_dir).stdout == "created\n"
    assert os.path.isdir(manager.base_dir)
