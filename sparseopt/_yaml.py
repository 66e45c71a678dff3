"""YAML as configurations mean it: numbers of YAML 1.2, and no key twice.

YAML 1.1, which PyYAML reads, takes ``6e-4`` for text and ``10:80:10``, a schedule of steps, for a number in base 60.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

import yaml

__all__ = ["dump", "parse"]

_NUMBERS = {
    "tag:yaml.org,2002:int": re.compile(r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F]+)"),
    "tag:yaml.org,2002:float": re.compile(
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+|\.[0-9]+(?:[eE][-+]?[0-9]+)?"
        r"|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)"
    ),
}


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with other numbers."""

    # first character -> [(tag, pattern)]; copied, since the original is shared by all loaders
    yaml_implicit_resolvers: ClassVar = {
        character: [(tag, pattern) for tag, pattern in known if tag not in _NUMBERS]
        for character, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for position, key in enumerate(keys):
            if key in keys[:position]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is there twice", node.value[position][0].start_mark
                )
        return super().construct_mapping(node, deep=deep)


for _tag, _pattern in _NUMBERS.items():
    _Loader.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern.pattern})\Z"), list("-+.0123456789"))


def parse(text: str) -> Any:
    """The content of a YAML document.

    Raises:
        yaml.YAMLError: it cannot be parsed, or a key is there twice.
    """
    return yaml.load(text, _Loader)


def problem(error: yaml.YAMLError) -> str:
    """What is wrong with a document, and where, as the end of a sentence."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem and error.problem_mark is not None:
        return f"{error.problem} (line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1})"
    return " ".join(str(error).split())


class _Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper, which puts text in quotes where either of the two would read something else."""

    yaml_implicit_resolvers: ClassVar = {
        character: [
            *_Loader.yaml_implicit_resolvers.get(character, []),
            *yaml.SafeDumper.yaml_implicit_resolvers.get(character, []),
        ]
        for character in {*_Loader.yaml_implicit_resolvers, *yaml.SafeDumper.yaml_implicit_resolvers}
    }


def dump(content: Any) -> str:
    """``content`` (dicts, lists, numbers, text, bools, None) as a document that :func:`parse` and PyYAML read as the same."""
    return str(yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True))
