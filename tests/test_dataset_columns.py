"""Column layouts of real datasets: aliases, fixtures with exactly their columns, common layouts, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sparseopt.columns import ALIASES, MATH_SYSTEM
from sparseopt.data import (
    PromptStyle,
    load_preference_dataset,
    load_prompt_dataset,
    load_sft_dataset,
    score,
    verifiable_reward,
)

DATA = Path(__file__).parent / "data"
LOADERS = {"preference": load_preference_dataset, "prompt": load_prompt_dataset, "sft": load_sft_dataset}

# As the cards on the Hub list them.
LIGHT_R1 = ["conversations", "chosen", "rejected"]
OPENR1 = [
    *("problem", "solution", "answer", "problem_type", "question_type", "source", "uuid", "is_reasoning_complete"),
    *("generations", "correctness_math_verify", "correctness_llama", "finish_reasons", "correctness_count", "messages"),
]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# ---- the two of the aliases ------------------------------------------------------------------------------------------
def test_the_fixtures_have_exactly_the_real_columns() -> None:
    assert list(json.loads((DATA / "light_r1_dpo.json").read_text())[0]) == LIGHT_R1
    assert list(json.loads((DATA / "openr1_math.jsonl").read_text().splitlines()[0])) == OPENR1


def test_light_r1_preferences() -> None:
    data = load_preference_dataset(str(DATA / "light_r1_dpo.json"))
    assert data.column_names == ["prompt", "chosen", "rejected"]
    assert len(data) == 3
    assert data[0]["prompt"] == [user("What is 3 + 4?")]
    assert data[0]["chosen"] == [assistant("<think>\n3 + 4 = 7\n</think>\n\n\\boxed{7}")]
    assert data[0]["rejected"] == [assistant("<think>\n3 + 4 = 8\n</think>\n\n\\boxed{8}")]


def test_openr1_prompts() -> None:
    with pytest.warns(UserWarning, match="1 of 4 rows .* have no answer that could be verified"):
        data = load_prompt_dataset(str(DATA / "openr1_math.jsonl"))
    assert data["answer"] == ["7", "\\frac{3}{4}", "12"]
    assert data[0]["prompt"] == [system(MATH_SYSTEM), user("What is 3 + 4?")]
    # Plain values stay for reward functions; generations and conversations do not.
    assert set(data.column_names) >= {"prompt", "answer", "source", "problem_type", "uuid", "correctness_count"}
    assert not {"messages", "generations", "problem", "is_reasoning_complete"} & set(data.column_names)
    right = [[assistant(f"so \\boxed{{{answer}}}")] for answer in data["answer"]]
    columns = {name: list(data[name]) for name in data.column_names if name != "prompt"}
    assert verifiable_reward(right, **columns) == [1.0, 1.0, 1.0]


@pytest.mark.filterwarnings("ignore:1 of 4 rows")
def test_the_system_message_of_questions_can_be_chosen() -> None:
    source = str(DATA / "openr1_math.jsonl")
    assert load_prompt_dataset(source, style=PromptStyle(system="Be brief."))[0]["prompt"][0] == system("Be brief.")
    assert load_prompt_dataset(source, style=PromptStyle(system=None), size=2)["prompt"][1] == [
        user("Simplify $\\frac{6}{8}$.")
    ]
    with pytest.raises(ValueError, match="3 rows where 4"):
        load_prompt_dataset(source, size=4)


def test_supervised_openr1_and_light_r1() -> None:
    data = load_sft_dataset(str(DATA / "openr1_math.jsonl"))
    assert data.column_names == ["messages"]
    assert len(data) == 4
    assert [m["role"] for m in data[0]["messages"]] == ["user", "assistant"]
    sharegpt = load_sft_dataset(str(DATA / "light_r1_sft.json"), size=1)[0]["messages"]
    assert sharegpt == [user("What is 3 + 4?"), assistant("<think>\n3 + 4 = 7\n</think>\n\n\\boxed{7}")]


@pytest.mark.parametrize("alias", ["Light-R1", "light-r1", "OpenR1", "OPENR1"])
@pytest.mark.filterwarnings("ignore:1 of 4 rows")
def test_aliases_name_the_datasets_on_the_hub(alias: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    real, asked = datasets.load_dataset, []
    fixtures = {
        "qihoo360/Light-R1-DPOData": "light_r1_dpo.json",
        "qihoo360/Light-R1-SFTData": "light_r1_sft.json",
        "open-r1/OpenR1-Math-220k": "openr1_math.jsonl",
    }

    def load(name: str, **options: Any) -> Any:
        asked.append((name, options))
        return real("json", data_files=str(DATA / fixtures[name]), split="train")

    monkeypatch.setattr(datasets, "load_dataset", load)
    uses = ALIASES[alias.lower()]
    for use, loader in LOADERS.items():
        if use in uses:
            assert len(loader(alias)) >= 3
        else:
            with pytest.raises(ValueError, match=f"'{alias}' serves for .* training, not for {use}s"):
                loader(alias)
    assert asked == [(name, {"split": "train"}) for name in uses.values()]
    assert set(uses.values()) <= set(fixtures)


def test_a_folder_of_that_name_does_not_hide_the_alias(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    (tmp_path / "OpenR1").mkdir()
    monkeypatch.chdir(tmp_path)

    def load(name: str, **options: Any) -> Any:
        raise ConnectionError(name)

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(FileNotFoundError, match="'open-r1/OpenR1-Math-220k' is neither"):
        load_prompt_dataset("OpenR1")


# ---- common layouts --------------------------------------------------------------------------------------------------
HUMAN, GPT = {"from": "human", "value": "q"}, {"from": "gpt", "value": "good"}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"prompt": "q", "chosen": "good", "rejected": "bad", "score": 3},
            {"prompt": "q", "chosen": "good", "rejected": "bad"},
        ),
        (
            {"prompt": [user("q")], "chosen": [assistant("good")], "rejected": [assistant("bad")]},
            {"prompt": [user("q")], "chosen": [assistant("good")], "rejected": [assistant("bad")]},
        ),
        (  # UltraFeedback: a text, and whole conversations
            {"prompt": "q", "chosen": [user("q"), assistant("good")], "rejected": [user("q"), assistant("bad")]},
            {"prompt": [user("q")], "chosen": [assistant("good")], "rejected": [assistant("bad")]},
        ),
        (
            {"prompt": "q", "chosen": [assistant("good")], "rejected": [assistant("bad")]},
            {"prompt": [user("q")], "chosen": [assistant("good")], "rejected": [assistant("bad")]},
        ),
        (
            {"chosen": [user("q"), assistant("good")], "rejected": [user("q"), assistant("bad")]},
            {"prompt": [user("q")], "chosen": [assistant("good")], "rejected": [assistant("bad")]},
        ),
        (  # Anthropic's: texts that begin alike
            {"chosen": "Human: q\n\nAssistant: beach", "rejected": "Human: q\n\nAssistant: bad"},
            {"prompt": "Human: q\n\nAssistant: ", "chosen": "beach", "rejected": "bad"},
        ),
        (  # Orca's
            {"system": "s", "question": "q", "chosen": "good", "rejected": "bad"},
            {"prompt": [system("s"), user("q")], "chosen": [assistant("good")], "rejected": [assistant("bad")]},
        ),
        (
            {"conversations": [{"from": "system", "value": "s"}, HUMAN], "chosen": [GPT], "rejected": "bad"},
            {"prompt": [system("s"), user("q")], "chosen": [assistant("good")], "rejected": [assistant("bad")]},
        ),
        (
            {"messages": [user("q")], "chosen": assistant("good"), "rejected": assistant("bad")},
            {"prompt": [user("q")], "chosen": [assistant("good")], "rejected": [assistant("bad")]},
        ),
    ],
)
def test_preference_layouts(tmp_path: Path, row: dict[str, Any], expected: dict[str, Any]) -> None:
    assert list(load_preference_dataset(write(tmp_path / "rows.jsonl", [row, row]))) == [expected, expected]


@pytest.mark.parametrize(
    ("row", "prompt", "answer"),
    [
        ({"prompt": "p", "answer": "7"}, "p", "7"),
        ({"prompt": [user("p")], "answer": 7}, [user("p")], "7"),
        ({"question": "q", "answer": "So.\n#### 1,234"}, [system(MATH_SYSTEM), user("q")], "1,234"),
        ({"problem": " q ", "solution": r"\boxed{\frac{1}{2^{3}}}."}, [system(MATH_SYSTEM), user("q")], r"\frac{1}{2^{3}}"),
        ({"problem": "q", "solution": "long", "answer": "7"}, [system(MATH_SYSTEM), user("q")], "7"),
        ({"prompt": [user("p")], "ground_truth": "7"}, [user("p")], "7"),
        ({"messages": [system("s"), user("q"), assistant("a")], "answer": "7"}, [system("s"), user("q")], "7"),
        ({"conversations": [HUMAN], "answer": "7"}, [user("q")], "7"),
        ({"system": "s", "question": "q", "answer": "7"}, [system("s"), user("q")], "7"),
    ],
)  # fmt: skip
def test_prompt_layouts(tmp_path: Path, row: dict[str, Any], prompt: Any, answer: str) -> None:
    found = load_prompt_dataset(write(tmp_path / "rows.jsonl", [row]))[0]
    assert found["prompt"] == prompt
    assert found["answer"] == answer


def test_gsm8k() -> None:
    data = load_prompt_dataset(str(DATA / "gsm8k.jsonl"))
    assert data["answer"] == ["7", "2,000"]
    assert verifiable_reward(["<answer>7</answer>", r"\boxed{2000}"], data["answer"]) == [1.0, 1.0]
    learned = load_sft_dataset(str(DATA / "gsm8k.jsonl"))[0]
    assert learned["completion"][0]["content"].endswith("#### 7")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [user("q"), assistant("a")], "other": 1}, {"messages": [user("q"), assistant("a")]}),
        ({"conversations": [HUMAN, GPT]}, {"messages": [user("q"), assistant("good")]}),
        ({"prompt": "p", "completion": " c"}, {"prompt": "p", "completion": " c"}),
        ({"prompt": [user("q")], "completion": [assistant("a")]}, {"prompt": [user("q")], "completion": [assistant("a")]}),
        ({"prompt": "q", "completion": [assistant("a")]}, {"prompt": [user("q")], "completion": [assistant("a")]}),
        (
            {"instruction": "Add.", "input": "1 2", "output": "3"},
            {"prompt": [user("Add.\n\n1 2")], "completion": [assistant("3")]},
        ),
        ({"question": "q", "response": "a"}, {"prompt": [user("q")], "completion": [assistant("a")]}),
    ],
)  # fmt: skip
def test_supervised_layouts(tmp_path: Path, row: dict[str, Any], expected: dict[str, Any]) -> None:
    assert list(load_sft_dataset(write(tmp_path / "rows.jsonl", [row, row]))) == [expected, expected]


def test_supervised_reasoning_gym() -> None:
    data = load_sft_dataset("reasoning_gym:spell_backward", "test", size=5, seed=2)
    prompts = load_prompt_dataset("reasoning_gym:spell_backward", "test", size=5, seed=2)
    assert data.column_names == ["prompt", "completion"]
    assert list(data["prompt"]) == list(prompts["prompt"])
    for row, entry in zip(data, prompts["entry"], strict=True):
        assert score(row["completion"][0]["content"], json.loads(entry)) == 1.0


# ---- what is refused -------------------------------------------------------------------------------------------------
GOOD = {"prompt": "p", "chosen": "good", "rejected": "bad", "answer": "7", "completion": "c"}


@pytest.mark.parametrize("use", LOADERS)
def test_files_without_rows(tmp_path: Path, use: str) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"'.*empty\.jsonl' is empty"):
        LOADERS[use](str(tmp_path / "empty.jsonl"))
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ValueError, match=r"'.*list\.json' has no rows"):
        LOADERS[use](str(tmp_path / "list.json"))
    (tmp_path / "head.csv").write_text("prompt,chosen,rejected,answer,completion\n")
    with pytest.raises(ValueError, match=r"'.*head\.csv' has no rows"):
        LOADERS[use](str(tmp_path / "head.csv"))


@pytest.mark.parametrize(
    ("use", "lacking", "expected"),
    [("preference", "chosen, rejected", "prompt, chosen, rejected"), ("prompt", "answer", "prompt, answer")],
)
def test_missing_columns_are_named(tmp_path: Path, use: str, lacking: str, expected: str) -> None:
    source = write(tmp_path / "rows.jsonl", [{"prompt": "p", "text": "x"}])
    with pytest.raises(ValueError, match=f"lacks the columns {lacking}: expected {expected}, found prompt, text"):
        LOADERS[use](source)
    with pytest.raises(ValueError, match=r"lacks the columns completion: .* found prompt, text"):
        load_sft_dataset(source)
    with pytest.raises(ValueError, match=r"lacks the columns messages: .* found text"):
        load_sft_dataset(write(tmp_path / "text.jsonl", [{"text": "x"}]))


@pytest.mark.parametrize(
    ("use", "column"),
    [
        ("preference", "prompt"),
        ("preference", "rejected"),
        ("prompt", "prompt"),
        ("prompt", "answer"),
        ("sft", "completion"),
    ],
)
@pytest.mark.parametrize("empty", ["", "  ", None])
def test_empty_rows_are_named(tmp_path: Path, use: str, column: str, empty: Any) -> None:
    source = write(tmp_path / "rows.jsonl", [GOOD, GOOD, {**GOOD, column: empty}])
    with pytest.raises(ValueError, match=rf"Row 3 of dataset '.*rows\.jsonl' has an empty '{column}'\.$"):
        LOADERS[use](source)
    assert len(LOADERS[use](source, size=2)) == 2


@pytest.mark.parametrize(
    ("use", "row", "message"),
    [
        ("preference", {"chosen": [user("a"), assistant("b")], "rejected": [user("x"), assistant("c")]}, "nothing in common"),
        ("preference", {"chosen": "yes", "rejected": "no"}, "nothing in common"),
        ("preference", {"chosen": [user("a"), assistant("b")], "rejected": [user("a")]}, "ends within the other"),
        ("preference", {"chosen": [assistant("b")], "rejected": [assistant("c")]}, "answers without a prompt"),
        ("preference", {"messages": [user("")], "chosen": "a", "rejected": "b"}, "message without content in 'messages'"),
        ("sft", {"messages": [user("a")]}, "ends with a message of 'user'"),
        ("sft", {"messages": ["a"]}, "has str in 'messages' where messages are expected"),
        ("prompt", {"messages": [assistant("a")], "answer": "1"}, "has no question in 'messages'"),
        ("prompt", {"question": "q", "answer": "####"}, "has an empty 'answer'"),
    ],
)  # fmt: skip
def test_rows_that_make_no_sense(tmp_path: Path, use: str, row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"Row 1 of dataset .* {message}"):
        LOADERS[use](write(tmp_path / "rows.jsonl", [row]))


def test_nothing_to_verify_and_foreign_options(tmp_path: Path) -> None:
    row = {"problem": "q", "answer": "proof", "question_type": "proof"}
    with pytest.raises(ValueError, match="has no row whose answer could be verified"):
        load_prompt_dataset(write(tmp_path / "rows.jsonl", [row, row]))
    for loader in (load_prompt_dataset, load_sft_dataset):
        with pytest.raises(ValueError, match="task_config"):
            loader(str(DATA / "gsm8k.jsonl"), task_config={"max_words": 3})
