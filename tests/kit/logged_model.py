"""A small model of every kind of tensor, a way to train it, and what its delta log says it was."""

import pytest
import torch
from torch import nn

import sparseopt as so
from sparseopt.deltas.base import open_base
from sparseopt.deltas.delta import model_fingerprint


class Model(nn.Module):
    def __init__(self, dtype=torch.bfloat16, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(13, 8)
        self.attn = nn.Linear(8, 8)
        self.mlp = nn.Linear(8, 24)
        self.norm = nn.BatchNorm1d(8)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.turned = nn.Parameter(torch.randn(4, 6).t())
        self.head = nn.Linear(8, 13, bias=False)
        self.to(dtype)
        self.head.weight = self.embed.weight


def masks(model, density=0.2, seed=0):
    return so.MaskSet.random(model, density, seed=seed)


def train(model, opt=None, seed=0):
    """A step: of the optimizer, or a change of some entries of every tensor."""
    generator = torch.Generator().manual_seed(seed)
    if opt is not None:
        for param in model.parameters():
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        opt.step()
        return
    with torch.no_grad():
        for tensor in model.state_dict(keep_vars=True).values():
            moved = torch.rand(tensor.shape, generator=generator) < 0.3
            tensor.copy_(torch.where(moved, (tensor + 1).to(tensor.dtype), tensor))


def copied(model):
    """The state dict in memory of its own; tied tensors stay tied."""
    again = Model(model.attn.weight.dtype)
    again.load_state_dict(model.state_dict())
    return again


def same(one, other):
    return model_fingerprint(one) == model_fingerprint(other)  # by bits


def replay(path, step=None):
    """base + chain, applied delta by delta."""
    log, base = so.DeltaLog(path), open_base(path)
    model = Model(base.dtypes["attn.weight"])
    model.load_state_dict({name: base.tensor(name) for name in [*base.names, *base.tied]})
    for number in log.chain(step):
        log.load(number).apply_(model)
    return model


def check_stats(log, step, base, model):
    stats, before, after = log.stats(step), base.state_dict(), model.state_dict()
    norms = {}
    for name, _ in model.named_parameters():
        difference = after[name].double() - before[name].double()
        norms[name] = float(difference.norm())
        assert stats["parameters"][name]["l2_from_init"] == pytest.approx(norms[name], rel=1e-12)
        big = float((difference.abs() > stats["threshold"]).double().mean())
        assert stats["parameters"][name]["frac_big_from_init"] == pytest.approx(big, rel=1e-12)
    assert stats["parameters"].keys() == norms.keys()
    assert stats["mean_l2_from_init"] == pytest.approx(sum(norms.values()) / len(norms), rel=1e-12)
    for key in ("attn", "mlp"):
        chosen = [norm for name, norm in norms.items() if name.startswith(key)]
        assert stats[f"{key}_mean_l2"] == pytest.approx(sum(chosen) / len(chosen), rel=1e-12)
    fractions = [entry["frac_big_from_init"] for entry in stats["parameters"].values()]
    assert stats["mean_frac_big_from_init"] == pytest.approx(sum(fractions) / len(fractions), rel=1e-12)
    assert stats["mean_frac_big_from_init"] > 0


def write(path, model, opt=None, steps=(1, 2, 3, 4)):
    states = {}
    with so.DeltaLog(path) as log:
        log.start(model, name="org/model")
        for step in steps:
            train(model, opt, seed=step)
            log.record(step, opt or model)
            states[step] = copied(model)
    return states
