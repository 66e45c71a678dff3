"""GradientEMA against the formula; capture, accumulation, loss scaling, frozen and tied parameters; files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparseopt as so
from sparseopt.masks.gradient_stats import GradientScores
from sparseopt.masks.maskset import MaskSet


class Model(nn.Module):
    """Tied, frozen and unused parameters beside ordinary ones."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 6)
        self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.unused = nn.Parameter(torch.ones(3))
        self.frozen = nn.Linear(6, 6)
        self.frozen.requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        return self.head(x + self.frozen(self.down(torch.tanh(self.up(x)))))


TRAINED = ["embedding.weight", "unused", "up.weight", "up.bias", "down.weight", "down.bias"]


def backward(model: nn.Module, seed: int) -> None:
    tokens = torch.randint(11, (4, 7), generator=torch.Generator().manual_seed(seed))
    loss: Tensor = model(tokens).float().log_softmax(-1)[..., 3].mean()
    loss.backward()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: torch.zeros_like(p, dtype=torch.float32) if p.grad is None else p.grad.float().clone()
            for name, p in model.named_parameters()}  # fmt: skip


def same(left: so.GradientEMA, right: so.GradientEMA) -> bool:
    return left.names == right.names and all(torch.equal(left[name], right[name]) for name in left.names)


# ---- the formula -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("beta", [0.0, 0.3, 0.9, 0.99])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offload", [False, True])
def test_formula(beta: float, dtype: torch.dtype, offload: bool) -> None:
    """60 steps: beta=0.3 multiplies the scale in many times."""
    model = Model().to(dtype)
    ema = so.GradientEMA(model, beta, 1e-6, offload=offload)
    assert sorted(ema.names) == sorted(TRAINED)
    assert sorted(ema.frozen) == ["frozen.bias", "frozen.weight"]
    naive = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in model.named_parameters()}
    for step in range(60):
        model.zero_grad()
        backward(model, step)
        before = gradients(model)
        ema.update()
        for name, gradient in gradients(model).items():
            assert torch.equal(gradient, before[name])  # only read
            naive[name] = beta * naive[name] + (1 - beta) * gradient.double() ** 2
        if step in (0, 31):
            ema.rms_mean()  # looking at it changes nothing
    for name in ema.names:
        torch.testing.assert_close(ema[name].double(), naive[name], rtol=2e-5, atol=0)
    rms = torch.stack([(naive[name].mean() + 1e-6).sqrt() for name in ema.names]).mean()
    assert math.isclose(ema.rms_mean(), float(rms), rel_tol=1e-5)
    limit = float(naive["up.weight"].median())
    masks = ema.masks(limit)
    assert masks.names == [name for name, _ in model.named_parameters()]
    for name in ema.names:
        assert torch.equal(masks[name], ema[name].cpu() > limit)
    assert 0 < masks.count("up.weight") < masks.total_parameters
    assert masks.count("frozen.weight") == masks.count("unused") == 0
    assert masks.metadata["tolerance"] == limit
    assert masks.metadata["frozen_parameters"] == 2


def test_tolerance_is_of_the_squared_gradient_and_may_be_several() -> None:
    param = nn.Parameter(torch.zeros(3))
    model = nn.ParameterDict({"w": param})
    ema = so.GradientEMA(model, beta=0.0)
    param.grad = torch.tensor([0.1, 0.01, 0.001])
    ema.update()
    found = ema.masks([1e-3, 1e-5, 0])
    assert [m["w"].tolist() for m in found] == [[True, False, False], [True, True, False], [True, True, True]]
    assert ema.masks(1e-3) == found[0]
    for bad in (-1.0, math.nan, math.inf, True, "1e-5", [], [1e-3, 1e-3]):
        with pytest.raises(ValueError, match="tolerance"):
            ema.masks(bad)  # type: ignore[call-overload]


def test_bias_correction() -> None:
    param = nn.Parameter(torch.zeros(2))
    model = nn.ParameterDict({"w": param})
    plain, corrected = so.GradientEMA(model, 0.9, 0.0), so.GradientEMA(model, 0.9, 0.0, bias_correction=True)
    for _ in range(3):  # a constant gradient: its square is the corrected average from the first step on
        param.grad = torch.tensor([2.0, 1.0])
        plain.update()
        corrected.update()
        assert math.isclose(corrected.rms_mean(), math.sqrt(2.5), rel_tol=1e-6)
        assert corrected.masks(3.9)["w"].tolist() == [True, False]
    assert math.isclose(plain.rms_mean(), math.sqrt(2.5 * (1 - 0.9**3)), rel_tol=1e-6)
    assert plain.masks(3.9).active_parameters == 0


def test_a_parameter_without_a_gradient_decays() -> None:
    a, b = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    ema = so.GradientEMA(nn.ParameterDict({"a": a, "b": b}), beta=0.5)
    a.grad = b.grad = torch.ones(1)
    ema.update()
    b.grad = None
    ema.update()
    assert (float(ema["a"]), float(ema["b"])) == (0.75, 0.25)


# ---- where gradients come from -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_capture_gives_the_same_as_dense_gradients(micro_batches: int, dtype: torch.dtype) -> None:
    """The whole step's gradient is squared, not each micro-batch's; entries outside the mask count too."""
    collected = []
    for capture in (False, True):
        model = Model().to(dtype)
        trained = {name: p for name, p in model.named_parameters() if name in TRAINED and name != "unused"}
        masks = so.MaskSet.random(trained, 0.2, seed=1)
        # lr=0: captured micro-batches are added up in fp32, dense bf16 ones in bf16, and the weights would differ.
        optimizer = so.SparseAdamW(
            list(trained.items()), lr=0.0, weight_decay=0.0, masks=masks, max_grad_norm=1e-3, capture_gradients=capture
        )
        ema = so.GradientEMA(model, 0.9)
        optimizer.observe_gradients(ema.take)
        for step in range(4):
            for micro in range(micro_batches):
                backward(model, 10 * step + micro)
            assert (model.up.weight.grad is None) == capture
            ema.update()
            optimizer.step()
            model.zero_grad()
        collected.append(ema)
    assert same(*collected)
    assert collected[0].masks(1e-9) == collected[1].masks(1e-9)
    assert all(float(collected[1][name].max()) > 0 for name in TRAINED if name != "unused")


def test_discard_and_an_end_of_observation() -> None:
    model = Model()
    trained = {name: p for name, p in model.named_parameters() if name in TRAINED}
    optimizer = so.SparseAdamW(list(trained.items()), capture_gradients=True)
    ema = so.GradientEMA(model)
    optimizer.observe_gradients(ema.take)
    backward(model, 0)
    ema.discard()
    with pytest.raises(RuntimeError, match="found no gradient"):
        ema.update()
    backward(model, 1)
    ema.update()
    optimizer.observe_gradients(None)
    backward(model, 2)
    with pytest.raises(RuntimeError, match="found no gradient"):
        ema.update()
    assert ema.updates == 1


def test_loss_scale_is_divided_out_and_overflows_change_nothing() -> None:
    scaled_model, model = Model(), Model()
    scaled, plain = so.GradientEMA(scaled_model, 0.9, bias_correction=True), so.GradientEMA(model, 0.9)
    scale = torch.tensor(1024.0)
    for step in range(6):
        for one in (scaled_model, model):
            one.zero_grad()
            backward(one, step)
        for p in scaled_model.parameters():
            if p.grad is not None:
                p.grad *= scale
        if step in (0, 3):  # a power of two overflows
            assert scaled_model.up.weight.grad is not None
            scaled_model.up.weight.grad[2, 1] = math.inf if step else math.nan
        else:
            plain.update()
        scaled.update(scale)
    assert (scaled.updates, scaled.count, plain.count) == (6, 4, 4)
    for name in plain.names:
        torch.testing.assert_close(scaled[name], plain[name], rtol=1e-5, atol=0)
    plain.bias_correction = True
    assert math.isclose(scaled.rms_mean(), plain.rms_mean(), rel_tol=1e-5)


def test_a_grad_scaler_of_torch() -> None:
    model, reference = Model(), Model()
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    ema, expected = so.GradientEMA(model), so.GradientEMA(reference)
    tokens = torch.arange(8).view(2, 4)
    scaler.scale(model(tokens).square().mean()).backward()
    ema.update(scaler._scale)
    reference(tokens).square().mean().backward()
    expected.update()
    for name in ema.names:
        torch.testing.assert_close(ema[name], expected[name])


def test_wrapped_and_unusual_models() -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = Model()

    assert sorted(so.GradientEMA(Wrapper()).names) == sorted(TRAINED)
    sparse = nn.Embedding(5, 2, sparse=True)
    ema = so.GradientEMA(sparse)
    sparse(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse gradients"):
        ema.update()
    with pytest.raises(TypeError, match="complex"):
        so.GradientEMA(nn.ParameterDict({"w": nn.Parameter(torch.zeros(2, dtype=torch.complex64))}))
    with pytest.raises(ValueError, match="no parameter that trains"):
        so.GradientEMA(nn.Linear(2, 2).requires_grad_(False))
    for beta in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match="beta"):
            so.GradientEMA(nn.Linear(2, 2), beta)
    for epsilon in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="epsilon"):
            so.GradientEMA(nn.Linear(2, 2), epsilon=epsilon)


# ---- files -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("offload", [False, True])
def test_a_loaded_accumulation_continues_bit_by_bit(tmp_path: Path, offload: bool) -> None:
    model, path = Model(), tmp_path / "grad_acc" / "grad_ema_step_3.safetensors"
    whole, again = so.GradientEMA(model, 0.9), so.GradientEMA(model, 0.9, offload=offload)
    with pytest.raises(ValueError, match="nothing to save"):
        whole.save(path)
    for step in range(7):
        model.zero_grad()
        backward(model, step)
        whole.update()
        if step == 2:
            whole.save(path, step="3")
            again.load(path)
        elif step > 2:
            again.update()
    assert same(whole, again)
    assert whole.count == again.count == 7
    assert whole.rms_mean() == again.rms_mean()


def test_mask_finding_reads_the_file(tmp_path: Path) -> None:
    model, path = Model(), tmp_path / "grad_ema_step_1.safetensors"
    ema = so.GradientEMA(model)
    backward(model, 0)
    ema.update()
    ema.save(path, step="1")
    scores = GradientScores(path)
    assert (scores.kind, scores.provenance["gradient_count"]) == ("batch", "1")
    masks = so.find_masks({name: ema[name] for name in ema.names if name != "unused"}, 0.5)
    out = tmp_path / "found"
    run_cli(["find", "--method", "gradient", "--gradient_stats", str(path), "--sparsity_percent", "50",
             "--exclude", "unused", "--output_dir", str(out)])  # fmt: skip
    found = MaskSet.load(next(out.glob("*.safetensors")))
    for name in masks.names:
        difference = int((masks[name] ^ found[name]).sum())
        assert difference <= 3, name  # the excluded parameter's 3 entries are part of the budget there
    assert found.metadata["formula"].startswith("mean squared gradient of batches")


def run_cli(arguments: list[str]) -> None:
    from typer.testing import CliRunner

    from sparseopt.cli.masks import app

    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    model, path = Model(), tmp_path / "ema.safetensors"
    ema = so.GradientEMA(model)
    backward(model, 0)
    ema.update()
    ema.save(path)
    before: dict[str, Any] = {name: ema[name] for name in ema.names}
    with pytest.raises(ValueError, match=r"beta=0\.99, not 0\.5"):
        so.GradientEMA(model, 0.5).load(path)
    with pytest.raises(ValueError, match="does not fit the model"):
        so.GradientEMA(nn.Linear(2, 2)).load(path)
    model.unused.requires_grad_(False)
    with pytest.raises(ValueError, match="'unused' does not train here"):
        so.GradientEMA(model).load(path)
    with pytest.raises(FileNotFoundError):
        ema.load(tmp_path / "none.safetensors")
    so.MaskSet.full_like(model).save(tmp_path / "mask.safetensors")
    with pytest.raises(so.FormatError, match="no accumulation"):
        ema.load(tmp_path / "mask.safetensors")
    data = path.read_bytes()
    for cut in (0, 7, 100, len(data) - 4):
        path.write_bytes(data[:cut])
        with pytest.raises(so.FormatError):
            ema.load(path)
    path.write_bytes(data.replace(b'"beta":"0.99"', b'"beta":"0,99"'))
    with pytest.raises(so.FormatError, match="damaged"):
        ema.load(path)
    assert all(torch.equal(ema[name], value) for name, value in before.items())
