"""SparseAdamW against torch.optim.AdamW: dense equality, masked equality, frozen bits, dtypes, flags."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import sparseopt as so

SHAPES = {"a.weight": (33, 17), "a.bias": (33,), "b.weight": (5, 3, 7), "scalar": (), "empty": (0, 4)}
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


def make_params(dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {n: nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for n, s in SHAPES.items()}


def set_grads(params: dict[str, nn.Parameter], step: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for param in params.values():
        param.grad = (scale * torch.randn(param.shape, generator=generator)).to(param.dtype)


def random_masks(density: float, seed: int = 5) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.rand(s, generator=generator) < density for n, s in SHAPES.items()}


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_dict_round_trip_is_exact_through_torch_save(dtype: torch.dtype) -> None:
    masks = random_masks(0.3)

    def fresh() -> tuple[dict, so.SparseAdamW]:
        params = make_params(dtype)
        return params, so.SparseAdamW(params.items(), masks=masks, amsgrad=True, max_grad_norm=1.0, lr=1e-3)

    straight, opt = fresh()
    for step in range(10):
        set_grads(straight, step)
        opt.step()
    first, opt_first = fresh()
    for step in range(5):
        set_grads(first, step)
        opt_first.step()
    file = io.BytesIO()
    torch.save({"opt": opt_first.state_dict(), "model": {n: p.detach() for n, p in first.items()}}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    second, opt_second = fresh()
    opt_second.load_state_dict(loaded["opt"])
    for name, param in second.items():
        param.data.copy_(loaded["model"][name])
    assert opt_second.state[second["a.weight"]]["exp_avg"].dtype == torch.float32
    for step in range(5, 10):
        set_grads(second, step)
        opt_second.step()
    for name in SHAPES:
        assert torch.equal(straight[name], second[name]), name
        for key, value in opt.state[straight[name]].items():
            assert torch.equal(value, opt_second.state[second[name]][key]), (name, key)


def test_loading_under_another_mask_is_refused_unless_adopted() -> None:
    params = make_params()
    opt = so.SparseAdamW(params.items(), masks=random_masks(0.3))
    set_grads(params, 0)
    opt.step()
    other = so.SparseAdamW(make_params().items(), masks=random_masks(0.3, seed=6))
    with pytest.raises(ValueError, match="another mask"):
        other.load_state_dict(opt.state_dict())
    other.adopt_masks = True
    other.load_state_dict(opt.state_dict())
    assert other.masks == opt.masks


def test_state_matches_by_name_not_position() -> None:
    params = make_params()
    opt = so.SparseAdamW(params.items())
    set_grads(params, 0)
    opt.step()
    reversed_params = make_params()
    other = so.SparseAdamW(list(reversed(reversed_params.items())))
    other.load_state_dict(opt.state_dict())
    for name in SHAPES:
        assert torch.equal(opt.state[params[name]]["exp_avg"], other.state[reversed_params[name]]["exp_avg"])


def test_takes_over_the_state_of_a_dense_adamw() -> None:
    theirs, masks = make_params(), random_masks(0.3)
    reference = torch.optim.AdamW(theirs.items())
    set_grads(theirs, 0)
    reference.step()
    ours = make_params()
    opt = so.SparseAdamW(ours.items(), masks=masks)
    opt.load_state_dict(reference.state_dict())
    assert torch.equal(
        opt.state[ours["a.weight"]]["exp_avg"], reference.state[theirs["a.weight"]]["exp_avg"][masks["a.weight"]]
    )
    assert opt.state[ours["a.weight"]]["step"].item() == 1


def test_deepcopy_continues_identically() -> None:
    params = make_params(torch.bfloat16)
    opt = so.SparseAdamW(params.items(), masks=random_masks(0.3))
    set_grads(params, 0)
    opt.step()
    copied = copy.deepcopy(opt)
    copied_params = dict(zip(params, (p for g in copied.param_groups for p in g["params"]), strict=True))
    for step in range(1, 4):
        set_grads(params, step)
        set_grads(copied_params, step)
        opt.step()
        copied.step()
    for name in SHAPES:
        assert copied_params[name] is not params[name]
        assert torch.equal(copied_params[name], params[name])


def test_weights_loaded_from_outside_are_kept() -> None:
    """A residual refines the weight it finds; it never brings an older weight back."""
    param = nn.Parameter(torch.randn(4096).bfloat16())
    opt = so.SparseAdamW([("p", param)], lr=1e-3)
    for step in range(5):
        param.grad = torch.randn(4096, generator=torch.Generator().manual_seed(step)).bfloat16()
        opt.step()
    loaded = torch.randn(4096).bfloat16()
    loaded[:512] = torch.exp2(
        torch.randint(-9, 9, (512,)).float()
    ).bfloat16()  # powers of two: units differ on both sides
    param.data.copy_(loaded)
    opt.param_groups[0]["lr"] = 0.0
    param.grad = torch.randn(4096).bfloat16()
    opt.step()
    assert torch.equal(param, loaded)


def test_update_masks_keeps_survivors_and_starts_new_entries_fresh() -> None:
    size, flags = 400, {"lr": 1e-2, "weight_decay": 0.1}
    param = nn.Parameter(torch.randn(size, generator=torch.Generator().manual_seed(1)))
    start = param.detach().clone()
    first = torch.arange(size) % 4 == 0
    second = torch.arange(size) % 6 == 0
    opt = so.SparseAdamW([("p", param)], masks={"p": first}, **flags)
    alone: dict[str, tuple[torch.Tensor, nn.Parameter, torch.optim.AdamW]] = {}

    def track(key: str, where: torch.Tensor) -> None:
        p = nn.Parameter(param.detach()[where].clone())
        alone[key] = (where, p, torch.optim.AdamW([p], foreach=False, **flags))

    track("first", first.nonzero().view(-1))
    for step in range(20):
        if step == 8:
            opt.update_masks({"p": second})
            track("grown", (second & ~first).nonzero().view(-1))
        param.grad = torch.randn(size, generator=torch.Generator().manual_seed(100 + step))
        for where, p, o in alone.values():
            p.grad = param.grad[where].clone()
            o.step()
        opt.step()
        if step == 7:
            dropped_value = param.detach()[first & ~second].clone()
    expected = alone["first"][1].detach()[second[first]]
    torch.testing.assert_close(param.detach()[first & second], expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(param.detach()[second & ~first], alone["grown"][1].detach(), rtol=1e-6, atol=1e-7)
    assert torch.equal(param.detach()[first & ~second], dropped_value)
    assert torch.equal(param.detach()[~first & ~second], start[~first & ~second])
    # and all of it survives a round trip
    again = nn.Parameter(param.detach().clone())
    other = so.SparseAdamW([("p", again)], masks={"p": second}, **flags)
    other.load_state_dict(opt.state_dict())
    for o, p in ((opt, param), (other, again)):
        p.grad = torch.ones(size)
        o.step()
    assert torch.equal(param, again)


def test_base_weights_swaps_the_model_before_training_in_and_out() -> None:
    params, masks = make_params(torch.bfloat16), random_masks(0.5)
    start = {n: p.detach().clone() for n, p in params.items()}
    opt = so.SparseAdamW(params.items(), masks=masks, lr=1e-2)
    for step in range(6):
        with opt.base_weights():
            assert all(torch.equal(params[n], start[n]) for n in SHAPES)
        set_grads(params, step)
        opt.step()
        if step == 2:
            opt.update_masks(random_masks(0.5, seed=9))
        if step == 4:
            opt.update_masks(masks)
    trained = {n: p.detach().clone() for n, p in params.items()}
    assert any(not torch.equal(trained[n], start[n]) for n in SHAPES)

    def fail_inside() -> None:
        with opt.base_weights():
            assert all(torch.equal(params[n], start[n]) for n in SHAPES)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_inside()
    assert all(torch.equal(params[n], trained[n]) for n in SHAPES)


def test_base_values_of_entries_that_leave_return_and_leave_again() -> None:
    params = make_params(torch.bfloat16)
    some, others = random_masks(0.5), random_masks(0.5, seed=9)
    start = {n: p.detach().clone() for n, p in params.items()}
    opt = so.SparseAdamW(params.items(), masks=some, lr=1e-1)
    for step, masks in enumerate([others, some, others, some, others]):
        with opt.base_weights():
            assert all(torch.equal(params[n], start[n]) for n in SHAPES)
        set_grads(params, step)
        opt.step()
        opt.update_masks(masks)
        trained = {n: p.detach().clone() for n, p in params.items()}
        with opt.base_weights():
            assert all(torch.equal(params[n], start[n]) for n in SHAPES)
        assert all(torch.equal(params[n], trained[n]) for n in SHAPES)
        active = {n: set(opt._arenas[0].plan.positions(t).tolist()) for t, n in enumerate(opt._arenas[0].names)}
        assert all(active[n].isdisjoint(p.tolist()) for n, (p, _) in opt._left.base.items()), "kept once"


def test_base_weights_after_training_began_is_refused() -> None:
    params = make_params()
    opt = so.SparseAdamW(params.items())
    set_grads(params, 0)
    opt.step()
    with pytest.raises(RuntimeError, match="before the first step"), opt.base_weights():
        pass


def test_export_delta_reconstructs_the_model() -> None:
    params, masks = make_params(torch.bfloat16), random_masks(0.3)
    start = {n: p.detach().clone() for n, p in params.items()}
    opt = so.SparseAdamW(params.items(), masks=masks, lr=1e-2)
    rebuilt = {n: v.clone() for n, v in start.items()}
    for step in range(6):
        set_grads(params, step)
        opt.step()
        if step == 3:
            opt.update_masks(random_masks(0.3, seed=8))
        delta = opt.export_delta(changed_only=step % 2 == 1)
        assert delta.step == step + 1
        delta.apply_(rebuilt)
        assert all(torch.equal(rebuilt[n], params[n]) for n in SHAPES), step


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
