"""Snippets of pages that promise to run do run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


def test_page_on_masks_runs_and_says_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    text = (ROOT / "docs" / "which_mask.md").read_text()
    snippets = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert snippets
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    for snippet in snippets:
        exec(compile(snippet, "docs/which_mask.md", "exec"), found)
    assert not list(tmp_path.iterdir())
    shown = capsys.readouterr().out
    assert "column: " in shown
    assert "SparseLinear(0 layers by row, " in shown
    # Nothing is left of the structured layers after `with`.
    assert type(found["model"].model.layers[0].mlp.up_proj).__module__ == "torch.nn.modules.linear"

    # Figures of the page are those of the table that it links to.
    table = (ROOT / "docs" / re.findall(r"\((\.\./[^)]*granularity\.md)\)", text)[0]).resolve().read_text()
    rows = {line.split(" | ")[0].lstrip("| "): line.split(" | ") for line in table.splitlines() if line.startswith("|")}
    for name in ("single entries", "runs of 16", "columns", "rows", "auto"):
        paragraph = re.search(rf"\*\*{name.capitalize()}\*\*(.*?)\n\n", text, re.DOTALL)
        assert paragraph is not None
        share, learned, bar = rows[name][1:4]
        assert share in paragraph[1]
        if learned == "not measured":
            assert "was measured" in paragraph[1]
        else:
            assert learned.partition(" ")[0] in paragraph[1]
        assert ("below LoRA" in paragraph[1]) == bar.endswith("below")
        assert bar.partition(" ")[0] in paragraph[1] or bar == "met"
