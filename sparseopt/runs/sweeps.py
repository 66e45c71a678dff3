"""A sweep: which combinations of settings a sweep file asks for, and the plan that is kept of it.

sweep_name: learning_rate_sweep
parameters:
  training.learning_rate: {min: 1.0e-5, max: 1.0e-3, log: true}   # a range: random only
  initialization.init_std: {values: [0.01, 0.02]}                  # a choice
strategy: random          # or grid: every combination of the choices
num_runs: 3               # random: different combinations
seed: 0                   # random: of the draw
"""

from __future__ import annotations

import difflib
import itertools
import json
import math
import random
import tomllib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparseopt._files import FormatError, atomic_write
from sparseopt.runs._record import as_dict, config_hash

__all__ = ["Combination", "Plan", "SweepSpec", "combinations", "load_plan", "make_plan", "read_config", "read_sweep"]

PLANS = "sweeps"
PLAN_FORMAT = "sparseopt.sweep/1"
KEYS = ("sweep_name", "parameters", "strategy", "num_runs", "seed")
RANGE_KEYS = ("min", "max", "log")


@dataclass(frozen=True)
class Choice:
    """Listed values."""

    values: tuple[Any, ...]

    def draw(self, rng: random.Random) -> Any:
        return rng.choice(self.values)


@dataclass(frozen=True)
class Range:
    """Numbers from low to high, both included; integers where both are; evenly spread, or their logarithms are."""

    low: int | float
    high: int | float
    log: bool

    @property
    def integer(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)

    def draw(self, rng: random.Random) -> int | float:
        if self.integer and not self.log:
            return rng.randint(int(self.low), int(self.high))
        if not self.log:
            return rng.uniform(self.low, self.high)
        # An integer stands for the half units around it, so that the ends are drawn like the others.
        edge = 0.5 if self.integer else 0.0
        value = math.exp(rng.uniform(math.log(self.low - edge), math.log(self.high + edge)))
        value = min(max(round(value) if self.integer else value, self.low), self.high)
        return int(value) if self.integer else value


@dataclass(frozen=True)
class SweepSpec:
    """A sweep file, checked."""

    name: str
    parameters: Mapping[str, Choice | Range]
    strategy: str = "grid"
    num_runs: int | None = None
    seed: int = 0


@dataclass
class Combination:
    """One run of a sweep: its place in the sweep, the swept settings, the whole configuration and its hash."""

    values: dict[str, Any]
    config: dict[str, Any]
    hash: str


@dataclass
class Plan:
    """What a sweep consists of, as its file holds it: all that resuming needs.

    ``runs``: configuration hash -> run id, of everything that was ever started under this name; ``jobs``: run id -> its
    latest Slurm job, of what was submitted.
    """

    name: str
    path: Path
    command: list[str]
    combinations: list[Combination]
    runs: dict[str, str] = field(default_factory=dict)
    jobs: dict[str, str] = field(default_factory=dict)

    def save(self) -> None:
        """Replaces the file of the plan."""
        content = {
            "format": PLAN_FORMAT,
            "sweep_name": self.name,
            "command": self.command,
            "combinations": [vars(combination) for combination in self.combinations],
            "runs": self.runs,
            "jobs": self.jobs,
        }
        atomic_write(self.path, json.dumps(content, indent=1) + "\n")


# ---- files -----------------------------------------------------------------------------------------------------------
def read_config(path: Path) -> dict[str, Any]:
    """A YAML or TOML file (by suffix) as a dict, interpolations as they stand.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another suffix, not valid, or no keys at the top.
    """
    import yaml

    from sparseopt._yaml import parse, problem

    if path.suffix not in (".yaml", ".yml", ".toml"):
        raise ValueError(f"A configuration file ends in .yaml, .yml or .toml, got {str(path)!r}.")
    if not path.is_file():
        raise FileNotFoundError(f"There is no configuration file {str(path)!r}.")
    try:
        content = tomllib.loads(path.read_text()) if path.suffix == ".toml" else parse(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not valid TOML: {error}.") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {problem(error)}.") from error
    if content is None:  # empty, or comments only
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold keys, got a {type(content).__name__}.")
    return content


def read_sweep(path: Path) -> SweepSpec:
    """A sweep file, checked; errors as :func:`read_config`, and ValueError for a setting that is wrong."""
    return parse_sweep(read_config(path), str(path))


def parse_sweep(content: Mapping[str, Any], where: str) -> SweepSpec:
    """The content of a sweep file, checked. ``where`` begins the sentences of errors."""
    for key in content:
        if key not in KEYS:
            near = difflib.get_close_matches(str(key), KEYS, n=1)
            hint = f": did you mean {near[0]!r}?" if near else "."
            warnings.warn(f"{where} has the unknown setting {key!r}{hint} It is ignored.", stacklevel=3)
    name = content.get("sweep_name")
    check_name(name, where)
    parameters = content.get("parameters")
    if not isinstance(parameters, Mapping) or not parameters:
        raise ValueError(f"{where}: parameters must hold at least one setting to sweep over, got {parameters!r}.")
    strategy = content.get("strategy", "grid")
    if strategy not in ("grid", "random"):
        raise ValueError(f"{where}: strategy must be grid or random, got {strategy!r}.")
    num_runs, seed = content.get("num_runs"), content.get("seed", 0)
    if num_runs is not None and (not _is_int(num_runs) or num_runs < 1):
        raise ValueError(f"{where}: num_runs must be a positive integer, got {num_runs!r}.")
    if strategy == "random" and num_runs is None:
        raise ValueError(f"{where}: num_runs is needed with the strategy random.")
    if not _is_int(seed):
        raise ValueError(f"{where}: seed must be an integer, got {seed!r}.")
    spaces = {str(key): _space(f"{where}: {key}", value) for key, value in parameters.items()}
    ranges = [key for key, space in spaces.items() if isinstance(space, Range)]
    if strategy == "grid" and ranges:
        raise ValueError(f"{where}: {ranges[0]} is a range, which only the strategy random takes; a grid needs values.")
    return SweepSpec(str(name), spaces, strategy, num_runs, seed)


def check_name(name: Any, where: str) -> None:
    """Raises ValueError for a name of a sweep that cannot name a file."""
    if not isinstance(name, str) or not name or name.startswith(".") or Path(name).name != name:
        raise ValueError(f"{where}: sweep_name must be a text that can name a file, got {name!r}.")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _space(where: str, value: Any) -> Choice | Range:
    if isinstance(value, list):
        value = {"values": value}
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} must hold values, or min and max, got {value!r}.")
    if "values" in value:
        values = value["values"]
        others = [key for key in value if key != "values"]
        if not isinstance(values, list) or not values or others:
            raise ValueError(f"{where} must hold a list of values (and nothing else), got {dict(value)!r}.")
        distinct: dict[str, Any] = {}
        for item in values:
            distinct.setdefault(config_hash({"value": item}), item)
        return Choice(tuple(distinct.values()))
    low, high, log = value.get("min"), value.get("max"), value.get("log", False)
    unknown = [key for key in value if key not in RANGE_KEYS]
    numbers = all(isinstance(end, (int, float)) and not isinstance(end, bool) for end in (low, high))
    if unknown or not numbers or not isinstance(log, bool):
        raise ValueError(
            f"{where} must hold values, or min and max (numbers) and log (true or false), got {dict(value)!r}."
        )
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):  # type: ignore[arg-type,operator]
        raise ValueError(f"{where} must have min <= max, both finite, got {low!r} and {high!r}.")
    if log and low <= 0:  # type: ignore[operator]
        raise ValueError(f"{where} must have min > 0 with log, got {low!r}.")
    return Range(low, high, log)  # type: ignore[arg-type]


# ---- combinations ----------------------------------------------------------------------------------------------------
def combinations(spec: SweepSpec) -> list[dict[str, Any]]:
    """The swept settings of every run: dotted key -> value, no two alike.

    A grid varies the last parameter fastest. A random sweep is the same for the same seed; one that asks for more runs
    than there are combinations warns and gets them all.
    """
    names, spaces = list(spec.parameters), list(spec.parameters.values())
    sizes = [_size(space) for space in spaces]
    total = math.prod(sizes)
    if spec.strategy == "grid":
        return [dict(zip(names, values, strict=True)) for values in itertools.product(*map(_listed, spaces))]
    wanted = spec.num_runs or 0
    if wanted >= total:
        if wanted > total:
            warnings.warn(
                f"The sweep {spec.name!r} asks for {wanted} runs, and there are {total:.0f} combinations: all are taken.",
                stacklevel=2,
            )
        return [dict(zip(names, values, strict=True)) for values in itertools.product(*map(_listed, spaces))]
    drawn: dict[str, dict[str, Any]] = {}
    for values in _draws(spaces, random.Random(spec.seed)):
        combination = dict(zip(names, values, strict=True))
        drawn.setdefault(config_hash(combination), combination)
        if len(drawn) == wanted:
            break
    return list(drawn.values())


def _size(space: Choice | Range) -> float:
    if isinstance(space, Choice):
        return len(space.values)
    if space.integer:
        return int(space.high) - int(space.low) + 1
    return 1 if space.low == space.high else math.inf


def _listed(space: Choice | Range) -> Sequence[Any]:
    if isinstance(space, Choice):
        return space.values
    return range(int(space.low), int(space.high) + 1) if space.integer else [space.low]


def _draws(spaces: Sequence[Choice | Range], rng: random.Random) -> Iterator[list[Any]]:
    while True:
        yield [space.draw(rng) for space in spaces]


def with_values(base: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The base configuration with dotted keys set (sections are made where they are missing), interpolations resolved.

    Raises:
        ValueError: a key goes through a value, or an interpolation cannot be resolved.
    """
    import copy

    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    config = copy.deepcopy(dict(base))
    for key, value in values.items():
        *sections, last = key.split(".")
        place: Any = config
        for section in sections:
            if place.get(section) is None:
                place[section] = {}
            place = place[section]
            if not isinstance(place, dict):
                raise ValueError(f"The parameter {key!r} needs a section {section!r}, which is a value in the base.")
        place[last] = value
    try:
        return as_dict(OmegaConf.create(config))
    except OmegaConfBaseException as error:
        raise ValueError(f"The configuration cannot be resolved: {str(error).splitlines()[0]}.") from error


# ---- plans -----------------------------------------------------------------------------------------------------------
def make_plan(base_dir: Path, spec: SweepSpec, base: Mapping[str, Any], command: Sequence[str]) -> Plan:
    """The plan of a sweep; what was started under its name before is known by the hash of the configuration.

    Not saved yet. Combinations that differ only in a key that an interpolation overrides are one.
    """
    path = base_dir / PLANS / f"{spec.name}.json"
    found: dict[str, Combination] = {}
    for values in combinations(spec):
        config = with_values(base, values)
        key = config_hash(config)
        found.setdefault(key, Combination(values, config, key))
    before = load_plan(base_dir, spec.name) if path.exists() else None
    runs, jobs = (before.runs, before.jobs) if before else ({}, {})
    return Plan(spec.name, path, list(command), list(found.values()), runs, jobs)


def load_plan(base_dir: Path, name: str) -> Plan:
    """The plan of a sweep that was started.

    Raises:
        FileNotFoundError: none was, in this folder.
        FormatError: its file is damaged.
    """
    check_name(name, "The sweep")
    path = base_dir / PLANS / f"{name}.json"
    if not path.is_file():
        known = sorted(file.stem for file in path.parent.glob("*.json"))
        there = f"; there are {', '.join(known)}." if known else "."
        raise FileNotFoundError(f"There is no sweep {name!r} in {str(base_dir)!r}{there}")
    try:
        content = json.loads(path.read_text())
        if content["format"] != PLAN_FORMAT:
            raise FormatError(f"{path} has the format {content['format']!r}, expected {PLAN_FORMAT!r}.")
        known_combinations = [Combination(**combination) for combination in content["combinations"]]
        return Plan(name, path, content["command"], known_combinations, content["runs"], content.get("jobs", {}))
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise FormatError(f"{path} is not the plan of a sweep: {type(error).__name__}: {error}.") from error
