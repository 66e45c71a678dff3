"""grad_project: against fp64 on a grid, exact where fp32 is, strides, empties, what it refuses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sparseopt import functional

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# (B, T, d_out, k_o, k_i): odd sizes, tile borders of either backend, a bias (k_i = 1), the largest ranks, a long row.
SHAPES = (
    (1, 1, 1, 1, 1),
    (2, 7, 5, 3, 2),
    (3, 8, 16, 8, 8),
    (2, 33, 129, 16, 16),
    (1, 64, 255, 17, 1),
    (2, 65, 300, 1, 33),
    (1, 129, 513, 128, 128),
    (2, 40, 130, 129, 256),
    (1, 20, 64, 256, 130),
    (4, 1, 2000, 16, 16),
    (1, 96, 5000, 16, 8),
)


def make(shape: tuple[int, ...], dtype: torch.dtype, matrix_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens, width, k_o, k_i = shape
    gradients = torch.randn(batch, tokens, width).to(dtype)
    return gradients, torch.randn(batch, tokens, k_i).to(dtype), torch.randn(k_o, width).to(matrix_dtype)


def check(gradients: Tensor, inputs: Tensor, matrix: Tensor, scale: float, result: Tensor) -> None:
    """Against fp64, relative to the sum of the terms' sizes, which is what fp32 sums can promise."""

    def product(g: Tensor, a: Tensor, p: Tensor) -> Tensor:
        return (g.cpu().double() @ p.cpu().double().t()).transpose(1, 2) @ a.cpu().double() * scale

    expected, size = product(gradients, inputs, matrix), product(gradients.abs(), inputs.abs(), matrix.abs())
    assert result.dtype == torch.float32
    assert result.device == gradients.device
    assert result.shape == expected.shape
    assert result.is_contiguous()
    assert bool(((result.cpu() - expected).abs() <= 5e-7 * size.abs() + 1e-30).all())


@pytest.mark.parametrize("mixed", [False, True], ids=["one_dtype", "fp32_matrix"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_grid(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype, mixed: bool) -> None:
    gradients, inputs, matrix = (t.to(device) for t in make(shape, dtype, torch.float32 if mixed else dtype))
    check(gradients, inputs, matrix, 0.37, functional.grad_project(gradients, inputs, matrix, 0.37))


@pytest.mark.parametrize("inputs_dtype", DTYPES, ids=str)
def test_inputs_of_another_dtype(device: torch.device, inputs_dtype: torch.dtype) -> None:
    gradients, inputs, matrix = (t.to(device) for t in make((2, 33, 70, 8, 9), torch.bfloat16, torch.bfloat16))
    inputs = inputs.to(inputs_dtype)
    check(gradients, inputs, matrix, 1.0, functional.grad_project(gradients, inputs, matrix))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [16, 128])
def test_exact_where_fp32_is(device: torch.device, k: int, dtype: torch.dtype) -> None:
    """Integers whose products and sums stay under 2^24: every order of sums is exact, in fp32 and in nothing less."""
    most = 2000 if dtype == torch.float32 else 200  # more bits than TF32 has; all that 16-bit types have
    gradients = torch.randint(-most, most, (2, 70, 100)).to(dtype)
    matrix = torch.randint(0, 2, (k, 100)).to(dtype) * 2 - 1
    inputs = torch.randint(-1, 2, (2, 70, k)).to(dtype)
    result = functional.grad_project(gradients.to(device), inputs.to(device), matrix.to(device), 0.5)
    expected = (gradients.double() @ matrix.double().t()).transpose(1, 2) @ inputs.double() * 0.5
    assert torch.equal(result.cpu().double(), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_again(device: torch.device, dtype: torch.dtype, same_bits: Callable) -> None:
    arguments = [t.to(device) for t in make((3, 130, 1100, 16, 16), dtype, dtype)]
    assert same_bits(functional.grad_project(*arguments), functional.grad_project(*arguments))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(device: torch.device, dtype: torch.dtype) -> None:
    """Views are read where they lie; what surrounds them is NaN and must not be."""
    gradients, inputs, matrix = make((3, 35, 70, 16, 8), dtype, dtype)
    expected = functional.grad_project(*(t.to(device) for t in (gradients, inputs, matrix)), 1.0)

    def surrounded(tensor: Tensor) -> Tensor:
        wide = torch.full([n + 5 for n in tensor.shape], torch.nan, dtype=dtype, device=device)
        view = wide[tuple(slice(2, 2 + n) for n in tensor.shape)]
        view.copy_(tensor)
        return view

    views = [surrounded(t) for t in (gradients, inputs, matrix)]
    assert not any(v.is_contiguous() for v in views)
    assert torch.equal(functional.grad_project(*views), expected)

    swapped = [t.to(device).transpose(0, 1).contiguous().transpose(0, 1) for t in (gradients, inputs)]
    assert torch.equal(functional.grad_project(*swapped, matrix.to(device)), expected)
    # Last dimensions that are not contiguous are copied: a transpose, and the gradient of a sum.
    turned = [t.to(device).transpose(-1, -2).contiguous().transpose(-1, -2) for t in (gradients, inputs, matrix)]
    assert torch.equal(functional.grad_project(*turned), expected)
    ones = torch.ones((), dtype=dtype, device=device).expand(3, 35, 70)
    check(ones, inputs, matrix, 1.0, functional.grad_project(ones, inputs.to(device), matrix.to(device)))
    one_sample = gradients[:1].to(device).expand(3, 35, 70)
    check(one_sample, inputs, matrix, 1.0, functional.grad_project(one_sample, inputs.to(device), matrix.to(device)))


def test_samples_do_not_mix(device: torch.device) -> None:
    gradients, inputs, matrix = (t.to(device) for t in make((3, 10, 40, 8, 8), torch.float32, torch.float32))
    alone = functional.grad_project(gradients[2:], inputs[2:], matrix)
    gradients[1] = torch.nan
    together = functional.grad_project(gradients, inputs, matrix)
    assert torch.isfinite(together[[0, 2]]).all()
    assert together[1].isnan().all()
    assert torch.equal(together[2:], alone)


@pytest.mark.parametrize("shape", [(0, 5, 6, 4, 3), (2, 0, 6, 4, 3), (2, 5, 0, 4, 3)], ids=str)
def test_empty(device: torch.device, shape: tuple[int, ...]) -> None:
    arguments = [t.to(device) for t in make(shape, torch.float32, torch.float32)]
    result = functional.grad_project(*arguments)
    assert result.shape == (shape[0], 4, 3)
    assert result.dtype == torch.float32
    assert not result.any()


def test_compiles_as_one_graph(device: torch.device, same_bits: Callable) -> None:
    arguments = [t.to(device) for t in make((2, 12, 40, 8, 8), torch.bfloat16, torch.float32)]
    arguments[0] = arguments[0].transpose(1, 2).contiguous().transpose(1, 2)
    torch._dynamo.reset()
    compiled = torch.compile(functional.grad_project, fullgraph=True, backend="aot_eager")
    assert same_bits(compiled(*arguments, 0.5), functional.grad_project(*arguments, 0.5))


def test_wrong_arguments_are_named(device: torch.device) -> None:
    gradients, inputs, matrix = (t.to(device) for t in make((2, 5, 6, 4, 3), torch.bfloat16, torch.bfloat16))
    project = functional.grad_project
    with pytest.raises(ValueError, match=r"gradients must be \[B, T, d_out\] of fp32, bf16 or fp16, got float64"):
        project(gradients.double(), inputs, matrix)
    with pytest.raises(ValueError, match=r"gradients must be .* got bfloat16\[5, 6\]"):
        project(gradients[0], inputs, matrix)
    with pytest.raises(ValueError, match=r"inputs must be \[2, 5, 1\.\.256\] .* got bfloat16\[2, 4, 3\]"):
        project(gradients, inputs[:, :4], matrix)
    with pytest.raises(ValueError, match=r"inputs must be .* got bfloat16\[2, 5, 257\]"):
        project(gradients, inputs.repeat(1, 1, 100)[..., :257], matrix)
    with pytest.raises(ValueError, match=r"matrix must be \[1\.\.256, 6\] of torch\.bfloat16 or fp32 .* got float16"):
        project(gradients, inputs, matrix.half())
    with pytest.raises(ValueError, match=r"matrix must be .* got bfloat16\[4, 5\]"):
        project(gradients, inputs, matrix[:, :5])


def test_raw_op_refuses_what_would_read_anywhere(device: torch.device) -> None:
    gradients, inputs, matrix = (t.to(device) for t in make((2, 5, 6, 4, 3), torch.float32, torch.float32))
    op = torch.ops.sparseopt.grad_project
    strided = torch.zeros(2, 5, 12, device=device)[..., ::2]
    for bad in (
        (gradients, inputs[:1], matrix),
        (gradients, inputs[:, :4], matrix),
        (gradients, inputs, matrix[:, :5]),
        (strided, inputs, matrix),
        (gradients.double(), inputs, matrix),
    ):
        with pytest.raises((RuntimeError, ValueError)):
            op(*bad, 1.0)


@pytest.mark.gpu
def test_past_two_billion_elements() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    gradients = torch.zeros(2, 70_000, 16_384, dtype=torch.bfloat16, device="cuda")
    gradients[1, -3:] = torch.randn(3, 16_384).to(gradients)
    inputs = torch.zeros(2, 70_000, 16, dtype=torch.bfloat16, device="cuda")
    inputs[1, -3:] = torch.randn(3, 16).to(inputs)
    matrix = torch.randn(16, 16_384).to(gradients)
    result = functional.grad_project(gradients, inputs, matrix)
    assert not result[0].any()
    check(gradients[1:, -3:], inputs[1:, -3:], matrix, 1.0, result[1:])
