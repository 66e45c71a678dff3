"""DynamicSparsity: masks that change while any transformers or TRL trainer trains."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from sparseopt.masks.maskset import MaskSet
from sparseopt.optim.dynamic.engine import DynamicSparsity as Engine
from sparseopt.optim.dynamic.layers import find_layers
from sparseopt.optim.dynamic.patterns import parse_pattern
from sparseopt.optim.dynamic.policy import Plan, check_sparsity
from sparseopt.optim.sparse_adamw import SparseAdamW
from sparseopt.trainers.attachment import attach
from sparseopt.trainers.callbacks import NextEntry, come_first
from sparseopt.trainers.delta_logger import sparse_of
from sparseopt.trainers.processes import splits_model

__all__ = ["DynamicSparsity"]

STATE_KEY = "dynamic_sparsity"  # in the optimizer's state dict
LOGGED = ("sparsity", "churn", "regrown", "inactive_grad_norm")


class DynamicSparsity(NextEntry):
    """Changes a trainer's masks while it trains: ``DynamicSparsity(sparsity=0.8).attach(trainer)``, then ``trainer.train()``.

    Every ``interval`` optimizer steps the policy exchanges entries (:class:`sparseopt.optim.dynamic.engine.DynamicSparsity`
    has the arguments). The values of the newest update join the trainer's next log entry: ``dynamic/sparsity``,
    ``dynamic/churn``, ``dynamic/regrown``, ``dynamic/inactive_grad_norm`` (where gradients were collected) and
    ``dynamic/step``, which they belong to.

    Masks and history are part of the optimizer's state, and so of every checkpoint: a training that resumes from one has the
    same weights at the end, bit by bit.

    Attributes:
        engine: from the beginning of training on; has ``masks`` and ``history``.
    """

    def __init__(self, *, exclude: str | Iterable[str] = (), **options: Any) -> None:
        """Nothing is done before training begins, when the number of steps is known.

        Args:
            exclude: patterns of parameter names that are left alone.
            options: further arguments of the engine; ``total_steps`` comes from the trainer. ``initial="attached"``: begin
                with the masks that the trainer was attached with.

        Raises:
            ValueError: an unknown pattern, or numbers out of range.
            TypeError: an unknown argument.
        """
        super().__init__()
        known = set(Engine.__init__.__kwdefaults__ or ()) - {"exclude"}  # total_steps has no default
        for name in options:
            if name not in known:
                raise TypeError(f"DynamicSparsity() takes no argument {name!r}; it takes {', '.join(sorted(known))}.")
        self._exclude = [exclude] if isinstance(exclude, str) else list(exclude)
        self._options = options
        # Errors belong here, not minutes into training.
        parse_pattern(options.get("pattern", "unstructured"))
        names = {"policy", "interval", "fraction", "initial_sparsity", "end"} & options.keys()
        Plan(**{name: options[name] for name in names}, schedule=options.get("sparsity_schedule"))
        if options.get("sparsity") is not None:
            check_sparsity(options["sparsity"], "the sparsity")
        self.engine: Engine | None = None
        self._saved: dict[str, Any] | None = None
        self._distributed = False

    def attach(self, trainer: Trainer, **sparse_adamw_kwargs: Any) -> None:
        """Attaches a :class:`~sparseopt.SparseAdamW` and this callback to a trainer, before ``trainer.train()``.

        Under ``target="weights"`` all other parameters train densely, under ``"updates"`` they are frozen, unless
        ``unmasked`` says otherwise.

        Args:
            trainer: a trainer without an optimizer.
            sparse_adamw_kwargs: see :func:`~sparseopt.attach`.
        """
        if self._options.get("initial") == "attached":
            raise ValueError(
                "initial='attached' needs masks: call sparseopt.attach(trainer, masks) and add_callback()."
            )
        model: Any = trainer.model
        layers = find_layers(model, self._exclude)
        pattern = parse_pattern(self._options.get("pattern", "unstructured"))
        for layer in layers:
            pattern.check(layer)
        unmasked = "freeze" if self._options.get("target") == "updates" else "dense"
        # Every layer takes part; training begins with masks made for its number of steps, before anything is allocated.
        everything = MaskSet.full_like({layer.name: layer.param for layer in layers})
        trainer.add_callback(self)  # before attach()'s own, which allocates the optimizer's state
        try:
            # Of several processes every one needs the average of the dense gradients.
            capture = {"capture_gradients": False} if trainer.args.world_size > 1 else {}
            attach(trainer, everything, **{"unmasked": unmasked, **capture, **sparse_adamw_kwargs})
        except (TypeError, ValueError):
            trainer.remove_callback(self)
            raise

    def optimizer_made(self, optimizer: SparseAdamW) -> None:
        """Called with the optimizer of an attached trainer, before a checkpoint's state is loaded into it."""
        optimizer.adopt_masks = True  # a checkpoint has other masks than the training began with
        self.engine, self._saved = None, None  # of an earlier training

        def save(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
            if self.engine is not None:
                state[STATE_KEY] = self.engine.state_dict()

        def load(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
            self._saved = state.get(STATE_KEY)

        optimizer.register_state_dict_post_hook(save)
        optimizer.register_load_state_dict_pre_hook(load)

    # ---- what the trainer calls ------------------------------------------------------------------------------------------
    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
                       model: Any = None, optimizer: Any = None, **kw: Any) -> None:  # fmt: skip
        if splits_model(args):
            raise ValueError("DynamicSparsity cannot change masks of sharded weights: train on one GPU or with DDP.")
        sparse = sparse_of(optimizer)
        if sparse is None:
            raise ValueError("DynamicSparsity needs a SparseAdamW: use DynamicSparsity.attach(trainer) before train().")
        come_first(self)
        self._distributed = args.world_size > 1
        resume = state.global_step > 0
        options = dict(self._options)
        if options.get("initial") == "attached":
            options["initial"] = None if resume else sparse.masks
        self.engine = Engine(model, total_steps=state.max_steps, exclude=self._exclude, **options)
        if resume and self._saved is not None:
            self.engine.load_state_dict(self._saved)
        elif resume:
            warnings.warn(f"the checkpoint of step {state.global_step} has no history of mask changes: it starts anew.",
                          stacklevel=2)  # fmt: skip
        self._saved = None
        self.engine.start(sparse, resume=resume)
        self._values = {"dynamic/sparsity": self.engine.sparsity}

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        if self.engine is not None:
            self.engine.begin_step(state.global_step + 1, hooks=not self._distributed)

    def on_pre_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
                              **kw: Any) -> None:  # fmt: skip
        if self.engine is not None and self._distributed:
            self.engine.take_gradients(state.global_step + 1)  # averaged over the processes by now

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        record = self.engine.update(state.global_step) if self.engine is not None else None
        if record is not None:
            values = {key: record[key] for key in (*LOGGED, "step") if record[key] is not None}
            self._values = {f"dynamic/{key}": value for key, value in values.items()}

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        if self.engine is not None:
            self.engine.close()
