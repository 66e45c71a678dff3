"""The mask codec: compiled and numpy byte for byte the same, small, and safe against any stream."""

import zlib

import numpy as np
import pytest
import torch

import sparseopt as so
from sparseopt import _backend
from sparseopt.benchmarks import codec as benchmark
from sparseopt.masks import _rice, codec

compiled = pytest.importorskip("sparseopt._C") if _backend.selection("cpu").backend == "cpp" else _rice
CODERS = [compiled, _rice]
SIZES = [0, 1, 7, 8, 9, 31, 32, 33, 1023, 1025, 65537]
NO_LIMIT = 1 << 40


def pack(mask):
    return np.packbits(mask, bitorder="little")


def masks_of(n, seed=0):
    """Random, grouped, single and far entries."""
    generator = np.random.default_rng(seed)
    for density in (0, 0.001, 0.025, 0.3, 0.5, 0.9, 1):
        yield generator.random(n) < density
    for group in (3, 8, 16, 100, 5000):
        for density in (0.1, 0.6):
            yield np.repeat(generator.random(-(-n // group)) < density, group)[:n]
    if n:
        for place in (0, n - 1):
            yield np.arange(n) == place


@pytest.mark.parametrize("n", SIZES)
def test_both_coders_write_the_same_and_read_it(n):
    for mask in masks_of(n):
        bits = pack(mask)
        stream = compiled.encode_mask(bits, n, NO_LIMIT)
        assert stream == _rice.encode_mask(bits, n, NO_LIMIT)
        for coder in CODERS:
            target = np.zeros_like(bits)
            coder.decode_mask_(np.frombuffer(stream, np.uint8), target, n)
            assert np.array_equal(target, bits)
            assert coder.encode_mask(bits, n, len(stream) + 1) == stream
            assert coder.encode_mask(bits, n, len(stream)) == b""


def test_a_jump_over_empty_rows_costs_a_few_bytes():
    n = 20_000_000
    mask = np.zeros(n, bool)
    for row in (0, 7_000_000, 19_000_000):
        mask[row : row + 3000] = np.random.default_rng(row).random(3000) < 0.1
    bits = pack(mask)
    stream = compiled.encode_mask(bits, n, NO_LIMIT)
    assert stream == _rice.encode_mask(bits, n, NO_LIMIT)
    assert len(stream) < 1.1 * 9000 * benchmark.entropy(0.1) / 8
    target = np.zeros_like(bits)
    _rice.decode_mask_(np.frombuffer(stream, np.uint8), target, n)
    assert np.array_equal(target, bits)


@pytest.mark.parametrize(
    ("case", "limit"),
    [("2.5%", 0.18), ("0.25%", 0.026), ("10%", 0.49), ("50%", 1.001), ("2.5%, rows", 0.001),
     ("2.5%, runs of 16", 0.0115), ("2:4", 0.7), ("2.5%, 5% of it moved since the parent", 0.026)],
)  # fmt: skip
def test_bits_per_entry(case, limit):
    found = benchmark.measure(case, 1 << 21, 1)
    assert 0 < found["bits_per_entry"] <= limit
    assert found["bytes_of_3b"] == round(found["bits_per_entry"] / 8 * 3e9)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("n", SIZES)
def test_stored_masks_are_applied_in_place(monkeypatch, backend, n):
    chosen = _backend.selection("cpu")
    if backend == "reference":
        monkeypatch.setattr(_backend, "selection", lambda device: _backend.Selection("cpu", "reference", "test"))
    elif chosen.backend != "cpp":
        pytest.skip("no extension")
    old = torch.from_numpy(pack(np.random.default_rng(5).random(n) < 0.3))
    for mask in masks_of(n, 1):
        bits = torch.from_numpy(pack(mask))
        stored = codec.encode(bits, n)
        assert stored.numel() <= bits.numel() + 1
        target = torch.zeros_like(bits)
        codec.decode_(stored, target, n)
        assert torch.equal(target, bits)
        difference = codec.encode_difference(bits, old, n)
        assert (difference is None) == torch.equal(bits, old)
        if difference is not None:
            assert difference.numel() <= bits.numel() + 1
            target = old.clone()
            codec.decode_(difference, target, n)
            assert torch.equal(target, bits)


def test_a_difference_without_gain_is_stored_afresh():
    one, other = (torch.from_numpy(pack(np.random.default_rng(i).random(100_000) < 0.025)) for i in range(2))
    assert codec.encode_difference(one, other, 100_000).numel() == codec.encode(one, 100_000).numel()


def test_damaged_streams_never_write_elsewhere():
    """Mutated streams: both decoders refuse, or both make the same bits, and nothing beside the target changes."""
    generator = np.random.default_rng(3)
    margin = 64
    refused = decoded = 0
    for n in (0, 5, 1000, 70_001):
        for mask in masks_of(n, 2):
            good = compiled.encode_mask(pack(mask), n, NO_LIMIT)
            for _ in range(12):
                stream = np.frombuffer(good, np.uint8).copy()
                for _ in range(int(generator.integers(1, 4))):
                    stream[generator.integers(min(stream.size, generator.choice([4, 12, 1 << 30])))] = (
                        generator.integers(256)
                    )
                stream = stream[: generator.integers(stream.size + 1)] if generator.random() < 0.2 else stream
                results = []
                for coder in CODERS:
                    around = np.full((n + 7) // 8 + 2 * margin, 0xA5, np.uint8)
                    target = around[margin : around.size - margin]
                    target[:] = 0
                    try:
                        coder.decode_mask_(stream, target, n)
                        results.append(target.tobytes())
                    except ValueError:
                        results.append(None)
                    assert (around[:margin] == 0xA5).all()
                    assert (around[around.size - margin :] == 0xA5).all()
                assert results[0] == results[1]
                refused, decoded = refused + (results[0] is None), decoded + (results[0] is not None)
    assert refused > 100
    assert decoded > 20


@pytest.mark.parametrize(
    "stream",
    [
        b"", b"\x00", b"\x04\x01\x00", b"\x00\x00\x00", b"\x00\xe9\x07\x00", b"\x00" + b"\xff" * 20,
        b"\x00\x01\xe9\x07", b"\x00\x01\x01\x31\x01\x00\x01", b"\x00\x01\x01\x00\xff\xff\xff\xff\x7f",
        b"\x00\x01\x01\x00\x03\x00\x00\x02", b"\x00\x01\x01\x00\x01\x03", b"\x00\x01\x01\x00\x01\x00",
        b"\x00\x01\x01\x00\x01\x01\x00", b"\x01\x01\x01\x00\x01\x01\x0b\x01\xff\xff\x01",
        b"\x00\x01\x01\x30\x01\xff\xff\xff\xff\xff\xff\x01",
    ],
)  # fmt: skip
def test_hostile_streams(stream):
    for coder in CODERS:
        with pytest.raises(ValueError):
            coder.decode_mask_(np.frombuffer(stream, np.uint8), np.zeros(125, np.uint8), 1000)


def test_stored_bytes_are_bounded_before_they_are_read():
    bits = torch.zeros(10, dtype=torch.uint8)
    for stored in ([], [7], [codec.RAW] + [0] * 9, [codec.RAW] * 12, [codec.ZLIB, 1, 2], [codec.ZLIB]):
        with pytest.raises(ValueError):
            codec.decode_(torch.tensor(stored, dtype=torch.uint8), bits.clone(), 80)
    for size in (9, 11, 1 << 20):  # a bomb, shorter than its mask
        bomb = bytes([codec.ZLIB]) + zlib.compress(b"\0" * size)
        large = torch.zeros(max(size - 1, len(bomb)), dtype=torch.uint8)
        with pytest.raises(ValueError, match="bits than entries"):
            codec.decode_(torch.frombuffer(bytearray(bomb), dtype=torch.uint8), large, 8 * large.numel())
    cut = zlib.compress(bytes(range(256)) * 4)[:-3]
    stored = torch.frombuffer(bytearray(bytes([codec.ZLIB]) + cut), dtype=torch.uint8)
    with pytest.raises(ValueError, match="too early"):
        codec.decode_(stored, torch.zeros(1024, dtype=torch.uint8), 8192)


@pytest.mark.skipif(compiled is _rice, reason="no extension")
def test_the_extension_checks_its_arguments():
    bits = np.zeros(2, np.uint8)
    stream = np.frombuffer(compiled.encode_mask(bits, 9, 100), np.uint8)
    for n in (-1, 8, 17, 1 << 50):
        with pytest.raises(ValueError, match="entries cannot have 2 bytes"):
            compiled.encode_mask(bits, n, 100)
        with pytest.raises(ValueError, match="entries cannot have 2 bytes"):
            compiled.decode_mask_(stream, bits, n)
    with pytest.raises(ValueError, match="past the mask"):
        compiled.encode_mask(np.full(2, 255, np.uint8), 9, 100)
    for wrong in (np.zeros(2, np.int16), np.zeros((2, 1), np.uint8), np.zeros(4, np.uint8)[::2]):
        with pytest.raises((TypeError, ValueError)):
            compiled.encode_mask(wrong, 9, 100)
    with pytest.raises((TypeError, ValueError, BufferError)):
        compiled.decode_mask_(stream, bytes(2), 9)


def test_the_benchmark_writes_its_results(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "CASES", {"50%": (0.5, 1)})
    assert benchmark.main(["--entries", "8192", "--rounds", "2", "--output", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("codec-*.json")
    assert path.read_text() == capsys.readouterr().out
    with pytest.raises(SystemExit):
        benchmark.main(["--entries", "5"])


def test_threads_decode_at_once():
    from concurrent.futures import ThreadPoolExecutor

    bits = so.pack_mask(torch.rand(300_000, generator=torch.Generator().manual_seed(0)) < 0.1)
    stored = codec.encode(bits, 300_000)

    def decode(_):
        target = torch.zeros_like(bits)
        codec.decode_(stored, target, 300_000)
        return torch.equal(target, bits)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(decode, range(16)))
