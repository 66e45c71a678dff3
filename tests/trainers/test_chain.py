"""``sparseopt train chain``: every stage on a tiny model, continuing after a stop; in a shorter form on the real one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import sparseopt as so
from sparseopt import config, schemas
from sparseopt.trainers import chain

CONFIG = Path(__file__).parents[2] / "configs" / "chain.yaml"


@pytest.fixture
def settings(tiny_folder: Path, pairs_file: Path, tmp_path: Path) -> list[str]:
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"w{i} w{i + 1}", "answer": f"w{i}"} for i in range(3, 23)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "chain.dir": tmp_path / "chain", "chain.device": "cpu", "chain.sparsity": 0.9, "chain.gradient_batches": 2,
        "chain.timing_steps": 2, "chain.dense_grpo": True,
        "dpo.model": f"{{name: {tiny_folder}}}", "dpo.data": f"{{name: {pairs_file}, n_eval: 4}}",
        "dpo.training": "{n_steps: 4, batch_size: 2, max_length: 32}", "dpo.optimizer": "{learning_rate: 0.01}",
        "dpo.evaluation": "{n_generate: 0}", "dense_dpo.delta_log": "{schedule: '1:4:1'}",
        "sparse_dpo.delta_log": "{schedule: '2,4'}",
        "grpo.model": f"{{name: {tiny_folder}}}", "grpo.data": f"{{name: {prompts}, n_eval: 4}}",
        "grpo.training": "{n_steps: 2, batch_size: 1, num_generations: 4, max_completion_length: 4, beta: 0.1}",
    }  # fmt: skip
    return [f"{key}={value}" for key, value in values.items()]


@pytest.mark.slow
def test_chain_goes_on_after_a_stop_and_is_whole(
    settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    configured = config.load(schemas.CHAIN, None, settings)
    with monkeypatch.context() as patch:
        patch.setattr(chain.Chain, "_agreement", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            chain.run(configured)
    folder = tmp_path / "chain"
    dense = (folder / "dense_dpo" / "results.json").read_bytes()
    assert not (folder / "sparse_dpo").exists()
    with pytest.raises(ValueError, match="began with other settings"):
        chain.run(config.load(schemas.CHAIN, None, [*settings, "chain.sparsity=0.5"]))

    assert chain.run(configured) == folder
    assert (folder / "dense_dpo" / "results.json").read_bytes() == dense, "not trained again"
    found = json.loads((folder / "chain.json").read_text())
    masks = {name: so.MaskSet.load(folder / "masks" / entry["file"]) for name, entry in found["masks"].items()}
    assert list(masks) == schemas.CHAIN["chain"]["methods"].default
    for name, mask in masks.items():
        eligible = sum(mask[n].numel() for n in mask.names if "embed_tokens" not in n)
        assert mask.active_parameters == round(0.1 * eligible), name
        assert not any(mask.count(n) for n in mask.names if "embed_tokens" in n), name
    jaccard = found["jaccard"]["jaccard"]
    assert all(jaccard[i][i] == 1.0 for i in range(len(masks)))
    assert jaccard[0][1] == so.compare(masks["magnitude"], masks["momentum"])["jaccard"]
    for run in ("sparse_dpo", "sparse_grpo"):
        assert so.MaskSet.load(folder / run / "mask.safetensors") == masks["fisher"], run
    assert found["reconstruction"]["bit_identical"]
    assert set(found["delta_bytes"]["sparse"]) == {"2", "4"}
    assert {"dense-fused", "lora", "sparse@10%"} <= found["timing"]["arms"].keys()
    page = (folder / "report.md").read_text()
    for text in ("sparse GRPO", "dense GRPO", "bit-identical", "ground_truth", "sparse@10%"):
        assert text in page, text
    for name in ("curves.png", "jaccard.png", "timing.png"):
        with Image.open(folder / name) as picture:
            assert len(picture.convert("RGB").getcolors(10**6) or []) > 50, name
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*.safetensors")}
    chain.run(configured)
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*.safetensors")} == before, "nothing is done twice"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ("chain.methods=[magnitude, nope]", r"chain\.methods must name .*'nope'"),
        ("chain.train_with=random", None),
        ("chain.methods=[magnitude]", r"train_with='fisher' must be among"),
        ("dpo.training={n_stepz: 4}", r"section 'dpo'.*training\.n_stepz.*training\.n_steps"),
        ("sparse_grpo.optimizer={learning_rate: fast}", r"learning_rate must be of type float"),
    ],
)
def test_errors_come_before_the_work(settings: list[str], tmp_path: Path, change: str, text: str | None) -> None:
    configured = config.load(schemas.CHAIN, None, [*settings, change])
    if text is None:
        chain.Chain(configured)
    else:
        with pytest.raises(ValueError, match=text):
            chain.Chain(configured)
    assert not (tmp_path / "chain").exists()


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_chain_of_the_real_model_in_a_shorter_form(tmp_path: Path) -> None:
    changes = [
        "chain.timing_steps=2", "chain.gradient_batches=2", "chain.methods=[magnitude, fisher, ground_truth, random]",
        "dpo.data.n_train=16", "dpo.data.n_eval=20", "dpo.training.n_steps=4", "dpo.training.warmup_steps=1",
        "dpo.evaluation.n_generate=8", "dense_dpo.delta_log.schedule='2,4'", "sparse_dpo.delta_log.schedule='2,4'",
        "grpo.data.n_eval=20", "grpo.training.n_steps=2", "grpo.training.batch_size=2", "chain.device=cpu",
    ]  # fmt: skip
    folder = tmp_path / "chain"
    process = subprocess.run(
        [sys.executable, "-m", "sparseopt", "train", "chain", "--config", str(CONFIG), "--output_dir", str(folder),
         "--json", "--set", *changes],
        capture_output=True, text=True, timeout=1400, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-4000:]
    assert json.loads(process.stdout) == {"output_dir": str(folder)}
    found = json.loads((folder / "chain.json").read_text())
    assert found["reconstruction"]["bit_identical"]
    whole = 2 * 134_515_008
    assert found["delta_bytes"]["sparse"]["4"] < 0.08 * whole
    jaccard = found["jaccard"]
    methods = jaccard["methods"]
    truth = jaccard["jaccard"][methods.index("ground_truth")]
    assert truth[methods.index("magnitude")] > 5 * truth[methods.index("random")]
    assert truth[methods.index("random")] == pytest.approx(jaccard["chance"], rel=0.1)
