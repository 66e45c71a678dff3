"""What a step of :mod:`sparseopt.benchmarks.train_step` trains on: the losses, and micro-batches of random tokens.

Real rows are in :mod:`sparseopt.benchmarks.train_data`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["log_probs", "make_loss", "policy_loss", "preference_loss"]

BETA = 0.1  # of the DPO loss
CLIP_RATIO = 0.2  # of the GRPO loss


def log_probs(model: nn.Module, ids: Tensor, count: int) -> Tensor:
    """Log-probabilities of the last ``count`` tokens of each sequence: int64[rows, length] -> fp32[rows, count]."""
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=count + 1).logits[:, :-1]
    targets = ids[:, -count:]
    return -F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none").view(targets.shape)


def preference_loss(summed: Tensor, reference: Tensor) -> Tensor:
    """DPO's loss: both fp32[2 * pairs], log-probabilities of all chosen answers, then of all rejected ones."""
    chosen, rejected = (summed - reference).chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()


def policy_loss(values: Tensor, advantages: Tensor, inside: Tensor | None = None) -> Tensor:
    """GRPO's clipped-ratio loss, on-policy, as a mean over tokens.

    Args:
        values: fp32[rows, tokens], log-probabilities.
        advantages: fp32[rows, 1].
        inside: bool[rows, tokens], which of them are the completion's; None: all.
    """
    ratio = torch.exp(values - values.detach())
    clipped = ratio.clamp(1 - CLIP_RATIO, 1 + CLIP_RATIO)
    losses = -torch.minimum(ratio * advantages, clipped * advantages)
    return losses.mean() if inside is None else (losses * inside).sum() / inside.sum()


def make_loss(
    workload: str, model: nn.Module, batch: int, sequence: int, accumulation: int, seed: int = 0
) -> list[Callable[[], Tensor]]:
    """The loss of every micro-batch of a step, on random tokens of the model's vocabulary.

    Args:
        workload: "lm": next-token loss. "dpo": ``batch`` pairs, the first half of each sequence their common prompt, against
            reference log-probabilities that are computed here, once. "grpo": clipped-ratio policy gradient on the second
            half of each sequence, on-policy; generation is no part of it.
        model: a causal language model.
        batch: sequences of a micro-batch, or pairs.
        sequence: tokens of a sequence.
        accumulation: micro-batches of a step; their losses are divided by it.
        seed: of tokens and advantages.
    """
    device = next(model.parameters()).device
    config: Any = model.config
    generator = torch.Generator(device).manual_seed(seed)
    completion = sequence // 2

    def tokens() -> Tensor:
        rows = 2 * batch if workload == "dpo" else batch
        ids = torch.randint(config.vocab_size, (rows, sequence), generator=generator, device=device)
        if workload == "dpo":
            ids[batch:, : sequence - completion] = ids[:batch, : sequence - completion]
        return ids

    def language(ids: Tensor) -> Tensor:
        return model(input_ids=ids, labels=ids, use_cache=False).loss / accumulation

    def preference(ids: Tensor, reference: Tensor) -> Tensor:
        return preference_loss(log_probs(model, ids, completion).sum(1), reference) / accumulation

    def policy(ids: Tensor, advantages: Tensor) -> Tensor:
        return policy_loss(log_probs(model, ids, completion), advantages) / accumulation

    losses: list[Callable[[], Tensor]] = []
    for _ in range(accumulation):
        ids = tokens()
        if workload == "lm":
            losses.append(lambda ids=ids: language(ids))  # type: ignore[misc]
        elif workload == "dpo":
            with torch.no_grad():
                reference = log_probs(model, ids, completion).sum(1)
            losses.append(lambda ids=ids, reference=reference: preference(ids, reference))  # type: ignore[misc]
        elif workload == "grpo":
            advantages = torch.randn(batch, 1, generator=generator, device=device)
            losses.append(lambda ids=ids, advantages=advantages: policy(ids, advantages))  # type: ignore[misc]
        else:
            raise ValueError(f"unknown workload {workload!r}: expected lm, dpo or grpo.")
    return losses
