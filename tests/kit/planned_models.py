"""Small models whose training steps are planned, and what autograd keeps of one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from sparseopt.planning import Job


def config(kind: str) -> Any:
    import transformers

    common = {"num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 300, "bos_token_id": 1, "eos_token_id": 2}
    if kind == "llama":  # grouped attention, tied
        return transformers.LlamaConfig(
            hidden_size=256, intermediate_size=704, num_key_value_heads=2, tie_word_embeddings=True, **common
        )
    if kind == "llama-wide":  # heads wider than the stream, untied
        return transformers.LlamaConfig(
            hidden_size=64,
            intermediate_size=160,
            num_key_value_heads=4,
            head_dim=32,
            tie_word_embeddings=False,
            **common,
        )
    if kind == "gpt2":
        return transformers.GPT2Config(
            n_embd=64, n_layer=2, n_head=4, vocab_size=300, n_positions=256, resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
    cls = {"qwen2": transformers.Qwen2Config, "qwen3": transformers.Qwen3Config}[kind]
    return cls(hidden_size=128, intermediate_size=352, num_key_value_heads=2, head_dim=32, **common)


DENSITY = 0.1  # of rows or columns in the small models


def train_groups(model: Any, kind: str) -> Any:
    """Masks of ``DENSITY`` of the rows or columns of every linear layer; nothing else needs a gradient."""
    from sparseopt.benchmarks.train_arms import random_masks

    masks = random_masks(model, DENSITY, structure=kind)
    for name, param in model.named_parameters():
        param.requires_grad_(name in masks and masks.count(name) > 0)
    return masks


def structured_layers(model: Any, kind: str) -> list[torch.Tensor]:
    """Makes the model compute what trains; returns the indices that the layers hold."""
    import sparseopt as so
    from sparseopt.optim import structured

    so.sparse_linear(model, train_groups(model, kind))
    uses = [structured.use_of(p) for p in model.parameters() if p.requires_grad]
    assert uses
    assert all(use is not None and use.kind == kind for use in uses)
    return [use.where for use in uses if use is not None]


def kept_by_autograd(settings: Any, job: Job, arm: str, adapter_bytes: int) -> int:
    """Bytes of all storages that autograd saves in a forward pass with the loss, parameters left out."""
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_config(
        settings, dtype=torch.bfloat16, attn_implementation="sdpa"
    ).eval()
    if arm == "sparse":
        for module in model.modules():
            if isinstance(module, torch.nn.Embedding):
                module.weight.requires_grad_(False)
        model.get_output_embeddings().weight.requires_grad_(False)
    ours = set()
    if arm in ("column", "row"):
        ours = {t.untyped_storage().data_ptr() for t in structured_layers(model, arm)}
    if arm == "lora":
        peft = pytest.importorskip("peft")
        options = {"r": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
        model = peft.get_peft_model(model, peft.LoraConfig(**options), autocast_adapter_dtype=adapter_bytes == 4)
    if job.gradient_checkpointing:
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if arm == "lora":
            model.enable_input_require_grads()
    ours |= {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}
    alive = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ours:
            seen[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # so that no address is used twice
        return tensor

    ids = torch.randint(settings.vocab_size, (job.batch, job.seq))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(input_ids=ids, labels=ids, use_cache=False)
    return sum(seen.values())


def one_thread() -> Iterator[None]:
    """For a fixture: sums of floats and allocations as one thread makes them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
