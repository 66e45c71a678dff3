"""``sparseopt runs report``: the page's numbers, and what a real browser makes of them."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from browser import browser
from typer.testing import CliRunner

import sparseopt as so
from sparseopt.cli._main import app
from sparseopt.runs.report import page, sweep_data

HOSTILE = "</script><script>document.title='hacked'</script><img src=x onerror=\"document.title='hacked'\">&amp;\u2028'"


@pytest.fixture
def manager(tmp_path: Path) -> so.RunManager:
    """A sweep of learning rate and model, of which one run failed and one diverged, and another sweep."""
    manager = so.RunManager(tmp_path / "saved_models")
    runs = [
        (6e-4, "gpt2", 2.5),
        (6e-5, "gpt2", 3.5),
        (6e-4, HOSTILE, 2.0),
        (6e-3, HOSTILE, math.nan),
        (6e-3, "gpt2", None),
    ]
    for number, (rate, model, loss) in enumerate(runs):
        run_id = f"run{number}"
        config = {"training": {"learning_rate": rate, "seed": 1}, "model": {"name": model}, "run": {"name": HOSTILE}}
        manager.register_run(run_id, config, sweep_name="rates & <models>")
        if loss is None:
            manager.finish_run(run_id, "failed", HOSTILE)
            continue
        manager.update_metrics(run_id, {"final_valid_loss": loss, HOSTILE: number, "train_seconds": 1.5})
        manager.finish_run(run_id)
        entries: list[dict[str, Any]] = [
            {"step": step, "loss": 5 - step / 500, HOSTILE: 1.0} for step in range(0, 1000, 5)
        ]
        entries += [{"step": step, "eval_loss": 5 - step / 400, "epoch": 1} for step in range(100, 1001, 100)]
        (manager.base_dir / run_id / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    manager.register_run("other", {"a": 1}, sweep_name="other")
    return manager


class Tags(HTMLParser):
    """Every tag of a page, with its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_data(manager: so.RunManager) -> None:
    data = sweep_data(manager, "rates & <models>")
    assert data["settings"] == [
        "training.learning_rate",
        "model.name",
    ]
    assert [run["result"] for run in data["runs"]][:3] == [2.5, 3.5, 2.0]
    assert (data["best"], data["runs"][4]["result"], data["runs"][4]["error"]) == ("run2", None, HOSTILE)
    assert data["series"] == ["eval_loss", "loss", HOSTILE]
    assert data["summary"].startswith("5 runs: 4 finished, 1 failed. Best final_valid_loss: 2 with ")
    assert data["runs"][0]["curves"]["eval_loss"][0] == [100, 4.75]
    assert sweep_data(manager, "rates & <models>", HOSTILE, maximize=True)["best"] == "run3"
    with pytest.raises(ValueError, match="has the metric 'accuracy'; there are final_valid_loss, "):
        sweep_data(manager, "rates & <models>", "accuracy")
    with pytest.raises(FileNotFoundError, match=r"belongs to a sweep 'none'; there are other, rates & <models>\."):
        sweep_data(manager, "none")
    assert sweep_data(manager, "other")["best"] is None
    assert data["runs"][3]["result"] is None  # NaN is no result, and is shown as what it is


def test_long_curves_are_thinned(manager: so.RunManager) -> None:
    lines = [json.dumps({"step": step, "loss": step}) + "\n" for step in range(12_346)]
    (manager.base_dir / "run0" / "log.jsonl").write_text("".join(lines))
    points = sweep_data(manager, "rates & <models>")["runs"][0]["curves"]["loss"]
    assert len(points) <= 1001
    assert (points[0], points[-1]) == ([0, 0], [12_345, 12_345])


def test_nothing_of_a_user_becomes_markup(manager: so.RunManager) -> None:
    text = page(sweep_data(manager, "rates & <models>"))
    assert "<title>Sweep rates &amp; &lt;models&gt;</title>" in text
    tags = Tags(text).found
    assert [attributes.get("id") for tag, attributes in tags if tag == "script"] == ["data", None]
    assert not [tag for tag, _ in tags if tag in ("img", "iframe", "object", "base", "form")]
    assert not [name for _, attributes in tags for name in attributes if name.startswith("on")]
    links = [value for _, attributes in tags for name, value in attributes.items() if name in ("src", "href")]
    assert links == ["data:,"]
    assert re.findall(r"https?://[^\"' )]+", text) == ["http://www.w3.org/2000/svg"]
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    assert json.loads(found[1])["runs"][0]["run_name"] == HOSTILE


def test_command(manager: so.RunManager, tmp_path: Path) -> None:
    def call(*words: str) -> Any:
        return CliRunner().invoke(app, ["runs", "report", *words, "--base_dir", str(manager.base_dir)])

    result = call("rates & <models>")
    assert result.exit_code == 0, result.stderr
    written = manager.base_dir / "sweeps" / "rates & <models>.html"
    assert result.stdout.splitlines()[-1] == str(written)
    assert written.read_text().startswith("<!doctype html>")
    result = call("other", "--output", str(tmp_path / "x.html"), "--json")
    assert json.loads(result.stdout) == {"output": str(tmp_path / "x.html"), "runs": 1, "best": None}
    assert "There is no folder of runs" in CliRunner().invoke(app, ["runs", "report", "x", "--base_dir", "none"]).stderr


@pytest.mark.slow
def test_in_a_browser(manager: so.RunManager, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(page(sweep_data(manager, "rates & <models>")))
    with browser() as window:
        window.open(path)
        assert window.messages() == []
        # Drawn: a curve of each run that logged one, a line of each run, a row of each run, the best first.
        assert window.run("return document.querySelectorAll('#curves path.run').length") == 4
        assert window.run("return document.querySelectorAll('#parallel path.run').length") == 5
        assert window.run("return document.querySelectorAll('#parallel path.none').length") == 2
        rows = "return [...document.querySelectorAll('#table tbody tr')].map((row) => row.dataset.run)"
        assert window.run(rows) == ["run2", "run0", "run1", "run3", "run4"]
        assert window.run("return document.querySelector('tr.best').dataset.run") == "run2"
        for css in ("#curves", "#parallel", "#table"):
            assert window.run(f"return document.querySelector('{css}').getBoundingClientRect().height") > 100
        # Lines are apart: different runs end at different heights.
        lines = "return [...document.querySelectorAll('#parallel path.run:not(.none)')]"
        ends = f"{lines}.map((line) => line.getAttribute('d').split(' ').pop())"
        assert len(set(window.run(ends))) == 3
        assert "nan" in window.run("return document.querySelector('#table tr[data-run=run3]').textContent")
        # Nothing of a user runs or becomes an element, and nothing is loaded.
        assert window.run("return document.title") == "Sweep rates & <models>"
        assert window.run("return document.querySelectorAll('img').length") == 0
        assert window.run("return performance.getEntriesByType('resource').length") == 0
        assert HOSTILE in window.run("return [...document.querySelectorAll('td')].map((cell) => cell.title)")
        # Tooltips, and the run in both pictures and the table.
        window.point_at("#table tbody tr:nth-child(2)")
        assert window.run("return [...document.querySelectorAll('.hot')].map((e) => e.dataset.run)") == ["run0"] * 3
        window.point_at("#curves", 200, 0)
        tip = "return [document.getElementById('tip').style.display, document.getElementById('tip').textContent]"
        shown, text = window.run(tip)
        assert shown == "block"
        assert re.match(r"step \d+: eval_loss ", text)
        assert "training.learning_rate = " in text
        window.screenshot(tmp_path / "report.png")
        window.point_at("h1")
        assert window.run(tip)[0] == "none"
        # Sorting, another curve, other colors.
        window.click("#table th:nth-child(4)")
        assert window.run(rows)[0] == "run1"
        window.click("#table th:nth-child(4)")
        assert set(window.run(rows)[:2]) == {"run3", "run4"}
        first = "return document.querySelector('#curves path.run').getAttribute('{}')"
        before = window.run(first.format("d")), window.run(first.format("stroke"))
        find = "const box = document.getElementById(arguments[0]);"
        change = f"{find} box.value = arguments[1]; box.dispatchEvent(new Event('change'))"
        window.run(change, "series", "loss")
        window.run(change, "color", "model.name")
        window.click("#log")
        assert window.run(first.format("d")) != before[0]
        assert window.run(first.format("stroke")) != before[1]
        assert window.run("return document.querySelectorAll('#curves path.run').length") == 4
        assert window.messages() == []
        # A sweep of one run that has logged nothing.
        path.write_text(page(sweep_data(manager, "other")))
        window.open(path)
        assert "No run has logged anything" in window.run("return document.getElementById('curves').textContent")
        assert window.run("return document.querySelectorAll('#table tbody tr').length") == 1
        assert window.messages() == []
    image = (tmp_path / "report.png").read_bytes()
    assert image.startswith(b"\x89PNG")
    assert len(image) > 30_000
