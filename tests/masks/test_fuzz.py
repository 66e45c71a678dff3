"""Mutated mask files: every one loads to the same mask or is refused, without a crash, a hang, or more memory than declared.

Valid files of every format and codec, differences with their parents included, get bytes flipped, cut, inserted and spliced
(seeded). They are loaded in a process of their own, whose address space is limited and whose peak memory is measured; a few
of the files are small and declare a mask of 32 MB. As a script: FOLDER SEED COUNT, prints counts as JSON.
"""

import json
import resource
import subprocess
import sys
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sparseopt as so
from sparseopt.masks.codec import LEGACY

SECONDS = 10.0  # of processor time for one file; the usual one takes milliseconds
LARGE = 1 << 28  # entries: 32 MB of bits
SLACK = 48 << 20  # interpreter, allocator, the archive's copy
TOKENS = [b"[", b"]", b"{", b"}", b'"', b",", b"9", b"0", b"-", b"..", b"/", b"\0", b"\xff\xff\xff\xff", b"rice", b"none",
          b'"parent"', b"sha256:", b"\\u0000", b"\\ud800", b"1e9", b"PK\x03\x04"]  # fmt: skip


# ---- valid files -----------------------------------------------------------------------------------------------------
def small(seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"model.a": (120, 257), "model.b": (7,), "empty": (0, 4), "scalar": (), "norm": (999,)}
    masks = {name: torch.rand(shape, generator=generator) < 0.05 for name, shape in shapes.items()}
    rows = (torch.rand(64, 1, generator=generator) < 0.1).expand(64, 300).contiguous()
    pairs = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 1], [1, 0, 0, 1]])[torch.randint(3, (2000,), generator=generator)]
    dense = torch.rand(900, generator=generator) < 0.5
    return so.MaskSet.from_bool({**masks, "rows": rows, "two_of_four": pairs.bool(), "dense": dense}, {"step": seed})


def large(seed):
    generator = torch.Generator().manual_seed(seed)
    places = torch.randint(LARGE, (500,), generator=generator).unique()
    return so.MaskSet.from_indices({"w": places}, {"w": (LARGE,)})


def legacy(masks, path):
    masks.save(path)
    with safe_open(path, framework="pt") as file:
        metadata = {**file.metadata(), "compression": LEGACY}
    stored = {}
    for name in masks:
        long, rest = np.divmod(np.diff(masks.indices(name).numpy().astype(np.int64), prepend=-1) - 1, 255)
        gaps = b"".join(b"\xff" * int(count) + bytes([last]) for count, last in zip(long, rest, strict=True))
        stored[name] = torch.frombuffer(bytearray(b"\1" + zlib.compress(gaps)), dtype=torch.uint8)
    save_file(stored, path, metadata)


def corpus(folder):
    """Writes every kind of file; returns (files of a case, what its last one holds, how often it is taken)."""
    one, two = small(0), small(1)
    three = so.MaskSet.from_bool({**dict(two.items()), "norm": one["norm"], "new": one["dense"]})
    one.save(folder / "plain.safetensors")
    one.save(folder / "rice.safetensors", compress=True)
    one.save(folder / "dict.pt")
    legacy(one, folder / "legacy.safetensors")
    two.save(folder / "child.safetensors", compress=True, parent=folder / "rice.safetensors")
    three.save(folder / "grandchild.safetensors", compress=True, parent=folder / "child.safetensors")
    two.save(folder / "child_of_dict.safetensors", compress=True, parent=folder / "dict.pt")
    wide, wider = large(2), large(3)
    wide.save(folder / "wide.safetensors", compress=True)
    legacy(wide, folder / "wide_legacy.safetensors")
    wider.save(folder / "wide_child.safetensors", compress=True, parent=folder / "wide.safetensors")
    return [
        (["plain.safetensors"], one, 20), (["rice.safetensors"], one, 20), (["dict.pt"], one, 20),
        (["legacy.safetensors"], one, 10), (["rice.safetensors", "child.safetensors"], two, 12),
        (["rice.safetensors", "child.safetensors", "grandchild.safetensors"], three, 8),
        (["dict.pt", "child_of_dict.safetensors"], two, 7), (["wide.safetensors"], wide, 3),
        (["wide_legacy.safetensors"], wide, 3), (["wide.safetensors", "wide_child.safetensors"], wider, 3),
    ]  # fmt: skip


# ---- mutations -------------------------------------------------------------------------------------------------------
def place(data, generator):
    """Half of the time among the first bytes, where the header is."""
    return int(generator.integers(min(len(data), 1500) if generator.random() < 0.5 else len(data)))


def mutate(good, others, generator):
    if generator.random() < 0.4:
        header = 0 if good.startswith(b"PK") else 8 + int.from_bytes(good[:8], "little")
        return overwrite(good, others, generator, header)
    data = bytearray(good)
    while data == good:
        for _ in range(int(generator.integers(1, 5))):
            at, kind = place(data or b"\0", generator), int(generator.integers(8))
            length = int(generator.integers(1, 64))
            if not data or kind == 0:
                data[at:at] = bytes(generator.integers(0, 256, length, dtype=np.uint8))
            elif kind == 1:
                data[at] ^= 1 << int(generator.integers(8))
            elif kind == 2:
                data[at] = int(generator.integers(256))
            elif kind == 3:
                del data[at : at + length]
            elif kind == 4:
                del data[at:]
            elif kind == 5:
                token = TOKENS[int(generator.integers(len(TOKENS)))]
                data[at : at + len(token)] = token
            elif kind == 6:  # a digit of the header, of a shape or an offset
                digits = [i for i, byte in enumerate(data[:3000]) if 48 <= byte <= 57]
                if digits:
                    data[digits[int(generator.integers(len(digits)))]] = 48 + int(generator.integers(10))
            else:
                other = others[int(generator.integers(len(others)))]
                start = place(other, generator)
                piece = other[start : start + 8 * length]
                data[at : at + len(piece) * int(generator.integers(2))] = piece
    return bytes(data)


def overwrite(good, others, generator, header=0):
    """A few bytes changed past the header, the length kept: what gets as far as the decoders."""
    data = bytearray(good)
    while data == good:
        at = int(generator.integers(header, len(data)))
        if generator.random() < 0.5:
            data[at] = int(generator.integers(256))
        elif generator.random() < 0.5:
            data[at] ^= 1 << int(generator.integers(8))
        else:
            other = others[int(generator.integers(len(others)))]
            start = int(generator.integers(len(other)))
            piece = other[start : start + int(generator.integers(1, 100))]
            data[at : at + len(piece)] = piece[: len(data) - at]
    return bytes(data)


# ---- the process that loads ------------------------------------------------------------------------------------------
def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key + ":"))


def main(folder, seed, count):
    folder = Path(folder)
    valid, work = folder / "valid", folder / "work"
    for path in (valid, work):
        path.mkdir()
    torch.set_num_threads(1)
    cases = corpus(valid)
    contents = {path.name: path.read_bytes() for path in sorted(valid.iterdir())}
    weights = np.array([weight for _, _, weight in cases], dtype=float)
    generator = np.random.default_rng(seed)
    fingerprints = [masks.fingerprint for _, masks, _ in cases]
    for files, masks, _ in cases[:7]:  # what is loaded once, and is no part of a file
        assert so.MaskSet.load(valid / files[-1]) == masks
    cases = [files for files, _, _ in cases]
    del masks
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    limit = status("VmSize") + 2 * LARGE // 8 + SLACK
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    found = {"same": 0, "refused": 0, "decoded": 0, "named": 0, "slowest": 0.0}
    for number in range(count):
        case = int(generator.choice(len(cases), p=weights / weights.sum()))
        files = cases[case]
        for file in files:
            (work / file).write_bytes(contents[file])
        victim = files[int(generator.integers(len(files)))]
        (work / victim).write_bytes(mutate(contents[victim], list(contents.values()), generator))
        start = time.process_time()
        try:
            loaded = so.MaskSet.load(work / files[-1])
        except so.FormatError as error:
            found["refused"] += 1
            found["named"] += str(work) in str(error)
            found["decoded"] += "compressed mask" in str(error) or "checksum" in str(error)  # refused by its bits
        else:
            assert loaded.fingerprint == fingerprints[case], f"{number}: {victim} became another mask"
            found["same"] += 1
            del loaded
        found["slowest"] = max(found["slowest"], time.process_time() - start)
        for file in files:
            (work / file).unlink()
    found["growth"] = status("VmHWM") - before
    print(json.dumps(found))


def fuzz(folder, seed, count):
    # -P: a source tree in the working directory must not shadow the installed package.
    command = [sys.executable, "-P", __file__, str(folder), str(seed), str(count)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=540, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    print(found)
    assert found["same"] + found["refused"] == count
    assert found["refused"] > count / 2
    assert found["named"] == found["refused"]
    assert found["decoded"] > count / 10
    assert found["same"] > 0
    assert found["slowest"] < SECONDS
    assert found["growth"] < 2 * LARGE // 8 + SLACK


needs_proc = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")


@needs_proc
def test_500_mutated_files(tmp_path):
    fuzz(tmp_path, 0, 500)


@pytest.mark.slow
@needs_proc
@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_10_000_mutated_files(tmp_path, seed):
    fuzz(tmp_path, seed, 2500)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_archives_with_valid_checksums_and_a_mutated_pickle(tmp_path):
    """What passes the CRCs is read as weights only: refused, or masks of whatever names; never anything run."""
    small(0).save(tmp_path / "good.pt")
    with zipfile.ZipFile(tmp_path / "good.pt") as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    generator = np.random.default_rng(0)
    pickled = next(name for name in parts if name.endswith("data.pkl"))
    full = [content for content in parts.values() if content]
    path = tmp_path / "mutated.pt"
    refused = accepted = 0
    for _ in range(300):
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in parts.items():
                archive.writestr(name, overwrite(content, full, generator) if name == pickled else content)
        try:
            loaded = so.MaskSet.load(path)
        except so.FormatError as error:
            refused += str(path) in str(error)
        else:
            accepted += all(mask.dtype == torch.bool for _, mask in loaded.items())
    assert refused + accepted == 300
    assert refused > 100


def test_valid_files_of_the_corpus(tmp_path):
    for files, masks, _ in corpus(tmp_path):
        assert so.MaskSet.load(tmp_path / files[-1]) == masks
    assert len(load_file(tmp_path / "grandchild.safetensors")) == 2


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
