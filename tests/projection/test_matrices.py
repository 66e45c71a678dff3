"""Random matrices: the generator's published answers, distributions, and that nothing but the key matters."""

from __future__ import annotations

import hashlib
import math
from statistics import NormalDist

import pytest
import torch

from sparseopt.projection.matrices import (
    CHUNK,
    KINDS,
    _log,
    _normal,
    count_sketch,
    fold,
    philox4x32,
    projection_matrix,
    sketch_plan,
    unscaled_matrix,
)


# ---- generator -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, int], answer: tuple[int, ...]) -> None:
    """The vectors that Random123 publishes for philox4x32-10 (tests/kat_vectors)."""
    words = philox4x32(tuple(torch.tensor([c]) for c in counter), key)  # type: ignore[arg-type]
    assert tuple(int(word) for word in words) == answer


def test_normal_quantile_against_the_standard_library() -> None:
    words = torch.cat([torch.randint(0, 2**32, (5000,)), torch.tensor([0, 1, 2**31 - 1, 2**31, 2**32 - 1])])
    values = _normal(words)
    expected = torch.tensor([NormalDist().inv_cdf((int(w) + 0.5) / 2**32) for w in words], dtype=torch.float64)
    assert (values - expected).abs().max() < 1e-14
    mirrored = _normal(2**32 - 1 - words)
    assert torch.equal(values, -mirrored)


def test_logarithm() -> None:
    x = torch.cat([torch.rand(10000, dtype=torch.float64) * 2.0**-33, torch.rand(10000, dtype=torch.float64)])
    x = torch.cat([x[x > 0], torch.tensor([0.5, math.sqrt(0.5), 1.0, 2.0, 1e300], dtype=torch.float64)])
    expected = torch.tensor([math.log(float(v)) for v in x], dtype=torch.float64)
    assert ((_log(x) - expected).abs() <= 1e-15 * expected.abs().clamp(min=1e-3)).all()


def test_values_do_not_change_between_releases() -> None:
    """Stored projections are worth their matrices: these bits are for good."""
    gaussian = unscaled_matrix("gaussian", 8, 129, 42, "transformer.h.0.mlp.c_fc", "o")[0]
    signs = unscaled_matrix("rademacher", 8, 129, 42, "transformer.h.0.mlp.c_fc", "o")[0]
    digests = [hashlib.sha256(m.numpy().tobytes()).hexdigest()[:16] for m in (gaussian, signs)]
    assert digests == ["03b80e87f29a614f", "25d02c54ee9861f5"]
    torch.testing.assert_close(
        gaussian[0, :4],
        torch.tensor([0.2958454489707947, 0.17932292819023132, 0.10135349631309509, -0.25032752752304077]),
        rtol=0,
        atol=0,
    )


# ---- matrices --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_same_key_same_matrix_other_key_another(kind: str) -> None:
    def make(seed: int = 1, key: str = "h.1", side: str = "i") -> torch.Tensor:
        return projection_matrix(kind, 4, 96, seed, key, side)

    torch.manual_seed(5)
    first = make()
    torch.manual_seed(6)
    torch.rand(10)
    assert torch.equal(first, make())
    assert first.dtype == torch.float32
    for other in (make(seed=2), make(key="h.10"), make(side="o"), make(seed=11, key="1")):
        assert (first * other).mean().abs() < 5 * first.square().mean() / math.sqrt(first.numel())


def test_random_numbers_of_torch_are_left_alone() -> None:
    before = torch.get_rng_state()
    projection_matrix("gaussian", 4, 9, 0, "x", "o")
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
def test_entries_do_not_depend_on_the_chunk(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = unscaled_matrix(kind, 7, 331, 3, "k", "o")[0]
    monkeypatch.setattr("sparseopt.projection.matrices.CHUNK", 256)
    assert torch.equal(whole, unscaled_matrix(kind, 7, 331, 3, "k", "o")[0])
    assert CHUNK % 128 == 0
    assert torch.equal(whole[:3], unscaled_matrix(kind, 3, 331, 3, "k", "o")[0])


def test_gaussian_moments() -> None:
    """n = 500,000 entries: each bound is 5 standard errors of that moment (variances of x, x^2, x^3, x^4: 1, 2, 15, 96)."""
    x = (projection_matrix("gaussian", 50, 10_000, 9, "layer", "i") * math.sqrt(50)).double().flatten()
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float((x**power).mean()) - mean) < 5 * math.sqrt(variance / x.numel())
    # Neighbours (of one block, of one row, of one column) are uncorrelated.
    m = x.view(50, 10_000)
    for a, b in ((m[:, :-1], m[:, 1:]), (m[:, :-4], m[:, 4:]), (m[:-1], m[1:])):
        assert abs(float((a * b).mean())) < 5 / math.sqrt(a.numel())
    assert x.unique().numel() > 0.99 * x.numel()


def test_rademacher() -> None:
    m = projection_matrix("rademacher", 64, 5000, 9, "layer", "i")
    assert torch.equal(m.abs(), torch.full_like(m, 1 / 8))
    assert abs(float(m.sign().mean())) < 5 / math.sqrt(m.numel())
    for shift in (1, 32, 128):
        flat = m.sign().flatten()
        assert abs(float((flat[:-shift] * flat[shift:]).mean())) < 5 / math.sqrt(m.numel())


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (8, 300), (40, 40)])
def test_row_orthonormal(rows: int, columns: int) -> None:
    m = projection_matrix("row_orthonormal", rows, columns, 9, "layer", "o").double()
    torch.testing.assert_close(m @ m.T, torch.eye(rows).double() * columns / rows, rtol=0, atol=1e-5 * columns / rows)


def test_row_orthonormal_has_the_gaussian_rows_signs() -> None:
    """Whatever signs a LAPACK chooses: R = Q^T G^T is upper triangular with a positive diagonal."""
    gaussian = unscaled_matrix("gaussian", 6, 50, 1, "layer", "o")[0]
    r = unscaled_matrix("row_orthonormal", 6, 50, 1, "layer", "o")[0] @ gaussian.T
    assert r.tril(-1).abs().max() < 1e-5
    assert (r.diagonal() > 1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_expected_gram_is_the_identity(kind: str) -> None:
    """Mean of P^T P over 400 keys; entries of one have a standard deviation of at most sqrt(2/rows) = 0.71."""
    total = sum((lambda p: p.T @ p)(projection_matrix(kind, 4, 6, seed, "layer", "i").double()) for seed in range(400))
    assert isinstance(total, torch.Tensor)
    assert (total / 400 - torch.eye(6)).abs().max() < 5 * math.sqrt(2 / 4 / 400)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_gpu_and_cpu_agree_bitwise(kind: str) -> None:
    for rows, columns in ((16, 50257), (16, 768), (3, 7)):
        cpu = projection_matrix(kind, rows, columns, 42, "layer", "o")
        assert torch.equal(cpu, projection_matrix(kind, rows, columns, 42, "layer", "o", "cuda").cpu())
    for cpu, gpu in zip(count_sketch(4096, 256, 1, "x"), count_sketch(4096, 256, 1, "x", "cuda"), strict=True):
        assert torch.equal(cpu, gpu.cpu())


def test_errors() -> None:
    with pytest.raises(ValueError, match="Unknown kind of projection matrix 'sparse'"):
        projection_matrix("sparse", 2, 3, 0, "x", "i")
    with pytest.raises(ValueError, match="Unknown side 'left'"):
        projection_matrix("gaussian", 2, 3, 0, "x", "left")
    with pytest.raises(ValueError, match="got 0 x 3"):
        projection_matrix("gaussian", 0, 3, 0, "x", "i")
    with pytest.raises(ValueError, match="4 orthonormal rows do not fit into 3"):
        projection_matrix("row_orthonormal", 4, 3, 0, "x", "i")


# ---- count sketch ----------------------------------------------------------------------------------------------------
def test_count_sketch_is_uniform_and_signed() -> None:
    """Chi-squared of 64 buckets has mean 63 and standard deviation sqrt(126): 63 + 6 of them is 130."""
    bucket, signs = count_sketch(50_000, 64, 1, "layer")
    counts = torch.bincount(bucket, minlength=64)
    assert counts.numel() == 64
    expected = 50_000 / 64
    assert float(((counts - expected) ** 2 / expected).sum()) < 130
    assert torch.equal(signs.abs(), torch.ones(50_000))
    assert abs(float(signs.mean())) < 5 / math.sqrt(50_000)
    assert not torch.equal(bucket, count_sketch(50_000, 64, 1, "other")[0])


@pytest.mark.parametrize(("n", "buckets"), [(1, 1), (10, 3), (3, 10), (1000, 64)])
def test_fold_is_the_signed_sum(n: int, buckets: int) -> None:
    bucket, signs = count_sketch(n, buckets, 2, "layer")
    values = torch.randn(2, 4, n)
    expected = torch.zeros(2, 4, buckets).index_add(2, bucket, values * signs)
    torch.testing.assert_close(fold(values, sketch_plan(bucket, signs, buckets)), expected)
