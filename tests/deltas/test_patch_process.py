"""A second process holds the weights of earlier steps and is brought up to date by patch files alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import sparseopt as so
from sparseopt.deltas.delta import model_fingerprint

DENSITY = 0.025
PROMPT = "List the days of the week."

# What an inference server does: load once, then apply what it is sent to the live model, and generate.
SERVER = """
import json, sys
import sparseopt as so
from sparseopt.deltas.delta import model_fingerprint
from sparseopt.models import load_model
import torch

model = load_model(sys.argv[1], "bfloat16")
addresses = [p.data_ptr() for p in model.parameters()]
for line in sys.stdin:
    request = json.loads(line)
    if request["patch"]:
        so.Delta.load(request["patch"]).apply_(model)
    ids = torch.tensor([request["prompt"]])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=request["tokens"])
    same_memory = addresses == [p.data_ptr() for p in model.parameters()]
    print("RESULT " + json.dumps([out[0].tolist(), model_fingerprint(model), same_memory]), flush=True)
"""


class Server:
    """The other process; ``ask`` sends a patch (or none) and returns (tokens, fingerprint, weights at the same place)."""

    def __init__(self, process: subprocess.Popen[str], prompt: list[int], tokens: int) -> None:
        self.process, self.prompt, self.tokens = process, prompt, tokens

    def ask(self, patch: Path | None = None) -> Any:
        request = {"patch": str(patch) if patch else None, "prompt": self.prompt, "tokens": self.tokens}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("RESULT "):
                return json.loads(line.removeprefix("RESULT "))
        raise AssertionError("the server ended")


@contextmanager
def serve(model: str | Path, prompt: list[int], tokens: int) -> Iterator[Server]:
    # Equal numbers of threads: sums in other orders could tip a token.
    environment = dict(os.environ, OMP_NUM_THREADS=str(torch.get_num_threads()))
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", SERVER, str(model)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    try:
        yield Server(process, prompt, tokens)
    finally:
        process.communicate(timeout=60)


def generate(model: torch.nn.Module, prompt: list[int], tokens: int) -> list[int]:
    ids = torch.tensor([prompt])
    with torch.no_grad():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens)  # type: ignore[operator]
    return out[0].tolist()


def train_and_serve(
    source: str | Path, prompt: list[int], targets: list[list[int]], tokens: int, lr: float, folder: Path
) -> list[float]:
    """Trains sparsely; after every step the server gets a patch and must agree. Returns the patches' shares of a bf16
    checkpoint, in bytes of their files."""
    from sparseopt.models import load_model

    model = load_model(str(source), "bfloat16")
    bf16_bytes = 2 * sum(p.numel() for p in model.parameters())
    masks = so.MaskSet.random(model, DENSITY, seed=1)
    optimizer = so.SparseAdamW(model.named_parameters(), lr=lr, masks=masks)
    shares, spoken = [], []
    with serve(source, prompt, tokens) as server:
        before = server.ask()
        assert before[1] == model_fingerprint(model)
        assert before[0] == generate(model, prompt, tokens)
        for step, target in enumerate(targets):
            ids = torch.tensor([[*prompt, *target]])
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            patch = optimizer.export_delta()
            assert patch.changed_parameters == masks.active_parameters
            path = folder / f"step_{step}.safetensors"
            patch.save(path)
            shares.append(path.stat().st_size / bf16_bytes)
            theirs, fingerprint, same_memory = server.ask(path)
            assert fingerprint == model_fingerprint(model)
            assert theirs == generate(model, prompt, tokens)
            assert same_memory
            spoken.append(theirs)
    assert spoken[-1] != before[0], "training changed nothing that the server would have to follow"
    return shares


def test_a_small_model_follows_its_trainer(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path / "model")
    targets = [[40 + i, 50, 40 + i, 50] for i in range(3)]
    shares = train_and_serve(tmp_path / "model", [3, 5, 7], targets, 8, 0.3, tmp_path)
    assert len(shares) == 3


@pytest.mark.slow
def test_a_real_model_follows_its_trainer_on_few_bytes(tmp_path: Path) -> None:
    from sparseopt.models import load_tokenizer, resolve

    tokenizer = load_tokenizer("smollm2")
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": PROMPT}], add_generation_prompt=True)
    prompt = list(prompt["input_ids"]) if not isinstance(prompt, list) else prompt
    target = tokenizer("Sunday Saturday Friday Thursday Wednesday Tuesday Monday")["input_ids"]
    shares = train_and_serve(resolve("smollm2"), prompt, [target] * 4, 16, 5e-3, tmp_path)
    # (4 bytes of index + 2 of value) / 2 bytes for each of 2.5% of the entries, and the file's header.
    assert 0.07 < min(shares) <= max(shares) <= 0.08
