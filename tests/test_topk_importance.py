"""How heads of tiny models are ranked: their importance as autograd says, which are kept, and what counts for nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from heads_model import KINDS, drop, loss_of, tiny, tokens
from torch import Tensor, nn

from sparseopt.topk_attention import TopKHeads


def by_hand(model: Any, top: TopKHeads, batches: list[Tensor]) -> dict[str, Tensor]:
    """Importance from torch.autograd.grad with respect to what the projections read."""
    total = {layer.name: torch.zeros(layer.heads) for layer in top.layers}
    for ids in batches:
        kept: dict[str, tuple[Tensor, Tensor]] = {}
        handles = []
        for layer in top.layers:

            def keep(
                module: nn.Module, inputs: tuple[Tensor, ...], layer: Any = layer, kept: Any = kept
            ) -> tuple[Tensor]:
                a = inputs[0].detach()
                y = inputs[0] * top.heads[layer.name].repeat_interleave(layer.head_dim)
                kept[layer.name] = a, y
                return (y,)

            handles.append(layer.module.register_forward_pre_hook(keep))
        loss = loss_of(model, ids)
        gradients = torch.autograd.grad(loss, [y for _, y in kept.values()])
        for handle in handles:
            handle.remove()
        for (name, (a, _)), gradient in zip(kept.items(), gradients, strict=True):
            for batch in range(len(ids)):
                for place in range(ids.shape[1]):
                    for head, (x, g) in enumerate(
                        zip(a[batch, place].chunk(4), gradient[batch, place].chunk(4), strict=True)
                    ):
                        total[name][head] += (x * g).sum().abs()
    return total


@pytest.mark.parametrize("checkpointing", [None, "reentrant", "non-reentrant"])
@pytest.mark.parametrize("kind", KINDS)
def test_importance_equals_autograd_by_hand(kind: str, checkpointing: str | None) -> None:
    model = tiny(kind, use_cache=False).train()
    top = TopKHeads(model, 0.5)
    drop(top, "1010", "1111")  # dropped heads are measured too
    batches = [tokens(1), tokens(2)]
    expected = by_hand(model, top, batches)
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    with top.installed():
        for ids in batches:
            loss_of(model, ids).backward()
            with torch.no_grad():
                loss_of(model, ids)  # an evaluation measures nothing
        assert not any(values.any() for values in top.importance.values()), "nothing counts before the step"
        top.commit()
    for name, values in top.importance.items():
        assert (values > 0).all()
        torch.testing.assert_close(values, expected[name], rtol=1e-4, atol=1e-7)


def test_gradients_are_those_of_the_masked_model() -> None:
    model, folded = tiny("llama"), tiny("llama")
    top = TopKHeads(model, 0.5)
    drop(top, "0110", "1000")
    top.fold(folded)
    with top.installed():
        loss_of(model, tokens()).backward()
    loss_of(folded, tokens()).backward()
    for (name, param), (_, other) in zip(model.named_parameters(), folded.named_parameters(), strict=True):
        if "o_proj" in name:  # the masked model's columns of dropped heads get none; the folded one's would
            columns = top.heads[name.removesuffix(".weight")].repeat_interleave(8)
            assert not param.grad[:, ~columns].any()
            torch.testing.assert_close(param.grad[:, columns], other.grad[:, columns])
        else:
            torch.testing.assert_close(param.grad, other.grad)


def test_the_best_heads_are_kept_and_dropped_ones_return() -> None:
    model = tiny("llama")
    top = TopKHeads(model, 0.5)
    names = list(top.heads)
    with top.installed():
        loss_of(model, tokens()).backward()
        top.commit()
        importance = {name: values.clone() for name, values in top.importance.items()}
        assert top.choose() == dict.fromkeys(names, 2)
        for name, heads in top.heads.items():
            assert int(heads.sum()) == 2
            assert importance[name][heads].min() > importance[name][~heads].max()
        assert not any(values.any() for values in top.importance.values()), "measured anew"
        drop(top, *("1100" if heads.tolist() != [True, True, False, False] else "0011" for heads in top.heads.values()))
        before = dict(top.heads)
        loss_of(model, tokens()).backward()
        top.commit()
        changed = top.choose()
    assert any(changed.values())
    assert any((top.heads[name] & ~before[name]).any() for name in names)


def test_ties_go_to_the_lower_head_and_unmeasured_layers_stay() -> None:
    top = TopKHeads(tiny("llama"), 0.5)
    first, second = top.heads
    top.install()
    top._parts[first].copy_(torch.tensor([1.0, 2.0, 1.0, 1.0]))
    top.commit()
    with pytest.warns(UserWarning, match=rf"no gradient reached the heads of 1 layers \('{second}' first\)"):
        assert top.choose() == {first: 2, second: 0}
    assert top.heads[first].tolist() == [True, True, False, False]
    assert top.heads[second].all()


def test_a_step_that_overflows_counts_for_nothing() -> None:
    top = TopKHeads(tiny("llama"), 0.5)
    first, second = top.heads
    top.install()
    top._fresh.fill_(1)
    top._parts[first][2] = torch.inf
    top.commit()
    assert top.importance[first].tolist() == [0.0] * 4
    assert top.importance[second].tolist() == [1.0] * 4
    assert not top._fresh.any()


def test_heads_below_which_everything_is_frozen_are_measured() -> None:
    model, free = tiny("llama"), tiny("llama")
    for name, param in model.named_parameters():
        param.requires_grad_("layers.1.mlp" in name)
    found = []
    for one in (model, free):
        top = TopKHeads(one, 0.5)
        with top.installed():
            loss_of(one, tokens()).backward()
            top.commit()
        found.append(top.importance)
    assert all(torch.equal(values, found[1][name]) for name, values in found[0].items())
    assert model.model.layers[0].self_attn.q_proj.weight.grad is None


def test_a_compiled_model_measures_the_same() -> None:
    found, outputs = [], []
    for compiled in (False, True):
        model = tiny("llama")
        top = TopKHeads(model, 0.5)
        drop(top, "1010", "1110")
        called: Any = torch.compile(model, backend="aot_eager") if compiled else model
        with top.installed():
            for seed in (1, 2):
                loss = loss_of(called, tokens(seed))
                loss.backward()
            top.commit()
            drop(top, "0101", "0001")
            with torch.no_grad():
                outputs.append(called(input_ids=tokens()).logits)
        found.append(top.importance)
        torch._dynamo.reset()
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-6)
