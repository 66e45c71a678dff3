"""Commands of benchmarks with bad input: one sentence, and no work done."""

from __future__ import annotations

import importlib

import pytest

NO_DEVICE = {
    "collector": ["--device", "tpu"],
    "dynamic_update": ["--device", "tpu"],
    "projection": ["--shape", "tiny", "--device", "tpu"],
}


@pytest.mark.parametrize(
    ("module", "given", "sentence"),
    [
        ("scale_out", ["--shape", "tiny"], "start it as above, with torchrun"),
        ("scale_out", ["--shape", "none"], "argument --shape: invalid choice: 'none'"),
        ("scale_out", ["--arms", "ddp dense,ddp"], "argument --arms: unknown arm 'ddp'"),
        ("scale_out", ["--density", "2"], "density must be a share in (0, 1]"),
        ("scale_out", ["--steps", "0"], "argument --steps: expected a whole number of at least 1, got '0'"),
        ("dynamic_update", ["--updates", "0"], "argument --updates: expected a whole number of at least 1, got '0'"),
        ("dynamic_learning", ["--output", "x", "--seq", "0"], "argument --seq: expected a whole number of at least 1"),
        ("collector", ["--mask_density", "0"], "argument --mask_density: density must be a share in (0, 1]"),
        *(
            (module, given, "device must be auto, cpu, cuda or cuda:N, got 'tpu'.")
            for module, given in NO_DEVICE.items()
        ),
    ],
)
def test_bad_input_is_named(
    module: str, given: list[str], sentence: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"sparseopt.benchmarks.{module}").main(given)
    assert ended.value.code == 2
    assert sentence in capsys.readouterr().err
