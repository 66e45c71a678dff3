"""A fine-tuning that stops is continued to the same weights, masks and history."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from finetuning import finetune, first_masks, metrics, records, same_weights, text

from sparseopt.trainers import finetune_callbacks


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "chain.txt"
    path.write_text(text())
    return path


class _Killed(RuntimeError):
    pass


@pytest.fixture
def killed_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes a run die after a step; 0: never."""
    original = finetune_callbacks.MaskHistory.on_step_end

    def at(step: int) -> None:
        def on_step_end(self: Any, args: Any, state: Any, control: Any, **kw: Any) -> None:
            original(self, args, state, control, **kw)
            if step and state.global_step == step:
                raise _Killed

        monkeypatch.setattr(finetune_callbacks.MaskHistory, "on_step_end", on_step_end)

    return at


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"target": "updates", "dropped": "rewind"},
        pytest.param({"sparsity_type": "2:4", "sparsity_ratio": 0.5}, marks=pytest.mark.slow),
        pytest.param({"policy": "gradual", "distribution": "erk", "dropout": 0.2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_resumed_run_has_the_same_weights(
    tiny_folder: Path, text_file: Path, tmp_path: Path, killed_at: Callable[[int], None], changes: dict[str, Any]
) -> None:
    changes = {"save_steps": 3, **changes}
    straight = finetune(str(tiny_folder), text_file, tmp_path / "straight", **changes)
    folder = tmp_path / "killed"
    for step in (1, 5):  # before the first checkpoint, and behind one
        killed_at(step)
        with pytest.raises(_Killed):
            finetune(str(tiny_folder), text_file, folder, resume=step > 1, **changes)
    killed_at(0)
    with pytest.raises(ValueError, match="holds an unfinished run"):
        finetune(str(tiny_folder), text_file, folder, **changes)
    with pytest.raises(ValueError, match=r"sparsity.mask_update_interval is 3, but .* began with 2"):
        finetune(str(tiny_folder), text_file, folder, resume=True, **{**changes, "mask_update_interval": 3})
    resumed = finetune(str(tiny_folder), text_file, folder, resume=True, **changes)
    assert same_weights(resumed, straight)
    assert first_masks(folder) == first_masks(tmp_path / "straight")
    assert records(folder) == records(tmp_path / "straight")
    assert [(e["step"], e["loss"]) for e in metrics(folder)] == [
        (e["step"], e["loss"]) for e in metrics(tmp_path / "straight")
    ]
    results = [json.loads((f / "results.json").read_text()) for f in (folder, tmp_path / "straight")]
    assert results[0]["before"] == results[1]["before"]
    assert results[0]["after"] == results[1]["after"]
    with pytest.raises(ValueError, match="is finished, there is nothing to resume"):
        finetune(str(tiny_folder), text_file, folder, resume=True, **changes)


def test_other_data_do_not_resume(tiny_folder: Path, tmp_path: Path, killed_at: Callable[[int], None]) -> None:
    path = tmp_path / "data.txt"
    path.write_text(text(2000))
    killed_at(4)
    with pytest.raises(_Killed):
        finetune(str(tiny_folder), path, tmp_path / "run", save_steps=3)
    path.write_text(text(1999))
    with pytest.raises(ValueError, match="the data are not those that the run in"):
        finetune(str(tiny_folder), path, tmp_path / "run", save_steps=3, resume=True)
