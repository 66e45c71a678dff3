"""The arms of :mod:`sparseopt.benchmarks.train_step`: optimizers, masks, and the check."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import sparseopt as so
from sparseopt.benchmarks.train_settings import Arm
from sparseopt.benchmarks.train_work import make_loss
from sparseopt.masks.maskset import normalize_name

__all__ = [
    "Built",
    "CheckError",
    "Unavailable",
    "build",
    "check_small",
    "compile_layers",
    "compile_model",
    "fit_masks",
    "random_masks",
]

LEARNING_RATE = 1e-4
CLIP = 1.0
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


class CheckError(RuntimeError):
    """A result is wrong, so that no speed of this run may be shown."""


class Unavailable(RuntimeError):
    """An arm cannot run here; the message is what the tables show in its place."""


def compile_layers(model: nn.Module) -> None:
    """``torch.compile`` of every decoder layer by itself: the longest list of equal modules."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len({type(layer) for layer in m}) == 1]
    if not lists:
        raise Unavailable("no list of layers to compile")
    for layer in max(lists, key=len):
        layer.compile()


def compile_model(model: nn.Module, mode: str) -> None:
    """Compiles layer by layer in mode "compiled", in one piece in mode "whole", as CUDA graphs in mode "graphs", else nothing."""
    if mode == "compiled":
        compile_layers(model)
    elif mode == "whole":
        model.compile()
    elif mode == "graphs":
        model.compile(mode="reduce-overhead")


# ---- the arms --------------------------------------------------------------------------------------------------------
@dataclass
class Probe:
    """A few entries as they were before training, on the CPU, and which of them may move."""

    param: Tensor
    before: Tensor
    active: Tensor

    def fault(self, moves: bool = True) -> str | None:
        now, old = (bits(t) for t in (self.param.detach().flatten()[: self.before.numel()].cpu(), self.before))
        changed = now != old
        if bool((changed & ~self.active).any()):
            return "a frozen entry moved"
        if moves and bool(self.active.any()) and not bool(changed.any()):
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

    def check(self, moves: bool = True) -> None:
        """Raises CheckError when a frozen entry moved, or none of the others did although it ``moves``."""
        for probe in self.probes:
            if fault := probe.fault(moves):
                raise CheckError(f"{fault} while the model was trained")


def build(
    arm: Arm,
    model: nn.Module,
    *,
    master: str = "residual",
    lr: float = LEARNING_RATE,
    seed: int = 0,
    masks: so.MaskSet | None = None,
) -> Built:
    """Makes an arm of a fresh model.

    Args:
        arm: which.
        model: trained in place; LoRA wraps it.
        master: "residual" or "fp32": how SparseAdamW keeps master weights.
        lr: learning rate.
        seed: of masks and adapters.
        masks: of a sparse arm, from :func:`fit_masks`; None: random ones of the arm's density.

    Raises:
        Unavailable: the arm's package is not installed.
    """
    if arm.sparse:
        if masks is None:
            assert arm.density is not None
            masks = random_masks(model, arm.density, arm.run, seed, arm.structure)
        return _build_sparse(arm, model, masks, master, lr)
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


def random_masks(model: Any, density: float, run: int = 1, seed: int = 0, structure: str | None = None) -> so.MaskSet:
    """Uniformly random masks of every parameter but embeddings and the head (as LoRA leaves them).

    They are drawn on the model's device, where billions of entries take a moment: each aligned run is active with
    probability ``density``. With a ``structure`` that share of the rows or columns of each matrix is, and no vector.
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
        shapes[name] = tuple(param.shape)
        if structure is not None:
            packed[name] = so.pack_mask(_groups(param, density, structure, generator)).cpu()
            continue
        chosen = torch.rand(-(-n // run), generator=generator, device=param.device) < density
        mask = chosen.repeat_interleave(run)[:n] if run > 1 else chosen
        packed[name] = so.pack_mask(mask).cpu()
    described = {"method": "random", "seed": seed, "granularity": structure or run}
    return so.MaskSet(packed, shapes, described, copy_bits=False)


def _groups(param: Tensor, density: float, structure: str, generator: torch.Generator) -> Tensor:
    mask = torch.zeros(param.shape, dtype=torch.bool, device=param.device)
    if param.dim() == 2:
        dim = 0 if structure == "row" else 1
        size = param.shape[dim]
        chosen = torch.randperm(size, generator=generator, device=param.device)[: max(1, round(density * size))]
        mask.index_fill_(dim, chosen, True)
    return mask


def fit_masks(model: nn.Module, masks: so.MaskSet, source: str) -> so.MaskSet:
    """A mask file's masks under the names of ``model.named_parameters()``, of which none may be missing.

    Raises:
        ValueError: a parameter without a mask, a mask of another model, or nothing is active.
    """
    aliases = {normalize_name(name): param for name, param in model.named_parameters(remove_duplicate=False)}
    owner = {id(param): normalize_name(name) for name, param in model.named_parameters()}
    packed: dict[str, Tensor] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name in masks.names:
        param = aliases.get(name)
        if param is None or masks.shapes[name] != tuple(param.shape):
            found = "does not have it" if param is None else f"has {list(param.shape)}"
            raise ValueError(
                f"The mask {source!r} is for {name!r} of shape {list(masks.shapes[name])}, but the model {found}."
            )
        target = owner[id(param)]
        if target in packed and not torch.equal(packed[target], masks.packed(name)):
            raise ValueError(f"The mask {source!r} has different masks for {name!r} and {target!r}, which are tied.")
        packed[target], shapes[target] = masks.packed(name), masks.shapes[name]
    missing = [name for name in owner.values() if name not in packed]
    if missing:
        raise ValueError(f"The mask {source!r} lacks {len(missing)} parameters of the model, such as {missing[0]!r}.")
    if not masks.active_parameters:
        raise ValueError(f"The mask {source!r} has no active entry: nothing would train.")
    return so.MaskSet(packed, shapes, masks.metadata)


def _build_sparse(arm: Arm, model: nn.Module, masks: so.MaskSet, master: str, lr: float) -> Built:
    for name, param in model.named_parameters():
        # As attach() does: where nothing is active, backward is spared the weight gradient.
        param.requires_grad_(name in masks and masks.count(name) > 0)
    options: dict[str, Any] = {"master_weights": True if master == "residual" else master}
    optimizer = so.SparseAdamW(
        model.named_parameters(), lr=lr, masks=masks, unmasked="freeze", max_grad_norm=CLIP, capture_gradients=True,
        **options,
    )  # fmt: skip
    if arm.structure or arm.density is None:
        so.sparse_linear(model, masks)
    frozen = next((p for p in model.parameters() if not p.requires_grad), None)
    matrices = [name for name, p in model.named_parameters() if p.requires_grad and p.dim() > 1]
    if not matrices:
        raise ValueError(f"{arm.name} has no active entry in any matrix of this model: use a higher density.")
    # The most active entries: where a mask is uneven, some of these will see a gradient.
    watched = max(matrices, key=masks.count)
    param = model.get_parameter(watched)
    probes = [Probe(param, param.detach().flatten().cpu().clone(), masks[watched].flatten())]
    if frozen is not None:
        part = frozen.detach().flatten()[: 1 << 20].cpu().clone()
        probes.append(Probe(frozen, part, torch.zeros(part.numel(), dtype=torch.bool)))
    return Built(model, optimizer, [], masks.active_parameters, probes=probes)


# ---- the check -------------------------------------------------------------------------------------------------------
def bits(values: Tensor) -> Tensor:
    """The same bytes as integers: equality that tells -0 from 0, and NaN equal to itself."""
    return values.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()])


def check_small(arm: Arm, model: nn.Module, workload: str, *, mode: str, master: str = "residual") -> None:
    """Three steps of a small model against dense AdamW on the fp32 values of the active entries.

    Both are given the same gradients, of two micro-batches a step. Active entries must agree within one unit in the last
    place of the model's dtype, frozen ones be bit-identical. Where only a part of the gradients is computed, that part is
    compared with the one of a copy that computes all of them.

    Args:
        arm: a sparse arm.
        model: small, with random weights.
        workload: as in :func:`~sparseopt.benchmarks.train_work.make_loss`.
        mode: "eager", "compiled", "whole" or "graphs".
        master: as in :func:`build`.

    Raises:
        CheckError: they differ.
    """
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    whole = copy.deepcopy(model) if arm.structure else None
    whole_losses = [] if whole is None else make_loss(workload, whole, batch=2, sequence=32, accumulation=2)
    built = build(arm, model, master=master, lr=1e-3)
    losses = make_loss(workload, model, batch=2, sequence=32, accumulation=2)
    compile_model(model, mode)
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

    hooks = [param.register_hook(keep(name)) for name, param in trained.items()] if whole is None else []
    for _ in range(3):
        for loss in losses:
            loss().backward()
        if whole is not None:
            gradients = _captured(built.optimizer)
            if set(gradients) != set(trained):
                raise CheckError(f"{arm.name}: not every trained parameter of the small model got a gradient")
            _compare_gradients(arm.name, gradients, whole, whole_losses, model, active)
            for name, values in gradients.items():
                alone[name].grad = values
        nn.utils.clip_grad_norm_(list(alone.values()), CLIP)
        built.update()
        dense.step()
        dense.zero_grad()
    for hook in hooks:
        hook.remove()
    compare(arm.name, dict(model.named_parameters()), start, active, {n: p.detach() for n, p in alone.items()})


def _captured(optimizer: so.SparseAdamW) -> dict[str, Tensor]:
    assert optimizer._capture is not None
    return {name: values.clone() for name, values in optimizer._capture.pending().items()}


def _compare_gradients(
    arm: str,
    gradients: dict[str, Tensor],
    whole: nn.Module,
    losses: list[Callable[[], Tensor]],
    model: nn.Module,
    active: dict[str, Tensor],
) -> None:
    """Raises CheckError unless the parts are those of the gradients of ``whole``, which is given the model's weights."""
    with torch.no_grad():
        for (_, copied), param in zip(whole.named_parameters(), model.parameters(), strict=True):
            copied.copy_(param)
    whole.zero_grad()
    for loss in losses:
        loss().backward()
    for name, part in gradients.items():
        expected = whole.get_parameter(name).grad
        if expected is None:
            raise CheckError(f"{arm}: {name!r} of the small model has no gradient to compare with")
        rest = (part - expected[active[name]].float()).norm() / expected.float().norm().clamp(min=1e-30)
        limit = (
            3e-2 if expected.dtype == torch.bfloat16 else 1e-4
        )  # rounding of activations, in compiled code elsewhere
        if not bool(rest <= limit):
            raise CheckError(
                f"{arm}: the gradient of {name!r} of the small model differs by {float(rest):.2g} of its norm"
            )


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
