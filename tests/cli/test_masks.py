"""``sparseopt masks info|compare|merge|plot|export`` on files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import sparseopt as so
from sparseopt.cli._main import app

A = {"w": torch.tensor([[True, False, True], [False, False, False]]), "b": torch.tensor([True, True])}
B = {"w": torch.tensor([[True, True, False], [False, False, False]]), "b": torch.tensor([True, False])}


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    paths = (tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    for path, masks in zip(paths, (A, B), strict=True):
        so.MaskSet.from_bool(masks).save(path)
    return str(paths[0]), str(paths[1])


def run(*args: str) -> str:
    result = CliRunner().invoke(app, ["masks", *args])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_info(files: tuple[str, str]) -> None:
    report = json.loads(run("info", files[0], "--json", "--per-layer"))
    assert (report["active_parameters"], report["total_parameters"], report["parameters"]) == (4, 8, 2)
    assert report["density"] == report["sparsity"] == 0.5
    assert report["fingerprint"] == so.MaskSet.load(files[0]).fingerprint
    assert report["per_layer"]["w"] == {"shape": [2, 3], "active": 2, "density": pytest.approx(1 / 3)}
    text = run("info", files[0], "--per_layer")
    assert "active: 4 (density 50.0000%" in text
    assert "w 2x3: 2 active" in text
    assert "w 2x3" not in run("info", files[0])


def test_compare(files: tuple[str, str]) -> None:
    report = json.loads(run("compare", *files, "--json"))
    assert report["jaccard"] == pytest.approx(2 / 5)
    assert set(report["per_layer"]) == {"w", "b"}
    assert "jaccard 0.400000" in run("compare", *files)
    assert "  w: " in run("compare", *files, "--per-layer")


@pytest.mark.parametrize(("how", "active"), [("union", 5), ("intersection", 2), ("majority", 4)])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_merge(files: tuple[str, str], tmp_path: Path, how: str, active: int, suffix: str) -> None:
    output = tmp_path / f"merged{suffix}"
    report = json.loads(run("merge", *files, files[0], "--how", how, "--output", str(output), "--json"))
    assert report["active_parameters"] == active
    assert so.MaskSet.load(output) == so.merge([so.MaskSet.load(f) for f in (*files, files[0])], how=how)


def fail(code: int, *args: str) -> str:
    result = CliRunner().invoke(app, ["masks", *args])
    assert result.exit_code == code, result.output
    return " ".join(result.stderr.replace("│", " ").split())


# ---- compare ---------------------------------------------------------------------------------------------------------
def test_compare_by_kind(files: tuple[str, str]) -> None:
    text = run("compare", *files, "--per_kind")
    assert text.count("  other: jaccard 0.400000") == 1
    assert "  w: jaccard 0.333333" in text
    report = json.loads(run("compare", *files, "--per-kind", "--json"))
    expected = so.compare(so.MaskSet.load(files[0]), so.MaskSet.load(files[1]))
    assert report == json.loads(json.dumps(expected))


def test_compare_layers(tmp_path: Path) -> None:
    masks = {"layers.3.mlp.up_proj.weight": torch.tensor([True, False])}
    so.MaskSet.from_bool(masks).save(tmp_path / "m.safetensors")
    text = run("compare", *[str(tmp_path / "m.safetensors")] * 2, "--per_kind")
    for label in ("mlp", "up_proj", "layer 3"):
        assert f"  {label}: jaccard 1.000000" in text


def test_compare_three(files: tuple[str, str]) -> None:
    a, b = files
    report = json.loads(run("compare", a, b, a, "--json"))
    assert report["files"] == [a, b, a]
    assert report["jaccard"] == [[1, 0.4, 1], [0.4, 1, 0.4], [1, 0.4, 1]]
    assert report["chance_jaccard"][0][1] == report["pairs"][0]["chance_jaccard"]
    assert [(pair["left"], pair["right"]) for pair in report["pairs"]] == [(a, b), (a, a), (b, a)]
    assert "per_layer" not in report["pairs"][0]
    report = json.loads(run("compare", a, b, a, "--json", "--per_layer"))
    assert set(report["pairs"][0]["per_layer"]) == {"w", "b"}
    text = run("compare", a, b, a)
    assert f"{a} and {b}:\n  jaccard 0.400000" in text
    assert text.count("jaccard") == 3


def test_compare_takes_two(files: tuple[str, str]) -> None:
    assert "at least two mask files" in fail(2, "compare", files[0])
    assert "there is no" in fail(1, "compare", files[0], "nowhere.safetensors").lower()


# ---- merge -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("spelling", [["1,2,0.5"], ["1", "2", "0.5"], ["1,2", "0.5"]])
@pytest.mark.parametrize("rest", [[], ["--sparsity", "0.5"], ["--threshold", "3.5"]])
def test_merge_weighted(files: tuple[str, str], tmp_path: Path, spelling: list[str], rest: list[str]) -> None:
    output = tmp_path / "merged.safetensors"
    a, b = files
    run("merge", a, b, a, "--how", "weighted", "--output", str(output), *rest, "--weights", *spelling)
    options = {rest[0].removeprefix("--"): float(rest[1])} if rest else {}
    masks = [so.MaskSet.load(file) for file in (a, b, a)]
    merged = so.MaskSet.load(output)
    assert merged == so.merge(masks, "weighted", weights=[1, 2, 0.5], **options)
    assert merged.metadata["weights"] == [1, 2, 0.5]
    assert merged.active_parameters == (4 if "--sparsity" in rest else 2 if rest else 3)


def test_merge_usage(files: tuple[str, str], tmp_path: Path) -> None:
    output = ["--output", str(tmp_path / "merged.safetensors")]
    assert "belong to --how weighted" in fail(2, "merge", *files, *output, "--weights", "1,2")
    weighted = ["merge", *files, *output, "--how", "weighted"]
    assert "a number for each of the 2 files, got 1" in fail(2, *weighted, "--weights", "1")
    assert "takes numbers, got 'a,b'" in fail(2, *weighted, "--weights", "a,b")
    assert "not both" in fail(2, *weighted, "--sparsity", "0.5", "--threshold", "1")
    assert "only 5 are active in any" in fail(1, *weighted, "--sparsity", "0")
    assert "union, intersection, majority or weighted" in fail(2, "merge", *files, *output, "--how", "mean")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


# ---- plot ------------------------------------------------------------------------------------------------------------
@pytest.fixture
def steps(tmp_path: Path) -> list[str]:
    """Three masks: two say their step, one is named after it."""
    shapes = {f"model.layers.{i}.{kind}": (8, 4) for i in range(2) for kind in ("self_attn.q_proj", "mlp.up_proj")}
    paths = []
    for step in (20, 10, 30):
        masks = so.MaskSet.from_bool({name: torch.rand(shape) < step / 100 for name, shape in shapes.items()})
        paths.append(str(tmp_path / f"mask_step_{step}.{'pt' if step == 30 else 'safetensors'}"))
        masks.with_metadata(step=step).save(paths[-1])
    return paths


def test_plot_into_a_folder(steps: list[str], tmp_path: Path) -> None:
    report = json.loads(run("plot", *steps, "--output", str(tmp_path / "plots"), "--format", "svg", "--json"))
    assert report["steps"] == [10, 20, 30]
    assert set(report["pictures"]) == {"evolution", "layers", "kinds"}
    for found in report["pictures"].values():
        assert Path(found["picture"]).read_bytes().startswith(b"<?xml")
        assert json.loads(Path(found["numbers"]).read_text())
    last = json.loads(Path(report["pictures"]["layers"]["numbers"]).read_text())
    assert last["density"] == so.MaskSet.load(steps[2]).density
    assert set(run("plot", steps[0], "--output", str(tmp_path / "one")).split()) >= {
        str(tmp_path / "one" / "kinds.png")
    }
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == ["kinds.json", "kinds.png", "layers.json", "layers.png"]


def test_plot_into_a_file(steps: list[str], tmp_path: Path) -> None:
    for args, key in ((steps, "previous"), (steps[:1], "cells"), ([*steps, "--picture", "kinds"], "kinds")):
        run("plot", *args, "--output", str(tmp_path / "picture.png"))
        assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
        assert key in json.loads((tmp_path / "picture.json").read_text())


def test_plot_counts_files_without_steps(files: tuple[str, str], tmp_path: Path) -> None:
    run("plot", *files, "--output", str(tmp_path / "e.svg"))
    assert json.loads((tmp_path / "e.json").read_text())["steps"] == [1, 2]


def test_plot_usage(steps: list[str], files: tuple[str, str], tmp_path: Path) -> None:
    output = ["--output", str(tmp_path / "p.png")]
    assert "must be png or svg, got 'pdf'" in fail(2, "plot", *steps, "--output", str(tmp_path), "--format", "pdf")
    assert "is no svg file" in fail(2, "plot", *steps, *output, "--format", "svg")
    assert "--picture must be" in fail(2, "plot", *steps, *output, "--picture", "all")
    assert "at least two mask files" in fail(2, "plot", steps[0], *output, "--picture", "evolution")
    assert "are both of step 20: give one of them" in fail(1, "plot", *steps, steps[0], *output)
    assert "does not say its step" in fail(1, "plot", *steps, files[0], *output)
    assert not (tmp_path / "p.png").exists()


# ---- export ----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("model") / "tiny"
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_export(model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    before = AutoModelForCausalLM.from_pretrained(model)
    masks = so.MaskSet.random(before, 0.5, seed=1)
    embedding = "model.embed_tokens.weight"
    masks = so.MaskSet.from_bool({name: mask & (name != embedding) for name, mask in masks.items()})
    masks.save(tmp_path / "mask.safetensors")
    args = ["--mask", str(tmp_path / "mask.safetensors"), "--model_name", str(model), "--output_dir"]
    result = CliRunner().invoke(app, ["masks", "export", *args, str(tmp_path / "pruned")])
    assert result.exit_code == 0, result.output
    assert "usually destroys a model" in result.stderr
    assert f"kept all weights of 1 tensors, {embedding} among them" in result.stdout
    after = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").named_parameters())
    zeros = total = 0
    for name, old in before.named_parameters():
        assert torch.equal(after[name], old if name == embedding else torch.where(masks[name], old, 0))
        zeros, total = zeros + int((after[name] == 0).sum()), total + old.numel()
    assert f"{zeros:,} of {total:,} weights are 0 ({zeros / total:.2%})" in result.stdout
    report = json.loads(run("export", *args, str(tmp_path / "erased"), "--no-keep-unmasked", "--json"))
    assert report["kept"] == []
    assert not AutoModelForCausalLM.from_pretrained(tmp_path / "erased").model.embed_tokens.weight.any()
    assert "is no empty folder: name another one" in fail(1, "export", *args, str(tmp_path / "pruned"))
    assert "a size is a number" in fail(2, "export", *args, str(tmp_path / "new"), "--max_shard_size", "x")
    assert not (tmp_path / "new").exists()


def test_devices_are_refused(files: tuple[str, str], tmp_path: Path) -> None:
    for args in (["info", files[0]], ["compare", *files], ["plot", files[0], "--output", str(tmp_path / "p.png")]):
        assert "--device is auto or cpu, got 'cuda'" in fail(2, *args, "--device", "cuda")


@pytest.mark.parametrize(
    "args",
    [
        ["info", "absent.safetensors"],
        ["compare", "absent.safetensors", "other.safetensors"],
        ["merge", "absent.safetensors", "other.safetensors", "--output", "merged.pt"],
        ["plot", "absent.safetensors", "--output", "p.png"],
        ["export", "--mask", "absent.safetensors", "--model_name", "smollm2", "--output_dir", "out"],
    ],
)
def test_an_absent_file_is_named_in_a_sentence(
    args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert fail(1, *args) == "Error: there is no mask file 'absent.safetensors'."
    (tmp_path / "absent.safetensors").write_bytes(b"not a mask")
    text = fail(1, *args)
    assert "absent.safetensors" in text
    assert text.count("Error: ") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["absent.safetensors"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["info"], "'FILE'"),
        (["export", "--mask", "m.safetensors", "--model_name", "smollm2"], "'--output_dir'"),
        (["merge", "a", "b", "--output", "c.txt"], "c.txt"),
    ],
)
def test_bad_usage_names_the_argument(args: list[str], message: str) -> None:
    text = fail(2, *args)
    assert message in text
    assert text.count("Error: ") == 1
