"""Python objects that users name: ``module:function`` or ``path/to/file.py:function``."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["find_named"]


def find_named(name: str, what: str) -> Any:
    """The callable (a function or a class) that a name stands for.

    Args:
        name: ``module:function``, ``package.module:Class.method``, or ``path/to/file.py:function``.
        what: what it is to be, for errors: ``"reward"``.

    Raises:
        FileNotFoundError: no such file.
        ImportError: the module cannot be imported.
        ValueError: no colon, or the module has nothing of that name.
        TypeError: what it has cannot be called.
    """
    place, colon, attribute = name.rpartition(":")
    if not colon or not place or not attribute:
        raise ValueError(f"{what} {name!r} is not understood: expected module:function or path/to/file.py:function.")
    found: Any = _module_of_file(place, what) if place.endswith(".py") else _module(place, name, what)
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ValueError(f"{what} {name!r} was not found: {place!r} has no {part!r}.")
        found = getattr(found, part)
    if not callable(found):
        raise TypeError(f"{what} {name!r} cannot be called: it is of type {type(found).__name__}.")
    return found


def _module(place: str, name: str, what: str) -> ModuleType:
    try:
        return importlib.import_module(place)
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and place.startswith(error.name or " ")
        reason = "there is no such module" if missing else str(error)
        # ImportError, not ModuleNotFoundError: the command line would take it for a part of an extra.
        raise ImportError(f"the module {place!r} of {what} {name!r} cannot be imported: {reason}.") from error


def _module_of_file(place: str, what: str) -> ModuleType:
    path = Path(place).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"there is no file '{place}' with a {what}.")
    alias = f"sparseopt_named_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
    if alias not in sys.modules:
        spec = importlib.util.spec_from_file_location(alias, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[alias] = module  # before it runs: dataclasses and pickle look themselves up there
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[alias]
            raise
    return sys.modules[alias]
