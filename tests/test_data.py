"""Preference pairs, prompts, rewards and files."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from sparseopt import FormatError
from sparseopt.data import (
    PromptStyle,
    extract_answer,
    load_preference_dataset,
    load_prompt_dataset,
    near_miss,
    preference_pairs,
    score,
    to_dataset,
    verifiable_reward,
)

TASKS = [
    ("word_sequence_reversal", {"min_words": 3, "max_words": 5}),
    ("number_sorting", {"max_numbers": 4}),
    ("word_sorting", {"max_words": 4}),
    ("spell_backward", {}),
    ("chain_sum", {}),
    ("letter_counting", {}),
    ("calendar_arithmetic", {"tasks": ["weekday_of_date"]}),
    ("syllogism", {}),
]


@pytest.mark.parametrize(("task", "options"), TASKS, ids=[task for task, _ in TASKS])
def test_chosen_is_right_and_rejected_is_wrong(task: str, options: dict[str, Any]) -> None:
    pairs = preference_pairs(task, 20, seed=3, task_config=options)
    assert len(pairs) == 20
    for pair in pairs:
        right, wrong = pair["chosen"][0]["content"], pair["rejected"][0]["content"]
        assert score(right, pair["entry"]) == 1.0
        assert score(wrong, pair["entry"]) < 1.0
        # A near miss cannot be told from the right answer by its length.
        assert abs(len(right) - len(wrong)) <= 6


def test_pairs_depend_on_the_seed_alone() -> None:
    first, again, other = (preference_pairs("word_sequence_reversal", 30, seed=s) for s in (1, 1, 2))
    assert first == again
    assert first != other
    # A longer draw begins with the shorter one.
    assert preference_pairs("word_sequence_reversal", 40, seed=1)[:30] == first


def test_splits_share_no_prompt_whatever_the_seeds() -> None:
    def prompts(seed: int, split: str, size: int) -> set[str]:
        pairs = preference_pairs("chain_sum", size, seed, split, task_config={"max_terms": 2, "max_digits": 2})
        found = {pair["prompt"][-1]["content"] for pair in pairs}
        assert len(found) == size
        return found

    held_out = prompts(0, "test", 100) | prompts(7, "test", 300)
    assert not held_out & prompts(0, "train", 1000)
    assert not held_out & prompts(8, "train", 500)


def test_prompt_style() -> None:
    style = PromptStyle(system="S", last_line=True, example=("q", "a"))
    roles = [("system", "S"), ("user", "q"), ("assistant", "a"), ("user", "last")]
    assert style.messages("first\n\nlast\n") == [{"role": r, "content": c} for r, c in roles]
    assert PromptStyle(system=None).messages(" x ") == [{"role": "user", "content": "x"}]


@pytest.mark.parametrize(
    ("answer", "possible"),
    [
        ("Yes", {"No"}),
        ("true", {"false"}),
        ("12", {"2", "10", "11", "13", "14", "22"}),
        ("1.5", {f"1.{d}" for d in "012346789"}),
        ("a, b", {"b, a"}),
        ("a, b, c", {"b, a, c", "a, c, b"}),
        ("['1', '2']", {"['2', '1']"}),
        ("to be", {"be to"}),
        ("ab", {"ba"}),
        ("Sunday", {"Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"}),
    ],
)
def test_near_misses(answer: str, possible: set[str]) -> None:
    assert {near_miss(answer, random.Random(seed)) for seed in range(300)} == possible


@pytest.mark.parametrize("answer", ["", "a", "aaa", "x, x", "[]"])
def test_no_near_miss(answer: str) -> None:
    assert near_miss(answer, random.Random(0)) is None


def test_wrong_tasks_and_options_are_named() -> None:
    with pytest.raises(ValueError, match="'no_such_task'"):
        preference_pairs("no_such_task", 1, 0)
    with pytest.raises(ValueError, match="max_words must be"):
        preference_pairs("word_sequence_reversal", 1, 0, task_config={"min_words": 5, "max_words": 2})
    with pytest.raises(ValueError, match="colour"):
        preference_pairs("word_sequence_reversal", 1, 0, task_config={"colour": 1})
    with pytest.raises(ValueError, match="'dev'"):
        preference_pairs("chain_sum", 1, 0, "dev")
    with pytest.raises(ValueError, match="at least 1"):
        preference_pairs("chain_sum", 0, 0)
    one_digit = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    with pytest.raises(ValueError, match="different pairs where 500 were asked for"):
        preference_pairs("chain_sum", 500, 0, task_config=one_digit)


ROWS = [{"prompt": f"p{i}", "chosen": "good", "rejected": "bad"} for i in range(5)]


def _write(path: Path, rows: list[dict[str, Any]]) -> str:
    from datasets import Dataset

    writers = {".jsonl": "to_json", ".parquet": "to_parquet", ".csv": "to_csv"}
    getattr(Dataset.from_list(rows), writers[path.suffix])(str(path))
    return str(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".csv"])
def test_local_files(tmp_path: Path, suffix: str) -> None:
    source = _write(tmp_path / f"pairs{suffix}", ROWS)
    assert list(load_preference_dataset(source)) == ROWS
    assert list(load_preference_dataset(source, size=2)) == ROWS[:2]
    with pytest.raises(ValueError, match="5 rows where 6"):
        load_preference_dataset(source, size=6)


def test_conversations_in_a_file_with_and_without_prompt(tmp_path: Path) -> None:
    rows = preference_pairs("chain_sum", 3, 0)
    source = _write(tmp_path / "pairs.jsonl", [{k: r[k] for k in ("prompt", "chosen", "rejected")} for r in rows])
    assert list(load_preference_dataset(source)) == list(to_dataset(rows))
    whole = [{k: r["prompt"] + r[k] for k in ("chosen", "rejected")} for r in rows]
    assert list(load_preference_dataset(_write(tmp_path / "whole.jsonl", whole))) == list(to_dataset(rows))


def test_file_errors(tmp_path: Path) -> None:
    lacking = _write(tmp_path / "lacking.jsonl", [{"prompt": "p", "good": "x"}])
    with pytest.raises(ValueError, match=r"lacks the columns chosen, rejected: .*found prompt, good"):
        load_preference_dataset(lacking)
    with pytest.raises(FileNotFoundError, match=r"nothing\.jsonl"):
        load_preference_dataset(str(tmp_path / "nothing.jsonl"))
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match="of no known kind"):
        load_preference_dataset(str(tmp_path / "notes.txt"))
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(FormatError, match=r"damaged\.parquet"):
        load_preference_dataset(str(tmp_path / "damaged.parquet"))
    (tmp_path / "damaged.jsonl").write_text('{"prompt": "p", "chosen"')
    with pytest.raises(FormatError, match=r"damaged\.jsonl"):
        load_preference_dataset(str(tmp_path / "damaged.jsonl"))
    with pytest.raises(ValueError, match="task_config"):
        load_preference_dataset(lacking, task_config={})


def test_hub_errors_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    for raised, said in ((ConnectionError("down"), "cannot be reached"), (DatasetNotFoundError("?"), "nor on the")):

        def load(*args: Any, error: Exception = raised, **kwargs: Any) -> None:
            raise error

        monkeypatch.setattr(datasets, "load_dataset", load)
        with pytest.raises(FileNotFoundError, match=said) as caught:
            load_preference_dataset("some/dataset")
        assert "some/dataset" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_reasoning_gym_as_a_source() -> None:
    data = load_preference_dataset("reasoning_gym:spell_backward", "test", size=10, seed=4)
    assert list(data) == list(to_dataset(preference_pairs("spell_backward", 10, 4, "test")))
    with pytest.raises(ValueError, match="size"):
        load_preference_dataset("reasoning_gym:spell_backward")


@pytest.mark.parametrize("task", ["chain_sum", "number_sorting"])
def test_prompts_and_rewards(task: str) -> None:
    train = load_prompt_dataset(f"reasoning_gym:{task}", size=50, seed=1)
    test = load_prompt_dataset(f"reasoning_gym:{task}", "test", size=50, seed=1)
    assert train.column_names == ["prompt", "answer", "entry"]
    assert not {p[-1]["content"] for p in train["prompt"]} & {p[-1]["content"] for p in test["prompt"]}
    columns = {name: list(train[name]) for name in train.column_names}
    right = [[{"role": "assistant", "content": f"So: <answer>{a}</answer>"}] for a in columns["answer"]]
    wrong = [near_miss(a, random.Random(0)) for a in columns["answer"]]
    assert verifiable_reward(right, **{k: v for k, v in columns.items() if k != "prompt"}) == [1.0] * 50
    assert max(verifiable_reward(wrong, columns["answer"], entry=columns["entry"])) < 1.0


def test_rewards_without_a_task(tmp_path: Path) -> None:
    source = tmp_path / "prompts.jsonl"
    source.write_text("\n".join(json.dumps({"prompt": "p", "answer": a}) for a in ("7", "x")))
    answers = list(load_prompt_dataset(str(source))["answer"])
    assert verifiable_reward([r"thus \boxed{7.0}", " x "], answers) == [1.0, 1.0]
    assert verifiable_reward(["8", "y"], answers) == [0.0, 0.0]
    with pytest.raises(ValueError, match="lacks the columns answer"):
        load_prompt_dataset(_write(tmp_path / "other.jsonl", [{"prompt": "p"}]))


def test_extract_answer() -> None:
    assert extract_answer("a <answer>1</answer> b <answer> 2\n</answer>") == "2"
    assert extract_answer(r"so \boxed{\frac{1}{2}}.") == r"\frac{1}{2}"
    assert extract_answer(" plain \n") == "plain"
