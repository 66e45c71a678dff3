"""What a sweep file means: grids, random draws, the configuration of each run, errors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

import sparseopt as so
from sparseopt.runs.sweeps import combinations, load_plan, make_plan, parse_sweep, read_config, read_sweep, with_values

SEED_FILE = """\
# Hyperparameter sweep configuration
sweep_name: "learning_rate_sweep"  # Name of the sweep

parameters:
  # Example of sweeping over initialization parameters
  initialization.init_std:
    values: [0.01, 0.02]

  initialization.init_mean:
    values: [0.0]

# Strategy for selecting combinations (grid, random)
strategy: "grid"

# Number of runs to perform with different combinations if strategy is random.
num_runs: 3
"""


def draw(parameters: dict[str, Any], **settings: Any) -> list[dict[str, Any]]:
    settings = {"sweep_name": "s", "strategy": "random", "num_runs": 5, **settings}
    return combinations(parse_sweep({"parameters": parameters, **settings}, "sweep"))


def test_the_seeds_file(tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text(SEED_FILE)
    spec = read_sweep(tmp_path / "sweep.yaml")
    assert (spec.name, spec.strategy) == ("learning_rate_sweep", "grid")
    values = combinations(spec)
    assert values == [
        {"initialization.init_std": 0.01, "initialization.init_mean": 0.0},
        {"initialization.init_std": 0.02, "initialization.init_mean": 0.0},
    ]
    # The training file has no section `initialization`.
    config = with_values({"run": {"name": "test"}}, values[1])
    assert config == {"run": {"name": "test"}, "initialization": {"init_std": 0.02, "init_mean": 0.0}}
    (tmp_path / "random.yaml").write_text(SEED_FILE.replace('"grid"', '"random"'))
    with pytest.warns(UserWarning, match="asks for 3 runs, and there are 2 combinations: all are taken"):
        assert combinations(read_sweep(tmp_path / "random.yaml")) == values


def test_grid() -> None:
    values = draw({"a": [1, 2], "b": {"values": ["x", None]}}, strategy="grid")
    assert [tuple(v.values()) for v in values] == [(1, "x"), (1, None), (2, "x"), (2, None)]
    assert [v["a"] for v in draw({"a": [3, 1, 3.0, True]}, strategy="grid")] == [3, 1, True]


def test_random_is_seeded_and_never_repeats() -> None:
    parameters = {"a": [1, 2, 3], "b": [1, 2, 3], "c": {"min": 1, "max": 2}}
    first = draw(parameters, num_runs=17)
    assert first == draw(parameters, num_runs=17)
    assert len({tuple(v.values()) for v in first}) == 17
    assert first != draw(parameters, num_runs=17, seed=1)
    assert draw(parameters, num_runs=4) == first[:4]
    assert len(draw(parameters, num_runs=18)) == 18


def test_ranges() -> None:
    lrs = [v["lr"] for v in draw({"lr": {"min": 1e-5, "max": 1e-1, "log": True}}, num_runs=2000)]
    assert 1e-5 <= min(lrs) < 2e-5
    assert 5e-2 < max(lrs) <= 1e-1
    # Half of the draws of a log range lie under its geometric mean, of an even one under its mean.
    assert sum(lr < 1e-3 for lr in lrs) == pytest.approx(1000, abs=100)
    xs = [v["x"] for v in draw({"x": {"min": -1, "max": 3.0}}, num_runs=2000)]
    assert sum(x < 1 for x in xs) == pytest.approx(1000, abs=100)
    layers = draw({"n": {"min": 1, "max": 64, "log": True}}, num_runs=63)
    assert all(isinstance(v["n"], int) and 1 <= v["n"] <= 64 for v in layers)
    assert sorted(v["n"] for v in draw({"n": {"min": 3, "max": 7}}, num_runs=5)) == [3, 4, 5, 6, 7]
    assert all(math.isfinite(lr) for lr in lrs)


def test_configuration_of_a_run() -> None:
    base = {"a": {"x": 1, "twice": "${a.x}"}, "empty": None}
    assert with_values(base, {"a.x": 5, "empty.new.key": [1]}) == {
        "a": {"x": 5, "twice": 5},
        "empty": {"new": {"key": [1]}},
    }
    assert base["a"]["x"] == 1  # type: ignore[index]
    with pytest.raises(ValueError, match=r"'a\.x\.y' needs a section 'x', which is a value"):
        with_values(base, {"a.x.y": 1})
    with pytest.raises(ValueError, match="The configuration cannot be resolved: Interpolation key 'nowhere' not found"):
        with_values({"a": "${nowhere}"}, {"b": 1})


def test_plans_know_what_was_started(tmp_path: Path) -> None:
    spec = parse_sweep({"sweep_name": "s", "parameters": {"a": [1, 2]}}, "sweep")
    plan = make_plan(tmp_path, spec, {"b": 1}, ["x", "{config}"])
    plan.runs[plan.combinations[0].hash] = "id"
    plan.save()
    assert load_plan(tmp_path, "s") == plan
    more = parse_sweep({"sweep_name": "s", "parameters": {"a": [3, 1.0]}}, "sweep")
    again = make_plan(tmp_path, more, {"b": 1}, ["y"])
    assert [again.runs.get(c.hash) for c in again.combinations] == [None, "id"]
    other = make_plan(tmp_path, more, {"b": 2}, ["y"])
    assert [other.runs.get(c.hash) for c in other.combinations] == [None, None]
    # An interpolation may make combinations equal.
    same = parse_sweep({"sweep_name": "t", "parameters": {"a": [1, "${b}"]}}, "sweep")
    assert len(make_plan(tmp_path, same, {"b": 1}, ["y"]).combinations) == 1


def test_no_such_plan(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"There is no sweep 's' in '.*'\.$"):
        load_plan(tmp_path, "s")
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps" / "t.json").write_text("{")
    with pytest.raises(FileNotFoundError, match=r"; there are t\.$"):
        load_plan(tmp_path, "s")
    for text in ("{", "{}", "[]", '{"format": "x"}', '{"format": "sparseopt.sweep/1", "combinations": [{}]}'):
        (tmp_path / "sweeps" / "t.json").write_text(text)
        with pytest.raises(so.FormatError, match=r"t\.json"):
            load_plan(tmp_path, "t")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sweep_name": None}, "sweep_name must be a text that can name a file, got None"),
        ({"sweep_name": "a/b"}, "sweep_name must be a text that can name a file, got 'a/b'"),
        ({"parameters": {}}, "parameters must hold at least one setting"),
        ({"strategy": "bayes"}, "strategy must be grid or random, got 'bayes'"),
        ({"strategy": "random"}, "num_runs is needed"),
        ({"num_runs": 0}, "num_runs must be a positive integer, got 0"),
        ({"seed": 1.5}, "seed must be an integer, got 1.5"),
        ({"parameters": {"a": 1}}, "a must hold values, or min and max, got 1"),
        ({"parameters": {"a": []}}, "a must hold a list of values"),
        ({"parameters": {"a": {"values": [1], "min": 1}}}, "a must hold a list of values"),
        ({"parameters": {"a": {"min": 1}}}, "a must hold values, or min and max"),
        ({"parameters": {"a": {"min": 1, "max": 2, "steps": 3}}}, "a must hold values, or min and max"),
        ({"parameters": {"a": {"min": 2, "max": 1}}}, "a must have min <= max, both finite, got 2 and 1"),
        ({"parameters": {"a": {"min": 0, "max": 1, "log": True}}}, "a must have min > 0 with log, got 0"),
        ({"parameters": {"a": {"min": 1, "max": 2}}}, "a is a range, which only the strategy random takes"),
    ],
)
def test_wrong_sweeps(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^f: .*{message}"):
        parse_sweep({"sweep_name": "s", "parameters": {"a": [1]}, **change}, "f")


def test_unknown_settings_warn() -> None:
    with pytest.warns(UserWarning, match="unknown setting 'num_run': did you mean 'num_runs'"):
        parse_sweep({"sweep_name": "s", "parameters": {"a": [1]}, "num_run": 3}, "f")


def test_files(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("[training]\nlearning_rate = 6e-4\n")
    (tmp_path / "c.yaml").write_text("training:\n  learning_rate: 6e-4\n")
    assert read_config(tmp_path / "c.toml") == read_config(tmp_path / "c.yaml") == {"training": {"learning_rate": 6e-4}}
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert read_config(tmp_path / "empty.yaml") == {}
    with pytest.raises(FileNotFoundError, match="There is no configuration file"):
        read_config(tmp_path / "none.yaml")
    with pytest.raises(ValueError, match=r"ends in \.yaml, \.yml or \.toml"):
        read_config(tmp_path / "c.json")
    for text, message in (
        ("a: [", r"is not valid YAML: .* \(line 1, column 5\)"),
        ("- a", "must hold keys, got a list"),
    ):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_config(tmp_path / "bad.yaml")
