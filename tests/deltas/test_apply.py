"""Delta.apply_ on live models: one op per dtype, every layout, and the table of chunks behind it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import sparseopt as so
from sparseopt.deltas import _apply
from sparseopt.reference import arena_positions

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def odd_values(n: int, dtype: torch.dtype) -> Tensor:
    return torch.randint(0, 256, (n * dtype.itemsize,), dtype=torch.uint8).view(dtype)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of tensors of every call of the op."""
    calls: list[int] = []
    scatter = _apply.functional.scatter_values_

    def count(params: list[Tensor], *args: Tensor, **kwargs: int) -> None:
        calls.append(len(params))
        scatter(params, *args, **kwargs)

    monkeypatch.setattr(_apply.functional, "scatter_values_", count)
    return calls


def test_one_call_per_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    model = torch.nn.ParameterDict({f"{str(d)[6:]}_{i}": torch.zeros(30, 200).to(d) for d in DTYPES for i in range(3)})
    entries = {}
    for name, param in model.items():
        indices = (torch.rand(6000) < 0.9).nonzero().view(-1)  # more than one chunk
        entries[name] = (indices, odd_values(indices.numel(), param.dtype))
    before = {name: (param.data_ptr(), param._version) for name, param in model.items()}
    so.Delta.from_dict(entries, {name: p.shape for name, p in model.items()}).apply_(model)
    assert calls == [3] * len(DTYPES)
    for name, param in model.items():
        expected = torch.zeros(6000, dtype=param.dtype)
        expected[entries[name][0]] = entries[name][1]
        assert torch.equal(bits(param), bits(expected))
        assert (param.data_ptr(), param._version) > before[name]
        assert param.is_leaf
        assert param.requires_grad


def test_strided_and_other_dtypes_take_the_other_way(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    state = {
        "plain": torch.zeros(4, 6),
        "strided": torch.zeros(6, 4).t(),
        "sliced": torch.zeros(8, 12)[::2, ::2],
        "scalar": torch.zeros(()),
        "counts": torch.zeros(24, dtype=torch.int64),
        "steps": torch.zeros((), dtype=torch.int64),
    }
    entries = {}
    for name, tensor in state.items():
        indices = torch.tensor([0, 7, 23]) if tensor.dim() else torch.tensor([0])
        entries[name] = (indices, (torch.arange(1.0, 4)[: indices.numel()]).to(tensor.dtype))
    versions = {name: tensor._version for name, tensor in state.items()}
    so.Delta.from_dict(entries, {name: t.shape for name, t in state.items()}).apply_(state)
    assert calls == [2]
    for name, tensor in state.items():
        flat = tensor.reshape(-1)
        assert flat[entries[name][0]].tolist() == entries[name][1].tolist(), name
        assert int((flat != 0).sum()) == entries[name][0].numel()
        assert tensor._version > versions[name]


def test_tied_tensors_end_with_the_last_value() -> None:
    shared = torch.zeros(10_000)
    state = {"a": shared, "other": torch.zeros(5), "b": shared, "c": shared[:7]}
    entries = {
        "a": (torch.arange(10_000), torch.full((10_000,), 1.0)),
        "other": (torch.tensor([1]), torch.tensor([9.0])),
        "b": (torch.arange(0, 10_000, 2), torch.full((5000,), 2.0)),
        "c": (torch.tensor([2, 3]), torch.tensor([3.0, 3.0])),
    }
    so.Delta.from_dict(entries, {name: t.shape for name, t in state.items()}).apply_(state)
    assert shared[:6].tolist() == [2, 1, 3, 3, 2, 1]
    assert state["other"].tolist() == [0, 9, 0, 0, 0]


def test_nothing_to_write() -> None:
    target = torch.zeros(3)
    so.Delta.from_dict({"w": (torch.empty(0, dtype=torch.int64), torch.empty(0))}, {"w": (3,)}).apply_({"w": target})
    so.Delta.from_dict({}, {}).apply_({"w": target})
    assert not target.any()


def test_autograd_notices() -> None:
    weight = torch.nn.Parameter(torch.ones(5))
    loss = (weight * weight).sum()
    so.Delta.from_dict({"w": (torch.tensor([2]), torch.tensor([3.0]))}, {"w": (5,)}).apply_({"w": weight})
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_chunk_table_past_int32() -> None:
    """Offsets stay int32 and every chunk's span fits them, wherever the indices lie."""
    wide = torch.cat(
        [torch.tensor([0, 5, 2**31 - 1, 2**31, 2**31 + 9]), 2**40 + torch.arange(0, 10_000, 3), torch.tensor([2**45])]
    )
    narrow = torch.arange(0, 9000, 2, dtype=torch.int32)
    offsets, chunks = _apply.chunk_table([wide, torch.empty(0, dtype=torch.int64), narrow])
    assert offsets.dtype == torch.int32
    assert int(chunks[:, 3].max()) <= 4096
    assert torch.equal(arena_positions(offsets, chunks), torch.cat([wide, narrow.long()]))
    assert chunks[:, 0].unique().tolist() == [0, 2]


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    on_cpu = {f"{d}{i}": torch.randn(3000, 40).to(d) for d in DTYPES for i in range(2)}
    on_cpu["strided"] = torch.randn(40, 30).t()
    on_gpu = {name: tensor.cuda() for name, tensor in on_cpu.items()}
    entries = {}
    for name, tensor in on_cpu.items():
        indices = (torch.rand(tensor.numel()) < 0.03).nonzero().view(-1)
        entries[name] = (indices, odd_values(indices.numel(), tensor.dtype))
    delta = so.Delta.from_dict(entries, {name: t.shape for name, t in on_cpu.items()})
    delta.apply_(on_cpu)
    delta.apply_(on_gpu)
    assert all(torch.equal(bits(on_gpu[name].cpu()), bits(on_cpu[name])) for name in on_cpu)


@pytest.mark.gpu
def test_past_int32_on_a_gpu() -> None:
    if not torch.cuda.is_available() or torch.cuda.mem_get_info()[0] < 6 << 30:
        pytest.skip("no CUDA device with 6 GiB free")
    n = 2**31 + 100
    weight = torch.zeros(n, dtype=torch.bfloat16, device="cuda")
    indices = torch.tensor([0, 77, 2**31 - 1, 2**31, n - 1])
    values = torch.arange(1, 6).bfloat16()
    so.Delta.from_dict({"w": (indices, values)}, {"w": (n,)}).apply_({"w": weight})
    assert weight[indices.cuda()].tolist() == values.tolist()
    assert int(torch.count_nonzero(weight)) == 5
