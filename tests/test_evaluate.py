"""Evaluation against brute force, TRL's own numbers, and unbatched generation, on a tiny random model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from sparseopt.evaluate import (
    evaluate_preferences,
    greedy_exact_match,
    sequence_logps,
    tokenize_pair,
    wilson_interval,
)

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", pad_token="<|pad|>")
    made.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>", "<|system|>"]})
    made.chat_template = TEMPLATE
    return made


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def _chat(question: str, chosen: str, rejected: str) -> dict[str, Any]:
    return {
        "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": question}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }


CHAT = [
    _chat("abc", "cba", "bca"),
    _chat("a longer question?", "yes", "no, never"),
    _chat("x", "some answer", "y"),
    _chat("xy", "1", "2"),
    _chat("abd", "dba", "bad"),
]
PLAIN = [
    {"prompt": "1 + 1 =", "chosen": " 2", "rejected": " 3"},
    {"prompt": "q", "chosen": "uick", "rejected": "uit<|end|>"},
    {"prompt": "2 + 10 =", "chosen": " 12", "rejected": " 210"},
]


def _brute_force(model: Any, prompt: list[int], answer: list[int]) -> float:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0].double()
    logps = logits.log_softmax(-1)
    return sum(float(logps[len(prompt) + i - 1, token]) for i, token in enumerate(answer))


@pytest.mark.parametrize("pairs", [CHAT, PLAIN, CHAT[:1]], ids=["chat", "plain", "one"])
@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_logps_equal_brute_force(model: Any, tokenizer: Any, pairs: list[dict[str, Any]], batch_size: int) -> None:
    chosen, rejected = sequence_logps(model, tokenizer, pairs, batch_size)
    for i, pair in enumerate(pairs):
        prompt, right, wrong = tokenize_pair(tokenizer, pair)
        assert float(chosen[i]) == pytest.approx(_brute_force(model, prompt, right), abs=1e-3)
        assert float(rejected[i]) == pytest.approx(_brute_force(model, prompt, wrong), abs=1e-3)


@pytest.mark.parametrize("pairs", [CHAT, PLAIN], ids=["chat", "plain"])
def test_tokens_and_logps_equal_trl(model: Any, tokenizer: Any, pairs: list[dict[str, Any]], tmp_path: Path) -> None:
    import copy

    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    args = DPOConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False)
    trainer = DPOTrainer(
        model=copy.deepcopy(model),
        ref_model=copy.deepcopy(model),
        args=args,
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
    )
    rows = list(trainer.train_dataset)
    for pair, row in zip(pairs, rows, strict=True):
        assert tokenize_pair(tokenizer, pair) == (row["prompt_ids"], row["chosen_ids"], row["rejected_ids"])
    theirs = trainer.compute_ref_log_probs(trainer.model, trainer.data_collator(rows))
    # The trainer has replaced its model's forward: evaluation after training must work with that too.
    for mine, their in zip(sequence_logps(trainer.model, tokenizer, pairs), theirs, strict=True):
        torch.testing.assert_close(mine, their.float(), rtol=1e-4, atol=1e-3)


def test_the_reference_scores_exactly_one_half(model: Any, tokenizer: Any) -> None:
    first = evaluate_preferences(model, tokenizer, CHAT, batch_size=2)
    again = evaluate_preferences(
        model, tokenizer, CHAT, 0.1, (first["chosen_logps"], first["rejected_logps"]), batch_size=2
    )
    for result in (first, again):
        assert result["reward_accuracy"] == 0.5
        assert result["margin"] == 0.0
        assert result["n"] == len(CHAT)


def test_accuracy_and_margin_of_known_rewards(model: Any, tokenizer: Any) -> None:
    chosen, rejected = sequence_logps(model, tokenizer, CHAT)
    # Reward differences, before beta: 4, 2, 0 (a tie), -1, 5.
    shifts = torch.tensor([4.0, 2.0, 0.0, -1.0, 5.0])
    result = evaluate_preferences(model, tokenizer, CHAT, 0.5, (chosen - shifts, rejected))
    assert result["reward_accuracy"] == pytest.approx(3.5 / 5)
    assert result["reward_accuracy_ci"] == pytest.approx(wilson_interval(3.5, 5))
    assert result["margin"] == pytest.approx(1.0, abs=1e-5)
    half = 1.959964 * float((0.5 * shifts).std()) / math.sqrt(5)
    assert result["margin_ci"] == pytest.approx((1.0 - half, 1.0 + half), abs=1e-4)


def test_training_mode_is_put_back_and_dropout_is_off(model: Any, tokenizer: Any) -> None:
    model.train()
    try:
        sequence_logps(model, tokenizer, CHAT[:2])
        assert model.training
    finally:
        model.eval()


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_greedy_answers_equal_unbatched_generation(model: Any, tokenizer: Any, batch_size: int) -> None:
    result = greedy_exact_match(model, tokenizer, CHAT, max_new_tokens=9, batch_size=batch_size)
    for pair, answer in zip(CHAT, result["answers"], strict=True):
        prompt = tokenize_pair(tokenizer, pair)[0]
        alone = model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=9, do_sample=False)
        assert answer == tokenizer.decode(alone[0, len(prompt) :], skip_special_tokens=True).strip()


def test_exact_match_counts_right_answers(model: Any, tokenizer: Any) -> None:
    answers = greedy_exact_match(model, tokenizer, CHAT, max_new_tokens=6)["answers"]
    pairs = [_chat(p["prompt"][1]["content"], a, "z") for p, a in zip(CHAT, answers, strict=True)]
    pairs[0]["chosen"][0]["content"] = answers[0] + " not this"
    result = greedy_exact_match(model, tokenizer, pairs, max_new_tokens=6)
    assert result["exact_match"] == pytest.approx(4 / 5)
    # With an entry, the task's own scorer decides.
    entry = {"answer": answers[0], "metadata": {"source_dataset": "word_sequence_reversal"}}
    scored = greedy_exact_match(model, tokenizer, [{**pairs[0], "entry": entry}], max_new_tokens=6)
    assert scored["exact_match"] == 1.0


def test_progress_reaches_the_end(model: Any, tokenizer: Any) -> None:
    seen: list[tuple[int, int]] = []
    sequence_logps(model, tokenizer, CHAT, 2, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(2, 5), (4, 5), (5, 5)]


def test_wilson_interval() -> None:
    assert wilson_interval(50, 100) == pytest.approx((0.40383, 0.59617), abs=1e-5)
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.27753), abs=1e-5)
    assert wilson_interval(10, 10) == pytest.approx((0.72247, 1.0), abs=1e-5)


def test_wrong_arguments(model: Any, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="at least one preference pair"):
        sequence_logps(model, tokenizer, [])
    with pytest.raises(ValueError, match="batch size"):
        greedy_exact_match(model, tokenizer, CHAT, batch_size=0)
    with pytest.raises(ValueError, match="5 pairs, got 2"):
        evaluate_preferences(model, tokenizer, CHAT, reference_logps=(torch.zeros(2), torch.zeros(2)))
