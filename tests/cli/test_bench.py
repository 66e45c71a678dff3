"""``sparseopt bench``: what is handed on, and to whom."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from sparseopt.cli._main import app


def invoke(*args: str) -> Any:
    return CliRunner().invoke(app, ["bench", *args])


def keep(given: list[Any]) -> Any:
    """A ``main`` that notes its arguments and succeeds."""

    def main(arguments: list[str], prog: str) -> int:
        given.append((arguments, prog))
        return 0

    return main


@pytest.mark.parametrize("command", ["dpo", "grpo", "lm", "optimizer", "masks", "projection", "report"])
def test_help_is_lean_and_has_an_example(command: str) -> None:
    code = (
        "import sys, atexit\n"
        "atexit.register(lambda: print('HEAVY', [m for m in ('torch', 'numpy', 'matplotlib') if m in sys.modules]))\n"
        f"sys.argv = ['sparseopt', 'bench', {command!r}, '--help']\n"
        "from sparseopt.cli import main\nmain()\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    assert f"sparseopt bench {command}" in result.stdout
    assert "HEAVY []" in result.stdout


def test_flags_are_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparseopt.benchmarks import train_step
    from sparseopt.benchmarks.train_settings import parse

    given: list[Any] = []
    monkeypatch.setattr(train_step, "main", keep(given))
    result = invoke(
        "dpo", "--shape", "tiny", "--arms", "lora", "sparse,dense-fused", "--density", "10%", "5%", "--batch", "2",
        "--gradient-checkpointing", "--mode", "both", "--master", "fp32", "--json", "--output", "out folder", "--together",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    ((arguments, prog),) = given
    settings, options = parse(arguments)
    assert prog == "sparseopt bench dpo"
    assert (settings.workload, settings.shape, settings.batch, settings.master) == ("dpo", "tiny", 2, "fp32")
    assert [arm.name for arm in settings.arms] == ["lora", "sparse@10%", "sparse@5%", "dense-fused"]
    assert settings.modes == ("eager", "compiled")
    assert settings.gradient_checkpointing
    assert settings.together
    assert options.json
    assert options.output == Path("out folder")


def test_flags_of_real_rows_are_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparseopt.benchmarks import train_step
    from sparseopt.benchmarks.train_settings import parse

    given: list[Any] = []
    monkeypatch.setattr(train_step, "main", keep(given))
    result = invoke(
        "grpo", "--checkpoint", "None", "--n_steps", "50", "--batch-size", "1", "--subset_size", "10", "--model_name", "x/y",
        "--data", "my rows.jsonl", "--mask", "m.safetensors", "--num-generations", "4", "--max_completion_length", "32",
        "--results-dir", "out", "--run_name", "mine",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    settings, _ = parse(given[0][0])
    assert (settings.model, settings.data, settings.subset, settings.rounds) == ("x/y", "my rows.jsonl", 10, 50)
    assert (settings.batch, settings.checkpoint, settings.mask) == (1, None, "m.safetensors")
    assert (settings.num_generations, settings.max_completion_length) == (4, 32)
    assert (settings.results, settings.run) == ("out", "mine")
    assert settings.arms[-1].name == "sparse@mask"
    assert invoke("dpo", "--n_steps", "100", "--batch_size", "1", "--subset_size", "100").exit_code == 0
    assert parse(given[1][0])[0] == parse(["--workload=dpo", "--rounds=100", "--subset_size=100"])[0]


def test_defaults_are_those_of_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparseopt.benchmarks import train_step
    from sparseopt.benchmarks.train_settings import parse

    given: list[Any] = []
    monkeypatch.setattr(train_step, "main", keep(given))
    assert invoke("lm", "--shape", "tiny").exit_code == 0
    assert parse(given[0][0])[0] == parse(["--shape", "tiny"])[0]


def test_flags_of_projection_are_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparseopt.benchmarks import projection

    given: list[Any] = []
    monkeypatch.setattr(projection, "main", keep(given))
    result = invoke(
        "projection", "--shape", "tiny", "--batch_size", "2", "--seq", "8", "--layers", "mlp", "--rank-total", "16", "--dtype",
        "float32", "--mode", "eager", "compiled", "--arms", "plain", "naive hooks", "sparseopt", "--rounds", "3", "--device",
        "cpu", "--output", "out folder", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    ((arguments, prog),) = given
    assert prog == "sparseopt bench projection"
    assert vars(projection.parser(prog).parse_args(arguments)) == {
        "shape": "tiny", "model": None, "batch": 2, "seq": 8, "layers": "mlp", "rank_total": 16, "dtype": "float32",
        "mode": ["eager", "compiled"], "arms": ["plain", "naive hooks", "sparseopt"], "rounds": 3, "device": "cpu",
        "output": Path("out folder"), "json": True,
    }  # fmt: skip
    assert invoke("projection", "--model", "smollm2").exit_code == 0
    assert projection.parser(prog).parse_args(given[1][0]) == projection.parser(prog).parse_args(["--model", "smollm2"])


def test_bad_usage() -> None:
    wrong = (
        ["projection"], ["projection", "--shape", "tiny", "--model", "smollm2"],
        ["projection", "--shape", "tiny", "--arms", "sparseopt"], ["projection", "--shape", "tiny", "--mode", "fast"],
        ["lm"], ["dpo"], ["lm", "--shape", "tiny", "--model", "smollm2"], ["lm", "--shape", "gpt9"],
        ["lm", "--model", "smollm2", "--subset_size", "3"], ["dpo", "--shape", "tiny", "--data", "x.jsonl"],
    )  # fmt: skip
    for arguments in wrong:
        result = invoke(*arguments)
        assert result.exit_code == 2, result.output


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["dpo"], 2, "give one of --shape and --model, or real rows by --data or --subset_size."),
        (
            ["grpo", "--model", "./no/such/model", "--device", "cpu"],
            1,
            "Model folder './no/such/model' does not exist.",
        ),
        (["lm", "--shape", "gpt9"], 2, "unknown shape 'gpt9': expected one of llama-3.2-1b"),
        (["optimizer", "--device", "tpu"], 1, "device must be auto, cpu, cuda or cuda:N, got 'tpu'."),
        (["masks", "--device", "tpu"], 1, "device must be auto, cpu, cuda or cuda:N, got 'tpu'."),
        (["report", "--results", "no/such/folder"], 1, "there is no folder of results 'no/such/folder'."),
        (["report", "--readme", "no/such/README.md"], 1, "no/such/README.md: No such file or directory."),
    ],
)
def test_bad_input_is_named_in_a_sentence(
    arguments: list[str], code: int, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    result = invoke(*arguments)
    text = " ".join((result.output + capfd.readouterr().err).split())
    assert result.exit_code == code, text
    assert message in text
    assert text.lower().count("error: ") == 1
    assert "Traceback" not in text
    assert result.stdout == ""


def test_a_failure_has_its_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparseopt.benchmarks import train_step

    monkeypatch.setattr(train_step, "main", lambda arguments, prog: 1)
    assert invoke("grpo", "--shape", "tiny").exit_code == 1


SUMMARY = {
    "suite": "masks", "date": "2030-01-01", "commit": "abc", "command": "x", "scale": 1,
    "environment": {"device": "Some CPU", "threads": 2},
    "cases": {
        "pack": {"rounds": 3, "sparseopt": {"median": 1.0, "p20": 1.0, "p80": 1.0}, "baselines": {}, "facts": {}, "bars": {}}
    },
}  # fmt: skip


def test_a_suite_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparseopt.benchmarks import report

    monkeypatch.setattr(report, "run_suite", lambda suite: {**SUMMARY, "suite": suite})
    result = invoke("masks", "--device", "cpu", "--output", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert "| pack | 1 (1-1) |" in result.stdout
    assert "masks" in json.loads((tmp_path / "some-cpu-2-threads.json").read_text())["suites"]
    result = invoke("optimizer", "--device", "cpu", "--json")
    assert json.loads(result.stdout)["suite"] == "optimizer"


def test_a_suite_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from sparseopt import progress

    def measure(folder: str | None) -> None:
        print("measured")
        if folder:
            Path(folder, "some-gpu.json").write_text('{"device": "Some GPU"}\n')

    monkeypatch.setattr(progress, "announce_device", lambda device: torch.device("cuda"))
    monkeypatch.setitem(sys.modules, "sparseopt.benchmarks.gpu_masks", SimpleNamespace(main=measure))
    assert invoke("masks").stdout == "measured\n"
    assert json.loads(invoke("masks", "--json").stdout) == {"device": "Some GPU"}
    assert invoke("masks", "--output", str(tmp_path)).exit_code == 0
    assert (tmp_path / "some-gpu.json").exists()


def test_report(tmp_path: Path) -> None:
    from sparseopt.benchmarks import report

    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.merge(SUMMARY, tmp_path)
    result = invoke("report", "--results", str(tmp_path), "--readme", str(readme))
    assert result.exit_code == 0, result.output
    assert "| pack | 1 (1-1) |" in readme.read_text()
    assert "old" not in readme.read_text()
