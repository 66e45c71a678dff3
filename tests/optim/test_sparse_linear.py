"""sparse_linear: which layers it takes and why not, what stays as it was, and what work and memory it spares."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from structured_model import group_mask, loss_of, make_masks, make_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import sparseopt as so
from sparseopt.optim import structured


# ---- which layers ----------------------------------------------------------------------------------------------------
class Experts(nn.Module):
    """As transformers holds the experts of a mixture: one 3-D weight for all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(4, 8, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("ti,eio->to", x, self.gate_up_proj)


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 8)
        self.head = nn.Linear(8, 8, bias=False)
        self.head.weight = self.embedding.weight
        self.scaled, self.patched = Scaled(8, 8), nn.Linear(8, 8)
        self.single, self.full, self.column = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.experts = Experts()
        self.patched.forward = lambda x: F_linear(x, self.patched)  # type: ignore[method-assign]

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for layer in (self.scaled, self.patched, self.single, self.full, self.column):
            x = torch.tanh(layer(x))
        return self.head(x).sum() + self.experts(x).sum()


def F_linear(x: Tensor, layer: nn.Linear) -> Tensor:
    return nn.functional.linear(x, layer.weight, layer.bias)


def test_what_is_left_is_said_and_is_right() -> None:
    torch.manual_seed(0)
    model = Odd()
    dense = copy.deepcopy(model)
    dense.patched.forward = lambda x: F_linear(x, dense.patched)  # type: ignore[method-assign]
    masks = {n: group_mask(tuple(p.shape), "column", [1, 2]) for n, p in model.named_parameters() if p.dim() == 2}
    masks["single.weight"] = torch.eye(8, dtype=torch.bool)
    masks["full.weight"] = torch.ones(8, 8, dtype=torch.bool)
    masks["experts.gate_up_proj"] = torch.zeros(4, 8, 6, dtype=torch.bool).index_fill_(2, torch.tensor([0]), True)
    opt = so.SparseAdamW(model.named_parameters(), masks=masks, unmasked="freeze", capture_gradients=True)
    found = so.sparse_linear(model, masks)
    assert found.layers == {"column.weight": "column"}
    assert found.left == {
        "embedding.weight": "embedding and head share it",
        "scaled.weight": "scaled (Scaled) is not an nn.Linear or Conv1D with its own forward",
        "patched.weight": "the forward of patched is patched already",
        "single.weight": "its active entries are not whole rows or columns",
        "full.weight": "every entry is active",
        "experts.gate_up_proj": "experts (Experts) holds it in 3 dimensions",
    }
    assert "0 layers by row, 1 by column, 6 weights left whole" in repr(found)
    ids = torch.tensor([1, 2, 5])
    for m in (model, dense):
        m(ids).backward()
    assert opt._capture is not None
    for name, values in opt._capture.pending().items():
        gradient = dense.get_parameter(name).grad
        if name in masks:
            assert gradient is not None
            torch.testing.assert_close(values, gradient[masks[name]], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="mask for 'nothing'"):
        so.sparse_linear(model, {"nothing": torch.ones(1, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"shape \(8, 9\), the parameter \(8, 8\)"):
        so.sparse_linear(model, {"full.weight": torch.ones(8, 9, dtype=torch.bool)})
    again = so.sparse_linear(model, masks)
    assert again.left["column.weight"] == "column is structured already"


@pytest.mark.parametrize("shape", [(16, 24), (5, 7), (1, 8), (8, 1), (130, 16), (130, 9)])
def test_whole_groups(shape: tuple[int, int]) -> None:
    """Also where the rows do not begin at whole bytes, and where what breaks the structure comes late."""
    from sparseopt.masks._structured import whole_groups

    for grain, size in (("row", shape[0]), ("column", shape[1])):
        indices = sorted({0, size // 2, size - 1})
        mask = group_mask(shape, grain, indices)
        found = whole_groups(so.pack_mask(mask), shape)
        assert found is not None
        if min(shape) > 1 and len(indices) < size:
            assert found[0] == grain
            assert found[1].tolist() == indices
            for position in ((0, 0), (shape[0] - 1, shape[1] - 1), (shape[0] // 2, shape[1] // 2)):
                other = mask.clone()
                other[position] ^= True
                assert whole_groups(so.pack_mask(other), shape) is None
    for value, count in ((False, 0), (True, shape[0])):
        found = whole_groups(so.pack_mask(torch.full(shape, value)), shape)
        assert found is not None
        assert found[0] == "row"
        assert found[1].numel() == count


# ---- nothing else changes --------------------------------------------------------------------------------------------
def test_the_model_is_the_same_before_during_and_after(tmp_path: Path) -> None:
    model = make_model()
    masks = make_masks(model)
    names = [(n, p.data_ptr(), p.requires_grad) for n, p in model.named_parameters()]
    classes = [type(m) for m in model.modules()]
    attributes = [set(vars(m)) for m in model.modules()]
    tokens = torch.randint(0, 13, (2, 5))
    expected = model(tokens)
    with so.sparse_linear(model, masks) as found:
        assert [(n, p.data_ptr()) for n, p in model.named_parameters()] == [name[:2] for name in names]
        assert list(model.state_dict()) == list(make_model().state_dict())
        assert all(
            isinstance(m, c) and type(m).__name__ == c.__name__ for m, c in zip(model.modules(), classes, strict=False)
        )
        assert not model.embedding.weight.requires_grad
        assert found.frozen == ["embedding.weight", "blocks.2.fused.weight"]
        with torch.no_grad():
            assert torch.equal(model(tokens), expected)
        assert torch.equal(model(tokens), expected)
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        torch.save(model, tmp_path / "model.pt")
    copies.append(torch.load(tmp_path / "model.pt", weights_only=False))
    for copied in (*copies, model):
        assert [type(m) for m in copied.modules()] == classes
        assert [set(vars(m)) for m in copied.modules()] == attributes
        assert torch.equal(copied(tokens), expected)
    assert [(n, p.data_ptr(), p.requires_grad) for n, p in model.named_parameters()] == names
    assert found.layers == {}
    assert found.frozen == []
    found.remove()  # twice does no harm
    for copied in copies:
        copied.requires_grad_(True)
        loss_of(copied, 0).backward()
        assert copied.head.weight.grad.ne(0).all(), "a copy trains whole"


def test_nothing_is_kept_alive() -> None:
    model = make_model()
    masks = make_masks(model)
    opt = so.SparseAdamW(model.named_parameters(), masks=masks, capture_gradients=True)
    found = so.sparse_linear(model, masks)
    loss_of(model, 0).backward()
    opt.step()
    gone = [weakref.ref(model), weakref.ref(model.head.weight), weakref.ref(opt), weakref.ref(model.head._structured)]
    del model, opt, found
    gc.collect()
    assert [reference() for reference in gone] == [None] * 4


def test_moves_and_other_masks() -> None:
    model = make_model()
    masks = make_masks(model)
    found = so.sparse_linear(model, masks)
    model.bfloat16()
    loss_of(model, 0).backward()
    assert model.head.weight.grad is not None
    assert model.head.weight.grad.dtype == torch.bfloat16
    assert set(model.head.weight.grad.ne(0).any(0).nonzero().view(-1).tolist()) == {7, 8}
    found.update({**masks, "head.weight": group_mask((13, 16), "row", [2])})
    assert found.layers["head.weight"] == "row"
    model.zero_grad()
    loss_of(model, 0).backward()
    assert model.head.weight.grad.ne(0).any(1).nonzero().view(-1).tolist() == [2]


# ---- what it spares --------------------------------------------------------------------------------------------------
class Stack(nn.Module):
    """Layers that keep nothing for the backward but what their weights need."""

    def __init__(self, depth: int = 4, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def saved_bytes(run: Any, weights: set[int]) -> int:
    """Bytes that a forward keeps, weights apart, each storage once."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()
    assert output.requires_grad
    return sum(kept.values())


def test_only_the_columns_are_kept() -> None:
    torch.manual_seed(0)
    model, x = Stack(), torch.randn(32, 64)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    dense = saved_bytes(lambda: model(x), weights)
    assert dense == 4 * 32 * 64 * 4
    columns = {n: group_mask((64, 64), "column", [3, 9]) for n, _ in model.named_parameters()}
    with so.sparse_linear(model, columns):
        assert saved_bytes(lambda: model(x), weights) == 4 * 32 * 2 * 4
    rows = {n: group_mask((64, 64), "row", [3, 9]) for n, _ in model.named_parameters()}
    with so.sparse_linear(model, rows):
        assert saved_bytes(lambda: model(x), weights) == dense + 4 * 2 * 8  # and the indices


@pytest.mark.parametrize("grain", ["row", "column"])
def test_only_what_trains_is_computed(grain: str) -> None:
    torch.manual_seed(0)
    model, x = Stack(), torch.randn(32, 64)

    def flops() -> int:
        loss = model(x).sum()
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        return counter.get_total_flops()

    one = 2 * 32 * 64 * 64  # of one product
    assert flops() == 7 * one, "four dW, and dX of all layers but the lowest"
    masks = {n: group_mask((64, 64), grain, [3, 9]) for n, _ in model.named_parameters()}
    with so.sparse_linear(model, masks):
        assert flops() == 3 * one + 4 * one * 2 // 64
    masks["layers.0.weight"] = masks["layers.1.weight"] = torch.zeros(64, 64, dtype=torch.bool)
    with so.sparse_linear(model, masks):
        assert flops() == one + 2 * one * 2 // 64, "below the lowest layer that trains the backward has ended"


def test_gradients_are_never_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor that a backward makes in a structured layer is the gradient of its input."""
    model, x = Stack(), torch.randn(4, 64)
    masks = {n: group_mask((64, 64), "column", [3, 9]) for n, _ in model.named_parameters()}
    opt = so.SparseAdamW(model.named_parameters(), masks=masks, capture_gradients=True)
    sizes: list[int] = []
    take = structured._Deliver.__call__

    def seen(self: Any, leaf: Tensor) -> None:
        assert leaf.grad is not None
        sizes.append(leaf.grad.untyped_storage().nbytes())
        take(self, leaf)

    monkeypatch.setattr(structured._Deliver, "__call__", seen)
    with so.sparse_linear(model, masks):
        assert all(structured.use_of(p).leaf.untyped_storage().nbytes() == 4 for p in model.parameters())
        model(x).sum().backward()
    assert sizes == [64 * 2 * 4] * 4
    assert all(p.grad is None for p in model.parameters())
    opt.step()


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    before = {type(module) for module in model.modules()}
    monkeypatch.setattr("sparseopt.optim.distributed.several_processes", lambda optimizer=None: True)
    with pytest.raises(ValueError, match="sparse_linear works in one process"):
        so.sparse_linear(model, so.MaskSet.full_like(model))
    assert {type(module) for module in model.modules()} == before
