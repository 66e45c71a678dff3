"""What the wheel ships, that it works when installed alone, and that a build fails or falls back only as documented."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"sparseopt": "sparseopt", "trainers": "sparseopt.trainers", "triton_kernels": "sparseopt.triton_kernels",
           "benchmarks": "sparseopt.benchmarks"}  # fmt: skip
USE = (
    "import torch, sparseopt\n"
    "mask = torch.arange(17) % 3 == 0\n"
    "assert torch.equal(sparseopt.unpack_mask(sparseopt.pack_mask(mask), 17), mask)\n"
    "assert sparseopt.popcount(sparseopt.pack_mask(mask)) == 6\n"
)


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {
        k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "SPARSEOPT_BACKEND", "SPARSEOPT_NO_EXT")
    }
    return subprocess.run(
        [str(c) for c in command],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**variables, **environment},
        timeout=500,
        check=False,
    )


def python_packages() -> set[str]:
    found = set()
    for folder, name in FOLDERS.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            inner = init.parent.relative_to(ROOT / folder).parts
            found.add(".".join((name, *inner)))
    return found


def listed_packages() -> list[str]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]


# ---- the source tree -------------------------------------------------------------------------------------------------
def test_every_package_on_disk_is_listed() -> None:
    assert sorted(listed_packages()) == sorted(python_packages())


def test_every_module_lies_in_a_package() -> None:
    stray = [
        path.relative_to(ROOT)
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
        if not (path.parent / "__init__.py").is_file()
    ]
    assert stray == []


@pytest.mark.parametrize("name", ["trainers", "triton_kernels"])
def test_bare_names_are_refused(name: str) -> None:
    result = run(sys.executable, "-c", f"import {name}", cwd=ROOT)
    assert result.returncode == 1
    assert f"ImportError: This folder installs as `sparseopt.{name}`" in result.stderr


@pytest.mark.parametrize("folder", ["trainers", "triton_kernels", "benchmarks"])
def test_mapped_folders_use_absolute_imports(folder: str) -> None:
    """A relative import works in the tree or in the wheel, not in both."""
    relative = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in (ROOT / folder).rglob("*.py")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if line.lstrip().startswith("from .")
    ]
    assert relative == []


def test_constraints_pin_every_dependency() -> None:
    """All but torch (the Makefile's TORCH) are pinned to one version."""
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all("==" in line for line in lines)
    pinned = {line.partition("==")[0].replace("_", "-").lower(): Requirement(line) for line in lines}
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    for requirement in (Requirement(text) for group in groups for text in group):
        name = requirement.name.replace("_", "-").lower()
        if name in ("torch", "sparseopt"):
            continue
        assert name in pinned, name
        version = str(pinned[name].specifier).removeprefix("==")
        assert requirement.specifier.contains(version), f"{name}=={version} against {requirement}"


# ---- wheels ----------------------------------------------------------------------------------------------------------
def clean_copy(target: Path) -> Path:
    """The tree as a fresh clone would have it: no builds, no caches; edits not yet committed included."""
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    if listed.returncode != 0:
        pytest.skip("a clean copy is made with git, and this is no git checkout")
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():  # deleted but not yet committed otherwise
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target


def build(tree: Path, out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return run(
        *(
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "-v",
            "--no-deps",
            "--no-build-isolation",
            "--no-index",
            "-w",
            out,
            tree,
        ),
        cwd=tree.parent,
        **environment,
    )


def environment_with(wheel: Path, folder: Path) -> Path:
    """A clean virtual environment with the wheel and, through a .pth file, what the wheel depends on; its python."""
    made = run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    assert made.returncode == 0, made.stderr
    python = folder / "bin" / "python"
    installed = run(
        *(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel),
        cwd=folder.parent,
    )
    assert installed.returncode == 0, installed.stderr
    # Last, so that pip does not take the sparseopt of this environment for the one asked for. A .pth file in a folder
    # that a .pth file names is not read: an editable install here stays invisible there.
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).stdout.strip())
    outer = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site / "zz_dependencies.pth").write_text("\n".join(sorted(outer)) + "\n")
    return python


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clean_copy(tmp_path_factory.mktemp("tree") / "sparseopt-tree")


@pytest.fixture(scope="module")
def wheel(tree: Path) -> Path:
    result = build(tree, tree.parent / "wheels")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    (path,) = (tree.parent / "wheels").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environment_with(wheel, tmp_path_factory.mktemp("installed") / "venv")


@pytest.fixture(scope="module")
def plain_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built with SPARSEOPT_NO_EXT=1."""
    folder = tmp_path_factory.mktemp("plain")
    result = build(clean_copy(folder / "tree"), folder / "wheels", SPARSEOPT_NO_EXT="1")
    assert result.returncode == 0, result.stderr
    (path,) = (folder / "wheels").glob("*.whl")
    return path


@pytest.mark.slow
def test_wheel_contents(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"sparseopt"}
    assert len(tops) == 2
    for package in listed_packages():
        assert package.replace(".", "/") + "/__init__.py" in names
    for package in ("sparseopt", "sparseopt/trainers", "sparseopt/triton_kernels"):
        assert f"{package}/py.typed" in names
    assert [n for n in names if n.endswith(".so")] == [n for n in names if n.startswith("sparseopt/_C.")]
    assert len([n for n in names if n.endswith(".so")]) == 1
    # Nothing but modules, markers, the compiled kernels and the parts of a page: no sources, tests, results or settings.
    strange = {n for n in names if not n.endswith((".py", "py.typed", ".so")) and ".dist-info/" not in n}
    assert strange == {"sparseopt/runs/report.html", "sparseopt/runs/report.js"}
    expected = {
        path.relative_to(ROOT / folder).as_posix(): name.replace(".", "/")
        for folder, name in FOLDERS.items()
        for path in (ROOT / folder).rglob("*.py")
    }
    assert all(f"{package}/{inner}" in names for inner, package in expected.items())
    assert any(n.endswith("licenses/LICENSE") for n in names)


@pytest.mark.slow
def test_installed_wheel_works_from_elsewhere(python: Path, tmp_path: Path) -> None:
    result = run(python, "-W", "error::UserWarning:sparseopt", "-c", USE + "print(sparseopt.__file__)", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()).is_relative_to(python.parents[1])
    for package in listed_packages():
        if package != "sparseopt.trainers":  # imports what the extra `train` brings
            imported = run(python, "-c", f"import {package}", cwd=tmp_path)
            assert imported.returncode == 0, imported.stderr


@pytest.mark.slow
def test_installed_doctor(python: Path, tmp_path: Path) -> None:
    result = run(python.parent / "sparseopt", "doctor", "--json", cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads(result.stdout)
    assert Path(report["location"]).is_relative_to(python.parents[1])
    assert report["devices"][0]["backend"] == "cpp"
    assert all(device["self_check"] == "ok" for device in report["devices"])


@pytest.mark.slow
def test_doctor_sees_a_source_tree_that_hides_the_installed_kernels(python: Path, tree: Path) -> None:
    result = run(python, "-m", "sparseopt", "doctor", cwd=tree)
    assert result.returncode == 1
    assert "has no compiled kernels, while the installed package has them" in result.stdout
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_wheel_without_kernels_warns_once(plain_wheel: Path, tmp_path: Path) -> None:
    assert plain_wheel.name.endswith("py3-none-any.whl")
    assert not [n for n in zipfile.ZipFile(plain_wheel).namelist() if n.endswith(".so")]
    python = environment_with(plain_wheel, tmp_path / "venv")
    result = run(python, "-W", "always", "-c", USE, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("compiled CPU kernels are not installed") == 1
    assert "--no-build-isolation" in result.stderr
    forced = run(python, "-c", USE, cwd=tmp_path, SPARSEOPT_BACKEND="cpp")
    assert forced.returncode == 1
    assert "SPARSEOPT_BACKEND=cpp" in forced.stderr


@pytest.mark.slow
def test_build_environment_without_torch_still_makes_a_wheel(tmp_path: Path) -> None:
    """What plain ``pip install .`` does: an isolated environment that holds the build requirements and no torch."""
    tree = clean_copy(tmp_path / "tree")
    (tmp_path / "only").mkdir()
    site = Path(sysconfig.get_path("purelib"))
    for name in ("setuptools", "_distutils_hack", "wheel", "packaging"):
        for path in (site / name, *site.glob(f"{name}-*.dist-info")):
            if path.exists():
                (tmp_path / "only" / path.name).symlink_to(path)
    code = (
        "import sys\n"
        f"sys.path.insert(0, {str(tmp_path / 'only')!r})\n"
        "from setuptools import build_meta\n"
        f"print(build_meta.build_wheel({str(tmp_path)!r}))\n"
    )
    # -I -S: the base interpreter's own packages stay out, too.
    result = run(sys.executable, "-I", "-S", "-c", code, cwd=tree)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().endswith("py3-none-any.whl")
    assert "torch is not importable in the build environment" in result.stderr


@pytest.mark.slow
def test_a_compile_error_fails_the_build(tmp_path: Path) -> None:
    tree = clean_copy(tmp_path / "tree")
    for source in (tree / "csrc").glob("*.cpp"):
        source.write_text("#error injected by the test\n")
    result = build(tree, tmp_path / "wheels")
    assert result.returncode != 0
    assert "injected by the test" in result.stdout + result.stderr
    assert not list(tmp_path.rglob("*.whl"))


@pytest.mark.slow
def test_kernels_that_cannot_be_loaded_are_an_error(wheel: Path, tmp_path: Path) -> None:
    python = environment_with(wheel, tmp_path / "venv")
    (module,) = (tmp_path / "venv").rglob("sparseopt/_C*.so")
    module.write_bytes(b"not a shared library")
    result = run(python, "-c", USE, cwd=tmp_path)
    assert result.returncode == 1
    assert "installed but cannot be loaded" in result.stderr
    doctor = run(python.parent / "sparseopt", "doctor", cwd=tmp_path)
    assert doctor.returncode == 1
    assert "Problem: sparseopt's compiled kernels are installed but cannot be loaded" in doctor.stdout
    forced = run(python, "-c", USE, cwd=tmp_path, SPARSEOPT_BACKEND="reference")
    assert forced.returncode == 0, forced.stderr
