"""DynamicSparsity with a SparseAdamW: counts, zeros, state of survivors, accumulation, resuming."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from dynamic_training import STEPS, batch, groups_hold, make, make_model, train_step, weights_of
from torch import Tensor, nn
from torch.nn import functional as F

import sparseopt as so


@pytest.mark.parametrize("capture", [True, False])
@pytest.mark.parametrize("distribution", ["uniform", "erk", "global"])
@pytest.mark.parametrize("policy", ["rigl", "set", "gradual", "static"])
def test_counts_and_zeros_at_every_forward(policy: str, distribution: str, capture: bool) -> None:
    model, optimizer, engine = make(policy=policy, sparsity=0.7, distribution=distribution, capture=capture)
    total = sum(layer.numel for layer in engine.layers)
    engine.start(optimizer)
    looked = []

    def zero(*_: Any) -> None:
        looked.append(all(bool((layer.param[~engine.masks[layer.name]] == 0).all()) for layer in engine.layers))
        assert engine.masks == optimizer.masks.select(engine.masks.names)

    model.register_forward_pre_hook(zero)
    for step in range(1, STEPS + 1):
        before = {name: engine.masks.count(name) for name in engine.masks.names}
        record = train_step(model, optimizer, engine, step)
        expected = round((1 - engine.plan.sparsity_at(step // 4 * 4)) * total)
        assert engine.masks.active_parameters == expected
        assert (record is not None) == (policy != "static" and step % 4 == 0 and step <= 0.75 * STEPS)
        if record is not None:
            assert record["active"] == expected
            assert record["sparsity"] == pytest.approx(1 - expected / total)
            if policy in ("rigl", "set"):
                assert before == engine.masks.counts
                assert (
                    record["dropped"]
                    == record["grown"]
                    == sum(
                        min(round(engine.plan.exchange(step) * before[layer.name]), layer.numel - before[layer.name])
                        for layer in engine.layers
                    )
                )
            assert (record["inactive_grad_norm"] is not None) == engine.needs_gradients(step)
    assert looked == [True] * STEPS
    assert optimizer.active_parameters == engine.masks.active_parameters + 24 + 8 + 4
    assert engine.sparsity == pytest.approx(0.7, abs=1e-3)


@pytest.mark.parametrize("policy", ["rigl", "set", "gradual", "static"])
@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4"])
def test_groups_are_exact_at_every_update(policy: str, pattern: str) -> None:
    n, m = map(int, pattern.split(":"))
    model, optimizer, engine = make(policy=policy, pattern=pattern)
    engine.start(optimizer)
    for step in range(1, STEPS + 1):
        record = train_step(model, optimizer, engine, step)
        kept = engine.pattern.per_group(engine.plan.sparsity_at(step // 4 * 4))
        assert groups_hold(engine, kept, m)
        assert record is None or policy == "gradual" or record["grown"] == record["dropped"]
    assert groups_hold(engine, n, m)
    if policy in ("rigl", "set"):
        assert sum(record["grown"] for record in engine.history) > 0


class Reference:
    """RigL on dense masks, with a torch AdamW whose parameters are single entries."""

    def __init__(self, model: nn.Module, masks: so.MaskSet) -> None:
        self.model = model
        self.masks = {name: masks[name].clone() for name in masks.names}
        self.params = dict(model.named_parameters())
        self.entries: dict[tuple[str, int], nn.Parameter] = {}
        self.ever: set[tuple[str, int]] = set()
        with torch.no_grad():
            for name, mask in self.masks.items():
                self.params[name].mul_(mask)
        rest = [param for name, param in self.params.items() if name not in self.masks]
        self.optimizer = torch.optim.AdamW(rest, lr=1e-2, weight_decay=1e-2, foreach=False)
        self.optimizer.add_param_group({"params": []})
        for name, mask in self.masks.items():
            for i in mask.view(-1).nonzero().view(-1).tolist():
                self.add(name, i)

    def add(self, name: str, i: int) -> None:
        entry = nn.Parameter(self.params[name].detach().view(-1)[i].clone())
        self.entries[name, i] = entry
        self.optimizer.param_groups[1]["params"].append(entry)

    def remove(self, name: str, i: int) -> None:
        entry = self.entries.pop((name, i))
        group = self.optimizer.param_groups[1]
        group["params"] = [param for param in group["params"] if param is not entry]
        self.optimizer.state.pop(entry)

    @torch.no_grad()
    def step(self, fraction: float | None) -> None:
        gradients = {name: self.params[name].grad.clone() for name in self.masks}
        for (name, i), entry in self.entries.items():
            entry.grad = gradients[name].view(-1)[i].clone()
        self.optimizer.step()
        for (name, i), entry in self.entries.items():
            self.params[name].view(-1)[i] = entry
        self.model.zero_grad()
        if fraction is None:
            return
        for name, mask in self.masks.items():
            flat, gradient = self.params[name].view(-1), gradients[name].view(-1)
            active = mask.view(-1).nonzero().view(-1).tolist()
            inactive = (~mask).view(-1).nonzero().view(-1).tolist()
            count = round(fraction * len(active))
            leave = sorted(active, key=lambda i: (abs(float(flat[i])), i))[:count]
            come = sorted(inactive, key=lambda i: (-abs(float(gradient[i])), i))[:count]
            for i in leave:
                self.remove(name, i)
                flat[i] = 0
                mask.view(-1)[i] = False
            for i in come:
                self.add(name, i)
                mask.view(-1)[i] = True


def test_equals_dense_masks_with_an_adamw_per_entry() -> None:
    model, optimizer, engine = make(sparsity=0.75, fraction=0.4)
    reference = Reference(make_model(), engine.masks)
    engine.start(optimizer)
    for step in range(1, STEPS + 1):
        record = train_step(model, optimizer, engine, step)
        x, y = batch(step)
        F.mse_loss(reference.model(x), y).backward()
        reference.step(engine.plan.exchange(step) if record is not None else None)
        for name, mask in reference.masks.items():
            assert torch.equal(engine.masks[name], mask), (step, name)
        for name, param in model.named_parameters():
            torch.testing.assert_close(param.detach(), reference.params[name].detach(), rtol=1e-4, atol=1e-6)
    for layer in engine.layers:  # moments too
        moments = optimizer.state[layer.param]["exp_avg_sq"]
        expected = [
            reference.optimizer.state[reference.entries[layer.name, i]]["exp_avg_sq"]
            for i in engine.masks.indices(layer.name).tolist()
        ]
        torch.testing.assert_close(moments, torch.stack(expected), rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_survivors_keep_state_and_grown_entries_are_fresh(dtype: torch.dtype) -> None:
    model, optimizer, engine = make(dtype, sparsity=0.6)
    engine.start(optimizer)
    for step in range(1, 5):
        if step == 4:
            update, engine.update = engine.update, lambda step: None  # type: ignore[method-assign]
        train_step(model, optimizer, engine, step)
    before = {
        layer.name: (
            engine.masks[layer.name],
            {k: v.clone() for k, v in optimizer.state[layer.param].items()},
            layer.param.detach().clone(),
        )
        for layer in engine.layers
    }
    record = update(4)
    assert record is not None
    assert record["grown"] > 0
    for layer in engine.layers:
        old, state, weights = before[layer.name]
        new, now = engine.masks[layer.name], optimizer.state[layer.param]
        both = old & new
        for key in ("exp_avg", "exp_avg_sq", *(["residual"] if dtype == torch.bfloat16 else [])):
            assert torch.equal(now[key][both[new]], state[key][both[old]])
            assert not now[key][(new & ~old)[new]].any()
        births = now["births"][now["cohorts"].long()]
        assert (births[both[new]] == 0).all()
        assert (births[(new & ~old)[new]] == 4).all(), "their age counts from now on"
        assert torch.equal(layer.param.detach()[both], weights[both])
        assert not layer.param.detach()[~both].any()


@pytest.mark.parametrize("capture", [True, False])
def test_micro_batches_choose_as_one_big_batch(capture: bool) -> None:
    found, gradients = [], []
    for micro in (1, 4):
        model, optimizer, engine = make(sparsity=0.8, capture=capture)
        engine.start(optimizer)
        for step in range(1, 5):
            if step == 4:
                add = engine.gradients.add

                def keep(name: str, gradient: Tensor, add: Any = add, engine: Any = engine) -> None:
                    add(name, gradient)
                    gradients.append((name, engine.gradients.by_name[name].clone()))

                engine.gradients.add = keep  # type: ignore[method-assign]
            train_step(model, optimizer, engine, step, micro)
        found.append(engine.masks)
    assert found[0] == found[1]
    whole, summed = dict(gradients[:3]), dict(gradients[3:])  # of several per name the last one stays
    for name, gradient in whole.items():
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(summed[name], gradient, rtol=1e-4, atol=1e-6)


def test_dense_gradients_are_taken_in_update_steps_only() -> None:
    model, optimizer, engine = make(sparsity=0.8)
    engine.start(optimizer)
    for step in range(1, STEPS + 1):
        engine.begin_step(step)
        x, y = batch(step)
        F.mse_loss(model(x), y).backward()
        assert bool(engine.gradients.by_name) == (step % 4 == 0 and step < 0.75 * STEPS)
        optimizer.step()
        engine.update(step)
        assert not engine.gradients.by_name
        assert not engine.gradients.listening


def test_gradients_that_were_averaged_elsewhere_are_read_from_grad() -> None:
    found = []
    for hooks in (True, False):
        model, optimizer, engine = make(sparsity=0.8, capture=False)
        engine.start(optimizer)
        for step in range(1, 5):
            engine.begin_step(step, hooks=hooks)
            x, y = batch(step)
            F.mse_loss(model(x), y).backward()
            if not hooks:
                assert not engine.gradients.by_name
                engine.take_gradients(step)
            optimizer.step()
            optimizer.zero_grad()
            engine.update(step)
        found.append(engine.masks)
    assert found[0] == found[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropped", ["keep", "rewind"])
def test_updates_on_a_base_that_stays(dropped: str, dtype: torch.dtype) -> None:
    model, optimizer, engine = make(dtype, sparsity=0.8, target="updates", dropped=dropped)
    base = weights_of(model)
    engine.start(optimizer)
    assert all(torch.equal(param, base[name]) for name, param in model.named_parameters())
    ever = {layer.name: engine.masks[layer.name] for layer in engine.layers}
    for step in range(1, STEPS + 1):
        train_step(model, optimizer, engine, step)
        for layer in engine.layers:
            ever[layer.name] = ever[layer.name] | engine.masks[layer.name]
            outside = ~ever[layer.name] if dropped == "keep" else ~engine.masks[layer.name]
            assert torch.equal(layer.param.detach()[outside], base[layer.name][outside])
    left = sum(
        int((layer.param.detach() != base[layer.name])[~engine.masks[layer.name]].sum()) for layer in engine.layers
    )
    assert (left > 0) == (dropped == "keep")
    if dropped == "rewind":
        with optimizer.base_weights():
            assert all(torch.equal(param, base[name]) for name, param in model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {"sparsity": 0.8},
        {"policy": "set", "sparsity": 0.8, "distribution": "erk"},
        {"policy": "gradual", "sparsity": 0.8, "distribution": "global"},
        {"pattern": "2:4"},
        {"sparsity": 0.8, "target": "updates", "dropped": "rewind"},
        {"sparsity": 0.8, "target": "updates"},
    ],
    ids=str,
)
def test_resumed_training_is_bit_identical(options: dict[str, Any], dtype: torch.dtype) -> None:
    model, optimizer, engine = make(dtype, **options)
    engine.start(optimizer)
    for step in range(1, 11):
        train_step(model, optimizer, engine, step)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), engine.state_dict()))
    for step in range(11, STEPS + 1):
        train_step(model, optimizer, engine, step)

    again, other, second = make(dtype, **options)
    again.load_state_dict(saved[0])
    other.adopt_masks = True
    other.load_state_dict(saved[1])
    second.load_state_dict(saved[2])
    second.start(other, resume=True)
    for step in range(11, STEPS + 1):
        train_step(again, other, second, step)
    assert second.masks == engine.masks
    assert second.history == engine.history
    expected = weights_of(model)
    assert all(torch.equal(param, expected[name]) for name, param in again.named_parameters())
