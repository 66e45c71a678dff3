"""MaskSet: which entries of which parameters are active, one bit per entry.

Everything is kept packed on the CPU (8 B parameters: 1 GB) and worked on tensor by tensor; a bool tensor exists only
where somebody asks for one.
"""

from __future__ import annotations

import copy
import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparseopt import functional
from sparseopt.masks._names import normalize_name
from sparseopt.masks.granularity import AUTO, Granularity, granularity_of

__all__ = ["DERIVED_METADATA", "MaskSet", "normalize_name"]

# Metadata that follows from the bits; always present, always computed.
DERIVED_METADATA = ("total_parameters", "active_parameters", "active_fraction", "sparsity")


class MaskSet:
    """An immutable set of masks, parameter name -> active entries.

    Names are normalised (:func:`normalize_name`) when the set is made and when it is asked. Two sets are equal when
    names, shapes and bits are, in any order and whatever their metadata.
    """

    __slots__ = ("_counts", "_fingerprint", "_metadata", "_packed", "_shapes")

    def __init__(
        self,
        packed: Mapping[str, Tensor],
        shapes: Mapping[str, Sequence[int]],
        metadata: Mapping[str, Any] | None = None,
        *,
        copy_bits: bool = True,
        counts: Mapping[str, int] | None = None,
    ) -> None:
        """Makes a set from packed bits.

        Args:
            packed: name -> uint8[ceil(n/8)], little bit order, unused bits zero.
            shapes: name -> shape of the parameter, n entries; the same names.
            metadata: anything that JSON can hold: where the masks came from.
            copy_bits: False takes CPU tensors as they are; nobody may write to them afterwards.
            counts: name -> active entries, where they are known: they are not counted again.

        Raises:
            ValueError: names differ, a size does not fit its shape, unused bits are set, or two names are the same.
        """
        self._packed: dict[str, Tensor] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._counts: dict[str, int] = {}
        self._fingerprint: str | None = None
        self._metadata = copy.deepcopy(
            {key: value for key, value in (metadata or {}).items() if key not in DERIVED_METADATA}
        )
        if packed.keys() != shapes.keys():
            odd = sorted(packed.keys() ^ shapes.keys())[0]
            raise ValueError(f"parameter {odd!r} needs both packed bits and a shape, got only one of them.")
        for raw, bits in packed.items():
            name = normalize_name(raw)
            if name in self._packed:
                raise ValueError(f"two masks are named {name!r} (the second came as {raw!r}).")
            shape = tuple(int(size) for size in shapes[raw])
            _check_bits(name, bits, shape)
            self._packed[name] = bits.detach().to("cpu", copy=copy_bits).contiguous()
            self._shapes[name] = shape
            if counts is not None and raw in counts:
                self._counts[name] = counts[raw]

    # ---- making one --------------------------------------------------------------------------------------------------
    @classmethod
    def from_bool(cls, masks: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None) -> MaskSet:
        """From bool tensors of the parameters' shapes, on any device: ``{name: bool tensor}``."""
        packed, shapes = {}, {}
        for name, mask in masks.items():
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
                raise TypeError(f"the mask of {name!r} must be a bool tensor, got {_describe(mask)}.")
            packed[name] = functional.pack_mask(mask)
            shapes[name] = tuple(mask.shape)
        return cls(packed, shapes, metadata, copy_bits=False)

    @classmethod
    def from_indices(
        cls,
        indices: Mapping[str, Tensor],
        shapes: Mapping[str, Sequence[int]],
        metadata: Mapping[str, Any] | None = None,
    ) -> MaskSet:
        """From flat (row-major) indices in any order; a name in ``shapes`` without indices has nothing active.

        Args:
            indices: name -> integer tensor of flat indices, 0 <= index < n.
            shapes: name -> shape of the parameter.
        """
        for name in indices:
            if name not in shapes:
                raise ValueError(f"indices of {name!r} came without its shape.")
        packed = {}
        for name, shape in shapes.items():
            n = math.prod(shape)
            mask = torch.zeros(n, dtype=torch.bool)
            where = indices.get(name)
            if where is not None and where.numel():
                if where.dtype.is_floating_point or where.dtype in (torch.bool, torch.complex64, torch.complex128):
                    raise TypeError(f"indices of {name!r} must be integers, got {_describe(where)}.")
                where = where.detach().reshape(-1).to("cpu", torch.int64)
                low, high = int(where.min()), int(where.max())
                if low < 0 or high >= n:
                    raise ValueError(f"indices of {name!r} must lie in 0..{n - 1}, got {low}..{high}.")
                mask[where] = True
            packed[name] = functional.pack_mask(mask)
        return cls(packed, shapes, metadata, copy_bits=False)

    @classmethod
    def full_like(
        cls, model: torch.nn.Module | Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None
    ) -> MaskSet:
        """Everything active: every parameter of a model (tied ones once), or every tensor of a dict."""
        shapes = _shapes_of(model)
        return cls({name: _ones(math.prod(shape)) for name, shape in shapes.items()}, shapes, metadata, copy_bits=False)

    @classmethod
    def random(
        cls,
        model: torch.nn.Module | Mapping[str, Tensor],
        density: float,
        seed: int = 0,
        granularity: Granularity = 1,
        metadata: Mapping[str, Any] | None = None,
    ) -> MaskSet:
        """Uniformly random masks: exactly ``round(density * n)`` active entries in every tensor.

        With a granularity, whole groups (as in :func:`sparseopt.find_masks`): never more than that, and less than one
        group below. A tensor's mask depends on seed, name and shape only, not on the other tensors.
        """
        from sparseopt.masks._structured import random_mask

        if not 0 <= density <= 1:
            raise ValueError(f"density must lie in 0..1, got {density}.")
        grain = granularity_of(granularity)
        if grain == AUTO:
            raise ValueError("granularity='auto' chooses by scores, which random masks have none of: use find_masks().")
        shapes = _shapes_of(model)
        packed = {}
        for name, shape in shapes.items():
            digest = hashlib.sha256(f"{int(seed)}:{normalize_name(name)}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            packed[name] = random_mask(shape, round(density * math.prod(shape)), grain, generator)
        described = {"method": "random", "seed": int(seed), "granularity": grain, "scope": "per_tensor"}
        return cls(packed, shapes, {**described, **(metadata or {})}, copy_bits=False)

    # ---- reading it --------------------------------------------------------------------------------------------------
    def __getitem__(self, name: str) -> Tensor:
        """A new bool tensor of the parameter's shape, on the CPU."""
        return functional.unpack_mask(self.packed(name), self._shapes[normalize_name(name)])

    def packed(self, name: str) -> Tensor:
        """uint8[ceil(n/8)]: the set's own bits, without a copy; do not write to it."""
        try:
            return self._packed[normalize_name(name)]
        except KeyError:
            raise KeyError(f"no mask for parameter {name!r}; this set has {len(self)} masks, {self._some()}.") from None

    def indices(self, name: str) -> Tensor:
        """Sorted flat indices of the active entries: int32, int64 for tensors past 2^31 entries."""
        bits = self.packed(name)
        return functional.mask_indices(bits, math.prod(self._shapes[normalize_name(name)]))

    def count(self, name: str) -> int:
        """Number of active entries of one parameter."""
        bits, name = self.packed(name), normalize_name(name)
        if name not in self._counts:
            self._counts[name] = int(functional.popcount(bits))
        return self._counts[name]

    @property
    def counts(self) -> dict[str, int]:
        """Active entries by name."""
        return {name: self.count(name) for name in self._packed}

    @property
    def names(self) -> list[str]:
        return list(self._packed)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(self._shapes)

    @property
    def total_parameters(self) -> int:
        return sum(math.prod(shape) for shape in self._shapes.values())

    @property
    def active_parameters(self) -> int:
        return sum(self.counts.values())

    @property
    def density(self) -> float:
        """Active share of all entries; 0 for a set without entries."""
        total = self.total_parameters
        return self.active_parameters / total if total else 0.0

    @property
    def sparsity(self) -> float:
        return 1.0 - self.density

    @property
    def metadata(self) -> dict[str, Any]:
        """A copy of what is known about the masks, with the counts that follow from the bits."""
        active, total = self.active_parameters, self.total_parameters
        derived = (total, active, self.density, self.sparsity)
        return {**copy.deepcopy(self._metadata), **dict(zip(DERIVED_METADATA, derived, strict=True))}

    @property
    def fingerprint(self) -> str:
        """SHA-256 over names, shapes and bits: the same for equal sets, whatever their order and metadata."""
        if self._fingerprint is None:
            digest = hashlib.sha256(b"sparseopt.masks/1")
            for name in sorted(self._packed):
                encoded = name.encode()
                digest.update(len(encoded).to_bytes(8, "little") + encoded)
                digest.update(repr(self._shapes[name]).encode() + b"\0")
                digest.update(self._packed[name].numpy().data)
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def __iter__(self) -> Iterator[str]:
        return iter(self._packed)

    def __len__(self) -> int:
        return len(self._packed)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and normalize_name(name) in self._packed

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """(name, bool tensor) one after the other."""
        return ((name, self[name]) for name in self._packed)

    def select(self, names: Iterable[str]) -> MaskSet:
        """The masks of some parameters, in the order asked for."""
        wanted = [normalize_name(name) for name in names]
        packed = {name: self.packed(name) for name in wanted}
        return MaskSet(packed, {n: self._shapes[n] for n in wanted}, self._metadata, copy_bits=False)

    def with_metadata(self, **entries: Any) -> MaskSet:
        """The same masks with metadata entries added or replaced."""
        return MaskSet(self._packed, self._shapes, {**self._metadata, **entries}, copy_bits=False)

    # ---- combining ---------------------------------------------------------------------------------------------------
    def __and__(self, other: MaskSet) -> MaskSet:
        return self._combine(other, torch.bitwise_and)

    def __or__(self, other: MaskSet) -> MaskSet:
        return self._combine(other, torch.bitwise_or)

    def __xor__(self, other: MaskSet) -> MaskSet:
        return self._combine(other, torch.bitwise_xor)

    def __invert__(self) -> MaskSet:
        packed = {name: bits ^ _ones(math.prod(self._shapes[name])) for name, bits in self._packed.items()}
        return MaskSet(packed, self._shapes, copy_bits=False)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, MaskSet):
            return NotImplemented
        return self._shapes == other._shapes and all(
            torch.equal(bits, other._packed[name]) for name, bits in self._packed.items()
        )

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def require_same_parameters(self, other: MaskSet) -> None:
        """Raises ValueError naming the first parameter that only one set has, or whose shapes differ."""
        for name in [*self._shapes, *other._shapes]:
            mine, theirs = self._shapes.get(name), other._shapes.get(name)
            if mine is None or theirs is None:
                side = "right" if mine is None else "left"
                raise ValueError(f"parameter {name!r} is only in the {side} mask set.")
            if mine != theirs:
                raise ValueError(f"parameter {name!r} has shape {list(mine)} on the left, {list(theirs)} on the right.")

    def _combine(self, other: MaskSet, function: Callable[[Tensor, Tensor], Tensor]) -> MaskSet:
        if not isinstance(other, MaskSet):
            return NotImplemented
        self.require_same_parameters(other)
        packed = {name: function(bits, other._packed[name]) for name, bits in self._packed.items()}
        return MaskSet(packed, self._shapes, copy_bits=False)

    # ---- files -------------------------------------------------------------------------------------------------------
    def save(
        self,
        path: str | os.PathLike[str],
        format: str | None = None,
        compress: bool = False,
        parent: MaskSet | str | os.PathLike[str] | None = None,
    ) -> None:
        """Writes a mask file, whole or not at all.

        Args:
            path: target; its folder is made.
            format: ``"safetensors"`` (packed bits, metadata, checksum) or ``"pt"`` (a plain dict of bool tensors, one
                byte per entry, no metadata); by default what the suffix says.
            compress: safetensors only: lossless compression of the bits.
            parent: with ``compress``: store only what differs from this set or mask file, which :meth:`load` then needs
                in the same folder; it may itself be stored against another.

        Raises:
            ValueError: an unusable name, format or combination; the parent is the file to be written.
        """
        from sparseopt.masks import files

        files.save(self, path, format, compress, parent)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> MaskSet:
        """Reads a mask file of either format, and the files it is stored against, from its folder.

        Raises:
            FileNotFoundError: there is no such file.
            sparseopt.FormatError: it is damaged, truncated, something else, or of a newer version; a parent is missing.
        """
        from sparseopt.masks import files

        return files.load(path)

    # ---- looking at it -----------------------------------------------------------------------------------------------
    def _some(self) -> str:
        names = self.names
        return "none" if not names else ", ".join(map(repr, names[:2])) + (" .." if len(names) > 2 else "")

    def summary(self, limit: int = 10) -> str:
        """Text for a REPL: the totals, and one line for each of the first ``limit`` parameters."""
        active, total = self.active_parameters, self.total_parameters
        method = f", {self._metadata['method']}" if "method" in self._metadata else ""
        head = f"MaskSet: {len(self)} parameters, {active:,} of {total:,} entries active ({self.density:.4%}){method}"
        shown = self.names[:limit]
        width = max((len(name) for name in shown), default=0)
        lines = [
            f"  {name:<{width}}  {list(self._shapes[name])!s:<16} {self.count(name):>12,}  "
            f"{self.count(name) / max(1, math.prod(self._shapes[name])):.4%}"
            for name in shown
        ]
        if len(self) > limit:
            lines.append(f"  .. {len(self) - limit} more")
        return "\n".join([head, *lines])

    def __repr__(self) -> str:
        return self.summary()


def _ones(n: int) -> Tensor:
    """Packed mask of n active entries."""
    bits = torch.full(((n + 7) // 8,), 255, dtype=torch.uint8)
    if n % 8:
        bits[-1] = (1 << n % 8) - 1
    return bits


def _shapes_of(model: torch.nn.Module | Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    pairs = model.named_parameters() if isinstance(model, torch.nn.Module) else model.items()
    return {name: tuple(tensor.shape) for name, tensor in pairs}


def _check_bits(name: str, bits: Tensor, shape: tuple[int, ...]) -> None:
    if not isinstance(bits, Tensor) or bits.dtype != torch.uint8 or bits.dim() != 1:
        raise TypeError(f"the packed mask of {name!r} must be uint8[ceil(n/8)], got {_describe(bits)}.")
    n = math.prod(shape)
    if any(size < 0 for size in shape) or bits.numel() != (n + 7) // 8:
        raise ValueError(f"a packed mask for {name!r} {list(shape)} has {(n + 7) // 8} bytes, got {bits.numel()}.")
    if n % 8 and int(bits[-1]) >> n % 8:
        raise ValueError(f"the packed mask of {name!r} has bits set past its {n} entries.")


def _describe(value: object) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
