"""Heads of tiny models: found, masked as by hand, saved, folded into the weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from heads_model import KINDS, drop, loss_of, tiny, tokens
from torch import Tensor, nn

from sparseopt.topk_attention import TopKHeads, check_ratio, find_attention


@pytest.mark.parametrize("kind", KINDS)
def test_query_heads_are_found(kind: str) -> None:
    model = tiny(kind)
    stem = "transformer.h.{}.attn.c_proj" if kind == "gpt2" else "model.layers.{}.self_attn.o_proj"
    layers = find_attention(model)
    assert [layer.name for layer in layers] == [stem.format(0), stem.format(1)]
    assert [(layer.heads, layer.head_dim) for layer in layers] == [(4, 12 if kind == "qwen3" else 8)] * 2


class _Block(nn.Module):
    """An attention layer's projections, nothing more."""

    def __init__(self, inputs: int, **facts: int) -> None:
        super().__init__()
        self.q_proj, self.o_proj = nn.Linear(8, inputs), nn.Linear(inputs, 8)
        for name, value in facts.items():
            setattr(self, name, value)


def test_heads_may_differ_between_layers() -> None:
    model: Any = nn.Sequential(_Block(16, layer_idx=0), _Block(24, layer_idx=1, head_dim=4), _Block(24, num_heads=3))
    model.config = type("Config", (), {"num_attention_heads": [2, 6]})()
    assert [(layer.name, layer.heads, layer.head_dim) for layer in find_attention(model)] == [
        ("0.o_proj", 2, 8), ("1.o_proj", 6, 4), ("2.o_proj", 3, 8),
    ]  # fmt: skip


def test_models_without_known_heads_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"in Sequential: looked for an `o_proj` beside a `q_proj`.*or a `c_proj` beside a `c_attn`"
    ):
        find_attention(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match=r"must divide the inputs of '0.o_proj', got 5 heads and 16 inputs"):
        find_attention(nn.Sequential(_Block(16, num_heads=5)))
    with pytest.raises(ValueError, match=r"must divide the inputs of '0.o_proj', got None heads"):
        find_attention(nn.Sequential(_Block(16)))
    with pytest.raises(ValueError, match=r"'0.o_proj' has 16 inputs, but its attention 4 heads of 8"):
        find_attention(nn.Sequential(_Block(16, num_heads=4, head_dim=8)))


@pytest.mark.parametrize("ratio", [0, -0.1, 1.01, float("nan"), True, "0.5", None])
def test_shares_out_of_range_are_refused(ratio: Any) -> None:
    with pytest.raises(ValueError, match=r"must be in \(0, 1\], got"):
        check_ratio(ratio)


@pytest.mark.parametrize(("ratio", "kept"), [(0.01, 1), (0.1, 1), (0.375, 2), (0.5, 2), (0.7, 3), (1.0, 4)])
def test_counts(ratio: float, kept: int) -> None:
    top = TopKHeads(tiny("llama"), ratio)
    assert all(top.kept(layer) == kept for layer in top.layers)


@pytest.mark.parametrize("kind", KINDS)
def test_masked_and_folded_models_equal_a_computation_by_hand(kind: str) -> None:
    model = tiny(kind).eval()
    reference = copy.deepcopy(model)
    top = TopKHeads(model, 0.5)
    drop(top, "1010", "0001")
    seen: dict[str, Tensor] = {}
    for layer in find_attention(reference):  # by hand: slices are set to zero one by one

        def zero(module: nn.Module, inputs: tuple[Tensor, ...], layer: Any = layer) -> tuple[Tensor]:
            y = inputs[0].detach().clone()
            for head in range(4):
                if not top.heads[layer.name][head]:
                    y[..., head * layer.head_dim : (head + 1) * layer.head_dim] = 0
            seen[layer.name] = y
            return (y,)

        layer.module.register_forward_pre_hook(zero)
    ids = tokens()
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        expected = reference(input_ids=ids).logits
        with top.installed():
            masked = model(input_ids=ids).logits
        assert torch.equal(model(input_ids=ids).logits, plain), "without hooks nothing is masked"
        folded = copy.deepcopy(model)
        top.fold(folded)
        assert torch.equal(model(input_ids=ids).logits, plain), "fold(other) leaves this one alone"
        top.fold()
    assert len(seen) == 2
    assert not torch.allclose(masked, plain, atol=1e-3)
    torch.testing.assert_close(masked, expected)
    for result in (folded, model):
        torch.testing.assert_close(result(input_ids=ids).logits, masked, rtol=1e-6, atol=1e-6)
    with top.installed(), torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, folded(input_ids=ids).logits)


def test_state_goes_through_json() -> None:
    import json

    model = tiny("gpt2")
    top, again = TopKHeads(model, 0.5), TopKHeads(model, 0.5)
    with top.installed():
        loss_of(model, tokens()).backward()
        top.commit()
        top.choose()
        loss_of(model, tokens(2)).backward()
        top.commit()
    again.load_state_dict(json.loads(json.dumps(top.state_dict())))
    for name in top.heads:
        assert torch.equal(again.heads[name], top.heads[name])
        assert torch.equal(again.importance[name], top.importance[name])
    with pytest.raises(ValueError, match=r"had ratio=0.5, this one has 0.25"):
        TopKHeads(model, 0.25).load_state_dict(top.state_dict())
    with pytest.raises(ValueError, match=r"the checkpoint's attention layers have the heads"):
        TopKHeads(tiny("llama"), 0.5).load_state_dict(top.state_dict())


def test_fold_refuses_what_it_cannot_write() -> None:
    from peft import LoraConfig, get_peft_model

    model = tiny("llama")
    top = TopKHeads(model, 0.5)
    drop(top, "1010", "0101")
    with pytest.raises(ValueError, match=r"layers of GPT2LMHeadModel are not those whose heads were chosen"):
        top.fold(tiny("gpt2"))
    adapted: Any = get_peft_model(tiny("llama"), LoraConfig(r=2, target_modules=["o_proj", "q_proj"]))
    before = {name: param.detach().clone() for name, param in adapted.named_parameters()}
    own = TopKHeads(adapted, 0.5)
    drop(own, "1010", "0101")
    with own.installed():  # adapters are no obstacle to training
        loss_of(adapted, tokens()).backward()
        own.commit()
    assert all((values > 0).all() for values in own.importance.values())
    with pytest.raises(ValueError, match=r"self_attn.o_proj', which is a Linear: merge adapters and dequantise first"):
        own.fold()
    assert all(torch.equal(param, before[name]) for name, param in adapted.named_parameters())
    merged = adapted.merge_and_unload()
    top.fold(merged)
    assert not merged.model.layers[0].self_attn.o_proj.weight[:, 8:16].any()


@pytest.mark.slow
def test_a_real_model_loses_less_with_its_important_heads_than_with_random_ones() -> None:
    """SmolLM2 on the docstrings of the standard library, no training in between."""
    import argparse
    import logging
    import optparse

    from sparseopt.models import load_model, load_tokenizer

    texts = [str(module.__doc__) for module in (argparse, optparse, logging)]
    texts += [str(vars(optparse)[name].__doc__) for name in ("Option", "OptionParser", "Values")]
    ids = load_tokenizer("smollm2")(" ".join(texts), return_tensors="pt").input_ids[0]
    rows = ids[: len(ids) // 96 * 96].view(-1, 96)[:12]
    assert len(rows) >= 8
    model = load_model("smollm2")
    top = TopKHeads(model, 0.75)

    def held_out() -> float:
        with torch.no_grad():
            return float(loss_of(model, rows[-4:]))

    with top.installed():
        dense = held_out()
        loss_of(model, rows[:4]).backward()
        top.commit()
        top.choose()
        important = held_out()
        assert all(int(heads.sum()) == 7 for heads in top.heads.values())  # of 9
        others = []
        for seed in range(3):
            generator = torch.Generator().manual_seed(seed)
            for name in top.heads:
                top.heads[name] = torch.randperm(9, generator=generator) < 7
            top._gates.clear()
            others.append(held_out())
    assert dense < important < min(others)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu(kind: str, compiled: bool) -> None:
    pytest.importorskip("transformers")
    found = []
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        model = tiny(kind, use_cache=False).to(device, dtype).train()
        top = TopKHeads(model, 0.5)
        drop(top, "1010", "0001")
        called: Any = torch.compile(model) if compiled and device == "cuda" else model
        with top.installed():
            for seed in range(4):
                loss_of(called, tokens(seed, 8).to(device)).backward()
            top.commit()
        found.append(top.importance)
        torch._dynamo.reset()
    for name, values in found[0].items():
        torch.testing.assert_close(found[1][name], values, rtol=0.1, atol=1e-3 * float(values.max()))
