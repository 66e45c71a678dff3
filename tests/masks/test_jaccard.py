"""The Jaccard report: numbers against sets of indices, names taken apart, and a picture that is one."""

import json

import pytest
import torch

import sparseopt as so
from sparseopt.masks import jaccard

SHAPES = {
    "model.embed_tokens.weight": (20, 8),
    **{
        f"model.layers.{i}.{kind}.weight": (16, 8)
        for i in range(3)
        for kind in ("self_attn.q_proj", "mlp.up_proj", "input_layernorm")
    },
    "model.norm.weight": (8,),
}


def masks(seed, density=0.2, without=()):
    generator = torch.Generator().manual_seed(seed)
    found = {name: torch.rand(shape, generator=generator) < density for name, shape in SHAPES.items()}
    for name in without:
        found[name][:] = False
    return so.MaskSet.from_bool(found, {"zero_score_share": 0.25})


def index(a, b):
    """The Jaccard index of two MaskSets, from Python sets."""
    left = {(name, i) for name in a for i in a.indices(name).tolist()}
    right = {(name, i) for name in b for i in b.indices(name).tolist()}
    return len(left & right) / len(left | right)


def test_against_the_ground_truth():
    empty = "model.layers.1.mlp.up_proj.weight"
    a, b = masks(1, without=[empty]), masks(2, without=[empty])
    report = jaccard.against(a, b)
    assert report["jaccard"] == pytest.approx(index(a, b))
    each = {name: index(a.select([name]), b.select([name])) for name in SHAPES if name != empty}
    assert {name: values["jaccard"] for name, values in report["per_layer"].items()} == pytest.approx(each)
    assert report["mean"] == pytest.approx(sum(each.values()) / len(each))
    assert (report["min"], report["max"]) == pytest.approx((min(each.values()), max(each.values())))
    assert report["chance_jaccard"] == so.compare(a, b)["chance_jaccard"]
    assert jaccard.against(a, a)["min"] == 1


def test_one_side_empty_counts_as_zero():
    name = "model.norm.weight"
    report = jaccard.against(masks(1, without=[name]), masks(1, density=0.9))
    assert report["per_layer"][name]["jaccard"] == report["min"] == 0


def test_across_steps(tmp_path):
    made = {10: masks(1), 20: masks(2), 40: masks(3)}

    def make(step):
        if step == 30:
            raise ValueError("nothing at step 30.")
        return made[step]

    truth = masks(4)
    report = jaccard.across_steps(make, [10, 20, 30, 40], truth, tmp_path)
    assert report["steps"] == [10, 20, 40]
    assert report["left_out"] == {"30": "nothing at step 30."}
    for row, a in enumerate(made.values()):
        assert report["ground_truth"][row] == pytest.approx(index(a, truth))
        assert report["ground_truth_chance"][row] == so.compare(a, truth)["chance_jaccard"]
        for column, b in enumerate(made.values()):
            assert report["jaccard"][row][column] == pytest.approx(index(a, b))
            assert report["chance_jaccard"][row][column] == pytest.approx(so.compare(a, b)["chance_jaccard"])
    pairs = [index(made[10], made[20]), index(made[10], made[40]), index(made[20], made[40])]
    assert report["mean"] == pytest.approx(sum(pairs) / 3)
    assert (report["min"], report["max"]) == pytest.approx((min(pairs), max(pairs)))
    assert report["zero_score_share"] == [0.25] * 3
    json.dumps(report, allow_nan=False)


def test_a_single_step_has_no_pairs(tmp_path):
    report = jaccard.across_steps(lambda step: masks(1), [5], masks(2), tmp_path)
    assert (report["jaccard"], report["mean"], report["min"]) == ([[1.0]], None, None)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.3.mlp.up_proj.weight", (3, "up_proj")),
        ("model.layers.12.self_attn.q_proj.bias", (12, "q_proj.bias")),
        ("transformer.h.0.attn.c_attn.weight", (0, "c_attn")),
        ("model.embed_tokens.weight", (None, "embed_tokens")),
        ("0.weight", (0, "weight")),
        ("model.layers.1.block_sparse_moe.experts.7.w1.weight", (1, "w1")),
        ("scale", (None, "scale")),
    ],
)
def test_place(name, expected):
    assert jaccard.place(name) == expected


@pytest.mark.parametrize("with_steps", [True, False])
@pytest.mark.parametrize("many", [True, False])
def test_plot(tmp_path, with_steps, many):
    import matplotlib.image

    steps = range(1, 13) if many else [1]
    across = jaccard.across_steps(masks, steps, masks(99), tmp_path) if with_steps else None
    report = {"ground_truth": jaccard.against(masks(1), masks(2)), "steps": across}
    jaccard.plot(report, tmp_path / "picture.png", "a title")
    pixels = matplotlib.image.imread(tmp_path / "picture.png")
    assert pixels.shape[0] > 300
    assert pixels.shape[1] > (1000 if with_steps else 500)
    assert pixels.std() > 0.1
    assert not list(tmp_path.glob(".*"))
