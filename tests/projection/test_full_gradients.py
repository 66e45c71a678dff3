"""Exact gradients of single samples: values, files, resuming, refusals."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparseopt import FormatError
from sparseopt.projection.full_gradients import FullGradients, folder_name, write_full_gradients


class Tied(nn.Module):
    """An embedding used twice, a frozen layer, a parameter that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.mlp = nn.Linear(6, 6)
        self.unused = nn.Parameter(torch.randn(3))
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mlp(self.frozen(self.embedding(ids)))))


def loss_fn(model: nn.Module, sample: Any) -> Tensor:
    ids = sample["input_ids"]
    return nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1).float(), ids[:, 1:].flatten())


def samples(count: int) -> list[dict[str, Tensor]]:
    return [{"input_ids": torch.arange(i, i + 5).remainder(11)[None]} for i in range(count)]


def test_values_and_files(tmp_path: Path) -> None:
    model = Tied()
    model.mlp.weight.grad = torch.full((6, 6), 7.0)
    folder = tmp_path / folder_name(42, "GPT2-Small", "bfloat16")
    assert folder.name == "fullgrads_seed_42_arch_GPT2-Small_dtype_bfloat16"
    assert write_full_gradients(model, samples(3), folder, ids=range(3), loss_fn=loss_fn, metadata={"seed": 42}) == 3
    assert model.mlp.weight.grad.eq(7).all()
    assert model.embedding.weight.grad is None
    assert sorted(path.name for path in folder.iterdir()) == [
        "fullgrad_iter_000001.pt", "fullgrad_iter_000002.pt", "fullgrad_iter_000003.pt", "fullgrad_meta.json"]  # fmt: skip
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    meta = json.loads((folder / "fullgrad_meta.json").read_text())
    assert list(meta["param_slices"]) == names == ["unused", "embedding.weight", "mlp.weight", "mlp.bias"]
    assert (meta["total_param_dim"], meta["seed"]) == (3 + 66 + 36 + 6, 42)
    for i, sample in enumerate(samples(3)):
        contents = torch.load(folder / f"fullgrad_iter_{i + 1:06d}.pt")
        assert {key: contents[key] for key in ("iter", "batch_size")} == {"iter": i + 1, "batch_size": 1}
        assert (contents["grad"].dtype, contents["grad"].shape) == (torch.float32, (111,))
        parameters = dict(model.named_parameters())

        def functional(values: dict[str, Tensor], sample: Any = sample) -> Tensor:
            tied = {**values, "head.weight": values["embedding.weight"]}
            logits = torch.func.functional_call(model, tied, (sample["input_ids"][:, :-1],))
            return nn.functional.cross_entropy(logits.flatten(0, 1), sample["input_ids"][:, 1:].flatten())

        exact = torch.func.grad(functional)({name: p.detach() for name, p in parameters.items()})
        for name, part in meta["param_slices"].items():
            found = contents["grad"][part["start"] : part["end"]].view(part["shape"])
            torch.testing.assert_close(found, exact[name], rtol=1e-5, atol=1e-7)
    opened = FullGradients(folder)
    assert opened.ids == [0, 1, 2]
    assert opened.grad(2).equal(torch.load(folder / "fullgrad_iter_000003.pt")["grad"])
    with pytest.raises(ValueError, match="no gradient of sample 3"):
        opened.grad(3)


def test_low_precision_models_give_fp32(tmp_path: Path) -> None:
    model = Tied().to(torch.bfloat16)
    write_full_gradients(model, samples(1), tmp_path, ids=[0], loss_fn=loss_fn)
    grad = FullGradients(tmp_path).grad(0)
    assert grad.dtype == torch.float32
    assert grad.equal(grad.bfloat16().float())
    assert grad.abs().max() > 0


def test_resume_computes_only_what_is_missing(tmp_path: Path) -> None:
    model, calls = Tied(), []

    def stops(model: nn.Module, sample: Any) -> Tensor:
        calls.append(int(sample["input_ids"][0, 0]))
        if calls[-1] == 3:
            raise KeyboardInterrupt
        return loss_fn(model, sample)

    with pytest.raises(KeyboardInterrupt):
        write_full_gradients(model, samples(6), tmp_path / "a", ids=range(6), loss_fn=stops)
    assert calls == [0, 1, 2, 3]
    assert FullGradients(tmp_path / "a").ids == [0, 1, 2]
    (tmp_path / "a/fullgrad_iter_000002.pt").unlink()
    calls.clear()

    def counts(model: nn.Module, sample: Any) -> Tensor:
        calls.append(int(sample["input_ids"][0, 0]))
        return loss_fn(model, sample)

    assert write_full_gradients(model, samples(6), tmp_path / "a", ids=range(6), loss_fn=counts) == 4
    assert calls == [1, 3, 4, 5]
    assert write_full_gradients(model, samples(6), tmp_path / "b", ids=range(6), loss_fn=loss_fn) == 6
    # Going on with more samples is no other run.
    for most in (1, 2):
        about = {"data": {"seed": 1, "max_samples": most}}
        write_full_gradients(model, samples(most), tmp_path / "c", ids=range(most), loss_fn=loss_fn, metadata=about)
    assert FullGradients(tmp_path / "c").ids == [0, 1]
    for path in (tmp_path / "b").iterdir():
        assert path.read_bytes() == (tmp_path / "a" / path.name).read_bytes()


def test_no_space_is_told_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1, 1, 65 << 20))

    def never(model: nn.Module, sample: Any) -> Tensor:
        raise AssertionError

    with pytest.raises(OSError, match=r"gradients of 1000 samples take .* GiB free"):
        write_full_gradients(Tied(), samples(1000), tmp_path / "deep/er", ids=range(1000), loss_fn=never)
    assert not (tmp_path / "deep").exists()
    assert write_full_gradients(Tied(), samples(2), tmp_path / "deep/er", ids=range(2), loss_fn=loss_fn) == 2


def test_refusals(tmp_path: Path) -> None:
    model = Tied()

    def call(data: Any = None, ids: Any = (0,), loss: Any = loss_fn, model: nn.Module = model, **more: Any) -> int:
        return write_full_gradients(
            model, samples(1) if data is None else data, tmp_path / "f", ids=ids, loss_fn=loss, **more
        )

    with pytest.raises(ValueError, match=r"batches of 1: 'input_ids' of sample 0 is \[2, 5\]"):
        call([{"input_ids": torch.zeros(2, 5, dtype=torch.int64)}])
    with pytest.raises(ValueError, match=r"must be one number, got the shape \[2\]"):
        call(loss=lambda model, sample: torch.zeros(2))
    with pytest.raises(ValueError, match="loss of sample 0 is nan"):
        call(loss=lambda model, sample: loss_fn(model, sample) * float("nan"))
    with pytest.raises(ValueError, match="no sample for id 1"):
        call(ids=[0, 1])
    with pytest.raises(ValueError, match="more samples than the 1 ids"):
        call(samples(2))
    with pytest.raises(ValueError, match="sample 4 is listed twice"):
        call(ids=[4, 4])
    with pytest.raises(ValueError, match="no trainable parameter"):
        call(model=Tied().requires_grad_(False))
    with pytest.raises(ValueError, match="seed is missing there"):
        call(metadata={"seed": 1})
    model.frozen.requires_grad_(True)
    with pytest.raises(ValueError, match=r"total_param_dim is 111 there and 153 here"):
        call()


def test_damaged_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        FullGradients(tmp_path / "none")
    with pytest.raises(FormatError, match="holds no exact gradients"):
        FullGradients(tmp_path)
    write_full_gradients(Tied(), samples(1), tmp_path, ids=[0], loss_fn=loss_fn)
    path, meta = tmp_path / "fullgrad_iter_000001.pt", tmp_path / "fullgrad_meta.json"
    whole = path.read_bytes()
    for contents in (b"", whole[:100], whole[: len(whole) // 2]):
        path.write_bytes(contents)
        with pytest.raises(FormatError, match=r"fullgrad_iter_000001\.pt"):
            FullGradients(tmp_path).grad(0)
    torch.save({"grad": torch.zeros(5)}, path)
    with pytest.raises(FormatError, match="expected 'grad', 111 fp32 numbers"):
        FullGradients(tmp_path).grad(0)
    for text in ("", "[]", "{}", '{"total_param_dim": 3, "param_slices": {"a": {"start": 0, "end": 4}}}'):
        meta.write_text(text)
        with pytest.raises(FormatError, match="damaged"):
            FullGradients(tmp_path)
    meta.unlink()
    with pytest.raises(FormatError, match="it has gradients, but no"):
        write_full_gradients(Tied(), samples(1), tmp_path, ids=[0], loss_fn=loss_fn)
