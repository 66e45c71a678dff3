"""``sparseopt finetune``: its flags, good runs, and that every wrong input is one sentence."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import typer
from finetuning import text
from typer.testing import CliRunner

import sparseopt as so
from sparseopt.cli._main import app

SEED = {  # the tables of the description, and the one default that differs from them
    "sparsity_ratio": 0.5, "sparsity_type": "unstructured", "mask_update_interval": 100, "mask_update_fraction": 0.3,
    "use_rigl": True, "use_topk_attention": False, "topk_ratio": 0.1, "learning_rate": 5e-5, "batch_size": 8,
    "num_epochs": 3, "warmup_steps": 100, "gradient_accumulation_steps": 4, "fp16": True, "gradient_checkpointing": True,
    "output_dir": "./sparse_model",
}  # fmt: skip
PLUGIN = """
import torch
from torch.nn.utils.prune import BasePruningMethod

def rising(step, total): return 0.2 + 0.5 * step / total
def nan(step, total): return float("nan") if step > 5 else 0.5
def big(step, total): return 1.5
def score(name, weight, gradient): return weight.abs()
def flat(name, weight, gradient): return weight.sum(0)
number = 3

class Nothing(BasePruningMethod):
    PRUNING_TYPE = "unstructured"
    def compute_mask(self, t, default_mask): return torch.ones_like(default_mask)
"""


def invoke(*args: str) -> Any:
    return CliRunner().invoke(app, ["finetune", *args])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli")
    (path / "text.txt").write_text(text(1500))
    (path / "mine.py").write_text(PLUGIN)
    (path / "empty.jsonl").write_text("")
    (path / "short.txt").write_text("w1 w2")
    (path / "odd.jsonl").write_text('{"a": 1}\n{"a": 2}\n')
    return path


def arguments(model: Path, folder: Path, output: Path) -> dict[str, str]:
    return {
        "--model_name": str(model), "--dataset": str(folder / "text.txt"), "--output_dir": str(output), "--max_steps": "8",
        "--max-length": "16", "--batch_size": "4", "--gradient-accumulation-steps": "1", "--mask_update_interval": "2",
        "--warmup_steps": "2", "--learning_rate": "1e-2", "--device": "cpu",
    }  # fmt: skip


def flat(values: dict[str, str]) -> list[str]:
    return [part for pair in values.items() for part in pair]


def test_flags_are_the_function_s_arguments() -> None:
    command = typer.main.get_command(app).commands["finetune"]  # type: ignore[attr-defined]
    options = {option.opts[0].removeprefix("--"): option for option in command.params}
    parameters = inspect.signature(so.sparse_finetune).parameters
    assert options.keys() == parameters.keys() | {"json", "debug"}
    for name, parameter in parameters.items():
        if name in ("model_name", "dataset"):
            assert options[name].required
            assert parameter.default is inspect.Parameter.empty
        else:
            assert options[name].default == (
                parameter.default or (None if parameter.default == () else parameter.default)
            )
        if name in SEED:
            assert parameter.default == SEED[name]
    assert parameters.keys() >= SEED.keys()
    positional = [name for name, p in parameters.items() if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    assert positional == ["model_name", "dataset", *SEED]
    assert "destroys most models" in options["use_topk_attention"].help


def test_a_run(tiny_folder: Path, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    result = invoke(
        *flat(arguments(tiny_folder, folder, output)), "--sparsity_schedule", f"{folder / 'mine.py'}:rising", "--criterion",
        f"{folder / 'mine.py'}:score", "--exclude", "q_proj", "k_proj", "--no-use-rigl", "--policy", "set", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["output_dir"], found["policy"], found["layers"], found["mask_updates"]) == (str(output), "set", 10, 4)
    assert found["sparsity"] == pytest.approx(0.7, abs=1e-3)
    assert json.loads((output / "finetune.json").read_text())["sparsity"]["criterion"].endswith("mine.py:score")
    again = invoke(*flat(arguments(tiny_folder, folder, output)))
    assert again.exit_code == 1
    assert "holds a finished run" in again.output


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--sparsity_ratio": "1.0"}, "sparsity_ratio must lie in [0, 1), got 1.0."),
        ({"--sparsity_ratio": "-0.1"}, "sparsity_ratio must lie in [0, 1), got -0.1."),
        ({"--sparsity_ratio": "nan"}, "sparsity_ratio must lie in [0, 1), got nan."),
        ({"--sparsity_type": "2to4"}, "the pattern must be 'unstructured' or 'N:M' with 1 <= N < M (2:4, 4:8), got '2to4'."),
        ({"--sparsity_type": "4:2"}, "the pattern must be"),
        ({"--sparsity_type": "1:4"}, "pattern 1:4 means a sparsity of 0.75, got 0.5."),
        ({"--sparsity_type": "3:7", "--sparsity_ratio": f"{1 - 3 / 7}"},
         "pattern 3:7 needs an input dimension divisible by 7; 'model.layers.0.self_attn.q_proj.weight' has 32"),
        ({"--sparsity_type": "2:4", "--distribution": "erk"}, "pattern 2:4 is uniform by itself"),
        ({"--mask_update_interval": "0"}, "mask_update_interval must be a whole number, 1 or more, got 0."),
        ({"--mask_update_fraction": "1.5"}, "mask_update_fraction must be a number in [0, 1], got 1.5."),
        ({"--topk_ratio": "0"}, "topk_ratio must be a number in (0, 1], got 0.0."),
        ({"--batch_size": "0"}, "batch_size must be a whole number, 1 or more, got 0."),
        ({"--max_length": "1"}, "max_length must be a whole number, 2 or more, got 1."),
        ({"--learning_rate": "-1"}, "learning_rate must be a number at least 0, got -1.0."),
        ({"--dropout": "2"}, "dropout must be a number in [0, 0.95], got 2.0."),
        ({"--policy": "magic"}, "the policy must be one of rigl, set, gradual, static, got 'magic'."),
        ({"--target": "biases"}, "target must be 'weights' or 'updates', got 'biases'."),
        ({"--dropped": "rewind"}, "dropped='rewind' is for target='updates'"),
        ({"--distribution": "even"}, "the distribution must be one of uniform, erk, global, got 'even'."),
        ({"--task": "regression"}, "task must be one of causal-lm, sequence-classification, got 'regression'."),
        ({"--lr_scheduler_type": "square"}, "lr_scheduler_type must be one of linear, cosine,"),
        ({"--report_to": "paper"}, "report_to must be one of wandb, trackio, tensorboard, none, got 'paper'."),
        ({"--sparsity_schedule": "linear:0.1"}, "sparsity_schedule 'linear:0.1' is not understood: expected linear:0.1:0.9."),
        ({"--sparsity_schedule": "linear:0.1:1.2"}, "each end of sparsity_schedule 'linear:0.1:1.2' must lie in [0, 1)"),
        ({"--sparsity_schedule": "linear:0.1:0.9", "--policy": "static"}, "a sparsity schedule needs masks that change"),
        ({"--sparsity_schedule": "HERE/mine.py:nan"},
         "the sparsity that the schedule returns for step 6 of 8 must lie in [0, 1), got nan."),
        ({"--sparsity_schedule": "HERE/mine.py:big"}, "for step 0 of 8 must lie in [0, 1), got 1.5."),
        ({"--sparsity_schedule": "HERE/mine.py:none"}, "was not found"),
        ({"--sparsity_schedule": "HERE/absent.py:f"}, "there is no file"),
        ({"--sparsity_schedule": "rising"}, "expected module:function or path/to/file.py:function."),
        ({"--criterion": "no_such_module:f"}, "the module 'no_such_module' of criterion 'no_such_module:f' cannot be imported"),
        ({"--criterion": "HERE/mine.py:number"}, "cannot be called: it is of type int."),
        ({"--criterion": "HERE/mine.py:flat"}, "the criterion returned shape (32,) for 'model.layers.0.self_attn.k_proj.weight'"),
        ({"--criterion": "HERE/mine.py:Nothing"}, "the pruning method Nothing kept 512 of 512 entries of 'model.layers.0"),
        ({"--exclude": "no_such_layer"}, "the exclude pattern 'no_such_layer' fits no parameter"),
        ({"--exclude": "proj"}, "has no linear layer to make sparse"),
        ({"--dataset": "HERE/absent.txt"}, "there is no file"),
        ({"--dataset": "HERE/absent.jsonl"}, "does not exist"),
        ({"--dataset": "HERE/empty.jsonl"}, "is empty"),
        ({"--dataset": "HERE/short.txt"}, "has fewer tokens than one sample of max_length=16: take a smaller one."),
        ({"--dataset": "HERE/odd.jsonl"}, "no messages and no prompt with completion: it has a."),
        ({"--dataset": "HERE/text.txt", "--task": "sequence-classification"}, "sequence-classification needs labels"),
        ({"--dataset": "pile"}, "is a stream without end"),
        ({"--model_name": "./no/such/model"}, "Model folder './no/such/model' does not exist."),
        ({"--device": "cuda:9"}, "CUDA devices"),
    ],
    ids=lambda value: " ".join(flat(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_bad_input_is_named_in_a_sentence(
    tiny_folder: Path, folder: Path, tmp_path: Path, changes: dict[str, str], message: str,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    changes = {flag: value.replace("HERE", str(folder)) for flag, value in changes.items()}
    result = invoke(*flat({**arguments(tiny_folder, folder, tmp_path / "out"), **changes}))
    said = " ".join((result.output + capfd.readouterr().err).split())
    assert result.exit_code == 1, said
    assert message in said
    assert said.count("Error: ") == 1
    assert "Traceback" not in said
    assert result.stdout == ""
    assert not (tmp_path / "out").exists(), "nothing was written"


@pytest.mark.parametrize(
    "args",
    [
        ("--dataset", "x"),
        ("--model_name", "x"),
        ("--model_name", "x", "--dataset", "y", "--sparsity_ratio", "half"),
        ("--model_name", "x", "--dataset", "y", "--sparsty_ratio", "0.5"),
    ],
)
def test_bad_usage_ends_with_2(args: tuple[str, ...]) -> None:
    assert invoke(*args).exit_code == 2


def test_nothing_to_resume(tiny_folder: Path, folder: Path, tmp_path: Path) -> None:
    result = invoke(*flat(arguments(tiny_folder, folder, tmp_path / "none")), "--resume")
    assert result.exit_code == 1
    assert "There is no run to resume in" in result.output
    assert "it has no finetune.json." in result.output
