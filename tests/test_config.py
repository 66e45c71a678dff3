"""Defaults, files, overrides and flags: who wins, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparseopt.config import OverrideError, defaults, load
from sparseopt.schemas import DPO, FLAGS, METHODS


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_defaults_are_valid_and_are_copies() -> None:
    settings = load(DPO)
    assert settings == defaults(DPO)
    settings["data"]["options"]["x"] = 1
    assert defaults(DPO)["data"]["options"] == {}


def test_every_flag_names_a_setting() -> None:
    for schema in METHODS.values():
        assert all(key.split(".")[1] in schema[key.split(".")[0]] for key in FLAGS.values())


@pytest.mark.parametrize(
    "file",
    [
        ("c.yaml", "optimizer:\n  learning_rate: 6e-4\ntraining:\n  n_steps: 7\n  seed: 1\n"),
        ("c.toml", "[optimizer]\nlearning_rate = 6e-4\n[training]\nn_steps = 7\nseed = 1\n"),
    ],
)
def test_the_later_source_wins(tmp_path: Path, file: tuple[str, str]) -> None:
    path = write(tmp_path / file[0], file[1])
    settings = load(DPO, path)
    assert settings["optimizer"]["learning_rate"] == 6e-4
    settings = load(DPO, path, ["training.n_steps=8", "training.seed=2"], {"training.n_steps": 9, "data.name": None})
    assert settings["training"]["n_steps"] == 9
    assert settings["training"]["seed"] == 2
    assert settings["data"]["name"] == defaults(DPO)["data"]["name"]


@pytest.mark.parametrize(("text", "number"), [("6e-4", 6e-4), ("1", 1.0), ("1.5E-3", 1.5e-3), (".5", 0.5)])
def test_numbers_of_overrides(text: str, number: float) -> None:
    value = load(DPO, None, [f"optimizer.learning_rate={text}"])["optimizer"]["learning_rate"]
    assert value == number
    assert isinstance(value, float)


def test_lists_null_free_form_and_interpolations(tmp_path: Path) -> None:
    path = write(tmp_path / "c.yml", "data:\n  n_eval: ${training.batch_size}\n  options: {terms: 3}\n")
    settings = load(DPO, path, ["mask.exclude=[embed,lm_head]", "model.revision=null", "data.options.digits=2"],
                    {"training.batch_size": 5})  # fmt: skip
    assert settings["mask"]["exclude"] == ["embed", "lm_head"]
    assert settings["model"]["revision"] is None
    assert settings["data"]["options"] == {"terms": 3, "digits": 2}
    assert settings["data"]["n_eval"] == 5


def test_unknown_keys_of_a_file_warn_with_a_suggestion(tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", "optimizer:\n  learing_rate: 1\nwandb:\n  project: x\n")
    with pytest.warns(UserWarning, match="It is ignored") as caught:
        settings = load(DPO, path)
    texts = [str(w.message) for w in caught]
    assert any("'optimizer.learing_rate': did you mean 'optimizer.learning_rate'?" in t for t in texts)
    assert any("'wandb.project'" in t for t in texts)
    assert settings == defaults(DPO)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.n_stesp=3", "did you mean 'training.n_steps'?"),
        ("n_steps=3", "section.key=value"),
        ("training.n_steps", "section.key=value"),
        ("training.n_steps=1.5", "training.n_steps must be of type int, got 1.5"),
        ("training.n_steps=true", "must be of type int"),
        ("training.resume=1", "must be of type bool"),
        ("training.n_steps=null", "must be of type int, got None"),
        ("mask.method=magic", "must be one of gradient, random"),
        ("training.n_steps=[1", "--set"),
    ],
)
def test_bad_overrides(override: str, words: str) -> None:
    with pytest.raises(OverrideError) as caught:
        load(DPO, None, [override])
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("c.yaml", "training: [1, 2]\n", "Section 'training' must hold keys"),
        ("c.yaml", "- 1\n", "must hold sections"),
        ("c.yaml", "a: {b\n", "not valid YAML"),
        ("c.toml", "a = = 1\n", "not valid TOML"),
        ("c.json", "{}", "ends in .yaml, .yml or .toml"),
        ("c.yaml", "training:\n  n_steps: ${no.such}\n", "cannot be resolved"),
        ("c.yaml", "training:\n  n_steps: many\n", "training.n_steps must be of type int"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, text: str, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        load(DPO, write(tmp_path / name, text))
    assert words in str(caught.value)
    assert not isinstance(caught.value, OverrideError)


def test_absent_file_and_empty_section(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.yaml"):
        load(DPO, tmp_path / "absent.yaml")
    assert load(DPO, write(tmp_path / "c.yaml", "training:\n  # n_steps: 3\n")) == defaults(DPO)
    assert load(DPO, write(tmp_path / "e.yaml", "")) == defaults(DPO)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("10:80:10", "10:80:10"),
        ("10,20", "10,20"),
        ("every:5", "every:5"),
        ("12", "12"),
        ("1:30", "1:30"),
        ("none", "none"),
    ],
)
def test_schedules_stay_text(tmp_path: Path, text: str, value: str) -> None:
    """YAML 1.1 would read 10:80:10 as a number in base 60."""
    path = write(tmp_path / "c.yaml", f"delta_log:\n  schedule: {text}\n")
    assert load(DPO, path)["delta_log"]["schedule"] == value
    assert load(DPO, None, [f"delta_log.schedule={text}"])["delta_log"]["schedule"] == value


@pytest.mark.parametrize(
    ("text", "number"),
    [("7", 7), ("-3", -3), ("1_000", 1000), ("0x10", 16), ("+4", 4), ("1.", 1.0), ("-1e3", -1000.0), (".5e-2", 0.005)],
)
def test_numbers(text: str, number: float) -> None:
    value = load(DPO, None, [f"data.options.x={text}"])["data"]["options"]["x"]
    assert value == number
    assert type(value) is type(number)


def test_a_key_that_is_there_twice_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", "training:\n  n_steps: 3\n  n_steps: 4\n")
    with pytest.raises(ValueError, match="'n_steps' is there twice"):
        load(DPO, path)
