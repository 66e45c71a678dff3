"""The training-step benchmark, on a tiny model: arms, check, what is stored and shown, and what ends it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sparseopt as so
from sparseopt.benchmarks import report, train_arms, train_step, train_work
from sparseopt.benchmarks.train_arms import CheckError
from sparseopt.benchmarks.train_settings import Arm, parse, parse_arms
from sparseopt.optim.structured import is_structured
from sparseopt.shapes import build_shape

pytest.importorskip("transformers")
SPARSE = Arm("sparse@10%", 0.1)


def command(*more: str) -> list[str]:
    base = ["--shape", "tiny", "--batch", "1", "--seq", "32", "--rounds", "2", "--warmup", "1", "--device", "cpu"]
    return [*base, "--commit", "abc123", *more]


def stored(folder: Path) -> Any:
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text())


# ---- settings --------------------------------------------------------------------------------------------------------
def test_arms_by_name() -> None:
    names = [arm.name for arm in parse_arms(["dense-fused", "sparse", "sparse/runs16"], ["2.5%", "0.0025"])]
    expected = ["sparse@2.5%", "sparse@0.25%", "sparse@2.5%/runs16", "sparse@0.25%/runs16"]
    assert names == ["dense-fused", *expected]
    assert parse_arms(["sparse@10%/runs8"], []) == [Arm("sparse@10%/runs8", 0.1, 8)]
    assert parse_arms(["sparse/columns", "sparse@10%/rows"], ["2.5%"]) == [
        Arm("sparse@2.5%/columns", 0.025, 1, "column"),
        Arm("sparse@10%/rows", 0.1, 1, "row"),
    ]
    assert len(parse_arms(["lora", "lora"], [])) == 1
    with pytest.raises(ValueError, match="unknown arm 'dense': expected some of dense-fused"):
        parse_arms(["dense"], [])
    for text in ("0", "120%", "much", "nan"):
        with pytest.raises(ValueError, match="density must be a share"):
            parse_arms(["sparse"], [text])


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (["--arms", "dense"], "unknown arm 'dense'"),
        (["--arms", ","], "names no arm"),
        (["--shape", "gpt9"], "unknown shape 'gpt9'"),
        (["--seq", "100000"], "at most 512"),
        (["--seq", "1"], "at least 2"),
        (["--rounds", "1"], "cannot be split"),
        (["--compile", "--mode", "eager"], "contradicts"),
        (["--batch", "0"], "at least 1"),
    ],
)
def test_bad_usage(wrong: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(command(*wrong))
    assert caught.value.code == 2
    assert sentence in capsys.readouterr().err


def test_names_tell_what_was_measured(tmp_path: Path) -> None:
    settings, _ = parse(
        command("--workload", "dpo", "--gradient_checkpointing", "--accumulation", "2", "--mode", "both")
    )
    assert settings.modes == ("eager", "compiled")
    expected = (
        "training step (dpo), tiny shapes, random weights, eager, 1 pair x 32, gradient checkpointing, accumulation 2"
    )
    assert settings.name("eager") == expected
    folder = tmp_path / "my-model"
    folder.mkdir()
    named, _ = parse(["--model", str(folder), "--master", "fp32"])
    assert named.name("compiled") == "training step (lm), my-model, compiled, 1 x 512, fp32 master"
    assert str(tmp_path) not in named.command("compiled") + json.dumps(named.record("compiled"))


# ---- arms and work ---------------------------------------------------------------------------------------------------
def test_masks_leave_embeddings_and_head_out() -> None:
    model = build_shape("tiny", device="cpu")
    masks = train_arms.random_masks(model, 0.1, run=16, seed=3)
    assert set(masks.names) == {n for n, _ in model.named_parameters()} - {"model.embed_tokens.weight"}
    assert masks.density == pytest.approx(0.1, abs=0.02)
    runs = masks["model.layers.0.mlp.up_proj.weight"].view(-1, 16)
    assert torch.equal(runs.all(1), runs.any(1))
    assert train_arms.random_masks(model, 0.1, run=16, seed=3) == masks


@pytest.mark.parametrize("structure", ["row", "column"])
def test_masks_of_rows_and_columns(structure: str) -> None:
    model = build_shape("tiny", device="cpu")
    masks = train_arms.random_masks(model, 0.1, structure=structure)
    for name, mask in masks.items():
        if mask.dim() == 2:
            groups = mask.any(1 if structure == "row" else 0)
            assert int(groups.sum()) == round(0.1 * groups.numel())
            assert int(mask.sum()) == int(groups.sum()) * (mask.numel() // groups.numel())
        else:
            assert not mask.any(), name
    built = train_arms.build(Arm("x", 0.1, 1, structure), model)
    assert built.trained == masks.active_parameters
    assert sum(is_structured(module) for module in model.modules()) == sum(masks.count(n) > 0 for n in masks.names)


@pytest.mark.parametrize("workload", ["lm", "dpo", "grpo"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("structure", ["row", "column"])
def test_the_check_of_parts(structure: str, dtype: torch.dtype, workload: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arm = Arm("sparse@10%/x", 0.1, 1, structure)
    train_arms.check_small(arm, build_shape("tiny", device="cpu", dtype=dtype), workload, mode="eager")
    captured = train_arms._captured

    def wrong(optimizer: so.SparseAdamW) -> dict[str, torch.Tensor]:
        return {name: values * 1.2 for name, values in captured(optimizer).items()}

    monkeypatch.setattr(train_arms, "_captured", wrong)
    with pytest.raises(CheckError, match="differs by 0"):
        train_arms.check_small(arm, build_shape("tiny", device="cpu", dtype=dtype), workload, mode="eager")


@pytest.mark.parametrize("workload", ["lm", "dpo", "grpo"])
def test_losses(workload: str) -> None:
    model = build_shape("tiny", device="cpu", dtype=torch.float32)
    whole = train_work.make_loss(workload, model, 2, 16, accumulation=1)
    halves = train_work.make_loss(workload, model, 2, 16, accumulation=2)
    value = whole[0]()
    assert halves[0]().item() == pytest.approx(value.item() / 2)
    value.backward()
    grad = model.get_parameter("model.layers.0.mlp.up_proj.weight").grad
    assert grad is not None
    assert grad.abs().sum() > 0
    if workload == "dpo":  # policy and reference are still the same
        assert value.item() == pytest.approx(0.6931, abs=1e-4)
    if workload == "lm":
        assert value.item() == pytest.approx(torch.log(torch.tensor(256.0)).item(), rel=0.05)


@pytest.mark.parametrize("arm", [SPARSE, Arm("sparse@5%/runs16", 0.05, 16)], ids=lambda arm: arm.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_small_check_passes(arm: Arm, dtype: torch.dtype) -> None:
    train_arms.check_small(arm, build_shape("tiny", device="cpu", dtype=dtype), "lm", mode="eager")


def test_small_check_finds_another_result(monkeypatch: pytest.MonkeyPatch) -> None:
    original = so.SparseAdamW.step

    def forgetful(self: so.SparseAdamW, closure: Any = None) -> Any:
        result = original(self, closure)
        with torch.no_grad():  # one entry is three units in the last place off
            name, param = next((n, p) for n, p, _ in self._layout() if p.requires_grad)
            param[self.masks[name]] = param[self.masks[name]] * 1.02
        return result

    monkeypatch.setattr(so.SparseAdamW, "step", forgetful)
    with pytest.raises(CheckError, match="differs from dense AdamW"):
        train_arms.check_small(SPARSE, build_shape("tiny", device="cpu"), "lm", mode="eager")


@pytest.mark.parametrize("where", ["embedding", "inactive"])
def test_frozen_entries_are_watched(where: str) -> None:
    built = train_arms.build(SPARSE, build_shape("tiny", device="cpu"))
    (loss,) = train_work.make_loss("lm", built.model, 1, 16, 1)
    with pytest.raises(CheckError, match="no active entry moved"):
        built.check()
    loss().backward()
    built.update()
    built.check()
    probe = next(p for p in built.probes if bool(p.active.any()) == (where == "inactive"))
    entry = int((~probe.active).nonzero()[0])
    with torch.no_grad():
        probe.param.view(-1)[entry] += 1
    with pytest.raises(CheckError, match="a frozen entry moved"):
        built.check()


@pytest.mark.parametrize(("arm", "dtype"), [("lora", torch.float32), ("lora-bf16", torch.bfloat16)])
def test_lora_trains_all_linear_layers(arm: str, dtype: torch.dtype) -> None:
    pytest.importorskip("peft")
    built = train_arms.build(Arm(arm), build_shape("tiny", device="cpu"))
    trained = {n: p for n, p in built.model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 7  # A and B, two layers, seven linears
    assert {p.dtype for p in trained.values()} == {dtype}
    assert built.trained == sum(p.numel() for p in trained.values())


def test_bytes_are_exact() -> None:
    model = build_shape("tiny", device="cpu")
    count = sum(p.numel() for p in model.parameters())
    tensors = len(list(model.parameters()))
    dense = train_arms.build(Arm("dense-fused"), model)
    (loss,) = train_work.make_loss("lm", dense.model, 1, 16, 1)
    loss().backward()
    assert dense.gradient_bytes() == 2 * count
    dense.update()
    assert dense.state_bytes() == 2 * 2 * count + 4 * tensors  # two bf16 moments, one fp32 step each
    sparse = train_arms.build(SPARSE, build_shape("tiny", device="cpu"))
    (loss,) = train_work.make_loss("lm", sparse.model, 1, 16, 1)
    loss().backward()
    assert sparse.gradient_bytes() >= 4 * sparse.trained
    assert all(p.grad is None for p in sparse.model.parameters())
    assert isinstance(sparse.optimizer, so.SparseAdamW)
    assert sparse.state_bytes() == sparse.optimizer.state_bytes()


# ---- whole runs ------------------------------------------------------------------------------------------------------
def test_all_arms(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    monkeypatch.setattr(train_arms.importlib.util, "find_spec", _without_bitsandbytes())
    folder = tmp_path / "results"
    more = ["--density", "2.5%", "--gradient-checkpointing", "--output", str(folder)]
    assert train_step.main(command(*more)) == 0
    printed = capsys.readouterr()
    assert "random weights" in printed.out
    assert "| adamw8bit | not installed |" in printed.out
    file = stored(folder)
    ((name, suite),) = file["suites"].items()
    assert "tiny shapes, random weights" in name
    assert suite["commit"] == "abc123"
    assert suite["command"].startswith("sparseopt bench lm --shape tiny")
    assert suite["environment"]["adamw8bit"] == "not installed"
    assert {"device", "torch", "triton", "transformers", "peft", "sparseopt"} <= set(suite["environment"])
    assert list(suite["cases"]) == ["sparse@2.5%", "sparse@2.5%/runs16"]
    arms = suite["train_step"]["arms"]
    for arm, values in arms.items():
        if arm == "adamw8bit":
            assert values == {"unavailable": "not installed"}
            continue
        assert values["rounds"] == 2
        assert values["peak_allocated_bytes"] is values["peak_reserved_bytes"] is None  # a CPU's would not compare
        total, phases = values["total"], values["phases"]
        assert 0 < total["p20"] <= total["median"] <= total["p80"]
        assert list(phases) == ["forward", "backward", "optimizer"]
        assert min(p["median"] for p in phases.values()) > 0
        assert sum(p["p20"] for p in phases.values()) <= total["p80"] + 1e-3
        assert values["state_bytes"] > 0
        assert values["gradient_bytes"] > 0
    for arm, case in suite["cases"].items():
        assert case["train_step"] == arms[arm]
        assert list(case["baselines"]) == ["dense-fused", "dense-foreach", "lora", "lora-bf16"]
        ratio = case["baselines"]["lora"]["median"] / case["sparseopt"]["median"]
        assert case["baselines"]["lora"]["ratio"] == pytest.approx(ratio, abs=1e-3)
    assert arms["sparse@2.5%"]["state_bytes"] < arms["lora"]["state_bytes"] < arms["dense-fused"]["state_bytes"]
    (table,) = folder.glob("*.md")
    (image,) = folder.glob("*.png")
    assert "random weights" in table.read_text()
    assert "random-weights" in image.name
    assert image.read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path) not in json.dumps(file) + table.read_text()

    readme = tmp_path / "README.md"
    readme.write_text(f"{report.BEGIN}\n{report.END}\n")
    report.render(folder, readme)
    assert "random weights" in readme.read_text()
    assert "adamw8bit not installed" in readme.read_text()


def _without_bitsandbytes() -> Any:
    find = train_arms.importlib.util.find_spec
    return lambda name, *more: None if name == "bitsandbytes" else find(name, *more)


@pytest.mark.parametrize("stage", ["before", "after"])
def test_a_failed_check_shows_no_speed(
    stage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise CheckError("it is wrong")

    if stage == "before":
        monkeypatch.setattr(train_arms, "compare", fail)
    else:
        monkeypatch.setattr(train_arms.Built, "check", fail)
    arguments = command("--arms", "dense-fused,sparse@10%", "--output", str(tmp_path / "results"))
    assert train_step.main(arguments) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines()[-1].startswith("Error: no speed is reported, because a result is wrong:")
    assert not (tmp_path / "results").exists()


def test_a_loss_that_is_not_finite_shows_no_speed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = train_arms.build

    def broken(arm: Arm, model: nn.Module, **options: Any) -> train_arms.Built:
        built = original(arm, model, **options)
        if options["master"] == "residual" and "lr" not in options:
            with torch.no_grad():
                model.get_parameter("model.norm.weight").fill_(float("nan"))
        return built

    monkeypatch.setattr(train_arms, "build", broken)
    assert train_step.main(command("--arms", "sparse@10%")) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "sparse@10%: the loss is not finite" in printed.err


def test_out_of_memory_of_one_arm(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = train_arms.build
    asked = []

    def small(arm: Arm, model: nn.Module, **options: Any) -> train_arms.Built:
        asked.append(arm.name)
        if arm.name == "dense-fused":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(arm, model, **options)

    monkeypatch.setattr(train_arms, "build", small)
    arguments = ["--arms", "dense-fused,dense-foreach,sparse@10%", "--output", str(tmp_path)]
    assert train_step.main(command(*arguments)) == 0
    assert "| dense-fused | out of memory |" in capsys.readouterr().out
    assert asked.count("dense-fused") == 1  # not tried again in the second pass
    ((_, suite),) = stored(tmp_path)["suites"].items()
    assert suite["train_step"]["arms"]["dense-fused"] == {"unavailable": "out of memory"}
    assert list(suite["cases"]["sparse@10%"]["baselines"]) == ["dense-foreach"]
    assert suite["cases"]["sparse@10%"]["rounds"] == 2


def test_ctrl_c_keeps_what_was_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = train_step.measure
    done: list[str] = []

    def interrupted(arm: Arm, *more: Any) -> Any:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(arm.name)
        return original(arm, *more)

    monkeypatch.setattr(train_step, "measure", interrupted)
    arguments = ["--arms", "dense-fused,sparse@10%,lora", "--mode", "both", "--output", str(tmp_path)]
    assert train_step.main(command(*arguments)) == 130
    ((name, suite),) = stored(tmp_path)["suites"].items()
    assert "eager" in name
    assert list(suite["train_step"]["arms"]) == ["dense-fused", "sparse@10%"]
    assert suite["train_step"]["settings"]["interrupted"] is True
    assert "Interrupted: what had been measured by then." in capsys.readouterr().out


def test_without_sparse_arms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):  # the second run replaces the first
        assert train_step.main(command("--workload", "grpo", "--arms", "dense-fused", "--output", str(tmp_path))) == 0
    assert "generation is not part of the step" in capsys.readouterr().out
    file = stored(tmp_path)
    assert file["suites"] == {}
    assert len(file["without_sparse"]) == 1


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert train_step.main(command("--workload", "dpo", "--arms", "sparse@10%", "--json", "--accumulation", "2")) == 0
    ((name, suite),) = json.loads(capsys.readouterr().out).items()
    assert name == "training step (dpo), tiny shapes, random weights, eager, 1 pair x 32, accumulation 2"
    assert suite["cases"]["sparse@10%"]["baselines"] == {}


def test_a_model_that_is_not_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert train_step.main(["--model", str(tmp_path / "none"), "--arms", "dense-fused", "--device", "cpu"]) == 1
    assert "does not exist" in capsys.readouterr().err


@pytest.mark.slow
def test_compiled_layers(capsys: pytest.CaptureFixture[str]) -> None:
    assert train_step.main(command("--compile", "--arms", "dense-fused,lora,sparse@10%", "--passes", "1")) == 0
    assert "random weights, compiled" in capsys.readouterr().out
