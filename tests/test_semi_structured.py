"""2:4 weights in PyTorch's semi-structured format: what is converted, what is refused, and the same outputs on a GPU."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparseopt as so
from sparseopt.benchmarks.semi_structured import check, main, prune, weight_bytes
from sparseopt.semi_structured import _with_plain_strides, semi_structured_backend

BEFORE_AMPERE = not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0)
gpu = pytest.mark.skipif(BEFORE_AMPERE, reason="no CUDA device of compute capability 8.0")


def make_model(dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Sequential:
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(64, 128, bias=bias), nn.GELU(), Conv1D(192, 128), nn.GELU(), nn.Linear(192, 32, bias=bias)
    )
    nn.init.normal_(model[2].weight, std=0.1)
    return model.to(dtype)


def groups_of(weight: Tensor, transposed: bool) -> Tensor:
    rows = weight.T if transposed else weight
    return torch.stack([row[i : i + 4] for row in rows for i in range(0, len(row), 4)])


def test_pruning_keeps_the_larger_two_of_every_four_inputs() -> None:
    model = make_model()
    before = copy.deepcopy(model)
    masks = prune(model)
    assert masks.names == ["0.weight", "2.weight", "4.weight"]
    for index in (0, 2, 4):
        old, new = (groups_of(m[index].weight.detach(), index == 2) for m in (before, model))
        assert ((new != 0).sum(1) == 2).all()
        kept = old.abs().topk(2, dim=1).values.sum(1)
        torch.testing.assert_close(new.abs().sum(1), kept)


def test_a_cpu_is_refused_by_name() -> None:
    model = make_model()
    masks = prune(model)
    for given in (None, masks):
        with pytest.raises(ValueError, match=r"compute capability 8.0 or newer; '0.weight' is on cpu"):
            so.to_semi_structured(model, given)
    assert type(model[0].weight) is nn.Parameter


@pytest.mark.parametrize("transposed", [False, True])
def test_a_layer_that_is_not_two_of_four_is_named_with_its_place(transposed: bool) -> None:
    model = make_model()
    masks = prune(model)
    index = 2 if transposed else 0
    weight = model[index].weight.detach()
    # output 5, inputs 8 to 11: a third nonzero weight
    group = weight[8:12, 5] if transposed else weight[5, 8:12]
    group[group == 0] = torch.tensor([0.5, 0.0])
    bad = {name: masks[name] for name in masks.names}
    mask = bad[f"{index}.weight"]
    (mask[8:12, 5] if transposed else mask[5, 8:12])[:] = True
    with pytest.raises(
        ValueError, match=rf"'{index}.weight' is not 2:4: it has 3 nonzero weights at inputs 8 to 11 of output 5"
    ):
        so.to_semi_structured(model, bad)
    with pytest.raises(ValueError, match=rf"'{index}.weight' has 1 nonzero weights outside of its mask"):
        so.to_semi_structured(model, masks)


def test_what_is_dense_is_no_candidate() -> None:
    with pytest.raises(
        ValueError, match=r"no linear layer of Sequential is 2:4; '0.weight' has [34] nonzero weights at inputs 0"
    ):
        so.to_semi_structured(make_model())
    with pytest.raises(ValueError, match=r"'0.weight' has 6 inputs, which 4 does not divide"):
        so.to_semi_structured(nn.Sequential(nn.Linear(6, 8)))
    model = make_model()
    with pytest.raises(ValueError, match="the masks name no linear layer of Sequential to convert"):
        so.to_semi_structured(model, so.MaskSet.full_like(model))


def test_masks_that_do_not_fit() -> None:
    model = make_model()
    prune(model)
    with pytest.raises(ValueError, match=r"mask for '7.weight', which Sequential does not have"):
        so.to_semi_structured(model, {"7.weight": torch.ones(2, 2, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"mask of '0.weight' has shape \(64, 128\), the parameter \(128, 64\)"):
        so.to_semi_structured(model, {"0.weight": torch.ones(64, 128, dtype=torch.bool)})


def test_backends() -> None:
    assert semi_structured_backend("cutlass").BACKEND == "cutlass"
    with pytest.raises(ValueError, match="one of auto, cusparselt, cutlass, got 'cuda'"):
        semi_structured_backend("cuda")
    if torch.backends.cusparselt.is_available():
        assert semi_structured_backend().BACKEND == "cusparselt"
    else:
        with pytest.raises(ValueError, match="has no cuSPARSELt"):
            semi_structured_backend("cusparselt")


def test_a_benchmark_with_a_wrong_result_reports_no_speed() -> None:
    reference = torch.randn(32, 16)
    dense = reference.bfloat16()
    assert check("case", dense, dense, reference)["2:4"] < 4e-3
    for wrong in (dense * 1.02, dense * torch.nan):
        with pytest.raises(SystemExit, match="no speed is reported"):
            check("case", wrong, dense, reference)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_the_benchmark_needs_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="needs a CUDA GPU"):
        main(["--output", str(tmp_path)])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stride", [(64, 7, 1), (128, 64, 1), (1, 2, 2)])
def test_inputs_get_the_strides_that_torch_flattens(stride: tuple[int, ...]) -> None:
    x = torch.randn(512).as_strided((2, 1, 64), stride)
    (plain,) = _with_plain_strides(nn.Linear(64, 1), (x,))
    torch.testing.assert_close(plain, x, rtol=0, atol=0)
    assert plain.stride(0) == plain.stride(1) * plain.shape[1]
    assert _with_plain_strides(nn.Linear(64, 1), ()) == ()


@pytest.mark.gpu
@gpu
@pytest.mark.skipif(not BEFORE_AMPERE and torch.cuda.get_device_capability()[0] == 8, reason="CUTLASS runs here")
def test_cutlass_is_refused_where_it_does_not_run() -> None:
    model = make_model(torch.bfloat16).cuda()
    prune(model)
    with pytest.raises(ValueError, match=r"run on compute capability 8.x, '0.weight' is on"):
        so.to_semi_structured(model, backend="cutlass")
    assert type(model[0].weight) is nn.Parameter


# ---- on a GPU ------------------------------------------------------------------------------------------------------------
def backends() -> list[str]:
    found = ["cusparselt"] if torch.backends.cusparselt.is_available() else []
    return found + (["cutlass"] if BEFORE_AMPERE or torch.cuda.get_device_capability()[0] == 8 else [])


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_equal_the_dense_ones(backend: str, dtype: torch.dtype, bias: bool) -> None:
    dense = make_model(dtype, bias).cuda().requires_grad_(False)
    masks = prune(dense)
    sparse = copy.deepcopy(dense)
    assert so.to_semi_structured(sparse, masks, backend=backend) == ["0.weight", "2.weight", "4.weight"]
    exact = copy.deepcopy(dense).float()
    assert weight_bytes(sparse) < 0.7 * weight_bytes(dense)
    for shape in ((1, 64), (13, 64), (3, 5, 64), (4, 16, 64), (2, 1, 64)):
        x = torch.randn(shape, device="cuda", dtype=dtype)
        if shape == (2, 1, 64):
            x = x.as_strided(shape, (64, 7, 1))  # as in generation with a cache
        for context in (torch.no_grad(), torch.inference_mode()):
            with context:
                out = sparse(x)
        assert out.shape == (*shape[:-1], 32)
        check(str(shape), out, dense(x), exact(x.float()))


@pytest.mark.gpu
@gpu
def test_without_masks_the_layers_that_are_two_of_four_are_converted() -> None:
    model = make_model(torch.bfloat16).cuda()
    prune(model)
    nn.init.normal_(model[0].weight)
    model.append(nn.Linear(32, 12, device="cuda", dtype=torch.bfloat16))  # 12 outputs: no backend takes them
    model[5].weight.detach()[:, ::2] = 0
    with pytest.warns(UserWarning, match=r"'5.weight' \(12 outputs and 32 inputs must be multiples of"):
        assert so.to_semi_structured(model) == ["2.weight", "4.weight"]
    assert type(model[0].weight) is nn.Parameter
    single = make_model().cuda()
    prune(single)
    with pytest.raises(ValueError, match=r"fp16 and bf16 weights, '0.weight' is torch.float32"):
        so.to_semi_structured(single)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("kind", ["gpt2", "llama-3.2-1b"])
def test_language_models(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config: Any
    if kind == "gpt2":
        config = transformers.GPT2Config(n_embd=128, n_layer=2, n_head=4, vocab_size=256, n_positions=64)
        model: Any = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.LlamaConfig(
            hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=256,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
    dense = model.to("cuda", torch.bfloat16).eval().requires_grad_(False)
    masks = prune(dense)
    sparse = copy.deepcopy(dense)
    assert len(so.to_semi_structured(sparse, masks)) == len(masks.names) == (8 if kind == "gpt2" else 14)
    tokens = torch.randint(256, (2, 24), device="cuda")
    exact = copy.deepcopy(dense).float()(input_ids=tokens).logits
    with torch.no_grad():
        check(kind, sparse(input_ids=tokens).logits, dense(input_ids=tokens).logits, exact)
        ids = sparse.generate(tokens[:, :4], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert ids.shape == (2, 8)
