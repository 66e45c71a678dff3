"""Configurations with keys of any kind, as ``sparseopt train lm`` takes them, and the files that are shipped for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparseopt import config, schemas
from sparseopt.runs import sweeps

SEED_FILE = """
model: {name: "gpt2", context_length: 1024}
data:
  dataset_size: "10M"
  dataset_path: "/data/${model.name}"
training:
  learning_rate: 6e-4
  correct_bias: true
  my_own: 3
optimizer:  # nothing yet
run: {name: "test", checkpoint: null}
augmentation: {noise: [0.1, 0.2]}
note: any text
deepspeed: {zero_optimization: {stage: 2}}
"""


def test_any_new_key_is_kept_and_a_likely_typo_warns(tmp_path: Path) -> None:
    path = tmp_path / "train.yaml"
    path.write_text(SEED_FILE)
    overrides = ["training.batch_size=8", "augmentation.seed=${training.seed}", "deepspeed.bf16.enabled=true"]
    with pytest.warns(UserWarning, match="Unknown setting 'training.my_own'. It is kept with the run") as caught:
        settings, given = config.load_open(schemas.LM, path, overrides)
    assert len(caught) == 1
    assert settings.keys() == schemas.LM.keys()
    assert (settings["training"]["learning_rate"], settings["training"]["batch_size"]) == (6e-4, 8)
    assert settings["training"]["seed"] == 42
    assert settings["data"]["dataset_path"] == "/data/gpt2"
    assert given == {
        "model": {"name": "gpt2", "context_length": 1024}, "data": {"dataset_size": "10M", "dataset_path": "/data/gpt2"},
        "training": {"learning_rate": 6e-4, "correct_bias": True, "my_own": 3, "batch_size": 8},
        "run": {"name": "test", "checkpoint": None}, "augmentation": {"noise": [0.1, 0.2], "seed": 42},
        "note": "any text", "deepspeed": {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}},
    }  # fmt: skip
    with pytest.warns(
        UserWarning, match="Unknown setting 'training.learning_rte': did you mean 'training.learning_rate'"
    ):
        config.load_open(schemas.LM, given, ["training.learning_rte=1"])
    with pytest.warns(UserWarning, match="Unknown section 'trainin': did you mean 'training'"):
        config.load_open(schemas.LM, {"trainin": {"seed": 1}})


def test_toml_and_wrong_values_of_open_configurations(tmp_path: Path) -> None:
    (tmp_path / "train.toml").write_text('title = "x"\n[training]\nlearning_rate = 6e-4\n[new.section]\na = 1\n')
    settings, given = config.load_open(schemas.LM, tmp_path / "train.toml")
    assert settings["training"]["learning_rate"] == 6e-4
    assert given == {"title": "x", "training": {"learning_rate": 6e-4}, "new": {"section": {"a": 1}}}
    with pytest.raises(ValueError, match="Section 'training' must hold keys, got 3"):
        config.load_open(schemas.LM, {"training": 3})
    with pytest.raises(ValueError, match=r"training.seed must be of type int, got 'x'"):
        config.load_open(schemas.LM, {"training": {"seed": "x"}})
    for override in ("training.seed=x", "seed", "=3"):
        with pytest.raises(config.OverrideError):
            config.load_open(schemas.LM, None, [override])


@pytest.mark.parametrize("name", ["train_config.yaml", "sweep_config.yaml"])
def test_the_shipped_files_hold_what_the_seed_documents(name: str) -> None:
    path = Path(__file__).parents[1] / "configs" / name
    if name == "sweep_config.yaml":
        assert sweeps.combinations(sweeps.read_sweep(path)) == [
            {"initialization.init_std": std, "initialization.init_mean": 0.0} for std in (0.01, 0.02)
        ]
        return
    _, given = config.load_open(schemas.LM, path)
    assert given["training"] == {
        "batch_size": 32, "max_gpu_batch_size": 16, "eval_batch_size": 16, "gradient_accumulation_steps": 8,
        "learning_rate": 0.0006, "num_epochs": 1, "correct_bias": True, "seed": 42, "scheduler": "cosine",
        "warmup_steps": 100, "save_steps": 500, "eval_steps": 500,
    }  # fmt: skip
    assert given["run"] == {"name": "test", "init_type": "normal", "checkpoint": None}
    assert given["model"] == {"name": "gpt2", "context_length": 1024}


def test_suggestions_look_at_the_key(recwarn: pytest.WarningsRecorder) -> None:
    config.load_open(schemas.LM, {"training": {"weight_decay": 0.1, "warm_up_steps": 3, "colour": 1}})
    sentences = [str(warning.message).partition(" It is")[0] for warning in recwarn]
    assert sentences == [
        "Unknown setting 'training.weight_decay': did you mean 'optimizer.weight_decay'?",
        "Unknown setting 'training.warm_up_steps': did you mean 'training.warmup_steps'?",
        "Unknown setting 'training.colour'.",
    ]
