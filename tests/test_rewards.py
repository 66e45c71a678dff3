"""Reward functions, their composition, and the record of what was rewarded."""

from __future__ import annotations

import asyncio
import inspect
import io
import itertools
import json
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sparseopt import FormatError, models
from sparseopt.rewards import (
    BUILTIN,
    RecordedRewards,
    brevity_reward,
    completions_table,
    extract_answer,
    format_reward,
    gold_answer,
    load_rewards,
    math_reward,
    show_completions,
)


def said(*texts: str) -> list[list[dict[str, str]]]:
    return [[{"role": "assistant", "content": text}] for text in texts]


# ---- built-in --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("a <answer>1</answer> b <answer> 2\n</answer>", "2"),
        (r"first \boxed{1}, then \boxed{\frac{1}{\sqrt{2^{3}}}}.", r"\frac{1}{\sqrt{2^{3}}}"),
        (r"<answer>so \boxed{3}</answer>", "3"),
        (r"never closed \boxed{1", r"never closed \boxed{1"),
        (" plain \n", "plain"),
    ],
)
def test_extract_answer(text: str, answer: str) -> None:
    assert extract_answer(text) == answer


def test_gold_answer() -> None:
    assert gold_answer("3 + 4 = <<3+4=7>>7\n#### 7") == "7"
    assert gold_answer(r"thus $\boxed{\frac{1}{2}}$.") == r"\frac{1}{2}"
    assert gold_answer(" 12 ") == "12"


def test_format() -> None:
    texts = {
        "<answer>1</answer>": 1.0,
        "because\n<answer>\n1\n</answer>": 1.0,
        r"<answer>\boxed{1}</answer> as \boxed{1}": 1.0,
        r"so \boxed{1}": 1.0,
        "1": 0.0,
        "": 0.0,
        "<answer>1</answer><answer>2</answer>": 0.0,
        "</answer>1<answer>": 0.0,
        "<answer>1": 0.0,
        r"\boxed{1} or \boxed{2}": 0.0,
        r"<answer> \boxed{1}": 0.0,
        r"\boxed{1": 0.0,
    }
    assert format_reward(list(texts)) == list(texts.values())
    assert format_reward(said(*texts), answer=["x"] * len(texts)) == list(texts.values())


def test_brevity() -> None:
    assert brevity_reward(["", "x" * 500, "x" * 1000, "x" * 5000]) == pytest.approx([0.1, 0.05, 0, 0])
    assert brevity_reward(said("short")) > brevity_reward(said("a little longer"))


def test_math() -> None:
    pytest.importorskip("math_verify")
    cases = [
        (r"\frac{1}{2}", r"It is \boxed{0.5}.", 1.0),
        (r"\frac{1}{2}", r"It is \boxed{\frac{2}{4}}.", 1.0),
        (r"$\sqrt{8}$", r"<answer>2\sqrt{2}</answer>", 1.0),
        (r"x^2 + 2x + 1", r"\boxed{(x+1)^2}", 1.0),
        ("1,000", r"\boxed{1000}", 1.0),
        ("12", "The answer is 12.", 1.0),
        ("12", r"first \boxed{12}, no: \boxed{13}", 0.0),
        ("12", "no number at all", 0.0),
        ("12", "", 0.0),
        (r"\frac{1}{2}", r"\boxed{\frac{1}{3}}", 0.0),
    ]
    answers, texts, expected = map(list, zip(*cases, strict=True))
    assert math_reward(said(*texts), answer=answers) == expected
    assert math_reward(texts, answer=answers) == expected

    # Time limits are signals, which other threads may not set.
    found: list[Any] = []
    worker = threading.Thread(target=lambda: found.extend(math_reward(texts, answer=answers)))
    worker.start()
    worker.join()
    assert found == expected


def test_math_has_no_opinion_where_the_answer_is_no_expression() -> None:
    pytest.importorskip("math_verify")
    assert math_reward([r"\boxed{1}", r"\boxed{1}"], answer=["", "1"]) == [None, 1.0]


def test_math_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ImportError, match="pip install math-verify"):
        math_reward(["1"], answer=["1"])


# ---- composing -------------------------------------------------------------------------------------------------------
MINE = """
calls = []

def polite(completions, **columns):
    calls.append(sorted(columns))
    return [float("please" in (c if isinstance(c, str) else c[-1]["content"])) for c in completions]

def ones(completions, **columns):
    calls.append(sorted(columns))
    return [c.count("w1") / 6 for c in completions]

async def slow(completions, **columns):
    return [0.5] * len(completions)

class Judge:
    def __call__(self, completions, **columns):
        return tuple(0.25 for _ in completions)

judge = Judge()

def short(completions, **columns):
    return [1.0]

def words(completions, **columns):
    return ["good"] * len(completions)

def one(completions, **columns):
    return 1.0

def silent(completions, **columns):
    return [None] * len(completions)

constant = 3
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    path = tmp_path / "my_rewards.py"
    path.write_text(MINE)
    return path


def test_specs_weights_and_names(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(mine.parent))
    specs = ["answer", "0.2*format", "brevity * 3", f"{mine}:polite", "1e-1*my_rewards:silent", f"-0.5*{mine}:judge"]
    functions, weights, names = load_rewards(specs)
    assert weights == [1.0, 0.2, 3.0, 1.0, 0.1, -0.5]
    assert names == ["answer", "format", "brevity", "polite", "silent", "judge"]
    assert [f.__name__ for f in functions] == names
    columns = {"answer": ["7", "7"], "prompts": ["p", "p"], "trainer_state": None}
    results = [f(completions=["<answer>7</answer>", "please"], **columns) for f in functions]
    assert results[0] == [1.0, 0.0]
    assert results[1] == [1.0, 0.0]
    assert results[3:] == [[0.0, 1.0], [None, None], [0.25, 0.25]]
    assert functions[0].__doc__ == BUILTIN["answer"].__doc__


def test_one_spec_alone_and_equal_names(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(mine.parent))
    assert load_rewards("answer")[2] == ["answer"]
    assert load_rewards([f"{mine}:polite", "my_rewards:polite"])[2] == [f"{mine}:polite", "my_rewards:polite"]


def test_coroutines_stay_coroutines(mine: Path) -> None:
    (slow,), _, _ = load_rewards([f"{mine}:slow"])
    assert inspect.iscoroutinefunction(slow)
    assert asyncio.run(slow(completions=["a", "b"])) == [0.5, 0.5]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("specs", "kind", "message"),
    [
        ([], ValueError, "no reward functions: name at least one, such as answer, format, math, brevity"),
        (
            ["speed"],
            ValueError,
            "unknown reward 'speed': expected one of answer, format, math, brevity, module:function",
        ),
        (["answer*format"], ValueError, "'answer\\*format' is not understood: expected NAME or WEIGHT\\*NAME"),
        (["2*3*answer"], ValueError, "is not understood"),
        (["inf*answer"], ValueError, "is not understood"),
        (["0.2*"], ValueError, "is not understood"),
        (["answer", "0.5*answer"], ValueError, "'answer' is named twice"),
        (["no_such_module_here:f"], ImportError, "'no_such_module_here' of reward .* there is no such module"),
        (["json:no_such"], ValueError, "reward 'json:no_such' was not found: 'json' has no 'no_such'"),
        (["no/such/file.py:f"], FileNotFoundError, "no file 'no/such/file.py'"),
        (["MINE:constant"], TypeError, "constant' cannot be called: it is of type int"),
        (["MINE:absent"], ValueError, "has no 'absent'"),
    ],
)
def test_specs_that_are_refused(mine: Path, specs: list[str], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        load_rewards([spec.replace("MINE", str(mine)) for spec in specs])


def test_a_file_that_fails_is_not_kept(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("import no_such_module_here\n")
    with pytest.raises(ImportError, match="no_such_module_here"):
        load_rewards([f"{path}:f"])
    path.write_text("def f(completions, **columns):\n    return [1.0] * len(completions)\n")
    assert load_rewards([f"{path}:f"])[0][0](completions=["a"]) == [1.0]


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("short", ValueError, "'short' must return one value for each of 2 completions, got 1"),
        ("words", TypeError, "'words' must return numbers, got str"),
        ("one", TypeError, "'one' must return a list of numbers, got float"),
    ],
)
def test_wrong_results_are_named(mine: Path, name: str, kind: type[Exception], message: str) -> None:
    (function,), _, _ = load_rewards([f"{mine}:{name}"])
    with pytest.raises(kind, match=message):
        function(completions=["a", "b"])


# ---- the record ------------------------------------------------------------------------------------------------------
def recorded(path: Path, keep: int = 100, per_step: int = 2, names: tuple[str, ...] = ("format", "brevity")) -> Any:
    functions, _, found = load_rewards(list(names))
    return RecordedRewards(functions, found, path, keep, per_step)


def play(record: RecordedRewards, steps: range, batch: int = 8) -> None:
    for step in steps:
        state = SimpleNamespace(global_step=step, is_world_process_zero=True)
        texts = [f"\\boxed{{{step}}} of {i}" for i in range(batch)]
        for function in record.functions:
            values = function(prompts=[f"p{step}"] * batch, completions=said(*texts), trainer_state=state)
            assert len(values) == batch


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_is_recorded(tmp_path: Path) -> None:
    path = tmp_path / "run" / "completions.jsonl"
    play(recorded(path), range(3))
    rows = lines(path)
    assert [row["step"] for row in rows] == [0, 0, 1, 1, 2, 2]
    for row in rows:
        assert list(row) == ["step", "prompt", "completion", "rewards"]
        assert row["prompt"] == f"p{row['step']}"
        text = row["completion"][0]["content"]
        assert text.startswith(f"\\boxed{{{row['step']}}}")
        assert row["rewards"] == {"format": 1.0, "brevity": brevity_reward([text])[0]}
    assert len({json.dumps(row) for row in rows}) == 6


@pytest.mark.parametrize(("keep", "steps"), [(10, 100), (7, 33), (1, 9), (40, 20)])
def test_the_sample_is_bounded_and_even(tmp_path: Path, keep: int, steps: int) -> None:
    path = tmp_path / "completions.jsonl"
    record = recorded(path, keep)
    for step in range(steps):
        play(record, range(step, step + 1))
        assert len(lines(path)) <= keep
    found = sorted({row["step"] for row in lines(path)})
    if keep >= 7:
        gaps = {b - a for a, b in itertools.pairwise(found)}
        assert len(gaps) == 1
        assert found[-1] >= steps - max(gaps)
        assert len(lines(path)) > keep / 2 - 2


def test_zero_keeps_nothing_and_other_processes_write_nothing(tmp_path: Path) -> None:
    path = tmp_path / "completions.jsonl"
    play(recorded(path, 0), range(3))
    record = recorded(path)
    state = SimpleNamespace(global_step=0, is_world_process_zero=False)
    for function in record.functions:
        function(prompts=["p"], completions=["c"], trainer_state=state)
    assert not path.exists()


def test_a_resumed_run_continues_the_file(tmp_path: Path) -> None:
    path, whole = tmp_path / "completions.jsonl", tmp_path / "whole.jsonl"
    play(recorded(path), range(7))
    with path.open("a") as file:
        file.write('{"step": 6, "prom')  # killed while it wrote
    play(recorded(path), range(5, 10))
    play(recorded(whole), range(10))
    assert lines(path) == lines(whole)


def test_batches_of_one_step_and_missing_values(tmp_path: Path, mine: Path) -> None:
    path = tmp_path / "completions.jsonl"
    record = recorded(path, names=("format", f"{mine}:silent", f"{mine}:slow"))
    for _ in range(2):
        for function in record.functions:
            result = function(completions=["a", "b", "c"], prompts=["p"] * 3)
            if asyncio.iscoroutine(result):
                asyncio.run(result)
    assert [row["rewards"] for row in lines(path)] == [{"format": 0.0, "silent": None, "slow": 0.5}] * 4
    assert "| 1 | p |" in completions_table(path)


def test_names_must_differ(tmp_path: Path) -> None:
    functions, _, _ = load_rewards(["format", "brevity"])
    for names in (["format"], ["format", "format"]):
        with pytest.raises(ValueError, match="as many different names"):
            RecordedRewards(functions, names, tmp_path / "c.jsonl")
    with pytest.raises(ValueError, match="keep must be at least 0"):
        RecordedRewards(functions, ["a", "b"], tmp_path / "c.jsonl", -1)


def test_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "completions.jsonl"
    play(recorded(path), range(30))
    table = completions_table(path, limit=5)
    rows = table.splitlines()
    assert rows[0] == "| step | prompt | completion | format | brevity |"
    assert len(rows) == 2 + 5
    assert rows[2].startswith("| 0 | p0 | \\\\boxed{0} of ")
    assert rows[-1].startswith("| 29 | ")

    odd = {"step": 1, "prompt": "a|b\n\nc", "completion": "<b>*x*</b> [/red]" + "y" * 1000, "rewards": {"r": None}}
    path.write_text(json.dumps(odd) + "\n")
    last = completions_table(path).splitlines()[-1]
    assert last.startswith("| 1 | a\\|b<br>c | \\<b\\>\\*x\\*\\</b\\> \\[/red\\]yyy")
    assert last.endswith(" | - |")
    assert len(last) < 450

    plain, terminal = io.StringIO(), io.StringIO()
    show_completions(path, stream=plain)
    assert plain.getvalue() == completions_table(path)
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "120")
    show_completions(path, stream=terminal)
    assert "[/red]" in terminal.getvalue()
    assert "Sampled completions" in terminal.getvalue()


def test_files_that_are_no_record(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent"):
        completions_table(tmp_path / "absent.jsonl")
    path = tmp_path / "c.jsonl"
    path.write_text("")
    assert completions_table(path) == "No completions were recorded.\n"
    path.write_text('{"step": 1}\n')
    with pytest.raises(FormatError, match=r"line 1 of .* is no completion"):
        completions_table(path)


# ---- a real trainer --------------------------------------------------------------------------------------------------
def test_grpo_with_composed_rewards(tmp_path: Path, mine: Path, tiny_folder: Path) -> None:
    """Two steps of TRL's GRPOTrainer on a tiny model: a built-in reward and one of a user's file."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    functions, weights, names = load_rewards(["0.5*brevity", f"2*{mine}:ones"])
    record = RecordedRewards(functions, names, tmp_path / "completions.jsonl", keep=6, per_step=3)
    arguments = GRPOConfig(
        output_dir=str(tmp_path / "out"), max_steps=2, per_device_train_batch_size=4, num_generations=4, disable_tqdm=True,
        max_completion_length=6, reward_weights=weights, report_to=[], use_cpu=True, logging_steps=1, save_strategy="no", beta=0.0,
    )  # fmt: skip
    rows = [{"prompt": f"w{i} w{i + 1}", "answer": f"w{i}", "level": i} for i in range(8)]
    trainer = GRPOTrainer(
        model=models.load_model(str(tiny_folder)), args=arguments, train_dataset=Dataset.from_list(rows),
        reward_funcs=list(record.functions), processing_class=models.load_tokenizer(str(tiny_folder)),
    )  # fmt: skip
    trainer.train()

    logs = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert len(logs) == 2
    found = lines(tmp_path / "completions.jsonl")
    assert [row["step"] for row in found] == [0, 0, 0, 1, 1, 1]
    for entry in logs:
        means = [entry[f"rewards/{name}/mean"] for name in names]
        assert entry["reward"] == pytest.approx(sum(w * m for w, m in zip(weights, means, strict=True)), abs=1e-5)
    for row in found:
        assert list(row["rewards"]) == names
        assert row["rewards"]["brevity"] == pytest.approx(brevity_reward([row["completion"]])[0])
        assert row["rewards"]["ones"] == pytest.approx(row["completion"].count("w1") / 6)
    assert any(row["rewards"]["ones"] > 0 for row in found)
    # The user's function saw the data's columns.
    seen = next(module for module in sys.modules.values() if getattr(module, "__file__", None) == str(mine))
    assert {"prompts", "answer", "level"} <= set(seen.calls[-1])
