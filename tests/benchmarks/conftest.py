"""A tiny model with a chat template, pairs and prompts in files: real rows for the training-step benchmark."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

CHAT = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}assistant {% endif %}"


def words(first: int, count: int) -> str:
    return " ".join(f"w{(first + i) % 58}" for i in range(count))


@pytest.fixture(scope="session")
def folder(build_llama: Callable[..., Path]) -> Path:
    """A random Llama with dropout, of 64 positions, with a tokenizer of 64 words and a chat template."""
    return build_llama(words=["user", "assistant"], chat_template=CHAT)


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven pairs of conversations of different lengths."""
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = []
    for i in range(7):
        prompt = [{"role": "user", "content": words(i, 2 + i)}]
        answers = {
            side: [{"role": "assistant", "content": words(k * i, 1 + (i * k) % 5)}]
            for side, k in (("chosen", 3), ("rejected", 7))
        }
        rows.append({"prompt": prompt, **answers})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five prompts of plain text."""
    path = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": words(i, 2 + i), "answer": f"w{i}"}) + "\n" for i in range(5)))
    return path


@pytest.fixture(scope="session")
def command() -> Callable[..., list[str]]:
    """The arguments of a short run on the CPU."""

    def build(workload: str, model: Path | None, data: Path | str | None, *more: str) -> list[str]:
        base = ["--workload", workload, "--seq", "32", "--n_steps", "2", "--warmup", "1", "--device", "cpu"]
        base += ["--dtype", "float32", "--commit", "abc123"]
        base += ["--model", str(model)] if model else []
        base += ["--data", str(data)] if data else []
        base += ["--num_generations", "4", "--max_completion_length", "6"] if workload == "grpo" else []
        return [*base, *more]

    return build
