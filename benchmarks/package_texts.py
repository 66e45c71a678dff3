"""A text corpus without a network: what the installed packages tell about themselves.

    python -m sparseopt.benchmarks.package_texts build/project/texts

Writes a text file for each installed distribution with a description of 2,000 characters or more, in the order of their names,
so that equal installations give equal corpora. Descriptions are Markdown or reStructuredText, mostly English prose and code.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sysconfig
from collections.abc import Iterable, Sequence
from importlib.metadata import distributions
from pathlib import Path
from pydoc_data.topics import topics

from sparseopt._files import atomic_folder

__all__ = ["main", "python_texts", "texts", "write"]

LEAST = 2000  # characters
# Of the standard library: what others installed, tests, programs beside it, and tables.
LEFT_OUT = re.compile(
    r"(^|/)(site-packages|dist-packages|tests?|idlelib|turtledemo|encodings|pydoc_data|__pycache__)/|_data_"
)


def texts(folders: Sequence[str] | None = None, least: int = LEAST) -> dict[str, str]:
    """Descriptions of the distributions in ``folders`` (default: all that Python finds).

    Returns:
        normalised name -> description of at least ``least`` characters, sorted by name.
    """
    found: dict[str, str] = {}
    for distribution in distributions() if folders is None else distributions(path=list(folders)):
        about = distribution.metadata
        text = (about.get_payload() or about["Description"] or "").strip()  # type: ignore[attr-defined]
        name = re.sub(r"[-_.]+", "-", about["Name"] or "").lower()
        if name and len(text) >= least:
            found.setdefault(name, text)  # a name twice on the path: the first is what gets imported
    return dict(sorted(found.items()))


def python_texts(least: int = LEAST) -> dict[str, str]:
    """What Python tells about itself: topics of its language reference, and the source of the standard library by module.

    Returns:
        ``topic:NAME`` or ``module:FILE`` -> text of at least ``least`` characters, sorted by name. Equal versions of Python
        give equal texts.
    """
    found = {f"topic:{name}": text.strip() for name, text in topics.items()}
    library = Path(sysconfig.get_path("stdlib"))
    for path in library.rglob("*.py"):
        name = path.relative_to(library).as_posix()
        if not LEFT_OUT.search(name):
            with contextlib.suppress(UnicodeDecodeError):
                found[f"module:{name}"] = path.read_text(encoding="utf-8").strip()
    return {name: text for name, text in sorted(found.items()) if len(text) >= least}


def write(folder: str | Path, chosen: Iterable[tuple[str, str]]) -> int:
    """Writes ``NAME.txt`` for each text into a folder, in place of the texts that are there; returns how many.

    Raises:
        ValueError: the folder holds something else, which would be lost.
    """
    target, count = Path(folder), 0
    other = [path.name for path in target.iterdir() if path.suffix != ".txt"] if target.is_dir() else []
    if other:
        raise ValueError(f"'{folder}' holds {min(other)!r}, which is no text: name another folder.")
    with atomic_folder(target, replace=True) as temporary:
        for name, text in chosen:
            (temporary / f"{name}.txt").write_text(text, encoding="utf-8")
            count += 1
    return count


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m sparseopt.benchmarks.package_texts", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folder", type=Path)
    parser.add_argument("--least", type=int, default=LEAST, help="characters of a text (default 2000)")
    options = parser.parse_args(arguments)
    found = texts(least=options.least)
    if not found:
        raise SystemExit("no installed package has a description of that length.")
    count = write(options.folder, found.items())
    print(f"{options.folder}: {count} texts, {sum(map(len, found.values())):,} characters")


if __name__ == "__main__":
    main()
