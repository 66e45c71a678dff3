"""Weight patches: combined deltas, patched model folders, the command, and a live process brought up to date."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file
from torch import Tensor
from typer.testing import CliRunner

import sparseopt as so
from sparseopt.deltas.delta import model_fingerprint
from sparseopt.deltas.patch import RECORD, apply_to_folder, between, combine, patch_bytes

State = dict[str, Tensor]
SHAPES = {"embed_tokens.weight": (16, 8), "layer.weight": (8, 8), "layer.bias": (8,)}


class Log:
    """Deltas in memory."""

    def __init__(self, deltas: list[so.Delta]) -> None:
        self.deltas = {delta.step: delta for delta in deltas}

    def steps(self) -> list[int]:
        return list(self.deltas)

    def load(self, step: int) -> so.Delta:
        return self.deltas[step]


def changes(before: State, after: State, **chain: Any) -> so.Delta:
    entries, shapes = {}, {}
    for name, old in before.items():
        indices = (old != after[name]).view(-1).nonzero().view(-1)
        if indices.numel():
            entries[name], shapes[name] = (indices, after[name].view(-1)[indices]), old.shape
    return so.Delta.from_dict(entries, shapes, **chain)


def history(count: int = 4, dtype: torch.dtype = torch.bfloat16) -> tuple[list[State], list[so.Delta]]:
    """States of steps 0, 10, 20, ... and the deltas between them; entries come back to earlier values now and then."""
    states = [{name: torch.randn(shape).to(dtype) for name, shape in SHAPES.items()}]
    base = model_fingerprint(states[0])
    deltas = []
    for i in range(count):
        new = {name: tensor.clone() for name, tensor in states[-1].items()}
        for name, tensor in new.items():
            chosen = torch.rand(tensor.shape) < 0.3
            tensor[chosen] = (states[0][name] if i % 2 else torch.randn(tensor.shape).to(dtype))[chosen]
        states.append(new)
        deltas.append(changes(*states[-2:], step=10 * (i + 1), parent_step=10 * i or None, base_fingerprint=base))
    return states, deltas


def same(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n].view(torch.uint8), b[n].view(torch.uint8)) for n in a)


# ---- combining -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("start", "stop"), [(0, 4), (1, 3), (2, 3), (0, 1)])
def test_a_combined_delta_does_what_its_parts_do(start: int, stop: int) -> None:
    states, deltas = history()
    patch = combine(deltas[start:stop])
    assert (patch.step, patch.parent_step) == (10 * stop, 10 * start or None)
    target = {name: tensor.clone() for name, tensor in states[start].items()}
    patch.apply_(target)
    assert same(target, states[stop])
    assert patch.changed_parameters <= sum(delta.changed_parameters for delta in deltas[start:stop])
    assert between(Log(deltas), 10 * start, 10 * stop) == patch


def test_the_last_value_wins_and_every_entry_is_there_once() -> None:
    def delta(step: int, indices: list[int], values: list[float]) -> so.Delta:
        entry = (torch.tensor(indices), torch.tensor(values))
        return so.Delta.from_dict({"w": entry}, {"w": (9,)}, step=step, parent_step=step - 1)

    patch = combine([delta(1, [0, 4, 8], [1, 1, 1]), delta(2, [1, 4], [2, 2]), delta(3, [4, 8], [3, 3])])
    assert patch.indices("w").tolist() == [0, 1, 4, 8]
    assert patch.values("w").tolist() == [1, 2, 3, 3]


def test_chains_that_do_not_hold() -> None:
    _, deltas = history()
    with pytest.raises(ValueError, match="no deltas"):
        combine([])
    with pytest.raises(ValueError, match="step 30 follows step 20, not step 10: there is a gap"):
        combine([deltas[0], deltas[2]])
    with pytest.raises(ValueError, match="follows the base, not step 10"):
        combine([deltas[0], deltas[0]])
    other = so.Delta.from_dict({}, {}, step=20, parent_step=10, base_fingerprint="other")
    with pytest.raises(ValueError, match="steps 10 and 20 are of different bases"):
        combine([deltas[0], other])
    entry = {"layer.bias": (torch.tensor([0]), torch.tensor([1.0]))}
    wider = so.Delta.from_dict(
        entry, {"layer.bias": (8,)}, step=20, parent_step=10, base_fingerprint=deltas[0].base_fingerprint
    )
    with pytest.raises(ValueError, match=r"'layer\.bias' is torch\.bfloat16\[8\] before step 20 and torch\.float32"):
        combine([deltas[0], wider])


@pytest.mark.parametrize(
    ("start", "stop", "message"),
    [
        (5, 20, "step 5 is not in the delta log: its steps are 10, 20, 30, 40"),
        (10, 25, "step 25 is not"),
        (20, 20, "from 20 to 20"),
        (30, 10, "from 30 to 10"),
    ],
)
def test_steps_that_were_not_logged(start: int, stop: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        between(Log(history()[1]), start, stop)


def test_a_gap_at_the_start() -> None:
    with pytest.raises(ValueError, match="step 20 follows step 10, not the base: there is a gap"):
        between(Log(history()[1][1:]), 0, 20)


# ---- engines ---------------------------------------------------------------------------------------------------------
def test_weight_patches_as_an_engine_applies_them() -> None:
    """Plain torch, flat int32 indices, no sparseopt on that side."""
    states, deltas = history()
    engine = {name: tensor.clone() for name, tensor in states[1].items()}
    for name, indices, values, shape in combine(deltas[1:]).to_weight_patches():
        assert indices.dtype == torch.int32
        flat = engine[name].view(-1)
        assert flat.numel() == math.prod(shape)
        flat[indices] = values
    assert same(engine, states[4])


# ---- folders ---------------------------------------------------------------------------------------------------------
def write_folder(folder: Path, state: State, *, shards: bool = False) -> Path:
    folder.mkdir()
    if shards:
        names = list(state)
        parts = {"model-00001-of-00002.safetensors": names[:1], "model-00002-of-00002.safetensors": names[1:]}
        for file, part in parts.items():
            save_file({name: state[name] for name in part}, folder / file, {"format": "pt"})
        weight_map = {name: file for file, part in parts.items() for name in part}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    else:
        save_file(state, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.model").write_bytes(b"tokens")
    (folder / "optimizer.pt").write_bytes(b"large")
    (folder / "trainer_state.json").write_text("{}")
    return folder


def read_folder(folder: Path) -> State:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("shards", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize("piece", [1 << 22, 7], ids=["whole", "pieces"])
def test_patched_folders(tmp_path: Path, shards: bool, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparseopt.deltas.patch.PIECE", piece)
    states, deltas = history()
    source = write_folder(tmp_path / "base", states[0], shards=shards)
    first = apply_to_folder(deltas[0], source, tmp_path / "a" / "step_10")
    assert same(read_folder(tmp_path / "a" / "step_10"), states[1])
    assert same(read_folder(source), states[0])
    assert first["changed_parameters"] == deltas[0].changed_parameters
    assert first["bf16_bytes"] == 2 * (128 + 64 + 8)
    assert first["patch_bytes"] == 6 * deltas[0].changed_parameters == patch_bytes(deltas[0])
    assert first["checkpoint_bytes"] == sum(f.stat().st_size for f in source.glob("*.safetensors"))

    (tmp_path / "later").mkdir()
    apply_to_folder(combine(deltas[1:]), tmp_path / "a" / "step_10", tmp_path / "later")
    assert same(read_folder(tmp_path / "later"), states[4])
    kept = {file.name for file in (tmp_path / "later").iterdir()}
    assert {"config.json", "tokenizer.model", RECORD} <= kept
    assert not {"optimizer.pt", "trainer_state.json"} & kept
    assert ("model.safetensors.index.json" in kept) == shards
    with safe_open(next((tmp_path / "later").glob("*.safetensors")), framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_tied_output_layer_is_no_other_base(tmp_path: Path) -> None:
    state = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    base = model_fingerprint({**state, "lm_head.weight": state["embed_tokens.weight"]})
    source = write_folder(tmp_path / "base", state)
    entries = {"layer.bias": (torch.tensor([1]), torch.tensor([7.0]))}
    patch = so.Delta.from_dict(entries, {"layer.bias": (8,)}, step=1, base_fingerprint=base)
    apply_to_folder(patch, source, tmp_path / "out")
    assert read_folder(tmp_path / "out")["layer.bias"][1] == 7


def test_patches_that_do_not_fit(tmp_path: Path) -> None:
    states, deltas = history()
    source = write_folder(tmp_path / "base", states[0])
    output = tmp_path / "out"

    def refused(message: str, patch: so.Delta, folder: Path = source, kind: type[Exception] = ValueError) -> None:
        with pytest.raises(kind, match=message):
            apply_to_folder(patch, folder, output)
        assert not output.exists()
        assert not list(tmp_path.glob(".out*"))

    def delta(name: str, values: Tensor, shape: tuple[int, ...]) -> so.Delta:
        return so.Delta.from_dict({name: (torch.tensor([0]), values)}, {name: shape})

    one = torch.ones(1, dtype=torch.bfloat16)
    refused(r"has no parameter 'head\.weight'", delta("head.weight", one, (8,)))
    refused(
        r"'layer\.bias' of .* must be torch\.float32\[8\], got torch\.bfloat16\[8\]",
        delta("layer.bias", one.float(), (8,)),
    )
    refused(r"'layer\.bias' of .* must be torch\.bfloat16\[2, 4\]", delta("layer.bias", one, (2, 4)))
    refused("no model folder", deltas[0], tmp_path / "absent", FileNotFoundError)
    (tmp_path / "empty").mkdir()
    refused("holds no safetensors weights", deltas[0], tmp_path / "empty", FileNotFoundError)
    refused("another base model", deltas[0], write_folder(tmp_path / "other", states[1]))
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes()[:-1])
    refused("damaged or truncated", deltas[0], tmp_path / "cut", so.FormatError)

    apply_to_folder(deltas[0], source, tmp_path / "step_10")
    refused("the patch to step 30 is for step 20, but .* is at step 10", deltas[2], tmp_path / "step_10")
    with pytest.raises(ValueError, match="exists and is not empty"):
        apply_to_folder(deltas[0], source, tmp_path / "step_10")
    apply_to_folder(deltas[0], tmp_path / "other", output, check_base=False)


# ---- the command -----------------------------------------------------------------------------------------------------
def command(*args: object) -> Any:
    from sparseopt.cli import deltas_patch
    from sparseopt.cli._command import Command, group

    app = group("deltas", help="x")
    app.callback()(lambda: None)
    app.command("patch", cls=Command, epilog=deltas_patch.EXAMPLE)(deltas_patch.patch)
    return CliRunner().invoke(app, ["patch", *map(str, args)])


def test_the_command_applies_a_patch(tmp_path: Path) -> None:
    states, deltas = history()
    source = write_folder(tmp_path / "base", states[0])
    deltas[0].save(tmp_path / "p.safetensors")
    args = ("--patch", tmp_path / "p.safetensors", "--model-dir", source, "--output_dir")
    done = command(*args, tmp_path / "out", "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["changed_parameters"] == deltas[0].changed_parameters
    assert result["patch_bytes"] == (tmp_path / "p.safetensors").stat().st_size
    assert same(read_folder(tmp_path / "out"), states[1])
    spoken = command(*args, tmp_path / "again")
    share = result["patch_bytes"] / result["bf16_bytes"]
    assert f"{share:.2%} of the model in bf16 (400 bytes)" in spoken.stdout
    refused = command(*args, tmp_path / "again")
    assert refused.exit_code == 1
    assert "is not empty" in refused.output


def test_the_command_makes_a_patch_from_a_delta_log(tmp_path: Path) -> None:
    from sparseopt.deltas.log import DeltaLog

    states, _ = history(dtype=torch.float32)
    with DeltaLog(tmp_path / "log") as log:
        log.start(states[0])
        for step, state in ((10, states[1]), (20, states[2]), (30, states[3])):
            log.record(step, state)
    output = tmp_path / "patch.safetensors"
    args = ("--delta_log_dir", tmp_path / "log", "--output", output, "--json")
    done = command(*args, "--from-step", 10, "--to-step", 30)
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["bf16_bytes"] == 2 * (128 + 64 + 8)
    assert result["patch_bytes"] == output.stat().st_size
    patch = so.Delta.load(output)
    assert (patch.parent_step, patch.step) == (10, 30)
    target = {name: tensor.clone() for name, tensor in states[1].items()}
    patch.apply_(target)
    assert same(target, states[3])

    folder = write_folder(tmp_path / "base", states[0])
    assert command(*args, "--to_step", 20).exit_code == 0
    assert command("--patch", output, "--model_dir", folder, "--output_dir", tmp_path / "out").exit_code == 0
    assert same(read_folder(tmp_path / "out"), states[2])

    missing = command(*args, "--to_step", 25)
    assert missing.exit_code == 1
    assert "step 25 is not in the delta log: its steps are 10, 20, 30" in missing.output
    (tmp_path / "log" / "delta_step_20.safetensors").unlink()
    gap = command(*args, "--to_step", 30)
    assert gap.exit_code == 1
    assert "gap" in gap.output
    assert command("--delta_log_dir", tmp_path / "none", "--output", output, "--to_step", 1).exit_code == 1


@pytest.mark.parametrize(
    "args",
    [
        (),
        ("--patch", "p.safetensors"),
        ("--delta_log_dir", "log", "--to_step", 3),
        ("--patch", "p", "--model_dir", "m", "--output_dir", "o", "--output", "x.safetensors"),
        ("--delta_log_dir", "log", "--to_step", 3, "--output", "x.pt"),
    ],
)
def test_bad_usage_of_the_command(args: tuple[object, ...]) -> None:
    assert command(*args).exit_code == 2
