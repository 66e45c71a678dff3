"""``sparseopt masks find``: file names, exact counts, what the metadata say, the Jaccard report, and every error."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import sparseopt as so
from sparseopt.benchmarks.mask_finding import write_log
from sparseopt.cli._main import app
from sparseopt.masks.gradient_stats import save_gradient_stats

SHAPES = {
    "model.embed_tokens.weight": (50, 16),
    **{
        f"model.layers.{i}.{kind}.weight": shape
        for i in range(2)
        for kind, shape in {"self_attn.q_proj": (16, 16), "mlp.up_proj": (40, 16), "input_layernorm": (16,)}.items()
    },
}
TOTAL = sum(map(math.prod, SHAPES.values()))
STEPS = [10, 20, 30, 40, 50]


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("logs") / "log"
    write_log(folder, SHAPES, len(STEPS), 0.4)
    return folder


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(*args: Any) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["masks", "find", *map(str, args), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def fail(*args: Any, code: int = 1) -> str:
    result = CliRunner().invoke(app, ["masks", "find", *map(str, args)])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    assert not list(Path().rglob("*.safetensors"))
    return " ".join(result.output.replace("│", " ").split())


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (["--method", "fisher", "--target_step", "50"], "sparsity_97.5pct_fisher_step50"),
        (["--method", "fisher"], "sparsity_97.5pct_fisher_step50"),
        (
            ["--method", "momentum", "--sparsity_percent", "90", "--momentum_window", "25", "--target_step", "30"],
            "sparsity_90.0pct_momentum_w25_step30",
        ),
        (["--method", "momentum", "--target_step", "20"], "sparsity_97.5pct_momentum_w20_step20"),
        (["--method", "magnitude", "--sparsity-percent", "99.25"], "sparsity_99.25pct_magnitude_step50"),
        (["--method", "ground_truth", "--sparsity_percent", "50"], "sparsity_50.0pct_ground_truth_step50"),
        (["--method", "weight_magnitude"], "sparsity_97.5pct_weight_magnitude"),
        (["--method", "random", "--seed", "3"], "sparsity_97.5pct_random_seed3"),
    ],
)
def test_names_and_exact_counts(log: Path, flags: list[str], name: str) -> None:
    report = run("--delta_log_dir", log, *flags)
    assert report["output"] == f"masks/{name}.safetensors"
    assert [path.name for path in Path("masks").iterdir()] == [f"{name}.safetensors"]
    masks = so.MaskSet.load(report["output"])
    assert masks.shapes == SHAPES
    sparsity = float(name.split("_")[1].removesuffix("pct")) / 100
    assert masks.active_parameters == report["active_parameters"] == round((1 - sparsity) * TOTAL)
    method = flags[1]
    assert masks.metadata["method"] == method
    if method in ("fisher", "momentum", "magnitude", "ground_truth"):
        step = int(name.rpartition("step")[2])
        assert masks.metadata["target_step"] == step
        assert masks.metadata["log_fingerprint"] == json.loads((log / "base.json").read_text())["fingerprint"]
        window = masks.metadata.get("momentum_window")
        scores = so.DeltaLog(log).scores(method, step, window)
        assert masks == so.find_masks(dict(scores.items()), sparsity)


def test_choices_reach_the_mask(log: Path) -> None:
    base = ("--delta_log_dir", log, "--method", "fisher", "--sparsity_percent", 80)
    plain = so.MaskSet.load(run(*base, "--exclude", "embed_tokens,norm")["output"])
    eligible = [name for name in SHAPES if "embed" not in name and "norm" not in name]
    assert {name for name, count in plain.counts.items() if count} <= set(eligible)
    assert plain.active_parameters == round(0.2 * sum(math.prod(SHAPES[name]) for name in eligible))
    assert plain.metadata["exclude"] == ["embed_tokens", "norm"]

    mlp = so.MaskSet.load(run(*base, "--mlp_only")["output"])
    assert mlp.names == list(SHAPES)
    assert {name for name, count in mlp.counts.items() if count} == {n for n in SHAPES if ".mlp." in n}
    assert mlp.active_parameters == round(0.2 * 2 * 640)
    assert mlp.metadata["mlp_only"] is True

    one = so.MaskSet.load(run(*base, "--mlp_only", "--include", "layers.1")["output"])
    assert {name for name, count in one.counts.items() if count} == {"model.layers.1.mlp.up_proj.weight"}

    each = so.MaskSet.load(run(*base, "--scope", "per_tensor", "--output", "here/each.safetensors")["output"])
    assert each.counts == {name: round(0.2 * math.prod(shape)) for name, shape in SHAPES.items()}
    assert Path("here/each.safetensors").is_file()

    least = so.MaskSet.load(run(*base, "--min_layer_keep_ratio", 0.1)["output"])
    assert all(least.count(name) >= 0.1 * math.prod(shape) for name, shape in SHAPES.items())

    runs = so.MaskSet.load(run(*base, "--granularity", 8, "--output", "runs.pt")["output"])
    assert runs["model.embed_tokens.weight"].view(-1, 8).sum(1).unique().tolist() in ([0, 8], [8], [0])


def test_a_scratch_folder_changes_nothing_and_stays_empty(log: Path) -> None:
    base = ("--delta_log_dir", log, "--method", "momentum")
    plain, other = run(*base), run(*base, "--scratch_dir", "scratch", "--output", "b.safetensors")
    assert plain["fingerprint"] == other["fingerprint"]
    assert os.listdir("scratch") == []


def test_jaccard(log: Path) -> None:
    import matplotlib.image

    flags = ("--delta_log_dir", log, "--method", "momentum", "--momentum_window", 10, "--sparsity_percent", 90)
    result = run(*flags, "--target_step", 20, "--exclude", "embed_tokens", "--compute_jaccard")
    stem = Path("masks/sparsity_90.0pct_momentum_w10_step20")
    assert sorted(path.name for path in Path("masks").iterdir()) == [
        f"{stem.name}.safetensors", f"{stem.name}_jaccard.json", f"{stem.name}_jaccard.png",
    ]  # fmt: skip
    report = json.loads(stem.with_name(f"{stem.name}_jaccard.json").read_text())
    assert report == result["jaccard"]

    def mask(method: str, step: int) -> so.MaskSet:
        scores = so.DeltaLog(log).scores(method, step, 10)
        return so.find_masks(dict(scores.items()), 0.9, exclude="embed_tokens", allow_zero_scores=True)

    found, truth = mask("momentum", 20), mask("ground_truth", 50)
    assert report["fingerprint"] == found.fingerprint
    expected = so.compare(found, truth)
    for key in ("jaccard", "chance_jaccard", "overlap"):
        assert report["ground_truth"][key] == pytest.approx(expected[key])
    assert report["ground_truth"]["step"] == 50
    assert set(report["ground_truth"]["per_layer"]) == set(SHAPES) - {"model.embed_tokens.weight"}
    each = {step: mask("momentum", step) for step in STEPS}
    assert report["steps"]["steps"] == STEPS
    for row, a in zip(report["steps"]["jaccard"], each.values(), strict=True):
        assert row == pytest.approx([so.compare(a, b)["jaccard"] for b in each.values()])
    assert report["steps"]["ground_truth"] == pytest.approx([so.compare(a, truth)["jaccard"] for a in each.values()])
    assert matplotlib.image.imread(stem.with_name(f"{stem.name}_jaccard.png")).std() > 0.1

    text = (
        CliRunner().invoke(app, ["masks", "find", *map(str, flags), "--target_step", "20", "--compute_jaccard"]).stdout
    )
    assert "Jaccard with the ground truth of step 50" in text
    assert "by chance" in text


def test_jaccard_of_methods_that_do_not_look_at_the_log(log: Path, tmp_path: Path) -> None:
    for method in ("random", "weight_magnitude"):
        result = run("--delta_log_dir", log, "--method", method, "--compute_jaccard")
        assert result["jaccard"]["steps"] is None
        assert 0 <= result["jaccard"]["ground_truth"]["jaccard"] < 0.2
    some = {name: torch.rand(shape) for name, shape in SHAPES.items() if "layers" in name}
    save_gradient_stats(tmp_path / "g.safetensors", some, "per_sample", 4)
    result = run("--delta_log_dir", log, "--method", "fisher", "--gradient_stats", "g.safetensors", "--compute_jaccard")
    assert result["output"] == "masks/sparsity_97.5pct_fisher.safetensors"
    assert set(result["jaccard"]["ground_truth"]["per_layer"]) <= set(some)
    save_gradient_stats(tmp_path / "g.safetensors", {**some, "other": torch.rand(3)}, "batch", 4)
    result = CliRunner().invoke(
        app, ["masks", "find", "--delta_log_dir", str(log), "--method", "gradient", "--gradient_stats", "g.safetensors",
              "--compute_jaccard"]
    )  # fmt: skip
    assert result.exit_code == 1
    assert "has no parameter 'other', which the mask has" in result.output


def test_gradient_statistics_say_what_they_are(tmp_path: Path) -> None:
    squares = {name: torch.rand(shape) for name, shape in SHAPES.items()}
    for method, kind, said in [("fisher", "per_sample", "empirical Fisher"), ("gradient", "batch", "no Fisher")]:
        save_gradient_stats(tmp_path / "g.safetensors", squares, kind, 16)
        report = run("--gradient_stats", "g.safetensors", "--method", method)
        assert report["metadata"]["method"] == method
        assert said in report["metadata"]["formula"]
        assert report["fingerprint"] == so.find_masks(squares, 0.975).fingerprint


def test_a_model_without_a_log(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained("model")
    weights = {name: p.detach().abs() for name, p in model.named_parameters()}
    report = run("--model_name", "model", "--method", "weight_magnitude", "--sparsity_percent", 90)
    assert report["fingerprint"] == so.find_masks(weights, 0.9).fingerprint
    first, second = (run("--model_name", "model", "--method", "random", "--seed", seed) for seed in (1, 2))
    assert first["total_parameters"] == sum(w.numel() for w in weights.values())
    assert first["fingerprint"] != second["fingerprint"]
    assert "models" not in os.listdir()


# ---- errors ----------------------------------------------------------------------------------------------------------
def test_a_share_given_as_a_percentage_warns(tmp_path: Path) -> None:
    for percent, warned in (("0.975", True), ("97.5", False)):
        result = CliRunner().invoke(app, [
            "masks", "find", "--method", "random", "--model_name", str(tmp_path / "absent"), "--sparsity_percent", percent,
        ])  # fmt: skip
        assert result.exit_code == 1
        said = "leaves 99.025% of the entries active; the share 0.975 is --sparsity_percent 97.5."
        assert (said in result.stderr) == warned


def test_a_step_that_was_not_logged(log: Path) -> None:
    message = fail("--delta_log_dir", log, "--method", "fisher", "--target_step", 25)
    assert "has no step 25; it has steps 10, 20, 30, 40, 50." in message
    assert "only 50 lies in 41..50; widen momentum_window=9" in fail(
        "--delta_log_dir", log, "--method", "momentum", "--momentum_window", 9
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method", "variance"], "must be one of magnitude, momentum"),
        (["--method", "fisher"], "'fisher' needs a delta log or gradient statistics"),
        (["--method", "gradient"], "'gradient' needs gradient statistics"),
        (["--method", "random"], "'random' needs a model"),
        (
            ["--method", "magnitude", "--delta_log_dir", "x", "--gradient_stats", "y"],
            "does not use gradient statistics",
        ),
        (["--method", "fisher", "--delta_log_dir", "x", "--granularity", "7"], "granularity must be 1, 8"),
        (["--method", "fisher", "--delta_log_dir", "x", "--sparsity_percent", "101"], "100"),
        (["--method", "random", "--model_name", "x", "--scope", "layer"], "scope must be 'global' or 'per_tensor'"),
        (["--method", "random", "--model_name", "x", "--min_layer_keep_ratio", "0.1"], "min_layer_keep_ratio=0.1"),
        (["--method", "fisher", "--delta_log_dir", "x", "--output", "mask.bin"], "end in .safetensors or .pt"),
        (["--method", "fisher", "--delta_log_dir", "x", "--device", "cuda"], "found on the CPU"),
        (["--method", "random", "--model_name", "x", "--compute_jaccard"], "needs --delta_log_dir"),
        ([], "--method"),
    ],
)
def test_bad_usage(flags: list[str], message: str) -> None:
    assert message in fail(*flags, code=2)


def test_bad_logs(log: Path, tmp_path: Path) -> None:
    import shutil

    assert "no delta log folder 'absent'" in fail("--delta_log_dir", "absent", "--method", "fisher")
    Path("empty").mkdir()
    assert "'empty' holds no delta log" in fail("--delta_log_dir", "empty", "--method", "fisher")
    shutil.copytree(log, "log")
    files = {step: Path(f"log/delta_step_{step}.safetensors") for step in STEPS}
    data = bytearray(files[30].read_bytes())
    data[-3] ^= 4
    good = files[30].read_bytes()

    def message() -> str:
        result = CliRunner().invoke(app, ["masks", "find", "--delta_log_dir", "log", "--method", "fisher"])
        assert result.exit_code == 1
        assert not Path("masks").exists()
        return result.output

    files[30].write_bytes(data)
    assert "delta_step_30.safetensors' is damaged" in message()
    files[30].unlink()
    assert "gap: step 40 follows step 30, not step 20" in message()
    write_log("other", SHAPES, 3, 0.4, seed=9)
    Path("other/delta_step_30.safetensors").rename(files[30])
    assert "delta_step_30.safetensors' is a delta of another base" in message()
    files[30].write_bytes(good)
    for file in files.values():
        file.unlink()
    assert "'log' has no steps yet" in message()


def test_nothing_to_choose_from_and_scores_of_zero(log: Path) -> None:
    flags = ("--delta_log_dir", log, "--method", "fisher", "--target_step", 10)
    assert "no parameter is left" in fail(*flags, "--include", "nothing")
    assert "have score zero" in fail(*flags, "--sparsity_percent", 0)
    assert run(*flags, "--sparsity_percent", 0, "--allow_zero_scores")["active_parameters"] == TOTAL
