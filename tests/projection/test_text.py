"""Documents and token blocks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sparseopt.projection.text import ByteTokenizer, batches, documents, token_samples


class Letters:
    """A letter is a token; documents end with 0."""

    eos_token_id = 0

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return [ord(letter) - 96 for letter in text]


def test_blocks_join_documents_and_drop_what_fills_none() -> None:
    samples = list(token_samples(["abc", "de", "fghijk"], Letters(), 4))
    assert [sample.number for sample in samples] == [0, 1, 2]
    assert torch.stack([sample.input_ids for sample in samples]).tolist() == [[1, 2, 3, 0], [4, 5, 0, 6], [7, 8, 9, 10]]
    assert [s.input_ids.tolist() for s in token_samples(["abc", "de", "fghijk"], Letters(), 4, limit=2)] == [
        [1, 2, 3, 0],
        [4, 5, 0, 6],
    ]
    assert [s.input_ids.tolist() for s in token_samples(["abcdefghi"], Letters(), 3, limit=2)] == [[1, 2, 3], [4, 5, 6]]


def test_a_stream_is_not_read_past_the_limit() -> None:
    def endless():
        while True:
            yield "abcd"

    assert len(list(token_samples(endless(), Letters(), 3, limit=5))) == 5


def test_documents_as_samples_are_cut_and_those_without_a_target_left_out() -> None:
    samples = list(token_samples(["abcdef", "g", "", "hi"], Letters(), 4, per_document=True))
    assert [(s.number, s.input_ids.tolist()) for s in samples] == [(0, [1, 2, 3, 4]), (1, [8, 9])]
    groups = list(batches(samples, 2))
    assert groups[0][0] == [0, 1]
    assert groups[0][1].tolist() == [[1, 2, 3, 4], [8, 9, 0, 0]]
    assert groups[0][2].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]


def test_batches_are_consecutive_and_the_last_may_be_short() -> None:
    groups = list(batches(token_samples(["abcdefgh"], Letters(), 2), 3))
    assert [ids for ids, _, _ in groups] == [[0, 1, 2], [3]]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(({"block_size": 1}), "at least 2"), ({"block_size": 100}, "10 tokens, fewer than one block of 100"),
     ({"block_size": 4, "per_document": True}, "no document of two tokens")],
)  # fmt: skip
def test_too_little_text_is_said(arguments: dict, words: str) -> None:
    texts = ["a"] * 5
    with pytest.raises(ValueError, match=words):
        list(token_samples(texts, Letters(), **arguments))


def test_bytes_are_tokens() -> None:
    assert ByteTokenizer().encode("é") == [0xC3, 0xA9]


# ---- sources -----------------------------------------------------------------------------------------------------------
def test_a_folder_is_shuffled_by_the_seed(tmp_path: Path) -> None:
    for i in range(12):
        (tmp_path / "deep").mkdir(exist_ok=True)
        (tmp_path / "deep" / f"{i}.md").write_text(str(i))
    (tmp_path / "image.png").write_bytes(b"no text")
    orders = {}
    for seed in (None, 1, 2):
        found, count = documents(str(tmp_path), seed=seed)
        orders[seed] = list(found)
        assert count == 12
        assert sorted(orders[seed], key=int) == [str(i) for i in range(12)]
    assert orders[1] != orders[2]
    assert orders[1] == list(documents(str(tmp_path), seed=1)[0])


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_tables(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("datasets")
    import pandas

    rows = [{"body": f"text {i}", "n": i} for i in range(20)]
    path = tmp_path / f"rows.{suffix}"
    if suffix == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif suffix == "csv":
        pandas.DataFrame(rows).to_csv(path, index=False)
    else:
        pandas.DataFrame(rows).to_parquet(path)
    assert list(documents(str(path), column="body", seed=None)[0]) == [row["body"] for row in rows]
    shuffled = list(documents(str(path), column="body", seed=3)[0])
    assert shuffled != [row["body"] for row in rows]
    assert sorted(shuffled) == sorted(str(row["body"]) for row in rows)
    with pytest.raises(ValueError, match="no text in a column 'text': there are 'body', 'n'"):
        documents(str(path))


def test_bad_sources_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    (tmp_path / "model.bin").write_bytes(b"x")
    for source, error, words in (
        ("nowhere.txt", FileNotFoundError, "nowhere.txt"),
        ("nowhere.jsonl", FileNotFoundError, "nowhere.jsonl"),
        (str(tmp_path / "empty"), FileNotFoundError, "holds no text"),
        (str(tmp_path / "model.bin"), ValueError, "neither text"),
    ):
        with pytest.raises(error, match=words):
            documents(source)
