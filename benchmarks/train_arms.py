"""The arms and the work of :mod:`sparseopt.benchmarks.train_step`: models, optimizers, masks, batches, and the check."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparseopt as so
from sparseopt.benchmarks.train_settings import Arm

__all__ = [
    "Built",
    "CheckError",
    "Unavailable",
    "build",
    "check_small",
    "compile_layers",
    "make_loss",
    "random_masks",
]

LEARNING_RATE = 1e-4
CLIP = 1.0
BETA = 0.1  # of the DPO loss
CLIP_RATIO = 0.2  # of the GRPO loss
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


class CheckError(RuntimeError):
    """A result is wrong, so that no speed of this run may be shown."""


class Unavailable(RuntimeError):
    """An arm cannot run here; the message is what the tables show in its place."""


# ---- the work --------------------------------------------------------------------------------------------------------
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

    def log_probs(ids: Tensor) -> Tensor:
        """Of the completions' tokens: fp32[rows, completion]."""
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=completion + 1).logits[:, :-1]
        targets = ids[:, -completion:]
        return -F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none").view(targets.shape)

    def language(ids: Tensor) -> Tensor:
        return model(input_ids=ids, labels=ids, use_cache=False).loss / accumulation

    def preference(ids: Tensor, reference: Tensor) -> Tensor:
        reward = log_probs(ids).sum(1) - reference
        return -F.logsigmoid(BETA * (reward[:batch] - reward[batch:])).mean() / accumulation

    def policy(ids: Tensor, advantages: Tensor) -> Tensor:
        values = log_probs(ids)
        ratio = torch.exp(values - values.detach())
        clipped = ratio.clamp(1 - CLIP_RATIO, 1 + CLIP_RATIO)
        return -torch.minimum(ratio * advantages, clipped * advantages).mean() / accumulation

    losses: list[Callable[[], Tensor]] = []
    for _ in range(accumulation):
        ids = tokens()
        if workload == "lm":
            losses.append(lambda ids=ids: language(ids))  # type: ignore[misc]
        elif workload == "dpo":
            with torch.no_grad():
                reference = log_probs(ids).sum(1)
            losses.append(lambda ids=ids, reference=reference: preference(ids, reference))  # type: ignore[misc]
        elif workload == "grpo":
            advantages = torch.randn(batch, 1, generator=generator, device=device)
            losses.append(lambda ids=ids, advantages=advantages: policy(ids, advantages))  # type: ignore[misc]
        else:
            raise ValueError(f"unknown workload {workload!r}: expected lm, dpo or grpo.")
    return losses


def compile_layers(model: nn.Module) -> None:
    """``torch.compile`` of every decoder layer by itself: the longest list of equal modules."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len({type(layer) for layer in m}) == 1]
    if not lists:
        raise Unavailable("no list of layers to compile")
    for layer in max(lists, key=len):
        layer.compile()


# ---- the arms --------------------------------------------------------------------------------------------------------
@dataclass
class Probe:
    """A few entries as they were before training, on the CPU, and which of them may move."""

    param: Tensor
    before: Tensor
    active: Tensor

    def fault(self) -> str | None:
        now, old = (bits(t) for t in (self.param.detach().flatten()[: self.before.numel()].cpu(), self.before))
        changed = now != old
        if bool((changed & ~self.active).any()):
            return "a frozen entry moved"
        if bool(self.active.any()) and not bool(changed.any()):
            return "no active entry moved"
        return None


@dataclass
class Built:
    """An arm that is ready to train.

    Attributes:
        model: the model, wrapped by PEFT for LoRA.
        optimizer: its optimizer.
        parameters: what is clipped outside of the optimizer; empty for sparse arms, which clip inside.
        trained: entries that train.
        probes: what must hold after training.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    parameters: list[nn.Parameter]
    trained: int
    foreach: bool | None = None
    probes: list[Probe] = field(default_factory=list)

    def update(self) -> None:
        """Clipping, step, zero_grad: the optimizer's part of a step."""
        if self.parameters:
            nn.utils.clip_grad_norm_(self.parameters, CLIP, foreach=self.foreach)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def state_bytes(self) -> int:
        """Bytes of all state tensors, indices included, shared ones once."""
        if isinstance(self.optimizer, so.SparseAdamW):
            return self.optimizer.state_bytes()
        tensors = [t for state in self.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
        return sum({t.data_ptr(): t.nbytes for t in tensors}.values())

    def gradient_bytes(self) -> int:
        """Bytes of gradients that wait for the step: to be asked between backward and step."""
        dense = sum(p.grad.nbytes for p in self.model.parameters() if p.grad is not None)
        return dense + (self.optimizer.gradient_bytes() if isinstance(self.optimizer, so.SparseAdamW) else 0)

    def check(self) -> None:
        """Raises CheckError when a frozen entry moved, or none of the others did."""
        for probe in self.probes:
            if fault := probe.fault():
                raise CheckError(f"{fault} while the model was trained")


def build(arm: Arm, model: nn.Module, *, master: str = "residual", lr: float = LEARNING_RATE, seed: int = 0) -> Built:
    """Makes an arm of a fresh model.

    Args:
        arm: which.
        model: trained in place; LoRA wraps it.
        master: "residual" or "fp32": how SparseAdamW keeps master weights.
        lr: learning rate.
        seed: of masks and adapters.

    Raises:
        Unavailable: the arm's package is not installed.
    """
    if arm.sparse:
        return _build_sparse(arm, model, master, lr, seed)
    if arm.name in ("lora", "lora-bf16"):
        model = _wrap_lora(model, seed, fp32=arm.name == "lora")
    trained = [p for p in model.parameters() if p.requires_grad]
    count = sum(p.numel() for p in trained)
    if arm.name == "dense-foreach":
        foreach = torch.optim.AdamW(trained, lr=lr, foreach=True)
        return Built(model, foreach, trained, count, foreach=True)
    if arm.name == "adamw8bit":
        if importlib.util.find_spec("bitsandbytes") is None:
            raise Unavailable("not installed")
        import bitsandbytes

        return Built(model, bitsandbytes.optim.AdamW8bit(trained, lr=lr, weight_decay=1e-2), trained, count)
    return Built(model, torch.optim.AdamW(trained, lr=lr, fused=True), trained, count)


def _wrap_lora(model: nn.Module, seed: int, fp32: bool) -> nn.Module:
    if importlib.util.find_spec("peft") is None:
        raise Unavailable("not installed")
    import peft

    torch.manual_seed(seed)
    options: dict[str, Any] = LORA
    # PEFT's default keeps adapters of a bf16 model in fp32 (and casts activations); the other arm keeps them in bf16.
    pretrained: Any = model
    return peft.get_peft_model(pretrained, peft.LoraConfig(**options), autocast_adapter_dtype=fp32)


def random_masks(model: Any, density: float, run: int = 1, seed: int = 0) -> so.MaskSet:
    """Uniformly random masks, in aligned runs, of every parameter but embeddings and the head (as LoRA leaves them).

    They are drawn on the model's device, where billions of entries take a moment: each group is active with
    probability ``density``.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    left = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    left |= {id(head.weight)} if head is not None else set()
    packed, shapes = {}, {}
    for number, (name, param) in enumerate(model.named_parameters()):
        if id(param) in left:
            continue
        n = param.numel()
        generator = torch.Generator(param.device).manual_seed(1_000_003 * seed + number)
        chosen = torch.rand(-(-n // run), generator=generator, device=param.device) < density
        mask = chosen.repeat_interleave(run)[:n] if run > 1 else chosen
        packed[name], shapes[name] = so.pack_mask(mask).cpu(), tuple(param.shape)
    return so.MaskSet(packed, shapes, {"method": "random", "seed": seed, "granularity": run}, copy_bits=False)


def _build_sparse(arm: Arm, model: nn.Module, master: str, lr: float, seed: int) -> Built:
    assert arm.density is not None
    masks = random_masks(model, arm.density, arm.run, seed)
    for name, param in model.named_parameters():
        # As attach() does: where nothing is active, backward is spared the weight gradient.
        param.requires_grad_(name in masks and masks.count(name) > 0)
    options: dict[str, Any] = {"master_weights": True if master == "residual" else master}
    optimizer = so.SparseAdamW(
        model.named_parameters(), lr=lr, masks=masks, unmasked="freeze", max_grad_norm=CLIP, capture_gradients=True,
        **options,
    )  # fmt: skip
    frozen = next((p for p in model.parameters() if not p.requires_grad), None)
    matrices = [name for name, p in model.named_parameters() if p.requires_grad and p.dim() > 1]
    if not matrices:
        raise ValueError(f"{arm.name} has no active entry in any matrix of this model: use a higher density.")
    middle = matrices[len(matrices) // 2]
    param = model.get_parameter(middle)
    probes = [Probe(param, param.detach().flatten().cpu().clone(), masks[middle].flatten())]
    if frozen is not None:
        part = frozen.detach().flatten()[: 1 << 20].cpu().clone()
        probes.append(Probe(frozen, part, torch.zeros(part.numel(), dtype=torch.bool)))
    return Built(model, optimizer, [], masks.active_parameters, probes=probes)


# ---- the check -------------------------------------------------------------------------------------------------------
def bits(values: Tensor) -> Tensor:
    """The same bytes as integers: equality that tells -0 from 0, and NaN equal to itself."""
    return values.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()])


def check_small(arm: Arm, model: nn.Module, workload: str, *, compiled: bool, master: str = "residual") -> None:
    """Three steps of a small model against dense AdamW on the fp32 values of the active entries.

    Both are given the same gradients, of two micro-batches a step. Active entries must agree within one unit in the last
    place of the model's dtype, frozen ones be bit-identical.

    Args:
        arm: a sparse arm.
        model: small, with random weights.
        workload: as in :func:`make_loss`.
        compiled: compile its layers.
        master: as in :func:`build`.

    Raises:
        CheckError: they differ.
    """
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = make_loss(workload, model, batch=2, sequence=32, accumulation=2)
    built = build(arm, model, master=master, lr=1e-3)
    if compiled:
        compile_layers(model)
    assert isinstance(built.optimizer, so.SparseAdamW)
    masks = built.optimizer.masks
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    active = {name: masks[name].to(p.device) for name, p in model.named_parameters()}
    alone = {name: nn.Parameter(start[name][active[name]].float()) for name in trained}
    dense = torch.optim.AdamW(alone.values(), lr=1e-3, foreach=False)

    def keep(name: str) -> Callable[[Tensor], None]:
        def hook(grad: Tensor) -> None:
            part = grad.detach()[active[name]].float()
            before = alone[name].grad
            alone[name].grad = part if before is None else before + part

        return hook

    hooks = [param.register_hook(keep(name)) for name, param in trained.items()]
    for _ in range(3):
        for loss in losses:
            loss().backward()
        nn.utils.clip_grad_norm_(list(alone.values()), CLIP)
        built.update()
        dense.step()
        dense.zero_grad()
    for hook in hooks:
        hook.remove()
    compare(arm.name, dict(model.named_parameters()), start, active, {n: p.detach() for n, p in alone.items()})


def compare(
    arm: str,
    params: dict[str, nn.Parameter],
    start: dict[str, Tensor],
    active: dict[str, Tensor],
    expected: dict[str, Tensor],
) -> None:
    """Raises CheckError unless frozen entries are as at the start and active ones as expected (fp32)."""
    for name, param in params.items():
        now, frozen = param.detach(), ~active[name]
        if not torch.equal(bits(now[frozen]), bits(start[name][frozen])):
            raise CheckError(f"{arm}: a frozen entry of {name!r} moved in the small model")
        if name not in expected:
            continue
        wanted = expected[name]
        # One unit in the last place of the dtype; fp32 is compared at the accuracy of its arithmetic.
        exponent = torch.frexp(wanted).exponent.float()
        unit = max(torch.finfo(now.dtype).eps, 1e-5) * torch.exp2(exponent - 1)
        if not bool(((now[active[name]].float() - wanted).abs() <= unit + 1e-7).all()):
            raise CheckError(f"{arm}: {name!r} of the small model differs from dense AdamW on its active entries")
