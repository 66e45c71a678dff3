"""One run as ``run.json`` holds it: what it contains, how values are written, and how it becomes a row of the table."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sparseopt._files import FormatError
from sparseopt.runs._process import identity

__all__ = ["RESERVED", "config_hash", "flatten", "new_record", "now", "parse_record", "plain", "row_of", "unflatten"]

FORMAT, VERSION = "sparseopt.run", 1
STATUSES = ("created", "running", "finished", "failed", "crashed")
# Columns of the table that are neither configuration nor metrics, in this order.
RESERVED = (
    "run_id",
    "run_name",
    "sweep_name",
    "status",
    "timestamp",
    "heartbeat",
    "host",
    "pid",
    "git_commit",
    "error",
)
PACKAGES = ("torch", "transformers", "accelerate", "datasets", "numpy", "triton")
# JSON has no such numbers, and a diverged run's loss is one of them.
_SPECIAL = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def now() -> str:
    """The time, UTC, ISO 8601 with microseconds."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


# ---- values ----------------------------------------------------------------------------------------------------------
def plain(value: Any, name: str) -> Any:
    """``value`` as JSON and YAML have it: scalars of numpy and torch become Python's, paths text, tuples lists.

    Raises:
        TypeError: it is (or holds) something else; the sentence begins with ``name``, the dotted name of the place.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return float(value) if isinstance(value, float) else value  # numpy.float64 is a float, too
    if isinstance(value, Mapping):
        wrong = [key for key in value if not isinstance(key, (str, int))]
        if wrong:
            raise TypeError(f"{name} has the key {wrong[0]!r}, expected text.")
        return {str(key): plain(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, f"{name}[{position}]") for position, item in enumerate(value)]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if getattr(value, "shape", None) is not None and math.prod(value.shape) == 1 and hasattr(value, "item"):
        return plain(value.item(), name)
    raise TypeError(
        f"{name} must be a number, text, bool, None, or a list or dict of them, got {type(value).__name__}."
    )


def as_dict(config: Any) -> dict[str, Any]:
    """A configuration (a mapping, or OmegaConf's) as a nested plain dict."""
    if type(config).__module__.startswith("omegaconf."):
        from omegaconf import OmegaConf

        config = OmegaConf.to_container(config, resolve=True)
    if not isinstance(config, Mapping):
        raise TypeError(f"The configuration must be a dict, got {type(config).__name__}.")
    return {str(key): plain(value, str(key)) for key, value in config.items()}


def _write_special(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {key: _write_special(item) for key, item in value.items()}
    return [_write_special(item) for item in value] if isinstance(value, list) else value


def _read_special(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _read_special(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_read_special(item) for item in value]
    return _SPECIAL.get(value, value) if isinstance(value, str) else value


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys -> values; lists stay whole, an empty section has no keys."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dict of dotted keys."""
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, last = key.split(".")
        place = nested
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise ValueError(f"{key!r} needs a section {section!r}, which is a value elsewhere.")
        place[last] = value
    return nested


def config_hash(config: Mapping[str, Any]) -> str:
    """16 hex digits that are equal for equal configurations, in any order of keys; 1 and 1.0 are equal."""

    def canonical(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(key): canonical(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [canonical(item) for item in value]
        return int(value) if isinstance(value, float) and value.is_integer() else value

    text = json.dumps(canonical(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# ---- records ---------------------------------------------------------------------------------------------------------
def new_record(run_id: str, config: dict[str, Any], sweep_name: str | None) -> dict[str, Any]:
    """A run that this process creates now. ``config``: plain (:func:`as_dict`)."""
    run = config.get("run")
    time = now()
    return {
        "format": FORMAT,
        "version": VERSION,
        "run_id": run_id,
        "run_name": run.get("name") if isinstance(run, dict) else None,
        "sweep_name": sweep_name if sweep_name is not None else config.get("sweep_name"),
        "status": "created",
        "timestamp": time,
        "heartbeat": time,
        **identity(),
        "git_commit": git_commit(os.getcwd()),
        "versions": dict(versions()),
        "command": list(sys.argv),
        "error": None,
        "config_hash": config_hash(config),
        "config": config,
        "metrics": {},
    }


def dump_record(record: Mapping[str, Any]) -> str:
    """The text of ``run.json``."""
    return json.dumps(_write_special(dict(record)), indent=1, allow_nan=False) + "\n"


def parse_record(data: bytes | str, path: Path) -> dict[str, Any]:
    """The content of a ``run.json``.

    Raises:
        FormatError: it is damaged, something else, or of a later version.
    """
    try:
        record = json.loads(data)
    except ValueError as error:
        raise FormatError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise FormatError(f"{path} is not a run's record (no format {FORMAT!r}).")
    if record.get("version") != VERSION:
        raise FormatError(f"{path} has version {record.get('version')!r}; this release reads version {VERSION}.")
    if not isinstance(record.get("config"), dict) or not isinstance(record.get("metrics"), dict):
        raise FormatError(f"{path} must hold the dicts 'config' and 'metrics'.")
    if record.get("status") not in STATUSES:
        raise FormatError(f"{path} has the status {record.get('status')!r}, expected one of {', '.join(STATUSES)}.")
    record["metrics"] = _read_special(record["metrics"])
    record["run_id"] = path.parent.name  # a copied or renamed folder is found by its own name
    return record


def row_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """The row of the table: the reserved columns, the configuration by dotted keys, the metrics.

    A metric that is named as another column is shown as ``metrics.NAME``.
    """
    row = {name: record.get(name) for name in RESERVED}
    for key, value in flatten(record["config"]).items():
        row[f"config.{key}" if key in RESERVED else key] = value
    for key, value in record["metrics"].items():
        row[f"metrics.{key}" if key in row else key] = value
    # Its own column already says so, where the launcher wrote it into the configuration.
    row.pop("config.sweep_name", None)
    return row


# ---- where it ran ----------------------------------------------------------------------------------------------------
@functools.cache
def git_commit(folder: str) -> str | None:
    """The commit that is checked out in ``folder``, ``-dirty`` appended where files differ from it; None outside git."""
    command = ["git", "-C", folder, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):  # no git here, or a very slow file system
        return None
    return found.stdout.strip() or None if found.returncode == 0 else None


@functools.cache
def versions() -> Mapping[str, str]:
    """Versions of Python, sparseopt and what it trains with, as far as installed; nothing is imported for it."""
    from importlib import metadata

    from sparseopt._version import __version__

    found = {"python": sys.version.split()[0], "sparseopt": __version__}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
