"""``sparseopt project run`` and ``full-grads``: files, resuming, workers."""

from __future__ import annotations

import glob
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from process_group import processes
from projecting import MODEL, make, project

from sparseopt.projection._statistics import merge
from sparseopt.projection.pipeline import Data, FullRun, Projection, ProjectRun
from sparseopt.projection.store import ProjectionStore


@pytest.fixture
def source(tmp_path: Path) -> str:
    generator = torch.Generator().manual_seed(0)
    letters = torch.randint(97, 123, (40, 64), generator=generator)
    (tmp_path / "text").mkdir()
    for i, row in enumerate(letters):
        (tmp_path / "text" / f"{i:02}.txt").write_text("".join(map(chr, row.tolist())))
    return str(tmp_path / "text")


def store_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "shards").iterdir())}


def test_files_of_a_run_and_the_documented_way_to_load_them(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = make(source, tmp_path / "projections", save_interval=4).execute()
    assert (found["samples_stored"], found["exported_files"]) == (20, 7)
    assert found["weights"] == "random (seed 1)"
    monkeypatch.chdir(tmp_path)
    with open("projections/metadata.json") as file:
        metadata = json.load(file)
    rows = torch.cat([torch.load(path)["proj"] for path in sorted(glob.glob("projections/proj_iter_*.pt"))])
    assert rows.shape == (20, metadata["total_proj_dim"])
    assert torch.equal(rows, ProjectionStore("projections").rows(range(20)))
    first = torch.load("projections/proj_iter_000001.pt")
    assert (first["iter"], first["batch_size"], first["batch_idx"]) == (1, 3, [0, 1, 2])
    assert torch.load("projections/proj_iter_000007.pt")["batch_idx"] == [18, 19]
    config = json.loads(Path("projections/run_config.json").read_text())
    assert config["model"]["weights"] == "random (seed 1)"
    assert config["projection"]["rank_total"] == 16
    statistics = json.loads(Path("projections/projection_stats.json").read_text())
    assert (statistics["samples"], statistics["batches"], statistics["tokens"]) == (20, 7, 640)
    assert 4 < statistics["mean_loss"] < 7, "near ln 256 for random weights"
    assert statistics["tokens_per_second"] > 0


def test_a_run_goes_on_where_it_was_and_may_take_more_samples(source: str, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    make(source, whole, max_samples=20).execute()
    make(source, tmp_path / "parts", max_samples=8, export=False).execute()
    found = make(source, tmp_path / "parts", max_samples=20).execute()
    assert found["samples"] == 20, "statistics go on too; sample 8 and 9 complete a batch that was begun"
    assert torch.equal(ProjectionStore(whole).rows(range(6)), ProjectionStore(tmp_path / "parts").rows(range(6)))
    torch.testing.assert_close(
        ProjectionStore(whole).rows(range(20)),
        ProjectionStore(tmp_path / "parts").rows(range(20)),
        rtol=1e-4,
        atol=1e-5,
    )
    before = store_bytes(whole)
    assert make(source, whole, max_samples=20).execute()["batches"] == 7, "nothing was computed again"
    assert store_bytes(whole) == before


def test_two_workers_fill_what_one_would(source: str, tmp_path: Path) -> None:
    make(source, tmp_path / "one").execute()
    first = make(source, tmp_path / "two", worker=0, workers=2).execute()
    assert "exported_files" not in first, "the other's batches are missing"
    second = make(source, tmp_path / "two", worker=1, workers=2).execute()
    assert second["exported_files"] == 7
    assert store_bytes(tmp_path / "one") == store_bytes(tmp_path / "two")
    assert first["samples"] + second["samples"] == 20


def test_processes_of_a_launch_fill_what_one_would(source: str, tmp_path: Path) -> None:
    one = make(source, tmp_path / "one").execute()
    both = processes(2)(project, source, str(tmp_path / "two"), {})
    assert [found.get("exported_files") for found in both] == [7, None]
    assert store_bytes(tmp_path / "one") == store_bytes(tmp_path / "two")
    names = {path.name for path in (tmp_path / "two").iterdir() if not path.name.startswith(".")}
    assert names == {path.name for path in (tmp_path / "one").iterdir() if not path.name.startswith(".")}
    kept = json.loads((tmp_path / "two" / "projection_stats.json").read_text())
    for key in ("samples", "batches", "tokens"):
        assert both[0][key] == both[1][key] == kept[key] == one[key]
    assert kept["mean_loss"] == pytest.approx(one["mean_loss"], rel=1e-6)


def test_a_launch_goes_on_with_what_others_began(source: str, tmp_path: Path) -> None:
    """A run alone, a worker that never came back, then a launch, then one more."""
    make(source, tmp_path / "whole", max_samples=36).execute()
    make(source, tmp_path / "parts", max_samples=6).execute()
    make(source, tmp_path / "parts", max_samples=20, worker=1, workers=3).execute()
    first, _ = processes(2)(project, source, str(tmp_path / "parts"), {"max_samples": 21})
    assert first["samples"] == first["samples_stored"] == 21
    second, _ = processes(2)(project, source, str(tmp_path / "parts"), {"max_samples": 36})
    assert second["samples"] == second["samples_stored"] == 36
    assert store_bytes(tmp_path / "whole") == store_bytes(tmp_path / "parts")
    assert not list((tmp_path / "parts").glob("projection_stats_*.json"))


def test_statistics_that_were_merged_before_a_kill_count_once(source: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    make(source, folder, worker=1, workers=2).execute()
    left = (folder / "projection_stats_1.json").read_bytes()
    merge(folder, torch.device("cpu"))
    (folder / "projection_stats_1.json").write_bytes(left)  # a kill came before it was removed
    merge(folder, torch.device("cpu"))
    once = json.loads(left)["samples"]
    assert json.loads((folder / "projection_stats.json").read_text())["samples"] == once
    (folder / "projection_stats_1.json").write_bytes(left)
    found = make(source, folder, max_samples=24, worker=1, workers=2).execute()
    assert found["samples"] == 24 / 2 - once, "of this run, which does not continue what was merged"


def test_full_gradients_are_of_one_process(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    job = FullRun(MODEL, Data(source, block_size=32, max_samples=2), torch.device("cpu"), output_dir=tmp_path / "full")
    with pytest.raises(ValueError, match="full-grads runs in one process, got 2: start it without a launcher"):
        job.execute()


@pytest.mark.slow
def test_torchrun_splits_the_samples(source: str, tmp_path: Path) -> None:
    words = [
        "-m", "sparseopt", "project", "run", "--model", "tiny", "--random_weights", "--model_dtype", "float32", "--device",
        "cpu", "--data", source, "--block_size", "32", "--max_samples", "20", "--seed", "1", "--batch_size", "3",
        "--proj_rank_total", "16", "--proj_rank_min", "2", "--proj_dtype", "float32", "--json", "--output_dir",
    ]  # fmt: skip
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [sys.executable, "-P", *launcher, *words, str(tmp_path / "two")], capture_output=True, text=True, check=False,
        timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["samples_stored"] == 20
    assert done.stderr.count("done in") == 2, "projecting and exporting, of the first process"
    make(source, tmp_path / "one").execute()
    assert store_bytes(tmp_path / "one") == store_bytes(tmp_path / "two")


def test_ctrl_c_keeps_batches_that_wait(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make(source, tmp_path / "run", save_interval=100)
    passes = ProjectRun._passes

    def interrupted(self: ProjectRun, projector: Any) -> Any:
        run, calls = passes(self, projector), []

        def one(*batch: Any) -> Any:
            calls.append(None)
            if len(calls) == 4:
                raise KeyboardInterrupt
            return run(*batch)

        return one

    monkeypatch.setattr(ProjectRun, "_passes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        job.execute()
    assert ProjectionStore(tmp_path / "run").completed.tolist() == list(range(9))
    monkeypatch.undo()
    make(source, tmp_path / "whole").execute()
    job.execute()
    assert store_bytes(tmp_path / "run") == store_bytes(tmp_path / "whole")


@pytest.mark.slow
def test_killed_it_ends_with_the_same_bytes(source: str, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "sparseopt", "project", "run", "--random_weights", "--model", "tiny", "--model_dtype", "float32",
        "--data", source, "--block_size", "32", "--max_samples", "60", "--batch_size", "2", "--proj_rank_total", "16",
        "--proj_dtype", "float32", "--device", "cpu",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole, killed = (
        [*command, "--output_dir", str(tmp_path / "whole")],
        [*command, "--output_dir", str(tmp_path / "killed")],
    )
    subprocess.run(whole, env=environment, check=True, capture_output=True)
    process = subprocess.Popen(killed, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    marks = tmp_path / "killed" / "shards" / "shard_000000.done"
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if marks.is_file() and sum(marks.read_bytes()) >= 6:
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert sum(marks.read_bytes()) >= 6
    subprocess.run(killed, env=environment, check=True, capture_output=True)
    assert store_bytes(tmp_path / "killed") == store_bytes(tmp_path / "whole")
    assert len(list((tmp_path / "killed").glob("proj_iter_*.pt"))) == 30


def test_another_run_may_not_come_into_a_folder(source: str, tmp_path: Path) -> None:
    make(source, tmp_path / "run", max_samples=3).execute()
    with pytest.raises(ValueError, match="other projections"):
        make(source, tmp_path / "run", rank_total=25).execute()
    other = ProjectRun(
        MODEL, Data(source, block_size=32, max_samples=3, seed=2), torch.device("cpu"),
        Projection(rank_total=16, rank_min=2, dtype="float32"), output_dir=tmp_path / "run", batch_size=3,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"other settings: (model|data)"):
        other.execute()


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"worker": 2, "workers": 2}, "worker must be below workers"), ({"cuda_graph": True}, "needs a CUDA device"),
     ({"save_interval": 0}, "save_interval must be at least 1")],
)  # fmt: skip
def test_settings_out_of_range(source: str, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make(source, tmp_path / "run", **changes).execute()


def test_blocks_longer_than_the_model_reads_are_refused(source: str) -> None:
    with pytest.raises(ValueError, match="reads at most 512 tokens"):
        ProjectRun(MODEL, Data(source, block_size=513), torch.device("cpu")).execute()


def test_error_analysis_of_two_ranks_finds_the_exact_gradients(source: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from sparseopt.projection.errors import analyse

    results = tmp_path / "Results"
    for rank in (16, 256):
        make(source, None, results_dir=results, rank_total=rank, max_samples=9).execute()
    full = FullRun(MODEL, Data(source, block_size=32, max_samples=9, seed=1), torch.device("cpu"), "float32", results)
    found = full.execute()
    assert found["written"] == 9
    assert full.execute()["written"] == 0, "they are there"
    for reference in ("full_layers", "rank=256", "naive_proj_layers=256"):
        result = analyse(results, r"rank_total_\d+_rank_min_2", num_ref=3, reference=reference)
        assert result["ranks"] == ([16] if reference == "rank=256" else [16, 256]), (
            "a reference is not judged by itself"
        )
        assert result["rmse_values"] == sorted(result["rmse_values"], reverse=True)
    assert result["relative_errors_percent"][1] < 0.1, "the same matrices, rebuilt, on exact gradients"
    assert len(list((tmp_path / "Plots").glob("*.pdf"))) == 9
