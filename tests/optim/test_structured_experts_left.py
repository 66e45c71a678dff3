"""Experts in 3-D weights under masks of rows or columns: what stays as it was, what is left whole, and that it is said."""

from __future__ import annotations

import copy
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import tiny_experts as kit
import torch
from torch import Tensor, nn
from transformers.integrations import moe

import sparseopt as so

nothing_is_left = pytest.fixture(autouse=True)(kit.grouped_mm_stays)


def test_the_model_is_the_same_before_during_and_after(tmp_path: Path) -> None:
    model = kit.make_moe("gpt_oss", "grouped_mm")
    masks = kit.expert_masks(model, "row")
    names = [(n, p.data_ptr(), p.requires_grad) for n, p in model.named_parameters()]
    classes = [type(m) for m in model.modules()]
    attributes = [set(vars(m)) for m in model.modules()]
    expected = kit.loss_of(model, 0)
    original = moe._grouped_mm
    with so.sparse_linear(model, masks) as found:
        assert found.layers == dict.fromkeys(kit.experts_of(model), "row")
        assert moe._grouped_mm is not original
        experts = model.model.layers[0].mlp.experts
        assert type(experts).__name__ == "GptOssExperts"
        assert isinstance(experts.gate_up_proj, nn.Parameter), "only its own forward sees something else"
        assert list(model.state_dict()) == list(kit.make_moe("gpt_oss", "eager").state_dict())
        with torch.no_grad():
            assert torch.equal(kit.loss_of(model, 0), expected)
            assert model.generate(torch.tensor([[1, 2]]), max_new_tokens=2, do_sample=False).shape == (1, 4)
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        model.save_pretrained(tmp_path / "saved")
        with so.sparse_linear(model, masks) as again:
            assert {again.left[name] for name in kit.experts_of(model)} == {
                f"model.layers.{i}.mlp.experts is structured already" for i in (0, 1)
            }
    copies.append(type(model).from_pretrained(tmp_path / "saved", experts_implementation="grouped_mm"))
    assert moe._grouped_mm is original
    for copied in (*copies[:2], model):
        assert [type(m) for m in copied.modules()] == classes
        assert [set(vars(m)) for m in copied.modules()] == attributes
    for copied in (*copies, model):
        assert torch.equal(kit.loss_of(copied, 0), expected)
        copied.zero_grad()
        kit.loss_of(copied, 0).backward()
        assert all((p.grad[~masks[n]] != 0).any() for n, p in kit.experts_of(copied).items()), (
            "afterwards all is computed"
        )
    assert [(n, p.data_ptr(), p.requires_grad) for n, p in model.named_parameters()] == names


def test_other_modules_of_experts() -> None:
    """Products of all experts at once, and lists of them."""
    from transformers.models.jetmoe.modeling_jetmoe import JetMoeParallelExperts
    from transformers.models.llama4.configuration_llama4 import Llama4TextConfig
    from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

    torch.manual_seed(0)
    config = Llama4TextConfig(hidden_size=16, intermediate_size=24, num_local_experts=kit.EXPERTS)
    cases: list[tuple[nn.Module, tuple[Any, ...]]] = [
        (Llama4TextExperts(config), (torch.randn(kit.EXPERTS * 5, 16, requires_grad=True),)),
        (
            JetMoeParallelExperts(kit.EXPERTS, 16, 24),
            (torch.randn(9, 16, requires_grad=True), [2, 0, 3, 4]),
        ),
    ]
    for module, inputs in cases:
        for param in module.parameters():
            nn.init.normal_(param)
        dense = copy.deepcopy(module)
        for grain in ("row", "column"):
            masks = kit.expert_masks(module, grain)
            opt = kit.optimizer_for(module, masks)
            with so.sparse_linear(module, masks) as found:
                assert set(found.layers.values()) == {grain}
                module(*inputs).square().sum().backward()
            assert all(param.grad is None for param in module.parameters())
            given, inputs[0].grad = inputs[0].grad, None
            dense.zero_grad()
            dense(*inputs).square().sum().backward()
            torch.testing.assert_close(given, inputs[0].grad, rtol=1e-5, atol=1e-5)
            inputs[0].grad = None
            kit.compare(kit.captured(opt), dense, masks, 1e-6)
            opt._capture.disarm()


def test_what_is_left_is_said() -> None:
    model = kit.make_moe("mixtral", "eager")
    (gate, gate_param), (down, down_param), *_ = kit.experts_of(model).items()
    generator = torch.Generator().manual_seed(0)
    rows = kit.expert_mask(tuple(gate_param.shape), "row", [1, 1, 0, 0], generator)
    columns = kit.expert_mask(tuple(gate_param.shape), "column", [0, 0, 1, 1], generator)
    masks = {gate: rows | columns, down: kit.expert_mask(tuple(down_param.shape), "row", [1, 2, 3, 4], generator)}
    with so.sparse_linear(model, masks) as found:
        assert found.left == {gate: "its active entries are not whole rows or columns"}
        assert found.layers == {down: "row"}
    model.config._experts_implementation = "sonicmoe"
    with so.sparse_linear(model, masks) as found:
        assert found.left[down] == (
            "model.layers.0.mlp.experts runs its experts as 'sonicmoe', not as one of eager, batched_mm, grouped_mm"
        )
    model.config._experts_implementation = "eager"

    class Inherited(type(model.model.layers[0].mlp.experts)):  # type: ignore[misc]
        def forward(self, *args: Any) -> Any:
            return super().forward(*args)

    model.model.layers[0].mlp.experts.__class__ = Inherited
    with so.sparse_linear(model, masks) as found:
        assert found.left[down] == "the forward of model.layers.0.mlp.experts calls super()"


def test_another_use_of_a_weight_is_whole_and_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A forward that penalises its weights beside multiplying with them."""
    model, dense = kit.make_moe("mixtral", "grouped_mm"), kit.make_moe("mixtral", "grouped_mm")
    kind = type(model.model.layers[0].mlp.experts)
    own = kind.forward

    def forward(self: Any, *args: Any) -> Tensor:
        weight = self.gate_up_proj
        penalty = (
            torch.einsum("eab,eab->", weight, weight) + (1 * weight[:, 1]).sum() + weight.mul(2).sum() + weight[1].sum()
        )
        return own(self, *args) + 1e-2 * penalty

    monkeypatch.setattr(kind, "forward", forward)
    masks = kit.expert_masks(model, "column")
    opt = kit.optimizer_for(model, masks)
    with so.sparse_linear(model, masks), caplog.at_level(logging.INFO):
        for m in (model, dense):
            kit.loss_of(m, 0).backward()
    kit.compare(kit.captured(opt), dense, masks, 1e-5)
    said = [record.getMessage() for record in caplog.records if "gate_up_proj is used otherwise" in record.getMessage()]
    assert len(said) == 2, "once for each layer"


def test_found_masks_are_structured() -> None:
    model = kit.make_moe("qwen3_moe", "batched_mm")
    kit.loss_of(model, 0).backward()
    scores = {name: param.grad.abs() for name, param in kit.experts_of(model).items()}
    for grain in ("row", "column"):
        masks = so.find_masks(scores, 0.9, granularity=grain)
        with so.sparse_linear(model, masks) as found:
            assert set(found.layers.values()) == {grain}
            assert not found.left
