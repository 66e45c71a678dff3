"""Safetensors files in pieces: against the library, both ways, and every way to be damaged."""

import json

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import load_file, save_file

from sparseopt import FormatError
from sparseopt._safetensors import TensorFile, write_tensors

DTYPES = [
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.bool,
]


def example():
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"t.{i}": torch.randint(0, 2, (i, 3), generator=generator).to(dtype) for i, dtype in enumerate(DTYPES, start=1)
    }
    return {**tensors, "scalar": torch.tensor(2.5), "empty": torch.empty(0, 4)}


def test_reads_what_the_library_writes(tmp_path):
    tensors = example()
    save_file(tensors, tmp_path / "x.safetensors", {"key": "value"})
    with TensorFile(tmp_path / "x.safetensors") as file:
        assert file.metadata == {"key": "value"}
        assert file.shapes == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        assert file.dtypes == {name: tensor.dtype for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            found = file.read(name)
            assert found.dtype == tensor.dtype
            assert torch.equal(found, tensor.reshape(-1))
            found.zero_()  # its own memory: the file stays as it is
            assert torch.equal(file.read(name), tensor.reshape(-1))
        with pytest.raises(KeyError, match="no tensor 'absent'"):
            file.read("absent")


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 200), st.integers(0, 250), st.integers(0, 250), st.sampled_from(DTYPES))
def test_slices(tmp_path_factory, n, start, stop, dtype):
    tensor = torch.arange(n).to(dtype)
    path = tmp_path_factory.mktemp("slices") / "x.safetensors"
    save_file({"a": torch.ones(3), "t": tensor}, path)
    assert torch.equal(TensorFile(path).read("t", start, stop), tensor[start:stop])


def test_the_library_reads_what_is_written_in_pieces(tmp_path):
    tensors = {name: t for name, t in sorted(example().items(), key=lambda pair: -pair[1].itemsize)}
    specs = {name: (t.shape, t.dtype) for name, t in tensors.items()}
    pieces = (piece for t in tensors.values() for piece in (t.reshape(-1)[:5], t.reshape(-1)[5:]))
    write_tensors(tmp_path / "x.safetensors", specs, pieces, {"format": "pt"})
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name], tensor)
    assert TensorFile(tmp_path / "x.safetensors").metadata == {"format": "pt"}


def test_too_few_or_too_many_pieces_write_nothing(tmp_path):
    for pieces in ([torch.zeros(3)], [torch.zeros(3), torch.zeros(2)]):
        with pytest.raises(ValueError, match="should hold 16 bytes of tensors"):
            write_tensors(tmp_path / "x.safetensors", {"a": ((4,), torch.float32)}, pieces)
    assert not list(tmp_path.iterdir())


def with_header(path, header, data=b"\0" * 16):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize(
    "header",
    [
        b"no json",
        b"\xff\xfe",
        [1, 2],
        {"__metadata__": 3},
        {"a": 3},
        {"a": {"dtype": "F32", "shape": [4]}},
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 17]}},
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 12]}},
        {"a": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}},
        {"a": {"dtype": "F32", "shape": [4.0], "data_offsets": [0, 16]}},
        {"a": {"dtype": "F32", "shape": 4, "data_offsets": [0, 16]}},
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}},
    ],
)
def test_damaged_headers(tmp_path, header):
    with_header(tmp_path / "x.safetensors", header)
    with pytest.raises(
        FormatError, match=r"'.*x.safetensors' is not a safetensors file, or it is damaged or truncated"
    ):
        TensorFile(tmp_path / "x.safetensors")


def test_truncated_and_absent_files(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.arange(100.0)}, path)
    data = path.read_bytes()
    for length in (0, 7, 8, 30, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(FormatError, match="damaged or truncated"):
            TensorFile(path)
    path.write_bytes(data)
    file = TensorFile(path)
    path.write_bytes(data[:-8])  # while it is open
    with pytest.raises(FormatError, match="ends before its data does"):
        file.read("a")
    with pytest.raises(FileNotFoundError, match=r"no file '.*absent'"):
        TensorFile(tmp_path / "absent")


def test_a_dtype_that_torch_lacks_is_named_when_it_is_read(tmp_path):
    with_header(tmp_path / "x.safetensors", {"a": {"dtype": "F4", "shape": [32], "data_offsets": [0, 16]}})
    file = TensorFile(tmp_path / "x.safetensors")
    assert file.dtypes == {}
    with pytest.raises(FormatError, match="stores 'a' as F4"):
        file.read("a")
