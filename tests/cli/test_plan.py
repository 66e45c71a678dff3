"""``sparseopt plan``: the table, JSON, and errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sparseopt.cli._main import app

pytest.importorskip("transformers")


def invoke(*args: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["plan", *args])
    assert result.exit_code == code, result.output
    return result.output


def test_table_has_a_row_per_arm_and_a_conclusion() -> None:
    text = invoke("--shape", "llama-3.2-1b", "--batch", "2", "--seq", "256", "--gradient-checkpointing")
    assert text.startswith(
        "llama-3.2-1b (shape): 1,235,814,400 parameters; lm, 2 x 256 tokens, gradient checkpointing; H100"
    )
    rows = {line.split("  ")[0]: line for line in text.splitlines()}
    assert rows["dense AdamW"].split()[2:7] == ["1.24", "B", "2.30", "2.30", "4.60"]
    assert {"LoRA r=16", "sparse 2.5%", "columns 2.5%", "rows 2.5%"} <= rows.keys()
    assert "Fits in 8 GiB: LoRA r=16, sparse 2.5%, columns 2.5%, rows 2.5%; not dense AdamW (12 GiB)." in text
    assert "Columns and rows: sparse_linear; that share of every linear layer's weight" in text
    assert "Time is an estimate" in text


def test_json_of_a_local_model(tmp_path: Path) -> None:
    from sparseopt.shapes import shape_config

    shape_config("tiny").save_pretrained(tmp_path)
    options = ["--model", str(tmp_path), "--sparsity", "0.9", "--rank", "4", "--device", "rtx4090", "--json"]
    found = json.loads(invoke(*options))
    assert [arm["name"] for arm in found["arms"]] == [
        "dense AdamW",
        "LoRA r=4",
        "sparse 10%",
        "columns 10%",
        "rows 10%",
    ]
    assert (found["sparsity"], found["device"]["measured"]) == (0.9, False)
    assert found["arms"][0]["trained"] == found["model"]["parameters"]
    wider = json.loads(invoke(*options, "--adapters", "fp32", "--master", "fp32", "--embeddings", "--workload", "dpo"))
    assert wider["tokens"] == 2 * found["tokens"]
    assert wider["arms"][1]["state"] == 2 * found["arms"][1]["state"]
    assert wider["arms"][2]["trained"] == round(0.1 * found["model"]["parameters"])
    assert wider["arms"][3]["trained"] == found["arms"][3]["trained"]  # --embeddings is for single entries


def test_errors_are_one_sentence() -> None:
    assert "unknown shape 'x': expected one of llama-3.2-1b" in invoke("--shape", "x", code=1)
    assert "unknown device 'tpu': expected one of h100" in invoke("--shape", "tiny", "--device", "tpu", code=1)
    assert "does not exist" in invoke("--model", "./no/such/model", code=1)
    assert "give either --model or --shape" in invoke(code=2)
    assert "give either" in invoke("--model", "a", "--shape", "tiny", code=2)
    assert "must be bf16 or fp32" in invoke("--shape", "tiny", "--adapters", "int8", code=2)
    assert "--batch" in invoke("--shape", "tiny", "--batch", "0", code=2)
    assert "sparsity must be in [0, 1)" in invoke("--shape", "tiny", "--sparsity", "1", code=1)
