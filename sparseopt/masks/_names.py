"""Names of parameters: without what wrappers add, and fit for a file that somebody else reads."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

__all__ = ["WRAPPERS", "name_problem", "normalize_name"]

# Components that wrappers put into parameter names. `module` (DDP, DataParallel) is stripped at the front only: inside
# a name it may be a model's own attribute.
WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
NAME_LIMIT = 1024  # characters
# Control characters (NUL, line ends), invisible and direction-changing ones, surrogates, private, line separators.
ODD_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


def normalize_name(name: str) -> str:
    """Parameter name without what wrappers add: leading ``module.``, and ``_orig_mod.``, ``_fsdp_wrapped_module.`` and
    ``_checkpoint_wrapped_module.`` anywhere."""
    if "module" not in name and "_orig_mod" not in name:
        return name
    *path, last = name.split(".")
    path = [part for part in path if part not in WRAPPERS]
    while path and path[0] == "module":
        path.pop(0)
    return ".".join([*path, last])


def name_problem(names: Iterable[str]) -> str | None:
    """What is wrong with the first name that no file may hold, as a clause; None when all are fine.

    Names become paths, table rows and log lines elsewhere: they must not leave a folder or deceive a reader.
    """
    seen: dict[str, str] = {}
    for name in names:
        shown = ascii(name if len(name) <= 80 else name[:80] + "..")
        if not name or len(name) > NAME_LIMIT:
            return f"the parameter name {shown} has {len(name)} characters, not 1 to {NAME_LIMIT}"
        if not name.isascii() or not name.isprintable():
            for character in name:
                if unicodedata.category(character) in ODD_CATEGORIES:
                    return (
                        f"the parameter name {shown} holds the character U+{ord(character):04X}, which cannot be seen"
                    )
        if ".." in name:
            return f"the parameter name {shown} holds '..'"
        if name[0] in "/\\~" or name[1:2] == ":":
            return f"the parameter name {shown} is an absolute path"
        canonical = unicodedata.normalize("NFC", normalize_name(name))
        if canonical in seen:
            return f"two masks are named {canonical!a} (as {seen[canonical]!a} and {shown})"
        seen[canonical] = name
    return None
