"""Mask files: round trips, and everything that can be wrong with a file."""

import json
import math
import os
import zipfile
import zlib

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sparseopt as so
from sparseopt.masks.codec import CODEC, LEGACY

KINDS = [("m.safetensors", {}), ("m.safetensors", {"compress": True}), ("m.pt", {})]


def example(metadata=None):
    generator = torch.Generator().manual_seed(0)
    shapes = {"model.a": (40, 33), "model.b": (7,), "empty": (0, 4), "scalar": ()}
    masks = {name: torch.rand(shape, generator=generator) < 0.1 for name, shape in shapes.items()}
    return so.MaskSet.from_bool({**masks, "dense": torch.rand(300, generator=generator) < 0.6}, metadata)


@pytest.mark.parametrize(("name", "options"), KINDS)
def test_round_trip(tmp_path, name, options):
    m = example({"step": 7, "tolerance": 1e-5, "base_model": "org/model", "looks_like_number": "12", "none": None})
    path = tmp_path / "deep" / "er" / name
    m.save(path, **options)
    again = so.MaskSet.load(path)
    assert again == m
    assert again.shapes == m.shapes
    if name.endswith("safetensors"):
        assert again.metadata == m.metadata
    assert [p.name for p in path.parent.iterdir()] == [name]


def test_safetensors_layout(tmp_path):
    m = example({"step": 7, "base_model": "org/model"})
    m.save(tmp_path / "m.safetensors")
    tensors = load_file(tmp_path / "m.safetensors")
    for name in m:
        expected = np.packbits(m[name].numpy().reshape(-1), bitorder="little")
        assert tensors[name].dtype == torch.uint8
        assert tensors[name].numpy().tolist() == expected.tolist()
    with safe_open(tmp_path / "m.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "sparseopt.masks"
    assert metadata["version"] == "1"
    assert metadata["compression"] == "none"
    assert metadata["step"] == "7"
    assert metadata["base_model"] == "org/model"
    assert json.loads(metadata["shapes"]) == {name: list(shape) for name, shape in m.shapes.items()}
    assert int(metadata["active_parameters"]) == m.active_parameters
    assert float(metadata["sparsity"]) == m.sparsity


def test_pt_is_the_plain_dict(tmp_path):
    m = example()
    m.save(tmp_path / "m.pt")
    loaded = torch.load(tmp_path / "m.pt", weights_only=True)
    assert type(loaded) is dict
    assert all(mask.dtype == torch.bool and torch.equal(mask, m[name]) for name, mask in loaded.items())


@pytest.mark.parametrize("kind", ["random", "rows", "columns", "none", "one", "all", "dense", "far"])
def test_compression_is_lossless_and_small(tmp_path, kind):
    generator = torch.Generator().manual_seed(1)
    shape = (500, 1024)
    mask = torch.zeros(shape, dtype=torch.bool)
    if kind == "random":
        mask = torch.rand(shape, generator=generator) < 0.025
    elif kind == "rows":
        mask[torch.rand(500, generator=generator) < 0.025] = True
    elif kind == "columns":
        mask[:, torch.rand(1024, generator=generator) < 0.025] = True
    elif kind == "one":
        mask[-1, -1] = True
    elif kind == "all":
        mask[:] = True
    elif kind == "dense":
        mask = torch.rand(shape, generator=generator) < 0.5
    elif kind == "far":
        mask.view(-1)[torch.tensor([0, 255, 256, 511, 767, 1023, 1279])] = True  # gaps 254, 0, 254, 255, 255, 255
    m = so.MaskSet.from_bool({"w": mask})
    m.save(tmp_path / "c.safetensors", compress=True)
    assert so.MaskSet.load(tmp_path / "c.safetensors") == m
    with safe_open(tmp_path / "c.safetensors", framework="pt") as file:
        assert file.metadata()["compression"] == CODEC
        size = file.get_tensor("w").numel()
    raw = mask.numel() // 8
    limit = {"random": 0.18 * raw, "dense": raw + 1, "rows": 60, "columns": 400, "far": 40}.get(kind, 10)
    assert size <= limit


@pytest.mark.parametrize(("name", "options"), KINDS)
def test_any_flipped_byte_is_refused_or_harmless(tmp_path, name, options):
    m = so.MaskSet.from_bool(
        {"a.w": torch.rand(9, 30, generator=torch.Generator().manual_seed(3)) < 0.1, "b": torch.tensor([True, False])},
        {"step": 3},
    )
    path = tmp_path / name
    m.save(path, **options)
    good = path.read_bytes()
    generator = np.random.default_rng(0)
    refused = accepted = 0
    for position in range(len(good)):
        damaged = bytearray(good)
        damaged[position] ^= int(generator.integers(1, 256)) if position % 2 else 1 << int(generator.integers(8))
        path.write_bytes(damaged)
        try:
            again = so.MaskSet.load(path)
        except so.FormatError as error:
            refused += str(path) in str(error)
        else:
            assert again == m, f"byte {position} made another mask"
            accepted += 1
    assert refused + accepted == len(good)
    assert refused > len(good) / 4


@pytest.mark.parametrize(("name", "options"), KINDS)
def test_truncated_files(tmp_path, name, options):
    path = tmp_path / name
    example().save(path, **options)
    good = path.read_bytes()
    for length in [0, 1, 7, 8, 9, 100, len(good) // 2, len(good) - 1]:
        path.write_bytes(good[:length])
        with pytest.raises(so.FormatError, match=name):
            so.MaskSet.load(path)


@pytest.mark.parametrize("content", [b"", b"hello world, this is no mask", b"\xff" * 200, b"PK\x03\x04" + b"\0" * 50])
@pytest.mark.parametrize("name", ["m.safetensors", "m.pt", "m.bin"])
def test_foreign_files(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(so.FormatError, match=name):
        so.MaskSet.load(tmp_path / name)


def rewrite(path, change_metadata=None, change_tensors=None):
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    (change_metadata or (lambda m: None))(metadata)
    (change_tensors or (lambda t: None))(tensors)
    save_file(tensors, path, metadata)


@pytest.mark.parametrize(
    ("change_metadata", "change_tensors", "message"),
    [
        (lambda m: m.clear(), None, "not a mask file"),
        (lambda m: m.update(format="sparseopt.delta"), None, "sparseopt.delta"),
        (lambda m: m.update(version="2"), None, "version '2'"),
        (lambda m: m.update(compression="zstd"), None, "zstd"),
        (lambda m: m.update(compression=CODEC), None, "compressed mask"),
        (lambda m: m.pop("checksum"), None, "lacks 'checksum'"),
        (lambda m: m.pop("shapes"), None, "lacks 'shapes'"),
        (lambda m: m.update(shapes="[1]"), None, "shapes cannot be read"),
        (lambda m: m.update(shapes='{"x"'), None, "shapes cannot be read"),
        (lambda m: m.update(shapes=m["shapes"].replace("[7]", "[6]")), None, "checksum"),
        (lambda m: m.update(shapes=m["shapes"].replace("[7]", "[70]")), None, "9 bytes, got 1"),
        (lambda m: m.update(shapes=m["shapes"].replace("[7]", "[-7]")), None, "shapes cannot be read"),
        (lambda m: m.update(shapes=m["shapes"].replace("[7]", "[1e1]")), None, "shapes cannot be read"),
        (lambda m: m.update(shapes=m["shapes"].replace("[7]", str([1] * 65))), None, "shapes cannot be read"),
        (lambda m: m.update(shapes=m["shapes"].replace("[7]", "[" + "9" * 5000 + "]")), None, "shapes cannot be read"),
        (lambda m: m.update(shapes=m["shapes"].replace("[7]", "[281474976710656]")), None, "shapes cannot be read"),
        (lambda m: m.update(shapes=m["shapes"].replace("[7]", "[16777216, 16777216]")), None, r"2\^48 entries"),
        (lambda m: m.update(shapes=m["shapes"].replace("[7]", "[281474976710655]")), None, "the memory has"),
        (lambda m: m.update(shapes=m["shapes"].replace("}", ', "empty": [0]}')), None, "shapes cannot be read"),
        (lambda m: m.update(parent="{}"), None, "only files of codec 'rice' have a parent|cannot be read"),
        (None, lambda t: t.pop("model.b"), r"the mask is missing for parameter 'model\.b'"),
        (None, lambda t: t.update(new=t["model.b"].clone()), "the shape is missing for parameter 'new'"),
        (None, lambda t: t.update({"model.b": t["model.b"].float()}), "not a vector of bytes"),
        (None, lambda t: t["model.b"].bitwise_xor_(128), "past its 7 entries"),
        (None, lambda t: t["model.b"].bitwise_xor_(1), "checksum"),
    ],
)
def test_wrong_contents(tmp_path, change_metadata, change_tensors, message):
    path = tmp_path / "m.safetensors"
    example().save(path)
    rewrite(path, change_metadata, change_tensors)
    with pytest.raises(so.FormatError, match=message):
        so.MaskSet.load(path)


@pytest.mark.parametrize("shape", [[80, 10**9], [2**24, 2**20], [281474976710655]])
def test_a_compressed_file_cannot_declare_what_it_likes(tmp_path, shape):
    """Its bytes do not say how many entries there are: the sizes must agree with each other and with the memory."""
    path = tmp_path / "m.safetensors"
    so.MaskSet.from_bool({"w": torch.zeros(80, dtype=torch.bool)}).save(path, compress=True)
    rewrite(path, lambda m: m.update(shapes=json.dumps({"w": shape})))
    with pytest.raises(so.FormatError, match="its metadata says '80'"):
        so.MaskSet.load(path)
    if math.prod(shape) > 10**12:
        rewrite(path, lambda m: m.update(total_parameters=str(math.prod(shape))))
        with pytest.raises(so.FormatError, match="the memory has"):
            so.MaskSet.load(path)


BAD_NAMES = {
    "..": r"holds '\.\.'", "../../etc/passwd": r"holds '\.\.'", "model..w": r"holds '\.\.'", "/etc/passwd": "absolute path",
    "C:/w": "absolute path", "\\\\host\\w": "absolute path", "~/w": "absolute path", "a\0b": r"U\+0000", "a\nb": r"U\+000A",
    "a\u202eb": r"U\+202E", "a\u200bb": r"U\+200B", "\ue000": r"U\+E000", "w" * 1025: "1025 characters", "": "0 characters",
}  # fmt: skip


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("name", list(BAD_NAMES))
def test_names_that_no_file_may_hold(tmp_path, name, compress):
    path = tmp_path / "m.safetensors"
    bits = torch.zeros(8, dtype=torch.bool)
    with pytest.raises(ValueError, match=BAD_NAMES[name]):
        so.MaskSet.from_bool({name: bits}).save(path)
    so.MaskSet.from_bool({"good": bits}).save(path, compress=compress)

    def rename(tensors):
        tensors[name] = tensors.pop("good")

    rewrite(path, lambda m: m.update(shapes=json.dumps({name: [8]})), rename)
    with pytest.raises(so.FormatError, match=BAD_NAMES[name]):
        so.MaskSet.load(path)
    torch.save({name: bits}, tmp_path / "m.pt")
    with pytest.raises(so.FormatError, match=BAD_NAMES[name]):
        so.MaskSet.load(tmp_path / "m.pt")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.pt", "m.safetensors"]


@pytest.mark.parametrize("pair", [("w", "module.w"), ("caf\u00e9", "cafe\u0301"), ("a.w", "_orig_mod.a.w")])
def test_names_that_become_one(tmp_path, pair):
    path = tmp_path / "m.safetensors"
    so.MaskSet.from_bool({"x": torch.zeros(8) > 0, "y": torch.zeros(8) > 0}).save(path)

    def rename(tensors):
        for old, new in zip("xy", pair, strict=True):
            tensors[new] = tensors.pop(old)

    rewrite(path, lambda m: m.update(shapes=json.dumps({name: [8] for name in pair})), rename)
    with pytest.raises(so.FormatError, match="two masks are named"):
        so.MaskSet.load(path)


def test_names_in_other_scripts_are_fine(tmp_path):
    m = so.MaskSet.from_bool({"\u5c64.0.w\u00e9ight": torch.tensor([True, False]), "a/b": torch.tensor([True])})
    for file in ("m.safetensors", "m.pt"):
        m.save(tmp_path / file)
        assert so.MaskSet.load(tmp_path / file) == m


@pytest.mark.parametrize("density", [0, 0.001, 0.1, 0.6, 1])
def test_files_of_the_first_codec_are_read(tmp_path, density):
    """A file as earlier releases wrote it: one tag byte, then deflated gaps (in bytes) or bits."""
    path = tmp_path / "m.safetensors"
    mask = torch.rand(50, 999, generator=torch.Generator().manual_seed(0)) < density
    m = so.MaskSet.from_bool({"w": mask}, {"step": 3})
    m.save(path)
    if density < 0.5:
        long, rest = np.divmod(np.diff(m.indices("w").numpy().astype(np.int64), prepend=-1) - 1, 255)
        data = b"".join(b"\xff" * int(count) + bytes([last]) for count, last in zip(long, rest, strict=True))
    else:
        data = m.packed("w").numpy().tobytes()
    stored = torch.frombuffer(bytearray(bytes([density < 0.5]) + zlib.compress(data, 6)), dtype=torch.uint8)
    rewrite(path, lambda x: x.update(compression=LEGACY), lambda t: t.update(w=stored))
    again = so.MaskSet.load(path)
    assert again == m
    assert again.metadata == m.metadata
    if 0 < density < 0.5:
        far = torch.frombuffer(bytearray(b"\1" + zlib.compress(b"\xff" * 250)), dtype=torch.uint8)
        rewrite(path, None, lambda t: t.update(w=far))
        with pytest.raises(so.FormatError, match="outside of the mask"):
            so.MaskSet.load(path)


def test_swapped_tensors_are_noticed(tmp_path):
    m = so.MaskSet.from_bool({"a": torch.tensor([True, False]), "b": torch.tensor([False, True])})
    m.save(tmp_path / "m.safetensors")

    def swap(tensors):
        tensors["a"], tensors["b"] = tensors["b"], tensors["a"]

    rewrite(tmp_path / "m.safetensors", None, swap)
    with pytest.raises(so.FormatError, match="checksum"):
        so.MaskSet.load(tmp_path / "m.safetensors")


def test_a_compressed_stream_cannot_fill_the_memory(tmp_path):
    path = tmp_path / "m.safetensors"
    so.MaskSet.from_bool({"w": torch.zeros(80, dtype=torch.bool)}).save(path, compress=True)
    for tag in (0, 1, 2, 129):
        bomb = torch.frombuffer(bytearray(bytes([tag]) + zlib.compress(b"\0" * 10_000_000)), dtype=torch.uint8)
        rewrite(path, None, lambda t, bomb=bomb: t.update(w=bomb))
        with pytest.raises(so.FormatError, match="compressed mask of 'w'"):
            so.MaskSet.load(path)


def test_pt_of_other_things(tmp_path):
    path = tmp_path / "m.pt"
    for value in ([1, 2], {"w": torch.ones(3)}, {1: torch.ones(3, dtype=torch.bool)}, torch.ones(2)):
        torch.save(value, path)
        with pytest.raises(so.FormatError, match="bool tensor"):
            so.MaskSet.load(path)
    torch.save({"w": torch.tensor([0, 1, 2], dtype=torch.uint8).view(torch.bool)}, path)
    with pytest.raises(so.FormatError, match="neither 0 nor 1"):
        so.MaskSet.load(path)
    torch.save({"w": torch.ones(2) > 0, "module.w": torch.ones(2) > 0}, path)
    with pytest.raises(so.FormatError, match="two masks are named 'w'"):
        so.MaskSet.load(path)
    torch.save({"w": torch.ones(3, dtype=torch.bool)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(so.FormatError):
        so.MaskSet.load(path)


def test_pt_cannot_declare_more_than_it_holds(tmp_path):
    path = tmp_path / "m.pt"
    base = torch.zeros(1, dtype=torch.bool)
    views = [base.expand(2**40), torch.zeros(4, 4, dtype=torch.bool).to_sparse(), torch.zeros(9).bool().to("meta")]
    for mask in views:
        torch.save({"w": mask}, path)
        with pytest.raises(so.FormatError, match=r"stored entry by entry|damaged"):
            so.MaskSet.load(path)
    transposed = torch.rand(5, 7).lt(0.5).t()
    torch.save({"w": transposed}, path)
    assert torch.equal(so.MaskSet.load(path)["w"], transposed)


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("should-not-exist",)


def test_pt_never_runs_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"w": Malicious()}, "m.pt")
    with pytest.raises(so.FormatError):
        so.MaskSet.load("m.pt")
    assert not os.path.exists("should-not-exist")


def test_pt_crc_is_checked_before_unpickling(tmp_path, monkeypatch):
    path = tmp_path / "m.pt"
    example().save(path)
    with zipfile.ZipFile(path) as archive:
        entry = next(e for e in archive.infolist() if "/data/" in e.filename and e.file_size > 100)
        with archive.open(entry) as file:
            content = file.read()
    data = bytearray(path.read_bytes())
    data[data.index(content) + 50] ^= 1
    path.write_bytes(data)
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("unpickled a damaged file"))
    with pytest.raises(so.FormatError, match="CRC"):
        so.MaskSet.load(path)


def test_save_and_load_arguments(tmp_path):
    m = example()
    with pytest.raises(ValueError, match=r"m\.bin"):
        m.save(tmp_path / "m.bin")
    with pytest.raises(ValueError, match="numpy"):
        m.save(tmp_path / "m.pt", format="numpy")
    with pytest.raises(ValueError, match="compress"):
        m.save(tmp_path / "m.pt", compress=True)
    with pytest.raises(FileNotFoundError, match=r"absent\.pt"):
        so.MaskSet.load(tmp_path / "absent.pt")
    with pytest.raises(ValueError, match="'checksum'"):
        m.with_metadata(checksum="x").save(tmp_path / "m.safetensors")
    with pytest.raises(TypeError, match="'odd'"):
        m.with_metadata(odd={1, 2}).save(tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="__metadata__"):
        so.MaskSet.from_bool({"__metadata__": torch.ones(1, dtype=torch.bool)}).save(tmp_path / "m.safetensors")
    assert list(tmp_path.iterdir()) == []
    for format in ("pt", "safetensors"):  # any suffix, told apart by content
        m.save(tmp_path / "m.bin", format=format)
        assert so.MaskSet.load(tmp_path / "m.bin") == m


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "m.pt"
    example().save(path)
    before = path.read_bytes()

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        (~example()).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
