"""Held-out evaluation: does the policy prefer the right answers (reward accuracy, margin), and does it still give them?

Reward of an answer y to a prompt x: beta * (log p_policy(y|x) - log p_reference(y|x)), summed over the tokens of y.
Accuracy is the share of pairs whose chosen answer has the higher reward, a tie counting one half: the reference itself
scores exactly 0.5. Pushing the margin can destroy generation, so greedy answers are checked beside it.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "completion_loss",
    "evaluate_preferences",
    "greedy_exact_match",
    "sequence_logps",
    "tokenize_pair",
    "wilson_interval",
]

Pair = dict[str, Any]
Progress = Callable[[int, int], None]

_Z95 = 1.959963984540054  # 97.5% point of the normal distribution


def evaluate_preferences(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    beta: float = 0.1,
    reference_logps: tuple[torch.Tensor, torch.Tensor] | None = None,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measures how well the policy separates chosen from rejected answers.

    Args:
        model: the policy.
        tokenizer: its tokenizer.
        pairs: dicts with "prompt", "chosen", "rejected", as text or as lists of messages.
        beta: the scale of DPO's reward.
        reference_logps: (chosen, rejected) of :func:`sequence_logps` under the reference model, with the same pairs and
            batch size. None: the policy is the reference, and scores 0.5 with margin 0.
        batch_size: pairs per forward pass.
        progress: called with (pairs done, pairs in all).

    Returns:
        reward_accuracy and its 95% Wilson interval reward_accuracy_ci; margin (mean of chosen reward minus rejected
        reward) and its 95% normal interval margin_ci; n; beta; and the log-probabilities chosen_logps and
        rejected_logps, fp32 [n], to serve as reference_logps later.
    """
    chosen, rejected = sequence_logps(model, tokenizer, pairs, batch_size, progress)
    reference = (chosen, rejected) if reference_logps is None else reference_logps
    if any(len(part) != len(pairs) for part in reference):
        raise ValueError(f"Expected reference log-probabilities of {len(pairs)} pairs, got {len(reference[0])}.")
    margins = beta * ((chosen - reference[0]) - (rejected - reference[1])).double()
    n = len(pairs)
    wins = float((margins > 0).sum()) + 0.5 * float((margins == 0).sum())
    mean = float(margins.mean())
    half = _Z95 * float(margins.std()) / math.sqrt(n) if n > 1 else math.inf
    return {
        "reward_accuracy": wins / n,
        "reward_accuracy_ci": wilson_interval(wins, n),
        "margin": mean,
        "margin_ci": (mean - half, mean + half),
        "n": n,
        "beta": beta,
        "chosen_logps": chosen,
        "rejected_logps": rejected,
    }


def sequence_logps(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    batch_size: int = 16,
    progress: Progress | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the summed log-probabilities of chosen and of rejected answers, each fp32 [len(pairs)] on the CPU.

    Tokens are those of TRL's DPOTrainer. What all prompts of a batch begin with (system message, instructions) is
    computed once per batch, and logits only where answers are predicted: with a vocabulary of 49 k they would dominate.
    """
    import torch

    _check(pairs, batch_size)
    encoded = [tokenize_pair(tokenizer, pair) for pair in pairs]
    results = torch.zeros(2, len(pairs))
    done = 0
    with _inference(model):
        for chunk in _by_length([len(prompt) for prompt, _, _ in encoded], batch_size):
            answers = [(encoded[i][0], encoded[i][side]) for side in (1, 2) for i in chunk]
            results[:, chunk] = _answer_logps(model, answers, _pad_id(tokenizer)).cpu().view(2, len(chunk))
            done += len(chunk)
            if progress is not None:
                progress(done, len(pairs))
    return results[0], results[1]


def completion_loss(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Pair],
    batch_size: int = 16,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measures the negative log-likelihood of completions, in nats per token.

    Args:
        model, tokenizer, batch_size, progress: as in :func:`evaluate_preferences`.
        rows: dicts with "prompt" and "completion", as text or as lists of messages.

    Returns:
        loss: over all tokens; loss_ci: its 95% normal interval, from the spread of the rows; tokens; n.
    """
    import torch

    pairs = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": row["completion"]} for row in rows]
    _check(pairs, batch_size)
    encoded = [tokenize_pair(tokenizer, pair)[:2] for pair in pairs]
    logps = torch.zeros(len(rows), dtype=torch.float64)
    done = 0
    with _inference(model):
        for chunk in _by_length([len(prompt) + len(answer) for prompt, answer in encoded], batch_size):
            logps[chunk] = _answer_logps(model, [encoded[i] for i in chunk], _pad_id(tokenizer)).double().cpu()
            done += len(chunk)
            if progress is not None:
                progress(done, len(rows))
    counts = torch.tensor([len(answer) for _, answer in encoded], dtype=torch.float64)
    loss, n = float(-logps.sum() / counts.sum()), len(rows)
    # A ratio of sums: its spread is that of the residuals.
    half = _Z95 * float((-logps - loss * counts).std() / counts.mean()) / math.sqrt(n) if n > 1 else math.inf
    return {"loss": loss, "loss_ci": (loss - half, loss + half), "tokens": int(counts.sum()), "n": n}


def greedy_exact_match(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    max_new_tokens: int | None = None,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Generates greedy answers and counts the right ones.

    Args:
        model, tokenizer, batch_size, progress: as in :func:`evaluate_preferences`.
        pairs: as there; where a pair has an "entry" its reasoning-gym scorer must give 1.0, else the stripped answer
            must equal the chosen one.
        max_new_tokens: per answer; None: the longest chosen answer of the batch and four more. An answer that is cut
            off there is judged as it stands.

    Returns:
        exact_match, its 95% Wilson interval exact_match_ci, n, and answers: the generated texts in the order of pairs.
    """
    from sparseopt.data import score

    _check(pairs, batch_size)
    encoded = [tokenize_pair(tokenizer, pair) for pair in pairs]
    answers = [""] * len(pairs)
    pad, done = _pad_id(tokenizer), 0
    with _inference(model):
        for chunk in _by_length([len(prompt) for prompt, _, _ in encoded], batch_size):
            prompts = [encoded[i][0] for i in chunk]
            shared, cache = _prefill(model, prompts)
            ids, mask = _aligned(prompts, shared, pad, model.device)
            generated = model.generate(  # type: ignore[operator]
                input_ids=ids,
                attention_mask=mask,
                past_key_values=cache,
                max_new_tokens=max_new_tokens or max(len(encoded[i][1]) for i in chunk) + 4,
                do_sample=False,
                pad_token_id=pad,
            )
            for i, row in zip(chunk, generated, strict=True):
                answers[i] = str(tokenizer.decode(row[ids.shape[1] :], skip_special_tokens=True)).strip()
            done += len(chunk)
            if progress is not None:
                progress(done, len(pairs))
    right = sum(
        score(said, pair["entry"]) >= 1.0 if pair.get("entry") else said == _text(pair["chosen"]).strip()
        for said, pair in zip(answers, pairs, strict=True)
    )
    n = len(pairs)
    return {"exact_match": right / n, "exact_match_ci": wilson_interval(right, n), "n": n, "answers": answers}


def wilson_interval(successes: float, n: int) -> tuple[float, float]:
    """Returns the 95% Wilson score interval of a share of ``successes`` in ``n`` trials (halves allowed)."""
    share = successes / n
    centre = (share + _Z95**2 / (2 * n)) / (1 + _Z95**2 / n)
    half = _Z95 * math.sqrt(share * (1 - share) / n + _Z95**2 / (4 * n * n)) / (1 + _Z95**2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def tokenize_pair(tokenizer: PreTrainedTokenizerBase, pair: Pair) -> tuple[list[int], list[int], list[int]]:
    """Returns the token ids of (prompt, chosen, rejected) as TRL's DPOTrainer makes them.

    Conversations go through the chat template with its generation prompt; plain text is tokenised with the prompt in
    front and an end-of-sequence token behind. An answer starts where its tokens and the prompt's part ways.
    """
    prompt, chosen, rejected = pair["prompt"], pair["chosen"], pair["rejected"]
    if isinstance(prompt, str):
        eos = str(tokenizer.eos_token)
        texts = [prompt] + [prompt + (text if text.endswith(eos) else text + eos) for text in (chosen, rejected)]
        head, *full = [list(tokenizer(text)["input_ids"]) for text in texts]
    else:
        head = _chat_ids(tokenizer, prompt, add_generation_prompt=True)
        full = [_chat_ids(tokenizer, [*prompt, *messages]) for messages in (chosen, rejected)]
    start = min(_shared_length(head, ids) for ids in full)
    return head[:start], full[0][start:], full[1][start:]


def _chat_ids(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], **options: Any) -> list[int]:
    encoded: Any = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)
    return list(encoded["input_ids"])


def _text(answer: str | list[dict[str, str]]) -> str:
    return answer if isinstance(answer, str) else answer[-1]["content"]


def _answer_logps(model: PreTrainedModel, rows: list[tuple[list[int], list[int]]], pad: int) -> torch.Tensor:
    """Returns log p(answer | prompt) of each (prompt, answer), fp32 [len(rows)]."""
    import torch
    import torch.nn.functional as F

    shared, cache = _prefill(model, [prompt for prompt, _ in rows])
    ids, mask = _aligned([prompt + answer for prompt, answer in rows], shared, pad, model.device)
    # Token j is predicted at position j - 1: the last `keep` positions hold all that is needed and one too many.
    keep = max(len(answer) for _, answer in rows) + 1
    # Asked of the class: trainers replace `forward` on the instance, and PEFT wraps the model.
    unwrap: Any = getattr(model, "get_base_model", None)
    plain = model if unwrap is None else unwrap()
    options = {"logits_to_keep": keep} if "logits_to_keep" in inspect.signature(type(plain).forward).parameters else {}
    logits = model(
        input_ids=ids[:, shared:],
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, shared:],
        past_key_values=cache,
        use_cache=cache is not None,
        **options,
    ).logits[:, -keep:-1]
    targets = ids[:, ids.shape[1] - keep + 1 :]
    lengths = torch.tensor([len(answer) for _, answer in rows], device=model.device)
    inside = torch.arange(keep - 1, device=model.device) >= keep - 1 - lengths[:, None]  # [rows, keep - 1]
    losses = F.cross_entropy(logits[inside].float(), targets[inside], reduction="none")
    return torch.zeros(inside.shape, device=model.device).masked_scatter_(inside, -losses).sum(1)


def _aligned(
    sequences: list[list[int]], shared: int, pad: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (ids, attention mask), int64 [rows, longest]; padding lies behind the shared beginning: all end alike."""
    import torch

    longest = max(map(len, sequences))
    rows = [s[:shared] + [pad] * (longest - len(s)) + s[shared:] for s in sequences]
    mask = [[1] * shared + [0] * (longest - len(s)) + [1] * (len(s) - shared) for s in sequences]
    return torch.tensor(rows, device=device), torch.tensor(mask, device=device)


def _prefill(model: PreTrainedModel, prompts: list[list[int]]) -> tuple[int, Any]:
    """Returns the length of what all prompts begin with (no whole prompt) and its cache for ``len(prompts)`` rows.

    Or (0, None) where nothing is shared, or where the model's cache cannot be repeated over rows.
    """
    import torch

    shared = min(min(map(len, prompts)) - 1, *(_shared_length(prompts[0], prompt) for prompt in prompts))
    if shared < 1:
        return 0, None
    output = model.base_model(input_ids=torch.tensor([prompts[0][:shared]], device=model.device), use_cache=True)
    cache: Any = getattr(output, "past_key_values", None)
    if not hasattr(cache, "batch_repeat_interleave"):
        return 0, None
    cache.batch_repeat_interleave(len(prompts))
    return shared, cache


def _shared_length(first: list[int], second: list[int]) -> int:
    length = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        length += 1
    return length


def _by_length(lengths: list[int], batch_size: int) -> Iterator[list[int]]:
    """Yields indices in batches of similar length; always the same ones for the same lengths."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)
    return 0  # masked wherever it stands


def _check(pairs: Sequence[Pair], batch_size: int) -> None:
    if not pairs:
        raise ValueError("Expected at least one preference pair, got none.")
    if batch_size < 1:
        raise ValueError(f"Expected a batch size of at least 1, got {batch_size}.")


@contextlib.contextmanager
def _inference(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode without gradients; the model's mode is put back."""
    import torch

    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
