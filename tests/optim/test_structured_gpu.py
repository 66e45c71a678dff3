"""Structured layers on a CUDA GPU: gradients, training, memory, no synchronisation, compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from structured_model import group_mask
from tiny_experts import IMPLEMENTATIONS, expert_masks, make_moe
from torch import Tensor, nn

import sparseopt as so

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
WIDTH = 512


def make_model(dtype: torch.dtype = torch.bfloat16, depth: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(WIDTH, WIDTH), nn.Tanh()]
    return nn.Sequential(*layers).to("cuda", dtype)


def make_masks(model: nn.Module, grain: str, count: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    masks = {}
    for name, param in model.named_parameters():
        masks[name] = torch.zeros(param.shape, dtype=torch.bool)
        if param.dim() == 2:
            chosen = torch.randperm(WIDTH, generator=generator)[:count].tolist()
            masks[name] = group_mask((WIDTH, WIDTH), grain, chosen)
    return masks


def loss_of(model: Any, step: int) -> Tensor:
    generator = torch.Generator(device="cuda").manual_seed(step)
    x = torch.randn(2, 64, WIDTH, device="cuda", generator=generator).to(next(model.parameters()).dtype)
    return model(x).float().square().mean()


@pytest.mark.parametrize("count", [1, 13, 16])
@pytest.mark.parametrize("grain", ["row", "column"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_and_training(dtype: torch.dtype, grain: str, count: int, compiled: bool) -> None:
    torch._dynamo.reset()
    ours, dense = make_model(dtype), make_model(dtype)
    start = {name: param.detach().clone() for name, param in ours.named_parameters()}
    masks = make_masks(ours, grain, count)
    opt = so.SparseAdamW(
        ours.named_parameters(), lr=1e-3, masks=masks, capture_gradients=True, max_grad_norm=1.0, master_weights="fp32"
    )
    with so.sparse_linear(ours, masks) as found:
        assert len(found.layers) == 4
        run = torch.compile(ours, fullgraph=True) if compiled else ours
        for step in range(3):
            dense.load_state_dict(ours.state_dict())
            dense.zero_grad()
            for micro in range(2):
                loss_of(run, 2 * step + micro).backward()
                loss_of(dense, 2 * step + micro).backward()
            assert opt._capture is not None
            values = opt._capture.pending()
            norms = []
            for name, param in dense.named_parameters():
                if masks[name].any():
                    assert param.grad is not None
                    expected = param.grad[masks[name].cuda()].float()
                    error = (values[name] - expected).norm() / expected.norm()
                    assert error <= (1e-2 if dtype == torch.bfloat16 else 1e-3 if compiled else 1e-5), name
                    norms.append(expected)
            opt.step()
            torch.testing.assert_close(opt.grad_norm(), torch.cat(norms).norm(), rtol=1e-2, atol=0)
    for name, param in ours.named_parameters():
        mask = masks[name].cuda()
        assert torch.equal(param[~mask], start[name][~mask]), name
        assert not mask.any() or not torch.equal(param, start[name]), name


def test_neither_waits_for_the_device_nor_keeps_whole_inputs() -> None:
    model = make_model(depth=8)
    masks = make_masks(model, "column", 16)
    opt = so.SparseAdamW(model.named_parameters(), masks=masks, capture_gradients=True, max_grad_norm=1.0)
    x = torch.randn(8, 1024, WIDTH, device="cuda", dtype=torch.bfloat16)
    linear = nn.Sequential(*(layer for layer in model if isinstance(layer, nn.Linear)))  # a Tanh keeps its output
    names = {id(param): name for name, param in model.named_parameters()}
    own = {name: masks[names[id(param)]] for name, param in linear.named_parameters()}

    def kept() -> int:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        y = linear(x)
        held = torch.cuda.memory_allocated() - before - y.nbytes
        y.float().square().mean().backward()
        opt.step()
        return held

    whole = kept()
    with so.sparse_linear(linear, own):
        assert kept() < 0.1 * whole
        torch.cuda.set_sync_debug_mode("error")
        try:
            linear(x).float().square().mean().backward()
            opt.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def check_experts(
    dtype: torch.dtype,
    kind: str,
    implementation: str,
    grain: str,
    even: bool,
    compiled: bool = False,
    quiet: bool = False,
) -> None:
    """Gradients of 64 tokens, none of which goes to the last expert, beside those of a copy without masks."""
    torch._dynamo.reset()
    models = [make_moe(kind, implementation, dtype).model.layers[0].mlp.experts.cuda() for _ in range(2)]
    masks = {n: m for n, m in expert_masks(models[0], grain, even).items() if m.dim() == 3}
    params = [(name, param) for name, param in models[0].named_parameters() if name in masks]
    opt = so.SparseAdamW(params, lr=1e-3, masks=masks, capture_gradients=True)
    opt.initialize_state()
    generator = torch.Generator(device="cuda").manual_seed(0)
    x = torch.randn(64, 16, device="cuda", generator=generator).to(dtype).requires_grad_()
    ids = torch.rand(64, 3, device="cuda", generator=generator).argsort(1)[:, :2]
    shares = torch.full((64, 2), 0.5, device="cuda", dtype=dtype)
    grads = []
    with so.sparse_linear(models[0], masks) as found:
        assert set(found.layers.values()) == {grain}
        for model in models:
            run = torch.compile(model, fullgraph=True) if compiled else model
            x.grad = None
            run(x, ids, shares).float().square().sum().backward()
            if quiet and model is models[0]:
                torch.cuda.set_sync_debug_mode("error")
            try:
                run(x, ids, shares).float().square().sum().backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            assert x.grad is not None
            grads.append(x.grad)
    assert opt._capture is not None
    # A whole gradient of batched products is summed in bf16, which costs it more than the part.
    tolerance = (2e-2 if compiled else 1e-2) if dtype == torch.bfloat16 else 1e-5
    assert (grads[0] - grads[1]).float().norm() <= tolerance * grads[1].float().norm()
    for name, values in opt._capture.pending().items():
        dense = models[1].get_parameter(name).grad
        expected = dense[masks[name].cuda()].float()
        assert (values - expected).norm() <= tolerance * expected.norm(), name


@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("grain", ["row", "column"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts(dtype: torch.dtype, kind: str, implementation: str, grain: str, even: bool) -> None:
    check_experts(dtype, kind, implementation, grain, even)


@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm"])
def test_experts_compiled(implementation: str) -> None:
    check_experts(torch.bfloat16, "mixtral", implementation, "column", False, compiled=True)


@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm"])
def test_experts_do_not_wait_for_the_device(implementation: str) -> None:
    check_experts(torch.bfloat16, "mixtral", implementation, "column", False, quiet=True)
