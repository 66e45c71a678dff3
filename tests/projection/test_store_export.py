"""export_pt: the documented files, the documented loading snippet."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sparseopt import FormatError
from sparseopt.projection._store_export import exported
from sparseopt.projection.store import ProjectionStore

LAYERS = [
    {
        "name": "h.0.mlp",
        "type": "Linear",
        "original_shape": [8, 4],
        "k_i": 2,
        "k_o": 3,
        "slice_start": 0,
        "slice_end": 6,
    },
    {
        "name": "h.1.mlp",
        "type": "Linear",
        "original_shape": [8, 4],
        "k_i": 2,
        "k_o": 2,
        "slice_start": 6,
        "slice_end": 10,
    },
]
METADATA: dict[str, Any] = {
    "proj_rank_total": 6, "proj_seed": 42, "proj_method": "gaussian", "total_proj_dim": 10, "proj_dtype": "bfloat16",
    "layers": LAYERS,
}  # fmt: skip
ROWS = torch.arange(130 * 10).view(130, 10).remainder(251).to(torch.bfloat16)

SNIPPET = """
import torch
import json
import glob

# Load metadata
with open('projections/metadata.json', 'r') as f:
    metadata = json.load(f)

# Load all projection files
proj_files = sorted(glob.glob('projections/proj_iter_*.pt'))
all_projections = []

for file_path in proj_files:
    data = torch.load(file_path)
    all_projections.append(data['proj'])

# Concatenate all projections
projections = torch.cat(all_projections, dim=0)
print(f"Loaded projections: {projections.shape}")

# Access layer information
for layer in metadata['layers']:
    print(f"Layer: {layer['name']}, k_i={layer['k_i']}, k_o={layer['k_o']}")
    start, end = layer['slice_start'], layer['slice_end']
    layer_proj = projections[:, start:end]
    print(f"  Projection slice: {layer_proj.shape}")
"""


@pytest.fixture
def store(tmp_path: Path) -> ProjectionStore:
    with ProjectionStore(tmp_path / "store", METADATA, shard_rows=16) as store:
        store.write(range(45), ROWS[:45])
    return store


def test_the_documented_snippet_runs(
    store: ProjectionStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert store.export_pt(tmp_path / "projections", batch_size=4) == 12
    # Its own process: relative paths, no sparseopt, torch.load with its defaults.
    result = subprocess.run([sys.executable, "-c", SNIPPET], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == [
        "Loaded projections: torch.Size([45, 10])",
        "Layer: h.0.mlp, k_i=2, k_o=3", "  Projection slice: torch.Size([45, 6])",
        "Layer: h.1.mlp, k_i=2, k_o=2", "  Projection slice: torch.Size([45, 4])"]  # fmt: skip


def test_files_are_the_documented_ones(store: ProjectionStore, tmp_path: Path) -> None:
    out = tmp_path / "out"
    store.export_pt(out, batch_size=4)
    names = [f"proj_iter_{i:06d}.pt" for i in range(1, 13)]
    assert sorted(os.listdir(out)) == ["metadata.json", *names]
    for i, name in enumerate(names):
        contents = torch.load(out / name)
        ids = list(range(4 * i, min(4 * i + 4, 45)))
        assert list(contents) == ["proj", "iter", "batch_size", "batch_idx"]
        assert (contents["iter"], contents["batch_size"], contents["batch_idx"]) == (i + 1, len(ids), ids)
        assert contents["proj"].dtype == torch.bfloat16
        assert contents["proj"].equal(ROWS[ids])
        assert contents["proj"].untyped_storage().nbytes() == len(ids) * 20  # not a view of more
    written = json.loads((out / "metadata.json").read_text())
    assert {key: written[key] for key in METADATA} == METADATA
    parts = list(exported(out, 10))
    assert [i for _, ids, _ in parts for i in ids] == list(range(45))
    assert torch.cat([rows for _, _, rows in parts]).equal(ROWS[:45])


def test_default_batch_and_the_stores_own_folder(store: ProjectionStore) -> None:
    assert store.export_pt(store.path) == 3
    assert torch.load(store.path / "proj_iter_000003.pt")["proj"].equal(ROWS[32:45])
    assert ProjectionStore(store.path).rows(range(45)).equal(ROWS[:45])


def test_export_again_after_more_rows(store: ProjectionStore, tmp_path: Path) -> None:
    out = tmp_path / "out"
    store.export_pt(out, 10)
    with ProjectionStore(store.path, METADATA) as more:
        more.write(range(45, 52), ROWS[45:52])
    whole = (out / "proj_iter_000003.pt").read_bytes()
    assert more.export_pt(out, 10) == 6
    assert (out / "proj_iter_000003.pt").read_bytes() == whole
    assert torch.cat([rows for _, _, rows in exported(out, 10)]).equal(ROWS[:52])
    with pytest.raises(ValueError, match=r"proj_iter_000004\.pt' belongs to another export"):
        more.export_pt(out, 20)
    assert torch.cat([rows for _, _, rows in exported(out, 10)]).equal(ROWS[:52])


def test_incomplete_batches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with ProjectionStore(tmp_path / "store", METADATA) as store:
        ids = [i for i in range(23) if i not in (6, 13)] + [40]
        store.write(ids, ROWS[ids])
    with pytest.raises(ValueError, match=r"6 of 9 batches of 5 lack samples \(the first: 6\)"):
        store.export_pt(tmp_path / "out", 5)
    assert not (tmp_path / "out").exists()
    assert store.export_pt(tmp_path / "out", 5, incomplete="skip") == 3
    assert "6 of 9 batches of 5 lack samples (the first: 6): left out." in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path / "out")) == [
        "metadata.json", "proj_iter_000001.pt", "proj_iter_000004.pt", "proj_iter_000009.pt"]  # fmt: skip


def test_refusals(store: ProjectionStore, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batch_size"):
        store.export_pt(tmp_path / "out", 0)
    with pytest.raises(ValueError, match="incomplete"):
        store.export_pt(tmp_path / "out", incomplete="maybe")  # type: ignore[arg-type]
    ProjectionStore(tmp_path / "other", {**METADATA, "proj_seed": 1}).close()
    with pytest.raises(ValueError, match="nothing to export"):
        ProjectionStore(tmp_path / "other").export_pt(tmp_path / "out")
    with pytest.raises(ValueError, match="proj_seed is 1 there and 42 here"):
        store.export_pt(tmp_path / "other")
    store.export_pt(tmp_path / "out")
    with pytest.raises(FormatError, match=r"belongs to exported \.pt files"):
        ProjectionStore(tmp_path / "out")


@pytest.mark.parametrize("cut", [0, 10, 500, -1])
def test_a_damaged_file_is_told(store: ProjectionStore, tmp_path: Path, cut: int) -> None:
    store.export_pt(tmp_path / "out", 45)
    path = tmp_path / "out/proj_iter_000001.pt"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(FormatError, match=r"proj_iter_000001\.pt"):
        list(exported(tmp_path / "out", 10))


@pytest.mark.parametrize(
    "contents", [[1], {"proj": 3}, {"proj": torch.zeros(3, 9)}, {"proj": torch.zeros(3, 10), "batch_idx": [1]}]
)
def test_a_foreign_file_is_told(tmp_path: Path, contents: Any) -> None:
    torch.save(contents, tmp_path / "proj_iter_000001.pt")
    with pytest.raises(FormatError, match=r"expected|must list"):
        list(exported(tmp_path, 10))
