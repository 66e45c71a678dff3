"""DynamicSparsity with a SparseAdamW: counts, zeros, state of survivors, accumulation, resuming."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparseopt as so
from sparseopt.optim.dynamic.engine import DynamicSparsity

STEPS = 24


def make_model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), Conv1D(8, 24), nn.Tanh(), nn.Linear(8, 4))
    nn.init.normal_(model[2].weight, std=0.2)
    return model.to(dtype)


def batch(step: int, size: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(size, 16, generator=generator)
    return x, torch.stack([x[:, :4].sum(1), x[:, 4:8].prod(1), x[:, 8], x[:, 9:].mean(1)], 1)


def make(dtype: torch.dtype = torch.float32, capture: bool = True, **options: Any) -> tuple[Any, Any, DynamicSparsity]:
    model = make_model(dtype)
    engine = DynamicSparsity(model, **{"total_steps": STEPS, "interval": 4, "seed": 5, **options})
    optimizer = so.SparseAdamW(
        model.named_parameters(), lr=1e-2, masks=engine.masks, unmasked="dense", capture_gradients=capture
    )
    return model, optimizer, engine


def train_step(model: nn.Module, optimizer: Any, engine: DynamicSparsity, step: int, micro: int = 1) -> Any:
    engine.begin_step(step)
    x, y = batch(step)
    dtype = next(model.parameters()).dtype
    for part_x, part_y in zip(x.chunk(micro), y.chunk(micro), strict=True):
        (F.mse_loss(model(part_x.to(dtype)), part_y.to(dtype)) / micro).backward()
    optimizer.step()
    optimizer.zero_grad()
    return engine.update(step)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def groups_hold(engine: DynamicSparsity, n: int, m: int) -> bool:
    for layer in engine.layers:
        mask = engine.masks[layer.name]
        rows = mask.T if layer.transposed else mask
        if any((row[i : i + m].sum() != n) for row in rows for i in range(0, len(row), m)):
            return False
    return True


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
                add = engine._add

                def keep(name: str, gradient: Tensor, add: Any = add, engine: Any = engine) -> None:
                    add(name, gradient)
                    gradients.append((name, engine._accumulated[name].clone()))

                engine._add = keep  # type: ignore[method-assign]
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
        assert bool(engine._accumulated) == (step % 4 == 0 and step < 0.75 * STEPS)
        optimizer.step()
        engine.update(step)
        assert not engine._accumulated
        assert not engine._handles


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
                assert not engine._accumulated
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


def test_regrown_entries_are_counted() -> None:
    model, optimizer, engine = make(sparsity=0.5, policy="set", fraction=0.8)
    engine.start(optimizer)
    masks = [engine.masks]
    for step in range(1, STEPS + 1):
        if train_step(model, optimizer, engine, step) is not None:
            masks.append(engine.masks)
    assert len(engine.history) == len(masks) - 1 == 4
    for k, record in enumerate(engine.history, start=1):
        grown = masks[k] & ~masks[k - 1]
        earlier = masks[0]
        for mask in masks[1:k]:
            earlier = earlier | mask
        assert record["grown"] == grown.active_parameters
        assert record["regrown"] == pytest.approx((grown & earlier).active_parameters / grown.active_parameters)
        changed = (masks[k] ^ masks[k - 1]).active_parameters
        assert record["churn"] == pytest.approx(changed / (2 * masks[k].active_parameters))
    assert engine.history[-1]["regrown"] > 0


def test_the_inactive_gradient_norm() -> None:
    model, optimizer, engine = make(sparsity=0.8, capture=False, policy="set", watch_gradients=True)
    engine.start(optimizer)
    for step in range(1, 5):
        engine.begin_step(step)
        x, y = batch(step)
        F.mse_loss(model(x), y).backward()
        squares = sum((p.grad[~engine.masks[n]] ** 2).sum() for n, p in model.named_parameters() if n in engine.masks)
        optimizer.step()
        optimizer.zero_grad()
        record = engine.update(step)
    assert record is not None
    assert record["inactive_grad_norm"] == pytest.approx(float(squares) ** 0.5, rel=1e-5)


def test_state_is_proportional_to_active_entries() -> None:
    torch.manual_seed(0)
    sizes = {}
    for sparsity in (0.5, 0.9):
        model = nn.Sequential(nn.Linear(256, 512, bias=False), nn.Linear(512, 256, bias=False))
        engine = DynamicSparsity(model, total_steps=8, interval=2, sparsity=sparsity)
        optimizer = so.SparseAdamW(model.named_parameters(), masks=engine.masks, capture_gradients=True)
        engine.start(optimizer)
        for step in range(1, 9):
            engine.begin_step(step)
            model(torch.randn(4, 256)).square().mean().backward()
            optimizer.step()
            engine.update(step)
        sizes[sparsity] = optimizer.state_bytes() / engine.masks.active_parameters
    assert sizes[0.9] == pytest.approx(sizes[0.5], rel=0.1)
    assert sizes[0.9] < 13, "two fp32 moments, an index of 2 or 4 bytes, an age of 1"


def test_schedules_and_criteria_take_part() -> None:
    seen = []

    def score(name: str, weight: Tensor, gradient: Tensor | None) -> Tensor:
        assert gradient is not None
        seen.append(name)
        return (weight * gradient).abs()

    model, optimizer, engine = make(sparsity_schedule=lambda step, total: 0.3 + 0.5 * step / total, criterion=score)
    assert engine.sparsity == pytest.approx(0.3, abs=1e-3)
    engine.start(optimizer)
    for step in range(1, STEPS + 1):
        train_step(model, optimizer, engine, step)
        assert engine.sparsity == pytest.approx(0.3 + 0.5 * (step // 4 * 4) / STEPS, abs=2e-3)
    assert len(seen) == 3 * 6
    assert engine.sparsity == pytest.approx(0.8, abs=1e-3)


@pytest.mark.parametrize("distribution", ["uniform", "global"])
def test_a_schedule_may_fall(distribution: str) -> None:
    model, optimizer, engine = make(
        sparsity_schedule=lambda step, total: 0.8 - 0.5 * step / total, distribution=distribution, policy="gradual"
    )
    engine.start(optimizer)
    for step in range(1, STEPS + 1):
        train_step(model, optimizer, engine, step)
    assert engine.sparsity == pytest.approx(0.3, abs=1e-3)


def test_gradients_that_are_not_finite_count_as_zero() -> None:
    model, optimizer, engine = make(sparsity=0.8, capture=False)
    engine.start(optimizer)
    engine.begin_step(4)
    x, y = batch(4)
    (F.mse_loss(model(x), y) * float("inf")).backward()
    optimizer.zero_grad()
    with pytest.warns(UserWarning, match="not finite"):
        record = engine.update(4)
    assert record is not None
    assert record["dropped"] == record["grown"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, r"\[0, 1\), got 1.0"),
        ({"sparsity": -0.5}, r"\[0, 1\), got -0.5"),
        ({"pattern": "blocks"}, "'unstructured' or 'N:M'"),
        ({"pattern": "2:3"}, r"divisible by 3; '0.weight' has 16"),
        ({"pattern": "2:4", "sparsity": 0.8}, r"2:4 means a sparsity of 0.5, got 0.8"),
        ({"pattern": "2:4", "distribution": "erk"}, "uniform by itself"),
        ({"policy": "magic"}, "the policy must be"),
        ({"target": "gradients"}, "'weights' or 'updates'"),
        ({"target": "updates", "dropped": "zero"}, "'keep' or 'rewind'"),
        ({"dropped": "rewind"}, "target='updates'"),
        ({"distribution": "even"}, "uniform, erk, global"),
        ({"initial": "best"}, "'magnitude', 'random', 'criterion' or a MaskSet"),
        ({"initial": "criterion"}, "needs a criterion"),
        ({"policy": "static", "criterion": lambda n, w, g: w}, "initial='criterion'"),
        ({"sparsity_schedule": lambda step, total: float("nan")}, r"\[0, 1\), got nan"),
        ({"criterion": lambda n, w, g: w[0], "initial": "criterion"}, r"shape \(16,\) for '0.weight', expected \(24, 16\)"),
    ],
)  # fmt: skip
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_given_masks() -> None:
    masks = so.MaskSet.random(make_model(), 0.3, seed=4)
    model, optimizer, engine = make(initial=masks)
    counts = engine.masks.counts
    engine.start(optimizer)
    for step in range(1, STEPS + 1):
        train_step(model, optimizer, engine, step)
    assert engine.masks.counts == counts
    assert engine.masks != masks.select(engine.masks.names)
    with pytest.raises(ValueError, match=r"'0.weight' is not 2:4"):
        make(initial=masks, pattern="2:4")
    with pytest.raises(ValueError, match=r"have none for '2.weight'"):
        make(initial=masks.select(["0.weight"]))


def test_misuse_is_said() -> None:
    model, optimizer, engine = make(sparsity=0.8)
    with pytest.raises(RuntimeError, match="before start"):
        engine.update(4)
    engine.start(optimizer)
    with pytest.raises(RuntimeError, match=r"call begin_step\(4\)"):
        engine.update(4)
    state = engine.state_dict()
    with pytest.raises(ValueError, match="had pattern='unstructured', this one has '2:4'"):
        make(pattern="2:4")[2].load_state_dict(state)
    with pytest.raises(ValueError, match=r"sparse layers: '0.weight'"):
        make(sparsity=0.8, exclude="0.weight")[2].load_state_dict(state)
    _, other, second = make(sparsity=0.8, initial="random")
    second.load_state_dict(state)
    with pytest.raises(ValueError, match="not those that the state"):
        second.start(other, resume=True)
    frozen = so.SparseAdamW([("0.weight", model[0].weight)], masks={"0.weight": engine.masks["0.weight"]})
    with pytest.raises(ValueError, match=r"'2.weight' is not trained"):
        engine.start(frozen)
