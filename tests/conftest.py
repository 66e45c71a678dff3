"""For all tests: fixed seeds, poisoned memory, a tiny model with its tokenizer, and no empty GPU run."""

from __future__ import annotations

import random
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

GPU_PASSED = pytest.StashKey[int]()

# A shell ignores SIGINT for what it starts in the background, and processes inherit that: none of ours could be interrupted.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _seeds_and_poison() -> Iterator[None]:
    """`torch.empty` returns NaNs (integers: their largest value), so that reading what nobody wrote shows.

    Where torch is not imported yet there is nothing to do: tests of the lean import stay lean.
    """
    random.seed(0)
    if "torch" not in sys.modules:
        yield
        return
    import torch

    torch.manual_seed(0)
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    # Filling belongs to this mode. warn_only: other ops keep working as users run them.
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(scope="session")
def build_llama(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes a random Llama (hidden 32, tied embedding, 64 positions) and a tokenizer of 64 words into a folder."""

    def build(words: Sequence[str] = (), attention_dropout: float = 0.1, **tokenizer: Any) -> Path:
        """``words``: of the tokenizer, before w0, w1, ...; ``tokenizer``: more arguments of it."""
        import torch
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

        folder = tmp_path_factory.mktemp("models") / "tiny-llama"
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, pad_token_id=0, bos_token_id=1,
            eos_token_id=2, attention_dropout=attention_dropout,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder)
        known = ["<pad>", "<s>", "</s>", "<unk>", *words]
        known += [f"w{i}" for i in range(config.vocab_size - len(known))]
        backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        PreTrainedTokenizerFast(
            tokenizer_object=backend,
            pad_token="<pad>",
            bos_token="<s>",
            eos_token="</s>",
            unk_token="<unk>",
            **tokenizer,
        ).save_pretrained(folder)
        return folder

    return build


@pytest.fixture(scope="session")
def tiny_folder(build_llama: Callable[..., Path]) -> Path:
    """A random Llama with dropout and a tokenizer of w0 to w59."""
    return build_llama()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of slow tests in several processes, files with the longest time limits begin first: at the end nobody waits for one."""
    if not hasattr(config, "workerinput") or not config.option.markexpr.startswith("slow"):
        return
    limits: dict[Path, float] = {}
    for item in items:
        marker = item.get_closest_marker("timeout")
        limits[item.path] = max(limits.get(item.path, 0.0), marker.args[0] if marker else 0.0)
    items.sort(key=lambda item: -limits[item.path])


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    if report.when == "call" and report.passed and item.get_closest_marker("gpu"):
        item.config.stash[GPU_PASSED] = item.config.stash.get(GPU_PASSED, 0) + 1


def pytest_sessionfinish(session: pytest.Session) -> None:
    """`pytest -m gpu` beside a GPU fails when no GPU test passed: skipping everything is no success."""
    if session.config.option.markexpr.strip() != "gpu" or session.config.option.collectonly:
        return
    import torch

    if torch.cuda.is_available() and not session.config.stash.get(GPU_PASSED, 0):
        print("\nA CUDA device is present, but no test marked `gpu` passed.", file=sys.stderr)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
