"""Saving, loading and copying of SparseAdamW.

torch's own ``load_state_dict`` casts every state tensor to the parameter's dtype (bf16 moments, wrong indices), matches by
position and aliases tensors. This one matches by name and copies into the arenas.
"""

from __future__ import annotations

from collections import defaultdict
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.optim import Optimizer

from sparseopt import functional
from sparseopt._sharded import local
from sparseopt.masks.maskset import normalize_name
from sparseopt.optim.arena import Arena, Saved
from sparseopt.optim.capture import GradientCapture
from sparseopt.optim.chunk import Chunk
from sparseopt.optim.sharding import Region, cut_state, group_of, settle

if TYPE_CHECKING:
    from sparseopt.optim.sparse_adamw import SparseAdamW

__all__ = ["full_state_dict", "getstate", "load_state_dict", "setstate", "state_dict"]

FORMAT_VERSION = 1
# What a parameter's state holds besides one value per active entry: its mask, and where ``base_weights`` is used the entries
# that left the mask (sorted positions) with their values before training.
NOT_OF_ENTRIES = ("mask", "left", "left_base")
DENSE = "dense"  # fingerprint of "everything is active"


def fingerprint(optimizer: SparseAdamW) -> str:
    """Identifies names, shapes and masks; ``"dense"`` when everything is active. Of the whole masks, where sharded."""
    if optimizer._whole_fingerprint is not None:
        return optimizer._whole_fingerprint
    if all(mask is None for mask in optimizer._current_masks().values()):
        return DENSE
    masks = optimizer.masks
    # Before the first step a full mask may still be written out in bits.
    return DENSE if masks.active_parameters == masks.total_parameters else masks.fingerprint


def state_dict(optimizer: SparseAdamW) -> dict[str, Any]:
    settle(optimizer)
    if optimizer._dirty and optimizer._arenas:
        optimizer._build()
    result = Optimizer.state_dict(optimizer)
    positions = {id(p): i for i, p in enumerate(p for g in optimizer.param_groups for p in g["params"])}
    for param, (arena, tensor) in optimizer._slots.items():
        entry = dict(result["state"][positions[id(param)]])
        packed, region = arena.packed_mask(tensor), optimizer._regions.get(arena.names[tensor])
        if region is not None:
            entry = _chunks(entry, packed, region)
        elif packed is not None:
            entry["mask"] = packed
        if (gone := optimizer._left.base.get(arena.names[tensor])) is not None and gone[0].numel():
            entry["left"], entry["left_base"] = gone
        result["state"][positions[id(param)]] = entry
    result["sparseopt"] = {
        "version": FORMAT_VERSION,
        "mask_fingerprint": fingerprint(optimizer),
        "skipped_steps": optimizer.skipped_steps,
        "mask_changes": optimizer._left.mask_changes,
    }
    return result


def _chunks(entry: dict[str, Any], packed: Tensor | None, region: Region) -> dict[str, Any]:
    """A sharded parameter's state as parts of the state of the whole parameter."""
    result = {
        key: Chunk.of(value, region.first, region.active) if key in Arena.PER_ENTRY else value
        for key, value in entry.items()
    }
    if region.active < region.numel:
        bits = _all_set(region.end - region.begin) if packed is None else packed
        result["mask"] = Chunk.of(region.mask_bytes(bits), region.byte_range[0], -(-region.numel // 8))
    return result


def _all_set(numel: int) -> Tensor:
    return functional.pack_mask(torch.ones(numel, dtype=torch.bool))


def full_state_dict(optimizer: SparseAdamW) -> dict[str, Any]:
    """The state dict that one process with the whole model would have, on the CPU; every process must call it.

    Under FSDP2 the parts of all processes are put together, tensor by tensor; elsewhere it is ``state_dict()``. Any
    SparseAdamW, sharded or not, loads it.

    Returns:
        the state dict on the first process of the group, ``{}`` on the others.
    """
    state = optimizer.state_dict()
    if not optimizer.sharded:
        return state
    group = group_of(optimizer)
    first = dist.get_rank(group) == 0
    for entry in state["state"].values():
        for key, value in entry.items():
            if isinstance(value, Chunk):
                parts: list[Any] | None = [None] * dist.get_world_size(group) if first else None
                dist.gather_object((value.offset, value.plain().cpu()), parts, group=group, group_dst=0)
                if parts is not None:
                    whole = value.plain().new_zeros(value.total, device="cpu")
                    for offset, part in parts:
                        whole[offset : offset + part.numel()] = part
                    entry[key] = whole
            elif isinstance(value, Tensor):
                entry[key] = value.cpu()
    return state if first else {}


def _own_part(name: str, param: Tensor, entry: dict[str, Any], region: Region, mine: Tensor | None) -> dict[str, Any]:
    """This process' part of a sharded parameter's state: of chunks of it, or of the state of the whole parameter.

    Raises:
        ValueError: a chunk is of another range, or belongs to another mask.
    """
    values = {k: v for k, v in entry.items() if isinstance(v, Tensor) and k not in NOT_OF_ENTRIES}
    if any(isinstance(value, Chunk) for value in entry.values()):
        wanted = _chunks({"exp_avg": values["exp_avg"]}, mine, region)
        for key, chunk in wanted.items():
            found = entry.get(key)
            if not isinstance(found, Chunk) or (found.offset, found.total) != (chunk.offset, chunk.total):
                raise ValueError(f"the saved {key} of {name!r} is not this process' part of it.")
        if "mask" in wanted and not torch.equal(entry["mask"].plain().cpu(), wanted["mask"].plain()):
            raise ValueError(f"the optimizer state of {name!r} was saved under another mask; use the same mask.")
        part = mine
        values = {k: v.plain() if isinstance(v, Chunk) else v for k, v in values.items()}
    else:
        moment = values.get("exp_avg")
        if "mask" not in entry and moment is not None and moment.numel() != region.numel:
            raise ValueError(f"the saved state of {name!r} has {moment.numel()} entries, expected {region.numel}.")
        bounds, part = region.of_mask(entry["mask"].cpu() if "mask" in entry else None)
        values = cut_state(Saved(values), bounds, part).values
    return values if part is None else {**values, "mask": part}


def load_state_dict(optimizer: SparseAdamW, given: dict[str, Any]) -> None:
    given = dict(given)
    settle(optimizer)
    for hook in optimizer._optimizer_load_state_dict_pre_hooks.values():
        changed = hook(optimizer, given)
        if changed is not None:
            given = changed
    groups, saved_groups = optimizer.param_groups, deepcopy(given["param_groups"])
    if len(groups) != len(saved_groups):
        raise ValueError(f"loaded state dict has {len(saved_groups)} parameter groups, the optimizer {len(groups)}.")
    pairs = _match(optimizer, saved_groups)
    info = given.get("sparseopt")
    if info is not None and info["version"] > FORMAT_VERSION:
        raise ValueError(
            f"the optimizer state has format {info['version']}, this release reads up to {FORMAT_VERSION}."
        )

    current = optimizer._current_masks()
    saved: dict[str, Saved] = {}
    masks: dict[str, Tensor | None] = {}
    gone: dict[str, tuple[Tensor, Tensor]] = {}
    for name, param, key in pairs:
        entry = given["state"].get(key)
        if entry is None:
            continue
        region = optimizer._regions.get(name)
        if info is None and not _is_compact(param, entry):
            saved[name] = Saved(_from_dense(name, param, entry, current[name], region))
            continue
        if region is not None:
            entry = _own_part(name, param, entry, region, current[name])
            param = local(param)
        values = {k: v for k, v in entry.items() if isinstance(v, Tensor) and k not in NOT_OF_ENTRIES}
        saved[name] = Saved(values)
        if "left" in entry:
            positions, base = (entry[key].to(param.device, copy=True) for key in ("left", "left_base"))
            gone[name] = positions, base.to(param.dtype)
        masks[name] = entry["mask"].cpu() if "mask" in entry else None
        _check_counts(name, param, values, masks[name])
    other = None
    if info is not None and info["mask_fingerprint"] != fingerprint(optimizer):
        other = f"fingerprint {info['mask_fingerprint'][:12]}, this optimizer's is {fingerprint(optimizer)[:12]}"
    elif info is None:
        sizes = {name: local(param).numel() for name, param, _ in pairs}
        differing = [n for n, mask in masks.items() if not _same_mask(mask, current[n], sizes[n])]
        other = f"of {differing[0]!r}" if differing else None
    if other is not None:
        if not optimizer.adopt_masks or optimizer._regions:
            raise ValueError(
                f"the optimizer state was saved under another mask ({other}); use the same mask, or set adopt_masks=True "
                "on the optimizer (not where it is sharded) to take the saved one."
            )
        current.update(masks)
    optimizer._arenas, optimizer._slots, optimizer._known = [], {}, {}
    optimizer._masks, optimizer._saved, optimizer._dirty = current, saved, True
    optimizer.state.clear()
    if optimizer._capture is not None:
        optimizer._capture.discard()
    for group, saved_group in zip(groups, saved_groups, strict=True):
        keep: dict[str, Any] = {k: group[k] for k in ("params", "param_names") if k in group}
        group.update({k: v for k, v in saved_group.items() if k not in ("params", "param_names")})
        group.update(keep)
    optimizer._left.base = gone
    optimizer._left.after_load(None if info is None else info.get("mask_changes"), same_masks=other is None)
    if info is not None:
        skipped = int(info["skipped_steps"])
        optimizer._skipped = torch.tensor(float(skipped)) if skipped else None
    if saved:
        optimizer._build()
    for post_hook in optimizer._optimizer_load_state_dict_post_hooks.values():
        post_hook(optimizer)


def _match(optimizer: SparseAdamW, saved_groups: list[dict[str, Any]]) -> list[tuple[str, Tensor, Any]]:
    """(name, parameter, key in the saved state) for every parameter: by name where both sides know names."""
    names = {param: name for name, param, _ in optimizer._layout()}
    result = []
    by_name: dict[str, Any] = {}
    for group in saved_groups:
        by_name.update(zip(map(normalize_name, group.get("param_names", ())), group["params"], strict=False))
    for index, (group, saved) in enumerate(zip(optimizer.param_groups, saved_groups, strict=True)):
        if by_name and "param_names" in group:
            missing = [names[p] for p in group["params"] if names[p] not in by_name]
            if missing:
                raise ValueError(f"loaded state dict knows no parameter {missing[0]!r} ({len(missing)} are missing).")
            result += [(names[p], p, by_name[names[p]]) for p in group["params"]]
            continue
        if len(group["params"]) != len(saved["params"]):
            raise ValueError(
                f"loaded state dict has {len(saved['params'])} parameters in group {index}, the optimizer {len(group['params'])}."
            )
        result += [(names[p], p, key) for p, key in zip(group["params"], saved["params"], strict=True)]
    return result


def _check_counts(name: str, param: Tensor, values: dict[str, Tensor], mask: Tensor | None) -> None:
    if mask is not None and mask.numel() != (param.numel() + 7) // 8:
        raise ValueError(f"the saved mask of {name!r} is for another shape than {tuple(param.shape)}.")
    expected = param.numel() if mask is None else int(functional.popcount(mask))
    if "exp_avg" in values and values["exp_avg"].numel() != expected:
        raise ValueError(f"the saved state of {name!r} has {values['exp_avg'].numel()} entries, expected {expected}.")


def _is_compact(param: Tensor, entry: dict[str, Any]) -> bool:
    """SparseAdamW's own state of a parameter, whose ``sparseopt`` entry was dropped on the way: tools that rebuild state
    dicts (torch.distributed.checkpoint) keep ``state`` and ``param_groups`` only."""
    moment = entry.get("exp_avg")
    flat = isinstance(moment, Tensor) and moment.dim() == 1 and moment.numel() == param.numel() and param.dim() != 1
    return flat or isinstance(moment, Chunk) or any(k in entry for k in ("mask", "residual", "master", "cohorts"))


def _same_mask(a: Tensor | None, b: Tensor | None, numel: int) -> bool:
    """Packed masks of one parameter; None and all bits set both mean that everything is active."""
    if a is None or b is None:
        bits = b if a is None else a
        return bits is None or int(functional.popcount(bits)) == numel
    return torch.equal(a, b)


def _from_dense(
    name: str, param: Tensor, entry: dict[str, Any], mask: Tensor | None, region: Region | None
) -> dict[str, Tensor]:
    """The active entries of a dense AdamW's state; of this process' part."""
    values: dict[str, Tensor] = {}
    for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        if key in entry:
            dense = entry[key]
            if tuple(dense.shape) != tuple(param.shape):
                raise ValueError(
                    f"the saved {key} of {name!r} has shape {tuple(dense.shape)}, the parameter {tuple(param.shape)}."
                )
            flat = local(dense).detach().reshape(-1)
            if region is not None and dense is local(dense):
                flat = flat[region.begin : region.end]
            values[key] = (
                flat if mask is None else flat[functional.mask_indices(mask, flat.numel()).long().to(flat.device)]
            )
    if "step" in entry:
        values["step"] = torch.as_tensor(entry["step"], dtype=torch.float32)
    return values


# ---- deepcopy and pickle -----------------------------------------------------------------------------------------------
PLAIN = (
    "max_grad_norm",
    "adopt_masks",
    "_options",
    "_names_given",
    "_grad_norm",
    "_norm_measured",
    "_skipped",
    "_left",
    "_shapes",
    "_regions",
    "_whole_fingerprint",
)


def getstate(optimizer: SparseAdamW) -> dict[str, Any]:
    settle(optimizer)
    if optimizer._arenas and optimizer._dirty:
        optimizer._build()
    state = {param: {k: v.clone() for k, v in arena.state(t).items()} for param, (arena, t) in optimizer._slots.items()}
    result = {name: getattr(optimizer, name) for name in PLAIN}
    result.update(
        defaults=optimizer.defaults, state=state, param_groups=optimizer.param_groups, masks=optimizer._current_masks()
    )
    return result


def setstate(optimizer: SparseAdamW, state: dict[str, Any]) -> None:
    state = dict(state)
    masks, saved = state.pop("masks"), state["state"]
    optimizer._reset()
    Optimizer.__setstate__(optimizer, state)
    optimizer._masks = masks
    optimizer._saved = {name: Saved(saved[p]) for name, p, _ in optimizer._layout() if p in saved}
    optimizer.state = defaultdict(dict)
    if optimizer._options["capture"]:
        optimizer._capture = GradientCapture(optimizer)
    if optimizer._saved:
        optimizer._build()
