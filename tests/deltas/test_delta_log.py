"""DeltaLog: chains are bit-exact, survive kills and errors, and cost what they should."""

import json
import math
import threading
import time

import pytest
import torch
from logged_model import Model, check_stats, copied, masks, replay, same, train, write
from torch import nn

import sparseopt as so
from sparseopt.deltas import _recording
from sparseopt.deltas.delta import model_fingerprint

DTYPES = [torch.bfloat16, torch.float32]


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
