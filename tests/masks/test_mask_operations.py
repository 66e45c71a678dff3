"""merge and compare."""

import json
import math

import pytest
import torch

import sparseopt as so
from sparseopt.masks import _bits, operations
from sparseopt.masks.kinds import kind_of


def sets(count, seed=0, density=0.4):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (13, 7), "b": (5,), "empty": (0,)}
    return [
        {name: torch.rand(shape, generator=generator) < density for name, shape in shapes.items()} for _ in range(count)
    ]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_merge(count, monkeypatch):
    monkeypatch.setattr(operations, "VOTE_BYTES", 4)
    bools = sets(count)
    masks = [so.MaskSet.from_bool(b) for b in bools]
    votes = {name: sum(b[name].int() for b in bools) for name in bools[0]}
    for how, needed in (("union", 1), ("intersection", count), ("majority", count // 2 + 1)):
        merged = so.merge(masks, how=how)
        assert merged == so.MaskSet.from_bool({name: v >= needed for name, v in votes.items()})
        assert merged.metadata["how"] == how
    assert [m == so.MaskSet.from_bool(b) for m, b in zip(masks, bools, strict=True)] == [True] * count


def test_merge_errors():
    m = so.MaskSet.from_bool(sets(1)[0])
    with pytest.raises(ValueError, match="at least one"):
        so.merge([])
    with pytest.raises(ValueError, match="'xor'"):
        so.merge([m], how="xor")
    with pytest.raises(ValueError, match="'b' is only in the left"):
        so.merge([m, m.select(["a", "empty"])])


def test_compare():
    left, right = sets(2)
    result = so.compare(so.MaskSet.from_bool(left), so.MaskSet.from_bool(right))
    groups = {"per_layer", "per_kind", "per_projection", "per_block"}
    assert set(result) == {"jaccard", "chance_jaccard", "overlap", "hamming", *groups}
    flat_left = torch.cat([mask.view(-1) for mask in left.values()])
    flat_right = torch.cat([mask.view(-1) for mask in right.values()])
    for values, a, b in [(result, flat_left, flat_right), (result["per_layer"]["a"], left["a"], right["a"])]:
        both, either = (a & b).sum().item(), (a | b).sum().item()
        assert values["jaccard"] == both / either
        assert values["overlap"] == both / min(a.sum().item(), b.sum().item())
        assert values["hamming"] == (a ^ b).sum().item() / a.numel()
    assert list(result["per_layer"]) == ["a", "b", "empty"]


def test_chance_is_what_random_masks_give():
    model = {"a": torch.zeros(200, 500), "b": torch.zeros(50_000)}
    first, second = (so.MaskSet.random(model, 0.1, seed=seed) for seed in (1, 2))
    result = so.compare(first, second)
    assert result["chance_jaccard"] == pytest.approx(0.01 / 0.19)
    assert result["jaccard"] == pytest.approx(result["chance_jaccard"], rel=0.05)
    same = so.compare(first, first)
    assert (same["jaccard"], same["overlap"], same["hamming"]) == (1.0, 1.0, 0.0)


def test_compare_of_empty_sets():
    nothing = so.MaskSet.from_bool({"a": torch.zeros(9, dtype=torch.bool)})
    assert so.compare(nothing, nothing)["jaccard"] == 1.0
    assert so.compare(nothing, nothing)["overlap"] == 1.0
    result = so.compare(nothing, ~nothing)
    assert (result["jaccard"], result["overlap"], result["hamming"]) == (0.0, 0.0, 1.0)
    with pytest.raises(ValueError, match="'a' has shape"):
        so.compare(nothing, so.MaskSet.from_bool({"a": torch.zeros(3, 3, dtype=torch.bool)}))


# ---- weighted --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("weights", [[1, 2, 0.5], [0.1, 0.2, 0.3], [1e-9, 3, 1e6], [0, 0, 7], None])
@pytest.mark.parametrize("threshold", [None, 0.4, 1.0])
def test_weighted_by_threshold(weights, threshold, monkeypatch):
    monkeypatch.setattr(operations, "VOTE_BYTES", 4)
    bools = sets(3)
    numbers = weights or [1, 1, 1]
    least = math.fsum(numbers) / 2 if threshold is None else threshold * math.fsum(numbers)
    merged = so.merge(
        [so.MaskSet.from_bool(b) for b in bools], "weighted", weights=weights, threshold=threshold and least
    )
    for name in bools[0]:
        flat = zip(*(b[name].view(-1).tolist() for b in bools), strict=True)
        sums = [math.fsum(w for w, active in zip(numbers, entry, strict=True) if active) for entry in flat]
        assert merged[name].view(-1).tolist() == [value >= least - 1e-12 for value in sums]
    assert merged.metadata["weights"] == numbers
    assert merged.metadata["threshold"] == pytest.approx(least)
    assert merged.active_parameters


def test_weights_are_decimal_numbers():
    """In binary 0.1 + 0.7 is less than 0.8."""
    first, second, third = (
        so.MaskSet.from_bool({"a": torch.tensor(m)}) for m in ([1 > 0, 1 < 0], [1 > 0, 1 < 0], [1 < 0, 1 > 0])
    )
    merged = so.merge([first, second, third], "weighted", weights=[0.1, 0.7, 0.8], threshold=0.8)
    assert 0.1 + 0.7 < 0.8
    assert merged["a"].tolist() == [True, True]


@pytest.mark.parametrize("weights", [[1, 2, 0.5, 3], [1 / 3, 2 / 3, 1 / 7, 0.1], [1, 1, 1, 1]])
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.9, 1.0])
def test_weighted_by_sparsity(weights, sparsity):
    """Exactly so many, the largest (sum, then the lower name, then the lower index)."""
    bools = sets(4)
    masks = [so.MaskSet.from_bool(b) for b in bools]
    merged = so.merge(masks, "weighted", weights=weights, sparsity=sparsity)
    exact, _ = _bits.exact_weights(weights)
    entries = [
        (-sum(w for w, b in zip(exact, bools, strict=True) if b[name].view(-1)[i]), name, i)
        for name in bools[0]
        for i in range(bools[0][name].numel())
    ]
    count = round((1 - sparsity) * 96)
    chosen = {(name, i) for _, name, i in sorted(entries)[:count]}
    assert {(name, i) for name in merged for i in merged.indices(name).tolist()} == chosen
    assert merged.active_parameters == count
    assert merged.metadata["target_sparsity"] == sparsity
    assert merged == so.merge(masks, "weighted", weights=weights, sparsity=sparsity)
    assert merged == so.merge(
        [m.select(["empty", "b", "a"]) for m in masks], "weighted", weights=weights, sparsity=sparsity
    )


def test_weighted_errors():
    masks = [so.MaskSet.from_bool(b) for b in sets(2)]
    for arguments, message in (
        ({"weights": [1]}, "2 mask sets need as many weights, got 1"),
        ({"weights": [1, -1]}, "finite and not negative, got -1"),
        ({"weights": [1, math.nan]}, "finite and not negative, got nan"),
        ({"weights": [0, 0]}, "at least one weight must be above 0"),
        ({"weights": [1e-15, 1e15]}, "fewer than 18 digits"),
        ({"threshold": 0}, "threshold must lie above 0 and within the total weight 2, got 0"),
        ({"threshold": 2.1}, "threshold must lie above 0"),
        ({"sparsity": 1.5}, r"sparsity must be a number in 0..1"),
        ({"sparsity": 0.5, "threshold": 1}, "not both"),
        ({"sparsity": 0.0}, r"asks for 96 active entries, but only \d+ are active in any"),
        (
            {"sparsity": 0.5, "weights": [0, 1]},
            f"asks for 48 active entries, but only {masks[1].active_parameters} are active",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            so.merge(masks, "weighted", **arguments)
    with pytest.raises(ValueError, match="weights belongs to how='weighted', got how='union'"):
        so.merge(masks, "union", weights=[1, 2])


def test_weighted_works_on_blocks(monkeypatch):
    """No more than a block is ever unpacked."""
    widest = []
    unpack = _bits.unpack_range

    def watched(packed, start, stop):
        widest.append(stop - start)
        return unpack(packed, start, stop)

    monkeypatch.setattr(_bits, "unpack_range", watched)
    monkeypatch.setattr(operations, "VOTE_BYTES", 1 << 10)
    masks = [so.MaskSet.random({"a": torch.empty(300, 301)}, 0.1, seed=seed) for seed in range(3)]
    so.merge(masks, "weighted", weights=[1, 2, 3])
    so.merge(masks, "majority")
    assert max(widest) == 8 << 10


def test_unpack_range():
    mask = torch.rand(1003) < 0.4
    packed = so.pack_mask(mask)
    for start, stop in ((0, 1003), (0, 0), (5, 6), (7, 9), (8, 16), (13, 1003), (999, 1003), (1003, 1003)):
        assert torch.equal(_bits.unpack_range(packed, start, stop), mask[start:stop])


# ---- groups and pairs ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.3.self_attn.q_proj.weight", "attention"),
        ("transformer.h.1.attn.c_proj.bias", "attention"),
        ("model.layers.0.linear_attn.in_proj_qkvz.weight", "attention"),
        ("model.layers.3.mlp.down_proj.weight", "mlp"),
        ("model.layers.1.block_sparse_moe.experts.7.w1.weight", "mlp"),
        ("bert.encoder.layer.0.intermediate.dense.weight", "mlp"),
        ("model.decoder.layers.0.fc1.weight", "mlp"),
        ("model.embed_tokens.weight", "embedding"),
        ("transformer.wte.weight", "embedding"),
        ("lm_head.weight", "embedding"),
        ("model.layers.0.post_attention_layernorm.weight", "norm"),
        ("model.layers.0.pre_feedforward_layernorm.weight", "norm"),
        ("model.layers.0.self_attn.q_norm.weight", "norm"),
        ("transformer.h.0.ln_1.weight", "norm"),
        ("transformer.ln_f.bias", "norm"),
        ("w", "other"),
        ("model.layers.0.mixer.A_log", "other"),
    ],
)
def test_kind_of(name, kind):
    assert kind_of(name) == kind


SHAPES = {
    "model.embed_tokens.weight": (20, 8),
    **{
        f"model.layers.{i}.{kind}.weight": (8 + i, 8)
        for i in (0, 1, 10)
        for kind in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "input_layernorm")
    },
    "extra": (5, 5),
}


def models(count):
    return [
        so.MaskSet.from_bool({n: torch.rand(s) < 0.2 + 0.2 * seed for n, s in SHAPES.items()}) for seed in range(count)
    ]


def test_compare_by_kind_and_block():
    left, right = models(2)
    result = so.compare(left, right)
    assert list(result["per_kind"]) == ["attention", "mlp", "embedding", "norm", "other"]
    assert list(result["per_projection"]) == ["embed_tokens", "q_proj", "k_proj", "up_proj", "input_layernorm", "extra"]
    assert list(result["per_block"]) == [0, 1, 10]
    for found, fits in (
        (result["per_kind"]["attention"], lambda name: "attn" in name),
        (result["per_kind"]["other"], lambda name: name == "extra"),
        (result["per_projection"]["k_proj"], lambda name: "k_proj" in name),
        (result["per_block"][1], lambda name: ".1." in name),
    ):
        names = [name for name in SHAPES if fits(name)]
        whole = so.compare(left.select(names), right.select(names))
        assert found == pytest.approx({key: whole[key] for key in found})
        assert set(found) == {"jaccard", "chance_jaccard", "overlap", "hamming"}
    json.dumps(result, allow_nan=False)


def test_compare_never_unpacks(monkeypatch):
    left, right = models(2)
    monkeypatch.setattr(so.MaskSet, "__getitem__", None)
    monkeypatch.setattr(operations.functional, "unpack_mask", None)
    assert 0 < so.compare(left, right)["jaccard"] < 1


@pytest.mark.parametrize("as_files", [False, True])
def test_compare_many(as_files, tmp_path):
    masks = models(3)
    given = masks
    if as_files:
        given = [tmp_path / f"{i}.safetensors" for i in range(3)]
        for path, m in zip(given, masks, strict=True):
            m.save(path)
    found = operations.compare_many(given)
    pairs = {(pair["left"], pair["right"]): pair for pair in found["pairs"]}
    assert list(pairs) == [(0, 1), (0, 2), (1, 2)]
    for i in range(3):
        assert found["jaccard"][i][i] == found["chance_jaccard"][i][i] == 1
        for j in range(i + 1, 3):
            result = so.compare(masks[i], masks[j])
            assert pairs[i, j] == {"left": i, "right": j, **result}
            assert found["jaccard"][i][j] == found["jaccard"][j][i] == result["jaccard"]
            assert found["chance_jaccard"][i][j] == found["chance_jaccard"][j][i] == result["chance_jaccard"]
    with pytest.raises(ValueError, match="at least two mask sets, got 1"):
        operations.compare_many(given[:1])
