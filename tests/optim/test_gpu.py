"""SparseAdamW on a CUDA GPU: capture in batches, a whole step in a CUDA graph, a compiled model, no synchronisation."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparseopt as so
from sparseopt.optim import capture

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def make_model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 64)]
    return nn.Sequential(*layers).to("cuda", torch.bfloat16)


def make_masks(model: nn.Module, run: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    masks = {}
    for name, param in model.named_parameters():
        picked = torch.rand(-(-param.numel() // run), generator=generator) < 0.1
        masks[name] = picked.repeat_interleave(run)[: param.numel()].view(param.shape)
    return masks


def optimizer_of(model: nn.Module, run: int = 1, **options: Any) -> so.SparseAdamW:
    return so.SparseAdamW(model.named_parameters(), lr=1e-2, masks=make_masks(model, run), **options)


def loss_of(model: nn.Module, step: int) -> Tensor:
    generator = torch.Generator(device="cuda").manual_seed(step)
    x = torch.randn(32, 256, device="cuda", generator=generator).bfloat16()
    return model(x).float().square().mean()


def assert_equal_weights(a: nn.Module, b: nn.Module) -> None:
    for (name, x), y in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(x, y), name


@pytest.mark.parametrize("waiting", [0, 2**20, capture.WAITING_BYTES], ids=["at once", "batches", "all at the end"])
@pytest.mark.parametrize("run", [1, 16])
@pytest.mark.parametrize("master", ["residual", "fp32"])
def test_capture_equals_dense_gradients(master: str, run: int, waiting: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "WAITING_BYTES", waiting)
    ours, dense = make_model(), make_model()
    options: dict[str, Any] = {"run": run, "max_grad_norm": 0.01, "master_weights": master}
    a, b = optimizer_of(ours, capture_gradients=True, **options), optimizer_of(dense, **options)
    for step in range(4):
        for model, opt in ((ours, a), (dense, b)):
            loss_of(model, step).backward()
            opt.step()
            opt.zero_grad()
        assert all(p.grad is None for p in ours.parameters())
        torch.testing.assert_close(a.grad_norm(), b.grad_norm(), rtol=1e-5, atol=0)
    assert_equal_weights(ours, dense)


def test_accumulation_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three micro-batches whose gathers wait: their sum in fp32."""
    monkeypatch.setattr(capture, "WAITING_BYTES", 2**20)
    model = make_model()
    opt = optimizer_of(model, capture_gradients=True, max_grad_norm=float("inf"))
    masks = make_masks(model)
    expected = {n: torch.zeros(int(m.sum()), device="cuda") for n, m in masks.items()}
    twin = make_model()
    for step in range(3):
        loss_of(model, step).backward()
        loss_of(twin, step).backward()
        for name, param in twin.named_parameters():
            expected[name] += param.grad[masks[name].cuda()].float()
            param.grad = None
    opt.step()
    norm = torch.cat(list(expected.values())).double().norm()
    torch.testing.assert_close(opt.grad_norm().double(), norm, rtol=1e-6, atol=0)


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("master", ["residual", "fp32"])
def test_whole_step_in_a_cuda_graph(master: str, clip: float | None) -> None:
    """Replays equal eager steps, with gradients and a learning rate that change between them."""
    graphed, eager = make_model(), make_model()
    rates = [torch.tensor(1e-2, device="cuda"), torch.tensor(1e-2, device="cuda")]
    optimizers = [
        so.SparseAdamW(model.named_parameters(), lr=rate, masks=make_masks(model), max_grad_norm=clip, capturable=True,
                       master_weights=master)
        for model, rate in zip((graphed, eager), rates, strict=True)
    ]  # fmt: skip
    gradients = [[torch.randn_like(p) for p in eager.parameters()] for _ in range(7)]
    for model in (graphed, eager):
        for param in model.parameters():
            param.grad = torch.zeros_like(param)

    def give(model: nn.Module, step: int) -> None:
        for param, gradient in zip(model.parameters(), gradients[step], strict=True):
            param.grad.copy_(gradient)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for step in range(3):
            give(graphed, step)
            optimizers[0].step()
    torch.cuda.current_stream().wait_stream(side)
    for step in range(3):
        give(eager, step)
        optimizers[1].step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizers[0].step()
    for step in range(3, 7):
        for rate in rates:
            rate.fill_(1e-2 / step)
        give(graphed, step)
        graph.replay()
        give(eager, step)
        optimizers[1].step()
    torch.cuda.synchronize()
    assert_equal_weights(graphed, eager)
    steps = [opt.state[p]["step"].item() for opt in optimizers for p in opt.param_groups[0]["params"]]
    assert steps == [7.0] * len(steps)


def test_a_step_does_not_wait_for_the_device() -> None:
    model = make_model()
    opt = optimizer_of(model, capture_gradients=True, max_grad_norm=1.0)
    for step in range(2):
        loss_of(model, step).backward()
        opt.step()
    loss = loss_of(model, 2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss.backward()
        opt.step()
        opt.zero_grad()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("mode", [None, "reduce-overhead"], ids=["compiled", "graphs"])
def test_compiled_model(mode: str | None) -> None:
    """Two micro-batches a step: gradients of the first lie in memory that a graph of the second overwrites."""
    compiled, eager = make_model(), make_model()
    function = torch.compile(compiled, mode=mode)
    a, b = (optimizer_of(m, capture_gradients=True, max_grad_norm=1.0) for m in (compiled, eager))
    for step in range(3):
        for micro in range(2):
            loss_of(function, 2 * step + micro).backward()
            loss_of(eager, 2 * step + micro).backward()
        a.step()
        b.step()
    for x, y in zip(compiled.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("how", ["in place", "data swapped"])
def test_fp32_master_follows_outside_changes(how: str) -> None:
    model, twin = make_model(), make_model()
    opt, expected = optimizer_of(model, master_weights="fp32"), optimizer_of(twin, master_weights="residual")
    for step in range(4):
        for m, o in ((model, opt), (twin, expected)):
            if step == 2:
                for param in m.parameters():
                    if how == "in place":
                        with torch.no_grad():
                            param.mul_(0.5)
                    else:
                        param.data = param.data * 0.5
                o.sync_from_params() if o is expected else None
            loss_of(m, step).backward()
            o.step()
            o.zero_grad()
    assert_equal_weights(model, twin)


def test_a_discarded_model_is_freed() -> None:
    model = make_model()
    opt = optimizer_of(model, capture_gradients=True, max_grad_norm=1.0)
    loss_of(model, 0).backward()
    opt.step()
    gone = [weakref.ref(p) for p in model.parameters()]
    del model, opt
    gc.collect()
    assert not [r for r in gone if r() is not None]
