"""``sparseopt train sft|grpo|lm`` on two processes of ``accelerate launch``: one folder, stopped by one signal, resumed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_training import settings_of

import sparseopt as so
from sparseopt import config, models, schemas
from sparseopt.trainers import chain, dpo, lm, sft

KIT = Path(__file__).parents[1] / "kit"
CPU = Path(__file__).parents[2] / "configs" / "accelerate" / "cpu.yaml"
METHODS = ("sft", "grpo", "lm")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, build_llama: Callable[..., Path]) -> Path:
    """A folder with rows, a reward, masks and a model without dropout."""
    folder = tmp_path_factory.mktemp("commands")
    model = build_llama(attention_dropout=0.0)
    (folder / "model").symlink_to(model)
    rows = []
    for i in range(24):
        a, b = (3 + (7 * i + k) % 50 for k in (1, 5))
        rows.append({"prompt": f"w{a} w{b}", "answer": f"w{b}", "completion": f" w{b} w{a}"})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "ours.py").write_text(
        "def w1(completions, **columns):\n    return [float(text.count('1')) for text in completions]\n"
    )
    so.MaskSet.random(models.load_model(str(model)), 0.1, seed=1).save(folder / "mask.safetensors")
    return folder


def settings(base: Path, method: str, name: str, **changes: Any) -> list[str]:
    values: dict[str, Any] = {
        "model.name": base / "model", "data.name": base / "rows.jsonl", "data.n_eval": 8, "mask.path": base / "mask.safetensors",
        "optimizer.learning_rate": 0.01, "training.n_steps": 5, "training.batch_size": 2, "training.device": "cpu",
        "evaluation.max_new_tokens": 4, "output.dir": base / name, **changes,
    }  # fmt: skip
    own: dict[str, dict[str, Any]] = {
        "sft": {
            "training.max_length": 32, "evaluation.n_generate": 3, "delta_log.schedule": "2,5", "delta_log.save_base": "never",
            "delta_log.dir": base / f"{name}.log", "grad_acc.enabled": True, "grad_acc.tolerance": "1e-12",
            "grad_acc.mask_save_interval": 2,
        },
        "grpo": {
            "training.num_generations": 4, "training.max_completion_length": 5, "training.beta": 0.1,
            "rewards.functions": f"[{base / 'ours.py'}:w1, answer]", "delta_log.schedule": "none",
        },
        "dpo": {},
    }  # fmt: skip
    return [f"{key}={value}" for key, value in {**values, **own[method]}.items()]


def words(base: Path, method: str, name: str, *more: str) -> list[str]:
    if method == "lm":
        (base / "empty.yaml").write_text("{}\n")
        pairs = settings_of(
            base, training__batch_size=4, training__gradient_accumulation_steps=1, training__max_steps=5,
            training__save_steps=0, model__config="{n_layer: 2, n_head: 2, n_embd: 16, resid_pdrop: 0.0}",
            optimizer__name="sparse_adamw", checkpoints__gradients=False,
        )  # fmt: skip
        source = [] if "--resume" in more else ["--config", str(base / "empty.yaml"), "--set", *pairs]
        return ["train", "lm", *source, "--base_dir", str(base / name), "--json", *more]
    return ["train", method, "--set", *settings(base, method, name), "--json", *more]


def scored_words(base: Path, name: str) -> list[str]:
    """A run whose mask is found from the gradients of two batches on each process."""
    changes = {
        "mask.path": "null",
        "mask.method": "gradient",
        "mask.batches": 2,
        "mask.sparsity": 0.9,
        "training.n_steps": 1,
    }
    return ["train", "sft", "--set", *settings(base, "sft", name, **changes), "--json"]


def dense_dpo(base: Path, name: str, max_length: int, **changes: Any) -> list[str]:
    """Every weight, with the reference measured before: by us, or by TRL where pairs are cut to ``max_length``."""
    pairs = base / "pairs.jsonl"
    if not pairs.is_file():
        rows = [json.loads(line) for line in (base / "rows.jsonl").read_text().splitlines()]
        made = [{"prompt": f"{r['prompt']} w1", "chosen": r["completion"], "rejected": " w2 w2"} for r in rows]
        pairs.write_text("".join(json.dumps(row) + "\n" for row in made))
    values = {
        "data.name": pairs,
        "mask.path": "null",
        "training.n_steps": 2,
        "optimizer.learning_rate": 1e-3,
        **changes,
    }
    own = {"training.max_length": max_length, "evaluation.n_generate": 0, "delta_log.schedule": "none"}
    return [*settings(base, "dpo", name, **values), *(f"{key}={value}" for key, value in own.items())]


@pytest.fixture(scope="module")
def done(base: Path) -> tuple[list[list[int]], subprocess.CompletedProcess[str]]:
    """Every method: a run, one that a signal to the second process stops after two steps, and its continuation."""
    commands: list[Any] = []
    for method in METHODS:
        cut = f"{method}_cut"
        commands += [[words(base, method, f"{method}_straight"), 0], [words(base, method, cut), 2]]
        # "2": what ids of runs, which are dates, begin with
        commands += [[words(base, method, cut, "--resume", *(["2"] if method == "lm" else [])), 0]]
    commands.append([scored_words(base, "sft_scored"), 0])
    commands += [
        [["train", "dpo", "--set", *dense_dpo(base, f"dpo_{length}", length), "--json"], 0] for length in (32, 5)
    ]
    commands.append([words(base, "lm", "lm_straight", "--resume", "2"), 0])  # it is finished
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(CPU), "--main_process_port", "0"]
    script = [str(KIT / "training_commands.py"), str(base), json.dumps(commands)]
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(
        [sys.executable, "-P", *launcher, *script],
        capture_output=True,
        text=True,
        timeout=240,
        env=variables,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    return [json.loads((base / f"codes_{rank}.json").read_text()) for rank in (0, 1)], finished


def outcome(base: Path, name: str) -> bytes:
    """The weights of a finished run."""
    found = list((base / name).glob("**/final_checkpoint/model.safetensors")) or [
        base / name / "model" / "model.safetensors"
    ]
    return found[0].read_bytes()


@pytest.mark.slow
def test_exit_codes_and_what_is_printed(done: Any) -> None:
    codes, finished = done
    assert codes == [[*[0, 130, 0] * len(METHODS), 0, 0, 0, 1]] * 2, finished.stderr[-4000:]
    assert finished.stdout.count('"output_dir"') == 2 * len(METHODS) + 3
    assert finished.stderr.count("Device: ") == 3 * len(METHODS) + 4
    assert "is finished; run.checkpoint goes on from its final_checkpoint." in finished.stderr
    assert finished.stderr.count("Training 1,756 of") == 3 * 2


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_ends_with_the_same_weights(done: Any, base: Path, method: str) -> None:
    assert outcome(base, f"{method}_cut") == outcome(base, f"{method}_straight")


@pytest.mark.slow
def test_sft_equals_one_process_on_the_whole_batch(done: Any, base: Path) -> None:
    values = settings(base, "sft", "sft_alone", **{"training.batch_size": 4})
    folder = sft.run(config.load(schemas.METHODS["sft"], None, values))
    alone, found = (dict(models.load_model(str(f / "model")).named_parameters()) for f in (folder, base / "sft_cut"))
    for name, value in alone.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
    masks = [
        so.MaskSet.load(base / name / "grad_acc" / "grad_mask_step_4.safetensors") for name in ("sft_alone", "sft_cut")
    ]
    assert so.compare(*masks)["jaccard"] > 0.999


@pytest.mark.slow
def test_the_mask_comes_from_the_batches_of_all_processes(done: Any, base: Path) -> None:
    values = [w.replace("mask.batches=2", "mask.batches=4") for w in scored_words(base, "sft_scored_alone") if "=" in w]
    alone, found = (
        so.MaskSet.load(folder / "mask.safetensors")
        for folder in (sft.run(config.load(schemas.METHODS["sft"], None, values)), base / "sft_scored")
    )
    assert so.compare(alone, found)["jaccard"] > 0.999
    assert alone.metadata["batches"] == found.metadata["batches"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("length", [32, 5])
def test_the_reference_is_measured_by_all_processes(done: Any, base: Path, length: int) -> None:
    values = dense_dpo(base, f"dpo_{length}_alone", length, **{"training.batch_size": 4})
    folder = dpo.run(config.load(schemas.METHODS["dpo"], None, values))
    alone, found = (
        dict(models.load_model(str(f / "model")).named_parameters()) for f in (folder, base / f"dpo_{length}")
    )
    for name, value in alone.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=5e-6)
    assert not list((base / f"dpo_{length}").glob(".*"))


@pytest.mark.slow
def test_every_file_is_written_once(done: Any, base: Path) -> None:
    for name in ("sft_straight", "sft_cut", "grpo_straight", "grpo_cut"):
        lines = (base / name / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5], name
    for name in ("sft_straight", "sft_cut"):
        assert so.DeltaLog(base / f"{name}.log").steps() == [2, 5]
        steps = sorted(path.name for path in (base / name / "grad_acc").glob("grad_mask_*"))
        assert steps == ["grad_mask_step_2.safetensors", "grad_mask_step_4.safetensors"]
    for name in ("grpo_straight", "grpo_cut"):
        shown = [json.loads(line)["step"] for line in (base / name / "completions.jsonl").read_text().splitlines()]
        assert sorted(set(shown)) == [0, 1, 2, 3, 4]
        assert len(shown) == 4 * 5
    for name in ("lm_straight", "lm_cut"):
        assert len(list((base / name).glob("*/run.json"))) == 1
        (log,) = (base / name).glob("*/log.jsonl")
        steps_of_evaluation = [e["step"] for e in map(json.loads, log.read_text().splitlines()) if "eval_loss" in e]
        assert steps_of_evaluation == sorted(set(steps_of_evaluation))


@pytest.mark.slow
def test_lm_goes_on_with_as_many_processes(done: Any, base: Path) -> None:
    """What the second command left, before the third went on: here in one process."""
    (run,) = (base / "lm_cut").glob("*/run.json")
    shutil.copytree(base / "lm_cut", base / "lm_again")
    (again,) = (base / "lm_again").glob("*/run.json")
    again.write_text(run.read_text().replace('"finished"', '"crashed"'))
    source = lm.RunManager(base / "lm_again").get_run_config(run.parent.name)
    with pytest.raises(
        ValueError, match="began with 2 processes, which decides what a step is, now 1: go on with as many"
    ):
        lm.train(*config.load_open(schemas.LM, source, []), base / "lm_again", resume=run.parent.name)


# ---- what is refused -----------------------------------------------------------------------------------------------------
def test_chain_runs_in_one_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    settings = config.load(schemas.CHAIN, None, [f"chain.dir={tmp_path / 'chain'}"])
    with pytest.raises(ValueError, match="train chain runs in one process, got 2: run its stages one by one"):
        chain.run(settings)
    assert not (tmp_path / "chain").exists()


def test_lm_does_not_run_in_shards(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="does not run under FSDP"):
        lm.train(*config.load_open(schemas.LM, None, settings_of(tmp_path)), tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
