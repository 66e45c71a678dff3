"""Chunked losses over a frozen head, against full logits: values, gradients, memory, projected heads, models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from sparseopt.projection import losses as losses_module
from sparseopt.projection.losses import CHUNK_BYTES, HeadSlice, linear_cross_entropy

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def head(
    rows: int = 37, width: int = 24, vocabulary: int = 301, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, ...]:
    hidden = torch.randn(rows, width).to(dtype).requires_grad_()
    weight, bias = (torch.randn(vocabulary, width) / width**0.5).to(dtype), torch.randn(vocabulary).to(dtype)
    targets = torch.randint(0, vocabulary, (rows,))
    targets[::5] = -100
    return hidden, weight, bias, targets


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight, bias).float(), targets, reduction="none")


# ---- per token -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("chunk", [1, 10, 37, None])
@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_full_logits(dtype: torch.dtype, with_bias: bool, chunk: int | None) -> None:
    hidden, weight, bias, targets = head(dtype=dtype)
    given = bias if with_bias else None
    upstream = torch.randn(len(targets))  # another for each token
    losses = linear_cross_entropy(hidden, weight, targets, bias=given, chunk=chunk)
    assert losses.dtype == torch.float32
    assert losses[::5].eq(0).all()
    gradient = torch.autograd.grad(losses @ upstream, hidden)[0]
    assert gradient.dtype == dtype

    exact = hidden.detach().double().requires_grad_()
    expected = plain(exact, weight.double(), targets, given if given is None else given.double())
    reference = torch.autograd.grad(expected @ upstream.to(expected.dtype), exact)[0]
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(losses.double(), expected.double(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(gradient.double(), reference, rtol=tolerance, atol=2 * tolerance)


def test_ignore_index_and_backward_twice() -> None:
    hidden, weight, _, targets = head()
    targets = targets.clamp(min=7)
    losses = linear_cross_entropy(hidden, weight, targets, ignore_index=7, chunk=16)
    assert losses[::5].eq(0).all()
    first = torch.autograd.grad(losses.sum(), hidden, retain_graph=True)[0]
    assert first[::5].eq(0).all()
    assert torch.equal(torch.autograd.grad(losses.sum() * 2, hidden)[0], first * 2)


def test_softcap_and_scale() -> None:
    hidden, weight, bias, targets = head()
    logits = torch.tanh(F.linear(hidden, weight, bias) * 0.7 / 2.0) * 2.0
    expected = F.cross_entropy(logits, targets, reduction="none")
    losses = linear_cross_entropy(hidden, weight, targets, bias=bias, chunk=16, scale=0.7, softcap=2.0)
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-6)
    upstream = torch.randn(len(targets))
    gradients = [torch.autograd.grad(loss @ upstream, hidden)[0] for loss in (losses, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("capped", [False, True])
def test_rows_of_logits_filled_up_as_on_a_gpu(capped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """301 tokens as 320: the same losses and gradients, of the hidden states and of the head's own slices."""
    hidden, weight, bias, targets = head()
    found = []
    for unit in (1, 64):
        monkeypatch.setattr(losses_module, "_row_unit", lambda _, unit=unit: unit)
        leaf = torch.zeros(1, 4, 3, requires_grad=True)
        project = [HeadSlice(leaf, torch.ones(4, 301), torch.ones(3, 24))]
        softcap = {"scale": 0.7, "softcap": 2.0} if capped else {}
        with LargestTensor() as seen:
            losses = linear_cross_entropy(hidden, weight, targets, bias=bias, chunk=16, project=project, **softcap)
        assert seen.nbytes >= 16 * (301 if unit == 1 else 320) * 4
        found.append((losses, *torch.autograd.grad(losses.square().sum(), [hidden, leaf])))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


class LargestTensor(TorchDispatchMode):
    """The largest number of bytes in any tensor that an op returns."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(tensor, Tensor):
                self.nbytes = max(self.nbytes, tensor.numel() * tensor.element_size())
        return result


def test_logits_are_never_whole() -> None:
    hidden, weight, _, targets = head(rows=600, width=4, vocabulary=40_000)
    with LargestTensor() as seen:
        linear_cross_entropy(hidden, weight, targets).sum().backward()
    assert seen.nbytes == 384 * 40_000 * 4  # a multiple of 128 rows
    assert seen.nbytes <= CHUNK_BYTES["cpu"] < 600 * 40_000 * 4
    with LargestTensor() as seen:
        linear_cross_entropy(hidden, weight, targets, chunk=128).sum().backward()
    assert seen.nbytes == 128 * 40_000 * 4


def test_no_gradient_no_work() -> None:
    hidden, weight, _, targets = head()
    once = 2 * hidden.numel() * weight.shape[0]
    leaf = torch.zeros(1, 4, 3, requires_grad=True)
    project = [HeadSlice(leaf, torch.randn(4, 301), torch.randn(3, 24))]
    for wanted, context in ((2, torch.enable_grad()), (1, torch.no_grad())):
        with context, FlopCounterMode(display=False) as counter:
            linear_cross_entropy(hidden, weight, targets)
        assert counter.get_total_flops() == wanted * once
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        assert not linear_cross_entropy(hidden, weight, targets, project=project).requires_grad
    assert counter.get_total_flops() == once
    with FlopCounterMode(display=False) as counter:
        assert not linear_cross_entropy(hidden.detach(), weight, targets).requires_grad
    assert counter.get_total_flops() == once
    with FlopCounterMode(display=False) as counter:  # the projection alone
        losses = linear_cross_entropy(hidden.detach(), weight, targets, project=project)
    assert losses.requires_grad
    assert counter.get_total_flops() == once + 2 * hidden.numel() * 3  # and P_i h


def test_empty() -> None:
    hidden, weight, _, targets = head(rows=0)
    losses = linear_cross_entropy(hidden, weight, targets)
    assert losses.shape == (0,)
    losses.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.shape == (0, 24)


def test_wrong_arguments_are_named() -> None:
    hidden, weight, bias, targets = head()
    with pytest.raises(
        ValueError, match=r"hidden \[N, d\] and weight \[V, d\], got float32\[37, 24\] and float32\[24, 301\]"
    ):
        linear_cross_entropy(hidden, weight.t(), targets)
    with pytest.raises(ValueError, match=r"targets must be int64\[37\], got int64\[36\]"):
        linear_cross_entropy(hidden, weight, targets[1:])
    with pytest.raises(ValueError, match=r"bias must have 301 entries, got float32\[300\]"):
        linear_cross_entropy(hidden, weight, targets, bias=bias[1:])
    with pytest.raises(ValueError, match="chunk must be at least 1 row, got 0"):
        linear_cross_entropy(hidden, weight, targets, chunk=0)
    with pytest.raises(ValueError, match=r"targets must be from 0 to 300 or -100, got 301\."):
        linear_cross_entropy(hidden, weight, targets.clamp(min=301))
    with pytest.raises(ValueError, match="the weight of linear_cross_entropy gets no gradient"):
        linear_cross_entropy(hidden, weight.requires_grad_(), targets)
    with torch.no_grad():
        linear_cross_entropy(hidden, weight, targets)


# ---- projected heads -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("chunk", [7, 40, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_projected_head(dtype: torch.dtype, chunk: int | None) -> None:
    """P_o dW P_i^T and P_o db of each sample, with an incoming gradient of its own for every token."""
    batch, tokens, width, vocabulary = 4, 19, 24, 301
    hidden, weight, bias, targets = head(batch * tokens, width, vocabulary, dtype)
    upstream = torch.randn(batch * tokens)
    output, of_bias = torch.randn(8, vocabulary).sign().to(dtype), torch.randn(5, vocabulary)
    inputs = torch.randn(6, width).sign().to(dtype)
    leaf, bias_leaf = (torch.full(s, torch.nan, requires_grad=True) for s in ((batch, 8, 6), (batch, 5, 1)))
    project = [HeadSlice(leaf, output, inputs, 0.25), HeadSlice(bias_leaf, of_bias, None, 3.0)]
    losses = linear_cross_entropy(hidden, weight, targets, bias=bias, chunk=chunk, project=project)
    (losses * upstream).sum().backward()

    tolerance = 1e-5 if dtype == torch.float32 else 4e-2
    for sample in range(batch):
        rows = slice(sample * tokens, (sample + 1) * tokens)
        exact = [t.detach().double().requires_grad_() for t in (weight, bias)]
        loss = (
            plain(hidden[rows].detach().double(), exact[0], targets[rows], exact[1]).double() @ upstream[rows].double()
        )
        d_weight, d_bias = torch.autograd.grad(loss, exact)
        expected = 0.25 * output.double() @ d_weight @ inputs.double().t()
        expected_bias = 3.0 * of_bias.double() @ d_bias
        for slices, wanted in ((leaf, expected), (bias_leaf, expected_bias[:, None])):
            assert slices.grad is not None
            assert slices.grad.dtype == torch.float32
            error = (slices.grad[sample].double() - wanted).norm() / wanted.norm()
            assert float(error) < tolerance
    # The projection leaves everything else as it was.
    alone = linear_cross_entropy(hidden, weight, targets, bias=bias, chunk=chunk)
    assert torch.equal(alone, losses)
    assert torch.equal(torch.autograd.grad((alone * upstream).sum(), hidden)[0], hidden.grad)


def test_head_slices_that_do_not_fit() -> None:
    hidden, weight, _, targets = head(36)
    output, inputs = torch.randn(8, 301), torch.randn(6, 24)

    def run(leaf: Tensor, output: Tensor = output, inputs: Tensor | None = inputs) -> None:
        linear_cross_entropy(hidden, weight, targets, project=[HeadSlice(leaf, output, inputs)])

    run(torch.zeros(4, 8, 6))
    with pytest.raises(ValueError, match=r"5 samples, which 36 rows are no multiple of"):
        run(torch.zeros(5, 8, 6))
    with pytest.raises(ValueError, match=r"output matrix must be \[8, 301\], got float32\[8, 300\]"):
        run(torch.zeros(4, 8, 6), output[:, 1:])
    with pytest.raises(ValueError, match=r"input matrix must be \[6, 24\], got \[6, 23\]"):
        run(torch.zeros(4, 8, 6), inputs=inputs[:, 1:])
    with pytest.raises(ValueError, match=r"input matrix must be \[6, 24\], got \[1\]"):
        run(torch.zeros(4, 8, 6), inputs=None)
    with pytest.raises(ValueError, match="the projection matrix of linear_cross_entropy gets no gradient"):
        run(torch.zeros(4, 8, 6), output.clone().requires_grad_())


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_as_one_graph(dynamic: bool) -> None:
    hidden, weight, bias, targets = head(36)
    leaf = torch.zeros(4, 8, 6, requires_grad=True)
    project = HeadSlice(leaf, torch.randn(8, 301), torch.randn(6, 24), 0.5)

    def run(hidden: Tensor, targets: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, targets, bias=bias, chunk=16, project=[project])

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    results = []
    for function in (run, compiled):
        losses = function(hidden, targets)
        results.append([losses, *torch.autograd.grad(losses.square().sum(), (hidden, leaf))])
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager, rtol=1e-6, atol=1e-7)
