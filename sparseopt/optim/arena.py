"""The arena: all optimizer state of the parameters of one device and dtype, flat, in the order of their active entries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparseopt import _backend, functional
from sparseopt._schema import TensorList
from sparseopt.optim.plan import IndexPlan
from sparseopt.reference import join_master, split_master

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["Arena", "Saved"]


@dataclass
class Saved:
    """State of one tensor on its way into an arena.

    Attributes:
        values: ``step`` (0-d), and per active entry of the arena any of ``exp_avg``, ``exp_avg_sq``,
            ``max_exp_avg_sq``, ``residual``, ``master``, ``cohorts``, ``base``; ``births`` fp32[K].
    """

    values: dict[str, Tensor] = field(default_factory=dict)


class Arena:
    """Flat state for T tensors with N active entries (see :mod:`sparseopt._schema`).

    Attributes:
        names, params: the T tensors; of sharded parameters this process' part.
        owners: the parameters that have gradients: ``params``, or the DTensors whose parts they are.
        mesh: of the DTensors.
        plan: where the active entries are.
        steps: fp32[T]; exp_avg, exp_avg_sq, max_exp_avg_sq: fp32[N] (fp64[N] for fp64 parameters).
        residual: int16[N], what a 16-bit weight lacks of its fp32 master weight, or None.
        master: fp32[N], the master weights themselves, or None.
        cohorts, births: uint8[N] and fp32[T, K] once entries of different ages exist, else None.
        compact: fp32[N] gradients of the active entries, there from the first gather to the end of the step.
        squares: fp32[C * n], sums of squares of ``compact``, n by row of the chunk table; 0 where nothing was gathered.
        base: the active entries before training, in the parameters' dtype, where somebody asked for them.
    """

    PER_ENTRY = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "residual", "master", "cohorts", "base")

    def __init__(
        self,
        names: Sequence[str],
        params: Sequence[Tensor],
        packed: Sequence[Tensor | None],
        groups: Sequence[int],
        *,
        amsgrad: bool,
        master_weights: str | None,
    ) -> None:
        self.names, self.params = list(names), list(params)
        self.owners: Sequence[Tensor] = self.params
        self.mesh: DeviceMesh | None = None
        self.device, self.dtype = params[0].device, params[0].dtype
        self.plan = IndexPlan.build(packed, [p.numel() for p in params]).to(self.device)
        self.state_dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        n, tensors = self.plan.active, self.plan.tensors
        self.steps = torch.zeros(tensors, dtype=torch.float32, device=self.device)
        self.exp_avg = self._zeros(n)
        self.exp_avg_sq = self._zeros(n)
        self.max_exp_avg_sq = self._zeros(n) if amsgrad else None
        kind = master_weights if self.dtype in (torch.bfloat16, torch.float16) else None
        self.residual = torch.zeros(n, dtype=torch.int16, device=self.device) if kind == "residual" else None
        self.master: Tensor | None = None
        # (address, version) of each parameter when its master weights were last known to be right.
        self._seen: list[tuple[int, int]] = []
        if kind == "fp32":
            self.master = self._zeros(n)
            functional.gather_grads_(self.master, [p.detach().contiguous() for p in params], self.plan)
            self._look()
        self.cohorts: Tensor | None = None
        self.births: Tensor | None = None
        self.follow_plan()
        self.nothing = params[0].detach().new_empty(0)  # stands for a tensor that takes no part
        self.dense_bytes = [p.numel() * p.element_size() for p in params]
        # Addresses and presence of the parameters, and what a step passes for them.
        self._views: tuple[list[int], Sequence[bool], TensorList] = ([], [], TensorList())
        self._op = _backend.direct(self.device)
        self.base: Tensor | None = None
        self.groups = torch.tensor(list(groups), dtype=torch.int32, device=self.device)
        self.hyper: Tensor | None = None
        self._hyper_rows: list[tuple[float, ...]] = []
        self._empty: tuple[list[float], Tensor] | None = None

    def _zeros(self, n: int) -> Tensor:
        return torch.zeros(n, dtype=self.state_dtype, device=self.device)

    # ---- views -------------------------------------------------------------------------------------------------------
    def state(self, tensor: int) -> dict[str, Tensor]:
        """Views of one tensor's state; what torch keeps as ``optimizer.state[param]``."""
        entries = self.plan.arena(tensor)
        result = {"step": self.steps[tensor]}
        for name in self.PER_ENTRY:
            buffer = getattr(self, name)
            if buffer is not None:
                result[name] = buffer[entries]
        if self.births is not None:
            result["births"] = self.births[tensor]
        return result

    def packed_mask(self, tensor: int) -> Tensor | None:
        """The tensor's packed mask on the CPU; None when every entry is active."""
        if self.plan.runs[tensor] == 0:
            return None
        mask = torch.zeros(self.plan.numels[tensor], dtype=torch.bool)
        mask[self.plan.positions(tensor).cpu()] = True
        return functional.pack_mask(mask)

    def nbytes(self) -> int:
        """Bytes of persistent state: moments, residuals, ages, base copy, indices, tables (not ``compact``)."""
        tensors = [
            self.steps,
            self.groups,
            self.hyper,
            self.births,
            self.squares,
            *(getattr(self, n) for n in self.PER_ENTRY),
        ]
        return self.plan.nbytes + sum(t.nbytes for t in tensors if t is not None)

    # ---- hyper-parameters ----------------------------------------------------------------------------------------------
    def set_hyper(self, rows: Sequence[Sequence[float | Tensor]]) -> None:
        """Updates the device table; numbers are sent only when they changed, tensors are copied on the device."""
        numbers = [tuple(0.0 if isinstance(v, Tensor) else float(v) for v in row) for row in rows]
        if numbers != self._hyper_rows or self.hyper is None:
            table = torch.tensor(numbers, dtype=torch.float64)
            if self.hyper is None or self.hyper.shape != table.shape:
                self.hyper = table.to(self.device)
            else:
                self.hyper.copy_(table, non_blocking=True)
            self._hyper_rows = numbers
        for r, row in enumerate(rows):
            for c, value in enumerate(row):
                if isinstance(value, Tensor):
                    self.hyper[r, c].copy_(value.detach().reshape(()), non_blocking=True)

    def follow_plan(self) -> None:
        """Buffers of gradients for the plan as it is, with nothing in them."""
        self.compact: Tensor | None = None
        self._compact_chunks: Tensor | None = None
        self.squares = torch.zeros(
            len(self.plan.chunks) * self.plan.squares_per_chunk, dtype=self.state_dtype, device=self.device
        )

    def forget_versions(self) -> None:
        """The next step compares every master with the weight that is there."""
        self._seen = []

    # ---- gradients and the step --------------------------------------------------------------------------------------
    def gradient_buffer(self) -> Tensor:
        if self.compact is None:
            self.compact = torch.empty(self.plan.active, dtype=self.state_dtype, device=self.device)
        return self.compact

    def gather(self, first: int, grads: Sequence[Tensor], accumulate: bool, compact: bool = False) -> None:
        """Adds (or writes) the active entries of gradients of the tensors ``first ..`` to the compact buffer.

        Args:
            first: the tensor that ``grads[0]`` belongs to.
            grads: dense gradients, or with ``compact`` their active entries alone, in arena order.
            accumulate: add to what is there.
            compact: as said.
        """
        last, per_chunk = first + len(grads), self.plan.squares_per_chunk
        rows = slice(self.plan.first_chunk[first], self.plan.first_chunk[last])
        if compact and self._compact_chunks is None:
            self._compact_chunks = self.plan.compact_chunks()
        chunks = self.plan.chunks if self._compact_chunks is None or not compact else self._compact_chunks
        self._op("gather_grads_")(
            self.gradient_buffer(), [g if g.is_contiguous() else g.contiguous() for g in grads], self.plan.indices,
            chunks[rows], first, accumulate, self.plan.run,
            self.squares[rows.start * per_chunk : rows.stop * per_chunk],
        )  # fmt: skip

    def set_gradient(self, tensor: int, values: Tensor) -> None:
        """Puts compact gradients of one tensor into the buffer."""
        self.gradient_buffer()[self.plan.arena(tensor)] = values.to(self.device)
        rows = slice(self.plan.first_chunk[tensor], self.plan.first_chunk[tensor + 1])
        sums = torch.cat([values.new_zeros(1, dtype=torch.float64), values.double().square().cumsum(0)]).to(self.device)
        start = self.plan.chunks[rows, 2] - self.plan.starts[tensor]
        table = self.squares.view(len(self.plan.chunks), -1)
        table[rows] = 0
        table[rows, 0] = (sums[start + self.plan.chunks[rows, 3]] - sums[start]).to(self.state_dtype)

    def forget_gradients(self, keep_buffer: bool) -> None:
        """After a step: the buffer is idle until the next backward, and its memory is of use elsewhere."""
        self.squares.zero_()
        if not keep_buffer:
            self.compact = None

    def step(self, present: Sequence[bool], grads: Sequence[Tensor] | Tensor, multiplier: Tensor | None,
             skip: Tensor | None) -> None:  # fmt: skip
        """One update of the tensors marked ``present``."""
        assert self.hyper is not None
        follow = self.master is not None and self._seen != [(p.data_ptr(), p._version) for p in self.params]
        views, copied = self._contiguous(present)
        compact = grads if isinstance(grads, Tensor) else None
        self._op("sparse_adamw_")(
            views, [] if isinstance(grads, Tensor) else grads, compact, self.plan.indices, self.plan.chunks,
            self.groups, self.hyper, self.steps, self.exp_avg, self.exp_avg_sq, self.max_exp_avg_sq, self.residual,
            self.master, self.cohorts, self.births, _on(multiplier, self.device), _on(skip, self.device),
            self.plan.run, follow,
        )  # fmt: skip
        # The op bumps versions when it goes through the dispatcher; bumping them twice harms nobody.
        torch.autograd.graph.increment_version([p for p, here in zip(self.params, present, strict=True) if here])
        if copied:
            for param, updated, here in zip(self.params, views, present, strict=True):
                if here and updated.data_ptr() != param.data_ptr():
                    param.copy_(updated)
        if not follow or all(present):  # else some tensors are still to be compared
            self._look()

    def count_for_empty_parts(self, present: Sequence[bool], skip: Tensor | None) -> None:
        """Kernels take an empty tensor for an absent one. Where it is an empty part of a sharded one its step counts, too:
        whichever process saves the count, it is the same."""
        empty = [float(here and not numel) for here, numel in zip(present, self.plan.numels, strict=True)]
        if any(empty):
            if self._empty is None or self._empty[0] != empty:
                self._empty = (empty, torch.tensor(empty, device=self.device))
            self.steps += self._empty[1] if skip is None else self._empty[1] * (1 - skip.to(self.device))

    def _contiguous(self, present: Sequence[bool]) -> tuple[TensorList, bool]:
        """(the parameters as kernels take them: row by row, without autograd, nothing where absent; whether any is a
        copy, which is good for one step)."""
        addresses = [p.data_ptr() for p in self.params]
        if addresses == self._views[0] and present == self._views[1]:
            return self._views[2], False
        views = TensorList(
            p.detach().contiguous() if here else self.nothing for p, here in zip(self.params, present, strict=True)
        )
        copied = any(
            here and view.data_ptr() != address
            for view, address, here in zip(views, addresses, present, strict=True)
        )  # fmt: skip
        if not copied:
            self._views = (addresses, present, views)
        return views, copied

    # ---- master weights and others who write the parameters ----------------------------------------------------------
    def _look(self) -> None:
        if self.master is not None:
            self._seen = [(p.data_ptr(), p._version) for p in self.params]

    def forget_master_precision(self) -> None:
        """Makes the weights as they are the exact master weights."""
        if self.residual is not None:
            self.residual.zero_()
        if self.master is not None:
            for tensor in range(self.plan.tensors):
                self.master[self.plan.arena(tensor)] = self.values(tensor).float()
            self._look()

    # ---- active entries of the parameters ----------------------------------------------------------------------------
    def values(self, tensor: int) -> Tensor:
        """A copy of the active entries of a parameter, in its dtype, sorted by flat index."""
        return self.params[tensor].detach().reshape(-1)[self.plan.positions(tensor)]

    @torch.no_grad()
    def write(self, tensor: int, values: Tensor) -> None:
        """Sets the active entries of a parameter."""
        param = self.params[tensor]
        if param.is_contiguous():
            param.view(-1)[self.plan.positions(tensor)] = values
        else:
            flat = param.reshape(-1).clone()
            flat[self.plan.positions(tensor)] = values
            param.copy_(flat.view(param.shape))

    def exchange(self, values: Tensor) -> Tensor:
        """Writes all active entries, in arena order; returns what was there. Two launches, and nothing waits for a device."""
        views, copied = self._contiguous([True] * self.plan.tensors)
        before = torch.empty(self.plan.active, dtype=self.state_dtype, device=self.device)
        functional.gather_grads_(before, views, self.plan)
        functional.scatter_values_(views, values, self.plan.indices, self.plan.chunks, run=self.plan.run)
        if copied:
            for param, updated in zip(self.params, views, strict=True):
                if updated.data_ptr() != param.data_ptr():
                    param.copy_(updated)
        torch.autograd.graph.increment_version(self.params)
        return before.to(self.dtype)

    def keep_base(self) -> None:
        """Copies the active entries as they are now."""
        parts = [self.values(t) for t in range(self.plan.tensors)]
        self.base = torch.cat(parts) if parts else torch.empty(0, dtype=self.dtype, device=self.device)

    # ---- taking over earlier state -----------------------------------------------------------------------------------
    def adopt(self, tensor: int, saved: Saved) -> None:
        """Fills one tensor's state.

        Args:
            tensor: which one.
            saved: its state, of the same active entries.
        """
        entries, values = self.plan.arena(tensor), saved.values
        if "step" in values:
            self.steps[tensor] = values["step"].to(self.device, torch.float32)
        values = self._master_as_kept(tensor, values)
        for name in self.PER_ENTRY:
            if name not in values or name == "cohorts":
                continue
            if name == "base" and self.base is None:
                self.base = torch.cat([self.values(t) for t in range(self.plan.tensors)])
            buffer = getattr(self, name)
            if buffer is not None:
                buffer[entries] = values[name].reshape(-1).to(self.device, buffer.dtype)
        self.forget_versions()  # whatever was loaded when
        if "cohorts" in values:
            self._adopt_ages(tensor, values["cohorts"], values["births"].to(self.device))

    def _master_as_kept(self, tensor: int, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Turns master weights saved as residual into a copy, or the other way round, where this arena keeps the other."""
        values = dict(values)
        if self.master is not None and "residual" in values:
            rest = values.pop("residual").reshape(-1).to(self.device, torch.int16)
            values["master"] = join_master(self.values(tensor), rest)
        elif self.residual is not None and "master" in values:
            weights = self.values(tensor)
            rounded, rest = split_master(values.pop("master").reshape(-1).to(self.device, torch.float32), self.dtype)
            values["residual"] = torch.where(rounded == weights, rest, 0)
        return values

    def _adopt_ages(self, tensor: int, cohorts: Tensor, births: Tensor) -> None:
        if self.cohorts is None or self.births is None:
            self.cohorts = torch.zeros(self.plan.active, dtype=torch.uint8, device=self.device)
            self.births = torch.zeros(self.plan.tensors, 1, device=self.device)
        if births.numel() > self.births.shape[1]:
            wider = self.births.new_zeros(self.plan.tensors, births.numel())
            wider[:, : self.births.shape[1]] = self.births
            self.births = wider
        self.births[tensor, : births.numel()] = births
        self.cohorts[self.plan.arena(tensor)] = cohorts.to(self.device)


def _on(value: Tensor | None, device: torch.device) -> Tensor | None:
    return None if value is None else value.to(device, torch.float32, non_blocking=True)
