"""The benchmark report: what is stored, judged and shown; and the suites run, at a small size."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from sparseopt import FormatError
from sparseopt.benchmarks import report

ENVIRONMENT = {"device": "Some CPU (R) 3.0", "cores": 2, "threads": 2, "torch": "2.13"}


def raw(scale: float = 1.0) -> dict[str, Any]:
    """What pytest-benchmark writes, as far as it is read; times in seconds."""
    return {
        "datetime": "2030-01-02T03:04:05+00:00",
        "commit_info": {"id": "abc123", "dirty": True},
        "machine_info": {"node": "a-host-name"},
        "benchmarks": [
            {
                "name": "test_step[sparse]",
                "fullname": "benchmarks/bench_optimizer.py::test_step[sparse]",
                "stats": {"data": [0.001, 0.002, 0.003, 0.004, 0.010]},
                "extra_info": {
                    "case": "sparse",
                    "baselines": {"torch fused": [0.009, 0.012, 0.015], "eager": [0.006, 0.006, 0.006]},
                    "bars": {"torch fused": 3, "eager": 4, "state": 20},
                    "facts": {"state": 26.7},
                    "scale": scale,
                    "environment": ENVIRONMENT,
                    "checked": True,
                },
            }
        ],
    }


@pytest.fixture
def readme(tmp_path: Path) -> Path:
    path = tmp_path / "README.md"
    path.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    return path


def test_summary_has_medians_quantiles_ratios_and_judged_bars() -> None:
    summary = report.summarize(raw(), "make bench")
    assert summary["suite"] == "optimizer"
    assert (summary["date"], summary["commit"]) == ("2030-01-02", "abc123 with changes")
    case = summary["cases"]["sparse"]
    assert case["sparseopt"] == {"median": 3.0, "p20": pytest.approx(1.8), "p80": pytest.approx(5.2)}
    assert {n: b["ratio"] for n, b in case["baselines"].items()} == {"torch fused": 4.0, "eager": 2.0}
    assert {n: (b["measured"], b["met"]) for n, b in case["bars"].items()} == {
        "torch fused": (4.0, True), "eager": (2.0, False), "state": (26.7, True),
    }  # fmt: skip
    assert "a-host-name" not in json.dumps(summary)


def test_unchecked_or_mixed_results_are_refused() -> None:
    unchecked = raw()
    del unchecked["benchmarks"][0]["extra_info"]["checked"]
    with pytest.raises(ValueError, match="did not pass its check"):
        report.summarize(unchecked, "")
    mixed = raw()
    mixed["benchmarks"].append(copy.deepcopy(mixed["benchmarks"][0]))
    mixed["benchmarks"][1]["fullname"] = "benchmarks/bench_masks.py::test_pack"
    with pytest.raises(ValueError, match="one suite"):
        report.summarize(mixed, "")


def test_files_that_are_no_results_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for text in ("{", "{}"):
        path.write_text(text)
        with pytest.raises(FormatError, match=r"x\.json is not a result"):
            report.read(path)


def test_main_stores_by_device_and_keeps_other_suites(tmp_path: Path, readme: Path) -> None:
    file, results = tmp_path / "run.json", tmp_path / "results"
    masks = json.loads(json.dumps(raw()).replace("bench_optimizer", "bench_masks"))
    options = ["--results", str(results), "--readme", str(readme)]
    for content in (raw(), masks, masks):
        file.write_text(json.dumps(content))
        assert report.main([str(file), *options]) == 0
    assert report.main([str(file), *options, "--check"]) == 1  # a bar is missed
    stored = json.loads((results / "some-cpu-r-3-0-2-threads.json").read_text())
    assert set(stored["suites"]) == {"optimizer", "masks"}
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith(f"{report.END}\nafter\n")
    assert "old" not in text
    assert text.count("| sparse | 3 (1.8-5.2) | 12 (10.2-13.8), **4x** | 6 (6-6), **2x** |") == 2
    assert "torch fused 3x: met; eager 4x: **missed**; state 20x: met (26.7x)" in text
    assert report.main(options) == 0  # writing the tables again changes nothing
    assert readme.read_text() == text


def test_reduced_sizes_are_neither_stored_nor_judged(tmp_path: Path, readme: Path) -> None:
    file, results = tmp_path / "run.json", tmp_path / "results"
    file.write_text(json.dumps(raw(scale=0.5)))
    assert report.summarize(raw(0.5), "")["cases"]["sparse"]["bars"] == {}
    assert report.main([str(file), "--results", str(results), "--readme", str(readme), "--check"]) == 0
    assert not results.exists()
    with pytest.raises(ValueError, match="not stored"):
        report.merge(report.summarize(raw(0.5), ""), results)


def test_a_readme_without_markers_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text("mine")
    with pytest.raises(FormatError, match="markers"):
        report.render(tmp_path, path)
    assert path.read_text() == "mine"


@pytest.mark.parametrize("suite", report.SUITES)
def test_suites_run_and_check_their_arms(suite: str) -> None:
    """Run as users do; every case compares its arms before and after."""
    pytest.importorskip("pytest_benchmark")
    summary = report.run_suite(suite, rounds=1, scale=0.001)
    assert summary["suite"] == suite
    assert len(summary["cases"]) >= 5
    for case in summary["cases"].values():
        assert len(case["baselines"]) >= 2
        assert case["sparseopt"]["median"] > 0


def test_a_failed_check_records_nothing(tmp_path: Path) -> None:
    """The timing helper itself: a wrong arm stops the case before the clock starts."""
    pytest.importorskip("pytest_benchmark")
    from sparseopt.benchmarks.interleaved import compare

    class Clock:
        extra_info: dict[str, Any] = {}  # noqa: RUF012

        def pedantic(self, *_: object, **__: object) -> None:
            pytest.fail("timed although the check failed")

    def check() -> None:
        raise AssertionError("arms differ")

    with pytest.raises(AssertionError, match="arms differ"):
        compare(Clock(), "case", lambda: 1, {"other": lambda: 2}, check=check)
    assert not Clock.extra_info


def test_unknown_suites_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown benchmark suite 'speed'; there are optimizer, masks"):
        report.run_suite("speed")
