"""export_delta: no change is lost, whatever was exported, loaded or masked before."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from torch import nn

import sparseopt as so
from sparseopt.optim import weights

N = 40


def make(
    density: float = 0.5, seed: int = 1, dtype: torch.dtype = torch.float32
) -> tuple[nn.Parameter, so.SparseAdamW]:
    param = nn.Parameter(torch.linspace(-1, 1, N).to(dtype))
    return param, so.SparseAdamW([("p", param)], masks={"p": mask(density, seed)}, lr=0.1)


def mask(density: float, seed: int) -> torch.Tensor:
    return torch.rand(N, generator=torch.Generator().manual_seed(seed)) < density


def step(param: nn.Parameter, opt: so.SparseAdamW, sign: float = 1.0) -> None:
    param.grad = torch.full_like(param, sign)
    opt.step()


def test_a_return_to_the_base_value_after_a_complete_export_is_no_loss() -> None:
    param, opt = make()
    base = param.detach().clone()
    with opt.base_weights():
        pass
    state = {"p": base.clone()}
    step(param, opt)
    opt.export_delta().apply_(state)
    with torch.no_grad():
        param.copy_(base)  # as rounding or a restored weight may do
    opt.export_delta(changed_only=True).apply_(state)
    assert torch.equal(state["p"], base)


def test_the_first_export_of_changes_compares_with_the_base() -> None:
    param, opt = make()
    with opt.base_weights():
        pass
    with torch.no_grad():
        param[int(mask(0.5, 1).nonzero()[0])] += 1
    assert opt.export_delta(changed_only=True).changed_parameters == 1
    assert opt.export_delta(changed_only=True).changed_parameters == 0
    step(param, opt)
    assert opt.export_delta(changed_only=True).changed_parameters == opt.active_parameters


@pytest.mark.parametrize("changed_only", [False, True])
def test_rolling_back_over_a_change_of_masks_loses_nothing(changed_only: bool) -> None:
    param, opt = make()
    opt.adopt_masks = True
    reader = {"p": param.detach().clone()}
    step(param, opt)
    opt.export_delta(changed_only).apply_(reader)
    kept = copy.deepcopy(opt.state_dict()), param.detach().clone()
    for seed in (2, 3):  # masks come and go: those of the second are known to no mask in force afterwards
        opt.update_masks({"p": mask(0.5, seed)})
        step(param, opt)
        opt.export_delta(changed_only).apply_(reader)
    assert torch.equal(reader["p"], param)
    opt.load_state_dict(kept[0])
    with torch.no_grad():
        param.copy_(kept[1])
    opt.export_delta(changed_only).apply_(reader)
    assert torch.equal(reader["p"], param)
    # And it is complete once only.
    step(param, opt)
    after = opt.export_delta(changed_only)
    assert after.changed_parameters == opt.active_parameters
    after.apply_(reader)
    assert torch.equal(reader["p"], param)


def test_state_saved_by_another_process_remembers_that_masks_changed() -> None:
    param, opt = make()
    start = param.detach().clone()
    step(param, opt)
    opt.update_masks({"p": mask(0.3, 2)})
    step(param, opt)
    saved = opt.state_dict()
    assert saved["sparseopt"]["mask_changes"] == 1
    again = nn.Parameter(param.detach().clone())
    other = so.SparseAdamW([("p", again)], masks={"p": mask(0.3, 2)}, lr=0.1)
    other.load_state_dict(saved)
    state = {"p": start}
    other.export_delta().apply_(state)
    assert torch.equal(state["p"], again)  # entries of the first mask included
    assert other.state_dict()["sparseopt"]["mask_changes"] == 1
    del saved["sparseopt"]["mask_changes"]  # of an earlier release: nobody knows
    other.load_state_dict(saved)
    assert other.export_delta().changed_parameters == N


def test_state_under_the_one_mask_that_ever_was_exports_active_entries() -> None:
    param, opt = make()
    step(param, opt)
    again = nn.Parameter(param.detach().clone())
    other = so.SparseAdamW([("p", again)], masks={"p": mask(0.5, 1)}, lr=0.1)
    other.load_state_dict(opt.state_dict())
    assert other.export_delta().changed_parameters == other.active_parameters < N


def test_bits_are_compared() -> None:
    param, opt = make(density=1.1)
    opt.export_delta(changed_only=True)
    with torch.no_grad():
        param[3], param[5] = float("nan"), 0.0
    assert opt.export_delta(changed_only=True).indices("p").tolist() == [3, 5]
    assert opt.export_delta(changed_only=True).changed_parameters == 0  # the NaN is still that NaN
    with torch.no_grad():
        param[5] = -0.0
    assert opt.export_delta(changed_only=True).indices("p").tolist() == [5]
    with torch.no_grad():
        param.view(torch.int32)[3] ^= 1
    assert opt.export_delta(changed_only=True).indices("p").tolist() == [3]


def test_values_of_a_complete_export_stay_when_training_goes_on() -> None:
    param, opt = make()
    opt.initialize_state()  # from now on a change of masks is one
    opt.update_masks({"p": mask(0.3, 2)})
    opt.load_state_dict(opt.state_dict())  # everything may have changed now
    before = param.detach().clone()
    delta = opt.export_delta(changed_only=True)
    step(param, opt)
    assert torch.equal(delta.values("p"), before)
    assert opt.export_delta(changed_only=True).changed_parameters == opt.active_parameters


def test_followers_have_accounts_of_their_own() -> None:
    param, opt = make()
    kept = [weights.follow(opt)]
    state = {"p": param.detach().clone()}

    def look() -> int:
        count = 0
        for part in weights.read(opt, kept[0]):
            positions = torch.arange(N) if part.positions is None else part.positions.long()
            state["p"][positions] = part.values
            count += positions.numel()
        assert torch.equal(state["p"], param)
        return count

    for seed in (2, 3, 1, 4):
        step(param, opt)
        opt.update_masks({"p": mask(0.2, seed)})
        step(param, opt)
        opt.export_delta(changed_only=seed % 2 == 0)  # of no concern to the follower
        if seed != 3:
            assert look() < N
    opt.load_state_dict(opt.state_dict())
    assert look() == N
    assert look() == opt.active_parameters
    copied = copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))
    assert [len(other._left.followers) for other in copied] == [0, 0]
    assert len(opt._left.followers) == 1
    kept.clear()
    gc.collect()
    assert len(opt._left.followers) == 0
