"""SparseAdamW where torch.optim.AdamW is used: groups, schedulers, hooks, averaging, compile, accelerate."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn

import sparseopt as so


def make_params(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((10, 5), (10,), (3, 1, 2))]


def set_grads(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)


def train(opt: torch.optim.Optimizer, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        set_grads(params, step)
        opt.step()


def assert_same(ours: list[nn.Parameter], theirs: list[nn.Parameter]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


# ---- groups, schedulers, closures ------------------------------------------------------------------------------------
def test_groups_keep_their_own_hyperparameters() -> None:
    def groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
        return [
            {"params": params[:1], "lr": 1e-2, "weight_decay": 0.3},
            {"params": params[1:], "betas": (0.5, 0.9), "eps": 1e-4, "maximize": True},
        ]

    ours, theirs = make_params(), make_params()
    opt, reference = so.SparseAdamW(groups(ours)), torch.optim.AdamW(groups(theirs), foreach=False)
    train(opt, ours, range(5))
    train(reference, theirs, range(5))
    for group in (*opt.param_groups, *reference.param_groups):  # mutation between steps takes effect
        group["lr"], group["weight_decay"], group["maximize"] = group["lr"] * 3, 0.2, not group["maximize"]
    train(opt, ours, range(5, 10))
    train(reference, theirs, range(5, 10))
    assert_same(ours, theirs)


def test_add_param_group_between_steps() -> None:
    ours, theirs = make_params(), make_params()
    opt, reference = so.SparseAdamW(ours[:1]), torch.optim.AdamW(theirs[:1], foreach=False)
    train(opt, ours, range(3))
    train(reference, theirs, range(3))
    for o, params in ((opt, ours), (reference, theirs)):
        o.add_param_group({"params": params[1:], "lr": 0.02})
        with pytest.raises(ValueError, match="appear in more than one parameter group"):
            o.add_param_group({"params": params[:1]})
        train(o, params, range(3, 6))
    assert_same(ours, theirs)


def test_a_refused_group_leaves_the_optimizer_as_it_was() -> None:
    params = make_params()
    opt = so.SparseAdamW(params[:1])
    for group, error in (({"lr": -1.0}, ValueError), ({"params": [torch.zeros(2, dtype=torch.complex64)]}, TypeError)):
        with pytest.raises(error):
            opt.add_param_group({"params": params[1:], **group})
    assert len(opt.param_groups) == 1
    train(opt, params, range(1))


@pytest.mark.parametrize("capture", [False, True])
def test_parameters_replaced_inside_their_group_keep_their_state(capture: bool) -> None:
    """FSDP2 and some quantisation tools put new tensors into param_groups; names say which is which."""
    runs = []
    for replace in (False, True):
        params = make_params()
        named = [(f"p{i}", p) for i, p in enumerate(params)]
        opt = so.SparseAdamW(named, masks={n: p > 0 for n, p in named}, lr=0.1, capture_gradients=capture)
        train(opt, params, range(3))
        opt.zero_grad()
        if replace:
            params = opt.param_groups[0]["params"] = [nn.Parameter(p.detach().clone()) for p in params]
        for _ in range(2):
            sum((p**2).sum() for p in params).backward()
            opt.step()  # takes the first gradients of the new tensors as they are, and hooks them
            assert all((p.grad is None) == capture for p in params)
            opt.zero_grad()
        assert set(opt.state) == set(params)
        runs.append(params)
    assert_same(*runs)


def test_a_parameter_taken_out_of_its_group_is_left_alone() -> None:
    params = make_params()
    opt = so.SparseAdamW(params, lr=0.1)
    train(opt, params, range(1))
    gone = opt.param_groups[0]["params"].pop()
    before = gone.detach().clone()
    train(opt, params, range(1, 3))
    assert torch.equal(gone, before)
    assert opt.state[params[0]]["step"].item() == 3


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 8),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.02, total_steps=12),  # cycles betas as well
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-4, 1e-2, step_size_up=3, cycle_momentum=True),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.ExponentialLR(o, 0.8)], [3]
    ),
}


@pytest.mark.parametrize("lr", [1e-3, torch.tensor(1e-3)], ids=["number", "tensor"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name: str, lr: float | Tensor) -> None:
    ours, theirs = make_params(), make_params()
    pairs = [
        (so.SparseAdamW(ours, lr=copy.deepcopy(lr)), ours),
        (torch.optim.AdamW(theirs, lr=copy.deepcopy(lr), foreach=False), theirs),
    ]
    for opt, params in pairs:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SequentialLR warns about its own use of epochs
            scheduler = SCHEDULERS[name](opt)
            for step in range(10):
                train(opt, params, range(step, step + 1))
                scheduler.step()
    assert_same(ours, theirs)


def test_reduce_on_plateau() -> None:
    opt = so.SparseAdamW(make_params(), lr=1.0)
    scheduler = lr_scheduler.ReduceLROnPlateau(opt, patience=0, factor=0.5)
    for _ in range(3):
        scheduler.step(1.0)
    assert opt.param_groups[0]["lr"] == 0.25


def test_closure_runs_with_gradients_enabled_and_returns_the_loss() -> None:
    ours, theirs = make_params(), make_params()
    losses = []
    for opt, params in ((so.SparseAdamW(ours), ours), (torch.optim.AdamW(theirs, foreach=False), theirs)):

        def closure(opt: torch.optim.Optimizer = opt, params: list[nn.Parameter] = params) -> Tensor:
            opt.zero_grad()
            loss = sum((p**2).sum() for p in params)
            loss.backward()
            return loss

        with torch.no_grad():
            losses.append([opt.step(closure).item() for _ in range(5)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[0][-1] < losses[0][0]


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none: bool) -> None:
    params = make_params()
    opt = so.SparseAdamW(params)
    set_grads(params, 0)
    opt.zero_grad(set_to_none=set_to_none)
    if set_to_none:
        assert all(p.grad is None for p in params)
    else:
        assert all(p.grad is not None and not p.grad.any() for p in params)


# ---- hooks -----------------------------------------------------------------------------------------------------------
def test_step_hooks_run_around_the_step_and_may_change_its_arguments() -> None:
    params = make_params()
    opt = so.SparseAdamW(params)
    seen: list[str] = []
    before = params[0].detach().clone()

    def pre(o: torch.optim.Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        seen.append("pre" if torch.equal(params[0], before) else "late")
        return (*args, lambda: "from the hook"), kwargs

    handles = [
        opt.register_step_pre_hook(pre),
        opt.register_step_post_hook(lambda o, a, k: seen.append("same" if torch.equal(params[0], before) else "post")),
        register_optimizer_step_post_hook(lambda o, a, k: seen.append("global")),
    ]
    set_grads(params, 0)
    assert opt.step() == "from the hook"
    assert seen == ["pre", "post", "global"]
    for handle in handles:
        handle.remove()
    train(opt, params, range(1, 2))
    assert len(seen) == 3


def test_state_dict_hooks() -> None:
    params = make_params()
    opt = so.SparseAdamW(params)
    train(opt, params, range(1))
    seen: list[str] = []
    opt.register_state_dict_pre_hook(lambda o: seen.append("save pre"))
    opt.register_state_dict_post_hook(lambda o, state: {**state, "note": 1})
    state = opt.state_dict()
    assert state["note"] == 1
    assert set(state["state"]) == {0, 1, 2}

    def replace(o: torch.optim.Optimizer, given: dict[str, Any]) -> dict[str, Any]:
        seen.append("load pre")
        groups = [{**g, "lr": 0.125} for g in given["param_groups"]]
        return {**given, "param_groups": groups}

    opt.register_load_state_dict_pre_hook(replace)
    opt.register_load_state_dict_post_hook(lambda o: seen.append("load post"))
    opt.load_state_dict(state)
    assert seen == ["save pre", "load pre", "load post"]
    assert opt.param_groups[0]["lr"] == 0.125
    assert state["param_groups"][0]["lr"] == 1e-3


def test_post_accumulate_hooks_can_step_and_free_each_gradient() -> None:
    """torch's recipe of fusing the step into backward: one optimizer for each parameter."""
    ours, theirs = make_params(), make_params()
    reference = torch.optim.AdamW(theirs, foreach=False)
    optimizers = {p: so.SparseAdamW([p]) for p in ours}

    def hook(param: Tensor) -> None:
        optimizers[param].step()
        optimizers[param].zero_grad()

    for param in ours:
        param.register_post_accumulate_grad_hook(hook)
    for _ in range(3):
        sum((p**2).sum() for p in ours).backward()
        reference.zero_grad()
        sum((p**2).sum() for p in theirs).backward()
        reference.step()
    assert all(p.grad is None for p in ours)
    assert_same(ours, theirs)


# ---- averaging, compile, distributed checkpoints ---------------------------------------------------------------------
def make_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).to(dtype)


def make_masks(model: nn.Module, density: float = 0.3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {n: torch.rand(p.shape, generator=generator) < density for n, p in model.named_parameters()}


def batch(step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(step)).to(dtype)


def weights_of(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def test_averaged_models_see_the_sparse_updates() -> None:
    model = make_model()
    start = weights_of(model)
    masks = make_masks(model)
    opt = so.SparseAdamW(model.named_parameters(), lr=0.1, masks=masks)
    schedule = SWALR(opt, swa_lr=0.01, anneal_epochs=2)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    expected = None
    for step in range(4):
        model(batch(step)).pow(2).mean().backward()
        opt.step()
        opt.zero_grad()
        schedule.step()
        average.update_parameters(model)
        now = weights_of(model)
        expected = now if expected is None else [torch.lerp(b, a, 0.5) for a, b in zip(now, expected, strict=True)]
    assert opt.param_groups[0]["lr"] == pytest.approx(0.01)
    assert expected is not None
    for (name, value), first, want in zip(average.module.named_parameters(), start, expected, strict=True):
        torch.testing.assert_close(value, want)
        torch.testing.assert_close(value[~masks[name]], first[~masks[name]])
        assert not torch.equal(value, first)


@pytest.mark.parametrize("capture", [False, True])
def test_a_compiled_training_step_breaks_the_graph_at_the_optimizer(capture: bool) -> None:
    results = []
    for backend in (None, "aot_eager"):
        model = make_model()
        opt = so.SparseAdamW(model.named_parameters(), lr=0.05, masks=make_masks(model), capture_gradients=capture)

        def update(x: Tensor, model: nn.Module = model, opt: so.SparseAdamW = opt) -> Tensor:
            loss = model(x).pow(2).mean()
            loss.backward()
            opt.step()
            opt.zero_grad()
            return loss

        run = update if backend is None else torch.compile(update, backend=backend)
        losses = [run(batch(step)).item() for step in range(4)]
        results.append((losses, weights_of(model)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    for a, b in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("trained", [0, 3])
def test_distributed_checkpoint_state_dicts_round_trip(trained: int) -> None:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    def make() -> tuple[nn.Module, so.SparseAdamW]:
        model = make_model(torch.bfloat16)
        return model, so.SparseAdamW(model.named_parameters(), lr=0.05, masks=make_masks(model))

    def run(model: nn.Module, opt: so.SparseAdamW, steps: range) -> None:
        for step in steps:
            model(batch(step, torch.bfloat16)).pow(2).mean().backward()
            opt.step()
            opt.zero_grad()

    model, opt = make()
    run(model, opt, range(trained))
    before = weights_of(model)
    state = copy.deepcopy(get_optimizer_state_dict(model, opt))  # fakes a step with zero gradients to make state exist
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert "0.weight" in state["state"]
    other_model, other = make()
    other_model.load_state_dict(model.state_dict())
    set_optimizer_state_dict(other_model, other, state)
    run(model, opt, range(trained, trained + 3))
    run(other_model, other, range(trained, trained + 3))
    for a, b in zip(model.parameters(), other_model.parameters(), strict=True):
        assert torch.equal(a, b)
    masks = {n: ~m for n, m in make_masks(model).items()}
    with pytest.raises(ValueError, match=r"saved under another mask \(of '0.weight'\)"):
        set_optimizer_state_dict(model, so.SparseAdamW(model.named_parameters(), masks=masks), state)


# ---- accelerate ------------------------------------------------------------------------------------------------------
def test_accelerate_keeps_the_state_exact_and_resumes_identically(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")

    def run(accelerator: Any, model: nn.Module, opt: Any, steps: range) -> None:
        for step in steps:
            with accelerator.accumulate(model):
                accelerator.backward(model(batch(step, torch.bfloat16)).pow(2).mean())
                opt.step()
                opt.zero_grad()

    def make() -> tuple[Any, nn.Module, Any, so.SparseAdamW]:
        model = make_model(torch.bfloat16)
        inner = so.SparseAdamW(model.named_parameters(), lr=0.05, masks=make_masks(model))
        accelerator = accelerate.Accelerator(cpu=True)
        train_one(model, inner)
        kept = {n: v.clone() for n, v in inner.state[next(model.parameters())].items()}
        model, opt = accelerator.prepare(model, inner)  # loads the state dict back into the optimizer
        for name, value in inner.state[next(model.parameters())].items():
            assert value.dtype == kept[name].dtype
            assert torch.equal(value, kept[name]), name
        return accelerator, model, opt, inner

    def train_one(model: nn.Module, opt: so.SparseAdamW) -> None:
        model(batch(99, torch.bfloat16)).pow(2).mean().backward()
        opt.step()
        opt.zero_grad()

    accelerator, model, opt, inner = make()
    state = inner.state[next(model.parameters())]
    assert {n: v.dtype for n, v in state.items()} == {
        "step": torch.float32, "exp_avg": torch.float32, "exp_avg_sq": torch.float32, "residual": torch.int16,
    }  # fmt: skip
    run(accelerator, model, opt, range(3))
    accelerator.save_state(str(tmp_path / "state"))
    run(accelerator, model, opt, range(3, 6))
    assert not opt.step_was_skipped
    expected = weights_of(model)

    accelerator, model, opt, inner = make()
    accelerator.load_state(str(tmp_path / "state"))
    run(accelerator, model, opt, range(3, 6))
    for a, b in zip(model.parameters(), expected, strict=True):
        assert torch.equal(a, b)
