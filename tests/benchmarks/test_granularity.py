"""The price of groups: shares of the score fall with coarser groups, and the table shows measured speeds only."""

from __future__ import annotations

import torch

from sparseopt.benchmarks import granularity


def test_prices_fall_and_are_shares() -> None:
    torch.manual_seed(0)
    scores = torch.rand(64, 256) ** 8
    kept = granularity.prices({"w": scores}, 0.9)
    assert list(kept) == ["1", "8", "16", "32", "row", "column"]
    assert 1 > kept["1"] > kept["8"] > kept["16"] > kept["32"] > kept["row"] > 0.1
    # A mask of single entries keeps the most that any mask of that size can.
    best = scores.view(-1).topk(round(0.1 * scores.numel())).values.sum() / scores.sum()
    assert abs(kept["1"] - float(best)) < 1e-3


def test_table_names_devices_and_says_what_is_missing() -> None:
    text = granularity.table({"1": 0.8, "16": 0.4, "row": 0.2}, {"1": ("some GPU", 5.0), "16": ("some GPU", 18.0)})
    assert "| single entries | 80.0% | 100.0% | 5x (some GPU) |" in text
    assert "| 16 | 40.0% | 50.0% | 18x (some GPU) |" in text
    assert "| rows | 20.0% | 25.0% | not measured |" in text
