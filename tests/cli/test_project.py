"""``sparseopt project``: every flag and default, files, printed sentences, JSON, and errors of one sentence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

from sparseopt.cli._main import app

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

MODEL = ("--model", "tiny", "--random_weights", "--model_dtype", "float32", "--device", "cpu", "--block_size", "32")
LAYERS = "proj_layers_mlp,attn_rank_total_{}_rank_min_2_seed_42_dtype_float32_row_on_False_emb_False"

# The flags that this command has always had, and what they are when not given.
RUN = {
    "architecture": "GPT2-Small", "proj_layers": "mlp,attn", "proj_rank_total": 256, "proj_rank_min": 8, "proj_seed": 42,
    "proj_dtype": "bfloat16", "proj_row_orthonormal": False, "include_embeddings": False, "proj_save_interval": 1,
    "batch_size": 2, "max_samples": None, "block_size": 1024, "seed": 42, "output_dir": Path("./projections"),
    "model_dtype": "bfloat16", "verbose": False,
    # ours
    "model": None, "weights": None, "random_weights": False, "tokenizer": None, "data": "pile", "text_column": "text",
    "per_document": False, "proj_method": "gaussian", "proj_shape_rule": "square", "proj_sketch": None,
    "include_biases": False, "results_dir": None, "worker": None, "workers": None, "cuda_graph": False, "export_pt": True,
    "device": "auto", "json": False, "debug": False,
}  # fmt: skip
FULL_GRADS = {
    "architecture": "GPT2-Small", "batch_size": 1, "max_samples": None, "model_dtype": "bfloat16", "train_dtype": "bfloat16",
    "output_dir": Path("./Results"), "seed": 42, "block_size": 1024,
    # ours
    "model": None, "weights": None, "random_weights": False, "tokenizer": None, "data": "pile", "text_column": "text",
    "per_document": False, "device": "auto", "json": False, "debug": False,
}  # fmt: skip
PLOT_ERROR = {
    "pattern_type": "regex", "num_ref": 50, "max_iters": 100, "reference": "rank=1024",
    # ours
    "plots_dir": None, "device": "auto", "json": False, "debug": False,
}  # fmt: skip
QUERY = {
    "k": 10, "metric": "dot", "influence": False, "layers": None, "block": None, "device": "auto", "json": False,
    "debug": False,
}  # fmt: skip


def invoke(*args: str) -> Any:
    return CliRunner().invoke(app, ["project", *args])


def good(*args: str) -> str:
    result = invoke(*args)
    assert result.exit_code == 0, result.output
    return str(result.stdout)


def full_grads(text: str, folder: Path) -> tuple[str, ...]:
    """Exact gradients of four samples."""
    samples = ("--data", text, "--max_samples", "4", "--train_dtype", "float32")
    return ("full-grads", *MODEL, *samples, "--output_dir", str(folder))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Twenty documents of 80 letters."""
    folder = tmp_path_factory.mktemp("text")
    letters = torch.randint(97, 123, (20, 80), generator=torch.Generator().manual_seed(0))
    for i, row in enumerate(letters.tolist()):
        (folder / f"{i:02}.txt").write_text("".join(map(chr, row)))
    return str(folder)


@pytest.fixture(scope="module")
def results(text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Projections of two ranks and exact gradients of the same samples."""
    folder = tmp_path_factory.mktemp("work") / "Results"
    for rank in ("16", "64"):
        good("run", *MODEL, "--data", text, "--max_samples", "6", "--results_dir", str(folder), "--proj_rank_total", rank,
             "--proj_rank_min", "2", "--proj_dtype", "float32")  # fmt: skip
    good(*full_grads(text, folder))
    return folder


@pytest.mark.parametrize(
    ("name", "defaults", "required"),
    [
        ("run", RUN, set()),
        ("full-grads", FULL_GRADS, set()),
        ("plot-error", PLOT_ERROR, {"results_dir", "results_pattern"}),
        ("query", QUERY, {"query", "base"}),
    ],
)
def test_flags_and_defaults(name: str, defaults: dict[str, Any], required: set[str]) -> None:
    command = typer.main.get_command(app).commands["project"].commands[name]  # type: ignore[attr-defined]
    options = {option.opts[0].removeprefix("--"): option for option in command.params}
    assert options.keys() == defaults.keys() | required
    assert {flag for flag, option in options.items() if option.required} == required
    for flag, default in defaults.items():
        assert options[flag].default == default, flag


# ---- good runs -------------------------------------------------------------------------------------------------------
def test_run_says_what_it_wrote(text: str, tmp_path: Path) -> None:
    folder = tmp_path / "projections"
    said = good("run", *MODEL, "--data", text, "--max_samples", "5", "--batch_size", "2", "--proj_rank_total", "16",
                "--proj-rank-min", "2", "--proj_save_interval", "2", "--output_dir", str(folder))  # fmt: skip
    metadata = json.loads((folder / "metadata.json").read_text())
    share, columns = metadata["coverage"]["share"], metadata["total_proj_dim"]
    assert f"{folder}: 5 samples, {columns:,} values each, of {share:.1%} of the parameters" in said
    assert "weights: random (seed 42)" in said
    assert "3 new files proj_iter_*.pt" in said
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    assert names == {
        "metadata.json", "run_config.json", "projection_stats.json", "shards", "proj_iter_000001.pt", "proj_iter_000002.pt",
        "proj_iter_000003.pt",
    }  # fmt: skip
    first = torch.load(folder / "proj_iter_000001.pt")
    assert (first["proj"].shape, first["proj"].dtype) == ((2, columns), torch.bfloat16)


def test_every_other_flag_of_run(text: str, tmp_path: Path) -> None:
    said = good("run", *MODEL, "--data", text, "--max_samples", "3", "--per_document", "--proj_layers", "mlp", "--seed", "1",
                "--proj_seed", "9", "--proj_dtype", "float16", "--proj_row_orthonormal", "--include_embeddings",
                "--proj_rank_total", "16", "--proj_rank_min", "4", "--proj_shape_rule", "aspect", "--no_export_pt",
                "--results_dir", str(tmp_path), "--verbose")  # fmt: skip
    (folder,) = tmp_path.iterdir()
    assert folder.name == "proj_layers_mlp_rank_total_16_rank_min_4_seed_9_dtype_float16_row_on_True_emb_True"
    assert not list(folder.glob("*.pt"))
    metadata = json.loads((folder / "metadata.json").read_text())
    assert (metadata["proj_row_orthonormal"], metadata["shape_rule"]) == (True, "aspect")
    for layer in metadata["layers"]:
        assert f"{layer['name']}: {layer['type']}" in said
        assert ".mlp." in layer["name"] or layer["type"] == "Embedding"
    config = json.loads((folder / "run_config.json").read_text())
    assert (config["data"]["seed"], config["data"]["per_document"]) == (1, True)
    sketched = good("run", *MODEL, "--data", text, "--max_samples", "3", "--proj_method", "rademacher", "--proj_sketch", "8",
                    "--proj_rank_total", "16", "--proj_rank_min", "2", "--include_biases", "--json", "--output_dir",
                    str(tmp_path / "sketched"))  # fmt: skip
    metadata = json.loads((tmp_path / "sketched" / "metadata.json").read_text())
    assert json.loads(sketched)["total_proj_dim"] == metadata["total_proj_dim"] == 16 * len(metadata["layers"])


def test_json_of_run_is_all_of_stdout(text: str, tmp_path: Path) -> None:
    found = json.loads(
        good("run", *MODEL, "--data", text, "--max_samples", "3", "--json", "--output_dir", str(tmp_path / "p"))
    )
    assert found.keys() >= {
        "output_dir",
        "samples_stored",
        "total_proj_dim",
        "coverage",
        "mean_loss",
        "tokens_per_second",
    }
    assert (found["samples_stored"], found["weights"]) == (3, "random (seed 42)")


def test_workers_share_a_folder(text: str, tmp_path: Path) -> None:
    arguments = (
        "run",
        *MODEL,
        "--data",
        text,
        "--max_samples",
        "6",
        "--workers",
        "2",
        "--output_dir",
        str(tmp_path / "p"),
    )
    assert "2 samples" in good(*arguments, "--worker", "1")
    assert "6 samples" in good(*arguments, "--worker", "0")
    assert len(list((tmp_path / "p").glob("proj_iter_*.pt"))) == 3


def test_full_grads(results: Path, text: str) -> None:
    folder = results / "fullgrads_seed_42_arch_tiny_dtype_float32"
    total = json.loads((folder / "fullgrad_meta.json").read_text())["total_param_dim"]
    assert sorted(path.name for path in folder.glob("*.pt")) == [f"fullgrad_iter_{i:06}.pt" for i in (1, 2, 3, 4)]
    first = torch.load(folder / "fullgrad_iter_000001.pt")
    assert (first["grad"].shape, first["grad"].dtype, first["iter"], first["batch_size"]) == (
        (total,),
        torch.float32,
        1,
        1,
    )
    again = full_grads(text, results)
    assert good(*again) == f"{folder}: 4 samples, {total:,} entries each\n"
    assert json.loads(good(*again, "--json")) == {
        "output_dir": str(folder), "written": 0, "samples": 4, "total_param_dim": total,
    }  # fmt: skip


@pytest.mark.parametrize("reference", ["full", "full_layers", "naive_proj_layers=32", "rank=64"])
def test_plot_error(results: Path, tmp_path: Path, reference: str) -> None:
    pytest.importorskip("matplotlib")
    arguments = ("plot-error", "--results_dir", str(results), "--results_pattern", "proj_layers_*_emb_False", "--pattern_type",
                 "glob", "--num_ref", "2", "--reference", reference, "--plots_dir", str(tmp_path))  # fmt: skip
    said = good(*arguments)
    assert f"reference {reference}, 2 samples against" in said
    ranks = [16] if reference == "rank=64" else [16, 64]
    found = json.loads(good(*arguments, "--json"))
    assert found["ranks"] == ranks
    endings = ("rmse_vs_dimension.pdf", "relative_error_vs_dimension.pdf", "error_analysis_loglog.pdf", "results.json")
    for ending in endings:
        (file,) = tmp_path.glob(f"*rank_total_ALL*__*{ending}")
        assert str(file) in said
    for rank, rmse, relative in zip(ranks, found["rmse_values"], found["relative_errors_percent"], strict=True):
        assert f"rank {rank}: rmse {rmse:.4g}, relative error {relative:.3g}%" in said


def test_query(results: Path) -> None:
    store = str(results / LAYERS.format(64))
    arguments = (
        "query",
        "--query",
        store,
        "--base",
        store,
        "--k",
        "2",
        "--metric",
        "cosine",
        "--device",
        "cpu",
        "--block",
        "4",
    )
    found = json.loads(good(*arguments, "--json"))
    assert [entry["query"] for entry in found] == [*range(6)]
    for entry in found:
        assert entry["nearest"][0] == {"id": entry["query"], "score": pytest.approx(1, abs=1e-5)}, (
            "itself is the nearest"
        )
        assert len(entry["nearest"]) == 2
    lines = good(*arguments).splitlines()
    assert [line.split(" ")[:2] for line in lines] == [[f"{i}:", f"{i}"] for i in range(6)]
    best = json.loads(good(*arguments, "--influence", "--layers", "mlp", "--json"))
    assert best["queries"] == 6
    assert len(best["influence"]) == 2
    assert best["influence"][0]["score"] >= best["influence"][1]["score"]
    assert good(*arguments, "--influence", "--layers", "mlp").startswith(f"{best['influence'][0]['id']}: ")


# ---- bad input -------------------------------------------------------------------------------------------------------
RUN_TINY, FULL_TINY = ("run", *MODEL), ("full-grads", *MODEL)
PLOT = ("plot-error", "--results_dir", ".", "--results_pattern", "x")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("run", "--architecture", "GPT5"), 1, "unknown architecture 'GPT5': expected one of GPT2-Small, GPT2-Medium, GPT2-Large."),
        (("run", "--model", "no_such", "--random_weights"), 1, "unknown shape 'no_such'"),
        (("run", "--random_weights", "--weights", "x"), 1, "give weights or random_weights, not both."),
        (("run", "--model", "./no/such/model"), 1, "Model folder './no/such/model' does not exist."),
        ((*RUN_TINY, "--proj_layers", "mpl"), 1, "Pattern 'mpl' matches no layer; this model has lm_head, model.layers.*.s"),
        ((*RUN_TINY, "--data", "absent.txt"), 1, "there is no file 'absent.txt'."),
        ((*RUN_TINY, "--data", "."), 1, "folder '.' holds no text: expected files of .txt, .md, .rst."),
        ((*RUN_TINY, "--data", "short.txt"), 1, "fewer than one block of 32: take a smaller block_size."),
        ((*RUN_TINY, "--block_size", "100000"), 1, "block_size is 100000, but tiny reads at most"),
        ((*RUN_TINY, "--block_size", "1"), 2, "--block_size"),
        ((*RUN_TINY, "--max_samples", "0"), 2, "--max_samples"),
        ((*RUN_TINY, "--model_dtype", "int8"), 2, "--model_dtype is float32, float16 or bfloat16, got 'int8'."),
        ((*RUN_TINY, "--proj_dtype", "int8"), 1, "Unknown dtype 'int8' for projections: expected one of float32"),
        ((*RUN_TINY, "--proj_method", "cauchy"), 1, "Unknown projection method 'cauchy': expected one of"),
        ((*RUN_TINY, "--proj_shape_rule", "round"), 1, "Unknown shape rule 'round': expected one of square, aspect."),
        ((*RUN_TINY, "--proj_sketch", "2"), 1, "sketch=2 gives 2^2 values, fewer than rank_total=256: nothing to fold."),
        ((*RUN_TINY, "--worker", "2", "--workers", "2"), 1, "worker must be below workers (2), got 2."),
        ((*RUN_TINY, "--cuda_graph"), 1, "cuda_graph needs a CUDA device, this is cpu."),
        ((*RUN_TINY, "--proj_rank", "8"), 2, "--proj_rank"),
        ((*FULL_TINY, "--batch_size", "2", "--max_samples", "1"), 2, "--batch_size must be 1: gradients are of single samples"),
        (FULL_TINY, 2, "--max_samples is needed: a file takes 4 bytes a parameter."),
        ((*FULL_TINY, "--max_samples", "1", "--train_dtype", "int8"), 2, "--train_dtype is float32, float16 or bfloat16"),
        (("plot-error", "--results_dir", "."), 2, "--results_pattern"),
        ((*PLOT, "--pattern_type", "sql"), 2, "--pattern_type is regex or glob, got 'sql'."),
        ((*PLOT, "--device", "cuda"), 2, "--device is auto or cpu, got 'cuda'."),
        (("plot-error", "--results_dir", "absent", "--results_pattern", "x"), 1, "absent"),
        ((*PLOT, "--reference", "half"), 1, "reference must be rank=NNN, full"),
        (("query", "--query", "absent", "--base", "absent"), 1, "absent"),
        (("query", "--query", "a", "--base", "b", "--metric", "l2"), 2, "--metric is dot or cosine, got 'l2'."),
    ],
    ids=lambda value: " ".join(value[-3:]) if isinstance(value, tuple) else "",
)  # fmt: skip
def test_bad_input_is_named_in_a_sentence(
    arguments: tuple[str, ...],
    code: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "work" / "empty").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work" / "empty")
    if "short.txt" in arguments:
        Path("short.txt").write_text("nothing much")
    if (
        "--random_weights" in arguments and "--data" not in arguments
    ):  # what is wrong must show before the network is asked
        Path("text.txt").write_text("a" * 400)
        arguments = (*arguments, "--data", "text.txt")
    result = invoke(*arguments)
    said = " ".join((result.output + capfd.readouterr().err).split())
    assert result.exit_code == code, said
    assert message in said
    assert said.count("Error: ") == 1
    assert "Traceback" not in said
    assert result.stdout == ""


def test_a_folder_of_other_settings_is_refused(text: str, tmp_path: Path) -> None:
    arguments = ("run", *MODEL, "--data", text, "--max_samples", "2", "--output_dir", str(tmp_path / "p"))
    good(*arguments)
    result = invoke(*arguments, "--proj_rank_total", "64")
    assert result.exit_code == 1
    assert "proj_rank_total" in result.output
    result = invoke(*arguments, "--batch_size", "1")
    assert result.exit_code == 1
    assert "other settings: batch_size is 2 there, 1 here." in result.output


def test_launch_script_hands_its_arguments_on() -> None:
    script = Path(__file__).resolve().parents[2] / "configs" / "train.sh"
    if not script.is_file():
        pytest.skip("no source tree")
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=60)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    helped = subprocess.run(
        [script, "--batch_size", "2", "--max_samples", "1000", "--help"],
        capture_output=True, text=True, timeout=60, check=True, env=environment,
    )  # fmt: skip
    assert "--proj_rank_total" in helped.stdout
    wrong = subprocess.run(
        [script, "--no_such"], capture_output=True, text=True, timeout=60, check=False, env=environment
    )
    assert wrong.returncode == 2
    assert "--no_such" in wrong.stderr


@pytest.mark.parametrize("wrong", [("--data", "absent.txt"), ("--proj_dtype", "int8")], ids=["data", "dtype"])
def test_no_model_is_built_for_nothing(wrong: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    from sparseopt.projection import sources

    monkeypatch.setattr(sources, "load", lambda **_: pytest.fail("a model was built"))
    result = CliRunner().invoke(app, ["project", *RUN_TINY, *wrong])
    assert result.exit_code == 1
    assert wrong[1] in result.output
