"""``sparseopt masks push|pull|steps|prune`` and ``deltas push`` on local folders; the Hub itself is in tests/hub."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import sparseopt as so
from sparseopt.cli._main import app


@pytest.fixture
def mask_file(tmp_path: Path) -> Path:
    masks = so.MaskSet.random({"w": torch.empty(30, 10)}, 0.1, metadata={"step": 5, "base_model": "org/tiny"})
    masks.save(tmp_path / "mask.safetensors")
    return tmp_path / "mask.safetensors"


def run(*args: object, code: int = 0, stdin: str | None = None) -> str:
    result = CliRunner().invoke(app, [str(arg) for arg in args], input=stdin)
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.output


def test_push_steps_pull_prune(mask_file: Path, tmp_path: Path) -> None:
    repo = tmp_path / "repo"
    pushed = json.loads(run("masks", "push", mask_file, "--repo-id", repo, "--json"))
    assert (pushed["repository"], pushed["step"], pushed["active_parameters"]) == (str(repo), 5, 30)
    counts = {key: pushed[key] for key in ("active_parameters", "total_parameters", "fingerprint")}
    assert pushed.keys() == {"repository", "step", *counts}
    for step, extra in ((10, ()), (20, ("--format", "pt")), (30, ("--parent_step", "5"))):
        assert f"step {step}, 30 of 300" in run("masks", "push", mask_file, "--repo_id", repo, "--step", step, *extra)
    report = json.loads(run("masks", "steps", repo, "--json"))
    assert [row["step"] for row in report["steps"]] == [5, 10, 20, 30]
    assert report["bytes"] == sum(row["bytes"] for row in report["steps"])
    assert f"4 steps, {report['bytes']:,} bytes" in run("masks", "steps", repo)
    for step, name in (("latest", "a.safetensors"), ("20", "b.pt")):
        pulled = json.loads(run("masks", "pull", repo, "--step", step, "--output", tmp_path / name, "--json"))
        assert pulled == {"output": str(tmp_path / name), "step": 30 if step == "latest" else 20, **counts}
        assert so.MaskSet.load(tmp_path / name) == so.MaskSet.load(mask_file)
    spoken = run("masks", "pull", repo, "--step", "20", "--output", tmp_path / "b.pt")
    assert spoken == f"{tmp_path / 'b.pt'}: step 20, 30 of 300 entries active\n"
    assert "nothing was deleted" in run("masks", "prune", repo, "--keep", "1", stdin="n\n", code=1)
    gone = sum(row["bytes"] for row in report["steps"][1:3])
    assert f"deleted 2 steps (10 to 20), {gone:,} bytes; 2 steps are left" in run(
        "masks", "prune", repo, "--keep", "1", "--yes"
    )
    assert json.loads(run("masks", "prune", repo, "--keep", "1", "--yes", "--json"))["kept"] == [5, 30]


def test_push_pending(mask_file: Path, tmp_path: Path) -> None:
    from sparseopt._hub_spool import make_entry

    for step in (2, 1):
        make_entry(tmp_path / "spool", str(tmp_path / "repo"), step, True, mask_file, {"step": step})
    assert "2 uploaded" in run("masks", "push", "--pending", tmp_path / "spool")
    assert json.loads(run("masks", "push", "--pending", tmp_path / "spool", "--json")) == {"uploaded": []}
    assert [row["step"] for row in json.loads(run("masks", "steps", tmp_path / "repo", "--json"))["steps"]] == [1, 2]


def test_the_example_names_the_folder_where_uploads_wait() -> None:
    pytest.importorskip("transformers")
    from sparseopt.trainers import MaskCollector

    assert f"--pending {MaskCollector('outputs').folder / 'spool'}\n" in run("masks", "push", "--help")


def test_deltas_push(tmp_path: Path) -> None:
    delta = so.Delta.from_dict({"w": (torch.tensor([1]), torch.tensor([0.5]))}, {"w": (8,)}, step=3)
    delta.save(tmp_path / "d.safetensors")
    args = ("deltas", "push", tmp_path / "d.safetensors", "--repo_id", tmp_path / "repo")
    assert json.loads(run(*args, "--base_model", "org/tiny", "--json"))["file"] == "delta_step_3.safetensors"
    assert so.Delta.load(tmp_path / "repo" / "delta_step_3.safetensors") == delta
    assert "1 changed entries" in run(*args)
    assert "--repo_id is missing" in run("deltas", "push", tmp_path / "d.safetensors", code=2)


def test_bad_usage_is_2_and_failures_are_1(mask_file: Path, tmp_path: Path) -> None:
    wrong: list[tuple[tuple[object, ...], str]] = [
        (("push",), "give either FILE or --pending DIR."),
        (("push", mask_file, "--pending", tmp_path), "give either FILE or --pending DIR."),
        (("push", "--pending", tmp_path, "--step", "1"), "--pending takes no other option"),
        (("push", mask_file, "--repo_id", tmp_path / "r", "--format", "npz"), "safetensors or pt, got 'npz'."),
        (("pull", tmp_path, "--step", "../1", "--output", tmp_path / "m.pt"), "a number or latest, got '../1'."),
        (("pull", tmp_path, "--output", tmp_path / "m.txt"), "must end in .safetensors or .pt, got "),
        (("prune", tmp_path, "--keep", "0"), "'--keep'"),
        (("prune", tmp_path), "'--keep'"),
        (("steps",), "'REPO'"),
    ]
    for args, message in wrong:
        text = " ".join(run("masks", *args, code=2).split())
        assert message in text
        assert text.count("Error: ") == 1
    absent = tmp_path / "none"
    for args, message in (
        (("push", tmp_path / "none.safetensors", "--repo_id", "r"), f"there is no mask file '{absent}.safetensors'."),
        (("pull", absent, "--output", tmp_path / "m.pt"), f"'{absent}'"),
        (("steps", absent), f"'{absent}'"),
        (("prune", absent, "--keep", "1"), f"'{absent}'"),
    ):
        text = run("masks", *args, code=1)
        assert message in text
        assert text.startswith("Error: ")
        assert len(text.splitlines()) == 1
    assert "there is no folder" in run("masks", "steps", tmp_path / "none", code=1)
    assert "holds no masks" in run("masks", "pull", tmp_path, "--output", tmp_path / "m.pt", code=1)
    so.MaskSet.from_bool({"w": torch.ones(3, dtype=torch.bool)}).save(tmp_path / "bare.safetensors")
    assert "--step is missing" in run("masks", "push", tmp_path / "bare.safetensors", "--repo_id", tmp_path, code=2)
    assert "--repo_id is missing" in run("masks", "push", tmp_path / "bare.safetensors", "--step", "1", code=2)
