"""SparseAdamW against torch.optim.AdamW: dense equality, masked equality, frozen bits, dtypes, flags."""

from __future__ import annotations

import copy

import pytest
import torch
from named_parameters import SHAPES, make_params, random_masks, set_grads
from torch import nn

import sparseopt as so

FLAGS = [
    {},
    {"amsgrad": True},
    {"maximize": True},
    {"weight_decay": 0.0},
    {"amsgrad": True, "maximize": True, "weight_decay": 0.3, "betas": (0.6, 0.95), "eps": 1e-5},
    {"lr": torch.tensor(3e-3)},
    {"betas": (torch.tensor(0.8), torch.tensor(0.9))},
    {"betas": (0.0, 0.0)},
]


@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_all_active_equals_torch_adamw(flags: dict) -> None:
    ours, theirs = make_params(), make_params()
    opt = so.SparseAdamW(ours.items(), **flags)
    reference = torch.optim.AdamW(theirs.values(), foreach=False, **flags)
    for step in range(50):
        set_grads(ours, step)
        set_grads(theirs, step)
        opt.step()
        reference.step()
    for name in SHAPES:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")
        state, expected = opt.state[ours[name]], reference.state[theirs[name]]
        if ours[name].numel():  # an empty tensor takes no steps here: there is nothing to update
            assert state["step"].item() == expected["step"].item() == 50
        for key in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(state[key].view(SHAPES[name]), expected[key], rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("density", [0.0, 0.02, 0.3, 1.0])
@pytest.mark.parametrize("flags", [{}, {"amsgrad": True, "weight_decay": 0.5}, {"maximize": True}], ids=str)
def test_mask_equals_adamw_on_the_active_entries_alone(density: float, flags: dict) -> None:
    params, masks = make_params(), random_masks(density)
    start = {n: p.detach().clone() for n, p in params.items()}
    opt = so.SparseAdamW(params.items(), masks=masks, **flags)
    alone = {n: nn.Parameter(start[n][masks[n]].clone()) for n in SHAPES}
    reference = torch.optim.AdamW(alone.values(), foreach=False, **flags)
    for step in range(30):
        set_grads(params, step)
        for name, param in alone.items():
            param.grad = params[name].grad[masks[name]].clone()
        opt.step()
        reference.step()
    for name, param in params.items():
        torch.testing.assert_close(param[masks[name]], alone[name], rtol=1e-6, atol=1e-7)
        assert torch.equal(param[~masks[name]], start[name][~masks[name]]), f"{name}: a frozen entry moved"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_master_weights_follow_fp32_adamw(dtype: torch.dtype) -> None:
    """Updates far below a 16-bit unit accumulate exactly as in fp32; without masters they are lost."""
    flags = {"lr": 1e-5, "weight_decay": 0.1}
    params, masks = make_params(dtype), random_masks(0.4)
    fp32 = {n: nn.Parameter(p.detach().float()[masks[n]].clone()) for n, p in params.items()}
    start = {n: p.detach().clone() for n, p in params.items()}
    opt = so.SparseAdamW(params.items(), masks=masks, **flags)
    reference = torch.optim.AdamW(fp32.values(), foreach=False, **flags)
    for step in range(60):
        set_grads(params, step)
        for name, param in fp32.items():
            param.grad = params[name].grad[masks[name]].float()
        opt.step()
        reference.step()
    from sparseopt.reference import join_master

    for name, param in params.items():
        active = param.detach()[masks[name]]
        master = join_master(active, opt.state[param]["residual"])
        normal = active.abs() > 2.0**-13  # below, fp16 keeps fewer digits by design
        torch.testing.assert_close(master[normal], fp32[name].detach()[normal], rtol=2e-6, atol=1e-8)
        assert torch.equal(param[~masks[name]], start[name][~masks[name]])
    assert any((p.detach() != start[n]).any() for n, p in params.items())


def test_master_weights_off_rounds_every_step() -> None:
    param = nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
    opt = so.SparseAdamW([("p", param)], lr=1e-4, weight_decay=0.0, master_weights=False)
    for _ in range(30):
        param.grad = torch.ones_like(param)
        opt.step()
    assert torch.equal(param, torch.ones_like(param)), "1e-4 steps vanish in bf16 without master weights"
    assert "residual" not in opt.state[param]


def test_float64_parameters_use_float64_state() -> None:
    ours, theirs = make_params(torch.float64), make_params(torch.float64)
    opt, reference = so.SparseAdamW(ours.items()), torch.optim.AdamW(theirs.values(), foreach=False)
    for step in range(20):
        set_grads(ours, step)
        set_grads(theirs, step)
        opt.step()
        reference.step()
    for name in SHAPES:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-13, atol=1e-14)


def test_several_groups_schedulers_and_closure() -> None:
    ours, theirs = make_params(), make_params()

    def groups(params: dict) -> list[dict]:
        items = list(params.items())
        return [{"params": items[:2], "weight_decay": 0.2, "lr": 1e-2}, {"params": items[2:], "betas": (0.5, 0.9)}]

    opt, reference = so.SparseAdamW(groups(ours)), torch.optim.AdamW(groups(theirs), foreach=False)
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(o, 20) for o in (opt, reference)]
    for step in range(20):
        losses = []
        for o, params in ((opt, ours), (reference, theirs)):
            set_grads(params, step)
            losses.append(o.step(lambda: 42.0))
        assert losses == [42.0, 42.0]
        for scheduler in schedulers:
            scheduler.step()
    for name in SHAPES:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-7)


def test_parameters_without_gradients_keep_weights_and_step() -> None:
    ours, theirs = make_params(), make_params()
    opt, reference = so.SparseAdamW(ours.items()), torch.optim.AdamW(theirs.values(), foreach=False)
    for step in range(10):
        for params in (ours, theirs):
            set_grads(params, step)
            if step % 2:
                params["a.weight"].grad = None
        opt.step()
        reference.step()
    assert opt.state[ours["a.weight"]]["step"].item() == 5
    for name in SHAPES:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-7)


def test_clipping_uses_the_norm_of_active_entries() -> None:
    params, masks = make_params(), random_masks(0.3)
    alone = {n: nn.Parameter(p.detach()[masks[n]].clone()) for n, p in params.items()}
    opt = so.SparseAdamW(params.items(), masks=masks, max_grad_norm=0.5)
    reference = torch.optim.AdamW(alone.values(), foreach=False)
    for step in range(10):
        set_grads(params, step, scale=1.0 if step % 2 else 1e-3)
        if step == 4:
            params["a.weight"].grad = None  # an earlier step's compact gradient must not enter the norm
        for name, param in alone.items():
            param.grad = None if params[name].grad is None else params[name].grad[masks[name]].clone()
        norm = torch.nn.utils.clip_grad_norm_(alone.values(), 0.5)
        opt.step()
        reference.step()
        torch.testing.assert_close(opt.grad_norm(), norm)
    for name, param in params.items():
        torch.testing.assert_close(param[masks[name]], alone[name], rtol=1e-6, atol=1e-7)


def test_non_finite_norm_skips_the_whole_step_and_counts_it() -> None:
    params = make_params()
    opt = so.SparseAdamW(params.items(), max_grad_norm=1.0)
    set_grads(params, 0)
    opt.step()
    before = {n: p.detach().clone() for n, p in params.items()}
    state = copy.deepcopy({n: opt.state[p] for n, p in params.items()})
    for bad in (float("nan"), float("inf")):
        set_grads(params, 1)
        params["b.weight"].grad[0, 0, 0] = bad
        opt.step()
    assert opt.skipped_steps == 2
    for name, param in params.items():
        assert torch.equal(param, before[name])
        for key, value in state[name].items():
            assert torch.equal(opt.state[param][key], value), key


def test_grad_scaler_finds_overflow_and_unscales() -> None:
    ours, theirs = make_params(), make_params()
    opt, reference = so.SparseAdamW(ours.items(), max_grad_norm=0.7), torch.optim.AdamW(theirs.values(), foreach=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.zeros(()))
    for step in range(6):
        set_grads(ours, step, scale=1024.0)
        set_grads(theirs, step)
        if step == 3:
            ours["a.bias"].grad[0] = float("inf")
        else:
            torch.nn.utils.clip_grad_norm_(theirs.values(), 0.7)
            reference.step()
        scaler.step(opt)
        scaler._per_optimizer_states.clear()
    assert opt.skipped_steps == 1
    for name in SHAPES:
        torch.testing.assert_close(ours[name], theirs[name], rtol=2e-6, atol=1e-7)


def test_correct_bias_false() -> None:
    param = nn.Parameter(torch.zeros(3))
    opt = so.SparseAdamW([("p", param)], lr=0.1, weight_decay=0.0, correct_bias=False)
    param.grad = torch.tensor([1.0, -2.0, 0.0])
    opt.step()
    m, v = 0.1 * param.grad, 0.001 * param.grad**2
    torch.testing.assert_close(param.detach(), -0.1 * m / (v.sqrt() + 1e-8))


def test_sizes() -> None:
    param = nn.Parameter(torch.zeros(1_000_000))
    mask = torch.rand(1_000_000, generator=torch.Generator().manual_seed(0)) < 0.025
    opt = so.SparseAdamW([("p", param)], masks={"p": mask})
    assert opt.active_parameters == int(mask.sum())
    assert opt.state_bytes() <= 8 * 1_000_000 / 20


ERRORS = [
    ({"masks": {"x": torch.ones(2, dtype=torch.bool)}}, "does not have"),
    ({"masks": {"w": torch.ones(3, dtype=torch.bool), "b": torch.ones(2, dtype=torch.bool)}}, "shape"),
    ({"masks": {"w": torch.ones(2, 2, dtype=torch.bool)}}, "no mask"),
    ({"masks": {"w": torch.ones(2, 2)}}, "bool"),
    ({"unmasked": "maybe"}, "unmasked"),
    ({"max_grad_norm": -1.0}, "max_grad_norm"),
    ({"lr": -1.0}, "Invalid learning rate"),
    ({"betas": (0.9, 1.0)}, "Invalid beta parameter at index 1"),
]


@pytest.mark.parametrize(("kwargs", "message"), ERRORS)
def test_bad_arguments_say_what_is_wrong(kwargs: dict, message: str) -> None:
    named = [("w", nn.Parameter(torch.zeros(2, 2))), ("b", nn.Parameter(torch.zeros(2)))]
    with pytest.raises((ValueError, TypeError), match=message):
        so.SparseAdamW(named, **kwargs)


def test_masks_by_name_need_named_parameters() -> None:
    with pytest.raises(ValueError, match="named_parameters"):
        so.SparseAdamW([nn.Parameter(torch.zeros(2))], masks={"p": torch.ones(2, dtype=torch.bool)})


def test_masks_as_a_list_and_unmasked_policies() -> None:
    w, b = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    mask = torch.tensor([True, False, False, True])
    opt = so.SparseAdamW([w, b], masks=[mask, ~mask], lr=0.1)
    w.grad, b.grad = torch.ones(4), torch.ones(4)
    opt.step()
    assert torch.equal(w.detach() != 1, mask)
    assert torch.equal(b.detach() != 1, ~mask)
    for policy, active in (("freeze", 2), ("dense", 6)):
        opt = so.SparseAdamW([("w", w), ("b", b)], masks={"w": mask}, unmasked=policy)
        assert opt.active_parameters == active


def test_tied_and_non_contiguous_parameters() -> None:
    shared = torch.randn(4, 4)
    with pytest.raises(ValueError, match="share memory"):
        so.SparseAdamW([("a", nn.Parameter(shared)), ("b", nn.Parameter(shared))]).initialize_state()
    base = torch.randn(6, 10)
    ours, theirs = nn.Parameter(base.clone().t()), nn.Parameter(base.clone().t())
    mask = torch.rand(10, 6) < 0.4
    start = theirs.detach().clone()
    opt, reference = so.SparseAdamW([("p", ours)], masks={"p": mask}), torch.optim.AdamW([theirs], foreach=False)
    for step in range(5):
        grad = torch.randn(10, 6, generator=torch.Generator().manual_seed(step))
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        opt.step()
        reference.step()
    torch.testing.assert_close(ours.detach()[mask], theirs.detach()[mask], rtol=1e-6, atol=1e-7)
    assert torch.equal(ours.detach()[~mask], start[~mask])


def test_add_param_group_after_steps_keeps_state() -> None:
    ours, theirs = make_params(), make_params()
    first = dict(list(ours.items())[:2]), dict(list(theirs.items())[:2])
    opt, reference = so.SparseAdamW(first[0].items()), torch.optim.AdamW(first[1].items(), foreach=False)
    for step in range(8):
        if step == 3:
            opt.add_param_group({"params": list(ours.items())[2:], "lr": 1e-2})
            reference.add_param_group({"params": list(theirs.items())[2:], "lr": 1e-2})
        set_grads(ours, step)
        set_grads(theirs, step)
        opt.step()
        reference.step()
    for name in SHAPES:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-7)


def test_version_counters_move() -> None:
    param = nn.Parameter(torch.ones(8))
    opt = so.SparseAdamW([("p", param)])
    param.grad = torch.ones(8)
    before = param._version
    opt.step()
    assert param._version > before
