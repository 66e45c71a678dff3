"""DeltaLog: chains are bit-exact, survive kills and errors, and cost what they should."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import sparseopt as so
from sparseopt.deltas import _recording
from sparseopt.deltas.base import open_base
from sparseopt.deltas.delta import model_fingerprint
from sparseopt.deltas.reader import LogReader

DTYPES = [torch.bfloat16, torch.float32]


class Model(nn.Module):
    def __init__(self, dtype=torch.bfloat16, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(13, 8)
        self.attn = nn.Linear(8, 8)
        self.mlp = nn.Linear(8, 24)
        self.norm = nn.BatchNorm1d(8)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.turned = nn.Parameter(torch.randn(4, 6).t())
        self.head = nn.Linear(8, 13, bias=False)
        self.to(dtype)
        self.head.weight = self.embed.weight


def masks(model, density=0.2, seed=0):
    return so.MaskSet.random(model, density, seed=seed)


def train(model, opt=None, seed=0):
    """A step: of the optimizer, or a change of some entries of every tensor."""
    generator = torch.Generator().manual_seed(seed)
    if opt is not None:
        for param in model.parameters():
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        opt.step()
        return
    with torch.no_grad():
        for tensor in model.state_dict(keep_vars=True).values():
            moved = torch.rand(tensor.shape, generator=generator) < 0.3
            tensor.copy_(torch.where(moved, (tensor + 1).to(tensor.dtype), tensor))


def copied(model):
    """The state dict in memory of its own; tied tensors stay tied."""
    again = Model(model.attn.weight.dtype)
    again.load_state_dict(model.state_dict())
    return again


def same(one, other):
    return model_fingerprint(one) == model_fingerprint(other)  # by bits


def replay(path, step=None):
    """base + chain, applied delta by delta."""
    log, base = so.DeltaLog(path), open_base(path)
    model = Model(base.dtypes["attn.weight"])
    model.load_state_dict({name: base.tensor(name) for name in [*base.names, *base.tied]})
    for number in log.chain(step):
        log.load(number).apply_(model)
    return model


def check_stats(log, step, base, model):
    stats, before, after = log.stats(step), base.state_dict(), model.state_dict()
    norms = {}
    for name, _ in model.named_parameters():
        difference = after[name].double() - before[name].double()
        norms[name] = float(difference.norm())
        assert stats["parameters"][name]["l2_from_init"] == pytest.approx(norms[name], rel=1e-12)
        big = float((difference.abs() > stats["threshold"]).double().mean())
        assert stats["parameters"][name]["frac_big_from_init"] == pytest.approx(big, rel=1e-12)
    assert stats["parameters"].keys() == norms.keys()
    assert stats["mean_l2_from_init"] == pytest.approx(sum(norms.values()) / len(norms), rel=1e-12)
    for key in ("attn", "mlp"):
        chosen = [norm for name, norm in norms.items() if name.startswith(key)]
        assert stats[f"{key}_mean_l2"] == pytest.approx(sum(chosen) / len(chosen), rel=1e-12)
    fractions = [entry["frac_big_from_init"] for entry in stats["parameters"].values()]
    assert stats["mean_frac_big_from_init"] == pytest.approx(sum(fractions) / len(fractions), rel=1e-12)
    assert stats["mean_frac_big_from_init"] > 0


# ---- what is logged ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_chain_of_a_model_is_bit_exact_at_every_step(tmp_path, dtype):
    model = Model(dtype)
    base, states = copied(model), {}
    with so.DeltaLog(tmp_path) as log:
        log.start(model)
        for step in (1, 5, 7):
            train(model, seed=step)
            log.record(step, model)
            states[step] = copied(model)
            train(model, seed=100)  # goes on at once
    assert log.steps() == [1, 5, 7]
    assert [log.load(step).parent_step for step in log.steps()] == [None, 1, 5]
    for step, state in states.items():
        assert same(replay(tmp_path, step), state)
        check_stats(log, step, base, state)
    delta = log.load(7)
    assert delta.base_fingerprint == model_fingerprint(base)
    assert "head.weight" not in delta.names  # tied: once
    before = states[5].state_dict()
    for name in delta.names:  # only what changed
        old = before[name].reshape(-1)[delta.indices(name).long()]
        assert bool((old != delta.values(name)).all())
    assert log.stats(7)["changed"] == sum(
        delta.indices(name).numel() for name in delta.names if name in dict(model.named_parameters())
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("master_weights", [True, "fp32"])
def test_a_chain_of_an_optimizer_is_bit_exact_while_masks_change(tmp_path, dtype, master_weights):
    model = Model(dtype)
    base, states = copied(model), {}
    opt = so.SparseAdamW(model.named_parameters(), masks=masks(model), lr=0.05, master_weights=master_weights)
    with so.DeltaLog(tmp_path) as log:
        log.start(model)
        for step in range(1, 13):
            train(model, opt, seed=step)
            if step % 2 == 0:
                opt.update_masks(masks(model, 0.2, seed=step // 4))
            if step % 5 == 0:
                opt.export_delta(changed_only=True)  # somebody else's
            if step % 3 == 0:
                log.record(step, opt)
                states[step] = copied(model)
    for step, state in states.items():
        assert same(replay(tmp_path, step), state)
        check_stats(log, step, base, state)
    assert not same(states[12], base)


def test_masks_changed_before_the_first_record(tmp_path):
    model = Model()
    opt = so.SparseAdamW(model.named_parameters(), masks=masks(model), lr=0.05)
    with so.DeltaLog(tmp_path) as log:
        log.start(model)
        train(model, opt, seed=1)
        opt.update_masks(masks(model, 0.2, seed=9))
        train(model, opt, seed=2)
        log.record(2, opt)
    assert same(replay(tmp_path), model)
    full = sum(p.numel() for p in model.parameters())
    assert log.load(2).changed_parameters < full  # all was compared, what changed was logged


def test_model_and_optimizers_may_take_turns(tmp_path):
    model = Model(torch.float32)
    one = so.SparseAdamW(model.named_parameters(), masks=masks(model, 0.2, 1), lr=0.05)
    two = so.SparseAdamW(model.named_parameters(), masks=masks(model, 0.2, 2), lr=0.05)
    with so.DeltaLog(tmp_path) as log:
        log.start(model)
        for step, (opt, source) in enumerate(
            [(one, one), (two, two), (two, model), (None, model), (one, one), (one, two)], 1
        ):
            train(model, opt, seed=step)
            log.record(step, source)
            log.flush()
            assert same(replay(tmp_path), model), step


def test_an_optimizer_after_loading_under_adopted_masks(tmp_path):
    model = Model()
    opt = so.SparseAdamW(model.named_parameters(), masks=masks(model), lr=0.05)
    opt.adopt_masks = True
    with so.DeltaLog(tmp_path) as log:
        log.start(model)
        train(model, opt, seed=1)
        log.record(1, opt)
        state, kept = opt.state_dict(), copied(model)
        for step in (2, 3):
            opt.update_masks(masks(model, 0.2, seed=step))
            train(model, opt, seed=step)
            log.record(step, opt)
        log.flush()
        model.load_state_dict(kept.state_dict())
        opt.load_state_dict(state)
        train(model, opt, seed=4)
        log.record(4, opt)
    assert same(replay(tmp_path), model)


def test_bits_not_values_are_compared(tmp_path):
    model = Model(torch.float32)
    weight = model.mlp.weight.data.view(-1)
    weight[:4] = torch.tensor([0.0, 1.0, float("nan"), float("nan")])
    with so.DeltaLog(tmp_path) as log:
        log.start(model)
        weight[0] = -0.0
        weight.view(torch.int32)[3] ^= 1  # another NaN
        log.record(1, model)
        log.flush()
        assert log.load(1).indices("mlp.weight").tolist() == [0, 3]
        log.record(2, model)
    assert log.load(2).changed_parameters == 0
    assert same(replay(tmp_path), model)
    assert log.stats(1)["parameters"]["mlp.weight"]["l2_from_init"] is None  # JSON has no NaN
    assert log.stats(1)["mean_l2_from_init"] is None


def test_optimizer_records_hold_no_model(tmp_path, monkeypatch):
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256))
    opt = so.SparseAdamW(model.named_parameters(), masks=so.MaskSet.random(model, 0.02), lr=0.05)
    staged = []
    original = _recording.SparseTracker.stage
    monkeypatch.setattr(_recording.SparseTracker, "stage", lambda *a: (staged.append(s := original(*a)), s)[1])
    with so.DeltaLog(tmp_path) as log:
        log.start(model)
        for step in (1, 2):
            train(model, opt, seed=step)
            log.record(step, opt)
        log.flush()
        assert [sum(values.numel() for _, _, values in s.parts) for s in staged] == [opt.active_parameters] * 2
        known = log._tracker._known
        assert sum(t.numel() for entry in known.values() for t in entry) == 3 * opt.active_parameters
        assert not hasattr(log._tracker, "_last")
    assert log.load(2).changed_parameters <= opt.active_parameters


# ---- the thread --------------------------------------------------------------------------------------------------------
def test_one_record_at_a_time_is_on_its_way(tmp_path, monkeypatch):
    gate, most, running = threading.Semaphore(0), [0], [0]
    original = so.Delta.save

    def slow(self, path):
        running[0] += 1
        most[0] = max(most[0], running[0])
        gate.acquire(timeout=20)
        original(self, path)
        running[0] -= 1

    monkeypatch.setattr(so.Delta, "save", slow)
    model = Model()
    with so.DeltaLog(tmp_path) as log:
        log.start(model)
        train(model, seed=1)
        log.record(1, model)  # returns although nothing can be written
        assert log.pending
        assert log.steps() == []
        train(model, seed=2)
        second = threading.Thread(target=log.record, args=(2, model))
        second.start()
        time.sleep(0.2)
        assert second.is_alive()  # waits for the first
        gate.release()
        second.join(20)
        assert log.steps() == [1]
        gate.release()
    assert log.steps() == [1, 2]
    assert most == [1]
    assert same(replay(tmp_path), model)


@pytest.mark.parametrize("kind", ["model", "optimizer"])
def test_errors_of_the_thread_are_raised_once_and_cost_one_step_only(tmp_path, monkeypatch, kind):
    model = Model()
    opt = so.SparseAdamW(model.named_parameters(), masks=masks(model), lr=0.05) if kind == "optimizer" else None
    original = so.Delta.save

    def full_disk(self, path):
        original(self, path)  # even if the file had got its name already
        raise OSError(28, "No space left on device")

    with so.DeltaLog(tmp_path) as log:
        log.start(model)
        for step in range(1, 6):
            train(model, opt, seed=step)
            if opt is not None:
                opt.update_masks(masks(model, 0.2, seed=step))
            monkeypatch.setattr(so.Delta, "save", full_disk if step == 3 else original)
            if step == 4:
                with pytest.raises(OSError, match="No space left"):
                    log.record(step, opt or model)
            log.record(step, opt or model)
            while log.pending:
                time.sleep(0.005)
    assert log.steps() == [1, 2, 4, 5]
    assert log.chain() == [1, 2, 4, 5]
    assert same(replay(tmp_path), model)

    log = so.DeltaLog(tmp_path / "other")
    log.start(model)
    train(model, seed=9)
    monkeypatch.setattr(so.Delta, "save", full_disk)
    log.record(1, model)
    with pytest.raises(OSError, match="No space left"):
        log.close()
    log.close()
    assert log.steps() == []


# ---- resuming ----------------------------------------------------------------------------------------------------------
def write(path, model, opt=None, steps=(1, 2, 3, 4)):
    states = {}
    with so.DeltaLog(path) as log:
        log.start(model, name="org/model")
        for step in steps:
            train(model, opt, seed=step)
            log.record(step, opt or model)
            states[step] = copied(model)
    return states


@pytest.mark.parametrize("kind", ["model", "optimizer", "other masks"])
@pytest.mark.parametrize("resume", [3, 2])
def test_resuming_drops_later_steps_and_goes_on(tmp_path, kind, resume):
    model = Model()
    opt = so.SparseAdamW(model.named_parameters(), masks=masks(model), lr=0.05) if kind != "model" else None
    steps = (1, 2, 4, 6)  # 3 is a checkpoint between logged steps: the model is that of step 2 or one beyond it
    states = write(tmp_path, model, opt, steps)
    model = states[2]
    if resume == 3:
        train(model, seed=3) if opt is None else None
    if opt is not None:
        seed = 0 if kind == "optimizer" else 7
        opt = so.SparseAdamW(model.named_parameters(), masks=masks(model, 0.2, seed), lr=0.05)
    before = (tmp_path / "delta_step_2.safetensors").read_bytes()
    with so.DeltaLog(tmp_path) as log:
        log.start(model, name="org/model", resume_step=resume)
        assert log.steps() == [1, 2]
        assert sorted(tmp_path.glob("stats*")) == [tmp_path / f"stats_step_{step}.json" for step in (1, 2)]
        for step in (4, 5):
            train(model, opt, seed=step + 10)
            log.record(step, opt or model)
    assert log.chain() == [1, 2, 4, 5]
    assert log.load(4).parent_step == 2
    assert (tmp_path / "delta_step_2.safetensors").read_bytes() == before
    assert same(replay(tmp_path), model)
    check_stats(log, 5, Model(), model)


def test_existing_steps_need_a_decision(tmp_path):
    write(tmp_path, Model())
    log = so.DeltaLog(tmp_path)
    with pytest.raises(ValueError, match=r"steps up to 4 already"):
        log.start(Model())
    assert log.steps() == [1, 2, 3, 4]
    with log:
        log.start(Model(), resume_step=0)
        assert log.steps() == []
        log.record(1, Model())
    assert log.load(1).changed_parameters == 0


def test_resuming_what_is_not_there_or_is_another_model(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no delta log"):
        so.DeltaLog(tmp_path / "none").start(Model(), resume_step=3)
    write(tmp_path / "log", Model())
    with pytest.raises(ValueError, match=r"'org/model' \(fingerprint .*not of 'org/other'"):
        so.DeltaLog(tmp_path / "log").start(Model(), name="org/other", resume_step=3)
    with pytest.raises(ValueError, match="tensors differ"):
        so.DeltaLog(tmp_path / "log").start(Model(torch.float32), resume_step=3)
    with pytest.raises(ValueError, match=r"'org/model' \(fingerprint .*not of 'org/other' \(fingerprint "):
        so.DeltaLog(tmp_path / "log").start(Model(seed=1), name="org/other")
    assert so.DeltaLog(tmp_path / "log").steps() == [1, 2, 3, 4]


def test_leftovers_of_killed_writes_are_removed(tmp_path):
    write(tmp_path, Model(), steps=(1, 2))
    for name in (
        ".delta_step_3.safetensors.abc.tmp",
        ".stats_step_3.json.x.tmp",
        ".base.json.y.tmp",
        "stats_step_3.json",
    ):
        (tmp_path / name).write_text("half")
    (tmp_path / "notes.txt").write_text("mine")
    with so.DeltaLog(tmp_path) as log:
        log.start(replay(tmp_path), resume_step=2)
    kept = {"base.json", "base.safetensors", "notes.txt"}
    kept |= {
        f"{kind}_step_{step}.{end}" for step in (1, 2) for kind, end in (("delta", "safetensors"), ("stats", "json"))
    }
    assert {path.name for path in tmp_path.iterdir()} == kept


def test_a_gap_names_the_missing_step(tmp_path):
    write(tmp_path, Model())
    (tmp_path / "delta_step_3.safetensors").unlink()
    log = so.DeltaLog(tmp_path)
    with pytest.raises(ValueError, match=r"gap: step 4 follows step 3, not step 2; it has steps 1, 2, 4"):
        log.chain()
    assert log.chain(2) == [1, 2]
    with pytest.raises(ValueError, match="step 3"):
        log.start(Model(), resume_step=5)
    (tmp_path / "delta_step_1.safetensors").unlink()
    with pytest.raises(ValueError, match="gap: step 2 follows step 1, not the base; it has steps 2, 4"):
        log.chain(2)


def test_files_of_another_log_are_refused(tmp_path):
    write(tmp_path / "one", Model())
    write(tmp_path / "two", Model(seed=1))
    name = "delta_step_2.safetensors"
    os.replace(tmp_path / "two" / name, tmp_path / "one" / name)
    log = so.DeltaLog(tmp_path / "one")
    for read in (log.chain, lambda: log.load(2), LogReader(log).check):
        with pytest.raises(ValueError, match=r"another base .* than its log's, 'org/model' \(fingerprint "):
            read()
    os.replace(tmp_path / "two" / "delta_step_3.safetensors", tmp_path / "two" / name)
    with pytest.raises(so.FormatError, match="holds step 3"):
        so.DeltaLog(tmp_path / "two").load(2)
    (tmp_path / "one" / "base.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no base\.json"):
        log.start(Model())


# ---- using it wrongly --------------------------------------------------------------------------------------------------
def test_steps_grow(tmp_path):
    model = Model()
    with so.DeltaLog(tmp_path) as log:
        log.start(model)
        for bad in (0, -1, 1.5):
            with pytest.raises(ValueError, match="1 or more"):
                log.record(bad, model)
        log.record(5, model)
        for bad in (5, 4):
            with pytest.raises(ValueError, match="greater than 5"):
                log.record(bad, model)
        with pytest.raises(RuntimeError, match="started already"):
            log.start(model)
    assert log.steps() == [5]
    with pytest.raises(RuntimeError, match=r"between start\(\) and close\(\)"):
        log.record(6, model)


def test_what_does_not_fit_the_base_is_named(tmp_path):
    model = Model()
    with so.DeltaLog(tmp_path) as log:
        log.start(model)
        with pytest.raises(ValueError, match=r"'scale' is float32\[\] now, but bfloat16"):
            log.record(1, Model(torch.float32))
        with pytest.raises(ValueError, match="lacks 'scale'"):
            log.record(1, nn.Linear(2, 2))
        with pytest.raises(ValueError, match="'param_0'"):
            log.record(1, so.SparseAdamW(model.parameters()))
        state = model.state_dict()
        with pytest.raises(ValueError, match="has 'more'"):
            log.record(1, {**state, "more": torch.zeros(1)})
        log.record(1, state)
    assert log.steps() == [1]


def test_save_base_false_fails_at_the_start(tmp_path):
    with pytest.raises(ValueError, match="save_base=False"):
        so.DeltaLog(tmp_path / "log").start(Model(), save_base=False)
    assert not (tmp_path / "log").exists()


def test_reading_what_is_not_there(tmp_path):
    log = so.DeltaLog(tmp_path / "none")
    assert log.steps() == []
    with pytest.raises(ValueError, match="no step 3; it has none"):
        log.load(3)
    write(tmp_path, Model(), steps=(1, 2))
    log = so.DeltaLog(tmp_path)
    with pytest.raises(ValueError, match=r"no step 3; it has steps 1, 2\."):
        log.stats(3)
    (tmp_path / "stats_step_2.json").write_text("{")
    with pytest.raises(so.FormatError, match="stats_step_2"):
        log.stats(2)
    assert json.loads((tmp_path / "stats_step_1.json").read_text())["format"] == "sparseopt.delta_stats"
    assert math.isfinite(log.stats(1)["mean_l2_from_init"])


# ---- killed ------------------------------------------------------------------------------------------------------------
CHILD = """
import sys, torch
torch.set_num_threads(1)
sys.path.insert(0, {folder!r})
import sparseopt as so
from test_delta_log import Model, masks, train, copied, replay

path, use_optimizer = sys.argv[1], sys.argv[2] == "optimizer"
log = so.DeltaLog(path)
have = log.steps()
model = replay(path) if have else Model()
opt = so.SparseAdamW(model.named_parameters(), masks=masks(model), lr=0.05) if use_optimizer else None
step = have[-1] if have else 0
print("go", flush=True)
log.start(model, resume_step=step)
while True:
    step += 1
    train(model, opt, seed=step)
    log.record(step, opt or model)
"""


@pytest.mark.parametrize(
    ("kind", "times"),
    [("model", 2), *(pytest.param(kind, 10, marks=pytest.mark.slow) for kind in ("model", "optimizer"))],
)
def test_killed_at_random_moments_the_log_is_whole(tmp_path, kind, times):
    script, log = tmp_path / "child.py", tmp_path / "log"
    script.write_text(CHILD.format(folder=str(Path(__file__).parent)))
    chance, reached = random.Random(4), 0
    for _ in range(times):
        child = subprocess.Popen([sys.executable, str(script), str(log), kind], stdout=subprocess.PIPE, text=True)
        assert child.stdout.readline() == "go\n"
        time.sleep(chance.random())
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        child.stdout.close()
        steps = so.DeltaLog(log).chain() if (log / "base.json").exists() else []
        assert steps == list(range(1, len(steps) + 1))
        assert len(steps) >= reached
        reached = len(steps)
        for step in steps:
            assert so.DeltaLog(log).stats(step)["step"] == step
    assert reached > 0
    # What the chain says is what the same training gives without any kill.
    if kind == "model":
        model = Model()
        for step in range(1, reached + 1):
            train(model, seed=step)
        assert same(replay(log), model)
    with so.DeltaLog(log) as again:
        model = replay(log)
        again.start(model, resume_step=reached)
        assert not list(log.glob(".*"))
        train(model, seed=0)
        again.record(reached + 1, model)
    assert same(replay(log), model)
