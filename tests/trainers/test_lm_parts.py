"""The parts of ``sparseopt train lm``: text, models, checkpoints, batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_training import settings_of, write_text
from transformers import set_seed

from sparseopt import config, models, schemas
from sparseopt.trainers import lm_checkpoints, lm_data, lm_model
from sparseopt.trainers.lm_settings import split_batch


def settings(folder: Path, **changes: Any) -> dict[str, dict[str, Any]]:
    return config.load_open(schemas.LM, None, settings_of(folder, **changes))[0]


def test_split_batch() -> None:
    assert split_batch(32, 16) == (16, 2)
    assert split_batch(8, 16) == (8, 1)
    assert split_batch(30, 16) == (15, 2)
    assert split_batch(7, 4) == (1, 7)


# ---- text ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "tokens"), [("10M", 10_000_000), ("2.5k", 2500), ("1B", 10**9), ("300", 300), ("small", None), ("", None)]
)
def test_parse_size(text: str, tokens: int | None) -> None:
    assert lm_data.parse_size(text) == tokens


def blocks(folder: Path, length: int = 8, **changes: Any) -> tuple[list[int], list[int]]:
    """Bytes that are trained on and those that are held out."""
    values = settings(folder, **changes)["data"]
    tokenizer = lm_model.byte_tokenizer()
    train, valid = lm_data.load_blocks(lm_data.find_sources(values), values, tokenizer, length)
    return train.tokens.reshape(-1).tolist(), [] if valid is None else valid.tokens.reshape(-1).tolist()


def tokens_of(*texts: str) -> list[int]:
    tokenizer = lm_model.byte_tokenizer()
    return [token for text in texts for token in [*tokenizer(text)["input_ids"], 256]]


def test_a_folder_of_that_size_or_the_first_tokens(tmp_path: Path) -> None:
    place = tmp_path / "data"
    place.mkdir()
    (place / "a.txt").write_text("abcdefghij" * 10)
    data = {"data__dataset_path": place, "data__valid_fraction": 0}
    assert blocks(tmp_path, **data, data__dataset_size="40") == (tokens_of("abcdefghij" * 10)[:40], [])
    assert blocks(tmp_path, **data, data__dataset_size="0.03K")[0] == tokens_of("abcdefghij" * 10)[:24]
    (place / "40").mkdir()
    (place / "40" / "b.md").write_text("0123456789" * 8)
    assert blocks(tmp_path, **data, data__dataset_size="40")[0] == tokens_of("0123456789" * 8)[:80]
    assert blocks(tmp_path, **data, data__dataset_size=None)[0] == tokens_of("0123456789" * 8, "abcdefghij" * 10)[:176]


def test_tables_splits_and_what_is_held_out(tmp_path: Path) -> None:
    rows = [{"text": "first text"}, {"text": "second text"}, {"text": "third"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole = tokens_of(*(row["text"] for row in rows))
    data: dict[str, Any] = {"data__dataset_path": tmp_path / "rows.jsonl", "data__dataset_size": None}
    assert blocks(tmp_path, 4, **data, data__valid_fraction=0.3) == (whole[:20], whole[20:28])
    (tmp_path / "valid.txt").write_text("held out")
    assert blocks(tmp_path, 4, **data, data__eval_path=tmp_path / "valid.txt") == (
        whole[:28],
        tokens_of("held out")[:8],
    )
    corpus = tmp_path / "corpus"
    (corpus / "train").mkdir(parents=True)
    (corpus / "train" / "x.txt").write_text("training")
    (corpus / "y.train").write_text("more of it")
    (corpus / "dev.txt").write_text("validation")
    (corpus / "test.txt").write_text("never seen")
    assert blocks(tmp_path, 4, data__dataset_path=corpus, data__dataset_size=None) == (
        tokens_of("training", "more of it")[:20], tokens_of("validation")[:8]
    )  # fmt: skip


def test_a_large_file_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as is needed, with no token lost between the pieces."""
    text = write_text(tmp_path / "large.txt", 3000).read_text()
    monkeypatch.setattr(lm_data, "PIECE", 1000)
    data: dict[str, Any] = {"data__dataset_path": tmp_path / "large.txt", "data__valid_fraction": 0}
    assert blocks(tmp_path, **data, data__dataset_size=None)[0] == tokens_of(text)[: (len(text) + 1) // 8 * 8]
    pieces: list[int] = []
    real = lm_data._pieces
    monkeypatch.setattr(lm_data, "_pieces", lambda path: (pieces.append(len(p)) or (p, e) for p, e in real(path)))  # type: ignore[func-returns-value]
    assert blocks(tmp_path, **data, data__dataset_size="3K")[0] == tokens_of(text)[:3000]
    assert 3000 <= sum(pieces) < 6000


def test_tokens_of_large_files_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the file, the limit or the tokenizer is another."""
    text = write_text(tmp_path / "large.txt").read_text()
    monkeypatch.setattr(lm_data, "CACHED_BYTES", 1000)
    monkeypatch.setenv("SPARSEOPT_CACHE", str(tmp_path / "cache"))
    runs: list[int | None] = []
    real = lm_data._tokenized
    monkeypatch.setattr(lm_data, "_tokenized", lambda *args: runs.append(args[3]) or real(*args))  # type: ignore[func-returns-value]
    data: dict[str, Any] = {"data__dataset_path": tmp_path / "large.txt", "data__valid_fraction": 0}
    for size, expected, count in (("1K", 1000, 1), ("1K", 1000, 1), ("2K", 2000, 2), ("1K", 1000, 2)):
        assert blocks(tmp_path, **data, data__dataset_size=size)[0] == tokens_of(text)[:expected]
        assert len(runs) == count
    (tmp_path / "large.txt").write_text(text[1:])
    assert blocks(tmp_path, **data, data__dataset_size="1K")[0] == tokens_of(text)[1:1001]
    assert len(runs) == 3
    assert len(list((tmp_path / "cache" / "tokens").glob("*.npy"))) == 3


# ---- models ----------------------------------------------------------------------------------------------------------
def built(folder: Path, **changes: Any) -> Any:
    values = settings(folder, **changes)
    set_seed(values["training"]["seed"])
    return lm_model.build_model(values, lm_model.byte_tokenizer(), own=False)


WIDE = {"model__config": "{n_layer: 2, n_head: 2, n_embd: 128}"}


def test_normal_is_the_models_own_initialization(tmp_path: Path) -> None:
    """GPT-2's: residual projections smaller by the root of twice the layers; init_std scales it all."""
    for std, changes in ((0.02, {}), (0.05, {"initialization__init_std": 0.05})):
        weights = dict(built(tmp_path, **WIDE, **changes).named_parameters())
        assert weights["transformer.h.0.mlp.c_fc.weight"].std().item() == pytest.approx(std, rel=0.03)
        assert weights["transformer.h.0.mlp.c_proj.weight"].std().item() == pytest.approx(std / 2, rel=0.03)
        assert weights["transformer.h.0.ln_1.weight"].eq(1).all()


def test_gaussian_draws_every_matrix_alike(tmp_path: Path) -> None:
    changes = {"run__init_type": "gaussian", "initialization__init_std": 0.01, "initialization__init_mean": 0.1}
    model = built(tmp_path, **WIDE, **changes)
    for name, param in model.named_parameters():
        if param.dim() == 2:
            assert param.std().item() == pytest.approx(0.01, rel=0.05), name
            assert param.mean().item() == pytest.approx(0.1, rel=0.01), name
        else:
            assert param.eq(1.0 if name.endswith("weight") else 0.0).all(), name
    assert model.lm_head.weight is model.transformer.wte.weight
    assert built(tmp_path, **WIDE, run__init_type="gaussian").lm_head.weight.std().item() == pytest.approx(
        0.02, rel=0.03
    )


def test_architectures_and_vocabularies(tmp_path: Path, tiny_folder: Path) -> None:
    """GPT-2 by name alone, another model by its folder, fresh or with its weights."""
    model = built(tmp_path)
    assert (model.config.vocab_size, model.config.n_positions, model.config.resid_pdrop) == (257, 32, 0.1)
    values = settings(tmp_path, model__name=tiny_folder, model__tokenizer=None, model__config="{num_hidden_layers: 1}")
    tokenizer, name = lm_model.load_tokenizer(values["model"])
    assert name == str(tiny_folder)
    fresh = lm_model.build_model(values, tokenizer, own=True)
    assert (fresh.config.num_hidden_layers, fresh.config.vocab_size) == (1, 64)
    assert fresh.config.max_position_embeddings == 32
    values = settings(
        tmp_path, model__name=tiny_folder, model__tokenizer=None, model__config="{}", model__pretrained=True
    )
    loaded = lm_model.build_model(values, tokenizer, own=True)
    expected = models.load_model(str(tiny_folder)).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in loaded.state_dict().items())
    values["model"]["context_length"] = 65
    with pytest.raises(ValueError, match="reads at most 64 tokens"):
        lm_model.build_model(values, tokenizer, own=True)
    values["model"]["context_length"] = 32
    with pytest.raises(ValueError, match="The tokenizer has 257 tokens and the model 64"):
        lm_model.build_model(values, lm_model.byte_tokenizer(), own=False)


def test_the_seeds_gpt2_is_gpt2_small(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = built(tmp_path, model__config="{vocab_size: 50257}", model__context_length=1024)
    assert sum(p.numel() for p in model.parameters()) == 124_439_808


def test_a_fresh_model_takes_another_tokenizer_where_its_own_is_not_to_be_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def unreachable(name: str, revision: str | None = None) -> None:
        asked.append(name)
        raise FileNotFoundError("no network.")

    monkeypatch.setattr(models, "load_tokenizer", unreachable)
    values = settings(tmp_path, model__tokenizer=None)["model"]
    with pytest.warns(UserWarning, match="The tokenizer of 'gpt2' cannot be loaded .no network.: with fresh weights"):
        tokenizer, name = lm_model.load_tokenizer(values)
    assert (len(tokenizer), name) == (257, "bytes")
    assert asked == ["openai-community/gpt2", "smollm2"]
    for changes in ({"pretrained": True}, {"tokenizer": "gpt2"}):
        with pytest.raises(FileNotFoundError):
            lm_model.load_tokenizer(values | changes)


# ---- checkpoints -----------------------------------------------------------------------------------------------------
def make_checkpoints(folder: Path, *steps: int) -> None:
    for step in steps:
        states = folder / f"checkpoint_{step}" / lm_checkpoints.STATES
        states.mkdir(parents=True)
        (states / lm_checkpoints.STATE).write_text("{}")


@pytest.mark.parametrize(
    ("rules", "kept"),
    [
        ((None, None, None), [10, 20, 30, 40, 50]),
        ((2, None, None), [40, 50]),
        ((None, 1, None), [20, 50]),  # the newest stays, to go on from
        ((None, 2, None), [20, 40, 50]),
        ((1, None, 20), [20, 40, 50]),
        ((1, 1, 30), [20, 30, 50]),
    ],
)
def test_retention(tmp_path: Path, rules: tuple[int | None, int | None, int | None], kept: list[int]) -> None:
    make_checkpoints(tmp_path, 10, 20, 30, 40, 50)
    # Evaluated at other steps: a checkpoint is as good as the last evaluation up to it; NaN is no merit.
    losses = {15: 1.0, 25: float("nan"), 35: 2.0, 45: 3.0}
    removed = lm_checkpoints.retain(tmp_path, losses, *rules)
    assert lm_checkpoints.steps_of(tmp_path) == kept
    assert sorted(removed + kept) == [10, 20, 30, 40, 50]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"checkpoint_{step}" for step in kept)


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    make_checkpoints(tmp_path, 5, 40)
    (tmp_path / "checkpoint_50").mkdir()  # without its states
    (tmp_path / "checkpoint_x").mkdir()
    assert lm_checkpoints.newest(tmp_path) == tmp_path / "checkpoint_40"
    assert lm_checkpoints.newest(tmp_path / "nothing") is None
    with pytest.raises(
        FileNotFoundError, match=r"it has no accelerator_states/trainer_state.json; to begin with its weights"
    ):
        lm_checkpoints.states_of(tmp_path / "checkpoint_50")
