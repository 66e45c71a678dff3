"""The corpus of package descriptions: what is in it, and that it takes nobody's files."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from sparseopt.benchmarks import package_texts


def install(site: Path, name: str, text: str) -> None:
    folder = site / f"{name.replace('-', '_')}-1.0.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n\n{text}\n")


def test_long_descriptions_sorted_by_name(tmp_path: Path) -> None:
    install(tmp_path, "Zoo.keeper", "z" * 50)
    install(tmp_path, "ant", "a" * 40)
    install(tmp_path, "bee", "short")
    found = package_texts.texts([str(tmp_path)], least=40)
    assert list(found.items()) == [("ant", "a" * 40), ("zoo-keeper", "z" * 50)]


def test_files_replace_texts_only(tmp_path: Path) -> None:
    assert package_texts.write(tmp_path / "texts", [("old", "x")]) == 1
    assert package_texts.write(tmp_path / "texts", [("a", "one"), ("b", "two")]) == 2
    assert {path.name: path.read_text() for path in (tmp_path / "texts").iterdir()} == {"a.txt": "one", "b.txt": "two"}
    (tmp_path / "texts" / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"holds 'thesis\.tex', which is no text: name another folder"):
        package_texts.write(tmp_path / "texts", [("a", "one")])


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package_texts.main([str(tmp_path / "texts")])
    files = list((tmp_path / "texts").iterdir())
    assert len(files) > 5, "the packages that the tests need have descriptions"
    assert f"{len(files)} texts" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no installed package"):
        package_texts.main([str(tmp_path / "none"), "--least", "1000000000"])


def test_make_knows_the_recipe() -> None:
    """Its commands, without running them."""
    root = Path(__file__).resolve().parents[2]
    if not (root / "Makefile").is_file():
        pytest.skip("no source tree")
    lines = subprocess.run(
        ["make", "--dry-run", "--always-make", "project"],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout
    for words in (
        "package_texts results/project/texts",
        "project run",
        "for rank in 64 256",
        "project full-grads",
        "plot-error",
    ):
        assert words in lines
