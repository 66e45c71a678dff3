"""DynamicSparsity: masks that change while a SparseAdamW trains, whatever trains it.

    engine = DynamicSparsity(model, total_steps=1000, sparsity=0.8)
    optimizer = SparseAdamW(model.named_parameters(), masks=engine.masks, unmasked="dense")
    engine.start(optimizer)
    for step in range(1, 1001):
        engine.begin_step(step)
        ...forward, backward, optimizer.step(), optimizer.zero_grad()...
        engine.update(step)

Growth needs the gradient of inactive entries: hooks add it up in fp32 over the micro-batches of a step, 4 bytes an entry
(2 for 16-bit gradients of a single one), and only in steps that end with an update. Decisions depend on weights, gradients,
seed and step alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparseopt import functional
from sparseopt.masks.apply import zero_inactive
from sparseopt.masks.maskset import MaskSet
from sparseopt.optim.dynamic.criteria import Criterion, check_criterion, is_pruning_method, keep_scores
from sparseopt.optim.dynamic.distribution import DISTRIBUTIONS, global_counts, proportional_counts
from sparseopt.optim.dynamic.first import first_masks, layer_counts
from sparseopt.optim.dynamic.gradients import DenseGradients
from sparseopt.optim.dynamic.layers import find_layers
from sparseopt.optim.dynamic.patterns import parse_pattern
from sparseopt.optim.dynamic.policy import Plan, SparsitySchedule
from sparseopt.optim.dynamic.selection import (
    Group,
    Move,
    Moved,
    choose_each,
    choose_together,
    groups_of,
    to_host,
    zero_entries,
)
from sparseopt.optim.sparse_adamw import SparseAdamW

__all__ = ["DynamicSparsity"]

# What a resumed training must not change: it would no longer be the same training.
SETTINGS = ("policy", "pattern", "target", "dropped", "distribution", "interval", "fraction", "seed")


class DynamicSparsity:
    """Chooses, and goes on choosing, the active entries of a model's linear layers.

    Attributes:
        layers: the layers that are made sparse; all other parameters are none of this object's concern.
        plan: when and how much.
        pattern: where active entries may lie.
        gradients: dense ones of this step, where its update needs them.
        masks: the masks in force, of ``layers``.
        history: one record per update: ``step``, ``sparsity``, ``active``, ``dropped``, ``grown`` (entries), ``churn``
            (entries that changed, as a share of those active before and after), ``regrown`` (share of the grown entries
            that had been active before) and ``inactive_grad_norm`` (None where no gradient was needed).
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        total_steps: int,
        sparsity: float | None = None,
        pattern: str = "unstructured",
        policy: str = "rigl",
        interval: int = 100,
        fraction: float = 0.3,
        target: str = "weights",
        dropped: str = "keep",
        distribution: str = "uniform",
        exclude: str | Iterable[str] = (),
        criterion: Criterion = None,
        sparsity_schedule: SparsitySchedule | None = None,
        initial_sparsity: float = 0.0,
        initial: str | MaskSet | None = None,
        end: float = 0.75,
        seed: int = 0,
        watch_gradients: bool = False,
    ) -> None:
        """Chooses the first masks; the model is not touched before :meth:`start`.

        Args:
            model: with linear layers (or transformers' Conv1D).
            total_steps: optimizer steps of the training.
            sparsity: share of inactive entries, [0, 1), over the layers that are made sparse; default 0.5. N:M has its own.
            pattern: ``"unstructured"``, or ``"N:M"``: N of every M neighbours along the input dimension.
            policy: ``"rigl"``, ``"set"``, ``"gradual"`` or ``"static"`` (:mod:`sparseopt.optim.dynamic.policy`).
            interval: steps between two updates.
            fraction: share of the active entries exchanged at first; it decays with a cosine.
            target: ``"weights"``: inactive weights are 0, a grown one starts there. ``"updates"``: the model stays as it
                is, and active entries are those that train.
            dropped: under ``"updates"``, an entry that leaves keeps its value (``"keep"``) or goes back to what it was
                before training (``"rewind"``).
            distribution: ``"uniform"``, ``"erk"`` or ``"global"``.
            exclude: patterns of parameter names that are left alone.
            criterion: see :func:`~sparseopt.optim.dynamic.criteria.keep_scores`; in place of |w|.
            sparsity_schedule: ``(step, total_steps) -> sparsity``, asked for the first masks (step 0) and at updates, which
                then go on to the end of training.
            initial_sparsity: where ``"gradual"`` begins.
            initial: first masks: ``"magnitude"``, ``"random"``, ``"criterion"`` (a score function gets no gradient then),
                or a MaskSet, whose counts stay. Default: a pruning method as criterion, else magnitude.
            end: share of the training after which nothing is exchanged.
            seed: of random masks and random growth.
            watch_gradients: measure ``inactive_grad_norm`` where growth needs no gradient, too.

        Raises:
            ValueError: numbers out of range, unknown names, an input dimension that M does not divide, ...
        """
        if target not in ("weights", "updates"):
            raise ValueError(f"target must be 'weights' or 'updates', got {target!r}.")
        if dropped not in ("keep", "rewind"):
            raise ValueError(f"dropped must be 'keep' or 'rewind', got {dropped!r}.")
        if dropped == "rewind" and target == "weights":
            raise ValueError("dropped='rewind' is for target='updates': under target='weights' dropped weights are 0.")
        if distribution not in DISTRIBUTIONS:
            raise ValueError(f"the distribution must be one of {', '.join(DISTRIBUTIONS)}, got {distribution!r}.")
        self.pattern = parse_pattern(pattern)
        if self.pattern.sparsity is not None:
            if distribution != "uniform":
                raise ValueError(f"pattern {pattern} is uniform by itself; distribution={distribution!r} does not fit.")
            if sparsity not in (None, self.pattern.sparsity) and sparsity_schedule is None:
                raise ValueError(f"pattern {pattern} means a sparsity of {self.pattern.sparsity:g}, got {sparsity!r}.")
            sparsity = self.pattern.sparsity
        sparsity = 0.5 if sparsity is None else sparsity
        self.plan = Plan(policy, total_steps, interval, fraction, sparsity, initial_sparsity, end, sparsity_schedule)
        check_criterion(criterion)
        self.target, self.dropped, self.distribution, self.seed = target, dropped, distribution, seed
        self.criterion, self.watch_gradients = criterion, watch_gradients
        self.layers = find_layers(model, exclude)
        for layer in self.layers:
            self.pattern.check(layer)
        self.history: list[dict[str, Any]] = []
        self.gradients = DenseGradients(self.layers)
        self._optimizer: SparseAdamW | None = None
        self._warned = False
        self.masks = first_masks(self.layers, self.plan, self.pattern, self.distribution, criterion, initial, seed)
        # Entries that were active once and then dropped, packed by name: before the first update.
        self._left = {name: torch.zeros_like(self.masks.packed(name)) for name in self.masks.names}
        # The same and the masks, where the weights are; and the masks that these are.
        self._groups: list[Group] = []
        self._grouped: MaskSet | None = None
        self._resume_fingerprint: str | None = None

    @property
    def sparsity(self) -> float:
        """Share of inactive entries over the layers."""
        return self.masks.sparsity

    def _counts(self, sparsity: float, scores: Callable[[int], Tensor]) -> list[int]:
        return layer_counts(self.layers, self.pattern, self.distribution, sparsity, scores)

    # ---- beginning -------------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def start(self, optimizer: SparseAdamW, resume: bool = False) -> None:
        """Takes over an optimizer's masks of these layers; under ``target="weights"`` inactive weights become 0.

        Args:
            optimizer: before its first step, or with loaded state (``adopt_masks``).
            resume: go on with the masks that the optimizer has; :meth:`load_state_dict` came before, or history begins anew.

        Raises:
            ValueError: a layer that the optimizer does not train, or whose base values it lacks.
        """
        trained = {name for name, _, _ in optimizer._layout()}
        for layer in self.layers:
            if layer.name not in trained or not layer.param.requires_grad:
                raise ValueError(f"{layer.name!r} is not trained by the optimizer: exclude it, or do not freeze it.")
        optimizer.adopt_masks = True
        if resume:
            self.masks = optimizer.masks.select(self.masks.names)
            if self._resume_fingerprint not in (None, self.masks.fingerprint):
                raise ValueError("the optimizer's masks are not those that the state of DynamicSparsity belongs to.")
        else:
            optimizer.update_masks(self.masks)
            if self.dropped == "rewind":
                with optimizer.base_weights():  # from now on the optimizer keeps them
                    pass
        if self.dropped == "rewind" and any("base" not in optimizer.state[layer.param] for layer in self.layers):
            raise ValueError("dropped='rewind' needs base values, which the optimizer's loaded state does not have.")
        if self.target == "weights":
            for layer in self.layers:
                zero_inactive(layer.param, self.masks.packed(layer.name))
        self._optimizer = optimizer

    # ---- gradients -------------------------------------------------------------------------------------------------------
    def needs_gradients(self, step: int) -> bool:
        """Whether the update after a step asks for dense gradients."""
        if not self.plan.updates(step):
            return False
        scored = self.criterion is not None and not is_pruning_method(self.criterion)
        grows = self.plan.exchange(step) > 0 or self._denser(step)
        return self.watch_gradients or scored or (self.plan.growth == "gradient" and grows)

    def _denser(self, step: int) -> bool:
        return self.plan.schedule is not None and self.plan.sparsity_at(step) < self.sparsity

    def begin_step(self, step: int, hooks: bool = True) -> None:
        """Before the first forward of an optimizer step (counted from 1).

        Args:
            step: the step that begins.
            hooks: collect gradients as backward produces them. Where these are not the final ones (a distributed run
                averages them later), say False and call :meth:`take_gradients` once they are.
        """
        self.close()
        if hooks and self.needs_gradients(step):
            self.gradients.listen()

    def take_gradients(self, step: int) -> None:
        """Before the optimizer's step: takes what is in ``.grad``, if the step ends with an update that needs it."""
        if self.needs_gradients(step):
            self.gradients.read()

    def close(self) -> None:
        """Removes the hooks and forgets the gradients."""
        self.gradients.close()

    # ---- updates ---------------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def update(self, step: int) -> dict[str, Any] | None:
        """After the optimizer's step: changes the masks if it is time to.

        Returns:
            The record that was added to ``history``; None where this step ends with no update.

        Raises:
            RuntimeError: :meth:`start` was not called, or no gradient came since :meth:`begin_step`.
        """
        if self._optimizer is None:
            raise RuntimeError("DynamicSparsity.update() before start(): call start(optimizer) first.")
        if not self.plan.updates(step):
            return None
        gradients = self.needs_gradients(step)
        if gradients and not self.gradients.by_name:
            raise RuntimeError(f"no gradient was seen in step {step}: call begin_step({step}) before its backward().")
        sparsity, fraction = self.plan.sparsity_at(step), self.plan.exchange(step)
        now, counts = [self.masks.count(layer.name) for layer in self.layers], self._next_counts(sparsity)
        moves = [
            Move(before, self.pattern.swaps(layer, fraction, before, after), after)
            for layer, before, after in zip(self.layers, now, counts, strict=True)
        ]
        moved, returned, packed, squares, copies = self._choose(moves, step, gradients)
        self.close()
        for group, found, bits, left in moved:
            leaving = [i for i, position in enumerate(group.positions) if moves[position].leaving]
            if self.target == "weights":
                zero_entries(group, found.gone, leaving)
            elif self.dropped == "rewind":
                self._rewind(group, found.gone, leaving)
            group.bits, group.left = bits, left
        for copy in copies:
            copy.synchronize()
        before = self.masks.active_parameters
        known = {layer.name: count for layer, count in zip(self.layers, counts, strict=True)}
        ordered = {name: packed[name] for name in self.masks.names}
        self.masks = MaskSet(ordered, self.masks.shapes, copy_bits=False, counts=known)
        self._grouped = self.masks
        dropped, grown = sum(move.leaving for move in moves), sum(move.coming for move in moves)
        if dropped or grown:
            near = {
                name: bits
                for group in self._groups if group.bits.device.type != "cpu"
                for name, bits in group.by_name(group.bits).items()
            }  # fmt: skip
            self._optimizer.update_masks(self.masks, copies=near)
        after_all = self.masks.active_parameters
        record: dict[str, Any] = {
            "step": step, "dropped": dropped, "grown": grown, "active": after_all, "sparsity": self.sparsity,
            "churn": (dropped + grown) / (before + after_all), "regrown": returned / grown if grown else 0.0,
            "inactive_grad_norm": squares**0.5 if gradients else None,
        }  # fmt: skip
        self.history.append(record)
        return record

    def _choose(
        self, moves: Sequence[Move], step: int, gradients: bool
    ) -> tuple[list[tuple[Group, Moved, Tensor, Tensor]], int, dict[str, Tensor], float, list[torch.cuda.Event]]:
        """What leaves and comes in every layer; nothing has changed yet.

        Returns:
            By group of layers: what moves, the new masks, and all that ever left; how many of what came had left before; the
            new masks by name, packed, on the CPU; the sum of squares of the inactive entries' gradients; copies under way.
        """
        if self._grouped is not self.masks or any(not group.fits() for group in self._groups):
            self._groups, self._grouped = groups_of(self.layers, self.masks, self._left_by_name()), self.masks
        random = (self.seed, step) if self.plan.growth == "random" else None
        result, packed, facts, copies = [], dict[str, Tensor](), [], list[torch.cuda.Event]()
        for group in self._groups:
            mine = [moves[position] for position in group.positions]
            dense = [self.gradients.pop(layer) for layer in group.layers] if gradients else None
            if self.criterion is None and not self.pattern.m:
                found = choose_together(group, dense, mine, random)
            else:
                found = choose_each(group, dense, mine, random, self.pattern, self.criterion)
            bits, left = (group.bits & ~found.gone) | found.came, group.left | found.gone
            back = functional.popcount(group.left & found.came)
            facts.append(torch.cat([back.view(1), found.nan, found.odd, found.squares.view(1)]).double())  # exact
            result.append((group, found, bits, left))
        told = [fact.tolist() for fact in facts]
        for group, _, bits, _ in result:  # now: the few numbers would wait behind these
            host, copy = to_host(bits)
            packed, copies = packed | group.by_name(host), copies + ([] if copy is None else [copy])
        returned, squares = 0, 0.0
        for group, numbers in zip(self._groups, told, strict=True):
            count = len(group.layers)
            for layer, nan, odd, position in zip(
                group.layers, numbers[1:], numbers[1 + count :], group.positions, strict=False
            ):
                if nan and moves[position].moves:
                    raise ValueError(f"the scores of {layer.name!r} contain NaN.")
                if odd and not self._warned:
                    self._warned, text = True, f"gradients of {layer.name!r} in step {step} are not finite"
                    warnings.warn(f"{text}: they count as 0.", stacklevel=4)
            returned, squares = returned + int(numbers[0]), squares + numbers[-1]
        return result, returned, packed, squares, copies

    def _next_counts(self, sparsity: float) -> list[int]:
        """Active entries of each layer after an update: as they are, unless the sparsity changes."""
        now = [self.masks.count(layer.name) for layer in self.layers]
        if self.plan.schedule is None and self.plan.policy != "gradual":
            return now
        if self.distribution != "global":
            return self._counts(sparsity, lambda i: torch.empty(0))
        sizes = [layer.numel for layer in self.layers]
        total = max(len(sizes), round((1 - sparsity) * sum(sizes)))
        if total >= sum(now):
            return proportional_counts(sizes, total, [float(count) for count in now]) if total > sum(now) else now

        def scores(i: int) -> Tensor:
            layer = self.layers[i]
            mask = self.masks[layer.name].to(layer.param.device)
            gradient = self.gradients.by_name.get(layer.name)
            gradient = None if gradient is None else gradient.float()
            keep = keep_scores(self.criterion, layer, mask, gradient, round((1 - total / sum(now)) * now[i]))
            return torch.where(mask, keep, -torch.inf)

        return global_counts(self.layers, total, scores)

    def _rewind(self, group: Group, gone: Tensor, leaving: Sequence[int]) -> None:
        """Weights that leave are what they were before training, in place and through the version counter."""
        assert self._optimizer is not None
        for i in leaving:
            layer = group.layers[i]
            base = self._optimizer.state[layer.param]["base"]  # of the active entries, by flat index
            parts = (group.part(vector, i) for vector in (group.bits, gone))
            mask, leaves = (functional.unpack_mask(part, layer.shape) for part in parts)
            layer.param[leaves] = base[leaves[mask]]

    def _left_by_name(self) -> dict[str, Tensor]:
        """Entries that were active once and then dropped, packed."""
        now = {name: bits for group in self._groups for name, bits in group.by_name(group.left).items()}
        return {name: now.get(name, bits) for name, bits in self._left.items()}

    # ---- saving and loading ----------------------------------------------------------------------------------------------
    def _settings(self) -> dict[str, Any]:
        values = {
            "pattern": str(self.pattern),
            **{key: getattr(self.plan, key) for key in ("policy", "interval", "fraction")},
        }
        return {key: values.get(key, getattr(self, key, None)) for key in SETTINGS}

    def state_dict(self) -> dict[str, Any]:
        """Tensors and primitives: history, and which entries had been active before. Masks are in the optimizer's state."""
        return {
            "settings": self._settings(),
            "history": [dict(record) for record in self.history],
            "masks": self.masks.fingerprint,
            "left": {name: bits.to("cpu", copy=True) for name, bits in self._left_by_name().items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from :meth:`state_dict`; ``start(optimizer, resume=True)`` follows.

        Raises:
            ValueError: it belongs to other layers or settings.
        """
        for key, mine in self._settings().items():
            theirs = state["settings"].get(key)
            if theirs != mine:
                raise ValueError(f"the training to continue had {key}={theirs!r}, this one has {mine!r}.")
        left = state["left"]
        if left.keys() != self._left.keys():
            odd = sorted(left.keys() ^ self._left.keys())[0]
            raise ValueError(
                f"the saved state and the model do not have the same sparse layers: {odd!r} is in one only."
            )
        checked = MaskSet(left, {name: self.masks.shapes[name] for name in left})
        self._left, self._groups, self._grouped = {name: checked.packed(name) for name in self._left}, [], None
        self.history = [dict(record) for record in state["history"]]
        self._resume_fingerprint = state["masks"]
