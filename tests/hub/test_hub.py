"""Pushing, listing, loading and pruning masks, on the Hub (the client against a server on loopback) and in folders."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import sparseopt as so
from sparseopt import hub as so_hub

REPO = "user/tiny-model-gradient-masks"


@pytest.fixture(params=["hub", "hf", "folder"])
def place(request: pytest.FixtureRequest, hub: Any, tmp_path: Path) -> str | Path:
    return {"hub": REPO, "hf": f"hf://{REPO}", "folder": tmp_path / "shared"}[request.param]


def test_push_list_load(place: str | Path, masks: so.MaskSet) -> None:
    for step in (1000, 200, 3000):
        so_hub.push_masks(place, masks, step, format="pt" if step == 200 else "safetensors")
    assert so_hub.list_available_mask_steps(place) == [200, 1000, 3000]
    assert so_hub.latest_mask_step(place) == 3000
    for step in (200, 1000, "latest"):
        assert so_hub.load_masks_from_hf(place, step) == masks
    assert so_hub.load_masks_from_hf(place, 1000).metadata["tolerance"] == 1e-5
    info = so_hub.load_mask_metadata_from_hf(place, 200)
    assert list(info)[:10] == ["step", "timestamp", "tolerance", "total_parameters", "active_parameters",
                               "active_fraction", "sparsity", "base_model", "beta", "epsilon"]  # fmt: skip
    assert (info["step"], info["base_model"], info["beta"]) == (200, "org/tiny-model", 0.99)
    assert info["active_fraction"] == masks.density
    assert info["fingerprint"] == masks.fingerprint
    assert info["timestamp"].endswith("Z")


def test_one_commit_a_step_private_with_card(hub: Any, masks: so.MaskSet, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "sparseopt.hub")
    assert so_hub.push_masks(REPO, masks, 1000) == REPO
    so_hub.push_masks(REPO, masks, 2000)
    repo = hub.repos[REPO]
    assert repo.private
    assert [c.added for c in repo.commits[1:]] == [
        ["README.md", f"masks/step_{n}.safetensors", f"metadata/step_{n}_info.json"] for n in (1000, 2000)
    ]
    card = repo.files["README.md"].data.decode()
    assert card.startswith("---\nbase_model: org/tiny-model\nlibrary_name: sparseopt\ntags:\n- sparseopt\n")
    assert f'load_masks_from_hf("{REPO}", 2000)' in card
    assert "| 1000 | `masks/step_1000.safetensors` |" in card
    assert "| tolerance | 1e-05 |" in card
    assert [r.message for r in caplog.records][:3] == [
        f"Uploading masks to {REPO}/masks/step_1000.safetensors",
        f"Uploading metadata to {REPO}/metadata/step_1000_info.json",
        "Successfully uploaded masks for step 1000 to HF Hub",
    ]


@pytest.mark.parametrize("lfs_above", [0, 1 << 20])
def test_small_and_large_file_paths(hub: Any, masks: so.MaskSet, lfs_above: int) -> None:
    hub.lfs_above = lfs_above
    so_hub.push_masks(REPO, masks, 5)
    stored = hub.repos[REPO].files["masks/step_5.safetensors"]
    assert stored.lfs == (lfs_above == 0)
    assert hub.count("PUT", "/lfs/") == (1 if stored.lfs else 0)
    assert so_hub.load_masks_from_hf(REPO, 5) == masks


def test_public_and_the_warning_about_it(hub: Any, masks: so.MaskSet, caplog: pytest.LogCaptureFixture) -> None:
    so_hub.push_masks(REPO, masks, 1, private=False)
    assert not hub.repos[REPO].private
    assert "public" not in caplog.text
    so_hub.push_masks(REPO, masks, 2)  # 409: it exists, and stays public
    assert f"{REPO} exists and is public" in caplog.text
    assert so_hub.list_available_mask_steps(REPO) == [1, 2]


def test_the_default_name_comes_from_the_base_model(hub: Any, masks: so.MaskSet) -> None:
    assert so_hub.push_masks(None, masks, 1) == "user/tiny-model-gradient-masks"
    assert so_hub.push_masks(None, {"w": torch.ones(3, dtype=torch.bool)}, 1, base_model="/data/my model") == (
        "user/my-model-gradient-masks"
    )
    files = hub.repos["user/my-model-gradient-masks"].files
    # A folder's path stays here; the Hub would refuse it as base_model.
    assert b"/data" not in b"".join(file.data for file in files.values())
    assert b"base_model: " not in files["README.md"].data
    with pytest.raises(ValueError, match="pass repo_id"):
        so_hub.push_masks(None, {"w": torch.ones(3, dtype=torch.bool)}, 1)


def test_pushing_again_changes_nothing_and_another_format_replaces(hub: Any, masks: so.MaskSet) -> None:
    fixed = masks.with_metadata(timestamp="2025-01-09T20:00:00Z")
    so_hub.push_masks(REPO, fixed, 1, format="pt")
    so_hub.push_masks(REPO, fixed, 1, format="pt")
    assert len(hub.repos[REPO].commits) == 2
    so_hub.push_masks(REPO, ~masks, 1)
    assert [path for path in hub.repos[REPO].files if path.startswith("masks/")] == ["masks/step_1.safetensors"]
    assert so_hub.load_masks_from_hf(REPO, 1) == ~masks


def test_what_people_wrote_into_the_card_stays(hub: Any, masks: so.MaskSet) -> None:
    so_hub.push_masks(REPO, masks, 1)
    card = hub.repos[REPO].files["README.md"]
    card.data = card.data.replace(b"license", b"") + b"\nOur notes.\n"
    so_hub.push_masks(REPO, masks, 2)
    text = hub.repos[REPO].files["README.md"].data.decode()
    assert text.endswith("\nOur notes.\n")
    assert "## Step 2" in text
    assert "## Step 1" not in text
    hub.add_repo("user/other", {"README.md": b"# Mine\n"})
    so_hub.push_masks("user/other", masks, 1)
    assert hub.repos["user/other"].files["README.md"].data == b"# Mine\n"


def test_a_late_step_leaves_the_card_to_the_last(hub: Any, masks: so.MaskSet) -> None:
    so_hub.push_masks(REPO, masks, 20)
    so_hub.push_masks(REPO, masks.with_metadata(tolerance=0.5), 10)
    text = hub.repos[REPO].files["README.md"].data.decode()
    assert "## Step 20" in text
    assert "| tolerance | 1e-05 |" in text


def test_revision_cache_and_offline(hub: Any, masks: so.MaskSet, tmp_path: Path) -> None:
    so_hub.push_masks(REPO, masks, 1)
    first = hub.repos[REPO].commits[-1].oid
    so_hub.push_masks(REPO, ~masks, 1)
    assert so_hub.load_masks_from_hf(REPO, 1) == ~masks
    assert so_hub.load_masks_from_hf(REPO, 1, revision=first) == masks
    assert so_hub.load_masks_from_hf(f"hf://{REPO}@{first}", 1) == masks
    cache = tmp_path / "my-cache"
    so_hub.load_masks_from_hf(REPO, 1, cache_dir=cache)
    assert list(cache.rglob("step_1.safetensors"))
    gets = hub.count("GET", "resolve/.*/masks")
    so_hub.load_masks_from_hf(REPO, 1, cache_dir=cache)
    assert hub.count("GET", "resolve/.*/masks") == gets
    hub.fail("HEAD", "", cut="before", times=-1)
    hub.fail("GET", "", cut="before", times=-1)
    assert so_hub.load_masks_from_hf(REPO, 1, revision=first) == masks
    with pytest.raises(ConnectionError, match="cannot be reached"):
        so_hub.list_available_mask_steps(REPO)


def test_downloads_cut_in_the_middle_are_resumed(hub: Any, masks: so.MaskSet) -> None:
    so_hub.push_masks(REPO, masks, 1, compress=False)
    hub.fail("GET", "resolve/.*/masks", cut="body")
    assert so_hub.load_masks_from_hf(REPO, 1) == masks


def test_only_names_of_the_layout_count(hub: Any, masks: so.MaskSet) -> None:
    hub.page = 3  # several pages
    odd = ["masks/step_1.safetensors.bak", "masks/../step_2.pt", "masks/step_03.pt", "masks/step_-4.pt", "step_5.pt",
           "masks/step_٦.pt", "masks/sub/step_7.pt", "masks/step_99999999999999999999.pt", "masks/step_8.pt\n"]  # fmt: skip
    hub.add_repo(REPO, dict.fromkeys(odd, b"x"))
    assert so_hub.list_available_mask_steps(REPO) == []
    with pytest.raises(FileNotFoundError, match="holds no masks"):
        so_hub.latest_mask_step(REPO)
    so_hub.push_masks(REPO, masks, 8)
    assert so_hub.list_available_mask_steps(REPO) == [8]


def test_damaged_files_are_refused(hub: Any, masks: so.MaskSet) -> None:
    hub.add_repo(
        REPO, {"masks/step_1.safetensors": b"\x08" * 300, "masks/step_2.pt": b"PK\x03\x04" + bytes(300),
               "metadata/step_1_info.json": b"[1]", "metadata/step_2_info.json": b"{" }
    )  # fmt: skip
    for step in (1, 2):
        with pytest.raises(so.FormatError, match=f"step_{step}"):
            so_hub.load_masks_from_hf(REPO, step)
        with pytest.raises(so.FormatError, match=f"step_{step}_info.json"):
            so_hub.load_mask_metadata_from_hf(REPO, step)


def test_prune_is_one_commit(place: str | Path, hub: Any, masks: so.MaskSet) -> None:
    for step in (1, 2, 3, 10):
        so_hub.push_masks(place, masks, step)
    before = so_hub.mask_report(place)
    assert [row["step"] for row in before["steps"]] == [1, 2, 3, 10]
    assert before["steps"][0]["files"] == ["masks/step_1.safetensors", "metadata/step_1_info.json"]
    assert before["bytes"] == sum(row["bytes"] for row in before["steps"]) > 0
    expected = {"deleted": [1, 2], "kept": [3, 10], "bytes": sum(row["bytes"] for row in before["steps"][:2])}
    assert so_hub.prune_masks(place, 2, dry_run=True) == expected
    assert so_hub.list_available_mask_steps(place) == [1, 2, 3, 10]
    assert so_hub.prune_masks(place, 2) == expected
    assert so_hub.mask_report(place)["bytes"] == before["bytes"] - expected["bytes"]
    assert so_hub.prune_masks(place, 2) == {"deleted": [], "kept": [3, 10], "bytes": 0}
    with pytest.raises(ValueError, match="at least 1"):
        so_hub.prune_masks(place, 0)
    if REPO in hub.repos:
        assert len(hub.repos[REPO].commits) == 6
        assert "step_2." not in hub.repos[REPO].files["README.md"].data.decode()


def test_differences_are_pushed_loaded_and_kept(place: str | Path, hub: Any, masks: so.MaskSet) -> None:
    def flipped(name: str) -> so.MaskSet:
        bits = masks[name].clone()
        bits.view(-1)[:2] ^= True
        return so.MaskSet.from_bool({**dict(masks.items()), name: bits})

    second, third = flipped("model.layers.0.w"), flipped("model.layers.1.b")
    so_hub.push_masks(place, masks, 1)
    so_hub.push_masks(place, ~masks, 2)
    so_hub.push_masks(place, second, 3, parent_step=1)
    so_hub.push_masks(place, third, 4, parent_step=3)
    assert so_hub.load_mask_metadata_from_hf(place, 4)["parent_step"] == 3
    so_hub.push_masks(place, masks, 5, format="pt")  # what was fetched before lies in another snapshot
    assert so_hub.load_masks_from_hf(place, 4) == third
    assert so_hub.load_masks_from_hf(place, 3) == second
    assert so_hub.prune_masks(place, 2)["kept"] == [1, 3, 4, 5]
    assert so_hub.load_masks_from_hf(place, 4) == third
    with pytest.raises(FileNotFoundError, match="no masks of step 2"):
        so_hub.push_masks(place, masks, 6, parent_step=2)
    with pytest.raises(ValueError, match="against itself"):
        so_hub.push_masks(place, masks, 3, parent_step=3)


def test_a_parent_that_is_gone_is_an_error(hub: Any, masks: so.MaskSet, tmp_path: Path) -> None:
    so_hub.push_masks(tmp_path, masks, 1)
    so_hub.push_masks(tmp_path, ~masks, 2, parent_step=1)
    (tmp_path / "masks" / "step_1.safetensors").unlink()
    with pytest.raises(so.FormatError, match=r"step_1\.safetensors"):
        so_hub.load_masks_from_hf(tmp_path, 2)


@pytest.mark.parametrize("target", [REPO, "folder"])
def test_push_delta(hub: Any, tmp_path: Path, target: str) -> None:
    delta = so.Delta.from_dict({"w": (torch.tensor([1, 5]), torch.tensor([0.5, -2.0]))}, {"w": (8,)}, step=30)
    delta.save(tmp_path / "d.safetensors")
    place = tmp_path / "shared" if target == "folder" else target
    so_hub.push_delta(place, tmp_path / "d.safetensors", base_model="org/tiny-model")
    so_hub.push_delta(place, so.Delta.from_dict({}, {}, step=40), base_model="org/tiny-model")
    if target == "folder":
        assert so.Delta.load(tmp_path / "shared" / "delta_step_30.safetensors") == delta
        card = (tmp_path / "shared" / "README.md").read_text()
    else:
        commit = hub.repos[REPO].commits[1]
        assert commit.added == ["README.md", "delta_step_30.safetensors"]
        (tmp_path / "copy.safetensors").write_bytes(commit.files["delta_step_30.safetensors"].data)
        assert so.Delta.load(tmp_path / "copy.safetensors") == delta
        assert hub.repos[REPO].private
        card = hub.repos[REPO].files["README.md"].data.decode()
    assert card.startswith("---\nbase_model: org/tiny-model\n")
    assert "delta_step_40.safetensors" in card
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    with pytest.raises(so.FormatError):
        so_hub.push_delta(place, tmp_path / "bad.safetensors", base_model="org/tiny-model")


# ---- errors: one sentence each ---------------------------------------------------------------------------------------
def test_nobody_logged_in(hub: Any, masks: so.MaskSet, monkeypatch: pytest.MonkeyPatch) -> None:
    so_hub.push_masks(REPO, masks, 1)
    monkeypatch.delenv("HF_TOKEN")
    for call in (
        lambda: so_hub.push_masks(REPO, masks, 2),
        lambda: so_hub.list_available_mask_steps(REPO),
        lambda: so_hub.load_masks_from_hf(REPO, 1, cache_dir=Path("/nonexistent/cache")),
    ):
        with pytest.raises(PermissionError, match=r"\(401\): log in with `hf auth login`") as error:
            call()
        assert len(str(error.value).splitlines()) == 1


def test_forbidden_missing_and_invalid(hub: Any, masks: so.MaskSet) -> None:
    hub.add_repo(REPO)
    hub.read_only.add(REPO)
    with pytest.raises(PermissionError, match=r"\(403\): log in with `hf auth login`"):
        so_hub.push_masks(REPO, masks, 1)
    with pytest.raises(PermissionError, match=r"\(403\)"):
        so_hub.push_masks("stranger/masks", masks, 1)
    with pytest.raises(FileNotFoundError, match=r"'user/none' is not on the Hub \(404\)"):
        so_hub.list_available_mask_steps("user/none")
    with pytest.raises(FileNotFoundError, match="no such revision"):
        so_hub.list_available_mask_steps(REPO, revision="v9")
    with pytest.raises(FileNotFoundError, match="no masks of step 3; it has none"):
        so_hub.load_masks_from_hf(REPO, 3)
    with pytest.raises(FileNotFoundError, match="no masks of step 3; it has none"):
        so_hub.load_mask_metadata_from_hf(REPO, 3)


@pytest.mark.parametrize(
    "name",
    ["", "a b", "user/a--b", "user/..", "user/name.git", "naïve/x", "hf://a/b/c", "hf://datasets/a/b", "hf://a/b@"],
)
def test_invalid_names(name: str) -> None:
    with pytest.raises(ValueError):
        so_hub.list_available_mask_steps(name)


@pytest.mark.parametrize(("step", "error"), [(-1, ValueError), (10**20, ValueError), ("../1", TypeError), (True, TypeError),
                                             (1.0, TypeError)])  # fmt: skip
def test_invalid_steps(step: Any, error: type[Exception], masks: so.MaskSet, tmp_path: Path) -> None:
    with pytest.raises(error, match="step must"):
        so_hub.push_masks(tmp_path, masks, step)
    with pytest.raises(error, match="step must"):
        so_hub.load_masks_from_hf(tmp_path, step)


def test_missing_folders_and_offline_mode(hub: Any, masks: so.MaskSet, tmp_path: Path, monkeypatch: Any) -> None:
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        so_hub.list_available_mask_steps(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        so_hub.load_masks_from_hf("./none/at/all", 1)
    with pytest.raises(ValueError, match="no revisions"):
        so_hub.load_masks_from_hf(tmp_path, 1, revision="main")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="offline mode is on"):
        so_hub.push_masks(REPO, masks, 1, retries=0)
    assert hub.requests == []


# ---- failures that pass ----------------------------------------------------------------------------------------------
FAILURES = {
    "create 500": ("POST", "repos/create", 500, {}),
    "create cut": ("POST", "repos/create", None, {"cut": "after"}),
    "info cut": ("GET", r"api/models/user/[^/]+$", None, {"cut": "before"}),
    "tree 503": ("GET", "/tree/", 503, {"times": 8}),
    "preupload 502": ("POST", "/preupload/", 502, {"times": 8}),
    "lfs 500": ("PUT", "/lfs/", 500, {"times": 8}),
    "lfs cut": ("PUT", "/lfs/", None, {"cut": "before", "times": 8}),
    "commit 500": ("POST", "/commit/", 500, {}),
    "commit 409": ("POST", "/commit/", 409, {}),
    "commit 429": ("POST", "/commit/", 429, {"headers": {"Retry-After": "0"}}),
    "commit cut before": ("POST", "/commit/", None, {"cut": "before"}),
    "commit cut after": ("POST", "/commit/", None, {"cut": "after"}),
    "card slow": ("POST", "/validate-yaml", None, {"slow": 0.2}),
}


@pytest.mark.parametrize("name", FAILURES)
def test_push_is_tried_again_and_stays_one_commit(hub: Any, masks: so.MaskSet, name: str) -> None:
    method, path, status, options = FAILURES[name]
    hub.lfs_above = 0
    failure = hub.fail(method, path, status, **options)
    so_hub.push_masks(REPO, masks, 1, backoff=0.01)
    assert failure.times == 0
    assert len(hub.repos[REPO].commits) == 2  # the repository's own, and one for the step
    assert so_hub.load_masks_from_hf(REPO, 1) == masks


def test_gives_up_with_one_sentence(hub: Any, masks: so.MaskSet) -> None:
    hub.fail("POST", "/commit/", 500, times=-1)
    with pytest.raises(ConnectionError, match=r"could not be handled by the Hub \(HTTP 500\)"):
        so_hub.push_masks(REPO, masks, 1, retries=2, backoff=0.01)
    assert hub.count("POST", "/commit/") == 3


def test_what_the_server_refuses_is_quoted(hub: Any, masks: so.MaskSet) -> None:
    hub.fail("POST", "/commit/", 413)
    with pytest.raises(ValueError, match=r"refused the request for '.*' \(HTTP 413\): injected"):
        so_hub.push_masks(REPO, masks, 1, retries=0)


def test_import_is_lean() -> None:
    code = (
        "import sys, json, sparseopt.hub\n"
        "print(json.dumps([m for m in ('torch', 'numpy', 'huggingface_hub', 'filelock') if m in sys.modules]))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert json.loads(result.stdout) == []
