"""find_masks: from scores to the mask set of the best entries, exactly and deterministically."""

from __future__ import annotations

import datetime
import fnmatch
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparseopt.masks._auto import choose_grain, pick_mixed
from sparseopt.masks._pieces import Part, Scores, TensorPart
from sparseopt.masks._select import CACHED_GROUPS, Picked, Source, pick, shares, top
from sparseopt.masks._structured import Structure, pick_structures
from sparseopt.masks.granularity import AUTO, Granularity, granularity_of
from sparseopt.masks.maskset import MaskSet, normalize_name

__all__ = ["find_masks", "is_mlp", "matches"]

SCOPES = ("global", "per_tensor")
WARN_ZERO_SHARE, REFUSE_ZERO_SHARE = 0.01, 0.5
MLP = re.compile(r"mlp|feed_?forward|ffn", re.IGNORECASE)
NARROW = (torch.float32, torch.bfloat16, torch.float16)


def matches(name: str, pattern: str) -> bool:
    """Whether a parameter name fits an include/exclude pattern.

    * with ``*``, ``?`` or ``[``: a glob for the whole name (``*`` also crosses dots): ``*.mlp.*.weight``;
    * with a dot: consecutive whole components: ``h.1`` is in ``transformer.h.1.mlp``, not in ``h.10.mlp``;
    * else: part of a component, numbers whole: ``norm`` is in ``input_layernorm.weight``, ``1`` not in ``h.10``.
    """
    if any(character in pattern for character in "*?["):
        return fnmatch.fnmatchcase(name, pattern)
    if "." in pattern:
        return f".{pattern.strip('.')}." in f".{name}."
    before = r"(?<!\d)" if pattern[:1].isdigit() else ""
    after = r"(?!\d)" if pattern[-1:].isdigit() else ""
    return re.search(before + re.escape(pattern) + after, name) is not None


def is_mlp(name: str) -> bool:
    """Whether a parameter belongs to an MLP block: a component of its name holds mlp, feed_forward or ffn."""
    return MLP.search(name) is not None


def find_masks(
    scores: Mapping[str, Tensor],
    sparsity: float = 0.975,
    scope: str = "global",
    granularity: Granularity = 1,
    min_layer_keep_ratio: float = 0.0,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    allow_zero_scores: bool = False,
    *,
    method: str | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> MaskSet:
    """Makes the entries with the largest scores active.

    Args:
        scores: parameter name -> scores of the parameter's shape; any real dtype (fp64 and integers are compared as
            fp64, all else as fp32), any device; inf is allowed, order is by value. One tensor at a time is worked on.
            :class:`sparseopt.masks._pieces.Scores`, such as those of a delta log, are read in pieces: memory is then
            that of the result (1 bit an entry) and of a piece.
        sparsity: share of the n entries (of the parameters that include/exclude leave) that stays inactive.
        scope: ``"global"``: the best ``round((1 - sparsity) * n)`` of all tensors together; ``"per_tensor"``: the best
            ``round((1 - sparsity) * n)`` of each tensor.
        granularity: 1 = single entries, exact counts; 8, 16, 32 = aligned runs in the flat (row-major) tensor;
            ``"row"`` = dimension 0, ``"column"`` = last dimension (in tensors of fewer than two dimensions every entry
            is one; those of three are matrices, such as experts, each with rows and columns of its own). Whole groups
            by summed score, never more entries than the count above, less than one group under.
            ``"auto"`` chooses ``"row"``, ``"column"`` or 1 for each tensor, by the score lost per number that a training
            step is spared (the formula is in :mod:`sparseopt.masks._auto`); tensors of single entries fill the count up.
        min_layer_keep_ratio: share of each tensor's entries that is active whatever the other tensors score, rounded up
            (down where rounding up would exceed the budget); filled first. In ``per_tensor`` scope it has no effect.
        include: patterns of parameters to choose from (:func:`matches`); None = all.
        exclude: patterns of parameters to leave out. What is left out is in the result with nothing active.
        allow_zero_scores: accept a mask of which more than half was picked at score zero.
        method: where the scores came from; kept in the metadata.
        metadata: further metadata.

    Returns:
        A MaskSet in the order of ``scores``. Ties go to the lower name, then to the lower flat index. Its metadata:
        method, scope, granularity, target_sparsity, min_layer_keep_ratio, eligible_parameters, timestamp,
        zero_score_share (of the active entries, or their groups, those with score 0), tie_share (those whose score also
        occurs among the entries left out at the threshold), kept_score (their share of the score total; only where no
        score is negative and the total finite and above 0); under ``"auto"`` granularities, what was chosen by tensor.

    Raises:
        ValueError: NaN scores (the parameter is named), arguments out of range, nothing left to choose from, or more
            than half of the picks at score zero.
        TypeError: a score is not a real tensor.
    """
    grain = granularity_of(granularity)
    check_arguments(sparsity, scope, min_layer_keep_ratio)
    tensors = _check_scores(scores)
    eligible = _eligible(tensors, include, exclude)
    density = 1 - sparsity
    sizes = [tensors[name].numel() for name in eligible]
    if scope == "global":
        budgets = [round(density * sum(sizes))]
        minimums = [_minimums(sizes, min_layer_keep_ratio, budgets[0])]
        groups = [eligible]
    else:
        budgets = [round(density * size) for size in sizes]
        minimums = [[0]] * len(sizes)
        groups = [[name] for name in eligible]

    # All masks are allocated before the work, whose buffers would otherwise lie between them and fragment the heap.
    packed = {name: torch.zeros((part.numel() + 7) // 8, dtype=torch.uint8) for name, part in tensors.items()}
    grains = {name: choose_grain(name, tensors[name], density) for name in eligible} if grain == AUTO else None
    picked: dict[str, Picked] = {}
    for names, budget, minimum in zip(groups, budgets, minimums, strict=True):
        chosen = {name: tensors[name] for name in names}
        picked.update(zip(names, _pick(chosen, budget, minimum, grains or grain, packed), strict=True))
    measured = shares(list(picked.values()))
    _check_zeros(measured["zero_score_share"], allow_zero_scores)
    found = {
        "scope": scope,
        "granularity": grain,
        **({"granularities": grains} if grains else {}),
        "target_sparsity": sparsity,
        "min_layer_keep_ratio": min_layer_keep_ratio,
        "eligible_parameters": sum(sizes),
        "timestamp": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        **({"method": method} if method is not None else {}),
        **measured,
    }
    packed.update((name, result.packed) for name, result in picked.items())
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    known = scores.provenance if isinstance(scores, Scores) else {}
    return MaskSet(packed, shapes, {**known, **found, **(metadata or {})}, copy_bits=False)


def _pick(
    tensors: Mapping[str, Part],
    budget: int,
    minimum: Sequence[int],
    grain: Granularity | Mapping[str, Granularity],
    packed: Mapping[str, Tensor],
) -> list[Picked]:
    if isinstance(grain, Mapping):
        kinds = {grain[name] for name in tensors}
        if len(kinds) > 1 or kinds - {1}:
            return pick_mixed(tensors, grain, budget, minimum, packed)
        grain = 1
    if isinstance(grain, str):
        return pick_structures([Structure(name, t, grain) for name, t in tensors.items()], budget, minimum)
    # Sums over groups are taken in fp64, so that they neither overflow nor depend on the order of summation much.
    wide = grain > 1 or any(tensor.dtype not in NARROW for tensor in tensors.values())
    cache = grain > 1 and sum(t.numel() for t in tensors.values()) <= CACHED_GROUPS * grain
    sources = [Source(name, tensor, grain, wide, cache) for name, tensor in tensors.items()]
    cuts = top(sources, budget, minimum)
    return [pick(source, cut, packed[source.name]) for source, cut in zip(sources, cuts, strict=True)]


def _minimums(sizes: Sequence[int], ratio: float, budget: int) -> list[int]:
    # 1e-9: a ratio such as 0.1 times 30 must not round up to 4.
    up = [min(size, math.ceil(ratio * size - 1e-9)) for size in sizes]
    if sum(up) <= budget:
        return up
    down = [math.floor(ratio * size + 1e-9) for size in sizes]
    if sum(down) > budget:
        raise ValueError(
            f"min_layer_keep_ratio={ratio} needs {sum(down)} active entries, the sparsity leaves {budget}; lower one."
        )
    return down


def check_arguments(sparsity: float, scope: str, ratio: float) -> None:
    if scope not in SCOPES:
        raise ValueError(f"scope must be 'global' or 'per_tensor', got {scope!r}.")
    for what, value in (("sparsity", sparsity), ("min_layer_keep_ratio", ratio)):
        if not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise ValueError(f"{what} must be a number in 0..1, got {value!r}.")
    if ratio > 1 - sparsity + 1e-9:
        raise ValueError(
            f"min_layer_keep_ratio={ratio} keeps more of each tensor than sparsity={sparsity} leaves; lower one."
        )


def _check_scores(scores: Mapping[str, Tensor]) -> dict[str, Part]:
    tensors: dict[str, Part] = {}
    parts = ((raw, scores.part(raw)) for raw in scores) if isinstance(scores, Scores) else _parts(scores)
    for raw, part in parts:
        name = normalize_name(raw)
        if name in tensors:
            raise ValueError(f"two score tensors are named {name!r} (the second came as {raw!r}).")
        tensors[name] = part
    if not tensors:
        raise ValueError("find_masks needs scores of at least one parameter, got none.")
    return tensors


def _parts(scores: Mapping[str, Tensor]) -> Iterator[tuple[str, Part]]:
    for raw, tensor in scores.items():
        if not isinstance(tensor, Tensor) or tensor.is_complex():
            kind = str(tensor.dtype) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"the scores of {raw!r} must be a real tensor, got {kind}.")
        yield raw, TensorPart(tensor)


def _patterns(patterns: str | Iterable[str] | None, what: str) -> list[str]:
    result = [patterns] if isinstance(patterns, str) else list(patterns or ())
    if not all(isinstance(pattern, str) and pattern for pattern in result):
        raise ValueError(f"{what} must be patterns of parameter names, got {result!r}.")
    return result


def _eligible(
    tensors: Mapping[str, Part], include: str | Iterable[str] | None, exclude: str | Iterable[str] | None
) -> list[str]:
    """Names to choose from, sorted: the order that decides ties."""
    wanted, unwanted = _patterns(include, "include"), _patterns(exclude, "exclude")
    for what, patterns in (("include", wanted), ("exclude", unwanted)):
        for pattern in patterns:
            if not any(matches(name, pattern) for name in tensors):
                warnings.warn(f"{what}={pattern!r} fits none of the {len(tensors)} parameters.", stacklevel=3)
    names = [
        name
        for name in sorted(tensors)
        if (include is None or any(matches(name, p) for p in wanted)) and not any(matches(name, p) for p in unwanted)
    ]
    if not names:
        raise ValueError(f"no parameter is left to choose from with include={wanted} and exclude={unwanted}.")
    return names


def _check_zeros(share: float, allowed: bool) -> None:
    if share > REFUSE_ZERO_SHARE and not allowed:
        raise ValueError(
            f"{share:.1%} of the picked entries have score zero, so chance chose them, not the scores; raise the "
            "sparsity, collect more scores, or allow_zero_scores=True."
        )
    if share > WARN_ZERO_SHARE:
        warnings.warn(f"{share:.1%} of the picked entries have score zero.", stacklevel=3)
