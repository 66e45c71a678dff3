"""The error analysis: four references against sums written out, folders that must agree, files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparseopt import FormatError
from sparseopt.projection.errors import analyse, results_folder_name
from sparseopt.projection.full_gradients import folder_name, write_full_gradients
from sparseopt.projection.layers import metadata as layer_metadata
from sparseopt.projection.layers import project_gradient, select_layers
from sparseopt.projection.projector import GradientProjector
from sparseopt.projection.store import ProjectionStore

SAMPLES = 12
RANKS = (16, 64, 256)
GLOB = "proj_layers_mlp_*_emb_False"


class Model(nn.Module):
    """Two projected layers (one with a projected bias) and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(20, 24)
        self.mlp = nn.ModuleDict({"up": nn.Linear(24, 40), "down": nn.Linear(40, 24, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp["down"](torch.tanh(self.mlp["up"](torch.tanh(self.inside(x)))))


INPUTS = torch.randn(SAMPLES, 5, 20, generator=torch.Generator().manual_seed(3))


def loss_fn(model: nn.Module, sample: Any) -> Tensor:
    return model(sample["x"]).square().sum()


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(5)
    return Model()


def add_rank(results: Path, model: nn.Module, rank: int, **options: Any) -> Path:
    options = {"rank_min": 2, "dtype": "float32", "include_biases": True, **options}
    p = GradientProjector(model, layers="mlp", rank_total=rank, **options)
    with p:
        loss_fn(model, {"x": INPUTS}).backward()
    folder = results / results_folder_name(p.metadata)
    with ProjectionStore(folder, p.metadata, shard_rows=5) as store:
        store.write(range(SAMPLES), p.collect())
    return folder


@pytest.fixture(scope="module")
def built(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    results = tmp_path_factory.mktemp("analysis") / "Results"
    for rank in RANKS:
        add_rank(results, model, rank)
    samples = [{"x": x[None]} for x in INPUTS]
    write_full_gradients(
        model, samples, results / folder_name(42, "Tiny", "float32"), ids=range(SAMPLES), loss_fn=loss_fn
    )
    return results


@pytest.fixture
def results(built: Path, tmp_path: Path) -> Path:
    shutil.copytree(built, tmp_path / "Results")
    return tmp_path / "Results"


def exact(model: nn.Module, names: list[str]) -> Tensor:
    """float64 [n, entries]."""
    parameters = dict(model.named_parameters())
    rows = []
    for x in INPUTS:
        grads = torch.autograd.grad(loss_fn(model, {"x": x[None]}), [parameters[name] for name in names])
        rows.append(torch.cat([grad.flatten() for grad in grads]))
    return torch.stack(rows).double()


def stored(results: Path, rank: int) -> Tensor:
    (folder,) = results.glob(f"proj_layers_*rank_total_{rank}_*")
    return ProjectionStore(folder).rows(range(SAMPLES)).double()


def by_hand(rows: Tensor, reference: Tensor, references: int) -> tuple[float, float]:
    """(rmse, relative error in percent), pair by pair."""
    rmses, squares = [], []
    for i in range(references):
        others = [j for j in range(SAMPLES) if j != i]
        wrong = [float(rows[i] @ rows[j] - reference[i] @ reference[j]) for j in others]
        rmses.append((sum(e * e for e in wrong) / len(others)) ** 0.5)
        squares += [float(reference[i] @ reference[j]) ** 2 for j in others]
    rmse = sum(rmses) / references
    return rmse, 100 * rmse / (sum(squares) / len(squares)) ** 0.5


PROJECTED = ["mlp.up.weight", "mlp.up.bias", "mlp.down.weight"]


@pytest.mark.parametrize("num_ref", [1, 4, 50])
@pytest.mark.parametrize("reference", ["rank=256", "full", "full_layers", "naive_proj_layers=64"])
def test_every_reference_by_hand(results: Path, model: Model, reference: str, num_ref: int) -> None:
    result = analyse(results, GLOB, pattern_type="glob", num_ref=num_ref, reference=reference)
    wanted = {
        "rank=256": lambda: stored(results, 256),
        "full": lambda: exact(model, [name for name, _ in model.named_parameters()]),
        "full_layers": lambda: exact(model, PROJECTED),
        "naive_proj_layers=64": lambda: stored(results, 64),
    }[reference]()
    ranks = [16, 64] if reference == "rank=256" else [16, 64, 256]
    references = min(num_ref, SAMPLES)
    assert (result["ranks"], result["num_ref_samples"], result["num_test_samples"]) == (ranks, references, SAMPLES - 1)
    for i, rank in enumerate(ranks):
        rmse, relative = by_hand(stored(results, rank), wanted, references)
        small = 1e-5 * result["reference_rms"]  # the naive rows and the engine's agree to fp32
        assert result["rmse_values"][i] == pytest.approx(rmse, rel=1e-4, abs=small)
        assert result["relative_errors_percent"][i] == pytest.approx(relative, rel=1e-4, abs=1e-3)
    if reference == "naive_proj_layers=64":
        assert result["relative_errors_percent"][1] < 1e-3  # it is what the engine computed
    else:
        assert result["loglog_slope"] < 0


def test_files(results: Path) -> None:
    result = analyse(results, GLOB, pattern_type="glob", num_ref=3, reference="rank=256")
    stem = "proj_layers_mlp_rank_total_ALL_rank_min_2_seed_42_dtype_float32_row_on_False_emb_False__ref_rank_256"
    plots = results.parent / "Plots"
    kinds = ["error_analysis_loglog.pdf", "error_vs_dimension_results.json", "relative_error_vs_dimension.pdf",
             "rmse_vs_dimension.pdf"]  # fmt: skip
    assert sorted(path.name for path in plots.iterdir()) == [f"{stem}__{kind}" for kind in kinds]
    assert sorted(result["files"]) == [str(plots / f"{stem}__{kind}") for kind in kinds]
    assert json.loads((plots / f"{stem}__error_vs_dimension_results.json").read_text()) == result
    for path in plots.glob("*.pdf"):
        contents = path.read_bytes()
        assert contents.startswith(b"%PDF-")
        assert contents.rstrip().endswith(b"%%EOF")
    before = {path.name: path.read_bytes() for path in plots.iterdir()}
    analyse(results, GLOB, pattern_type="glob", num_ref=3, reference="rank=256")
    assert {path.name: path.read_bytes() for path in plots.iterdir()} == before
    assert analyse(results, GLOB, pattern_type="glob", reference="full", plots_dir=results / "P")["files"][
        0
    ].startswith(str(results / "P"))


def test_exported_files_give_the_same(results: Path) -> None:
    whole = analyse(results, GLOB, pattern_type="glob", num_ref=3, reference="full_layers")
    for folder in results.glob("proj_layers*"):
        ProjectionStore(folder).export_pt(results / "out", 5)
        shutil.rmtree(folder)
        (results / "out").rename(folder)
    again = analyse(results, GLOB, pattern_type="glob", num_ref=3, reference="full_layers")
    assert again == whole
    # max_iters counts files: one of five samples.
    few = analyse(results, GLOB, pattern_type="glob", num_ref=3, max_iters=1, reference="full_layers")
    assert few["num_test_samples"] == 4
    # Files of other tools have no sample ids: they are counted.
    for path in results.glob("proj_layers*/proj_iter_*.pt"):
        contents = torch.load(path)
        del contents["batch_idx"]
        torch.save(contents, path)
    assert analyse(results, GLOB, pattern_type="glob", num_ref=3, reference="full_layers") == whole


def test_iterations_of_a_store_are_batches(results: Path) -> None:
    assert analyse(results, GLOB, pattern_type="glob", max_iters=7, reference="rank=16")["num_test_samples"] == 6
    for folder in results.glob("proj_layers*"):
        (folder / "run_config.json").write_text('{"batch_size": 2, "block_size": 5}')
    assert analyse(results, GLOB, pattern_type="glob", max_iters=4, reference="rank=16")["num_test_samples"] == 7


def test_samples_are_matched_by_id(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (full,) = results.glob("fullgrads*")
    for i in (1, 6):
        (full / f"fullgrad_iter_{i:06d}.pt").unlink()
    result = analyse(results, GLOB, pattern_type="glob", num_ref=2, reference="naive_proj_layers=64")
    assert result["num_test_samples"] == SAMPLES - 3
    assert result["relative_errors_percent"][1] < 1e-3
    assert "Samples: 10 that every folder and the reference have, of 12." in capsys.readouterr().err


def test_regular_expressions(results: Path) -> None:
    one = analyse(results, r"^proj_layers_mlp_rank_total_\d+_rank_min_2_", reference="rank=64")
    assert one["ranks"] == [16, 256]
    # As documented, in a shell's single quotes.
    two = analyse(results, "^proj_layers_mlp_rank_total_\\\\d+_rank_min_2_", reference="rank=64")
    assert two["rmse_values"] == one["rmse_values"]
    # The reference's folder need not match.
    three = analyse(results, r"rank_total_(16|256)_", reference="rank=64")
    assert three["rmse_values"] == one["rmse_values"]


@pytest.mark.parametrize("method", ["gaussian", "rademacher", "row_orthonormal"])
def test_naive_reference_at_a_rank_nobody_projected_to(results: Path, model: Model, method: str) -> None:
    if method != "gaussian":
        shutil.rmtree(results)
        built = add_rank(results, model, 16, method=method), add_rank(results, model, 64, method=method)
        assert all(folder.is_dir() for folder in built)
        samples = [{"x": x[None]} for x in INPUTS]
        write_full_gradients(model, samples, results / "fullgrads", ids=range(SAMPLES), loss_fn=loss_fn)
    result = analyse(results, "proj_layers_*", pattern_type="glob", num_ref=2, reference="naive_proj_layers=144")
    layers = select_layers(model, "mlp", rank_total=144, rank_min=2, include_biases=True)
    described = layer_metadata(
        layers, patterns="mlp", rank_total=144, rank_min=2, seed=42, dtype="float32", kind=method,
        include_embeddings=False, include_biases=True, shape_rule="square", sketch=None, total_parameters=1,
    )  # fmt: skip
    rows = []
    for x in INPUTS:
        parameters = dict(model.named_parameters())
        grads = torch.autograd.grad(loss_fn(model, {"x": x[None]}), [parameters[name] for name in PROJECTED])
        by_name = dict(zip(["mlp.up", "mlp.up.bias", "mlp.down"], grads, strict=True))
        rows.append(
            torch.cat([project_gradient(described, x["name"], by_name[x["name"]]) for x in described["layers"]])
        )
    wanted = torch.stack(rows).double()
    assert wanted.shape[1] == described["total_proj_dim"]
    for i, rank in enumerate(result["ranks"]):
        assert result["rmse_values"][i] == pytest.approx(by_hand(stored(results, rank), wanted, 2)[0], rel=1e-4)


def test_naive_reference_with_a_sketch(results: Path, model: Model) -> None:
    folders = [add_rank(results, model, rank, sketch=12, seed=7) for rank in (16, 64)]
    assert all(folder.is_dir() for folder in folders)
    result = analyse(results, "seed_7_", num_ref=3, reference="naive_proj_layers=64")
    assert result["relative_errors_percent"][1] < 1e-3 < result["relative_errors_percent"][0]
    with pytest.raises(ValueError, match=r"no folder of rank 100 .* sketch 12"):
        analyse(results, "seed_7_", reference="naive_proj_layers=100")


# ---- refused ---------------------------------------------------------------------------------------------------------
def change_metadata(folder: Path, **changes: Any) -> None:
    path = folder / "metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_folders_that_differ_in_more(results: Path) -> None:
    (folder,) = results.glob("*rank_total_64_*")
    other = shutil.copytree(folder, results / folder.name.replace("seed_42", "seed_43"))
    with pytest.raises(ValueError, match="differ in more than rank_total; narrow the pattern"):
        analyse(results, GLOB, pattern_type="glob", reference="rank=64")
    shutil.rmtree(other)
    whole = (folder / "metadata.json").read_text()
    change_metadata(folder, proj_method="rademacher")
    with pytest.raises(ValueError, match="proj_method is 'gaussian' there and 'rademacher' here"):
        analyse(results, GLOB, pattern_type="glob", reference="rank=64")
    (folder / "metadata.json").write_text(whole)
    change_metadata(folder, proj_rank_total=65)
    with pytest.raises(ValueError, match="has rank 65 in its metadata"):
        analyse(results, GLOB, pattern_type="glob", reference="rank=64")
    (folder / "metadata.json").write_text(whole)
    for path, size in zip(sorted(results.glob("proj_layers*")), (8, 8, 9), strict=True):
        (path / "run_config.json").write_text(json.dumps({"block_size": size, "batch_size": size}))
    with pytest.raises(ValueError, match="block_size is 8 there and 9 here"):
        analyse(results, GLOB, pattern_type="glob", reference="rank=64")


def test_runs_on_other_samples(results: Path) -> None:
    runs = [{"data": {"path": "a.txt", "seed": 1, "max_samples": i}, "model": {"name": "m"}} for i in range(3)]
    for path, run in zip(sorted(results.glob("proj_layers*")), runs, strict=True):
        (path / "run_config.json").write_text(json.dumps(run))
    (full,) = results.glob("fullgrads*")
    whole = json.loads((full / "fullgrad_meta.json").read_text())
    for seed in (1, 2):
        about = {"data": {"path": "a.txt", "seed": seed, "max_samples": 12}, "model": {"name": "m", "dtype": "float32"}}
        (full / "fullgrad_meta.json").write_text(json.dumps({**whole, **about}))
        if seed == 1:
            analyse(results, GLOB, pattern_type="glob", reference="full")
            continue
        with pytest.raises(ValueError, match=r"are of other samples: data\.seed is 1 there and 2 here"):
            analyse(results, GLOB, pattern_type="glob", reference="full")
    run = {**runs[0], "model": {"name": "other"}}
    (next(results.glob("*_256_*")) / "run_config.json").write_text(json.dumps(run))
    with pytest.raises(ValueError, match=r"model\.name is 'm' there and 'other' here"):
        analyse(results, GLOB, pattern_type="glob", reference="rank=16")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reference": "rank=1024"}, r"no projections of the reference rank 1024; the ranks are 16, 64, 256"),
        ({"reference": "rank"}, "reference must be"),
        ({"reference": "rank=0"}, "reference must be"),
        ({"reference": "full=3"}, "reference must be"),
        ({"pattern": "nothing*"}, "no folder .* matches the glob 'nothing.*'; there are: fullgrads_seed_42"),
        ({"pattern": "*"}, "'fullgrads_.*' matches, but has no rank_total_K"),
        ({"pattern": "*rank_total_64_*", "reference": "rank=64"}, "only the reference of rank 64"),
        ({"pattern": "*mlp", "pattern_type": "regex"}, "not a regular expression .* glob"),
        ({"pattern_type": "shell"}, "pattern_type"),
        ({"num_ref": 0}, "num_ref"),
        ({"max_iters": 0}, "max_iters"),
        ({"max_iters": 1, "reference": "full"}, "1 samples in common"),
    ],
)
def test_wrong_arguments(results: Path, arguments: dict[str, Any], message: str) -> None:
    arguments = {"pattern": GLOB, "pattern_type": "glob", "reference": "rank=64", **arguments}
    with pytest.raises(ValueError, match=message):
        analyse(results, **arguments)
    assert not (results.parent / "Plots").exists()


def test_exact_gradients_that_are_missing_or_of_something_else(results: Path) -> None:
    (full,) = results.glob("fullgrads*")
    second = shutil.copytree(full, results / "fullgrads_2")
    with pytest.raises(ValueError, match="several folders of exact gradients"):
        analyse(results, GLOB, pattern_type="glob", reference="full")
    shutil.rmtree(second)
    whole = json.loads((full / "fullgrad_meta.json").read_text())
    slices = dict(whole["param_slices"])
    del slices["mlp.up.bias"]
    (full / "fullgrad_meta.json").write_text(json.dumps({**whole, "param_slices": slices}))
    with pytest.raises(ValueError, match=r"no gradient of the projected layer 'mlp\.up\.bias'"):
        analyse(results, GLOB, pattern_type="glob", reference="full_layers")
    slices = {**whole["param_slices"], "mlp.up.weight": {"start": 0, "end": 10}}
    (full / "fullgrad_meta.json").write_text(json.dumps({**whole, "param_slices": slices}))
    with pytest.raises(ValueError, match=r"10 gradients of 'mlp\.up', the projected layer has \[40, 24\]"):
        analyse(results, GLOB, pattern_type="glob", reference="naive_proj_layers=64")
    shutil.rmtree(full)
    with pytest.raises(FileNotFoundError, match=r"no folder fullgrads\*"):
        analyse(results, GLOB, pattern_type="glob", reference="full")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        analyse(results / "none", GLOB, reference="full")


def test_damaged_folders(results: Path) -> None:
    (folder,) = results.glob("*rank_total_64_*")
    (folder / "metadata.json").write_text("{")
    with pytest.raises(FormatError, match=r"metadata\.json' is damaged"):
        analyse(results, GLOB, pattern_type="glob", reference="rank=64")
    (folder / "metadata.json").unlink()
    with pytest.raises(FormatError, match="holds no projections"):
        analyse(results, GLOB, pattern_type="glob", reference="rank=64")
    (full,) = results.glob("fullgrads*")
    shutil.rmtree(folder)
    path = full / "fullgrad_iter_000004.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(FormatError, match=r"fullgrad_iter_000004\.pt"):
        analyse(results, GLOB, pattern_type="glob", reference="full")


def test_folder_names() -> None:
    metadata = {"proj_layers": "mlp, attn", "proj_rank_total": 256, "proj_rank_min": 4, "proj_seed": 9,
                "proj_dtype": "bfloat16", "proj_row_orthonormal": False, "include_embeddings": True}  # fmt: skip
    assert results_folder_name(metadata) == (
        "proj_layers_mlp,attn_rank_total_256_rank_min_4_seed_9_dtype_bfloat16_row_on_False_emb_True"
    )
