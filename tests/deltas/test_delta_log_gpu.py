"""DeltaLog on a CUDA GPU: values of the moment of record(), taken without waiting for the device."""

import pytest
import torch
from torch import nn

import sparseopt as so
from sparseopt.deltas.base import open_base

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def make_model(dtype=torch.bfloat16):
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(4))).to("cuda", dtype)


def train(model, opt, step):
    generator = torch.Generator(device="cuda").manual_seed(step)
    for param in model.parameters():
        param.grad = torch.randn(param.shape, generator=generator, device="cuda").to(param.dtype)
    if opt is not None:
        opt.step()
        return
    with torch.no_grad():
        for param in model.parameters():
            param.add_(param.grad, alpha=0.01)


def replayed(path, step):
    base, log = open_base(path), so.DeltaLog(path)
    state = {name: base.tensor(name).clone() for name in base.names}
    for number in log.chain(step):
        log.load(number).apply_(state)
    return state


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("sparse", [False, True])
def test_values_are_those_of_the_moment_while_training_goes_on(tmp_path, dtype, sparse):
    model = make_model(dtype)
    opt = None
    if sparse:
        opt = so.SparseAdamW(model.named_parameters(), masks=so.MaskSet.random(model, 0.1), lr=1e-2)
        opt.initialize_state()
    with so.DeltaLog(tmp_path) as log:
        log.start(model)
        for step in range(1, 13):
            train(model, opt, step)
            if opt is not None and step == 6:
                opt.update_masks(so.MaskSet.random(model, 0.1, seed=6))
            if step % 3 == 0:
                torch.cuda._sleep(50_000_000)  # the copy is queued behind work, and more work follows at once
                log.record(step, opt or model)
                for _ in range(3):
                    train(model, opt, 100 + step)
    # The same training once more, looked at slowly.
    again = make_model(dtype)
    second = None
    if sparse:
        second = so.SparseAdamW(again.named_parameters(), masks=so.MaskSet.random(again, 0.1), lr=1e-2)
    for step in range(1, 13):
        train(again, second, step)
        if second is not None and step == 6:
            second.update_masks(so.MaskSet.random(again, 0.1, seed=6))
        if step % 3 == 0:
            found = replayed(tmp_path, step)
            for name, tensor in again.state_dict().items():
                assert torch.equal(found[name], tensor.cpu()), (step, name)
            for _ in range(3):
                train(again, second, 100 + step)


@pytest.mark.parametrize("sparse", [False, True])
def test_recording_does_not_wait_for_the_device(tmp_path, sparse):
    model = make_model()
    opt = so.SparseAdamW(model.named_parameters(), masks=so.MaskSet.random(model, 0.1), lr=1e-2) if sparse else None
    with so.DeltaLog(tmp_path) as log:
        log.start(model)
        for step in (1, 2):  # buffers, plans and kernels are there afterwards
            train(model, opt, step)
            log.record(step, opt or model)
            log.flush()
        train(model, opt, 3)
        torch.cuda.synchronize()
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            log.record(3, opt or model)
        finally:
            torch.cuda.set_sync_debug_mode(before)
    assert log.chain() == [1, 2, 3]
