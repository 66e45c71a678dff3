"""Numbers about masks over steps, and pictures of them."""

import json
import xml.etree.ElementTree as ET

import pytest
import torch

import sparseopt as so
from sparseopt.masks import plot, statistics

KINDS = ("self_attn.q_proj", "mlp.up_proj", "input_layernorm")
STEPS = [10, 30, 20]


def shapes(layers=3):
    return {
        "model.embed_tokens.weight": (20, 8),
        **{
            f"model.layers.{i}.{kind}.weight": (8,) if "norm" in kind else (16, 8)
            for i in range(layers)
            for kind in KINDS
        },
        "model.norm.weight": (8,),
    }


def masks(seed, density=0.2, layers=3, without=()):
    generator = torch.Generator().manual_seed(seed)
    found = {
        name: (torch.rand(shape, generator=generator) < density) & (name not in without)
        for name, shape in shapes(layers).items()
    }
    return so.MaskSet.from_bool(found, {"step": seed})


@pytest.fixture
def by_step():
    return {step: masks(step, 0.1 + step / 100) for step in STEPS}


# ---- numbers ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("as_files", [False, True])
def test_evolution(by_step, as_files, tmp_path):
    given = by_step
    if as_files:
        given = {step: tmp_path / f"{step}.safetensors" for step in by_step}
        for step, path in given.items():
            by_step[step].save(path)
    found = statistics.evolution(given)
    a, b, c = (by_step[step] for step in (10, 20, 30))
    assert found["steps"] == [10, 20, 30]
    assert found["density"] == [a.density, b.density, c.density]
    assert found["active_parameters"] == [a.active_parameters, b.active_parameters, c.active_parameters]
    assert found["total_parameters"] == a.total_parameters
    for key, others in (("previous", [None, a, b]), ("first", [a, a, a]), ("last", [c, c, c])):
        for measure in ("jaccard", "chance_jaccard"):
            expected = [o and so.compare(m, o)[measure] for m, o in zip((a, b, c), others, strict=True)]
            assert found[key][measure] == expected
    with pytest.raises(ValueError, match="at least two steps, got 1"):
        statistics.evolution({1: a})
    with pytest.raises(ValueError, match="only in the"):
        statistics.evolution({1: a, 2: masks(1, layers=4)})


def test_density_by_layer():
    m = masks(1, without=["model.embed_tokens.weight"])
    found = statistics.density_by_layer(m)
    assert found["layers"] == [0, 1, 2]
    assert found["projections"] == ["q_proj", "up_proj", "input_layernorm"]
    for row, kind in enumerate(KINDS):
        names = [f"model.layers.{i}.{kind}.weight" for i in range(3)]
        assert found["cells"][row] == [m.select([name]).density for name in names]
        assert found["by_projection"][row] == m.select(names).density
    assert found["by_layer"][1] == m.select([f"model.layers.1.{kind}.weight" for kind in KINDS]).density
    assert found["outside"] == {"embed_tokens": 0, "norm": m.select(["model.norm.weight"]).density}
    assert found["density"] == m.density


def test_holes_have_no_density():
    names = ["model.layers.0.mlp.up_proj.weight", "model.layers.2.self_attn.q_proj.weight"]
    found = statistics.density_by_layer(masks(1).select(names))
    assert found["projections"] == ["q_proj", "up_proj"]  # attention first
    assert [[value is None for value in row] for row in found["cells"]] == [[True, False], [False, True]]


def test_a_few_dense_norms_do_not_set_the_scale():
    big = {f"model.layers.{i}.mlp.up_proj.weight": torch.rand(100, 100) < 0.02 for i in range(2)}
    norms = {f"model.layers.{i}.norm.weight": torch.ones(50, dtype=torch.bool) for i in range(2)}
    found = statistics.density_by_layer(so.MaskSet.from_bool({**big, **norms}))
    assert found["scale"] == max(found["cells"][0]) < 0.05
    nothing = so.MaskSet.from_bool({"layers.0.w": torch.zeros(9, dtype=torch.bool)})
    assert statistics.density_by_layer(nothing)["scale"] == 1


def test_shares_by_kind(by_step):
    found = statistics.shares_by_kind(by_step)
    assert found["steps"] == [10, 20, 30]
    assert list(found["kinds"]) == ["attention", "mlp", "embedding", "norm"]
    attention = [name for name in by_step[10] if "attn" in name]
    total = by_step[10].total_parameters
    values = found["kinds"]["attention"]
    assert (values["entries"], values["share_of_entries"]) == (384, 384 / total)
    for position, step in enumerate((10, 20, 30)):
        part = by_step[step].select(attention)
        assert values["active"][position] == part.active_parameters
        assert values["density"][position] == part.density
        shares = [kind["share_of_active"][position] for kind in found["kinds"].values()]
        assert shares[0] == part.active_parameters / by_step[step].active_parameters
        assert sum(shares) == pytest.approx(1)
    with pytest.raises(ValueError, match="at least one step"):
        statistics.shares_by_kind({})
    with pytest.raises(ValueError, match="only in the"):
        statistics.shares_by_kind({1: by_step[10], 2: masks(2, layers=4)})


def test_step_of(tmp_path):
    m = masks(7)
    assert statistics.step_of(m) == 7
    assert statistics.step_of(so.MaskSet.from_bool({})) is None
    m.save(tmp_path / "step_9.safetensors")
    assert statistics.step_of(tmp_path / "step_9.safetensors") == 7
    m.save(tmp_path / "run_step_3" / "grad_mask_step_12.pt")
    assert statistics.step_of(tmp_path / "run_step_3" / "grad_mask_step_12.pt") == 12
    so.MaskSet.from_bool({"w": torch.ones(3, dtype=torch.bool)}).save(tmp_path / "mask.safetensors")
    assert statistics.step_of(tmp_path / "mask.safetensors") is None
    with pytest.raises(FileNotFoundError, match="there is no mask file"):
        statistics.step_of(tmp_path / "step_4.pt")


# ---- pictures --------------------------------------------------------------------------------------------------------
def check_png(path, width, height):
    import matplotlib.image

    pixels = matplotlib.image.imread(path)
    assert pixels.shape[1] > width
    assert pixels.shape[0] > height
    assert pixels.std() > 0.05


def texts(path):
    """The texts of an SVG that keeps its texts as comments beside their shapes."""
    ET.parse(path)
    return path.read_text()


def test_plot_evolution(by_step, tmp_path):
    numbers = plot.plot_evolution(by_step, tmp_path / "e.png", "a title")
    check_png(tmp_path / "e.png", 1000, 400)
    assert json.loads((tmp_path / "e.json").read_text()) == numbers == statistics.evolution(by_step)
    plot.plot_evolution(by_step, tmp_path / "e.svg", "a title")
    found = texts(tmp_path / "e.svg")
    for text in ("a title", "with the previous step", "with the last step", "by chance", "training step", "density"):
        assert f"<!-- {text}" in found
    first = (tmp_path / "e.svg").read_bytes()
    plot.plot_evolution(by_step, tmp_path / "e.svg", "a title")
    assert (tmp_path / "e.svg").read_bytes() == first
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("layers", [1, 32, 90])
def test_plot_layers(layers, tmp_path):
    numbers = plot.plot_layers(masks(1, layers=layers), tmp_path / "l.png")
    check_png(tmp_path / "l.png", 800, 400)
    assert json.loads((tmp_path / "l.json").read_text()) == numbers
    plot.plot_layers(masks(1, layers=layers), tmp_path / "l.svg")
    found = texts(tmp_path / "l.svg")
    shown = [layer for layer in range(layers) if layers < 40 or layer % 4 == 0]
    for text in ("q_proj", "up_proj", "density", *shown):
        assert f"<!-- {text} -->" in found
    assert ("<!-- 1 -->" in found) == (layers != 90 and layers > 1)


@pytest.mark.parametrize("steps", [1, 3])
def test_plot_kinds(by_step, steps, tmp_path):
    chosen = dict(list(by_step.items())[:steps])
    numbers = plot.plot_kinds(chosen, tmp_path / "k.png")
    check_png(tmp_path / "k.png", 1000, 400)
    assert json.loads((tmp_path / "k.json").read_text()) == numbers
    plot.plot_kinds(chosen, tmp_path / "k.svg")
    found = texts(tmp_path / "k.svg")
    for text in ("attention", "MLP", "embedding", "norm", "share of active entries", "share of all entries"):
        assert f"<!-- {text}" in found


def test_densities_far_apart(tmp_path):
    chosen = {
        step: so.MaskSet.from_bool(
            {n: torch.rand(s) < (0.9 if "norm" in n else 0.02) for n, s in shapes().items() if "embed" not in n}
            | {"model.embed_tokens.weight": torch.zeros(20, 8, dtype=torch.bool)}
        )
        for step in (1, 2)
    }
    plot.plot_kinds(chosen, tmp_path / "k.svg")
    assert "<!-- density (log; 0 is not shown) -->" in texts(tmp_path / "k.svg")


def test_nothing_active_can_be_drawn(tmp_path):
    nothing = {step: masks(step, density=0.0) for step in (1, 2)}
    plot.plot_evolution(nothing, tmp_path / "e.png")
    plot.plot_layers(nothing[1], tmp_path / "l.png")
    plot.plot_kinds(nothing, tmp_path / "k.png")
    plot.plot_kinds({1: nothing[1]}, tmp_path / "k1.png")
    assert len(list(tmp_path.glob("*.png"))) == len(list(tmp_path.glob("*.json"))) == 4


@pytest.mark.parametrize("percent", [0, 0.001, 0.004, 0.31, 0.996, 2.46, 9.96, 41.2, 100])
def test_short(percent):
    text = plot._short(percent)
    assert len(text) <= 4
    if percent >= 0.005:
        assert float(text) == pytest.approx(percent, rel=0.05)
    else:
        assert text == ("<.01" if percent else "0")


def test_errors(by_step, tmp_path):
    with pytest.raises(ValueError, match=r"ends in .png or .svg, got '.*e.pdf'"):
        plot.plot_evolution(by_step, tmp_path / "e.pdf")
    with pytest.raises(ValueError, match="no heat map to draw"):
        plot.plot_layers(masks(1).select(["model.norm.weight"]), tmp_path / "l.png")
    assert not list(tmp_path.iterdir())
