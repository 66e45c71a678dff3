"""ProjectionStore in one process: rows, order of writing, errors, damaged and foreign folders."""

from __future__ import annotations

import errno
import gc
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparseopt import FormatError
from sparseopt.projection import _store_writer
from sparseopt.projection.store import ProjectionStore

DIM = 12


def metadata(dtype: str = "bfloat16", dim: int = DIM, **changes: Any) -> dict[str, Any]:
    layers = [{"name": "mlp.up", "type": "Linear", "original_shape": (8, 4), "k_i": 2, "k_o": 3,
               "slice_start": 0, "slice_end": 6}]  # fmt: skip
    return {"proj_rank_total": 6, "proj_seed": 42, "proj_method": "gaussian", "proj_dtype": dtype,
            "total_proj_dim": dim, "layers": layers, "coverage": {"share": 1 / 3}, **changes}  # fmt: skip


def row(ids: Any, dim: int = DIM, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """What belongs to an id, exact in every dtype."""
    return ((torch.as_tensor(ids)[:, None] * 17 + torch.arange(dim) * 31) % 251).to(dtype)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_rows_come_back_in_any_order(tmp_path: Path, dtype: str) -> None:
    kind = getattr(torch, dtype)
    ids = torch.randperm(50)
    with ProjectionStore(tmp_path / "s", metadata(dtype), shard_rows=16) as store:
        assert (len(store), store.dtype, store.total_dim) == (0, kind, DIM)
        for part in ids.split(7):
            store.write(part, row(part, dtype=kind))
        store.flush()
        assert store.completed.tolist() == list(range(50))
        wanted = [49, 0, 17, 17, 3]
        assert store.rows(wanted).equal(row(wanted, dtype=kind))
    again = ProjectionStore(tmp_path / "s")
    assert again.mode == "r"
    assert again.rows(ids).equal(row(ids, dtype=kind))
    assert again.rows(5).equal(row([5], dtype=kind))
    assert again.done(range(50))
    assert not again.done([3, 50])
    assert again.rows([]).shape == (0, DIM)
    raw = (tmp_path / "s/shards/shard_000001.bin").read_bytes()
    assert raw[: DIM * kind.itemsize] == bytes(row([16], dtype=kind).view(torch.uint8).flatten().tolist())


def test_special_values_keep_their_bits(tmp_path: Path) -> None:
    values = torch.tensor([[float("nan"), float("inf"), -0.0, 1e-40] * 3]).to(torch.bfloat16)
    with ProjectionStore(tmp_path, metadata()) as store:
        store.write([3], values)
    assert ProjectionStore(tmp_path).rows([3]).view(torch.int16).equal(values.view(torch.int16))


def test_huge_ids_take_no_space(tmp_path: Path) -> None:
    ids = [4000, 10**9, 10**12]
    with ProjectionStore(tmp_path, metadata(dim=1000, dtype="float32"), shard_rows=4096) as store:
        store.write(ids, row(ids, 1000, torch.float32))
    store = ProjectionStore(tmp_path)
    assert store.completed.tolist() == ids
    assert store.rows([10**9, 4000]).equal(row([10**9, 4000], 1000, torch.float32))
    files = [path.stat() for path in (tmp_path / "shards").iterdir()]
    assert len(files) == 6
    assert max(file.st_size for file in files) > 16_000_000  # apparent
    assert sum(file.st_blocks * 512 for file in files) < 200_000  # on the disk


def test_blocks_run_through_everything_in_order(tmp_path: Path) -> None:
    ids = [*range(10), *range(30, 47), 100]
    with ProjectionStore(tmp_path, metadata(), shard_rows=8) as store:
        store.write(ids, row(ids))
        store.flush()
        blocks = list(store.blocks(6))
        assert [len(part) for part, _ in blocks] == [6, 6, 6, 6, 4]
        assert torch.cat([part for part, _ in blocks]).tolist() == ids
        assert torch.cat([rows for _, rows in blocks]).equal(row(ids))
        with pytest.raises(ValueError, match="positive"):
            next(store.blocks(0))


def test_the_caller_may_change_rows_at_once(tmp_path: Path) -> None:
    buffer = torch.zeros(4, DIM, dtype=torch.bfloat16)
    with ProjectionStore(tmp_path, metadata()) as store:
        for start in range(0, 40, 4):
            ids = range(start, start + 4)
            buffer.copy_(row(ids))
            store.write(ids, buffer)
            buffer.fill_(float("nan"))
        strided = row(range(40, 44)).T.contiguous().T
        assert not strided.is_contiguous()
        store.write(range(40, 44), strided)
    assert ProjectionStore(tmp_path).rows(range(44)).equal(row(range(44)))


def test_a_store_nobody_closed_is_written(tmp_path: Path) -> None:
    store = ProjectionStore(tmp_path, metadata())
    store.write([1], row([1]))
    del store
    gc.collect()
    assert ProjectionStore(tmp_path).completed.tolist() == [1]


def test_resume_gives_the_same_bytes(tmp_path: Path) -> None:
    def contents(folder: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in [*(folder / "shards").iterdir(), folder / "metadata.json"]}

    with ProjectionStore(tmp_path / "whole", metadata(), shard_rows=16) as store:
        store.write(range(40), row(range(40)))
    with ProjectionStore(tmp_path / "parts", metadata(), shard_rows=16) as store:
        store.write(range(5, 23), row(range(5, 23)))
    with ProjectionStore(tmp_path / "parts", metadata(), shard_rows=999) as store:
        assert store.shard_rows == 16
        missing = [i for i in range(40) if not store.done(i)]
        assert missing == [*range(5), *range(23, 40)]
        store.write(missing, row(missing))
    assert contents(tmp_path / "whole") == contents(tmp_path / "parts")


# ---- the order on the disk -------------------------------------------------------------------------------------------
def test_marks_come_after_an_fsync_of_the_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[tuple[str, str]] = []
    pwrite, fsync = os.pwrite, os.fsync

    def name(number: int) -> str:
        return Path(os.readlink(f"/proc/self/fd/{number}")).suffix

    def watched_write(number: int, data: Any, offset: int) -> int:
        events.append(("write", name(number)))
        return pwrite(number, data[:7], offset)  # short writes on top

    def watched_sync(number: int) -> None:
        events.append(("sync", name(number)))
        fsync(number)

    store = ProjectionStore(tmp_path, metadata())
    monkeypatch.setattr(_store_writer.os, "pwrite", watched_write)
    monkeypatch.setattr(_store_writer.os, "fsync", watched_sync)
    store.write([0, 1, 5], row([0, 1, 5]))
    store.flush()
    assert [e for i, e in enumerate(events) if not i or events[i - 1] != e] == [
        ("sync", ""), ("write", ".bin"), ("sync", ".bin"), ("write", ".done"), ("sync", ".done")]  # fmt: skip
    assert store.rows([5, 1, 0]).equal(row([5, 1, 0]))
    # A finished row is unmarked, for good, before its bytes change.
    events.clear()
    store.write([1], row([8]))
    store.close()
    assert [e for i, e in enumerate(events) if not i or events[i - 1] != e] == [
        ("write", ".done"), ("sync", ".done"), ("write", ".bin"), ("sync", ".bin"), ("write", ".done"),
        ("sync", ".done")]  # fmt: skip
    assert ProjectionStore(tmp_path).rows([0, 1]).equal(row([0, 8]))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_is_told_and_marks_nothing(tmp_path: Path) -> None:
    store = ProjectionStore(tmp_path, metadata(), shard_rows=8)
    store.write(range(8), row(range(8)))
    store.flush()
    (tmp_path / "shards/shard_000001.bin").symlink_to("/dev/full")
    store.write(range(8, 12), row(range(8, 12)))
    with pytest.raises(OSError, match=r"no space left; 4 samples \(8 to 11\) may not be stored") as caught:
        store.flush()
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(OSError, match="no space left"):
        store.write([20], row([20]))
    store.close()  # told already
    (tmp_path / "shards/shard_000001.bin").unlink()
    assert ProjectionStore(tmp_path).completed.tolist() == list(range(8))


def test_an_error_nobody_asked_about_surfaces_at_close(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(number: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    store = ProjectionStore(tmp_path, metadata())
    monkeypatch.setattr(_store_writer.os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output error; sample 2 may"), store:
        store.write([2], row([2]))
    assert len(ProjectionStore(tmp_path)) == 0
    with pytest.raises(ValueError, match="closed"):
        store.write([3], row([3]))


def test_an_error_wakes_a_writer_that_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(_store_writer, "WAITING", 100)
    monkeypatch.setattr(_store_writer.os, "pwrite", broken)
    store = ProjectionStore(tmp_path, metadata())

    def fill() -> None:
        for i in range(1000):
            store.write(range(10 * i, 10 * i + 10), row(range(10)))

    with pytest.raises(OSError, match="no space left"):
        fill()
    store.close()


def test_the_queue_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite, most = os.pwrite, 0
    monkeypatch.setattr(_store_writer, "WAITING", 5 * 2 * DIM)  # five rows

    def watched(number: int, data: Any, offset: int) -> int:
        nonlocal most
        most = max(most, writer._bytes)
        return pwrite(number, data, offset)

    with ProjectionStore(tmp_path, metadata()) as store:
        store.write([], row([]))
        assert store._writer is not None
        writer = store._writer
        monkeypatch.setattr(_store_writer.os, "pwrite", watched)
        for i in range(60):
            store.write([2 * i, 2 * i + 1], row([2 * i, 2 * i + 1]))
    assert 0 < most <= 5 * 2 * DIM
    assert len(ProjectionStore(tmp_path)) == 120


# ---- refused ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("ids", "rows", "error", "message"),
    [
        ([1, 1], row([1, 1]), ValueError, "sample 1 is given twice"),
        ([-1], row([1]), ValueError, "must not be negative, got -1"),
        ([0.5], row([1]), TypeError, "must be integers"),
        ([True], row([1]), TypeError, "must be integers"),
        ([[1]], row([1]), ValueError, "must be a vector"),
        ([1], row([1, 2]), ValueError, r"must be \[1, 12\].* got \[2, 12\]"),
        ([1], row([1])[:, :5], ValueError, r"got \[1, 5\]"),
        ([1], row([1]).float(), ValueError, r"must be torch\.bfloat16.* got torch\.float32"),
        ([1], [[1.0] * DIM], TypeError, "must be a tensor, got list"),
    ],
)
def test_wrong_rows(tmp_path: Path, ids: Any, rows: Any, error: type[Exception], message: str) -> None:
    with ProjectionStore(tmp_path, metadata()) as store:
        with pytest.raises(error, match=message):
            store.write(ids, rows)
        store.write([], torch.empty(0, DIM, dtype=torch.bfloat16))
    assert len(store) == 0


def test_reading_what_is_not_there(tmp_path: Path) -> None:
    with ProjectionStore(tmp_path, metadata(), shard_rows=8) as store:
        store.write([0, 9], row([0, 9]))
    store = ProjectionStore(tmp_path)
    with pytest.raises(ValueError, match="no finished row of sample 8"):
        store.rows([0, 8])
    with pytest.raises(ValueError, match="no finished row of sample 77777"):
        store.rows([77777])
    with pytest.raises(ValueError, match="opened to read"):
        store.write([1], row([1]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"proj_seed": 7}, "proj_seed is 42 there and 7 here"),
        ({"extra": 1}, "extra is missing there"),
        ({"coverage": {"share": 0.5}}, r"coverage\.share is 0\.333\d+ there and 0\.5 here"),
        ({"layers": []}, "layers has 1 entries there and 0 here"),
        ({"layers": [{**metadata()["layers"][0], "k_i": 3}]}, r"layers\[0\]\.k_i is 2 there and 3 here"),
        ({"layers": [{**metadata()["layers"][0], "original_shape": (4, 8)}]}, r"layers\[0\]\.original_shape\[0\] is 8"),
    ],
)
def test_other_metadata_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    ProjectionStore(tmp_path, metadata()).close()
    ProjectionStore(tmp_path, metadata()).close()
    with pytest.raises(ValueError, match=message):
        ProjectionStore(tmp_path, metadata(**change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"total_proj_dim": 0}, "total_proj_dim"),
        ({"total_proj_dim": True}, "total_proj_dim"),
        ({"proj_dtype": "int8"}, "proj_dtype"),
        ({"format": "other"}, "format"),
        ({"layers": {}}, "needs layers, a list"),
        ({"layers": [3]}, "needs layers, a list"),
        ({"layers": [{**metadata()["layers"][0], "name": 3}]}, r"a name in layers\[0\], got 3"),
        ({"layers": [{**metadata()["layers"][0], "slice_end": 13}]}, "slice 0 to 13 for 'mlp.up', of 12 columns"),
        ({"layers": [{**metadata()["layers"][0], "original_shape": None}]}, "needs original_shape"),
        ({"x": float("nan")}, "JSON"),
        ({"x": torch.zeros(1)}, "JSON"),
    ],
)
def test_useless_metadata_makes_no_store(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProjectionStore(tmp_path / "s", metadata(**change))
    assert not (tmp_path / "s").exists()


def test_missing_and_foreign_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        ProjectionStore(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="needs metadata"):
        ProjectionStore(tmp_path / "none", mode="a")
    assert not (tmp_path / "none").exists()
    with pytest.raises(FormatError, match="no metadata"):
        ProjectionStore(tmp_path)
    for text in ("", "[]", "{", "{}", '{"format": "sparseopt.masks"}', "[" * 100_000, '{"layers": []}', "\xff\xfe"):
        (tmp_path / "metadata.json").write_text(text, encoding="latin-1")
        for given in (None, metadata()):
            with pytest.raises(FormatError, match="metadata"):
                ProjectionStore(tmp_path, given)
    with pytest.raises(ValueError, match="mode"):
        ProjectionStore(tmp_path, mode="w")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="shard_rows"):
        ProjectionStore(tmp_path, metadata(), shard_rows=0)


def damage_truncate(folder: Path) -> str:
    os.truncate(folder / "shards/shard_000000.bin", 20)
    return r"shard_000000\.bin' is damaged: row 7 is marked finished and ends at byte 192, but the file has 20 bytes"


def damage_remove(folder: Path) -> str:
    (folder / "shards/shard_000001.bin").unlink()
    return "has 0 bytes"


def damage_marks(folder: Path) -> str:
    (folder / "shards/shard_000001.done").write_bytes(b"\1\2")
    return "0 or 1"


def damage_long_marks(folder: Path) -> str:
    (folder / "shards/shard_000001.done").write_bytes(b"\1" * 9)
    return "at most 8 bytes"


def damage_name(folder: Path) -> str:
    (folder / "shards/shard_0000001.bin").touch()
    return "does not belong to a projection store"


def damage_metadata(folder: Path) -> str:
    (folder / "metadata.json").unlink()
    return "metadata"


def damage_shard_rows(folder: Path) -> str:
    contents = json.loads((folder / "metadata.json").read_text())
    contents["store"]["shard_rows"] = 0
    (folder / "metadata.json").write_text(json.dumps(contents))
    return "shard_rows must be positive"


@pytest.mark.parametrize(
    "damage",
    [damage_truncate, damage_remove, damage_marks, damage_long_marks, damage_name, damage_metadata, damage_shard_rows],
)
def test_damaged_folders(tmp_path: Path, damage: Any) -> None:
    with ProjectionStore(tmp_path, metadata(), shard_rows=8) as store:
        store.write(range(16), row(range(16)))
    message = damage(tmp_path)
    for given in (None, metadata()):
        with pytest.raises(FormatError, match=message):
            ProjectionStore(tmp_path, given)


def test_damage_while_open(tmp_path: Path) -> None:
    with ProjectionStore(tmp_path, metadata(), shard_rows=8) as store:
        store.write(range(16), row(range(16)))
        store.flush()
        os.truncate(tmp_path / "shards/shard_000001.bin", 30)
        with pytest.raises(FormatError, match="damaged"):
            store.rows([15])
        assert store.rows([7]).equal(row([7]))
