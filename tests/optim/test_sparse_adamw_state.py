"""What SparseAdamW carries along: state dicts, copies, new masks, base weights, deltas."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from named_parameters import SHAPES, make_params, random_masks, set_grads
from torch import nn

import sparseopt as so


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


def test_masks_may_change_before_anything_is_allocated() -> None:
    params = make_params()
    opt = so.SparseAdamW(params.items(), lr=1e-2)
    masks = random_masks(0.25, seed=5)
    opt.update_masks(masks)
    assert not opt.state
    assert opt.masks == so.MaskSet.from_bool(masks)
    assert opt.active_parameters == sum(int(mask.sum()) for mask in masks.values())
    start = {n: p.detach().clone() for n, p in params.items()}
    for p in params.values():
        p.grad = torch.ones_like(p)
    opt.step()
    for n, p in params.items():
        assert torch.equal(p.detach() != start[n], masks[n])
    assert opt.state_dict()["sparseopt"]["mask_changes"] == 0
    with pytest.raises(ValueError, match="not among the optimizer's parameters"):
        so.SparseAdamW(params.items()).update_masks({"other": torch.ones(3, dtype=torch.bool)})


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


def test_base_values_of_entries_that_left_are_saved() -> None:
    params = make_params(torch.bfloat16)
    some, others = random_masks(0.5), random_masks(0.5, seed=9)
    start = {n: p.detach().clone() for n, p in params.items()}
    opt = so.SparseAdamW(params.items(), masks=some, lr=1e-1)
    with opt.base_weights():
        pass
    for step, masks in enumerate([others, random_masks(0.5, seed=10)]):
        set_grads(params, step)
        opt.step()
        opt.update_masks(masks)
    trained = {n: p.detach().clone() for n, p in params.items()}
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)

    resumed = {n: nn.Parameter(p.clone()) for n, p in trained.items()}
    other = so.SparseAdamW(resumed.items(), masks=some, lr=1e-1)
    with other.base_weights():  # of another model: loading replaces what it kept
        pass
    other.adopt_masks = True
    other.load_state_dict(torch.load(file, weights_only=True))
    for step, masks in enumerate([None, some, others]):
        if masks is not None:
            set_grads(resumed, 2 + step)
            other.step()
            other.update_masks(masks)
        now = {n: p.detach().clone() for n, p in resumed.items()}
        with other.base_weights():
            assert all(torch.equal(resumed[n], start[n]) for n in SHAPES)
        assert all(torch.equal(resumed[n], now[n]) for n in SHAPES)
    assert not all(torch.equal(trained[n], now[n]) for n in SHAPES)
    assert not any("left" in entry for entry in so.SparseAdamW(make_params().items()).state_dict()["state"].values())


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
