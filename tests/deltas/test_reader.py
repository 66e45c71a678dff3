"""LogReader: slices of any step, the chain's checks, and memory that does not grow with the tensors."""

import itertools
import json
import subprocess
import sys
import textwrap

import pytest
import torch

import sparseopt as so
from sparseopt.deltas._file import DeltaFile
from sparseopt.deltas.base import write_base
from sparseopt.deltas.reader import LogReader, list_steps

SHAPES = {"a.weight": (37, 11), "b.weight": (5,), "c.bias": (1, 1), "empty": (0, 4)}


def models(steps, dtype=torch.bfloat16, share=0.3, seed=0):
    """State dicts of the base and of each step; `b.weight` never changes."""
    generator = torch.Generator().manual_seed(seed)
    state = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
    result = {0: state}
    for step in steps:
        state = {name: tensor.clone() for name, tensor in state.items()}
        for name in ("a.weight", "c.bias"):
            where = torch.rand(state[name].shape, generator=generator) < share
            state[name][where] += torch.randn(int(where.sum()), generator=generator).to(dtype) * 0.1
        result[step] = state
    return result


def write(folder, states):
    """A log of these states, from `Delta` alone."""
    base = write_base(folder, states[0], save_base=True)
    steps = sorted(states)
    for before, step in itertools.pairwise(steps):
        entries, shapes = {}, {}
        for name, new in states[step].items():
            where = (new != states[before][name]).view(-1).nonzero().view(-1)
            if name != "b.weight":  # one parameter is in no file at all
                entries[name], shapes[name] = (where, new.reshape(-1)[where]), new.shape
        parent = before if before else None
        delta = so.Delta.from_dict(entries, shapes, step=step, parent_step=parent, base_fingerprint=base.fingerprint)
        delta.save(folder / f"delta_step_{step}.safetensors")
    return states


@pytest.fixture
def log(tmp_path):
    write(tmp_path / "log", models([10, 20, 40]))
    return tmp_path / "log"


@pytest.mark.parametrize("size", [1, 7, 64, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_pieces_are_the_values_at_each_step(tmp_path, size, dtype):
    states = write(tmp_path, models([10, 20, 40], dtype))
    reader = LogReader(tmp_path)
    assert (reader.steps, reader.names) == ([10, 20, 40], list(SHAPES))
    for wanted in ([40], [10, 40], [40, 10, 20], [10]):
        for name, shape in SHAPES.items():
            seen = 0
            for start, base, values in reader.pieces(name, wanted, size):
                assert start == seen
                stop = start + base.numel()
                assert base.numel() <= size
                assert torch.equal(base, states[0][name].view(-1)[start:stop])
                assert len(values) == len(wanted)
                for step, value in zip(wanted, values, strict=True):
                    assert value.dtype == dtype
                    assert torch.equal(value, states[step][name].view(-1)[start:stop])
                seen = stop
            assert seen == torch.Size(shape).numel()


def test_entries_of_any_range_in_any_order(log):
    file = DeltaFile(log / "delta_step_20.safetensors")
    delta = so.Delta.load(log / "delta_step_20.safetensors")
    indices, values = delta.indices("a.weight").long(), delta.values("a.weight")
    for start, stop in [(100, 200), (200, 300), (0, 50), (50, 50), (300, 407), (0, 407), (17, 18), (200, 201)]:
        inside = (indices >= start) & (indices < stop)
        positions, found = file.entries("a.weight", start, stop)
        assert torch.equal(positions, indices[inside] - start)
        assert torch.equal(found, values[inside])
    assert file.count("b.weight") == 0
    assert file.entries("b.weight", 0, 5)[0].numel() == 0
    assert file.changed_parameters == delta.changed_parameters


def test_a_clustered_tensor_needs_more_than_one_read(tmp_path):
    """All changes at one end: the guess from an even spread is far too low."""
    path = tmp_path / "d.safetensors"
    so.Delta.from_dict({"w": (torch.arange(5000), torch.arange(5000.0))}, {"w": (1_000_000,)}, step=1).save(path)
    positions, values = DeltaFile(path).entries("w", 100, 4000)
    assert torch.equal(positions, torch.arange(3900))
    assert torch.equal(values, torch.arange(100.0, 4000.0))


def test_the_callers_base_is_read_and_left_alone(tmp_path):
    states = write(tmp_path, models([10], torch.float32))
    before = {name: tensor.clone() for name, tensor in states[0].items()}
    reader = LogReader(tmp_path, states[0])
    for name in SHAPES:
        for _, base, (value,) in reader.pieces(name, [10]):
            value += 1
            assert torch.equal(base, before[name].view(-1))
    assert all(torch.equal(states[0][name], before[name]) for name in before)
    other = {name: tensor + 1 for name, tensor in states[0].items()}
    with pytest.raises(ValueError, match="another model"):
        LogReader(tmp_path, other)


# ---- what can be wrong -----------------------------------------------------------------------------------------------
def test_missing_step_lists_those_there_are(log):
    with pytest.raises(ValueError, match=r"no step 30; it has steps 10, 20, 40\."):
        LogReader(log).check(30)


def test_no_steps_no_log_no_folder(tmp_path):
    write(tmp_path / "fresh", models([]))
    with pytest.raises(ValueError, match=r"'.*fresh' has no steps yet"):
        LogReader(tmp_path / "fresh").check()
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"'.*empty' holds no delta log: there is no base\.json"):
        LogReader(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match=r"no delta log folder '.*absent'"):
        LogReader(tmp_path / "absent")


def test_gap_in_the_chain(log):
    (log / "delta_step_20.safetensors").unlink()
    reader = LogReader(log)
    assert reader.check(10) == [10]  # what does not depend on it can still be read
    with pytest.raises(ValueError, match=r"gap: step 40 follows step 20, not step 10; it has steps 10, 40\."):
        reader.check()
    with pytest.raises(ValueError, match=r"gap: step 40 follows step 20, not step 10; it has steps 10, 40\."):
        so.DeltaLog(log).chain()
    assert so.DeltaLog(log).chain(10) == [10]
    (log / "delta_step_10.safetensors").unlink()
    with pytest.raises(ValueError, match="gap: step 40 follows step 20, not the base; it has step 40"):
        LogReader(log).check()


def test_delta_of_another_base(log, tmp_path):
    write(tmp_path / "other", models([10, 20], seed=1))
    (tmp_path / "other" / "delta_step_20.safetensors").rename(log / "delta_step_20.safetensors")
    with pytest.raises(ValueError, match=r"delta_step_20.safetensors' is a delta of another base"):
        LogReader(log).check()
    assert LogReader(log).check(10) == [10]


def test_delta_of_other_parameters(log):
    fingerprint = LogReader(log).base.fingerprint
    for shape, dtype, came in [((11, 37), torch.bfloat16, r"bfloat16\[11, 37\]"), ((37, 11), torch.float32, "float32")]:
        entries = {"a.weight": (torch.tensor([0]), torch.ones(1, dtype=dtype))}
        delta = so.Delta.from_dict(entries, {"a.weight": shape}, step=10, base_fingerprint=fingerprint)
        delta.save(log / "delta_step_10.safetensors")
        other = so.DeltaLog(log)
        for check in (LogReader(log).check, other.chain, other.load):
            with pytest.raises(ValueError, match=f"changes 'a.weight' as {came}.*the base has bfloat16"):
                check(10)


def test_renamed_file(log):
    (log / "delta_step_40.safetensors").rename(log / "delta_step_30.safetensors")
    with pytest.raises(so.FormatError, match=r"delta_step_30.safetensors' is damaged or renamed: it holds step 40"):
        LogReader(log).check(30)


def test_every_flipped_byte_is_noticed(log):
    path = log / "delta_step_20.safetensors"
    good = path.read_bytes()
    start = 8 + int.from_bytes(good[:8], "little")
    for position in [0, 9, *range(start, len(good), 5), len(good) - 1]:
        path.write_bytes(good[:position] + bytes([good[position] ^ 0x10]) + good[position + 1 :])
        with pytest.raises(so.FormatError, match="delta_step_20"):
            LogReader(log).check()
    for length in (0, 5, 100, len(good) - 1):
        path.write_bytes(good[:length])
        with pytest.raises(so.FormatError, match="delta_step_20"):
            LogReader(log).check()
    path.write_bytes(good)
    assert LogReader(log).check() == [10, 20, 40]


def test_other_files_in_the_folder_do_not_matter(log):
    for name in ("stats_step_10.json", "delta_step_x.safetensors", ".delta_step_50.safetensors.ab.tmp", "README"):
        (log / name).write_text("x")
    assert list_steps(log) == [10, 20, 40]


def test_memory_is_that_of_a_piece(tmp_path):
    """64 M bf16 entries (128 MB), an eighth of them changed twice (2 x 50 MB of files): read with a few MB."""
    script = """
        import json, sys, torch
        import sparseopt as so
        from sparseopt.deltas.base import write_base
        from sparseopt.deltas.reader import LogReader

        def peak():
            return next(int(l.split()[1]) / 1024 for l in open("/proc/self/status") if l.startswith("VmHWM"))

        folder, stage = sys.argv[1:]
        if stage == "write":
            state = {"w": torch.zeros(1 << 26, dtype=torch.bfloat16)}
            base = write_base(folder, state, save_base=True)
            where = torch.arange(0, 1 << 26, 8, dtype=torch.int32)
            for parent, step in ((None, 1), (1, 2)):
                values = torch.full((where.numel(),), float(step), dtype=torch.bfloat16)
                so.Delta.from_dict({"w": (where, values)}, {"w": (1 << 26,)}, step=step, parent_step=parent,
                                   base_fingerprint=base.fingerprint).save(f"{folder}/delta_step_{step}.safetensors")
        else:
            torch.zeros(1 << 20).float().sum()
            before = peak()
            total = 0
            for _, _, (value,) in LogReader(folder).pieces("w", [2]):
                total += int(value.sum(dtype=torch.float32))
            print(json.dumps({"grown": peak() - before, "total": total}))
    """

    def run(stage):
        command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "log"), stage]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    run("write")
    result = json.loads(run("read"))
    assert result["total"] == 2 * (1 << 23)
    assert 0 < result["grown"] < 80  # MB; the tensor alone has 128, the files 228
