"""Mask files stored against a parent: chains, and everything that can be wrong with one."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sparseopt as so
from sparseopt.masks.files import parent_of

SHAPES = {"a": (200, 300), "b": (999,), "scalar": ()}


def example(seed=0, density=0.025, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    return so.MaskSet.from_bool(
        {name: torch.rand(shape, generator=generator) < density for name, shape in shapes.items()}
    )


def moved(masks, seed):
    """Some entries of "a" changed, nothing else."""
    mask = masks["a"]
    mask.view(-1)[torch.randint(mask.numel(), (40,), generator=torch.Generator().manual_seed(seed))] ^= True
    return so.MaskSet.from_bool({**dict(masks.items()), "a": mask}, {"step": seed})


def steps(folder, count, first="step_0.safetensors", **options):
    """A chain of files; returns the masks by file."""
    masks = {first: example()}
    masks[first].save(folder / first, **options)
    for step in range(1, count):
        file = f"step_{step}.safetensors"
        masks[file] = moved(list(masks.values())[-1], step)
        masks[file].save(folder / file, compress=True, parent=folder / list(masks)[-2])
    return masks


def rewrite(path, change):
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    change(metadata)
    save_file(load_file(path), path, metadata)


def tell(path, **changes):
    rewrite(path, lambda m: m.update(parent=json.dumps({**json.loads(m["parent"]), **changes})))


@pytest.mark.parametrize(
    ("first", "options"), [("step_0.safetensors", {}), ("step_0.safetensors", {"compress": True}), ("step_0.pt", {})]
)
def test_chains_resolve(tmp_path, first, options):
    masks = steps(tmp_path, 6, first, **options)
    for file, expected in masks.items():
        again = so.MaskSet.load(tmp_path / file)
        assert again == expected
        if file != first:
            assert again.metadata == expected.metadata
            assert list(load_file(tmp_path / file)) == ["a"]  # what did not change is not there
            assert load_file(tmp_path / file)["a"].numel() < 100
            assert parent_of(tmp_path / file)[1] == list(masks)[list(masks).index(file) - 1]


def test_the_parent_is_found_by_its_fingerprint(tmp_path):
    masks = steps(tmp_path, 3)
    (tmp_path / "notes.safetensors").write_bytes(b"no mask file")
    (tmp_path / "step_1.safetensors").rename(tmp_path / "renamed.safetensors")
    assert so.MaskSet.load(tmp_path / "step_2.safetensors") == masks["step_2.safetensors"]
    masks["step_2.safetensors"].save(tmp_path / "step_1.safetensors")  # another file took the name
    assert so.MaskSet.load(tmp_path / "step_2.safetensors") == masks["step_2.safetensors"]
    masks["step_2.safetensors"].save(
        tmp_path / "by_masks.safetensors", compress=True, parent=masks["step_0.safetensors"]
    )
    assert parent_of(tmp_path / "by_masks.safetensors") == (f"sha256:{masks['step_0.safetensors'].fingerprint}", None)
    assert so.MaskSet.load(tmp_path / "by_masks.safetensors") == masks["step_2.safetensors"]
    assert parent_of(tmp_path / "step_0.safetensors") is None


def test_parameters_come_go_and_change_shape(tmp_path):
    old = example(0, shapes={"same": (99, 50), "gone": (5,), "reshaped": (10, 20)})
    generator = torch.Generator().manual_seed(1)
    new = so.MaskSet.from_bool(
        {
            "same": old["same"],
            "reshaped": old["reshaped"].view(20, 10),
            "new": torch.rand(77, generator=generator) < 0.2,
        }
    )
    old.save(tmp_path / "old.safetensors")
    new.save(tmp_path / "new.safetensors", compress=True, parent=tmp_path / "old.safetensors")
    assert so.MaskSet.load(tmp_path / "new.safetensors") == new
    assert sorted(load_file(tmp_path / "new.safetensors")) == ["new", "reshaped"]


def test_a_child_equal_to_its_parent(tmp_path):
    masks = example()
    masks.save(tmp_path / "a.safetensors")
    masks.save(tmp_path / "b.safetensors", compress=True, parent=tmp_path / "a.safetensors")
    assert load_file(tmp_path / "b.safetensors") == {}
    assert so.MaskSet.load(tmp_path / "b.safetensors") == masks
    (tmp_path / "a.safetensors").unlink()
    with pytest.raises(so.FormatError, match="not in its folder"):  # not itself, though the fingerprint fits
        so.MaskSet.load(tmp_path / "b.safetensors")


def test_a_gap_is_an_error_that_names_both(tmp_path):
    masks = steps(tmp_path, 4)
    (tmp_path / "step_1.safetensors").unlink()
    with pytest.raises(
        so.FormatError, match=r"step_2\.safetensors' is stored against its parent 'step_1\.safetensors'"
    ):
        so.MaskSet.load(tmp_path / "step_3.safetensors")
    (tmp_path / "away").mkdir()
    shutil.copy(tmp_path / "step_3.safetensors", tmp_path / "away")
    with pytest.raises(so.FormatError, match=masks["step_2.safetensors"].fingerprint):
        so.MaskSet.load(tmp_path / "away" / "step_3.safetensors")


@pytest.mark.parametrize("first", ["step_0.safetensors", "step_0.pt"])
def test_another_parent_is_an_error_that_names_both(tmp_path, first):
    masks = steps(tmp_path, 2, first)
    other = example(9)
    other.save(tmp_path / first)
    with pytest.raises(so.FormatError, match=other.fingerprint) as caught:
        so.MaskSet.load(tmp_path / "step_1.safetensors")
    assert masks[first].fingerprint in str(caught.value)
    assert "step_1.safetensors" in str(caught.value)


def test_a_damaged_parent_is_named(tmp_path):
    steps(tmp_path, 3, compress=True)
    path = tmp_path / "step_0.safetensors"
    data = bytearray(path.read_bytes())
    data[-20] ^= 64
    path.write_bytes(data)
    with pytest.raises(so.FormatError, match=r"step_0\.safetensors' is damaged"):
        so.MaskSet.load(tmp_path / "step_2.safetensors")


def test_cycles_end(tmp_path):
    steps(tmp_path, 3)
    tell(tmp_path / "step_1.safetensors", file="step_2.safetensors")
    with pytest.raises(so.FormatError, match="which is stored against it"):
        so.MaskSet.load(tmp_path / "step_2.safetensors")
    tell(tmp_path / "step_1.safetensors", file="step_1.safetensors")
    with pytest.raises(so.FormatError, match="which is stored against it"):
        so.MaskSet.load(tmp_path / "step_1.safetensors")


@pytest.mark.parametrize(
    "file",
    ["../m.safetensors", "/m.safetensors", "a/m.safetensors", "..", ".", "", "a\\m", "C:m", "a\0b", "w" * 300, 7, [1]],
)
def test_a_parent_elsewhere_is_refused(tmp_path, file):
    steps(tmp_path / "sub", 2)
    example().save(tmp_path / "m.safetensors")
    tell(tmp_path / "sub" / "step_1.safetensors", file=file)
    with pytest.raises(so.FormatError, match="is not the name of a file beside it"):
        so.MaskSet.load(tmp_path / "sub" / "step_1.safetensors")


@pytest.mark.parametrize(
    "parent", ["", "[]", "{}", '{"fingerprint": 1, "file": null}', '{"fingerprint": "x"}', "[" * 9999]
)
def test_an_unreadable_parent(tmp_path, parent):
    steps(tmp_path, 2)
    rewrite(tmp_path / "step_1.safetensors", lambda m: m.update(parent=parent))
    with pytest.raises(so.FormatError, match="parent"):
        so.MaskSet.load(tmp_path / "step_1.safetensors")


def test_a_difference_is_no_whole_file(tmp_path):
    steps(tmp_path, 2)
    rewrite(tmp_path / "step_1.safetensors", lambda m: m.pop("parent"))
    with pytest.raises(so.FormatError, match="the mask is missing"):
        so.MaskSet.load(tmp_path / "step_1.safetensors")


def test_arguments(tmp_path):
    masks = example()
    path = tmp_path / "m.safetensors"
    masks.save(path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="compress=True"):
        masks.save(tmp_path / "n.safetensors", parent=path)
    with pytest.raises(ValueError, match=r"\.pt"):
        masks.save(tmp_path / "n.pt", compress=True, parent=path)
    with pytest.raises(ValueError, match="its own parent"):
        moved(masks, 1).save(path, compress=True, parent=path)
    with pytest.raises(FileNotFoundError, match="absent"):
        masks.save(tmp_path / "n.safetensors", compress=True, parent=tmp_path / "absent.safetensors")
    with pytest.raises(FileNotFoundError, match="absent"):
        parent_of(tmp_path / "absent.safetensors")
    with pytest.raises(ValueError, match="'parent'"):
        masks.with_metadata(parent="x").save(tmp_path / "n.safetensors")
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_saving_leaves_the_parent_as_it_was(tmp_path):
    parent = example()
    fingerprint = parent.fingerprint
    child = moved(parent, 1)
    parent.save(tmp_path / "p.safetensors")
    child.save(tmp_path / "c.safetensors", compress=True, parent=parent)
    so.MaskSet.load(tmp_path / "c.safetensors")
    assert so.MaskSet(  # computed again
        {name: parent.packed(name) for name in parent}, parent.shapes
    ).fingerprint == fingerprint  # fmt: skip
