"""A run that is killed ten times, at random moments, ends with the weights of one that never was."""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from slow_steps import start, until_training

import sparseopt as so
from sparseopt.trainers import dpo

KILLS = 10


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ten_kills_change_nothing(
    tmp_path: Path, settings: Callable[..., list[str]], configure: Callable[..., Any]
) -> None:
    changes: dict[str, Any] = {
        "training.n_steps": 40, "training.save_steps": 2, "delta_log.schedule": "1:40:3",
        "delta_log.dir": tmp_path / "straight-log",
    }  # fmt: skip
    straight = dpo.run(configure(tmp_path / "straight", changes))
    folder, seed = tmp_path / "killed", random.randrange(2**32)
    changes["delta_log.dir"] = tmp_path / "killed-log"
    arguments, rng = settings(folder, changes), random.Random(seed)
    reached = []
    for kill in range(KILLS):
        resume = ["--resume"] if (folder / "config.json").is_file() else []
        process = start("run", 0.15, "train", "dpo", *resume, "--set", *arguments)
        if kill % 4 != 3:  # most fall into training, some anywhere
            until_training(process)
        time.sleep(rng.uniform(0, 1.2))
        process.send_signal(signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL, (seed, errors)
        reached.append(max((int(p.name.split("-")[1]) for p in folder.glob("checkpoint-*")), default=0))
    process = start("run", 0.15, "train", "dpo", "--resume", "--set", *arguments)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, (seed, errors)
    assert 0 < reached[-1] < 40, "kills fell into training"

    ours, theirs = (so.Delta.load(f / "trained_entries.safetensors") for f in (folder, straight))
    assert ours == theirs, (seed, reached)
    logs = [so.DeltaLog(tmp_path / f"{name}-log") for name in ("killed", "straight")]
    assert logs[0].steps() == logs[1].steps() == list(range(1, 41, 3))
    for step in (1, 22, 40):
        first, second = (so.reconstruct(None, log, step) for log in logs)
        assert all(first[name].equal(second[name]) for name in second), (seed, step)
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == list(range(1, 41))
