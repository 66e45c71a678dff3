"""The masks of many layers as packed bits where the weights are, and which entries leave and join, all layers at once.

:func:`choose_each` moves layer by layer, whatever their scores and pattern; without a criterion and groups of M,
:func:`choose_together` finds the same entries in a few launches for any number of layers, without waiting for the device
(random growth draws other numbers).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sparseopt import functional
from sparseopt._schema import mask_begins
from sparseopt.masks.maskset import MaskSet
from sparseopt.optim.dynamic.criteria import Criterion, keep_scores
from sparseopt.optim.dynamic.layers import Layer
from sparseopt.optim.dynamic.patterns import Pattern
from sparseopt.optim.dynamic.policy import random_scores, random_seed

__all__ = ["Group", "Move", "Moved", "choose_each", "choose_together", "groups_of", "to_host", "zero_entries"]

# Entries (and the rest of their layer) that are unpacked at a time: more make fewer launches, and need more memory.
UNPACKED = {"cpu": 1 << 22, "cuda": 1 << 28}


@dataclass
class Group:
    """Layers whose weights have one dtype, on one device.

    Attributes:
        layers: the layers.
        positions: theirs among all layers.
        begins: the byte at which the mask of each begins in the vectors (:func:`sparseopt._schema.mask_begins`).
        bits: uint8[B] on the device, the masks in force.
        left: uint8[B], entries that were active once and then dropped.
    """

    layers: list[Layer]
    positions: list[int]
    begins: list[int]
    bits: Tensor
    left: Tensor

    def part(self, vector: Tensor, i: int) -> Tensor:
        """The mask of layer ``i`` in one of the vectors."""
        return vector[self.begins[i] : self.begins[i] + (self.layers[i].numel + 7) // 8]

    def fits(self) -> bool:
        """Whether the weights are still where the vectors are, and of one dtype."""
        home = {(layer.param.device, layer.param.dtype) for layer in self.layers}
        return len(home) == 1 and self.bits.device in {device for device, _ in home}

    def by_name(self, vector: Tensor) -> dict[str, Tensor]:
        return {layer.name: self.part(vector, i) for i, layer in enumerate(self.layers)}


def groups_of(layers: Sequence[Layer], masks: MaskSet, left: Mapping[str, Tensor]) -> list[Group]:
    """The layers by device and dtype of their weights, with their masks and what had left them (packed, on any device)."""
    members: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for position, layer in enumerate(layers):
        members.setdefault((layer.param.device, layer.param.dtype), []).append(position)
    groups = []
    for (device, _), positions in members.items():
        mine = [layers[position] for position in positions]
        begins = mask_begins([layer.numel for layer in mine])
        bits, gone = (torch.zeros(begins[-1], dtype=torch.uint8) for _ in range(2))
        group = Group(mine, positions, begins, bits, gone)
        for i, layer in enumerate(mine):
            group.part(bits, i).copy_(masks.packed(layer.name))
            group.part(gone, i).copy_(left[layer.name])
        group.bits, group.left = bits.to(device), gone.to(device)
        groups.append(group)
    return groups


def to_host(vector: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """``vector`` on the CPU. From a GPU it comes beside what is launched afterwards: it is there when the event says so."""
    if vector.device.type != "cuda":
        return vector.cpu(), None
    host = torch.empty(vector.shape, dtype=vector.dtype, pin_memory=True)
    beside = torch.cuda.Stream(vector.device)
    beside.wait_stream(torch.cuda.current_stream(vector.device))
    with torch.cuda.stream(beside):
        host.copy_(vector, non_blocking=True)
    vector.record_stream(beside)
    return host, beside.record_event()


@torch.no_grad()
def zero_entries(group: Group, gone: Tensor, leaving: Sequence[int]) -> None:
    """Weights that leave become 0, in place and through the version counter.

    Args:
        group: the layers.
        gone: uint8[B], what leaves.
        leaving: layers of the group that something leaves, ascending.
    """
    most = UNPACKED.get(gone.device.type, 1 << 28) // 8
    while leaving:
        begin = group.begins[leaving[0]]
        last = next((k for k, i in enumerate(leaving) if k and group.begins[i + 1] - begin > most), len(leaving))
        bits = gone[begin : group.begins[leaving[last - 1] + 1]]
        entries = functional.unpack_mask(bits, 8 * bits.numel())
        for i in leaving[:last]:
            layer, start = group.layers[i], 8 * (group.begins[i] - begin)
            layer.param.masked_fill_(entries[start : start + layer.numel].view(layer.shape), 0)
        leaving = leaving[last:]


@dataclass
class Moved:
    """What leaves and joins the masks of a group, on its device.

    Attributes:
        gone, came: uint8[B]; what came had been inactive.
        nan: int64[T], NaNs among the active weights.
        odd: int64[T], entries of each gradient that are not finite.
        squares: fp64[], sum of squares of the inactive entries' gradients.
    """

    gone: Tensor
    came: Tensor
    nan: Tensor
    odd: Tensor
    squares: Tensor


class Move(NamedTuple):
    """How many entries of a layer are active before an update, exchanged, and active after it."""

    before: int
    swaps: int
    after: int

    @property
    def leaving(self) -> int:
        return self.swaps + max(0, self.before - self.after)

    @property
    def coming(self) -> int:
        return self.swaps + max(0, self.after - self.before)

    @property
    def moves(self) -> bool:
        return bool(self.swaps) or self.before != self.after


def choose_together(
    group: Group, gradients: Sequence[Tensor] | None, moves: Sequence[Move], random: tuple[int, int] | None
) -> Moved:
    """Of each layer the active entries of smallest |w| leave, and inactive ones come, at any place.

    Args:
        group: the layers.
        gradients: dense, of the layers' sizes: those of largest |gradient| come, unless growth is random.
        moves: how many, of each layer.
        random: (seed, step) where random ones come.
    """
    device = group.bits.device
    weights = [layer.param.detach().contiguous() for layer in group.layers]
    leaving, coming = [move.leaving for move in moves], [move.coming for move in moves]
    seeds = [0 if random is None else random_seed(*random, layer.name) for layer in group.layers]
    numbers = torch.tensor([leaving, coming, seeds]).to(device, non_blocking=True)
    none, nothing = torch.zeros_like(numbers[0]), torch.zeros_like(group.bits)
    result = Moved(nothing, nothing, none, none, torch.zeros((), dtype=torch.float64, device=device))
    if gradients is not None:
        given = [gradient.contiguous() for gradient in gradients]
        if len({gradient.dtype for gradient in given}) > 1:
            given = [gradient.float() for gradient in given]
        wanted = numbers[1] if random is None else none
        result.came, result.odd, result.squares = functional.select_entries(given, group.bits, wanted, grow=True)
    if random is not None and any(coming):
        result.came = functional.select_entries(weights, group.bits, numbers[1], grow=True, seeds=numbers[2])[0]
    if any(move.moves for move in moves):
        result.gone, result.nan, _ = functional.select_entries(weights, group.bits, numbers[0], grow=False)
    return result


def choose_each(
    group: Group, gradients: Sequence[Tensor] | None, moves: Sequence[Move], random: tuple[int, int] | None,
    pattern: Pattern, criterion: Criterion,
) -> Moved:  # fmt: skip
    """The same layer by layer, in groups of M or with a criterion; other arguments as in :func:`choose_together`."""
    gone, came = torch.zeros_like(group.bits), torch.zeros_like(group.bits)
    odd = torch.zeros(len(moves), dtype=torch.int64, device=gone.device)
    squares = torch.zeros((), dtype=torch.float64, device=gone.device)
    for i, (layer, move) in enumerate(zip(group.layers, moves, strict=True)):
        mask = functional.unpack_mask(group.part(group.bits, i), layer.shape)
        gradient = None
        if gradients is not None:
            gradient = gradients[i].float()
            finite = gradient.isfinite()
            odd[i] = gradient.numel() - finite.sum()
            gradient = gradient.where(finite, 0)
            squares += gradient.masked_fill(mask, 0).square().sum()
        if not move.moves:
            continue
        grow = None
        if move.coming:
            if random is not None:
                grow = random_scores(layer.shape, *random, layer.name).to(mask.device)
            else:
                assert gradient is not None
                grow = gradient.abs()
        keep = keep_scores(criterion, layer, mask, gradient, move.leaving)
        leaves, comes = pattern.move(layer, mask, keep, grow, move.swaps, move.after)
        group.part(gone, i).copy_(functional.pack_mask(leaves))
        group.part(came, i).copy_(functional.pack_mask(comes))
    return Moved(gone, came, torch.zeros_like(odd), odd, squares)
