"""A text corpus without a network: what the installed packages tell about themselves.

    python -m sparseopt.benchmarks.package_texts build/project/texts

Writes a text file for each installed distribution with a description of 2,000 characters or more, in the order of their names,
so that equal installations give equal corpora. Descriptions are Markdown or reStructuredText, mostly English prose and code.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Sequence
from importlib.metadata import distributions
from pathlib import Path

from sparseopt._files import atomic_folder

__all__ = ["main", "texts", "write"]

LEAST = 2000  # characters


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
