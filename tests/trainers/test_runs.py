"""``sparseopt train dpo|grpo|sft`` in every way (sparse, LoRA, dense) on a tiny model: outcomes, checkpoints, trackers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import sparseopt as so
from sparseopt import config, models, schemas
from sparseopt.trainers import dpo, grpo, sft

RUN = {"dpo": dpo.run, "grpo": grpo.run, "sft": sft.run}
WAYS: dict[str, dict[str, Any]] = {
    "sparse": {"mask.method": "gradient", "mask.batches": 2, "mask.sparsity": 0.9},
    "lora": {"lora.enabled": True, "lora.rank": 4},
    "dense": {},
}


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 rows that serve GRPO (prompt, answer) and SFT (prompt, completion)."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = []
    for i in range(24):
        a, b = (3 + (7 * i + k) % 50 for k in (1, 5))
        rows.append({"prompt": f"w{a} w{b}", "answer": f"w{b}", "completion": f" w{b} w{a}"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def reward_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rewards") / "ours.py"
    path.write_text("def w1(completions, **columns):\n    return [float(text.count('1')) for text in completions]\n")
    return path


@pytest.fixture
def make(tiny_folder: Path, pairs_file: Path, rows_file: Path, reward_file: Path, tmp_path: Path) -> Callable[..., Any]:
    """The configuration of a run of 4 steps."""

    def build(method: str, folder: Path, changes: dict[str, Any]) -> Any:
        values: dict[str, Any] = {
            "model.name": tiny_folder, "data.name": pairs_file if method == "dpo" else rows_file, "data.n_eval": 6,
            "optimizer.learning_rate": 0.01, "training.n_steps": 4, "training.batch_size": 2,
            "training.device": "cpu", "evaluation.max_new_tokens": 4, "output.dir": folder,
            "delta_log.dir": tmp_path / "log", "delta_log.save_base": "never", "mask.exclude": "[]",
        }  # fmt: skip
        own: dict[str, dict[str, Any]] = {
            "dpo": {"training.max_length": 32, "evaluation.n_generate": 3},
            "sft": {"training.max_length": 32, "evaluation.n_generate": 3},
            "grpo": {
                "training.num_generations": 4, "training.max_completion_length": 5,
                "rewards.functions": f"[{reward_file}:w1, answer]",
            },
        }  # fmt: skip
        merged = {**values, **own[method], **changes}
        text = [f"{key}={'null' if value is None else value}" for key, value in merged.items()]
        return config.load(schemas.METHODS[method], None, text)

    return build


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text(), parse_constant=pytest.fail)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in models.load_model(str(folder)).named_parameters()}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", RUN)
def test_every_method_in_every_way(
    method: str, way: str, tmp_path: Path, make: Callable[..., Any], tiny_folder: Path
) -> None:
    folder = RUN[method](make(method, tmp_path / "run", WAYS[way]))
    found, base = results(folder), weights(tiny_folder)
    total = sum(p.numel() for p in base.values())
    assert (found["method"], found["way"], found["steps"]) == (method, way, 4)
    files = {path.name for path in folder.iterdir()}
    assert {"report.md", "training.png", "metrics.jsonl", "timing_info.json", "config.json"} <= files
    assert not any(name.startswith((".", "checkpoint-")) for name in files), files
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [1, 2, 3, 4]
    timing = json.loads((folder / "timing_info.json").read_text())
    assert timing["timed_steps"] == 2
    assert 0 < timing["optimizer_seconds"]["median"] < timing["step_seconds"]["median"]

    if way == "sparse":
        masks, trained = so.MaskSet.load(folder / "mask.safetensors"), weights(folder / "model")
        assert masks.active_parameters == round(0.1 * total) == found["active_parameters"]
        for name, value in trained.items():
            assert not ((value != base[name]) & ~masks[name]).any(), name
        so.Delta.load(folder / "trained_entries.safetensors").apply_(base)
        assert all(torch.equal(value, base[name]) for name, value in trained.items())
    elif way == "lora":
        assert "mask.safetensors" not in files
        assert {"adapter_config.json", "adapter_model.safetensors"} <= {p.name for p in (folder / "adapter").iterdir()}
        assert found["total_parameters"] - found["active_parameters"] == total
    else:
        trained = weights(folder / "model")
        assert found["active_parameters"] == total
        assert sum(not torch.equal(value, base[name]) for name, value in trained.items()) > len(base) / 2
        assert found["optimizer_state_bytes"] >= 8 * total

    key = {"dpo": "margin", "grpo": "reward", "sft": "loss"}[method]
    page = (folder / "report.md").read_text()
    assert f"{found['after'][key]:.3f}" in page
    assert {"sparse": "Sparse", "lora": "LoRA", "dense": "Full"}[way] in page.splitlines()[0]
    if method == "sft":
        assert found["after"]["loss"] != found["before"]["loss"]
    if method == "grpo":
        assert set(found["after"]["rewards"]) == {"w1", "answer"}
        assert (folder / "completions.jsonl").is_file()
        assert "## Sampled completions" in page
        assert all("reward" in entry for entry in entries)


@pytest.mark.parametrize("way", WAYS)
def test_sft_learns_the_rows_it_sees(way: str, tmp_path: Path, make: Callable[..., Any]) -> None:
    folder = sft.run(make("sft", tmp_path / "run", {**WAYS[way], "data.n_train": 2, "training.n_steps": 8}))
    losses = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize(("method", "way"), [("dpo", "dense"), ("dpo", "lora"), ("grpo", "sparse"), ("grpo", "dense"),
                                             ("sft", "sparse")])  # fmt: skip
def test_resumed_runs_end_with_the_same_weights(
    method: str, way: str, tmp_path: Path, make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparseopt.trainers import run as engine

    changes = {**WAYS[way], "training.save_steps": 2, "delta_log.schedule": "none"}
    if method == "grpo" and way == "sparse":
        changes["training.beta"] = 0.1
    straight = RUN[method](make(method, tmp_path / "straight", changes))

    class Stop(engine.MetricsFile):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(engine, "MetricsFile", Stop)
        with pytest.raises(RuntimeError, match="power cut"):
            RUN[method](make(method, tmp_path / "cut", changes))
    resumed = RUN[method](make(method, tmp_path / "cut", {**changes, "training.resume": True}))
    name = "adapter/adapter_model.safetensors" if way == "lora" else "model/model.safetensors"
    assert (resumed / name).read_bytes() == (straight / name).read_bytes()
    assert results(resumed)["after"] == results(straight)["after"]


def test_delta_log_of_a_full_training_rebuilds_its_model(
    tmp_path: Path, make: Callable[..., Any], tiny_folder: Path
) -> None:
    folder = dpo.run(make("dpo", tmp_path / "run", {"delta_log.schedule": "1:4:1"}))
    log = so.DeltaLog(tmp_path / "log")
    assert log.steps() == [1, 2, 3, 4]
    rebuilt, trained = so.reconstruct(None, log, 4), weights(folder / "model")
    for name, value in trained.items():
        assert torch.equal(rebuilt[name], value), name
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert any("subnet/mean_l2_from_init" in entry for entry in entries)


def test_delta_log_under_a_mask_holds_active_entries_only(tmp_path: Path, make: Callable[..., Any]) -> None:
    folder = grpo.run(make("grpo", tmp_path / "run", {**WAYS["sparse"], "delta_log.schedule": "2,4"}))
    log, masks = so.DeltaLog(tmp_path / "log"), so.MaskSet.load(folder / "mask.safetensors")
    assert log.steps() == [2, 4]
    assert log.load(4).changed_parameters <= masks.active_parameters
    rebuilt = so.reconstruct(None, log, 4)
    for name, value in weights(folder / "model").items():
        assert torch.equal(rebuilt[name], value), name


def test_training_goes_on_from_a_checkpoint_of_every_kind(
    tmp_path: Path, make: Callable[..., Any], tiny_folder: Path
) -> None:
    changes = {**WAYS["sparse"], "output.save_model": False, "training.save_steps": 2, "training.keep_checkpoints": 1}
    first = dpo.run(make("dpo", tmp_path / "first", changes))
    assert [path.name for path in first.glob("checkpoint-*")] == ["checkpoint-4"] or [
        path.name for path in first.glob("checkpoint-*")
    ] == ["checkpoint-2"]
    base = weights(tiny_folder)
    so.Delta.load(first / "trained_entries.safetensors").apply_(base)
    second = make("dpo", tmp_path / "second", {"model.checkpoint": first})
    from sparseopt.trainers.policy import load_policy

    loaded = load_policy(second, torch.device("cpu"))
    for name, param in loaded.named_parameters():
        assert torch.equal(param, base[name]), name
    kept = next(first.glob("checkpoint-*"))
    from_trainer = load_policy(make("dpo", tmp_path / "x", {"model.checkpoint": kept}), torch.device("cpu"))
    assert any(not torch.equal(p, weights(tiny_folder)[n]) for n, p in from_trainer.named_parameters())
    for wrong, text in ((tmp_path / "none", "does not exist"), (tmp_path, "holds no weights")):
        with pytest.raises(FileNotFoundError, match=text):
            dpo.run(make("dpo", tmp_path / "y", {"model.checkpoint": wrong}))
        assert not (tmp_path / "y").exists()


def test_mlp_only_trains_mlp_entries_of_a_mask(tmp_path: Path, make: Callable[..., Any], tiny_folder: Path) -> None:
    masks = so.MaskSet.random(models.load_model(str(tiny_folder)), 0.1, seed=0)
    masks.save(tmp_path / "mask.safetensors")
    changes = {"mask.path": tmp_path / "mask.safetensors", "mask.mlp_only": True, "training.n_steps": 2}
    folder = grpo.run(make("grpo", tmp_path / "run", changes))
    kept = so.MaskSet.load(folder / "mask.safetensors")
    for name in masks.names:
        assert kept.count(name) == (masks.count(name) if ".mlp." in name else 0), name
    with pytest.raises(ValueError, match="mlp_only restricts a mask"):
        grpo.run(make("grpo", tmp_path / "x", {"mask.mlp_only": True}))


def test_wandb_offline_gets_project_and_keys(
    tmp_path: Path, make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    from transformers import TrainerCallback

    from sparseopt.trainers import run as engine

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    seen: dict[str, Any] = {}

    class Look(engine.StepTimer):
        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            super().on_train_end(*args, **kwargs)
            seen.update(project=wandb.run.project, name=wandb.run.name, summary=dict(wandb.run.summary))

    assert issubclass(Look, TrainerCallback)
    monkeypatch.setattr(engine, "StepTimer", Look)
    changes = {"tracking.report_to": "[wandb]", "tracking.run_name": "first", "delta_log.schedule": "1,2,3,4"}
    folder = dpo.run(make("dpo", tmp_path / "run", changes))
    assert seen["project"] == "tiny_llama-dpo-subnetwork-emergence"
    assert seen["name"] == "first"
    assert {"train/loss", "train/rewards/margins"} <= seen["summary"].keys()
    wanted = {"mean_l2_from_init", "mean_frac_big_from_init", "attn_mean_l2", "mlp_mean_l2"}
    assert {f"train/subnet/{key}" for key in wanted} <= seen["summary"].keys() or {
        f"subnet/{key}" for key in wanted
    } <= seen["summary"].keys()
    assert wandb.run is None, "the run is finished"
    assert list((folder / "wandb").glob("offline-run-*"))


def test_completions_reach_the_tracker_and_not_stdout(
    tmp_path: Path, make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """stdout is for the command's result; TRL would print a table there at every logged step."""
    wandb = pytest.importorskip("wandb")
    pd = pytest.importorskip("pandas")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    tables: list[Any] = []
    monkeypatch.setattr(wandb, "Table", lambda dataframe: tables.append(dataframe) or "table")
    changes = {"tracking.report_to": "[wandb]", "training.n_steps": 2}
    folder = grpo.run(make("grpo", tmp_path / "run", changes))
    assert capfd.readouterr().out == ""
    assert [len(table) for table in tables][:2] == [8, 8]  # 2 prompts of 4 completions
    assert {"step", "prompt", "completion", "w1", "answer", "advantage"} <= set(tables[0].columns)
    stored = pd.read_parquet(folder / "completions" / "completions_00001.parquet")
    assert stored["completion"].tolist() == tables[0]["completion"].tolist()


def test_rewards_may_be_coroutines(tmp_path: Path, make: Callable[..., Any], reward_file: Path) -> None:
    """In training and in the evaluation: the same run as with the function that they wait for, side by side."""
    later = tmp_path / "later.py"
    later.write_text(
        "import asyncio\n"
        "barriers = {}\n"
        "async def meet():\n"
        "    barrier = barriers.setdefault(asyncio.get_running_loop(), asyncio.Barrier(2))\n"
        "    await asyncio.wait_for(barrier.wait(), 20)\n"
        "async def w1(completions, **columns):\n"
        "    await meet()\n"
        "    return [float(text.count('1')) for text in completions]\n"
        "async def none(completions, **columns):\n"
        "    await meet()\n"
        "    return [None] * len(completions)\n"
    )
    changes = {"training.n_steps": 2, "delta_log.schedule": "none"}
    plain = grpo.run(make("grpo", tmp_path / "plain", {**changes, "rewards.functions": f"[{reward_file}:w1]"}))
    functions = f"[{later}:w1, {later}:none]"
    waited = grpo.run(make("grpo", tmp_path / "waited", {**changes, "rewards.functions": functions}))
    for when in ("before", "after"):
        mine, theirs = results(waited)[when], results(plain)[when]
        assert mine["reward"] == theirs["reward"]
        assert mine["rewards"] == {"w1": theirs["rewards"]["w1"], "none": 0.0}
    trained = weights(waited / "model")
    assert all(torch.equal(trained[name], value) for name, value in weights(plain / "model").items())


def test_tensorboard_events_are_in_the_run_folder(tmp_path: Path, make: Callable[..., Any]) -> None:
    pytest.importorskip("tensorboard")
    folder = sft.run(make("sft", tmp_path / "run", {"tracking.report_to": "[tensorboard]", "training.n_steps": 2}))
    assert list((folder / "tensorboard").rglob("events.out.*"))


@pytest.mark.parametrize(
    ("method", "changes", "text"),
    [
        ("grpo", {"rewards.functions": "[nope]"}, "nope"),
        ("grpo", {"training.num_generations": 1}, r"num_generations must be at least 2, got 1"),
        ("dpo", {"lora.enabled": True, "mask.method": "random"}, "LoRA trains an adapter"),
        ("dpo", {"lora.enabled": True, "delta_log.schedule": "10"}, "no delta to log"),
        ("dpo", {"delta_log.schedule": "10:x"}, "10:x"),
        ("dpo", {"tracking.report_to": "[mlflow]"}, "mlflow"),
        ("sft", {"lora.rank": 0, "lora.enabled": True}, r"lora\.rank must be at least 1"),
    ],
)
def test_errors_come_first(
    method: str, changes: dict[str, Any], text: str, tmp_path: Path, make: Callable[..., Any]
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=text):
        RUN[method](make(method, tmp_path / "run", changes))
    assert not (tmp_path / "run").exists()


def test_rewards_that_never_differ_cannot_choose_a_mask(tmp_path: Path, make: Callable[..., Any]) -> None:
    flat = tmp_path / "flat.py"
    flat.write_text("def zero(completions, **columns):\n    return [0.0] * len(completions)\n")
    changes = {**WAYS["sparse"], "rewards.functions": f"[{flat}:zero]"}
    with pytest.raises(ValueError, match="no group of completions had different rewards"):
        grpo.run(make("grpo", tmp_path / "run", changes))


def test_embedding_and_head_are_left_out_by_default(
    tmp_path: Path, make: Callable[..., Any], tiny_folder: Path
) -> None:
    changes = {**WAYS["sparse"], "mask.exclude": None, "training.n_steps": 1}
    masks = so.MaskSet.load(sft.run(make("sft", tmp_path / "run", changes)) / "mask.safetensors")
    base = weights(tiny_folder)
    rest = sum(p.numel() for name, p in base.items() if name != "model.embed_tokens.weight")
    assert masks.count("model.embed_tokens.weight") == 0
    assert masks.active_parameters == round(0.1 * rest)
