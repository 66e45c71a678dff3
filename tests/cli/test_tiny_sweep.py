"""What `make sweep` does, shortened: a real sweep of language models, its table, its report, its gradients."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import sparseopt as so

ROOT = Path(__file__).resolve().parents[2]
# The seed's snippets as printed, with {run_id} and the steps filled in.
SNIPPETS = """
import torch
import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

# Load gradients from a checkpoint
gradients = torch.load('saved_models/{run_id}/checkpoint_{step}/gradients.pt')

# Example: Compute gradient norm for each layer
gradient_norms = {}
for name, grad in gradients.items():
    gradient_norms[name] = torch.norm(grad).item()

# Plot gradient norms
plt.figure(figsize=(12, 8))
plt.bar(range(len(gradient_norms)), list(gradient_norms.values()))
plt.xticks(range(len(gradient_norms)), list(gradient_norms.keys()), rotation=90)
plt.savefig('gradient_norms.png')

# Load gradients from multiple checkpoints
checkpoint_steps = [10, 20]
all_gradients = {}

for step in checkpoint_steps:
    all_gradients[step] = torch.load(f'saved_models/{run_id}/checkpoint_{step}/gradients.pt')

# Example: Compare gradient norms for a specific layer across checkpoints
layer_name = 'transformer.h.0.mlp.c_fc.weight'
layer_gradient_norms = []

for step in checkpoint_steps:
    if layer_name in all_gradients[step]:
        layer_gradient_norms.append(torch.norm(all_gradients[step][layer_name]).item())
    else:
        layer_gradient_norms.append(0)
print(sum(norm ** 2 for norm in gradient_norms.values()) ** 0.5, layer_gradient_norms)
"""


def sparseopt(folder: Path, *words: str) -> str:
    command = [sys.executable, "-P", "-m", "sparseopt", *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_tiny_sweep(tmp_path: Path) -> None:
    texts = tmp_path / "results" / "sweep" / "texts"
    texts.mkdir(parents=True)
    for path in (*ROOT.glob("*.md"), *(ROOT / "sparseopt").glob("*.py")):
        (texts / f"{path.stem}.txt").write_text(path.read_text())
    config = (ROOT / "configs" / "tiny_lm.yaml").read_text()
    for key, value in (("max_steps: 120", "max_steps: 20"), ("save_steps: 20", "save_steps: 10"),
                       ("eval_steps: 20", "eval_steps: 10")):  # fmt: skip
        assert key in config
        config = config.replace(key, value)
    (tmp_path / "tiny.yaml").write_text(config)
    sweep = str(ROOT / "configs" / "tiny_sweep.yaml")
    said = sparseopt(tmp_path, "sweep", "run", "tiny.yaml", sweep, "--jobs", "2")
    assert said == "Sweep tiny: 4 runs: 4 finished.\n"
    manager = so.RunManager(tmp_path / "saved_models")
    rows = manager.rows()
    found = {(row["training.learning_rate"], row["initialization.init_std"]) for row in rows}
    assert found == {(rate, std) for rate in (3e-3, 3e-4) for std in (0.02, 0.1)}
    assert all(row["status"] == "finished" and row["final_valid_loss"] < 6 for row in rows)
    best = manager.get_best_run(sweep_name="tiny")
    assert best["training.learning_rate"] == 3e-3  # it learns: 20 steps at a tenth of it come less far
    assert f"(run {best['run_id']})" in sparseopt(tmp_path, "runs", "report", "tiny")
    page = (tmp_path / "saved_models" / "sweeps" / "tiny.html").read_text()
    assert all(row["run_id"] in page for row in rows)
    numbers = json.loads(sparseopt(tmp_path, "runs", "gradients", best["run_id"], "--json"))
    assert numbers["steps"] == [10, 20]  # the final checkpoint is step 20, too
    for checkpoint in numbers["checkpoints"]:
        assert checkpoint["eval_loss"] is not None
        assert checkpoint["variance"]["batches"] == 2
        # The gradient of a step is the mean of its micro-batches'.
        assert checkpoint["variance"]["all"]["mean_norm"] == pytest.approx(checkpoint["total_norm"], rel=1e-4)
    run_id = best["run_id"]
    code = SNIPPETS.replace("{run_id}/checkpoint_{step}/gradients.pt')\n\n# Example: Compute",
                            f"{run_id}/checkpoint_20/gradients.pt')\n\n# Example: Compute")  # fmt: skip
    code = f"run_id = {run_id!r}\n{code}"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=True
    )
    norm, layers = done.stdout.split(maxsplit=1)
    last = numbers["checkpoints"][-1]
    assert float(norm) == pytest.approx(last["total_norm"], rel=1e-4)
    name = "transformer.h.0.mlp.c_fc.weight"
    assert json.loads(layers) == pytest.approx([c["parameters"][name] for c in numbers["checkpoints"]], rel=1e-4)
