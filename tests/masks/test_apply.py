"""apply_masks_to_model: what trains, what stays, what is refused."""

import warnings

import pytest
import torch
from torch import nn

import sparseopt as so
from sparseopt.masks import apply
from sparseopt.masks.apply import apply_masks_to_model

WARNING = "dense AdamW still decays"


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3))


def masks_of(model, density=0.3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.rand(p.shape, generator=generator) < density for n, p in model.named_parameters()}


def backward(model, seed=0):
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(seed))
    model(x).square().sum().backward()


def tiny_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, tie_word_embeddings=True, pad_token_id=None,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


# ---- freeze ----------------------------------------------------------------------------------------------------------
@pytest.mark.filterwarnings(f"ignore:.*{WARNING}")
@pytest.mark.parametrize("as_mask_set", [True, False])
def test_freeze_drops_gradients_of_inactive_entries(as_mask_set):
    model, plain = small(), small()
    masks = masks_of(model)
    handle = apply_masks_to_model(model, so.MaskSet.from_bool(masks) if as_mask_set else masks)
    for _ in range(2):  # accumulation
        backward(model)
        backward(plain)
    for (name, param), (_, free) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(param.grad, free.grad * masks[name], rtol=0, atol=0)
    active = sum(int(mask.sum()) for mask in masks.values())
    total = sum(mask.numel() for mask in masks.values())
    assert (handle.active_parameters, handle.total_parameters) == (active, total)
    assert handle.inactive_share == pytest.approx(1 - active / total)
    assert handle.untouched == []
    assert f"{total - active:,} of {total:,} masked weights frozen" in str(handle)
    handle.remove()
    model.zero_grad()
    plain.zero_grad()
    backward(model)
    backward(plain)
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), plain.parameters(), strict=True))
    handle.remove()


def test_freeze_warns_and_says_what_to_type():
    model = small()
    masks = masks_of(model)
    with pytest.warns(UserWarning, match=WARNING) as caught:
        apply_masks_to_model(model, masks)
    assert "sparseopt.SparseAdamW(model.named_parameters(), masks=masks)" in str(caught[0].message)
    with pytest.warns(UserWarning, match='masks=masks, unmasked="dense"'):
        apply_masks_to_model(small(), {"0.weight": masks["0.weight"]})


@pytest.mark.filterwarnings(f"ignore:.*{WARNING}")
def test_the_example_of_the_document():
    """AdamW over what still requires gradients: without decay, frozen entries stay as they were, bit by bit."""
    model = small()
    masks = masks_of(model)
    masks["0.bias"][:] = False
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    handle = apply_masks_to_model(model, masks)
    assert handle.frozen == ["0.bias"]
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 3
    optimizer = torch.optim.AdamW(trained, lr=0.1, weight_decay=0.0)
    for seed in range(3):
        optimizer.zero_grad()
        backward(model, seed)
        optimizer.step()
    for name, param in model.named_parameters():
        assert torch.equal(param[~masks[name]], before[name][~masks[name]])
        assert not masks[name].any() or (param[masks[name]] != before[name][masks[name]]).all()
    handle.remove()
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.filterwarnings(f"ignore:.*{WARNING}")
def test_dense_adamw_decays_what_sparse_adamw_leaves():
    """What the warning says is so."""
    start = {name: param.detach().clone() for name, param in small().named_parameters()}
    masks = masks_of(small())
    moved = {}
    for way in ("dense", "sparse"):
        model = small()
        if way == "dense":
            apply_masks_to_model(model, masks)
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
        else:
            optimizer = so.SparseAdamW(model.named_parameters(), lr=0.1, weight_decay=0.1, masks=masks)
        backward(model)
        optimizer.step()
        moved[way] = sum(int((p != start[n])[~masks[n]].sum()) for n, p in model.named_parameters())
    assert moved["dense"] > 0
    assert moved["sparse"] == 0


@pytest.mark.filterwarnings(f"ignore:.*{WARNING}")
def test_freeze_clears_what_was_accumulated_and_drops_nan():
    model = small()
    backward(model)
    masks = masks_of(model)
    masks["2.bias"][:] = False
    model[0].weight.grad[:] = float("nan")
    apply_masks_to_model(model, masks)
    assert model[2].bias.grad is None
    assert (model[0].weight.grad[~masks["0.weight"]] == 0).all()
    assert model[0].weight.grad[masks["0.weight"]].isnan().all()


@pytest.mark.filterwarnings(f"ignore:.*{WARNING}")
def test_frozen_before_stays_frozen_after_remove():
    model = small()
    model[0].weight.requires_grad_(False)
    masks = masks_of(model)
    masks["0.weight"][:] = False
    masks["2.weight"][:] = False
    handle = apply_masks_to_model(model, masks)
    assert handle.frozen == ["0.weight", "2.weight"]
    handle.remove()
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]


@pytest.mark.filterwarnings(f"ignore:.*{WARNING}")
def test_sparse_gradients_are_refused():
    model = nn.Embedding(5, 3, sparse=True)
    apply_masks_to_model(model, {"weight": torch.rand(5, 3) < 0.5})
    with pytest.raises(ValueError, match=r"'weight' is torch\.sparse_coo"):
        model(torch.tensor([1, 2])).sum().backward()


@pytest.mark.filterwarnings(f"ignore:.*{WARNING}")
def test_hooks_hold_packed_bits_only():
    model = nn.Linear(512, 512, bias=False)
    handle = apply_masks_to_model(model, masks_of(model))
    (hook,) = model.weight._post_accumulate_grad_hooks.values()
    assert hook.bits.nbytes == 512 * 512 // 8
    assert len(handle._hooks) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings(f"ignore:.*{WARNING}")
def test_masks_follow_the_model_to_the_gpu():
    model, plain = small(), small().cuda()
    masks = masks_of(model)
    apply_masks_to_model(model, masks)
    model.cuda()
    x = torch.randn(5, 6, device="cuda")
    for one in (model, plain):
        one(x).square().sum().backward()
    for (name, param), (_, free) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(param.grad, free.grad * masks[name].cuda(), rtol=0, atol=0)
    apply_masks_to_model(model, masks, "zero")
    assert all(not param[~masks[name].cuda()].any() for name, param in model.named_parameters())


# ---- zero ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero(dtype, monkeypatch):
    monkeypatch.setattr(apply, "BLOCK", 16)
    model = small().to(dtype)
    model[2].weight = nn.Parameter(torch.randn(9, 3, dtype=dtype).t())  # not contiguous
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    masks = masks_of(model, 0.5)
    del masks["0.bias"]
    version = model[0].weight._version
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        applied = apply_masks_to_model(model, masks, mode="zero")
    for name, param in model.named_parameters():
        expected = torch.where(masks[name], before[name], 0) if name in masks else before[name]
        assert torch.equal(param, expected)
        assert param.requires_grad
    assert model[0].weight._version > version
    assert applied.untouched == ["0.bias"]
    assert "set to 0" in str(applied)
    with pytest.raises(ValueError, match="cannot be brought back"):
        applied.remove()


def test_zero_with_nothing_active():
    model = small()
    masks = masks_of(model)
    masks["0.weight"][:] = False
    before = model[0].weight.detach().clone()
    kept = apply_masks_to_model(model, masks, "zero", keep_unmasked=True)
    assert torch.equal(model[0].weight, before)
    assert kept.untouched == ["0.weight"]
    with pytest.warns(UserWarning, match="1 parameters have nothing active and are 0 throughout now, '0.weight'"):
        apply_masks_to_model(model, masks, "zero")
    assert not model[0].weight.any()


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
def test_tied_parameters_count_once(name):
    model = tiny_llama()
    mask = torch.rand(64, 16) < 0.5
    applied = apply_masks_to_model(model, {name: mask}, "zero")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight == 0, ~mask)
    assert applied.total_parameters == 64 * 16
    assert len(applied.untouched) == sum(1 for _ in model.parameters()) - 1
    both = {"model.embed_tokens.weight": mask, "lm_head.weight": mask}
    assert apply_masks_to_model(model, both, "zero").total_parameters == 64 * 16
    with pytest.raises(ValueError, match=r"'model.embed_tokens.weight' and 'lm_head.weight' are tied"):
        apply_masks_to_model(model, {**both, "lm_head.weight": ~mask}, "zero")


def test_names_of_wrappers_do_not_matter():
    class DataParallel(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    model = small()
    masks = masks_of(model)
    apply_masks_to_model(DataParallel(model), masks, "zero")
    assert not model[0].weight[~masks["0.weight"]].any()


# ---- refused ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", ["freeze", "zero"])
def test_what_does_not_fit_is_named_and_nothing_changes(mode):
    model = small()
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    good = masks_of(model)
    with pytest.raises(ValueError, match=r"'3.weight' fits no parameter of the model, which has 4"):
        apply_masks_to_model(model, {**good, "3.weight": good["0.weight"]}, mode)
    with pytest.raises(ValueError, match=r"'2.weight' has shape \[3, 9\], its mask has \[9, 3\]"):
        apply_masks_to_model(model, {**good, "2.weight": good["2.weight"].t()}, mode)
    with pytest.raises(TypeError, match=r"'2.weight' must be a bool tensor"):
        apply_masks_to_model(model, {**good, "2.weight": torch.ones(3, 9)}, mode)
    assert all(torch.equal(param, before[name]) for name, param in model.named_parameters())
    assert all(not param._post_accumulate_grad_hooks for param in model.parameters())


def test_unknown_mode():
    with pytest.raises(ValueError, match="mode must be 'freeze' or 'zero', got 'prune'"):
        apply_masks_to_model(small(), {}, "prune")
