"""GradientEMA: an exponential moving average of squared gradients, and masks of the entries where it is large.

    acc_t = beta acc_{t-1} + (1 - beta) g_t^2          fp32, of the parameter's shape
    active = acc > tolerance                           the tolerance applies to the SQUARED gradient: 1e-5 is |g| of 0.003
    rms = sqrt(mean(acc) + epsilon)                    of each parameter; rms_mean is the mean of these

What is stored is acc / scale, with scale = beta^k for the k updates since it was last 1: parameters without a gradient
decay without being touched; reading multiplies the scale in. An update is one launch of ``accumulate_squares_`` for all
parameters with gradients of a dtype (10 bytes of traffic per bf16 entry). Nothing in an update waits for the device.
"""

from __future__ import annotations

import collections
import json
import math
import os
from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor, nn
from torch import distributed as dist

from sparseopt import functional
from sparseopt._files import FormatError
from sparseopt._safetensors import TensorFile
from sparseopt._sharded import held_entries, is_sharded, like, local, reduce_over_shards, whole, writes
from sparseopt.masks._accumulating import accumulate, by_device, zeros_like
from sparseopt.masks.gradient_stats import FORMAT, VERSION, write_gradient_stats
from sparseopt.masks.maskset import MaskSet, normalize_name

__all__ = ["GradientEMA"]

SMALLEST_SCALE = 2.0**-20  # then it is multiplied in: what is stored stays far from fp32's limits
PIECE = 1 << 24  # entries moved between host and device at a time, 64 MiB
METHOD = "gradient_ema"


class GradientEMA:
    """Accumulates the squared gradients of a model's trained parameters.

    Call :meth:`update` once per optimizer step, between the last ``backward()`` and clipping. Under a SparseAdamW that
    captures gradients nothing is left in ``.grad`` by then: ``optimizer.observe_gradients(ema.take)`` shows them before
    they are dropped. They are then kept until the update, as dense gradients would be without capture.

    Parameters that are frozen (``requires_grad=False``) when this is made are not accumulated; :meth:`masks` has them with
    nothing active. Tied parameters count once. A parameter without a gradient in a step had the gradient zero. A NaN or an
    infinity in a gradient stays in the accumulation (NaN is inactive), except under a loss scale.

    Under FSDP2, after ``fully_shard``, a process accumulates its rows. All else is of whole parameters: every process makes
    each call, and the first one writes the file.

    Attributes:
        beta, epsilon, bias_correction, offload: as given.
        updates: number of updates; those skipped on the device because of an overflow included.
    """

    def __init__(
        self, model: nn.Module, beta: float = 0.99, epsilon: float = 1e-8, *, bias_correction: bool = False,
        offload: bool = False,
    ) -> None:  # fmt: skip
        """Allocates 4 bytes per trained entry that this process holds.

        Args:
            model: whose parameters; on its final device.
            beta: decay rate, 0 <= beta < 1.
            epsilon: added to the mean under the root.
            bias_correction: divide by ``1 - beta^t`` whenever the accumulation is compared or averaged (not in files).
            offload: keep the accumulation in pinned memory of the host; every update moves it to the device and back.

        Raises:
            ValueError: numbers out of range, a model in which nothing trains, or shards that are not rows.
            TypeError: a complex parameter.
        """
        if not 0 <= beta < 1:
            raise ValueError(f"beta must lie in [0, 1), got {beta}.")
        if not (epsilon >= 0 and math.isfinite(epsilon)):
            raise ValueError(f"epsilon must be a finite number, 0 or more, got {epsilon}.")
        self.beta, self.epsilon = float(beta), float(epsilon)
        self.bias_correction, self.offload = bias_correction, offload
        self.updates = 0
        self._skipped: Tensor | None = None  # int64[] on the device
        self._scale = 1.0
        self._shapes = {normalize_name(name): tuple(p.shape) for name, p in model.named_parameters()}
        trained = {normalize_name(name): p for name, p in model.named_parameters() if p.requires_grad}
        for name, param in trained.items():
            if param.is_complex():
                raise TypeError(f"gradients of real parameters can be accumulated, {name!r} is {param.dtype}.")
        if not trained:
            raise ValueError(f"{type(model).__name__} has no parameter that trains (requires_grad=True).")
        self._names, self._params = list(trained), list(trained.values())
        self._positions = {id(param): i for i, param in enumerate(self._params)}
        self._ranges = [held_entries(name, param) for name, param in trained.items()]
        self._stored = zeros_like([local(param) for param in self._params], offload)
        self._taken: dict[int, Tensor] = {}

    @property
    def names(self) -> list[str]:
        """Parameters that are accumulated."""
        return list(self._names)

    @property
    def frozen(self) -> list[str]:
        """Parameters that are not: they did not train."""
        return [name for name in self._shapes if name not in set(self._names)]

    @property
    def nbytes(self) -> int:
        """Bytes of the accumulation that this process holds."""
        return sum(stored.nbytes for stored in self._stored)

    # ---- gradients -----------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def take(self, param: Tensor, gradient: Tensor) -> None:
        """Adds a gradient that will not be in ``param.grad`` at the update, as autograd would have added it there.

        Args:
            param: one of the model's parameters; others are ignored.
            gradient: of its shape, or of this process' part of it; kept until the update, not copied, and not written to.
        """
        i = self._positions.get(id(param))
        if i is not None:
            before = self._taken.get(i)
            gradient = local(gradient).detach()
            self._taken[i] = gradient if before is None else before + gradient

    def discard(self) -> None:
        """Forgets gradients that came through :meth:`take` since the last update."""
        self._taken.clear()

    @torch.no_grad()
    def update(self, grad_scale: Tensor | None = None) -> None:
        """Accumulates this step's gradient: what is in ``.grad``, and what was taken.

        Args:
            grad_scale: loss scale that the gradients still carry (``torch.amp.GradScaler``), one number on the device. With
                it, a step whose gradients are not all finite changes nothing.

        Raises:
            RuntimeError: there is no gradient at all, or a sparse one, or a parameter has moved to another device.
        """
        gradients = self._gradients()
        if not gradients:
            raise RuntimeError(
                "update() found no gradient: call it after backward() and before zero_grad() (under gradient capture, "
                "after optimizer.observe_gradients(ema.take))."
            )
        decay: float | Tensor | None = None  # what the stored numbers are multiplied by
        inverse: Tensor | None = None
        scale = self._scale * self.beta
        if grad_scale is not None:
            finite = self._all_finite(gradients, grad_scale.device)
            inverse = grad_scale.double().reciprocal().float() * finite
            decay = torch.where(finite, scale, self._scale)
            self._skipped = (~finite).long() + (0 if self._skipped is None else self._skipped)
            scale = 1.0
        elif scale < SMALLEST_SCALE:
            decay, scale = scale, 1.0
        weight = (1 - self.beta) / scale
        if self.offload:
            self._update_offloaded(gradients, decay, weight, inverse)
        else:
            self._update_in_place(gradients, decay, weight, inverse)
        self._scale = scale
        self.updates += 1
        self._taken.clear()

    def _all_finite(self, gradients: dict[int, Tensor], device: torch.device) -> Tensor:
        """Whether the whole gradients are: bool[] on the device, the same on all processes."""
        flags = [torch.ones((), dtype=torch.int32, device=device)] * len(self._params)
        held = {i: gradient for i, gradient in gradients.items() if gradient.numel()}
        for i, norm in zip(held, torch._foreach_norm(list(held.values()), math.inf) if held else [], strict=True):
            flags[i] = norm.isfinite().to(device, torch.int32)
        return reduce_over_shards(self._params, flags, dist.ReduceOp.MIN).bool().all()

    def _gradients(self) -> dict[int, Tensor]:
        result = dict(self._taken)
        for i, param in enumerate(self._params):
            if param.grad is not None:
                gradient = local(param.grad).detach()
                result[i] = result[i] + gradient if i in result else gradient
        for i, gradient in result.items():
            if gradient.layout is not torch.strided:
                raise RuntimeError(f"sparse gradients cannot be accumulated (parameter {self._names[i]!r}).")
            if not self.offload and gradient.device != self._stored[i].device:
                raise RuntimeError(
                    f"the gradient of {self._names[i]!r} is on {gradient.device}, its accumulation on "
                    f"{self._stored[i].device}: make the GradientEMA after the model has moved."
                )
        return result

    def _update_in_place(
        self, gradients: dict[int, Tensor], decay: float | Tensor | None, weight: float, inverse: Tensor | None
    ) -> None:
        lists: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
        for i, home in enumerate(self._stored):
            gradient = gradients.get(i)
            if gradient is None:
                if decay is None:
                    continue
                gradient = home.new_empty(0)
            together = lists.setdefault((home.device, gradient.dtype), ([], []))
            together[0].append(home)
            together[1].append(gradient)
        for stored, arrived in lists.values():
            accumulate(stored, arrived, decay, weight, inverse)

    def _update_offloaded(
        self, gradients: dict[int, Tensor], decay: float | Tensor | None, weight: float, inverse: Tensor | None
    ) -> None:
        """Piece by piece, on the stream that made the gradients: copies from and to pinned memory wait for nobody."""
        for i, param in enumerate(self._params):
            gradient = gradients.get(i)
            if gradient is None and decay is None:
                continue
            device = local(param).device if gradient is None else gradient.device
            flat = None if gradient is None else gradient.reshape(-1)
            for start in range(0, self._stored[i].numel(), PIECE):
                home = self._stored[i].view(-1)[start : start + PIECE]
                squares = home.to(device, non_blocking=True)
                part = squares.new_empty(0) if flat is None else flat[start : start + PIECE]
                accumulate([squares], [part], decay, weight, inverse)
                if squares is not home:  # a CPU tensor is its own copy
                    home.copy_(squares, non_blocking=True)

    # ---- what was accumulated ----------------------------------------------------------------------------------------
    @torch.no_grad()
    def _settle(self) -> list[Tensor]:
        """The accumulation itself, its scale multiplied in: fp32, one tensor per parameter. Waits for offloaded copies."""
        if self.offload:
            for device in {param.device for param in self._params if param.is_cuda}:
                torch.cuda.synchronize(device)
        if self._scale != 1.0:
            for stored in by_device(self._stored):
                torch._foreach_mul_(stored, self._scale)
            self._scale = 1.0
        return self._stored

    @property
    def count(self) -> int:
        """Updates that counted: all but those skipped because of an overflow. Waits for the device under a loss scale."""
        return self.updates - (0 if self._skipped is None else int(self._skipped))

    def _correction(self) -> float:
        """What the accumulation is divided by."""
        count = self.count if self.bias_correction else 0
        return 1 - self.beta**count if count else 1.0

    def __getitem__(self, name: str) -> Tensor:
        """A copy of one parameter's whole accumulation, not bias-corrected: fp32, of its shape, where it is kept."""
        if normalize_name(name) not in self._names:
            raise KeyError(f"nothing is accumulated for {name!r}.")
        self._settle()
        return self._whole(self._names.index(normalize_name(name))).clone()

    def _whole(self, i: int) -> Tensor:
        """One parameter's accumulation, of all processes; what one process alone has is not copied."""
        return whole(like(self._params[i], self._stored[i]))

    @torch.no_grad()
    def rms_mean(self) -> float:
        """Mean over the accumulated parameters of ``sqrt(mean(acc) + epsilon)``. Waits for the device."""
        divisor = self._correction()
        held = [(param, stored) for param, stored in zip(self._params, self._settle(), strict=True) if param.numel()]
        if not held:
            return 0.0
        # A mean in fp32, or this process' share of one: its part's sum by the whole length.
        means = [s.sum(dtype=torch.float64) / p.numel() if is_sharded(p) else s.mean().double() for p, s in held]
        stacked = reduce_over_shards([param for param, _ in held], means, dist.ReduceOp.SUM)
        return float((stacked / divisor + self.epsilon).sqrt().mean())

    @overload
    def masks(self, tolerance: float) -> MaskSet: ...
    @overload
    def masks(self, tolerance: Sequence[float]) -> list[MaskSet]: ...
    @torch.no_grad()
    def masks(self, tolerance: float | Sequence[float]) -> MaskSet | list[MaskSet]:
        """The entries whose accumulated squared gradient exceeds a tolerance, over all parameters of the model.

        Args:
            tolerance: of the squared gradient, 0 or more; several give one MaskSet each.

        Raises:
            ValueError: a tolerance that is not a finite number, 0 or more, or none.
        """
        limits = check_tolerances(tolerance)
        count, divisor = self.count, self._correction()
        packed = [self._packed(limit * divisor) for limit in limits]
        about = {"method": METHOD, "beta": self.beta, "epsilon": self.epsilon, "updates": count,
                 "bias_correction": self.bias_correction, "frozen_parameters": len(self._shapes) - len(self._names)}  # fmt: skip
        sets = [
            MaskSet(bits, self._shapes, {"tolerance": limit, **about}, copy_bits=False)
            for bits, limit in zip(packed, limits, strict=True)
        ]
        return sets if isinstance(tolerance, Sequence) else sets[0]

    def _packed(self, limit: float) -> dict[str, Tensor]:
        """Packed masks of all parameters, on the CPU: one copy from each device."""
        found: dict[torch.device, dict[str, Tensor]] = {}
        for name, param, stored in zip(self._names, self._params, self._settle(), strict=True):
            active = stored > limit
            if is_sharded(param):  # as bytes: not every backend of processes moves booleans
                active = whole(like(param, active.to(torch.uint8))).bool()
            found.setdefault(active.device, {})[name] = functional.pack_mask(active)
        packed: dict[str, Tensor] = {}
        for masks in found.values():
            sizes = [bits.numel() for bits in masks.values()]
            packed |= zip(masks, torch.cat(list(masks.values())).cpu().split(sizes), strict=True)
        for name, shape in self._shapes.items():
            if name not in packed:
                packed[name] = torch.zeros((math.prod(shape) + 7) // 8, dtype=torch.uint8)
        return {name: packed[name] for name in self._shapes}

    # ---- files -------------------------------------------------------------------------------------------------------
    def save(self, path: str | os.PathLike[str], **metadata: str) -> None:
        """Writes the accumulation, whole or not at all: gradient statistics that ``sparseopt masks find`` reads too.

        Args:
            path: target, ``.safetensors``, 4 bytes per trained entry. Frozen parameters are only named in the metadata.
            metadata: further text.

        Raises:
            ValueError: there was no update yet.
        """
        count = self.count
        if not count:
            raise ValueError("there is nothing to save: no update has accumulated a gradient yet.")
        about = {
            **metadata, "accumulation": METHOD, "beta": repr(self.beta), "epsilon": repr(self.epsilon),
            "bias_correction": json.dumps(self.bias_correction), "frozen": json.dumps(self.frozen),
        }  # fmt: skip
        self._settle()
        squares = (self._whole(i) for i in range(len(self._names)))
        if writes(self._params):
            specs = {name: (self._shapes[name], torch.float32) for name in self._names}
            write_gradient_stats(path, specs, squares, "batch", count, **about)
        else:
            collections.deque(squares, maxlen=0)  # one after the other, as the process that writes asks for them

    @torch.no_grad()
    def load(self, path: str | os.PathLike[str]) -> None:
        """Continues from a file of :meth:`save`, exactly.

        Raises:
            FileNotFoundError: there is no such file.
            sparseopt.FormatError: it is damaged, or no accumulation of this class.
            ValueError: it is of other parameters or another beta.
        """
        with TensorFile(path) as file:
            about = file.metadata
            if about.get("format") != FORMAT or about.get("accumulation") != METHOD:
                raise FormatError(f"'{path}' holds no accumulation of gradients (format {about.get('format')!r}).")
            if about.get("version") != str(VERSION):
                raise FormatError(
                    f"'{path}' is of version {about.get('version')!r}; this release reads version {VERSION}."
                )
            try:
                beta, count = float(about["beta"]), int(about["count"])
            except (KeyError, ValueError) as error:
                raise FormatError(f"'{path}' is damaged: its beta or count is missing or no number.") from error
            if beta != self.beta:
                raise ValueError(f"'{path}' was accumulated with beta={beta}, not {self.beta}.")
            for name in self._names:
                if file.shapes.get(name) != self._shapes[name]:
                    raise ValueError(
                        f"'{path}' does not fit the model: {name!r} has shape {list(self._shapes[name])} there and "
                        f"{list(file.shapes[name]) if name in file.shapes else 'none'} in the file."
                    )
                if file.dtypes.get(name) != torch.float32:
                    raise FormatError(f"'{path}' is damaged: {name!r} is not fp32.")
            extra = sorted(file.shapes.keys() - set(self._names))
            if extra:
                raise ValueError(f"'{path}' does not fit the model: {extra[0]!r} does not train here.")
            self._settle()  # copies that are under way write to the same memory
            for name, stored, (begin, end) in zip(self._names, self._stored, self._ranges, strict=True):
                for start in range(begin, end, PIECE):
                    piece = file.read(name, start, min(start + PIECE, end))
                    stored.view(-1)[start - begin : start - begin + PIECE].copy_(piece)
        self.updates, self._skipped = count, None
        self._taken.clear()


def check_tolerances(tolerance: float | Sequence[float]) -> list[float]:
    """One or more tolerances as a list.

    Raises:
        ValueError: none, or one that is not a finite number, 0 or more.
    """
    limits = list(tolerance) if isinstance(tolerance, Sequence) and not isinstance(tolerance, str) else [tolerance]
    for limit in limits:
        number = isinstance(limit, (int, float)) and not isinstance(limit, bool)
        if not number or not 0 <= limit < math.inf:
            raise ValueError(f"tolerance must be a finite number, 0 or more, or a list of such, got {tolerance!r}.")
    if not limits or len(set(limits)) < len(limits):
        raise ValueError(f"tolerance must be one number or several different ones, got {tolerance!r}.")
    return [float(limit) for limit in limits]
