"""``sparseopt deltas steps|info|reconstruct``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import sparseopt as so
from sparseopt.cli._main import app

STEPS = [10, 20]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[int, dict[str, torch.Tensor]]]:
    """(folder of the base, its log, state dicts by step): a tiny Llama trained in bf16 with a DeltaLog."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    root = tmp_path_factory.mktemp("deltas")
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(root / "base")
    model = AutoModelForCausalLM.from_pretrained(root / "base", dtype=torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    tokens = torch.randint(0, 64, (2, 16))
    states = {}
    with so.DeltaLog(root / "log") as log:
        log.start(model, name=str(root / "base"))
        for step in STEPS:
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            log.record(step, model)
            states[step] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return root / "base", root / "log", states


def run(*args: Any) -> str:
    result = CliRunner().invoke(app, ["deltas", *map(str, args)])
    assert result.exit_code == 0, result.output
    return result.stdout


def fail(*args: Any, code: int = 1) -> str:
    result = CliRunner().invoke(app, ["deltas", *map(str, args)])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return " ".join(result.output.split())


def test_steps(trained: Any, tmp_path: Path) -> None:
    _, log, _ = trained
    assert run("steps", "--delta_log_dir", log) == "10\n20\n"
    assert run("reconstruct", "--delta-log-dir", log, "--list-steps") == "10\n20\n"
    assert json.loads(run("steps", "--delta_log_dir", log, "--json"))["steps"] == STEPS
    assert json.loads(run("reconstruct", "--delta_log_dir", log, "--list_steps", "--json"))["steps"] == STEPS
    assert "no delta log folder" in fail("steps", "--delta_log_dir", tmp_path / "absent")
    assert "holds no delta log" in fail("steps", "--delta_log_dir", tmp_path)


def test_info(trained: Any) -> None:
    base, log, states = trained
    report = json.loads(run("info", "--delta_log_dir", log, "--json"))
    sizes = {name: t.numel() for name, t in states[10].items() if name != "lm_head.weight"}
    assert report["base"]["name"] == str(base)
    assert (report["base"]["saved"], report["base"]["bytes"], report["problem"]) == (False, 0, None)
    assert (report["tensors"], report["entries"]) == (len(sizes), sum(sizes.values()))
    assert report["checkpoint_bytes"] == 2 * sum(sizes.values())
    assert report["dtypes"] == ["bfloat16"]
    for row, step in zip(report["steps"], STEPS, strict=True):
        path = log / f"delta_step_{step}.safetensors"
        assert (row["step"], row["bytes"]) == (step, path.stat().st_size)
        assert row["changed"] == so.Delta.load(path).changed_parameters
        assert row["share_of_checkpoint"] == pytest.approx(row["bytes"] / report["checkpoint_bytes"])
        stats = json.loads((log / f"stats_step_{step}.json").read_text())
        assert row["mean_l2_from_init"] == stats["mean_l2_from_init"] > 0
    assert [row["parent_step"] for row in report["steps"]] == [None, 10]
    text = run("info", "--delta_log_dir", log)
    assert f"base: {base}" in text
    assert f"{report['checkpoint_bytes']:,} bytes" in text
    assert "2 steps:" in text
    assert "broken" not in text


def test_info_of_a_broken_chain_says_so(trained: Any, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(trained[1], tmp_path / "log")
    (tmp_path / "log" / "delta_step_10.safetensors").unlink()
    report = json.loads(run("info", "--delta_log_dir", tmp_path / "log", "--json"))
    assert "step 10" in report["problem"]
    assert "broken: " in run("info", "--delta_log_dir", tmp_path / "log")
    (tmp_path / "log" / "stats_step_20.json").unlink()
    assert (
        json.loads(run("info", "--delta_log_dir", tmp_path / "log", "--json"))["steps"][0]["mean_l2_from_init"] is None
    )


@pytest.mark.parametrize("flags", [[], ["--max_shard_size", "10KB"], ["--model_name"]])
def test_reconstruct(trained: Any, tmp_path: Path, flags: list[str]) -> None:
    from transformers import AutoModelForCausalLM

    base, log, states = trained
    flags = [*flags, str(base)] if flags == ["--model_name"] else flags
    for step, given in ((10, ["--step", 10]), (20, [])):
        out = tmp_path / "out"
        args = ("reconstruct", "--delta_log_dir", log, "--output_dir", out, *given, *flags)
        assert f"step {step}" in run(*args)
        report = json.loads(run(*args, "--json"))
        assert (report["step"], report["output_dir"]) == (step, str(out))
        state = AutoModelForCausalLM.from_pretrained(out, dtype="auto").state_dict()
        assert state.keys() == states[step].keys()
        for name, tensor in states[step].items():
            assert state[name].dtype == torch.bfloat16
            assert torch.equal(state[name].view(torch.uint8), tensor.view(torch.uint8))


def test_reconstruct_errors(trained: Any, tmp_path: Path) -> None:
    base, log, _ = trained
    out = tmp_path / "out"
    assert "no step 15; it has steps 10, 20" in fail(
        "reconstruct", "--delta_log_dir", log, "--step", 15, "--output_dir", out
    )
    assert "--output_dir is missing" in fail("reconstruct", "--delta_log_dir", log, "--step", 10, code=2)
    assert "a size is" in fail(
        "reconstruct", "--delta_log_dir", log, "--output_dir", out, "--max_shard_size", "big", code=2
    )
    assert "on the CPU" in fail("info", "--delta_log_dir", log, "--device", "cuda", code=2)
    assert "does not exist" in fail(
        "reconstruct", "--delta_log_dir", log, "--output_dir", out, "--model_name", tmp_path / "nowhere"
    )
    assert not out.exists()
    assert "is not empty and no earlier reconstruction" in fail(
        "reconstruct", "--delta_log_dir", log, "--output_dir", base
    )


def test_patch_is_part_of_the_group() -> None:
    assert "--from_step" in run("patch", "--help")


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["steps", "--delta_log_dir", "absent"], 1, "there is no delta log folder 'absent'."),
        (["steps", "--delta_log_dir", "."], 1, "'.' holds no delta log: there is no base.json."),
        (["steps"], 2, "'--delta_log_dir'"),
        (["info", "--delta_log_dir", "absent"], 1, "there is no delta log folder 'absent'."),
        (["info", "--delta_log_dir", "."], 1, "'.' holds no delta log: there is no base.json."),
        (
            ["reconstruct", "--delta_log_dir", "absent", "--output_dir", "out"],
            1,
            "there is no delta log folder 'absent'.",
        ),
        (["reconstruct", "--delta_log_dir", "absent", "--list_steps"], 1, "there is no delta log folder 'absent'."),
        (
            ["patch", "--delta_log_dir", "absent", "--to_step", "3", "--output", "p.safetensors"],
            1,
            "'absent' holds no delta log: there is no base.json.",
        ),
        (
            ["patch", "--delta_log_dir", "absent", "--to_step", "3", "--output", "p.pt"],
            2,
            "--output must end in .safetensors, got 'p.pt'.",
        ),
        (["patch", "--patch", "p.safetensors"], 2, "or --patch, --model_dir, --output_dir to apply one; got --patch."),
        (
            ["patch", "--patch", "absent.safetensors", "--model_dir", ".", "--output_dir", "out"],
            1,
            "there is no delta file 'absent.safetensors'.",
        ),
        (["push", "absent.safetensors", "--repo_id", "r"], 1, "there is no delta file 'absent.safetensors'."),
        (["push", "absent.safetensors"], 2, "--repo_id is missing (or --base_model, to name the repository after)."),
    ],
)
def test_bad_input_is_named_in_a_sentence(
    args: list[str], code: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = fail(*args, code=code)
    assert message in text
    assert text.count("Error: ") == 1
    if code == 1:
        assert text == f"Error: {message}"
    assert not list(tmp_path.iterdir())
