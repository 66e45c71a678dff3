"""Gradient capture: it equals what dense gradients would have given, and dense gradients never pile up."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
from captured_model import VOCAB, Model, assert_equal_weights, captured, loss_of, make_masks, make_model, optimizer_for
from torch import Tensor, nn

import sparseopt as so
from sparseopt.optim import capture


# ---- equality with dense gradients -----------------------------------------------------------------------------------
@pytest.mark.parametrize("clip", [None, 0.1, float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "kwargs",
    [{}, {"tied": True}, {"checkpointing": "reentrant"}, {"checkpointing": "non-reentrant"}],
    ids=["plain", "tied", "reentrant", "non-reentrant"],
)
def test_equals_dense_gradients_bit_for_bit(kwargs: dict, dtype: torch.dtype, clip: float | None) -> None:
    models = [make_model(dtype, **kwargs) for _ in range(2)]
    start = copy.deepcopy(models[0])
    opts = [optimizer_for(m, capture, max_grad_norm=clip) for m, capture in zip(models, (True, False), strict=True)]
    for step in range(4):
        for model, opt in zip(models, opts, strict=True):
            loss_of(model, step).backward()
            opt.step()
            opt.zero_grad()
        if clip is not None:
            assert torch.equal(opts[0].grad_norm(), opts[1].grad_norm())
    assert_equal_weights(*models)
    masks = make_masks(start)
    for (name, now), before in zip(models[0].named_parameters(), start.parameters(), strict=True):
        assert torch.equal(now[~masks[name]], before[~masks[name]]), name
        assert now.dim() < 2 or not torch.equal(now, before), name


@pytest.mark.parametrize("checkpointing", [None, "reentrant", "non-reentrant"])
def test_a_block_used_three_times_accumulates_every_use(checkpointing: str | None) -> None:
    """Reentrant checkpointing runs one inner backward, and so one hook call, per use."""
    model = make_model(checkpointing=checkpointing, shared_block=True)
    dense = make_model(shared_block=True)
    opt = optimizer_for(model)
    loss_of(model, 0).backward()
    loss_of(dense, 0).backward()
    masks = make_masks(model)
    found = captured(opt)
    for name, param in dense.named_parameters():
        if param.grad is not None:
            torch.testing.assert_close(found[name], param.grad[masks[name]], rtol=1e-6, atol=1e-8)
    assert "blocks.0.up.weight" in found


def test_micro_batches_accumulate_in_fp32_which_bf16_gradients_do_not() -> None:
    steps = 16
    model, dense = make_model(torch.bfloat16), make_model(torch.bfloat16)
    opt = optimizer_for(model)
    masks = make_masks(model)
    exact = {n: torch.zeros(p.shape) for n, p in model.named_parameters()}
    one = make_model(torch.bfloat16)
    for step in range(steps):
        (loss_of(model, step) / steps).backward()
        (loss_of(dense, step) / steps).backward()
        one.zero_grad()
        (loss_of(one, step) / steps).backward()
        for name, param in one.named_parameters():
            if param.grad is not None:
                exact[name] += param.grad.float()
    found = captured(opt)
    errors = {"captured": 0.0, "dense": 0.0}
    for name, param in dense.named_parameters():
        if name != "unused":
            want = exact[name][masks[name]]
            assert param.grad is not None
            assert torch.equal(found[name], want), name
            errors["captured"] += float((found[name] - want).abs().sum())
            errors["dense"] += float((param.grad[masks[name]].float() - want).abs().sum())
    assert errors["captured"] == 0 < errors["dense"]


def test_retained_graph_accumulates_twice() -> None:
    model = make_model()
    opt = optimizer_for(model)
    loss = loss_of(model, 0)
    loss.backward(retain_graph=True)
    once = captured(opt)
    loss.backward()
    for name, value in captured(opt).items():
        torch.testing.assert_close(value, 2 * once[name])


def test_gradients_that_wait_are_gathered_when_backward_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on GPUs, where they may lie in memory that the next pass overwrites (a CUDA graph's)."""
    expected = make_model()
    ours = make_model()
    a, b = optimizer_for(expected), optimizer_for(ours)
    for step in range(2):
        loss_of(expected, step).backward()
    with monkeypatch.context() as waiting:
        waiting.setattr(capture, "AT_ONCE", frozenset())
        gathered = []
        flush = capture.GradientCapture.flush
        waiting.setattr(
            capture.GradientCapture, "flush", lambda self: gathered.append(len(self._waiting)) or flush(self)
        )
        for step in range(2):
            loss_of(ours, step).backward()
            assert b._capture is not None
            assert not b._capture._waiting
    assert [count for count in gathered if count] == [gathered[-1]] * 2  # all at once, at the end of each pass
    assert gathered[-1] > 3
    for name, values in captured(a).items():
        assert torch.equal(values, captured(b)[name]), name


def test_clipping_uses_the_norm_over_active_entries() -> None:
    model, dense = make_model(), make_model()
    opt = optimizer_for(model, max_grad_norm=0.05)
    loss_of(model, 0).backward()
    loss_of(dense, 0).backward()
    masks = make_masks(model)
    active = [p.grad[masks[n]] for n, p in dense.named_parameters() if p.grad is not None]
    opt.step()
    torch.testing.assert_close(opt.grad_norm(), torch.cat(active).norm())
    assert opt.grad_norm() > 0.05
    # The first moment after one step is (1 - beta1) times the clipped gradient.
    moments = torch.cat([opt.state[p]["exp_avg"] for p in model.parameters()])
    torch.testing.assert_close((moments / 0.1).norm(), torch.tensor(0.05), rtol=1e-4, atol=0)


# ---- which parameters ------------------------------------------------------------------------------------------------
def test_frozen_and_unused_parameters_stay_and_take_no_step() -> None:
    model = make_model()
    model.blocks[0].requires_grad_(False)
    before = copy.deepcopy(model)
    opt = optimizer_for(model)
    for step in range(2):
        loss_of(model, step).backward()
        opt.step()
    for (name, now), old in zip(model.named_parameters(), before.parameters(), strict=True):
        idle = name.startswith("blocks.0.") or name == "unused"
        assert torch.equal(now, old) == idle, name
        assert opt.state[now]["step"].item() == (0 if idle else 2), name


def test_an_unused_parameter_does_not_reuse_an_earlier_gradient() -> None:
    """The buffer still holds the last step's values of a parameter that takes no part in this one."""
    model = make_model()
    opt = optimizer_for(model, max_grad_norm=float("inf"))
    loss_of(model, 0).backward()
    opt.step()
    head, weight = model.head.weight.detach().clone(), model.blocks[0].up.weight
    expected = 2 * weight.detach()[make_masks(model)["blocks.0.up.weight"]]
    (weight**2).sum().backward()
    opt.step()
    assert torch.equal(model.head.weight, head)
    torch.testing.assert_close(opt.grad_norm(), expected.norm())


def test_unmasked_freeze_frees_gradients_and_trains_nothing_else() -> None:
    model = make_model()
    before = copy.deepcopy(model)
    masks = {"head.weight": make_masks(model)["head.weight"]}
    opt = so.SparseAdamW(model.named_parameters(), lr=0.1, masks=masks, unmasked="freeze", capture_gradients=True)
    loss_of(model, 0).backward()
    assert all(p.grad is None for p in model.parameters())
    opt.step()
    for (name, now), old in zip(model.named_parameters(), before.named_parameters(), strict=True):
        assert torch.equal(now, old[1]) == (name != "head.weight"), name
    assert opt.gradient_bytes() == 4 * int(masks["head.weight"].sum())


def test_an_added_group_is_captured_too() -> None:
    model, extra = make_model(), nn.Linear(VOCAB, 2)
    opt = so.SparseAdamW(model.named_parameters(), lr=0.1, capture_gradients=True)
    opt.add_param_group({"params": [(f"extra.{n}", p) for n, p in extra.named_parameters()]})
    before = extra.weight.detach().clone()
    extra(model(torch.tensor([[1, 2]]))).sum().backward()
    assert extra.weight.grad is None
    opt.step()
    assert not torch.equal(extra.weight, before)


@pytest.mark.parametrize("change", ["group", "dtype"])
def test_what_was_captured_survives_a_change_before_the_step(change: str) -> None:
    model, other = make_model(), make_model()
    opts = optimizer_for(model, unmasked="dense"), optimizer_for(other, unmasked="dense")
    for target, opt in zip((model, other), opts, strict=True):
        loss_of(target, 0).backward()
        if target is model and change == "group":
            opt.add_param_group({"params": [("late", nn.Parameter(torch.zeros(3)))]})
        if target is model and change == "dtype":
            target.double()
        opt.step()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.float(), b, rtol=1e-6, atol=1e-7)
        assert opts[0].state[a]["step"] == opts[1].state[b]["step"]


def test_gradients_set_by_hand_are_taken() -> None:
    model = make_model()
    dense = copy.deepcopy(model)
    opts = optimizer_for(model), optimizer_for(dense, capture=False)
    for target, opt in zip((model, dense), opts, strict=True):
        target.head.weight.grad = torch.ones_like(target.head.weight)
        opt.step()
    assert model.head.weight.grad is None
    assert_equal_weights(model, dense)


# ---- memory ----------------------------------------------------------------------------------------------------------
def test_dense_gradients_never_coexist() -> None:
    model = make_model()
    opt = optimizer_for(model)
    alive: list[int] = []

    def count(_: Tensor) -> None:  # runs before the optimizer's hook for some, after it for others
        alive.append(sum(p.grad is not None for p in model.parameters()))

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(count)
    loss_of(model, 0).backward()
    assert len(alive) == len(list(model.parameters())) - 1  # all but the unused one
    assert max(alive) == 0
    assert all(p.grad is None for p in model.parameters())

    opt._capture.disarm()  # type: ignore[union-attr]
    alive.clear()
    loss_of(model, 0).backward()
    assert max(alive) == len(alive)  # what the count sees without capture


def test_freed_gradients_are_really_released() -> None:
    """Nobody keeps a reference to an earlier gradient while backward goes on."""
    model = make_model()
    references: list[weakref.ref] = []
    alive: list[int] = []

    def watch(param: Tensor) -> None:
        alive.append(sum(reference() is not None for reference in references))
        assert param.grad is not None
        references.append(weakref.ref(param.grad))

    for param in model.parameters():  # before the optimizer's hooks: the gradient is still there
        param.register_post_accumulate_grad_hook(watch)
    opt = optimizer_for(model)
    loss_of(model, 0).backward()
    assert len(alive) == len(list(model.parameters())) - 1
    assert max(alive) == 0
    assert opt.gradient_bytes() == 4 * opt.active_parameters


# ---- discarding, misuse ----------------------------------------------------------------------------------------------
def test_zero_grad_discards_what_was_captured() -> None:
    models = [make_model() for _ in range(2)]
    opts = [optimizer_for(m) for m in models]
    loss_of(models[0], 7).backward()
    opts[0].zero_grad()
    with pytest.raises(RuntimeError, match=r"captured no gradient since the last step: run backward\(\) first"):
        opts[0].step()
    for model, opt in zip(models, opts, strict=True):
        loss_of(model, 1).backward()
        opt.step()
    assert_equal_weights(*models)


def test_model_zero_grad_keeps_and_step_consumes_the_captured_gradients() -> None:
    """transformers' Trainer calls model.zero_grad(), never the optimizer's."""
    models = [make_model() for _ in range(2)]
    opts = [optimizer_for(models[0]), optimizer_for(models[1], capture=False)]
    for step in range(3):
        for model, opt in zip(models, opts, strict=True):
            loss_of(model, step).backward()
            opt.step()
            model.zero_grad()
    assert_equal_weights(*models)
    with pytest.raises(RuntimeError, match="captured no gradient"):
        opts[0].step()


@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler_is_refused_in_one_sentence(unscale: bool) -> None:
    model = make_model()
    opt = optimizer_for(model)
    before = copy.deepcopy(model)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(model, 0)).backward()
    if unscale:
        scaler.unscale_(opt)
    with pytest.raises(RuntimeError, match=r"capture_gradients=True cannot be combined with torch\.amp\.GradScaler"):
        scaler.step(opt)
    assert_equal_weights(model, before)


def test_new_masks_between_backward_and_step_are_refused() -> None:
    model = make_model()
    opt = optimizer_for(model)
    loss_of(model, 0).backward()
    with pytest.raises(RuntimeError, match="between backward"):
        opt.update_masks(make_masks(model, 0.5))
    opt.step()
    opt.update_masks(make_masks(model, 0.5))
    loss_of(model, 1).backward()
    opt.step()
    assert all(p.grad is None for p in model.parameters())


# ---- copies and lifetime ---------------------------------------------------------------------------------------------
COPIES: dict[str, Callable] = {"deepcopy": copy.deepcopy, "pickle": lambda pair: pickle.loads(pickle.dumps(pair))}


def trained() -> tuple[Model, so.SparseAdamW]:
    model = make_model()
    opt = optimizer_for(model)
    loss_of(model, 0).backward()
    opt.step()
    return model, opt


@pytest.mark.parametrize("how", COPIES)
def test_copies_capture_their_own_parameters(how: str) -> None:
    model, opt = trained()
    other_model, other = COPIES[how]((model, opt))
    loss_of(other_model, 1).backward()
    assert all(p.grad is None for p in other_model.parameters())
    assert not captured(opt)
    assert captured(other)
    other.step()
    loss_of(model, 1).backward()
    opt.step()
    assert_equal_weights(model, other_model)


def test_a_deleted_optimizer_captures_no_more() -> None:
    model, opt = trained()
    reference = weakref.ref(opt)
    del opt
    gc.collect()
    assert reference() is None, "hooks on the parameters keep a discarded optimizer alive"
    for _ in range(2):
        loss_of(model, 1).backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if n != "unused")


def test_state_loaded_between_backward_and_step_drops_the_captured() -> None:
    model, opt = trained()
    state = copy.deepcopy(opt.state_dict())
    loss_of(model, 1).backward()
    opt.load_state_dict(state)
    with pytest.raises(RuntimeError, match="captured no gradient"):
        opt.step()


def test_a_discarded_model_is_freed() -> None:
    """Hooks belong to the parameters; nothing that they reach may keep the parameters."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
    opt = so.SparseAdamW(model.named_parameters(), capture_gradients=True)
    model(torch.randn(4, 8)).sum().backward()
    opt.step()
    gone = [weakref.ref(p) for p in model.parameters()]
    del model, opt
    gc.collect()
    assert not [r for r in gone if r() is not None]


def test_a_parameter_replaced_by_one_of_the_same_storage_is_trained() -> None:
    """FSDP2 and others put new parameter objects into the groups: neither address nor order need to change."""
    param = torch.nn.Parameter(torch.ones(4))
    opt = so.SparseAdamW([("w", param)], lr=0.1)
    param.grad = torch.ones(4)
    opt.step()
    other = torch.nn.Parameter(param.data)
    opt.param_groups[0]["params"][0] = other
    before = other.detach().clone()
    other.grad = torch.ones(4)
    opt.step()
    assert not torch.equal(other, before)
    assert opt.state[other]["step"] == 2
