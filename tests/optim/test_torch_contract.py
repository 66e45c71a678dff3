"""AdamW's own inputs and error inputs (torch.testing._internal.common_optimizers) and torch's optimizer contract.

Everything is active here: SparseAdamW must then behave as torch.optim.AdamW does, wherever torch's test-suite looks.
"""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import re
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerInput,
    optim_error_inputs_func_adamw,
    optim_inputs_func_adamw,
)

import sparseopt as so

# Error inputs of torch's AdamW that SparseAdamW answers otherwise, by description, with the reason.
NO_FOREACH = (
    "one fused kernel takes every list of tensors: `foreach` is not an argument, and tensor hyper-parameters work "
    "without it",
    TypeError,
    "unexpected keyword argument 'foreach'",
)
WAIVERS: dict[str, tuple[str, type[Exception], str]] = {
    "lr as Tensor doesn't work with foreach & not capturable": NO_FOREACH,
    r"betas\[0\] as a Tensor is not supported for capturable=False and foreach=True": NO_FOREACH,
}
# Arguments of torch.optim.AdamW that are not taken.
NOT_TAKEN = {"foreach", "fused", "differentiable"}


def adamw_inputs() -> list[OptimizerInput]:
    """torch's inputs for the CPU and, without their device, those for GPUs (capturable, tensor hyper-parameters)."""
    seen, result = set(), []
    for device in ("cpu", "cuda"):
        for given in optim_inputs_func_adamw(device):
            if given.desc not in seen:
                seen.add(given.desc)
                result.append(given)
    return result


INPUTS = adamw_inputs()
ERROR_INPUTS: list[ErrorOptimizerInput] = optim_error_inputs_func_adamw("cpu", torch.float32)
each_input = pytest.mark.parametrize("given", INPUTS, ids=lambda given: given.desc)


def reference_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    """torch refuses capturable=True on the CPU; it changes where the step is counted, not what is computed."""
    return {**{k: v for k, v in copy.deepcopy(kwargs).items() if k != "capturable"}, "foreach": False}


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


def assert_bitwise(ours: list[nn.Parameter], theirs: list[nn.Parameter]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


def through_disk(value: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


# ---- inputs and errors -----------------------------------------------------------------------------------------------
def test_torch_still_has_the_inputs_these_tests_are_about() -> None:
    assert len(INPUTS) >= 10
    assert len(ERROR_INPUTS) >= 12
    assert set(WAIVERS) <= {e.optimizer_error_input.desc for e in ERROR_INPUTS}, "a waiver for an input that is gone"


def test_arguments_are_those_of_torch_in_its_order() -> None:
    theirs = inspect.signature(torch.optim.AdamW).parameters
    ours = inspect.signature(so.SparseAdamW).parameters
    assert set(theirs) - set(ours) == NOT_TAKEN
    positional = [n for n, p in theirs.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [n for n, p in ours.items() if p.kind is p.POSITIONAL_OR_KEYWORD] == positional
    for name in set(theirs) & set(ours):
        assert ours[name].default == theirs[name].default, name


@each_input
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_torch_adamw(given: OptimizerInput, dtype: torch.dtype) -> None:
    ours, theirs = make_params(dtype), make_params(dtype)
    train(so.SparseAdamW(ours, **copy.deepcopy(given.kwargs)), ours, range(20))
    train(torch.optim.AdamW(theirs, **reference_kwargs(given.kwargs)), theirs, range(20))
    assert_same(ours, theirs)


@pytest.mark.parametrize("error", ERROR_INPUTS, ids=lambda e: e.optimizer_error_input.desc)
def test_error_inputs(error: ErrorOptimizerInput) -> None:
    given = error.optimizer_error_input
    expected, pattern = error.error_type, error.error_regex
    if given.desc in WAIVERS:
        _, expected, pattern = WAIVERS[given.desc]
    params = make_params() if given.params is None else given.params
    if issubclass(expected, Warning):
        with pytest.warns(expected, match=pattern):
            so.SparseAdamW(params, **given.kwargs)
        return
    with pytest.raises(expected, match=pattern):
        so.SparseAdamW(params, **given.kwargs)


@pytest.mark.parametrize("name", sorted(NOT_TAKEN))
def test_arguments_that_are_not_taken_are_refused_by_name(name: str) -> None:
    with pytest.raises(TypeError, match=name):
        so.SparseAdamW(make_params(), **{name: True})  # type: ignore[arg-type]


def test_complex_and_integer_parameters_are_refused() -> None:
    for dtype in (torch.complex64, torch.int32):
        with pytest.raises(TypeError, match=re.escape(str(dtype))):
            so.SparseAdamW([torch.zeros(3, dtype=dtype)])


@pytest.mark.parametrize("capture", [False, True])
def test_sparse_gradients_are_refused(capture: bool) -> None:
    table = nn.Embedding(8, 4, sparse=True)
    opt = so.SparseAdamW(table.named_parameters(), capture_gradients=capture)

    def run() -> None:
        table(torch.tensor([1, 2])).sum().backward()
        opt.step()

    with pytest.raises(RuntimeError, match=r"does not support sparse gradients \(parameter 'weight'\)"):
        run()


@each_input
def test_zero_gradients_move_nothing_without_decay(given: OptimizerInput) -> None:
    kwargs = {**copy.deepcopy(given.kwargs), "weight_decay": 0.0}
    params = make_params()
    before = copy.deepcopy(params)
    opt = so.SparseAdamW(params, **kwargs)
    for param in params:
        param.grad = torch.zeros_like(param)
    opt.step()
    assert_bitwise(params, before)


def test_a_step_without_any_gradient_is_a_no_op() -> None:
    params = make_params()
    before = copy.deepcopy(params)
    opt = so.SparseAdamW(params, lr=0.1)
    assert opt.step(closure=lambda: 7.0) == 7.0
    assert_bitwise(params, before)


# ---- state -----------------------------------------------------------------------------------------------------------
@each_input
@pytest.mark.parametrize("how", ["state_dict", "disk", "deepcopy", "pickle"])
def test_continues_bit_for_bit(given: OptimizerInput, how: str) -> None:
    params = make_params()
    opt = so.SparseAdamW(params, **copy.deepcopy(given.kwargs))
    train(opt, params, range(3))
    if how in ("deepcopy", "pickle"):
        pair = (params, opt)
        others, other = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    else:
        others = copy.deepcopy(params)
        other = so.SparseAdamW(others, lr=0.5)  # hyper-parameters come from the state dict
        state = opt.state_dict()
        other.load_state_dict(through_disk(state) if how == "disk" else state)
    train(opt, params, range(3, 6))
    train(other, others, range(3, 6))
    assert_bitwise(params, others)
    for a, b in zip(params, others, strict=True):
        for key, value in opt.state[a].items():
            assert torch.equal(value, other.state[b][key]), key
            assert value.data_ptr() != other.state[b][key].data_ptr() or not value.numel(), f"{key} is shared"


def test_state_dict_is_deterministic_and_uses_torchs_layout() -> None:
    dicts = []
    for _ in range(2):
        params = make_params()
        opt = so.SparseAdamW(params)
        train(opt, params, range(2))
        dicts.append(opt.state_dict())
    theirs = torch.optim.AdamW(params)
    train(theirs, params, range(1))
    expected = theirs.state_dict()
    assert list(dicts[0]["state"]) == list(dicts[1]["state"]) == list(expected["state"])
    assert dicts[0]["param_groups"] == dicts[1]["param_groups"]
    assert set(expected["state"][0]) <= set(dicts[0]["state"][0])
    assert set(expected["param_groups"][0]) - set(dicts[0]["param_groups"][0]) <= NOT_TAKEN | {"decoupled_weight_decay"}
    for key, entry in dicts[0]["state"].items():
        for name, value in entry.items():
            assert torch.equal(value, dicts[1]["state"][key][name])


def test_named_parameters_in_another_order_find_their_state() -> None:
    def named(params: list[nn.Parameter]) -> list[tuple[str, nn.Parameter]]:
        return [(f"p{i}", p) for i, p in enumerate(params)]

    params = make_params()
    opt = so.SparseAdamW(named(params), lr=0.01)
    train(opt, params, range(3))
    others = copy.deepcopy(params)
    other = so.SparseAdamW(named(others)[::-1], lr=0.01)
    other.load_state_dict(opt.state_dict())
    assert other.param_groups[0]["param_names"] == ["p2", "p1", "p0"]
    train(opt, params, range(3, 5))
    train(other, others, range(3, 5))
    assert_bitwise(params, others)


@pytest.mark.parametrize("step", [3, 3.0], ids=type)
def test_takes_torchs_old_states_whose_step_is_a_number(step: float) -> None:
    params, theirs = make_params(), make_params()
    reference = torch.optim.AdamW(theirs, foreach=False)
    train(reference, theirs, range(3))
    state = copy.deepcopy(reference.state_dict())
    for entry in state["state"].values():
        entry["step"] = step
    for param, value in zip(params, theirs, strict=True):
        param.data.copy_(value)
    opt = so.SparseAdamW(params)
    opt.load_state_dict(state)
    train(opt, params, range(3, 6))
    train(reference, theirs, range(3, 6))
    assert_same(params, theirs)


def test_group_keys_missing_from_an_old_state_keep_their_defaults() -> None:
    params = make_params()
    opt = so.SparseAdamW(params)
    train(opt, params, range(1))
    state = opt.state_dict()
    for group in state["param_groups"]:
        del group["maximize"], group["correct_bias"]
    opt.load_state_dict(state)
    train(opt, params, range(1, 2))
    assert opt.param_groups[0]["maximize"] is False


def test_loading_the_wrong_shape_of_groups_is_refused() -> None:
    params = make_params()
    opt = so.SparseAdamW(params)
    state = so.SparseAdamW([{"params": params[:1]}, {"params": params[1:]}]).state_dict()
    with pytest.raises(ValueError, match=r"loaded state dict has 2 parameter groups, the optimizer 1"):
        opt.load_state_dict(state)
    with pytest.raises(ValueError, match=r"loaded state dict has 2 parameters in group 0, the optimizer 3"):
        opt.load_state_dict(so.SparseAdamW(make_params()[:2]).state_dict())


def test_a_mask_that_is_all_true_is_no_mask() -> None:
    """The same optimizer before and after its first step: full bits, then none."""
    params = make_params()
    opt = so.SparseAdamW(params, masks=[torch.ones_like(p, dtype=torch.bool) for p in params])
    train(opt, params, range(1))
    for masks in (None, [torch.ones_like(p, dtype=torch.bool) for p in params]):
        others = copy.deepcopy(params)
        other = so.SparseAdamW(others, masks=masks)
        other.load_state_dict(opt.state_dict())
        train(other, others, range(1, 2))
        assert torch.equal(other.state[others[0]]["step"], torch.tensor(2.0))


def test_loading_does_not_alias_or_change_the_given_dict() -> None:
    params = make_params()
    opt = so.SparseAdamW(params, lr=torch.tensor(0.01))
    train(opt, params, range(2))
    state = copy.deepcopy(opt.state_dict())
    kept = copy.deepcopy(state)
    other_params = make_params()
    other = so.SparseAdamW(other_params)
    other.load_state_dict(state)
    train(other, other_params, range(2, 4))
    other.param_groups[0]["lr"].mul_(2)
    assert torch.equal(state["param_groups"][0]["lr"], kept["param_groups"][0]["lr"])
    for key, entry in state["state"].items():
        for name, value in entry.items():
            assert torch.equal(value, kept["state"][key][name]), name


def test_copies_keep_every_public_attribute() -> None:
    opt = so.SparseAdamW(make_params(), max_grad_norm=2.0)
    twin = copy.deepcopy(opt)
    public = {n for n in vars(opt) if not n.startswith("_")}
    assert public == {n for n in vars(twin) if not n.startswith("_")}
    assert twin.max_grad_norm == 2.0


def test_repr_names_the_class_and_its_groups() -> None:
    text = repr(so.SparseAdamW([nn.Parameter(torch.zeros(2))], lr=0.25))
    assert text.startswith("SparseAdamW (")
    assert "lr: 0.25" in text
