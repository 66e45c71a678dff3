"""SparseAdamW: AdamW that updates, and keeps state for, the active entries of a mask only."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from sparseopt._sharded import is_sharded
from sparseopt.masks.maskset import MaskSet, normalize_name
from sparseopt.optim import building, checkpoint, distributed, sharding, stepping, structured, weights
from sparseopt.optim.arena import Arena, Saved
from sparseopt.optim.arguments import check_dtypes, check_hyperparameters, check_options, resolve_masks
from sparseopt.optim.capture import GradientCapture

if TYPE_CHECKING:
    from sparseopt.deltas.delta import Delta

__all__ = ["SparseAdamW"]

Unmasked = Literal["error", "freeze", "dense"]
MasterWeights = Literal[True, False, "residual", "fp32"]


class SparseAdamW(Optimizer):
    """AdamW (Loshchilov & Hutter 2019) on the active entries of a mask; everything else stays bit-identical.

    The positional arguments are those of :class:`torch.optim.AdamW`, so a script changes one name and adds ``masks=``.
    State is allocated at the first step: two fp32 moments and a 2- or 4-byte index per active entry, plus 2 or 4 bytes
    of master weight for bf16/fp16 parameters. ``foreach``, ``fused`` and ``differentiable`` are not taken: there is one
    fused kernel.

    Args:
        params: named parameters (``model.named_parameters()``), plain parameters, or parameter groups of either.
        lr: learning rate; a number or a one-element tensor.
        betas: decay rates of the moments.
        eps: added to the denominator.
        weight_decay: decoupled weight decay, of active entries only.
        amsgrad: keep the largest second moment.
        masks: a MaskSet, ``{name: bool tensor}``, a list of bool tensors aligned with plain parameters, or None = every
            entry of every parameter is active.
        maximize: ascend.
        max_grad_norm: clip the norm over all active entries to this, on the device. A non-finite norm skips the step.
            ``float("inf")`` measures without clipping.
        unmasked: what happens to a parameter without a mask: ``"error"``, ``"freeze"`` it, or train it ``"dense"``.
        master_weights: how bf16/fp16 parameters get fp32 precision. ``True`` or ``"residual"``: a 16-bit residual per
            active entry, which refines the weight that is there. ``"fp32"``: a copy, faster on GPUs (weights need not be
            read) for 2 more bytes; weights that somebody else changes are noticed through their version counters, except
            writes through ``.data``: then call :meth:`sync_from_params`. ``False``: none.
        correct_bias: divide the moments by ``1 - beta^t``.
        capture_gradients: gather the active entries as backward produces each gradient and free the dense gradient.
            Use ``opt.zero_grad()`` to discard what was captured; ``step()`` consumes it.
        capturable: as in torch; the step never waits for the device in any case.
        reduce_dtype: of the captured gradients that several processes average, one all-reduce at each step:
            ``torch.float32``, or ``torch.bfloat16`` for half the bytes.
        process_group: the processes that average captured gradients; None: all.

    Raises:
        ValueError: masks that do not fit the parameters, or hyper-parameters out of range.
        TypeError: complex or integer parameters.
    """

    _masks: dict[str, Tensor | None]
    _capture: GradientCapture | None

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        masks: MaskSet | Mapping[str, Tensor] | Sequence[Tensor] | None = None,
        maximize: bool = False,
        max_grad_norm: float | None = None,
        unmasked: Unmasked = "error",
        master_weights: MasterWeights = True,
        correct_bias: bool = True,
        capture_gradients: bool = False,
        capturable: bool = False,
        reduce_dtype: torch.dtype = torch.float32,
        process_group: Any = None,
    ) -> None:
        check_options(unmasked, master_weights, max_grad_norm, reduce_dtype)
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad,
            "maximize": maximize, "correct_bias": correct_bias, "capturable": capturable,
        }  # fmt: skip
        check_hyperparameters(defaults)
        self.max_grad_norm = max_grad_norm
        self.adopt_masks = False
        kind = "residual" if master_weights is True else master_weights or None
        self._options: dict[str, Any] = {
            "unmasked": unmasked, "master_weights": kind, "capture": capture_gradients, "reduce_dtype": reduce_dtype,
        }  # fmt: skip
        self._reset(process_group)
        super().__init__(params, defaults)
        self._names_given = all("param_names" in g for g in self.param_groups)
        names = [name for name, _, _ in self._layout()]
        self._masks = resolve_masks(masks, names, [p for _, p, _ in self._layout()], unmasked, self._names_given)
        self._shapes.update((name, tuple(p.shape)) for name, p, _ in self._layout())
        if capture_gradients:
            self._capture = GradientCapture(self)
            self._capture.take_over(between_passes=True)

    def _reset(self, process_group: Any = None) -> None:
        """Everything that is not an option: empty, to be built."""
        self.process_group = process_group
        # Of the whole parameters, and which part of one this process has, where it is sharded: masks, state and arenas
        # are of that part.
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._regions: dict[str, sharding.Region] = {}
        self._whole_fingerprint: str | None = None
        self._agreed = False  # with the other processes, on masks
        self._arenas: list[Arena] = []
        self._slots: dict[Tensor, tuple[Arena, int]] = {}
        # What the next build uses: packed masks by name (None: all active) and state by name.
        self._masks = {}
        self._saved: dict[str, Saved] = {}
        # Packed masks in force: what the next change starts from.
        self._known: dict[str, Tensor | None] = {}
        self._near: dict[str, Tensor] = {}  # copies of them where the parameters are
        self._dirty = True
        self._glance: list[tuple[int, int, int, bool]] = []
        # What the arenas were built for: amsgrad, and (id, group, device, dtype) of every parameter.
        self._built: tuple[bool, list[tuple[int, int, torch.device, torch.dtype]]] | None = None
        self._capture = None
        self._grad_norm: Tensor | None = None
        self._clipping: tuple[Tensor, Tensor] | None = None  # coefficient and overflow flag, fp32[] each
        self._norm_measured = False
        self._skipped: Tensor | None = None
        self._left = weights.LeftEntries()

    # ---- parameters and masks ------------------------------------------------------------------------------------------
    def _layout(self) -> list[tuple[str, Tensor, int]]:
        """(name, parameter, group) of every parameter, in order; names without what wrappers add."""
        result: list[tuple[str, Tensor, int]] = []
        seen: set[Tensor] = set()
        for g, group in enumerate(self.param_groups):
            names = group.get("param_names")
            for i, param in enumerate(group["params"]):
                if param in seen:  # torch warns about duplicates within a group and goes on
                    continue
                seen.add(param)
                result.append((normalize_name(names[i]) if names else f"param_{len(result)}", param, g))
        return result

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as in torch. Under masks, its parameters follow ``unmasked``; see :meth:`update_masks`."""
        super().add_param_group(param_group)
        try:
            check_hyperparameters(self.param_groups[-1])
            check_dtypes(self.param_groups[-1]["params"])
        except (TypeError, ValueError):
            self.param_groups.pop()  # a refused group leaves the optimizer as it was
            raise
        self._dirty = True
        if hasattr(self, "_names_given"):  # after construction
            building.mask_new_parameters(self)
            if self._capture is not None:
                self._capture.arm()

    def _current_masks(self) -> dict[str, Tensor | None]:
        """Packed mask of every parameter by name, None where all is active."""
        given = {**self._known, **self._masks}
        built = {n: arena.packed_mask(t) for arena in self._arenas for t, n in enumerate(arena.names) if n not in given}
        return {**built, **given}

    @property
    def captures(self) -> bool:
        """Whether gradients are gathered during backward (``capture_gradients``)."""
        return self._capture is not None

    @property
    def sharded(self) -> bool:
        """Whether parameters are sharded (FSDP2), so that this process holds masks and state of its own part only."""
        return any(is_sharded(p) for group in self.param_groups for p in group["params"])

    @property
    def masks(self) -> MaskSet:
        """The masks in force, rebuilt from the indices."""
        if self._regions:
            raise RuntimeError(
                "a process of a sharded training has its part of the masks only: keep the MaskSet that the optimizer was "
                "given."
            )
        packed = self._current_masks()
        full, shapes = {}, {}
        for name, param, _ in self._layout():
            shapes[name] = tuple(param.shape)
            bits = packed[name]
            full[name] = MaskSet.full_like({name: param}).packed(name) if bits is None else bits
        return MaskSet(full, shapes)

    def initialize_state(self) -> None:
        """Allocates all state now instead of at the first step."""
        self._build()

    def _build(self) -> None:
        """(Re)builds the arenas after construction, new masks, loading, or whatever changed groups or parameters.

        FSDP2 puts other tensors into the groups, models move to other devices and dtypes: state and captured gradients
        follow by name.
        """
        building.build(self)

    def _extract(self) -> dict[str, Saved]:
        """The state as it stands, by name."""
        return {name: Saved(arena.state(t)) for arena in self._arenas for t, name in enumerate(arena.names)}

    # ---- the step ------------------------------------------------------------------------------------------------------
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimizer step.

        Args:
            closure: re-evaluates the model and returns the loss; its value is returned.

        Raises:
            RuntimeError: gradients are captured and none came since the last step.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        stepping.take_step(self)
        return loss

    # ---- loss scaling (torch.amp.GradScaler) ---------------------------------------------------------------------------
    @property
    def _step_supports_amp_scaling(self) -> bool:
        """GradScaler asks this before a step; then it hands over ``grad_scale`` and ``found_inf`` as attributes."""
        if self._capture is not None:
            raise RuntimeError(
                "capture_gradients=True cannot be combined with torch.amp.GradScaler, which looks for dense gradients: "
                "train in bf16 without a scaler, or set capture_gradients=False."
            )
        return True

    # ---- what it knows ---------------------------------------------------------------------------------------------------
    @property
    def active_parameters(self) -> int:
        """Active entries over all parameters."""
        if self._regions:
            whole = [
                sum(a.plan.counts[t] for t, n in enumerate(a.names) if n not in self._regions) for a in self._arenas
            ]
            return sum(whole) + sum(region.active for region in self._regions.values())
        if self._dirty:
            return self.masks.active_parameters
        return sum(arena.plan.active for arena in self._arenas)

    def state_bytes(self) -> int:
        """Bytes of optimizer state, indices and tables included (allocates the state if need be)."""
        self._build()
        return sum(arena.nbytes() for arena in self._arenas)

    def gradient_bytes(self) -> int:
        """Bytes of the compact gradient buffers, which capture and clipping need from backward to step."""
        if self._capture is None and self.max_grad_norm is None:
            return 0
        return sum(arena.plan.active * arena.state_dtype.itemsize for arena in self._arenas)

    def grad_norm(self) -> Tensor:
        """Norm over the active entries at the last step, before clipping: fp32[] on the device.

        Raises:
            RuntimeError: no step has measured it; give ``max_grad_norm`` (``float("inf")`` measures only).
        """
        if self._grad_norm is None or not self._norm_measured:
            raise RuntimeError(
                "no gradient norm yet: it is measured by step() when max_grad_norm is set (inf measures only)."
            )
        return self._grad_norm

    def grad_norm_buffer(self) -> Tensor:
        """The tensor that every measuring step writes the norm into: fp32[], NaN before the first one."""
        if self._grad_norm is None:
            device = self.param_groups[0]["params"][0].device
            self._grad_norm = torch.full((), float("nan"), device=device)
        return self._grad_norm

    @property
    def skipped_steps(self) -> int:
        """Steps skipped because of a non-finite gradient norm or an overflow that a GradScaler found."""
        return 0 if self._skipped is None else int(self._skipped)

    def observe_gradients(self, observer: Callable[[Tensor, Tensor], None] | None) -> None:
        """Shows every gradient to ``observer(param, gradient)`` before capture drops it; None ends that.

        Without capture nothing is called: gradients stay in ``param.grad``. The observer must not write to them.
        """
        if self._capture is not None:
            self._capture.observer = observer
            for _, param, _ in self._layout():
                structured.watch(param, observer is not None)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Discards gradients, captured ones included."""
        if self._capture is not None:
            self._capture.discard()
        super().zero_grad(set_to_none)

    def prepare_ddp(self, model: torch.nn.Module) -> None:
        """Call it before ``DistributedDataParallel(model)`` to spare DDP's buckets, of the size of all dense gradients.

        Only with ``capture_gradients``, and only for memory: without it DDP makes its buckets, and they are freed at once
        (an optimizer made after wrapping) or after the first step (one made before). Every process gets the trained
        parameters of the first one here, since DDP will ignore them.
        """
        if self.captures and distributed.several_processes(self):
            distributed.leave_out_of_ddp(model, self)
            distributed.broadcast_parameters(self)

    # ---- masks and weights that change -----------------------------------------------------------------------------------
    def update_masks(
        self, masks: MaskSet | Mapping[str, Tensor], *, copies: Mapping[str, Tensor] | None = None
    ) -> None:
        """Trains other entries from now on.

        Entries active before and after keep moments, master weight and age; new ones start at age 0 with their own bias
        correction; dropped ones keep their value. Parameters without a new mask keep theirs.

        Args:
            masks: the new masks, of all parameters or of some.
            copies: packed bits of some of these masks where the parameters are: they need not be sent there.
        """
        building.update_masks(self, masks, copies)

    @torch.no_grad()
    def sync_from_params(self) -> None:
        """Makes the weights as they are the exact master weights.

        Needed after writes through ``param.data`` under ``master_weights="fp32"`` only. A residual merely refines the
        weight it is added to, by less than half a unit in its last place, and a copy follows what version counters tell,
        so that weights changed by somebody else are never overwritten by an older value.
        """
        for arena in self._arenas:
            arena.forget_master_precision()

    @contextlib.contextmanager
    def base_weights(self) -> Iterator[None]:
        """Inside, the model is what it was before training: a reference model without a second copy.

        Active entries are swapped with a compact copy, made at the first use, which must come before the first step.
        """
        sharding.refuse(self, "base_weights()")
        with weights.base_weights(self):
            yield

    def export_delta(self, changed_only: bool = False) -> Delta:
        """Every active entry with its value, and what left the mask since the last export.

        Args:
            changed_only: only entries that differ from the last export (the first one compares with the base copy that
                :meth:`base_weights` keeps, or else holds everything).

        After :meth:`load_state_dict` of a training whose masks changed, nobody knows what else differs from the last
        export: the next one holds every entry of the parameters (``changed_only``: that is not known to be the same).
        """
        sharding.refuse(self, "export_delta()")
        return weights.export_delta(self, changed_only)

    # ---- saving, loading, copying ----------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """torch's layout (``state``, ``param_groups``) plus ``sparseopt``: format version, mask fingerprint, counters."""
        return checkpoint.state_dict(self)

    def full_state_dict(self) -> dict[str, Any]:
        """The state dict of one process with the whole model, put together from all processes where it is sharded (FSDP2).

        Every process must call it; the first one gets it, on the CPU, the others ``{}``. :meth:`load_state_dict` takes it,
        sharded or not. For checkpoints use torch.distributed.checkpoint, which moves no state between processes.
        """
        return checkpoint.full_state_dict(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores state exactly, by parameter name; also takes the state of a dense ``torch.optim.AdamW``.

        Raises:
            ValueError: saved under another mask (unless ``adopt_masks`` is set), or for other parameters.
        """
        checkpoint.load_state_dict(self, state_dict)

    def __getstate__(self) -> dict[str, Any]:
        return checkpoint.getstate(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        checkpoint.setstate(self, state)
