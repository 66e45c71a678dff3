"""What the optimizer steps with: arenas from groups and masks, and the same arenas under other masks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparseopt._sharded import local, mesh_of
from sparseopt.masks.maskset import MaskSet
from sparseopt.optim import arguments, sharding, structured
from sparseopt.optim.arena import Arena
from sparseopt.optim.arguments import refuse_shared_storage
from sparseopt.optim.remapping import change_masks, forget_cohort

if TYPE_CHECKING:
    from sparseopt.optim.sparse_adamw import SparseAdamW

__all__ = ["build", "mask_new_parameters", "update_masks"]


def build(optimizer: SparseAdamW) -> None:
    """(Re)builds the arenas where groups, parameters or masks are not those they were built for."""
    glance = [
        (id(p), local(p).data_ptr(), i, g["amsgrad"]) for i, g in enumerate(optimizer.param_groups) for p in g["params"]
    ]
    if not optimizer._dirty and glance == optimizer._glance:
        return  # moving a parameter or changing its dtype moves its data
    sharding.settle(optimizer)
    layout = optimizer._layout()
    amsgrad = any(group["amsgrad"] for group in optimizer.param_groups)
    optimizer._glance = glance
    built = (amsgrad, [(id(p), g, p.device, p.dtype) for _, p, g in layout])
    if not optimizer._dirty and built == optimizer._built:
        return
    refuse_shared_storage((name, local(param)) for name, param, _ in layout)
    saved = {**optimizer._extract(), **optimizer._saved}
    masks = optimizer._current_masks()
    buckets: dict[tuple[torch.device, torch.dtype, Any], list[int]] = {}
    for i, (_, param, _) in enumerate(layout):
        held = local(param)
        buckets.setdefault((held.device, held.dtype, mesh_of(param)), []).append(i)
    pending = {} if optimizer._capture is None else optimizer._capture.pending()
    arenas, slots = [], {}
    for (_, _, mesh), members in buckets.items():
        names, params, groups = zip(*(layout[i] for i in members), strict=True)
        arena = Arena(
            names, [local(p) for p in params], [masks[n] for n in names], groups, amsgrad=amsgrad,
            master_weights=optimizer._options["master_weights"],
        )  # fmt: skip
        arena.owners, arena.mesh = params, mesh
        for t, name in enumerate(names):
            if name in saved:
                arena.adopt(t, saved[name])
            slots[params[t]] = (arena, t)
        arenas.append(arena)
    optimizer._known, optimizer._near, optimizer._masks = masks, {}, {}
    optimizer._arenas, optimizer._slots, optimizer._saved, optimizer._dirty = arenas, slots, {}, False
    optimizer._built = built
    optimizer.state.clear()
    for param, (arena, t) in slots.items():
        optimizer.state[param] = arena.state(t)
    for name, param, _ in layout:
        structured.follow(param, masks[name], optimizer.adopt_masks, name)
    if optimizer._capture is not None:
        optimizer._capture.arm()
        optimizer._capture.restore(pending)


@torch.no_grad()
def mask_new_parameters(optimizer: SparseAdamW) -> None:
    """Masks for the parameters of a group that was just added, as ``unmasked`` says.

    Raises:
        ValueError: ``unmasked="error"`` beside masks; the group is gone again.
    """
    known = optimizer._current_masks()
    masked = any(mask is not None for mask in known.values())
    for name, param, _ in optimizer._layout():
        if name in known:
            continue
        if masked and optimizer._options["unmasked"] == "error":
            optimizer.param_groups.pop()
            raise ValueError(f"parameter {name!r} was added without a mask; unmasked='dense' would train all of it.")
        freeze = masked and optimizer._options["unmasked"] == "freeze"
        optimizer._masks[name] = torch.zeros((param.numel() + 7) // 8, dtype=torch.uint8) if freeze else None


def update_masks(
    optimizer: SparseAdamW, masks: MaskSet | Mapping[str, Tensor], copies: Mapping[str, Tensor] | None
) -> None:
    """See :meth:`SparseAdamW.update_masks`."""
    if optimizer._capture:
        raise RuntimeError(
            "update_masks() between backward() and step() would lose captured gradients: call it after step()."
        )
    sharding.refuse(optimizer, "update_masks()")
    optimizer._agreed = False
    if optimizer._arenas:
        optimizer._build()
    params = {name: param for name, param, _ in optimizer._layout()}
    given = arguments.new_masks(masks, params)
    for name in given.names:
        structured.follow(params[name], given.packed(name), True, name)
    if not optimizer._arenas:  # nothing is allocated yet, and need not be for masks that will not be used
        optimizer._masks.update({name: given.packed(name) for name in given.names})
        return
    near = {name: copies[name] for name in given.names if name in copies} if copies else {}
    old = {name: optimizer._near.get(name, optimizer._known[name]) for name in given.names}
    optimizer._left.before_update(optimizer, given, old, near)
    optimizer._known.update({name: given.packed(name) for name in given.names})
    optimizer._near = {name: bits for name, bits in optimizer._near.items() if name not in given} | near
    born: list[tuple[Arena, Tensor]] = []
    for arena in optimizer._arenas:
        changed = [t for t, name in enumerate(arena.names) if name in given]
        if changed:
            bits = [optimizer._near.get(name, optimizer._known[name]) for name in arena.names]
            if (new := change_masks(arena, bits, changed)) is not None:
                born.append((arena, new))
            optimizer._left.take_back(arena)
    _refresh(optimizer)  # while the device still moves entries
    if empty := [arena for arena, new in born if not bool(new)]:
        for arena in empty:
            forget_cohort(arena)
        _refresh(optimizer)


def _refresh(optimizer: SparseAdamW) -> None:
    """``optimizer.state`` says what the arenas have."""
    for param, (arena, t) in optimizer._slots.items():
        optimizer.state[param] = arena.state(t)
