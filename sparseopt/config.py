"""Merging a schema's defaults, files, overrides and flags into one dict of settings (:mod:`sparseopt.schemas` has them).

Later sources win: defaults, file (YAML or TOML), ``a.b=c`` overrides, flags.
"""

from __future__ import annotations

import copy
import difflib
import os
import tomllib
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sparseopt.schemas import Schema, Setting

__all__ = ["OverrideError", "compose", "defaults", "load", "load_open"]


class OverrideError(ValueError):
    """An override or a flag is malformed, names an unknown key, or has a value of the wrong type."""


def defaults(schema: Schema) -> dict[str, dict[str, Any]]:
    """The configuration without any file or override."""
    # Copied: a caller may change the lists and dicts.
    return {section: {key: copy.copy(s.default) for key, s in keys.items()} for section, keys in schema.items()}


def load(
    schema: Schema,
    path: str | os.PathLike[str] | None = None,
    overrides: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
) -> dict[str, dict[str, Any]]:
    """Merges defaults, a file, overrides and flags.

    Args:
        schema: what may be configured.
        path: YAML or TOML file (by suffix). A key that the schema does not know warns and is left out.
        overrides: ``section.key=value``, the value as in YAML (``6e-4`` is a number, ``null`` is None).
        flags: ``section.key`` -> value; None means "not given".

    Raises:
        FileNotFoundError: no such file.
        OverrideError: an override or flag is malformed, names an unknown key, or has a value of the wrong type.
        ValueError: the file cannot be parsed, or one of its values has the wrong type.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    given = {key: value for key, value in (flags or {}).items() if value is not None}
    try:
        changes = _overrides(schema, overrides, given)
        # Interpolations are resolved last: one in the file may refer to what an override sets, or to a default.
        merged = OmegaConf.merge(defaults(schema), {} if path is None else _read(Path(path)), changes)
        values = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise ValueError(f"The configuration cannot be resolved: {str(error).splitlines()[0]}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold sections ({', '.join(schema)}), got a list.")
    return _checked(schema, values)


def compose(schema: Schema, *parts: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Defaults, then parts (section -> key -> value), the later winning key by key.

    Raises:
        ValueError: a part has a key that the schema does not know, or a value of the wrong type.
    """
    merged = defaults(schema)
    for part in parts:
        unknown = _unknown(schema, [f"{section}.{key}" for section, keys in part.items() for key in keys])
        if unknown:
            raise ValueError(" ".join(unknown))
        for section, keys in part.items():
            merged[section].update(keys)
    return _checked(schema, merged)


def load_open(
    schema: Schema, source: str | os.PathLike[str] | Mapping[str, Any] | None, overrides: Sequence[str] = ()
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """As :func:`load`, for configurations that may hold any new section and key.

    An unknown key in a known section warns, with the nearest known one, and is kept.

    Args:
        schema: what is known.
        source: YAML or TOML file, or what one holds.
        overrides: ``key=value`` with a dotted key, known or not; values as in YAML.

    Returns:
        (the settings that the schema knows, with defaults; all that was given, known or not), interpolations resolved.

    Raises:
        FileNotFoundError, OverrideError, ValueError: as :func:`load`.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    content = dict(source) if isinstance(source, Mapping) else {} if source is None else _parse(Path(source))
    content = {key: value for key, value in content.items() if value is not None or key not in schema}
    for section in schema:
        if not isinstance(content.get(section, {}), Mapping):
            raise ValueError(f"Section {section!r} must hold keys, got {content[section]!r}.")
    changes = _changes(overrides)
    try:
        _checked(schema, {key: value for key, value in changes.items() if key in schema}, warn=False)
    except ValueError as error:
        raise OverrideError(str(error)) from error
    try:
        given = OmegaConf.merge(content, changes)
        merged = OmegaConf.merge(defaults(schema), given)
        values = OmegaConf.to_container(merged, resolve=True)
        shape = OmegaConf.to_container(given, resolve=False)
    except OmegaConfBaseException as error:
        raise ValueError(f"The configuration cannot be resolved: {str(error).splitlines()[0]}") from error
    assert isinstance(values, dict)
    for sentence in _new_keys(schema, values):
        warnings.warn(sentence, stacklevel=2)
    known = {section: values[section] for section in schema}
    return _checked(schema, known, warn=False), _selected(values, shape)


def _new_keys(schema: Schema, values: Mapping[Any, Any]) -> Iterator[str]:
    """A sentence about each unknown key of a known section, and each section that looks like a known one."""
    kept = "It is kept with the run, and nothing else reads it."
    for section, content in values.items():
        if section not in schema:
            if near := difflib.get_close_matches(str(section), list(schema), n=1, cutoff=0.8):
                yield f"Unknown section {str(section)!r}: did you mean {near[0]!r}? {kept}"
            continue
        for key in content:
            if key in schema[section]:
                continue
            # By the key alone: what begins with the same section looks alike. Or it belongs to another section.
            like = difflib.get_close_matches(str(key), list(schema[section]), n=1, cutoff=0.7)
            near = [f"{section}.{key}" for key in like] or [
                f"{other}.{key}" for other in schema if key in schema[other]
            ]
            yield f"Unknown setting '{section}.{key}'{f': did you mean {near[0]!r}?' if near else '.'} {kept}"


def _selected(values: Any, shape: Any) -> Any:
    """The part of ``values`` that has the keys of ``shape``."""
    if isinstance(shape, Mapping) and isinstance(values, Mapping):
        return {key: _selected(values[key], inner) for key, inner in shape.items()}
    return values


def _changes(overrides: Sequence[str]) -> dict[str, Any]:
    """Overrides of known and unknown keys as a nested dict."""
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from sparseopt._yaml import parse, problem

    changes = OmegaConf.create()
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key.strip("."):
            raise OverrideError(f"--set expects key=value, got {override!r}.")
        try:
            OmegaConf.update(changes, key, parse(value), force_add=True)
        except yaml.YAMLError as error:
            raise OverrideError(f"--set {override!r} cannot be parsed: {problem(error)}.") from error
        except OmegaConfBaseException as error:
            raise OverrideError(f"--set {override!r} cannot be parsed: {' '.join(str(error).split())}.") from error
    plain = OmegaConf.to_container(changes, resolve=False)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _overrides(schema: Schema, overrides: Sequence[str], flags: Mapping[str, Any]) -> Any:
    """Overrides and flags as one OmegaConf object, checked alone, so that an error is known to be theirs."""
    import yaml
    from omegaconf import OmegaConf

    from sparseopt._yaml import parse, problem

    keys = [override.partition("=")[0] for override in overrides]
    for key, override in zip(keys, overrides, strict=True):
        if "=" not in override or "." not in key:
            raise OverrideError(f"--set expects section.key=value, got {override!r}.")
    unknown = _unknown(schema, [*keys, *flags])
    if unknown:
        raise OverrideError(" ".join(unknown))
    try:
        changes = OmegaConf.create()
        for key, override in zip(keys, overrides, strict=True):
            OmegaConf.update(changes, key, parse(override.partition("=")[2]))
    except yaml.YAMLError as error:
        raise OverrideError(f"--set cannot be parsed: {problem(error)}.") from error
    for key, value in flags.items():
        OmegaConf.update(changes, key, value)
    plain = OmegaConf.to_container(changes, resolve=False)
    assert isinstance(plain, dict)
    try:
        _checked(schema, plain)
    except ValueError as error:
        raise OverrideError(str(error)) from error
    return changes


def _read(path: Path) -> dict[str, Any]:
    return _sections(_parse(path))


def _parse(path: Path) -> dict[str, Any]:
    """What a file holds, whatever its keys are."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no configuration file {str(path)!r}.")
    if path.suffix == ".toml":
        try:
            return tomllib.loads(path.read_text())
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"{path} is not valid TOML: {error}.") from error
    if path.suffix not in (".yaml", ".yml"):
        raise ValueError(f"A configuration file ends in .yaml, .yml or .toml, got {str(path)!r}.")
    import yaml

    from sparseopt._yaml import parse, problem

    try:
        content = parse(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {problem(error)}.") from error
    if content is None:  # empty, or comments only
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold sections with keys, got a {type(content).__name__}.")
    return {str(key): value for key, value in content.items()}


def _sections(content: dict[str, Any]) -> dict[str, Any]:
    """Leaves out sections whose keys are all commented out; anything else that is no section is an error."""
    for section, keys in content.items():
        if keys is not None and not isinstance(keys, Mapping):
            raise ValueError(f"Section {section!r} must hold keys, got {keys!r}.")
    return {section: keys for section, keys in content.items() if keys is not None}


def _unknown(schema: Schema, keys: Iterable[str]) -> list[str]:
    """One sentence per dotted key that is not in the schema, with the nearest known one."""
    known = [f"{section}.{key}" for section, settings in schema.items() for key in settings]
    sentences = []
    for key in keys:
        # `data.options.x` sets an entry of a free-form dict.
        section, name, *rest = [*key.split("."), ""]
        setting = schema.get(section, {}).get(name)
        if setting is not None and (rest == [""] or setting.kind is dict):
            continue
        near = (
            difflib.get_close_matches(key, known, n=1)
            or [k for k in known if k.split(".")[1] == key.split(".")[-1]][:1]
        )
        sentences.append(f"Unknown setting {key!r}{f': did you mean {near[0]!r}?' if near else '.'}")
    return sentences


def _checked(schema: Schema, values: Mapping[Any, Any], *, warn: bool = True) -> dict[str, dict[str, Any]]:
    result = defaults(schema)
    for section, content in values.items():
        if not isinstance(content, Mapping) and section in schema:
            raise ValueError(f"Section {section!r} must hold keys, got {content!r}.")
        if section not in schema:
            _warn(_unknown(schema, [f"{section}.{key}" for key in content] or [str(section)]))
            continue
        for key, value in content.items():
            setting = schema[section].get(key)
            if setting is None:
                if warn:
                    _warn(_unknown(schema, [f"{section}.{key}"]))
                continue
            result[section][key] = _value(f"{section}.{key}", setting, value)
    return result


def _warn(sentences: Iterable[str]) -> None:
    for sentence in sentences:
        warnings.warn(f"{sentence} It is ignored.", stacklevel=5)


def _value(name: str, setting: Setting, value: Any) -> Any:
    if value is None and setting.default is None:
        return None
    if setting.several and isinstance(value, list):
        return [_value(name, replace(setting, several=False), item) for item in value]
    if isinstance(value, str) and value.startswith("${"):  # an interpolation of an override, checked when resolved
        return value
    if setting.kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if setting.kind is str and isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    # bool is an int to Python, not to a user.
    if not isinstance(value, setting.kind) or (isinstance(value, bool) and setting.kind is not bool):
        raise ValueError(f"{name} must be of type {setting.kind.__name__}, got {value!r}.")
    if setting.choices and value not in setting.choices:
        raise ValueError(f"{name} must be one of {', '.join(setting.choices)}, got {value!r}.")
    return value
