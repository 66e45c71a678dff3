"""Uploads beside training: never blocking, never raising, in order, and on disk until they have arrived."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import sparseopt as so
from sparseopt import _hub_spool
from sparseopt import hub as so_hub

REPO = "user/run-masks"
ABOUT = {"tolerance": 1e-5, "beta": 0.99, "epsilon": 1e-8, "timestamp": "2025-01-09T20:00:00Z"}
LONG = 60.0  # a bound that only a test that fails reaches


@pytest.fixture
def mask_file(tmp_path: Path, masks: so.MaskSet) -> Path:
    masks.save(tmp_path / "grad_mask_step_1.safetensors")
    return tmp_path / "grad_mask_step_1.safetensors"


@pytest.fixture
def uploader(hub: Any, tmp_path: Path) -> Iterator[Callable[..., so_hub.Uploader]]:
    made: list[so_hub.Uploader] = []

    def make(repo_id: str | Path = REPO, **options: Any) -> so_hub.Uploader:
        defaults = {"spool_dir": tmp_path / "spool", "base_model": "org/tiny-model", "retries": 3, "backoff": 0.01}
        made.append(so_hub.Uploader(repo_id, **{**defaults, **options}))
        return made[-1]

    yield make
    for one in made:
        one.close()
    hub.released.set()
    for one in made:
        if one._thread is not None:
            one._thread.join(LONG)  # its lock is free again


def entries(folder: Path) -> list[int]:
    return [row["step"] for row in so_hub.pending(folder)]


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


def test_steps_arrive_in_order_one_commit_each(
    hub: Any, uploader: Any, mask_file: Path, masks: so.MaskSet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "sparseopt.hub")
    said: list[str] = []
    up = uploader(say=said.append)
    for step in (10, 20, 30):
        up.submit(step, mask_file, ABOUT)
        mask_file.unlink()  # gone right after, as in a run that keeps the last file only
        masks.save(mask_file)
    assert up.flush(LONG) == []
    commits = hub.repos[REPO].commits[1:]
    assert [c.summary for c in commits] == [f"Upload gradient masks of step {n}" for n in (10, 20, 30)]
    assert commits[0].added == ["README.md", "masks/step_10.safetensors", "metadata/step_10_info.json"]
    assert hub.repos[REPO].private
    assert hub.count("POST", "/api/repos/create") == 1
    info = so_hub.load_mask_metadata_from_hf(REPO, 20)
    assert (info["step"], info["base_model"], info["tolerance"], info["sparsity"]) == (20, "org/tiny-model", 1e-5, None)
    assert so_hub.load_masks_from_hf(REPO, 30) == masks
    assert list((tmp_path / "spool").glob("step_*")) == []
    assert said[3:6] == [
        f"Uploading masks to {REPO}/masks/step_20.safetensors",
        f"Uploading metadata to {REPO}/metadata/step_20_info.json",
        "Successfully uploaded masks for step 20 to HF Hub",
    ]
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_a_hanging_server_delays_nothing(
    hub: Any, uploader: Any, mask_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hub.fail("POST", "", hang=True, times=-1)
    up = uploader()
    up.submit(1, mask_file, ABOUT)
    wait_for(lambda: hub.count("POST", "/api/repos/create"))  # the thread hangs in the server from here on
    delays = []
    for step in range(2, 12):
        start = time.perf_counter()
        up.submit(step, mask_file, ABOUT)
        delays.append(time.perf_counter() - start)
    # 50 ms is the bound; ten times that for a machine that does something else.
    assert min(delays) < 0.05
    assert max(delays) < 0.5
    start = time.monotonic()
    assert up.flush(0.2) == list(range(1, 12))
    assert 0.15 < time.monotonic() - start < 10
    assert f"sparseopt masks push --pending {tmp_path / 'spool'}" in caplog.text
    start = time.monotonic()
    up.close()
    assert time.monotonic() - start < 5
    assert entries(tmp_path / "spool") == list(range(1, 12))


def test_an_attempt_that_hangs_is_left_behind(
    hub: Any, uploader: Any, mask_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hub.fail("POST", "/commit/", hang=True)
    up = uploader(attempt_timeout=0.5)
    up.submit(1, mask_file, ABOUT)
    assert up.flush(LONG) == []
    assert "did not answer in time" in caplog.text
    assert so_hub.list_available_mask_steps(REPO) == [1]


@pytest.mark.parametrize(
    ("method", "path", "status", "options"),
    [
        ("POST", "/commit/", 503, {"times": 2}),
        ("POST", "/commit/", None, {"cut": "before", "times": 2}),
        ("POST", "/commit/", None, {"cut": "after"}),
        ("POST", "/repos/create", 500, {}),
        ("PUT", "/lfs/", None, {"cut": "before", "times": 8}),
        ("POST", "/commit/", 404, {}),  # deleted in between: it is made again
    ],
)
def test_retries(hub: Any, uploader: Any, mask_file: Path, method: str, path: str, status: Any, options: Any) -> None:
    hub.lfs_above = 0
    failure = hub.fail(method, path, status, **options)
    up = uploader()
    up.submit(1, mask_file, ABOUT)
    left = up.flush(LONG)
    if status == 404:
        assert left == [1]
        up.submit(2, mask_file, ABOUT)
        assert up.flush(LONG) == []
        assert so_hub.list_available_mask_steps(REPO) == [1, 2]
        return
    assert left == []
    assert failure.times == 0
    assert len(hub.repos[REPO].commits) == 2


def test_retry_after_is_honoured(hub: Any, uploader: Any, mask_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    hub.fail("POST", "/commit/", 429, headers={"Retry-After": "1"})
    up = uploader()
    start = time.monotonic()
    up.submit(1, mask_file, ABOUT)
    assert up.flush(LONG) == []
    assert time.monotonic() - start >= 1.0
    assert "is rate-limited by the Hub (HTTP 429)" in caplog.text
    assert "Attempt 2 follows in 1.0 s" in caplog.text


def test_what_is_given_up_stays_and_goes_after_the_next_success(
    hub: Any, uploader: Any, mask_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hub.fail("POST", "/commit/", 500, times=2)
    up = uploader(retries=1)
    up.submit(1, mask_file, ABOUT)
    wait_for(lambda: "not uploaded after 2 attempts" in caplog.text)
    assert entries(tmp_path / "spool") == [1]
    up.submit(2, mask_file, ABOUT)
    assert up.flush(LONG) == []
    assert [c.summary[-1] for c in hub.repos[REPO].commits[1:]] in (["2", "1"], ["1", "2"])


@pytest.mark.parametrize(("setup", "text"), [("401", "hf auth login"), ("403", "was refused (403)")])
def test_no_access_is_one_warning_and_no_exception(
    hub: Any, uploader: Any, mask_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, setup: str, text: str
) -> None:
    if setup == "401":
        hub.token = "another"
    else:
        hub.add_repo(REPO)
        hub.read_only.add(REPO)
    up = uploader()
    up.submit(1, mask_file, ABOUT)
    assert up.flush(LONG) == [1]
    warnings = [m for m in caplog.messages if text in m]
    assert len(warnings) == 1
    assert str(tmp_path / "spool") in warnings[0]
    assert entries(tmp_path / "spool") == [1]
    hub.token, hub.read_only = "hf_test_token", set()
    up.submit(2, mask_file, ABOUT)
    assert up.flush(LONG) == []


def test_bad_submissions_are_warnings(
    uploader: Any, mask_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    up = uploader()
    up.submit(1, tmp_path / "none.safetensors", ABOUT)
    up.submit(2, mask_file, {"x": object()})
    up.submit(3, mask_file, {"x": float("nan")})
    up.submit(-4, mask_file, ABOUT)
    (tmp_path / "mask.txt").write_text("x")
    up.submit(5, tmp_path / "mask.txt", ABOUT)
    assert up.flush(1) == []
    up.close()
    up.submit(6, mask_file, ABOUT)
    assert len(caplog.messages) == 6
    for step, message in zip((1, 2, 3, -4, 5, 6), caplog.messages, strict=True):
        assert message.startswith(f"Masks of step {step} are not uploaded: ") or "uploader was closed" in message
    assert list((tmp_path / "spool").glob("step_*")) == []


def test_a_file_against_a_parent_that_others_lack_is_not_uploaded(
    uploader: Any, mask_file: Path, masks: so.MaskSet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (~masks).save(tmp_path / "next.safetensors", compress=True, parent=mask_file)
    up = uploader(tmp_path / "shared")
    up.submit(2, tmp_path / "next.safetensors", ABOUT)
    assert up.flush(LONG) == [2]
    assert "are stored against 'grad_mask_step_1.safetensors'" in caplog.text


def test_invalid_repositories_are_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="neither a local folder nor a valid Hub name"):
        so_hub.Uploader("no such name", spool_dir=tmp_path)


def test_other_file_systems_are_copied_beside_training(
    hub: Any, uploader: Any, mask_file: Path, masks: so.MaskSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", no_links)
    go = threading.Event()
    copy = _hub_spool.finish
    monkeypatch.setattr(_hub_spool, "finish", lambda *args: (go.wait(LONG), copy(*args)))
    up = uploader()
    up.submit(1, mask_file, ABOUT)  # returns although copying has not begun
    mask_file.unlink()
    go.set()
    assert up.flush(LONG) == []
    assert so_hub.load_masks_from_hf(REPO, 1) == masks


@pytest.mark.parametrize("linked", [True, False])
def test_a_full_disk_is_one_warning(
    hub: Any, uploader: Any, mask_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any, linked: bool
) -> None:
    up = uploader()
    free = _hub_spool.MARGIN - 1 if linked else _hub_spool.MARGIN + mask_file.stat().st_size - 1
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: type(usage)(usage.total, usage.used, free))
        if not linked:
            patch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(18, "cross-device")))
        up.submit(1, mask_file, ABOUT)
        up.submit(2, mask_file, ABOUT)
    assert [m for m in caplog.messages if "bytes are free" in m] == [caplog.messages[0]]
    assert list((tmp_path / "spool").glob("step_*")) == []
    up.submit(3, mask_file, ABOUT)
    assert up.flush(LONG) == []
    assert so_hub.list_available_mask_steps(REPO) == [3]


def test_only_the_first_rank_uploads(
    hub: Any, uploader: Any, mask_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    up = uploader()
    up.submit(1, mask_file, ABOUT)
    assert up.flush(LONG) == []
    assert not (tmp_path / "spool").exists()
    monkeypatch.delenv("RANK")
    monkeypatch.setenv("LOCAL_RANK", "2")
    up.submit(2, mask_file, ABOUT)
    assert hub.requests == []
    monkeypatch.setenv("RANK", "0")
    up.submit(3, mask_file, ABOUT)
    assert up.flush(LONG) == []
    assert so_hub.list_available_mask_steps(REPO) == [3]


def test_a_local_folder_is_a_repository_too(uploader: Any, mask_file: Path, tmp_path: Path, masks: so.MaskSet) -> None:
    up = uploader(tmp_path / "shared")
    up.submit(4, mask_file, ABOUT)
    assert up.flush(LONG) == []
    assert so_hub.load_masks_from_hf(tmp_path / "shared", "latest") == masks


RUN = """
import sys, time
from sparseopt.hub import Uploader
up = Uploader({repo!r}, spool_dir={spool!r}, base_model="org/tiny-model", private={private})
for step in (1, 2):
    up.submit(step, {file!r}, {about!r})
print("submitted", flush=True)
time.sleep(600)
"""


def killed_run(hub: Any, spool: Path, mask_file: Path, private: bool = True) -> None:
    """A run whose server hangs, and that is killed without a chance to clean up."""
    hub.fail("POST", "", hang=True, times=-1)
    code = RUN.format(repo=REPO, spool=str(spool), file=str(mask_file), about=ABOUT, private=private)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "submitted\n"
            wait_for(lambda: hub.count("POST", "/api/repos/create"))
            if private:
                with pytest.raises(ValueError, match="is in use"):
                    so_hub.push_pending(spool)
        finally:
            process.send_signal(signal.SIGKILL)
    hub.heal()


def test_a_killed_runs_uploads_are_pushed_later(
    hub: Any, mask_file: Path, tmp_path: Path, masks: so.MaskSet, caplog: pytest.LogCaptureFixture
) -> None:
    spool = tmp_path / "spool"
    killed_run(hub, spool, mask_file)
    assert so_hub.pending(spool) == [
        {"repo_id": REPO, "step": step, "bytes": mask_file.stat().st_size, "private": True} for step in (1, 2)
    ]
    hub.fail("POST", "/commit/", 500)
    assert [row["step"] for row in so_hub.push_pending(spool, backoff=0.01)] == [1, 2]
    assert [c.summary[-1] for c in hub.repos[REPO].commits[1:]] == ["1", "2"]
    assert hub.repos[REPO].private
    assert so_hub.load_masks_from_hf(REPO, 2) == masks
    assert so_hub.load_mask_metadata_from_hf(REPO, 1)["base_model"] == "org/tiny-model"
    assert so_hub.push_pending(spool) == []


def test_the_next_run_takes_over_what_a_killed_one_left(
    hub: Any, uploader: Any, mask_file: Path, tmp_path: Path
) -> None:
    killed_run(hub, tmp_path / "spool", mask_file, private=False)
    up = uploader()
    up.submit(3, mask_file, ABOUT)
    assert up.flush(LONG) == []
    assert [c.summary[-1] for c in hub.repos[REPO].commits[1:]] == ["1", "2", "3"]


def test_damaged_entries_do_not_hold_up_others(hub: Any, uploader: Any, mask_file: Path, tmp_path: Path) -> None:
    spool = tmp_path / "spool"
    hub.fail("POST", "", 400, times=-1)
    up = uploader()
    for step in (1, 2, 3):
        up.submit(step, mask_file, ABOUT)
    assert up.flush(LONG) == [1, 2, 3]
    up.close()
    up._thread.join(LONG)
    hub.heal()
    first, second, _ = sorted(spool.glob("step_*"))
    (first / "mask.safetensors").unlink()
    (first / "mask.safetensors").write_bytes(b"short")
    text = (second / "entry.json").read_text()
    (second / "entry.json").write_text(text.replace('"mask.safetensors"', '"../../secret"'))
    (spool / "step_9-x").mkdir()  # never complete
    assert entries(spool) == [3]
    with pytest.raises(so.FormatError, match="is not a waiting upload"):
        so_hub.push_pending(spool)
    assert so_hub.list_available_mask_steps(REPO) == [3]
    with pytest.raises(FileNotFoundError, match="no spool folder"):
        so_hub.push_pending(tmp_path / "none")


def test_a_process_with_a_hanging_upload_ends(hub: Any, mask_file: Path, tmp_path: Path) -> None:
    hub.fail("POST", "/commit/", hang=True, times=-1)
    code = RUN.format(repo=REPO, spool=str(tmp_path / "spool"), file=str(mask_file), about=ABOUT, private=True)
    code = code.replace("time.sleep(600)", "print(up.flush(0.5)); up.close()")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=LONG, check=False)
    assert (result.returncode, result.stdout) == (0, "submitted\n[1, 2]\n")
    assert "sparseopt masks push --pending" in result.stderr
    assert entries(tmp_path / "spool") == [1, 2]
