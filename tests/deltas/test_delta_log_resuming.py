"""DeltaLog after an end: resuming, what killed writes leave, gaps, files of another log, and kills at random moments."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import logged_model
import pytest
import torch
from logged_model import Model, check_stats, masks, replay, same, train, write

import sparseopt as so
from sparseopt.deltas.reader import LogReader


# ---- resuming ----------------------------------------------------------------------------------------------------------
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


# ---- killed ------------------------------------------------------------------------------------------------------------
CHILD = """
import sys, torch
torch.set_num_threads(1)
sys.path.insert(0, {folder!r})  # of logged_model
import sparseopt as so
from logged_model import Model, masks, train, replay

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
    script.write_text(CHILD.format(folder=str(Path(logged_model.__file__).parent)))
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
