"""cross_entropy_: against fp64 on a grid of vocabularies, ignored and wrong targets, strides, empties."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparseopt import functional

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTHS = (1, 2, 7, 15, 16, 17, 33, 1023, 1025, 4095, 4096, 4097, 50_257, 128_256, 151_936)


def oracle(logits: Tensor, targets: Tensor, ignore_index: int = -100) -> tuple[Tensor, Tensor]:
    """(losses, gradients), both fp64, by autograd."""
    leaf = logits.cpu().double().requires_grad_()
    losses = torch.nn.functional.cross_entropy(leaf, targets.cpu(), reduction="none", ignore_index=ignore_index)
    return losses.detach(), torch.autograd.grad(losses.sum(), leaf)[0]


def check(logits: Tensor, targets: Tensor, losses: Tensor, gradients: Tensor, ignore_index: int = -100) -> None:
    """fp32 arithmetic on numbers up to max|logit|; gradients then rounded to their dtype."""
    expected, exact = oracle(logits, targets, ignore_index)
    assert losses.dtype == torch.float32
    assert losses.device == gradients.device
    largest = float(logits.float().abs().nan_to_num(0, 0, 0).max()) + 1
    torch.testing.assert_close(losses.cpu().double(), expected, rtol=1e-6, atol=2e-7 * largest)
    info = torch.finfo(gradients.dtype)
    # An entry e^(x - max) / sum is relatively wrong by max|x - max| fp32 roundings; then half a unit of its own dtype.
    bound = exact.abs() * (info.eps / 2 + 5e-7 * largest) + info.smallest_normal * info.eps + 1e-37
    bound[torch.arange(len(targets)), targets.cpu().clamp(min=0)] += 2e-7 * largest  # p - 1 cancels
    assert bool(((gradients.cpu().double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_grid(device: torch.device, width: int, dtype: torch.dtype) -> None:
    logits = (torch.randn(4, width) * 3).to(dtype)
    targets = torch.tensor([0, width - 1, width // 2, -100])
    logits[3, 0] = torch.nan  # an ignored row is not looked at
    gradients = logits.to(device, copy=True)
    losses = functional.cross_entropy_(gradients, targets.to(device))
    assert losses[3] == 0
    assert not gradients[3].any()
    check(logits[:3], targets[:3], losses[:3], gradients[:3])


@pytest.mark.parametrize("rows", [1, 2, 31, 200])
def test_rows(device: torch.device, rows: int) -> None:
    logits, targets = torch.randn(rows, 301), torch.randint(0, 301, (rows,))
    targets[rows // 2] = 7
    gradients = logits.to(device, copy=True)
    losses = functional.cross_entropy_(gradients, targets.to(device), ignore_index=7)
    assert losses[targets.to(device) == 7].eq(0).all()
    check(logits, targets, losses, gradients, ignore_index=7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_row_strides(device: torch.device, dtype: torch.dtype) -> None:
    wide = torch.full((6, 120), torch.nan, dtype=dtype, device=device)
    logits = wide[1:5, 3:103]
    values = torch.randn(4, 100).to(dtype)
    logits.copy_(values)
    targets = torch.tensor([0, 99, -100, 3])
    losses = functional.cross_entropy_(logits, targets.to(device))
    check(values, targets, losses, logits)
    assert int(wide.isnan().sum()) == 6 * 120 - 400


def test_extreme_logits(device: torch.device) -> None:
    logits = torch.randn(6, 5000)
    logits[0] += 1e6
    logits[1] -= 1e6
    logits[2, ::2] = -torch.inf
    logits[3, :4999] = -torch.inf  # one entry left, after whole blocks of -inf
    logits[4, 4000] = 200  # all but certain
    logits[5] = torch.linspace(-300, 0, 5000)
    targets = torch.tensor([5, 5, 5, 4999, 4000, 4999])
    gradients = logits.to(device, copy=True)
    losses = functional.cross_entropy_(gradients, targets.to(device))
    check(logits[2:], targets[2:], losses[2:], gradients[2:])
    torch.testing.assert_close(losses[:2].cpu().double(), oracle(logits[:2], targets[:2])[0], rtol=0, atol=0.1)
    assert gradients[2, ::2].eq(0).all()
    assert losses[3] == 0
    assert not gradients[3].any()


def test_what_is_not_a_number_stays_so(device: torch.device) -> None:
    logits = torch.randn(4, 4500)
    logits[0, 4400] = torch.nan
    logits[1, 3] = torch.inf
    logits[2] = -torch.inf
    gradients = logits.to(device, copy=True)
    losses = functional.cross_entropy_(gradients, torch.tensor([1, 2, 3, 4], device=device))
    assert losses.isnan().tolist() == [True, True, True, False]
    assert gradients[0].isnan().all()
    assert gradients[1, 3].isnan()
    assert gradients[2].isnan().all()
    assert gradients[3].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_targets_outside(device: torch.device, dtype: torch.dtype) -> None:
    """The op itself: NaN, and nothing read or written outside the row; the checked function on the CPU: an error."""
    wide = torch.zeros(7, 60, dtype=dtype, device=device)
    for wrong in (50, 51, -1, 2**40, -(2**40), 2**63 - 1):
        wide.fill_(3)
        logits = wide[1:4, 5:55]
        targets = torch.tensor([1, wrong, -100], device=device)
        if device.type == "cpu":
            with pytest.raises(ValueError, match=rf"targets must be from 0 to 49 or -100, got {wrong}\."):
                functional.cross_entropy_(logits, targets)
            assert wide.eq(3).all()
        losses = torch.ops.sparseopt.cross_entropy_(logits, targets, -100)
        assert losses.isnan().tolist() == [False, True, False]
        assert logits[1].isnan().all()
        assert logits[[0, 2]].isfinite().all()
        assert int(wide.eq(3).sum()) == 7 * 60 - 150


@pytest.mark.parametrize("shape", [(0, 5), (0, 0), (2, 0)], ids=str)
def test_empty(device: torch.device, shape: tuple[int, int]) -> None:
    targets = torch.full((shape[0],), -100, device=device)
    losses = functional.cross_entropy_(torch.empty(shape, device=device), targets)
    assert losses.dtype == torch.float32
    assert losses.tolist() == [0] * shape[0]


def test_compiles_as_one_graph(device: torch.device) -> None:
    logits, targets = torch.randn(5, 70, device=device), torch.tensor([0, 1, -100, 69, 5], device=device)
    eager, traced = logits.clone(), logits.clone()
    expected = functional.cross_entropy_(eager, targets)
    torch._dynamo.reset()
    result = torch.compile(functional.cross_entropy_, fullgraph=True, backend="aot_eager")(traced, targets)
    assert torch.equal(result, expected)
    assert torch.equal(traced, eager)


def test_wrong_arguments_are_named(device: torch.device) -> None:
    logits, targets = torch.zeros(3, 8, device=device), torch.zeros(3, dtype=torch.int64, device=device)
    function = functional.cross_entropy_
    with pytest.raises(ValueError, match=r"logits must be \[N, V\] of fp32, bf16 or fp16, got float64"):
        function(logits.double(), targets)
    with pytest.raises(ValueError, match=r"contiguous last dimension, got strides \(8, 2\)"):
        function(logits[:, ::2], targets)
    with pytest.raises(ValueError, match=r"targets must be int64\[3\] .* got int32\[3\]"):
        function(logits, targets.int())
    with pytest.raises(ValueError, match=r"targets must be int64\[3\] .* got int64\[2\]"):
        function(logits, targets[:2])
    op = torch.ops.sparseopt.cross_entropy_
    for bad in ((logits.double(), targets), (logits[:, ::2], targets), (logits, targets.int()), (logits, targets[:2])):
        with pytest.raises((RuntimeError, ValueError)):
            op(*bad, -100)


@pytest.mark.gpu
def test_past_two_billion_elements() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    logits = torch.zeros(14_200, 151_936, dtype=torch.bfloat16, device="cuda")
    values = torch.randn(2, 151_936).bfloat16()
    logits[-2:] = values.cuda()
    targets = torch.full((14_200,), -100, device="cuda")
    targets[-2:] = torch.tensor([5, 151_935])
    losses = functional.cross_entropy_(logits, targets)
    assert not losses[:-2].any()
    check(values, targets[-2:], losses[-2:], logits[-2:])
