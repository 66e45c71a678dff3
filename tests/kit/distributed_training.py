"""Training on several processes, and the same on one: what each rank of a test does."""

from __future__ import annotations

from typing import Any

import torch
from captured_model import VOCAB, Model, make_masks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import sparseopt as so

ROWS = 2  # of each rank's micro-batch
STEPS = 20


class Scaled(Model):
    """Every parameter takes part, as DDP demands, and one has a single entry: most of its shards are empty."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        del self.unused
        self.scale = nn.Parameter(torch.full((1,), 1.5))

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) * self.scale


def make_model(seed: int = 0, **kwargs: Any) -> Scaled:
    torch.manual_seed(seed)
    return Scaled(**kwargs)


def batch(step: int, micro: int, total_rows: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + micro)
    return torch.randint(0, VOCAB, (total_rows, 5), generator=generator)


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(tokens).float().flatten(0, 1), tokens.roll(1, 1).flatten())


def make_optimizer(model: nn.Module, **kwargs: Any) -> so.SparseAdamW:
    plain: Any = getattr(model, "module", model)
    options = {"lr": 1e-3, "masks": masks_of(plain), "max_grad_norm": 0.5, **kwargs}
    return so.SparseAdamW(model.named_parameters(), **options)


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    masks = make_masks(model)
    masks["scale"].fill_(True)
    return masks


def train(
    model: nn.Module, optimizer: Any, rank: int, world: int, everyone: int, *, steps: range = range(STEPS),
    accumulate: int = 1, no_sync: bool = False,
) -> list[float]:  # fmt: skip
    """Each of ``world`` processes takes its rows of batches made for ``everyone`` (so that one can do all); the norms."""
    norms = []
    per = ROWS * everyone // world
    for step in steps:
        for micro in range(accumulate):
            tokens = batch(step, micro, ROWS * everyone)[rank * per : (rank + 1) * per]
            wait = no_sync and micro + 1 < accumulate
            if wait and hasattr(model, "no_sync"):
                with model.no_sync():
                    (loss_of(model, tokens) / accumulate).backward()
            else:
                if hasattr(model, "set_requires_gradient_sync"):
                    model.set_requires_gradient_sync(not wait)
                (loss_of(model, tokens) / accumulate).backward()
        optimizer.step()
        if getattr(optimizer, "max_grad_norm", None) is not None:
            norms.append(float(optimizer.grad_norm()))
        optimizer.zero_grad()
    return norms


def weights(model: nn.Module) -> dict[str, Tensor]:
    plain: Any = getattr(model, "module", model)
    return {n: p.detach().clone() for n, p in plain.named_parameters()}


def alone(
    everyone: int, accumulate: int = 1, capture: bool = False, **kwargs: Any
) -> tuple[dict[str, Tensor], list[float]]:
    model = make_model(**kwargs)
    norms = train(model, make_optimizer(model, capture_gradients=capture), 0, 1, everyone, accumulate=accumulate)
    return weights(model), norms


# ---- DDP -----------------------------------------------------------------------------------------------------------------
def under_ddp(rank: int, world: int, when: str, accumulate: int, no_sync: bool, options: dict[str, Any],
              ddp_options: dict[str, Any], model_options: dict[str, Any]) -> Any:  # fmt: skip
    """Weights, norms and bytes of gradient that DDP still reduces, after training; ``when`` the optimizer is made."""
    model = make_model(seed=rank, **model_options)  # of different weights: DDP gives all of them rank 0's
    wrapped: nn.Module
    if when in ("before", "prepared"):
        optimizer = make_optimizer(model, **options)
        if when == "prepared":
            optimizer.prepare_ddp(model)
        wrapped = DistributedDataParallel(model, **ddp_options)
    else:
        wrapped = DistributedDataParallel(model, **ddp_options)
        optimizer = make_optimizer(wrapped, **options)
    norms = train(wrapped, optimizer, rank, world, world, accumulate=accumulate, no_sync=no_sync)
    reduced = [p.numel() for p in wrapped._build_params_for_reducer()[0]]  # type: ignore[operator]
    return weights(model), norms, reduced


def under_ddp_with_gradients_that_wait(rank: int, world: int, when: str, ddp_options: dict[str, Any]) -> Any:
    """As on GPUs: captured gradients are gathered when backward ends, not in their hooks."""
    from sparseopt.optim import capture

    at_once, capture.AT_ONCE = capture.AT_ONCE, frozenset()
    try:
        return under_ddp(rank, world, when, 2, False, {"capture_gradients": True}, ddp_options, {})
    finally:
        capture.AT_ONCE = at_once


def disagree(rank: int, world: int, what: str) -> str:
    """The error of a step of processes that differ in something."""
    model = make_model(seed=rank if what == "weights" else 0)
    masks = masks_of(model)
    if what == "masks" and rank == 1:
        masks["scale"].fill_(False)
    optimizer = make_optimizer(model, masks=masks, capture_gradients=what != "capture" or rank == 0)
    wrapped = model if what == "weights" else DistributedDataParallel(model)
    loss_of(wrapped, batch(0, 0, ROWS)).backward()
    try:
        optimizer.step()
    except RuntimeError as error:
        return str(error)
    return ""


def without_ddp(rank: int, world: int, reduce_dtype: torch.dtype) -> Any:
    """Weights, when nobody wraps the model: the optimizer averages what it captures all the same."""
    model = make_model()
    optimizer = make_optimizer(model, capture_gradients=True, reduce_dtype=reduce_dtype)
    train(model, optimizer, rank, world, world)
    return weights(model)


def used_on_one_rank(rank: int, world: int) -> Any:
    """The head is used by rank 0 only, and block 2 by nobody: (weights, steps counted) after two steps."""
    model = make_model()
    model.blocks = model.blocks[:2] if rank > 1 else model.blocks
    optimizer = make_optimizer(model, capture_gradients=True)
    for _ in range(2):
        hidden = model.blocks[1](model.blocks[0](model.embedding(batch(0, 0, ROWS))))
        (model.head(hidden) if rank == 0 else hidden).square().mean().backward()
        optimizer.step()
    counted = {n: float(optimizer.state[p]["step"]) for n, p in model.named_parameters()}
    return weights(model), counted, weights(make_model())


def infinite_on_one_rank(rank: int, world: int, sharded: bool) -> Any:
    """(skipped steps, whether any weight changed) after a step whose gradient overflows on rank 1 only."""
    model: Any = sharded_model() if sharded else make_model()
    before = full_weights(model) if sharded else weights(model)
    optimizer = make_optimizer(model, capture_gradients=True)
    (loss_of(model, batch(0, 0, ROWS)) * (float("inf") if rank == 1 else 1.0)).backward()
    optimizer.step()
    after = full_weights(model) if sharded else weights(model)
    return optimizer.skipped_steps, any(not torch.equal(after[n], before[n]) for n in after)


# ---- FSDP2 ---------------------------------------------------------------------------------------------------------------
def sharded_model(mixed: bool = False, **kwargs: Any) -> nn.Module:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    options: dict[str, Any] = {}
    if mixed:
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = make_model(**kwargs)
    for block in model.blocks:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def full_weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.full_tensor().detach().clone() for n, p in model.named_parameters()}  # type: ignore[operator]


def under_fsdp(rank: int, world: int, when: str, accumulate: int, no_sync: bool, options: dict[str, Any],
               fsdp_options: dict[str, Any]) -> Any:  # fmt: skip
    """Weights, norms, bytes of state and active entries of this rank; ``when`` the optimizer is made."""
    if (
        when == "before"
    ):  # as transformers' Trainer does, and accelerate, which puts the sharded parameters into the groups
        model = make_model()
        optimizer = make_optimizer(model, **options)
        names = [n for n, _ in model.named_parameters()]
        from torch.distributed.fsdp import fully_shard

        for block in model.blocks:
            fully_shard(block)
        sharded = fully_shard(model)
        by_name = dict(sharded.named_parameters())
        optimizer.param_groups[0]["params"] = [by_name[n] for n in names]
    else:
        sharded = sharded_model(**fsdp_options)
        optimizer = make_optimizer(sharded, **options)
    norms = train(sharded, optimizer, rank, world, world, accumulate=accumulate, no_sync=no_sync)
    return full_weights(sharded), norms, optimizer.state_bytes(), optimizer.active_parameters


def state_bytes(rank: int, world: int, sharded: bool) -> int:
    """Bytes of optimizer state on this rank, of a model large enough that tables and rounding do not matter."""
    from torch.distributed.fsdp import fully_shard

    model: nn.Module = nn.Sequential(*(nn.Linear(257, 256, bias=False) for _ in range(4)))
    if sharded:
        fully_shard(model)
    masks = so.MaskSet.random(nn.Sequential(*(nn.Linear(257, 256, bias=False) for _ in range(4))), 0.1, seed=0)
    return so.SparseAdamW(model.named_parameters(), masks=masks).state_bytes()


def refused_when_sharded(rank: int, world: int) -> list[str]:
    model = sharded_model()
    optimizer = make_optimizer(model)
    optimizer.initialize_state()
    messages = []
    for attempt in (
        lambda: optimizer.masks,
        lambda: optimizer.update_masks(masks_of(make_model())),
        optimizer.export_delta,
        lambda: optimizer.base_weights().__enter__(),
    ):
        try:
            attempt()
            messages.append("")
        except RuntimeError as error:
            messages.append(str(error))
    return messages


# ---- checkpoints ---------------------------------------------------------------------------------------------------------
HALF = STEPS // 2
EVERYONE = 4  # rows of the batches, whatever the number of processes


def _checkpointed(model: nn.Module, optimizer: so.SparseAdamW) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import get_state_dict

    weights, state = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": state}


def save_half_way(rank: int, world: int, folder: str, options: dict[str, Any]) -> Any:
    """Saves after half of the steps, as torch.distributed.checkpoint and in one piece, and goes on to the end."""
    import torch.distributed.checkpoint as dcp

    model = sharded_model()
    optimizer = make_optimizer(model, **options)
    train(model, optimizer, rank, world, EVERYONE, steps=range(HALF))
    dcp.save(_checkpointed(model, optimizer), checkpoint_id=f"{folder}/dcp")
    whole = optimizer.full_state_dict()
    middle = full_weights(model)
    if rank == 0:
        torch.save({"model": middle, "optimizer": whole}, f"{folder}/whole.pt")
    else:
        assert whole == {}
    train(model, optimizer, rank, world, EVERYONE, steps=range(HALF, STEPS))
    return full_weights(model)


def resume(rank: int, world: int, folder: str, options: dict[str, Any]) -> Any:
    """Continues from what :func:`save_half_way` saved, sharded over any number of processes."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import set_state_dict

    model = sharded_model(seed=7)
    optimizer = make_optimizer(model, **options)
    state = _checkpointed(model, optimizer)
    dcp.load(state, checkpoint_id=f"{folder}/dcp")
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    train(model, optimizer, rank, world, EVERYONE, steps=range(HALF, STEPS))
    return full_weights(model)


def resume_alone(folder: str, options: dict[str, Any]) -> dict[str, Tensor]:
    """The same in one process without torch.distributed."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import set_state_dict

    model = make_model(seed=7)
    optimizer = make_optimizer(model, **options)
    state = _checkpointed(model, optimizer)
    dcp.load(state, checkpoint_id=f"{folder}/dcp", no_dist=True)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    train(model, optimizer, 0, 1, EVERYONE, steps=range(HALF, STEPS))
    return weights(model)


def resume_whole(rank: int, world: int, folder: str, options: dict[str, Any]) -> Any:
    """Continues sharded from the state dict of one process."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    saved = torch.load(f"{folder}/whole.pt", weights_only=True)
    model = sharded_model(seed=7)
    set_model_state_dict(model, saved["model"], options=StateDictOptions(full_state_dict=True))
    optimizer = make_optimizer(model, **options)
    optimizer.load_state_dict(saved["optimizer"])
    train(model, optimizer, rank, world, EVERYONE, steps=range(HALF, STEPS))
    return full_weights(model)


def resume_whole_alone(folder: str, options: dict[str, Any]) -> dict[str, Tensor]:
    saved = torch.load(f"{folder}/whole.pt", weights_only=True)
    model = make_model(seed=7)
    model.load_state_dict(saved["model"])
    optimizer = make_optimizer(model, **options)
    optimizer.load_state_dict(saved["optimizer"])
    train(model, optimizer, 0, 1, EVERYONE, steps=range(HALF, STEPS))
    return weights(model)


def pickle_a_part(rank: int, world: int, path: str) -> None:
    model = sharded_model()
    optimizer = make_optimizer(model)
    optimizer.initialize_state()
    torch.save(optimizer.state_dict(), path)
