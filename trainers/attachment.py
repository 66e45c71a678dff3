"""``attach``: sparse training in any transformers or TRL trainer, without a subclass.

The trainer creates its optimizer lazily, from ``optimizer_cls_and_kwargs``; attaching sets that to a factory which builds a
:class:`~sparseopt.SparseAdamW` over the trainer's own decay groups. Two methods of the instance are replaced, because they
would compute a norm over dense gradients: clipping happens inside the optimizer, over the active entries.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from sparseopt.masks.maskset import MaskSet, normalize_name
from sparseopt.optim import distributed
from sparseopt.optim.sparse_adamw import SparseAdamW
from sparseopt.optim.sparse_linear import SparseLinear

logger = logging.getLogger(__name__)

__all__ = ["attach", "sparse_optimizer"]


def attach(
    trainer: Trainer,
    masks: MaskSet | Mapping[str, Tensor],
    *,
    structured: Literal["auto", False] = "auto",
    **sparse_adamw_kwargs: Any,
) -> None:
    """Makes a trainer train only the active entries of ``masks``. Call it before ``trainer.train()``.

    Works with ``transformers.Trainer`` and TRL's SFT, DPO and GRPO trainers; resuming from a checkpoint works as always.
    Parameters with nothing active are frozen while training runs (no gradients are computed for them). The norm over the
    active entries is logged as ``grad_norm``.

    Args:
        trainer: a trainer that has not created its optimizer yet.
        masks: what to train, by parameter name. A tied weight may be named by any of its names.
        structured: ``"auto"``: while training runs, linear layers and experts whose mask is made of whole rows or columns
            compute and keep only what trains (:func:`~sparseopt.sparse_linear`), in one process, where gradients are
            captured and masks do not change.
            ``False``: all weight gradients are computed whole.
        sparse_adamw_kwargs: arguments of :class:`~sparseopt.SparseAdamW`. Defaults come from the training arguments
            (learning rate, betas, eps, weight decay, ``max_grad_norm``); ``capture_gradients`` is on unless fp16 loss
            scaling rules it out: several processes (DDP) then average compact gradients, see :mod:`sparseopt.optim.distributed`.

    Several processes: DDP and FSDP2, started with ``torchrun`` or ``accelerate launch`` (``configs/``).

    Raises:
        ValueError: the trainer has an optimizer already, the masks do not fit the model, or the trainer runs under DeepSpeed,
            FSDP1, or FSDP2 with checkpoints in one piece.
    """
    if trainer.optimizer is not None:
        raise ValueError(
            f"attach() must come before {type(trainer).__name__} has an optimizer; do not pass `optimizers=` and call it "
            "before train()."
        )
    arguments = trainer.args
    _refuse_engines(trainer)
    if not isinstance(masks, MaskSet):
        masks = MaskSet.from_bool(masks)
    options = {
        "lr": arguments.learning_rate,
        "betas": (arguments.adam_beta1, arguments.adam_beta2),
        "eps": arguments.adam_epsilon,
        "max_grad_norm": arguments.max_grad_norm if arguments.max_grad_norm > 0 else float("inf"),
        "capture_gradients": not arguments.fp16,
        **sparse_adamw_kwargs,
    }
    if structured not in ("auto", False):
        raise ValueError(f"structured must be 'auto' or False, got {structured!r}.")
    model: Any = trainer.model
    resolve_names(model, masks)  # errors belong here, not minutes into training
    # Structured layers were not made for several processes: there all weight gradients are computed whole.
    skip = structured == "auto" and bool(options["capture_gradients"]) and arguments.world_size == 1
    adapter = _Adapter(trainer, masks, options, skip)

    class SparseAdamWFactory:
        """Called by the trainer with the model it will train."""

        def __call__(self, model: nn.Module) -> SparseAdamW:
            return adapter.create(model)

    factory: Any = SparseAdamWFactory  # a class that is no Optimizer: the trainer calls an instance with its model
    trainer.optimizer_cls_and_kwargs = (factory, {})
    replaced = [name for name in ("_clip_grad_norm", "_get_grad_norm") if hasattr(trainer, name)]
    if "_get_grad_norm" not in replaced:
        raise ValueError(
            "this transformers release has no Trainer._get_grad_norm; sparseopt needs transformers >= 5.0."
        )
    for name in replaced:
        setattr(trainer, name, adapter.grad_norm)
    trainer.add_callback(adapter)
    train = trainer.train

    @functools.wraps(train)
    def train_and_restore(*args: Any, **kwargs: Any) -> Any:
        try:
            return train(*args, **kwargs)
        finally:
            adapter.restore()  # whatever ended it

    trainer.train = train_and_restore  # type: ignore[method-assign]


def _refuse_engines(trainer: Trainer) -> None:
    if getattr(trainer.args, "deepspeed", None) or getattr(trainer, "is_deepspeed_enabled", False):
        raise ValueError(
            "SparseAdamW does not run under DeepSpeed ZeRO, which owns the optimizer: use DDP or FSDP2 (fsdp_version: 2)."
        )
    plugin: Any = getattr(getattr(trainer, "accelerator", None), "state", None)
    plugin = getattr(plugin, "fsdp_plugin", None)
    if plugin is None:
        return
    if plugin.fsdp_version != 2:
        raise ValueError("SparseAdamW does not run under FSDP1, which flattens parameters: set fsdp_version: 2.")
    if "FULL" in str(plugin.state_dict_type):
        raise ValueError(
            "SparseAdamW saves one part per process under FSDP2: set fsdp_state_dict_type: SHARDED_STATE_DICT, got "
            "FULL_STATE_DICT."
        )


def sparse_optimizer(trainer: Trainer) -> SparseAdamW:
    """The SparseAdamW of a trainer that :func:`attach` was called on and that has begun to train."""
    optimizer = trainer.optimizer
    while not isinstance(optimizer, SparseAdamW):
        inner = getattr(optimizer, "optimizer", None)  # accelerate's wrapper
        if inner is None:
            raise ValueError("this trainer has no SparseAdamW: call attach() and train() first.")
        optimizer = inner
    return optimizer


def resolve_names(model: nn.Module, masks: MaskSet) -> MaskSet:
    """The masks under the names that ``model.named_parameters()`` gives (tied weights have several).

    Raises:
        ValueError: a mask for a parameter that the model lacks or of another shape, or two masks for one tied weight.
    """
    canonical = {id(param): normalize_name(name) for name, param in model.named_parameters()}
    aliases = {normalize_name(n): p for n, p in model.named_parameters(remove_duplicate=False)}
    packed: dict[str, Tensor] = {}
    for name in masks.names:
        if name not in aliases:
            known = ", ".join(sorted(aliases)[:3])
            raise ValueError(
                f"there is a mask for {name!r}, which {type(model).__name__} does not have (it has {known}, ...)."
            )
        target, shape = canonical[id(aliases[name])], tuple(aliases[name].shape)
        if masks.shapes[name] != shape:
            raise ValueError(f"the mask of {name!r} has shape {masks.shapes[name]}, the parameter {shape}.")
        if target in packed and not torch.equal(packed[target], masks.packed(name)):
            raise ValueError(f"{name!r} is tied to {target!r}, but their masks differ: keep one of them.")
        packed[target] = masks.packed(name)
    shapes = {canonical[id(p)]: tuple(p.shape) for p in model.parameters()}
    return MaskSet(packed, {name: shapes[name] for name in packed}, masks.metadata)


class _Adapter(TrainerCallback):
    """What one attached trainer needs: the optimizer's construction, the logged norm, the freezing."""

    def __init__(self, trainer: Trainer, masks: MaskSet, options: dict[str, Any], structured: bool) -> None:
        self._trainer, self._masks, self._options, self._structured = trainer, masks, options, structured
        self._layers: SparseLinear | None = None
        self._frozen: set[str] = set()  # names: FSDP2 puts other parameters in place of the model's
        self._optimizer: SparseAdamW | None = None
        self._left_out = False

    def create(self, model: nn.Module) -> SparseAdamW:
        masks = resolve_names(model, self._masks)
        decay = {normalize_name(n) for n in self._trainer.get_decay_parameter_names(model)}
        groups: list[dict[str, Any]] = [
            {"params": [], "weight_decay": self._options.get("weight_decay", self._trainer.args.weight_decay)},
            {"params": [], "weight_decay": 0.0},
        ]
        kept = []
        unmasked = self._options.get("unmasked", "error")
        for name, param in model.named_parameters():
            name = normalize_name(name)
            active = masks.count(name) if name in masks else (0 if unmasked == "freeze" else param.numel())
            if not param.requires_grad:
                if active and name in masks:
                    raise ValueError(
                        f"the mask selects {active} entries of {name!r}, which is frozen (requires_grad=False)."
                    )
                continue
            if active == 0:
                # Nothing of it is trained: spare the backward pass its weight gradient.
                param.requires_grad_(False)
                self._frozen.add(name)
                continue
            groups[0 if name in decay else 1]["params"].append((name, param))
            kept.append(name)
        if not kept:
            raise ValueError("the masks leave nothing to train: no trainable parameter has an active entry.")
        if self._frozen and _reentrant_checkpointing(self._trainer):
            # Reentrant checkpointing loses all gradients when its input needs none, as a frozen embedding's output does.
            pretrained: Any = model
            pretrained.enable_input_require_grads()
        selected = masks.select([name for name in kept if name in masks])
        options = {k: v for k, v in self._options.items() if k != "weight_decay"}
        self._optimizer = SparseAdamW([g for g in groups if g["params"]], masks=selected, **options)
        self._leave_out(model)
        dynamic = False
        for callback in self._trainer.callback_handler.callbacks:
            made = getattr(callback, "optimizer_made", None)
            if made is not None:
                made(self._optimizer)
                dynamic = True  # it looks at dense gradients, to grow masks of single entries
        if self._structured and not dynamic:
            self._layers = SparseLinear(model, selected)
            logger.info("%r", self._layers)
        return self._optimizer

    def _leave_out(self, model: nn.Module) -> None:
        """DDP, which comes next, is to make no buckets for what is captured."""
        assert self._optimizer is not None
        if self._optimizer.captures and distributed.several_processes(self._optimizer):
            distributed.leave_out_of_ddp(model, self._optimizer)
            self._left_out = True

    def grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Tensor:
        """What the trainer logs: a tensor that the coming step fills (the trainer asks before the step, reads after)."""
        assert self._optimizer is not None
        return self._optimizer.grad_norm_buffer()

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """State is there before the first step, which then takes as long as the others."""
        if self._optimizer is not None:
            if self._left_out:  # of DDP's broadcast, too
                distributed.broadcast_parameters(self._optimizer)
            self._optimizer.initialize_state()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Nothing stays changed after training."""
        self.restore()

    def restore(self) -> None:
        """The model is as it was, but for the weights."""
        if self._layers is not None:
            self._layers.remove()
            self._layers = None
        model: Any = self._trainer.model
        for name, param in model.named_parameters() if self._frozen else ():
            if normalize_name(name) in self._frozen:
                param.requires_grad_(True)
        self._frozen.clear()
        if self._left_out:
            distributed.forget_left_out(model)
            self._left_out = False


def _reentrant_checkpointing(trainer: Trainer) -> bool:
    # Renamed in transformers 5.2x; the old names warn there.
    prefix = "activation" if hasattr(trainer.args, "activation_checkpointing") else "gradient"
    options: Any = getattr(trainer.args, f"{prefix}_checkpointing_kwargs") or {}
    return bool(getattr(trainer.args, f"{prefix}_checkpointing") and options.get("use_reentrant", False))
