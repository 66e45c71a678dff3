""".gitignore keeps the structure of saved_models/ and leaves out, in it only, what is too large for a repository."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RUN = "saved_models/20260101-120000-000000-abcdef"
IGNORED = [
    f"{RUN}/checkpoint_500/model.safetensors",
    f"{RUN}/checkpoint_500/notes.txt",
    f"{RUN}/checkpoint_500/accelerator_states/optimizer.bin",
    f"{RUN}/checkpoint_500/.gitkeep",
    f"{RUN}/final_checkpoint/config.yaml",
    f"{RUN}/gradients.pt",
    f"{RUN}/pytorch_model.bin",
    f"{RUN}/model.h5",
    f"{RUN}/config.json",
    f"{RUN}/deeper/weights.pt",
    f"{RUN}/.lock",
    "saved_models/.runs.index.json",
    "saved_models/model.bin",
    "saved_models/sweeps/rates.slurm/7_0_0_log.out",
    "saved_models/group/run/checkpoint_1/model.pt",
]
KEPT = [
    "saved_models/.gitkeep",
    "saved_models/runs.csv",
    f"{RUN}/config.yaml",
    f"{RUN}/run.json",
    f"{RUN}/log.jsonl",
    f"{RUN}/log.txt",
    f"{RUN}/.gitkeep",
    f"{RUN}/gradients/norms.png",
    "saved_models/sweeps/rates.html",
    # elsewhere such names are anybody's
    "benchmarks/results/numbers.json",
    "tests/data/model.bin",
    "tests/data/tensors.pt",
    "tests/data/table.h5",
    "checkpoint_500/notes.txt",
    "final_checkpoint/notes.txt",
    "configs/.hidden",
    "tests/saved_models/checkpoint_1/model.pt",
]


def test_what_git_sees(tmp_path: Path) -> None:
    shutil.copy(ROOT / ".gitignore", tmp_path)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    for name in [*IGNORED, *KEPT]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    command = ["git", "check-ignore", "--no-index", *IGNORED, *KEPT]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.splitlines()
    assert sorted(said) == sorted(IGNORED)
    # What `git add .` would take, too.
    subprocess.run(["git", "add", "."], cwd=tmp_path, check=True)
    added = subprocess.run(["git", "ls-files"], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert sorted(added.splitlines()) == sorted([".gitignore", *KEPT])


def test_the_folder_is_there() -> None:
    assert (ROOT / "saved_models" / ".gitkeep").is_file()
