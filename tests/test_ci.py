"""``.ci/run`` and the Makefile: a suite that fails or runs nothing is a failure, and the last line says what ran."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PASSES = "def test_a():\n    pass\n"
FAILS = "def test_b():\n    assert False\n"
SKIPS = "import pytest\n\n@pytest.mark.skip(reason='no such device')\ndef test_c():\n    pass\n"


def ci(folder: Path, suites: dict[str, str], alone: str = "") -> subprocess.CompletedProcess[str]:
    """Runs .ci/run in a folder whose Makefile runs one test file per suite, and ``alone`` after the slow ones."""
    (folder / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", folder / ".ci" / "run")
    rules = []
    for suite, tests in suites.items():
        (folder / f"test_{suite}.py").write_text(tests)
        pytest_command = f"{sys.executable} -m pytest -q -p no:cacheprovider -rs --junitxml=$(REPORTS)/{suite}.xml"
        rules.append(f"{suite}:\n\t{pytest_command} test_{suite}.py\n")
        if suite == "slow" and alone:
            (folder / "test_alone.py").write_text(alone)
            rules.append(f"\t{pytest_command.replace('slow.xml', 'slow-alone.xml')} test_alone.py\n")
    (folder / "Makefile").write_text("".join(rules))
    # What this run was given (`make test REPORTS=...`) is not given on.
    environment = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MFLAGS", "PYTEST_ADDOPTS")}
    return subprocess.run(
        ["bash", ".ci/run"],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**environment, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(
    ("test", "slow", "code", "last", "words"),
    [
        (PASSES + SKIPS, PASSES, 0, "2 passed, 0 failed, 1 skipped", "1 skipped: no such device"),
        (PASSES + FAILS, PASSES, 1, "2 passed, 1 failed, 0 skipped", "failed: make test"),
        (PASSES, PASSES + FAILS, 1, "2 passed, 1 failed, 0 skipped", "failed: make slow"),
        (PASSES, "", 1, "1 passed, 0 failed, 0 skipped", "make slow ran no test"),
        (SKIPS, PASSES, 1, "1 passed, 0 failed, 1 skipped", "make test ran no test"),
        (PASSES, "import no_such_module\n", 1, "1 passed, 1 failed, 0 skipped", "failed: make slow"),
    ],
)
def test_ci_run(tmp_path: Path, test: str, slow: str, code: int, last: str, words: str) -> None:
    result = ci(tmp_path, {"test": test, "slow": slow})
    assert result.returncode == code
    assert result.stdout.splitlines()[-1] == last
    assert words in result.stdout + result.stderr


@pytest.mark.parametrize(("alone", "last"), [(PASSES, "3 passed, 0 failed"), (FAILS, "2 passed, 1 failed")])
def test_ci_run_counts_what_ran_alone(tmp_path: Path, alone: str, last: str) -> None:
    result = ci(tmp_path, {"test": PASSES, "slow": PASSES}, alone)
    assert result.returncode == int("1 failed" in last)
    assert "make slow: 2 ran, 0 skipped" in result.stdout
    assert result.stdout.splitlines()[-1] == f"{last}, 0 skipped"


def test_ci_run_without_a_suite(tmp_path: Path) -> None:
    result = ci(tmp_path, {"test": PASSES})
    assert result.returncode == 1
    assert "make slow ran no test" in result.stdout


def test_makefile_help_lists_every_job() -> None:
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True).stdout
    for job in (
        "demo",
        "sweep",
        "system",
        "test",
        "slow",
        "bench",
        "lint",
        "types",
        "venv",
        "install",
        "clean",
        "help",
    ):
        assert f"make {job} " in listed


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"PYTHON": "no-such-python"}, "no-such-python was not found"),
        ({"PYTHON": "{tmp}/python3.10"}, "Python >= 3.11 is needed"),
        ({"CXX": "no-such-compiler"}, "apt-get install g++"),
        ({"PYTHON": "{tmp}/without-venv"}, "apt-get install python3-venv"),
        ({"PYTHON": "{tmp}/without-headers"}, "apt-get install python3-dev"),
    ],
)
def test_make_says_early_what_the_system_lacks(tmp_path: Path, variables: dict[str, str], words: str) -> None:
    """Interpreters that lack something are played by scripts that refuse the matching check."""
    for name, refused in (
        ("python3.10", "version_info"),
        ("without-venv", "ensurepip"),
        ("without-headers", "Python.h"),
    ):
        script = tmp_path / name
        script.write_text(f'#!/bin/sh\ncase "$*" in *{refused}*) exit 1;; esac\nexec {sys.executable} "$@"\n')
        script.chmod(0o755)
    venv = tmp_path / "venv"
    given = [f"{name}={value.format(tmp=tmp_path)}" for name, value in variables.items()]
    result = subprocess.run(
        ["make", f"VENV={venv}", *given, "demo"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 2
    assert words in result.stderr
    assert not venv.exists()


@pytest.mark.parametrize(
    ("beside", "alone", "good"),
    [(0, 0, True), (0, 5, True), (5, 0, True), (5, 5, False), (1, 0, False), (0, 1, False), (1, 5, False)],
)
def test_make_slow_fails_when_a_part_does_or_both_are_empty(
    tmp_path: Path, beside: int, alone: int, good: bool
) -> None:
    """With a pytest that only returns a code (5: it found no test)."""
    (tmp_path / "bin").mkdir()
    script = (
        f'#!/bin/sh\necho "$*" >> {tmp_path}/calls\ncase "$*" in *"not alone"*) exit {beside};; esac\nexit {alone}\n'
    )
    (tmp_path / "bin" / "pytest").write_text(script)
    (tmp_path / "bin" / "pytest").chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if k not in ("CI", "MAKEFLAGS", "PYTEST_ARGS")}
    done = subprocess.run(
        ["make", "-o", f"{tmp_path}/.stamps/dev", "slow", f"VENV={tmp_path}", f"REPORTS={tmp_path}/reports", "WORKERS=3"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode == 0) == good, done.stderr
    first, second = (tmp_path / "calls").read_text().splitlines()
    assert "-n 3" in first
    assert "-n" not in second.split()
