"""Training and evaluating one arm of :mod:`sparseopt.benchmarks.study`, on one base model that is loaded once a dtype.

Loss of a batch: mean over its pairs of -log sigmoid(beta * ((log p(c) - log r(c)) - (log p(d) - log r(d)))) for chosen c,
rejected d, policy p and reference r; plus ``sft_weight`` times the mean negative log-likelihood per chosen token. The
reference's log-probabilities are computed once per dtype; sequences are padded on the right to one length, so that causal
attention needs no padding mask and a forward and backward pass fits one CUDA graph.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparseopt as so
from sparseopt import evaluate, models
from sparseopt.masks.granularity import Granularity

__all__ = ["Arm", "Encoded", "Study", "encode"]

WARM_UP_CALLS = 3  # before a CUDA graph is captured
METRICS = ("reward_accuracy", "reward_accuracy_ci", "margin", "margin_ci", "n")


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        name: as the report shows it.
        kind: "dense" (torch's AdamW), "lora" (PEFT, every linear layer, AdamW), or "sparse" (SparseAdamW).
        dtype: of the model's weights.
        rates: learning rates of the grid, ascending.
        sparsity, granularity: of a sparse arm's mask.
    """

    name: str
    kind: str
    dtype: torch.dtype
    rates: tuple[float, ...]
    sparsity: float = 0.0
    granularity: Granularity = 1


@dataclass(frozen=True)
class Encoded:
    """n pairs as tensors; side 0 is chosen, side 1 rejected; A is the longest answer, T the padded length.

    Attributes:
        ids: int64[n, 2, T], padded on the right.
        where: int64[n, 2, A], the position whose logits predict each answer token.
        targets: int64[n, 2, A], the answer tokens.
        inside: bool[n, 2, A], which of those are real.
    """

    ids: Tensor
    where: Tensor
    targets: Tensor
    inside: Tensor

    def take(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The tensors of some pairs, both sides one after the other: leading dimension 2 x len(rows)."""
        parts = (self.ids[rows], self.where[rows], self.targets[rows], self.inside[rows])
        a, b, c, d = (part.flatten(0, 1) for part in parts)
        return a, b, c, d

    def __len__(self) -> int:
        return len(self.ids)


def encode(tokenizer: Any, pairs: Sequence[dict[str, Any]], device: torch.device) -> Encoded:
    """Pairs as tensors, with the tokens of TRL's DPOTrainer (:func:`sparseopt.evaluate.tokenize_pair`)."""
    tokens = [evaluate.tokenize_pair(tokenizer, pair) for pair in pairs]
    length = max(len(prompt) + max(len(chosen), len(rejected)) for prompt, chosen, rejected in tokens)
    answer = max(max(len(chosen), len(rejected)) for _, chosen, rejected in tokens)
    length += -length % 8
    ids = torch.full((len(pairs), 2, length), tokenizer.pad_token_id or 0)
    where, targets = torch.zeros(2, len(pairs), 2, answer, dtype=torch.int64)
    inside = torch.zeros(len(pairs), 2, answer, dtype=torch.bool)
    for i, (prompt, *answers) in enumerate(tokens):
        for side, said in enumerate(answers):
            ids[i, side, : len(prompt) + len(said)] = torch.tensor(prompt + said)
            where[i, side, : len(said)] = torch.arange(len(prompt) - 1, len(prompt) - 1 + len(said))
            targets[i, side, : len(said)] = torch.tensor(said)
            inside[i, side, : len(said)] = True
    return Encoded(ids.to(device), where.to(device), targets.to(device), inside.to(device))


def answer_logps(model: Any, ids: Tensor, where: Tensor, targets: Tensor, inside: Tensor) -> Tensor:
    """Summed log-probabilities of answers, fp32[R]; logits are computed only where answer tokens are predicted."""
    length = ids.shape[1]
    # A mask that is ready: transformers' own preparation would wait for the device, which a CUDA graph cannot hold.
    causal = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()[None, None]
    hidden = model.base_model(input_ids=ids, attention_mask=causal, use_cache=False).last_hidden_state
    picked = hidden.gather(1, where[..., None].expand(-1, -1, hidden.shape[-1]))
    logits = model.get_output_embeddings()(picked).float()
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
    return -(losses * inside).sum(1)


@dataclass
class Base:
    """The model before training, in one dtype: what it is restored from, and the reference's log-probabilities."""

    model: Any
    weights: dict[str, Tensor]
    train: Tensor  # fp32[n, 2]
    evaluation: dict[str, tuple[Tensor, Tensor]]


class Study:
    """One base model, its pairs, and everything that runs of all arms share.

    Args:
        model_name: as :func:`sparseopt.models.load_model` takes it.
        pairs: "train", "validation" and "held_out".
        settings: ``steps``, ``batch_size``, ``beta``, ``sft_weight``, ``warmup``, ``max_grad_norm``, ``mask_batches``,
            ``rank``, ``lora_alpha``.
        device: where everything runs.
        graphs: capture forward and backward in a CUDA graph.
    """

    def __init__(
        self,
        model_name: str,
        pairs: dict[str, list[dict[str, Any]]],
        settings: dict[str, Any],
        device: torch.device,
        *,
        graphs: bool = False,
        evaluation_batch: int = 200,
    ) -> None:
        self.model_name, self.pairs, self.settings, self.device, self.graphs = (
            model_name, pairs, settings, device, graphs,
        )  # fmt: skip
        self.evaluation_batch = evaluation_batch
        self.tokenizer = models.load_tokenizer(model_name)
        self.train = encode(self.tokenizer, pairs["train"], device)
        needed = settings["steps"] * settings["batch_size"]
        if needed > len(self.train):
            raise ValueError(f"{needed} pairs are needed for one pass of training, there are {len(self.train)}.")
        self._bases: dict[torch.dtype, Base] = {}
        self._scores: tuple[tuple[torch.dtype, int], dict[str, Tensor]] | None = None
        self._masks: dict[tuple[Any, ...], so.MaskSet] = {}

    # ---- the base model ----------------------------------------------------------------------------------------------
    def base(self, dtype: torch.dtype) -> Base:
        """The base in ``dtype``; loaded, and its references computed, at the first call."""
        if dtype not in self._bases:
            model: Any = models.load_model(self.model_name, dtype, self.device)
            weights = {name: p.detach().clone() for name, p in model.named_parameters()}
            with torch.no_grad():
                train = torch.cat([
                    answer_logps(model, *self.train.take(rows)).view(-1, 2)
                    for rows in torch.arange(len(self.train), device=self.device).split(64)
                ])  # fmt: skip
            logps = {
                split: evaluate.sequence_logps(model, self.tokenizer, self.pairs[split], self.evaluation_batch)
                for split in ("validation", "held_out")
            }
            self._bases[dtype] = Base(model, weights, train, logps)
        return self._bases[dtype]

    def restored(self, dtype: torch.dtype) -> Any:
        """The base model with its own weights, all of them trainable and without gradients."""
        base = self.base(dtype)
        with torch.no_grad():
            for name, param in base.model.named_parameters():
                param.copy_(base.weights[name])
                param.grad = None
                param.requires_grad_(True)
        return base.model

    def evaluate(self, model: Any, dtype: torch.dtype, split: str) -> dict[str, Any]:
        """Reward accuracy, margin and greedy exact match on the pairs of a split, with 95% intervals."""
        pairs, batch = self.pairs[split], self.evaluation_batch
        found = evaluate.evaluate_preferences(
            model, self.tokenizer, pairs, self.settings["beta"], self.base(dtype).evaluation[split], batch
        )
        greedy = evaluate.greedy_exact_match(model, self.tokenizer, pairs, batch_size=batch)
        return {
            **{name: found[name] for name in METRICS},
            "exact_match": greedy["exact_match"],
            "exact_match_ci": greedy["exact_match_ci"],
            "answers": greedy["answers"][:5],
        }

    # ---- masks -------------------------------------------------------------------------------------------------------
    def masks(self, arm: Arm, seed: int) -> so.MaskSet:
        """The mask of a sparse arm: the best summed squared gradients of the loss over the seed's first batches."""
        key = (arm.dtype, arm.sparsity, arm.granularity, seed)
        if key not in self._masks:
            self._masks[key] = so.find_masks(
                self._gradient_scores(arm.dtype, seed), arm.sparsity, granularity=arm.granularity, method="gradient"
            )
        return self._masks[key]

    def _gradient_scores(self, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
        if self._scores is not None and self._scores[0] == (dtype, seed):
            return self._scores[1]
        model = self.restored(dtype)
        _freeze_embeddings(model)
        params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        scores = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in params.items()}
        for rows in self._batches(seed, self.settings["mask_batches"]):
            self._loss(model, self.train.take(rows), self.base(dtype).train[rows]).backward()
            for name, param in params.items():
                assert param.grad is not None
                scores[name].addcmul_(param.grad.float(), param.grad.float())
                param.grad = None
        self._scores = ((dtype, seed), {name: value.cpu() for name, value in scores.items()})
        return self._scores[1]

    # ---- training ----------------------------------------------------------------------------------------------------
    def run(self, arm: Arm, rate: float, seed: int, splits: Sequence[str]) -> dict[str, Any]:
        """Trains an arm from the base and evaluates it.

        Returns:
            per split its figures (None where the run diverged); loss_first and loss_last (mean over 10 steps, None if
            not finite), trained_parameters, state_bytes, train_seconds.

        Raises:
            RuntimeError: an entry outside a sparse arm's mask changed.
        """
        masks = self.masks(arm, seed) if arm.kind == "sparse" else None
        model = self.restored(arm.dtype)
        adapter: Any = None
        torch.manual_seed(seed)
        try:
            if arm.kind == "lora":
                from peft import LoraConfig, get_peft_model

                adapter = get_peft_model(
                    model,
                    LoraConfig(
                        r=self.settings["rank"], lora_alpha=self.settings["lora_alpha"], target_modules="all-linear",
                        task_type="CAUSAL_LM",
                    ),
                )  # fmt: skip
            optimizer, clip = self._optimizer(arm, model, masks, rate)
            self._synchronize()
            began = time.perf_counter()
            losses = self._train(model, optimizer, clip, self.base(arm.dtype).train, rate, seed)
            self._synchronize()
            seconds = time.perf_counter() - began
            state_bytes = _state_bytes(optimizer)
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            for param in model.parameters():
                param.grad = None
            if masks is not None:
                self._check_frozen(model, arm, masks)
            finite = bool(torch.isfinite(losses).all())
            return {
                **{s: self.evaluate(model, arm.dtype, s) if finite else None for s in splits},
                "loss_first": float(losses[:10].mean()) if finite else None,
                "loss_last": float(losses[-10:].mean()) if finite else None,
                "trained_parameters": trained if masks is None else masks.active_parameters,
                "state_bytes": state_bytes,
                "train_seconds": round(seconds, 3),
            }
        finally:
            if adapter is not None:
                adapter.unload()

    def _optimizer(
        self, arm: Arm, model: Any, masks: so.MaskSet | None, rate: float
    ) -> tuple[torch.optim.Optimizer, Callable[[], Any]]:
        """The optimizer and what clips its gradients (SparseAdamW does that itself)."""
        limit = self.settings["max_grad_norm"]
        if masks is not None:
            _freeze_embeddings(model)
            named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
            return so.SparseAdamW(named, lr=rate, weight_decay=0.0, masks=masks, max_grad_norm=limit), lambda: None
        trained = [p for p in model.parameters() if p.requires_grad]
        fused = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0, fused=True)
        return fused, lambda: nn.utils.clip_grad_norm_(trained, limit)

    def _train(
        self,
        model: Any,
        optimizer: torch.optim.Optimizer,
        clip: Callable[[], Any],
        reference: Tensor,
        rate: float,
        seed: int,
    ) -> Tensor:
        """Runs all steps; returns their losses, fp32[steps]. Nothing waits for the device."""
        steps, warmup = self.settings["steps"], self.settings["warmup"]
        losses = torch.empty(steps, device=self.device)
        forward_backward = self._graph(model, reference, seed) if self.graphs else None
        for step, rows in enumerate(self._batches(seed, steps)):
            batch, expected = self.train.take(rows), reference[rows]
            if forward_backward is None:
                optimizer.zero_grad()
                loss = self._loss(model, batch, expected)
                loss.backward()
                losses[step] = loss.detach()
            else:
                losses[step] = forward_backward(batch, expected)
            clip()
            factor = min(1.0, (step + 1) / warmup if warmup else 1.0, (steps - step) / max(1, steps - warmup))
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
            optimizer.step()
        return losses.cpu()

    def _graph(self, model: Any, reference: Tensor, seed: int) -> Callable[..., Tensor]:
        """Forward and backward as one CUDA graph; every replay overwrites the gradients."""
        rows = next(self._batches(seed, 1))
        static, expected = self.train.take(rows), reference[rows]
        trained = [p for p in model.parameters() if p.requires_grad]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP_CALLS):
                self._loss(model, static, expected).backward()
                for param in trained:
                    param.grad = None
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = self._loss(model, static, expected)
            loss.backward()

        def replay(batch: tuple[Tensor, ...], values: Tensor) -> Tensor:
            for kept, new in zip((*static, expected), (*batch, values), strict=True):
                kept.copy_(new)
            graph.replay()
            return loss.detach()

        return replay

    def _loss(self, model: Any, batch: tuple[Tensor, ...], reference: Tensor) -> Tensor:
        policy = answer_logps(model, *batch).view(-1, 2)
        rewards = self.settings["beta"] * (policy - reference)
        loss = -F.logsigmoid(rewards[:, 0] - rewards[:, 1]).mean()
        if self.settings["sft_weight"]:
            tokens = batch[3].view(len(policy), 2, -1)[:, 0].sum()
            loss = loss - self.settings["sft_weight"] * policy[:, 0].sum() / tokens
        return loss

    def _batches(self, seed: int, count: int) -> Iterator[Tensor]:
        """Row numbers of the first ``count`` batches in the seed's order; no pair comes twice."""
        size = self.settings["batch_size"]
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(seed)).to(self.device)
        yield from order[: count * size].split(size)

    def _check_frozen(self, model: Any, arm: Arm, masks: so.MaskSet) -> None:
        base = self.base(arm.dtype).weights
        for name, param in model.named_parameters():
            moved = param.detach() != base[name]
            if name in masks:
                moved &= ~masks[name].to(self.device)
            if bool(moved.any()):
                raise RuntimeError(f"{arm.name}: entries outside the mask changed in {name!r}.")

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _freeze_embeddings(model: Any) -> None:
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        module.weight.requires_grad_(False)


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    if isinstance(optimizer, so.SparseAdamW):
        return optimizer.state_bytes()
    return sum(v.nbytes for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor))
