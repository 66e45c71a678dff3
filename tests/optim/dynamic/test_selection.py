"""All layers at once choose what layer by layer does; nothing changes before an error; copies of masks on the device."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from dynamic_training import make, train_step, weights_of
from torch import Tensor, nn

import sparseopt as so
from sparseopt.optim.dynamic import selection
from sparseopt.optim.dynamic.engine import DynamicSparsity
from sparseopt.optim.dynamic.policy import random_seed
from sparseopt.optim.dynamic.selection import Move, choose_together, groups_of
from sparseopt.reference import random_keys


def magnitude(name: str, weight: Tensor, gradient: Tensor | None) -> Tensor:
    return weight.abs()


def odd_model(dtype: torch.dtype) -> nn.Sequential:
    """A layer of one entry, uneven sizes, ties, zeros."""
    torch.manual_seed(1)
    sizes = [(16, 33), (33, 1), (1, 1), (1, 300), (300, 120)]
    model = nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in sizes))
    with torch.no_grad():
        model[0].weight.copy_((model[0].weight * 8).round() / 8)
        model[3].weight[:50] = 0
        model[4].weight[:, ::7] = 0.25
    return model.to(dtype)


@pytest.mark.parametrize("schedule", [None, lambda step, total: 0.8 - 0.02 * step])
@pytest.mark.parametrize("policy", ["rigl", "gradual"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_as_layer_by_layer(dtype: torch.dtype, policy: str, schedule: Any) -> None:
    found = []
    for criterion in (None, magnitude):
        model = odd_model(dtype)
        engine = DynamicSparsity(
            model, total_steps=20, interval=3, sparsity=0.7, policy=policy, criterion=criterion, initial="magnitude",
            sparsity_schedule=schedule, watch_gradients=True,
        )  # fmt: skip
        optimizer = so.SparseAdamW(model.named_parameters(), lr=1e-2, masks=engine.masks, capture_gradients=True)
        engine.start(optimizer)
        for step in range(1, 21):
            engine.begin_step(step)
            for micro in range(1 + step % 2):
                x = torch.randn(5, 16, generator=torch.Generator().manual_seed(2 * step + micro))
                (model(x.to(dtype)) - 1).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            engine.update(step)
        found.append((engine, weights_of(model)))
    (one, weights), (other, expected) = found
    assert one.masks == other.masks
    assert all(torch.equal(weights[name], expected[name]) for name in weights)
    assert len(one.history) >= 5
    assert sum(record["dropped"] + record["grown"] for record in one.history) > 100
    for mine, theirs in zip(one.history, other.history, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)
    state, other_state = one.state_dict()["left"], other.state_dict()["left"]
    assert all(torch.equal(bits, other_state[name]) for name, bits in state.items())


def test_random_growth_draws_by_seed_step_and_name() -> None:
    _, optimizer, engine = make(policy="set", sparsity=0.8)
    engine.start(optimizer)
    (group,) = groups_of(engine.layers, engine.masks, engine.state_dict()["left"])
    moves = [Move(engine.masks.count(layer.name), 5, engine.masks.count(layer.name)) for layer in engine.layers]
    moved = choose_together(group, None, moves, (7, 40))
    for i, layer in enumerate(engine.layers):
        keys = random_keys(random_seed(7, 40, layer.name), torch.arange(layer.numel))
        inactive = (~engine.masks[layer.name]).view(-1).nonzero().view(-1).tolist()
        expected = sorted(inactive, key=lambda k: (-int(keys[k]), k))[:5]
        came = so.unpack_mask(group.part(moved.came, i), (layer.numel,))
        assert came.nonzero().view(-1).tolist() == sorted(expected)
        assert int(so.unpack_mask(group.part(moved.gone, i), (layer.numel,)).sum()) == 5


def test_nan_changes_nothing() -> None:
    model, optimizer, engine = make(sparsity=0.7)
    engine.start(optimizer)
    for step in range(1, 4):
        train_step(model, optimizer, engine, step)
    last = engine.layers[-1]
    place = int(engine.masks.indices(last.name)[0])
    with torch.no_grad():
        last.param.view(-1)[place] = torch.nan
    engine.begin_step(4)
    for layer in engine.layers:
        engine.gradients.add(layer.name, torch.ones(layer.shape))
    before, masks = weights_of(model), engine.masks
    with pytest.raises(ValueError, match=f"the scores of '{last.name}' contain NaN"):
        engine.update(4)
    assert engine.masks is masks
    assert engine.masks == optimizer.masks.select(masks.names)
    assert not engine.history
    assert all(torch.equal(before[n].nan_to_num(9), p.detach().nan_to_num(9)) for n, p in model.named_parameters())


def test_weights_may_change_their_dtype_between_updates() -> None:
    model, optimizer, engine = make(sparsity=0.7)
    engine.start(optimizer)
    for step in range(1, 9):
        if step == 6:
            model.to(torch.bfloat16)
        train_step(model, optimizer, engine, step)
    assert [record["grown"] > 0 for record in engine.history] == [True, True]
    assert engine.masks == optimizer.masks.select(engine.masks.names)


def test_copies_of_masks_change_nothing() -> None:
    """What a GPU is given beside the masks: the same state and exports."""
    found = []
    for given in (False, True):
        model, optimizer, engine = make(sparsity=0.7)
        engine.start(optimizer)
        generator, deltas = torch.Generator().manual_seed(3), []
        for step in range(1, 9):
            x = torch.randn(8, 16, generator=generator)
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            masks = so.MaskSet.from_bool(
                {layer.name: torch.rand(layer.shape, generator=generator) < 0.3 for layer in engine.layers}
            )
            chosen = masks.select(masks.names[step % 2 :])
            copies = {name: masks.packed(name).clone() for name in masks.names[1:]} if given and step % 3 else None
            optimizer.update_masks(chosen, copies=copies)
            assert optimizer.masks.select(chosen.names) == chosen
            if step % 2:
                deltas.append(optimizer.export_delta())
        found.append((copy.deepcopy(optimizer.state_dict()["state"]), deltas))
    (state, deltas), (expected, other) = found
    for mine, theirs in zip(deltas, other, strict=True):
        assert mine.names == theirs.names
        for name in mine.names:
            assert torch.equal(mine.indices(name), theirs.indices(name))
            assert torch.equal(mine.values(name), theirs.values(name))
    for key, entry in expected.items():
        assert entry.keys() == state[key].keys()
        assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(state[key][k])) for k, v in entry.items())


def test_known_counts_are_not_counted_again() -> None:
    packed = {"a": torch.tensor([3], dtype=torch.uint8), "b": torch.tensor([7], dtype=torch.uint8)}
    masks = so.MaskSet(packed, {"a": (8,), "b": (2, 4)}, counts={"a": 2})
    assert masks.counts == {"a": 2, "b": 3}
    assert masks.active_parameters == 5


@pytest.mark.parametrize("at_once", [8, 3000, 1 << 22])
@pytest.mark.parametrize("leaving", [[0, 1, 2, 3, 4], [1, 4], [3], []])
def test_what_leaves_becomes_0(monkeypatch: pytest.MonkeyPatch, at_once: int, leaving: list[int]) -> None:
    monkeypatch.setattr(selection, "UNPACKED", {"cpu": at_once})
    model = odd_model(torch.float32)
    engine = DynamicSparsity(model, total_steps=10, interval=2, sparsity=0.5, initial="random")
    nothing = {layer.name: torch.zeros_like(engine.masks.packed(layer.name)) for layer in engine.layers}
    (group,) = groups_of(engine.layers, engine.masks, nothing)
    before, versions = weights_of(model), [layer.param._version for layer in engine.layers]
    selection.zero_entries(group, group.bits, leaving)
    for i, layer in enumerate(engine.layers):
        gone = engine.masks[layer.name] if i in leaving else torch.zeros(layer.shape, dtype=torch.bool)
        assert torch.equal(layer.param.detach(), before[layer.name].masked_fill(gone, 0)), layer.name
        assert (layer.param._version > versions[i]) == (i in leaving), (
            "who keeps copies of weights sees that they changed"
        )
