"""GradientEMA's updates as launches: how many, of what, and what becomes of unusual gradients; packed masks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparseopt as so
from sparseopt import functional


def model_of(*dtypes: torch.dtype) -> nn.ParameterDict:
    return nn.ParameterDict({f"p{i}": nn.Parameter(torch.zeros(3, 5 + i, dtype=d)) for i, d in enumerate(dtypes)})


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, set[torch.dtype]]]:
    """(tensors, dtypes of the gradients) of each call."""
    seen: list[tuple[int, set[torch.dtype]]] = []
    original = functional.accumulate_squares_

    def noted(stored: list[Tensor], grads: list[Tensor], weight: float, **options: Any) -> None:
        seen.append((len(stored), {grad.dtype for grad in grads if grad.numel()}))
        original(stored, grads, weight, **options)

    monkeypatch.setattr(functional, "accumulate_squares_", noted)
    return seen


def test_one_launch_for_each_dtype(launches: list[tuple[int, set[torch.dtype]]]) -> None:
    half, single = torch.bfloat16, torch.float32
    model = model_of(half, single, half, half, single)
    ema = so.GradientEMA(model, beta=0.9)
    for param in model.values():
        param.grad = torch.full_like(param, 2)
    ema.update()
    assert launches == [(3, {half}), (2, {single})]
    for name in ema.names:
        torch.testing.assert_close(ema[name], torch.full(ema[name].shape, 0.4))


@pytest.mark.parametrize("scale", [None, 4.0])
@pytest.mark.parametrize("offload", [False, True])
def test_parameters_without_a_gradient_decay_in_the_same_launch(
    launches: list[tuple[int, set[torch.dtype]]], scale: float | None, offload: bool
) -> None:
    """beta = 2^-21 multiplies the decay in at every update, a loss scale does so too."""
    beta = 2.0**-21
    model = model_of(torch.float32, torch.float32)
    ema = so.GradientEMA(model, beta, offload=offload)
    given = None if scale is None else torch.tensor(scale)
    for first in (True, False):
        for param in model.values():
            param.grad = torch.ones_like(param) * (scale or 1) if first or param is model["p0"] else None
        launches.clear()
        ema.update(given)
        if not offload:
            assert launches == [(2, {torch.float32})]
    torch.testing.assert_close(ema["p0"], torch.full((3, 5), (1 - beta) * (1 + beta)))
    torch.testing.assert_close(ema["p1"], torch.full((3, 6), (1 - beta) * beta))


def test_offloaded_or_not_makes_no_difference() -> None:
    model = model_of(torch.bfloat16, torch.float32)
    emas = [so.GradientEMA(model, 0.5, offload=offload) for offload in (False, True)]
    for step in range(50):
        for param in model.values():
            generator = torch.Generator().manual_seed(step)
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        for ema in emas:
            ema.update(torch.tensor(2.0) if step % 7 == 0 else None)
    for name in emas[0].names:
        assert torch.equal(emas[0][name], emas[1][name])


def test_gradients_that_are_not_contiguous() -> None:
    model = nn.ParameterDict({"w": nn.Parameter(torch.zeros(4, 6)), "c": nn.Parameter(torch.zeros(2, 3, 2, 2))})
    ema = so.GradientEMA(model, beta=0.0)
    gradients = {
        "w": torch.randn(6, 4).t(), "c": torch.randn(2, 3, 2, 2).to(memory_format=torch.channels_last),
    }  # fmt: skip
    for name, gradient in gradients.items():
        assert not gradient.is_contiguous()
        ema.take(model[name], gradient)
    ema.update()
    for name, gradient in gradients.items():
        torch.testing.assert_close(ema[name], gradient.square(), rtol=2e-7, atol=0)


def test_empty_parameters_and_double_precision() -> None:
    model = nn.ParameterDict({"e": nn.Parameter(torch.zeros(0, 3)), "d": nn.Parameter(torch.zeros(5).double())})
    ema = so.GradientEMA(model, beta=0.75)
    model["d"].grad = torch.tensor([1e-25, 1, 2, math.inf, 0.1]).double()
    model["e"].grad = torch.zeros(0, 3)
    ema.update()
    torch.testing.assert_close(ema["d"], torch.tensor([0.0, 0.25, 1, math.inf, 0.0025]))
    assert ema.masks(0.5)["d"].tolist() == [False, False, True, True, False]
    assert ema.masks(0.5)["e"].shape == (0, 3)


@pytest.mark.parametrize("compress", [False, True])
def test_masks_are_files_like_any_other(tmp_path: Path, compress: bool) -> None:
    """Their bits come from the device in one block."""
    model = model_of(*[torch.float32] * 4)
    model["p2"].requires_grad_(False)
    ema = so.GradientEMA(model)
    for param in model.values():
        param.grad = torch.randn_like(param)
    ema.update()
    masks = ema.masks(0.01)
    assert masks.names == ["p0", "p1", "p2", "p3"]
    masks.save(tmp_path / "masks.safetensors", compress=compress)
    assert so.MaskSet.load(tmp_path / "masks.safetensors") == masks
    for name in ema.names:
        assert torch.equal(masks[name], ema[name] > 0.01)
    assert masks.count("p2") == 0


# ---- on a GPU --------------------------------------------------------------------------------------------------------
@pytest.mark.gpu
@pytest.mark.parametrize("scale", [None, 8.0])
def test_updates_on_a_gpu_wait_for_nothing_and_give_the_bits_of_the_cpu(scale: float | None) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    dtypes = (torch.bfloat16, torch.float32, torch.float16, torch.bfloat16)
    models = [model_of(*dtypes), model_of(*dtypes).to("cuda")]
    emas = [so.GradientEMA(model, beta=0.5) for model in models]
    scales = [None if scale is None else torch.tensor(scale, device=device) for device in ("cpu", "cuda")]
    for step in range(45):  # past the step where the scale is multiplied in
        for model in models:
            for name, param in model.items():
                generator = torch.Generator().manual_seed(step)
                gradient = torch.randn(param.shape, generator=generator).to(param.dtype)
                param.grad = None if (step + len(name)) % 5 == 0 and name == "p1" else gradient.to(param.device)
        emas[0].update(scales[0])
        if step < 2:  # compiles
            emas[1].update(scales[1])
            continue
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            emas[1].update(scales[1])
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for name in emas[0].names:
        assert torch.equal(emas[0][name], emas[1][name].cpu())
    assert emas[0].masks(0.3) == emas[1].masks(0.3)
