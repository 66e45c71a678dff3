"""accumulate_squares_: the same bits on every backend, on the grid; absent tensors, loss scales, what it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sparseopt import functional, reference

SIZES = (0, 1, 7, 8, 9, 31, 32, 33, 1023, 1025, 4095, 4096, 4097, 65535, 65536, 65537)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
WEIGHT = 0.0123
VARIANTS = {  # decay, inverse
    "plain": (None, None), "decay": (0.9, None), "inverse": (None, 1 / 512), "both": (0.7, 1 / 3), "overflow": (0.7, 0.0),
}  # fmt: skip


def number(value: float | None, device: torch.device) -> Tensor | None:
    return None if value is None else torch.tensor(value, device=device)


def problem(sizes: list[int], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Accumulators of all magnitudes, and gradients down to the dtype's subnormals."""
    stored = [torch.randn(n).exp2().mul(torch.rand(n)) for n in sizes]
    grads = [(torch.randn(n) * torch.exp2(-20 * torch.rand(n))).to(dtype) for n in sizes]
    return stored, grads


def check(
    stored: list[Tensor],
    grads: list[Tensor],
    device: torch.device,
    same: Callable,
    place: Callable[[Tensor], Tensor] = lambda t: t,
    variant: str = "plain",
) -> None:
    decay, inverse = VARIANTS[variant]
    expected = [squares.clone() for squares in stored]
    cpu = torch.device("cpu")
    reference.accumulate_squares_(expected, grads, WEIGHT, number(decay, cpu), number(inverse, cpu))
    ours = [place(squares.to(device)) for squares in stored]
    placed = [place(grad.to(device)) for grad in grads]
    functional.accumulate_squares_(
        ours, placed, WEIGHT, decay=number(decay, device), inverse=number(inverse, device)
    )  # fmt: skip
    assert all(same(mine.cpu(), wanted) for mine, wanted in zip(ours, expected, strict=True))
    assert all(same(left.cpu(), grad) for left, grad in zip(placed, grads, strict=True)), "gradients are only read"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", SIZES)
def test_grid(device: torch.device, n: int, dtype: torch.dtype, variant: str, same_bits: Callable) -> None:
    check(*problem([n], dtype), device, same_bits, variant=variant)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_reference_follows_the_formula(dtype: torch.dtype) -> None:
    (stored,), (grad,) = problem([1000], dtype)
    expected = 0.7 * stored.double() + WEIGHT * (grad.double() / 3) ** 2
    reference.accumulate_squares_([stored], [grad], WEIGHT, torch.tensor(0.7), torch.tensor(1 / 3))
    torch.testing.assert_close(stored.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_torchs_own_operations_agree(device: torch.device, dtype: torch.dtype) -> None:
    """But for fused multiply-adds, which torch uses on some processors: one rounding less."""
    stored, grads = problem([4099, 70], dtype)
    expected = [squares.clone() for squares in stored]
    torch._foreach_mul_(expected, 0.25)
    torch._foreach_addcmul_(expected, grads, grads, WEIGHT)
    ours = [squares.to(device) for squares in stored]
    functional.accumulate_squares_(ours, [grad.to(device) for grad in grads], WEIGHT, decay=0.25)
    for mine, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine.cpu(), wanted, rtol=2e-7, atol=0)


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_tensors_aligned_or_not(
    device: torch.device, dtype: torch.dtype, offset: int, shift: Callable, same_bits: Callable
) -> None:
    sizes = [1 + 3700 * t % 9001 for t in range(40)]
    check(*problem(sizes, dtype), device, same_bits, lambda t: shift(t, offset), "both")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_absent_gradients_decay_only(
    device: torch.device, dtype: torch.dtype, variant: str, same_bits: Callable
) -> None:
    stored, grads = problem([5000, 0, 33, 9000], dtype)
    stored[2][0] = -0.0
    for absent in ([2], [0, 3], [0, 1, 2, 3]):
        some = [grad[:0] if t in absent else grad for t, grad in enumerate(grads)]
        check(stored, some, device, same_bits, variant=variant)


def test_not_contiguous(device: torch.device, same_bits: Callable) -> None:
    stored, wide = torch.rand(60, 70, device=device), torch.randn(70, 120, device=device)
    grad = wide[:, ::2].t()
    expected = stored.cpu()
    reference.accumulate_squares_([expected], [grad.cpu().contiguous()], WEIGHT, None, None)
    functional.accumulate_squares_([stored], [grad], WEIGHT)
    assert same_bits(stored.cpu(), expected)
    with pytest.raises(ValueError, match="accumulator 0 must be contiguous fp32"):
        functional.accumulate_squares_([stored.t()], [grad], WEIGHT)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite(device: torch.device, dtype: torch.dtype) -> None:
    """It stays without a loss scale, and counts as 0 with one, whatever the scale."""
    grad = torch.tensor([math.nan, math.inf, -math.inf, 2.0, -0.0], dtype=dtype)
    for inverse in (None, 0.0, 0.5):
        stored = torch.ones(5, device=device)
        functional.accumulate_squares_([stored], [grad.to(device)], 1.0, inverse=number(inverse, device))
        if inverse is None:
            torch.testing.assert_close(stored.cpu(), torch.tensor([math.nan, math.inf, math.inf, 5, 1]), equal_nan=True)
        else:
            assert stored.tolist() == [1, 1, 1, 1 + 4 * inverse**2, 1]
    kept = torch.tensor([math.nan, math.inf], device=device)
    functional.accumulate_squares_([kept], [torch.ones(2, dtype=dtype, device=device)], 1.0, decay=0.0)
    assert kept.isnan().all()


def test_large(device: torch.device, native_only: None, same_bits: Callable) -> None:
    check(*problem([20_000_003, 5], torch.bfloat16), device, same_bits, variant="decay")


def test_refuses_what_does_not_fit(device: torch.device) -> None:
    stored, grad = torch.zeros(10, device=device), torch.ones(10, device=device)
    functional.accumulate_squares_([], [], 1.0)
    for stored_list, grads, error, match in (
        ([stored], [], ValueError, "0 gradients for 1 accumulators"),
        ([stored], [grad[:9]], ValueError, "gradient 0 must have 10 entries"),
        ([stored.half()], [grad], ValueError, "accumulator 0 must be contiguous fp32"),
        ([stored, stored.clone()], [grad, grad.half()], TypeError, "one dtype"),
        ([stored], [grad.int()], TypeError, "one dtype"),
    ):
        with pytest.raises(error, match=match):
            functional.accumulate_squares_(stored_list, grads, 1.0)  # type: ignore[arg-type]
    for name, wrong in (("decay", torch.ones(2)), ("inverse", torch.ones((), dtype=torch.float64))):
        options = {name: wrong.to(device)}
        with pytest.raises(ValueError, match=f"{name} must be one fp32 number"):
            functional.accumulate_squares_([stored], [grad], 1.0, **options)  # type: ignore[arg-type]
    strided = torch.ones(20, device=device)[::2]
    op = torch.ops.sparseopt.accumulate_squares_
    for stored_list, grads in (
        ([stored], []), ([stored], [grad[:9]]), ([stored], [strided]), ([strided], [grad]), ([stored.double()], [grad]),
        ([stored, stored.clone()], [grad, grad.half()]),
    ):  # fmt: skip
        with pytest.raises((RuntimeError, ValueError, TypeError)):
            op(stored_list, grads, 1.0, None, None)
    assert not stored.any()


# ---- as it is compiled, which needs no GPU -----------------------------------------------------------------------------
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(
    ("dtype", "loads"), [("bf16", ("v4.b32", "v2.b32")), ("fp16", ("v4.b32", "v2.b32")), ("fp32", ("v4.b32",))]
)
def test_whole_ranges_are_moved_four_entries_at_a_time(
    native_only: None, dtype: str, loads: tuple[str, ...], scaled: bool
) -> None:
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget

    from sparseopt.triton_kernels import accumulate

    kernel, element = accumulate._accumulate_kernel, triton.language.dtype(dtype)
    fixed = {
        "GRAD": element, "ACC": triton.language.float32, "STORED_ALIGNED": True, "GRAD_ALIGNED": True,
        "GRAD_BYTES": element.primitive_bitwidth // 2, "BLOCK": accumulate.BLOCK,
        **({} if scaled else {"decay": None, "inverse": None}),
    }  # fmt: skip
    kinds = {
        "stored": "*i64",
        "grads": "*i64",
        "ranges": "*i64",
        "weight": "fp32",
        "decay": "*fp32",
        "inverse": "*fp32",
    }
    signature = {name: "constexpr" if name in fixed else kinds[name] for name in kernel.arg_names}
    source = triton.compiler.ASTSource(
        kernel, signature, {(i,): fixed[name] for i, name in enumerate(signature) if name in fixed}
    )
    compiled = triton.compile(
        source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8, "enable_fp_fusion": False}
    )
    for access in (*(f"ld.global.{load}" for load in loads), "st.global.v4.b32"):
        # 16 entries of a thread, 4 at a time; fp32 gradients are loaded as the accumulators are.
        assert compiled.asm["ptx"].count(access) == (8 if access == "ld.global.v4.b32" and dtype == "fp32" else 4), (
            access
        )
    assert "fma" not in compiled.asm["ptx"]
    assert compiled.metadata.shared == 0


# ---- on a GPU --------------------------------------------------------------------------------------------------------
@pytest.mark.gpu
def test_updates_neither_wait_nor_compile_again(cuda: torch.device) -> None:
    import triton

    stored = [torch.zeros(n, device=cuda) for n in (5000, 17)]
    grads = [torch.ones(n, device=cuda, dtype=torch.bfloat16) for n in (5000, 17)]
    functional.accumulate_squares_(stored, grads, 1.0, decay=0.5)
    compiled: list[str] = []
    previous = triton.knobs.runtime.jit_post_compile_hook
    torch.cuda.synchronize()
    try:
        triton.knobs.runtime.jit_post_compile_hook = lambda **info: compiled.append(str(info.get("repr")))
        torch.cuda.set_sync_debug_mode("error")
        for weight in (1.0, 0.0, 1, 16.0, 0.123):  # 0, 1 and multiples of 16 are what Triton specializes integers for
            functional.accumulate_squares_(stored, grads, weight, decay=0.5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        triton.knobs.runtime.jit_post_compile_hook = previous
    assert compiled == []


@pytest.mark.gpu
@pytest.mark.slow
def test_past_two_to_the_31(cuda: torch.device) -> None:
    """13 GB; the last entries of two ranges past 2^31 are compared, and a small tensor after it."""
    n = 2**31 + 4097
    if torch.cuda.mem_get_info()[0] < 14e9:
        pytest.skip("not enough memory on the device")
    stored, small = torch.zeros(n, device=cuda), torch.zeros(5, device=cuda)
    grad = torch.ones(n, device=cuda, dtype=torch.bfloat16)
    grad[-1], grad[2**31], grad[2**31 - 1] = 3, 5, 7
    functional.accumulate_squares_([stored, small], [grad, torch.ones_like(small).bfloat16()], 1.0)
    assert [float(stored[i]) for i in (0, 2**31 - 2, 2**31 - 1, 2**31, 2**31 + 1, n - 2, n - 1)] == [
        1, 1, 49, 25, 1, 1, 9,
    ]  # fmt: skip
    assert small.tolist() == [1.0] * 5
    assert all(bool((part == 1).all()) for part in stored[: 2**31 - 1].split(1 << 28))
