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


def alone(everyone: int, accumulate: int = 1, capture: bool = False, **kwargs: Any) -> tuple[dict[str, Tensor], list[float]]:
    model = make_model(**kwargs)
    norms = train(model, make_optimizer(model, capture_gradients=capture), 0, 1, everyone, accumulate=accumulate)
    return weights(model), norms


# ---- DDP -----------------------------------------------------------------------------------------------------------------
def under_ddp(rank: int, world: int, when: str, accumulate: int, no_sync: bool, options: dict[str, Any],
              ddp_options: dict[str, Any], model_options: dict[str, Any]) -> Any:  # fmt: skip
    """Weights, norms and bytes of gradient that DDP still reduces, after training; ``when`` the optimizer is made."""
    model = make_model(seed=rank, **model_options)  # of different weights: DDP gives all of them rank 0's
    wrapped: nn.Module
    if when == "before":
        optimizer = make_optimizer(model, **options)
        wrapped = DistributedDataParallel(model, **ddp_options)
    else:
        wrapped = DistributedDataParallel(model, **ddp_options)
        optimizer = make_optimizer(wrapped, **options)
    norms = train(wrapped, optimizer, rank, world, world, accumulate=accumulate, no_sync=no_sync)
    reduced = [p.numel() for p in wrapped._build_params_for_reducer()[0]]  # type: ignore[operator]
    return weights(model), norms, reduced


# ---- FSDP2 ---------------------------------------------------------------------------------------------------------------
def sharded_model(mixed: bool = False, offload: bool = False, **kwargs: Any) -> nn.Module:
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    options: dict[str, Any] = {}
    if mixed:
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if offload:
        options["offload_policy"] = CPUOffloadPolicy()
    model = make_model(**kwargs)
    for block in model.blocks:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def full_weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.full_tensor().detach().clone() for n, p in model.named_parameters()}  # type: ignore[operator]


def under_fsdp(rank: int, world: int, when: str, accumulate: int, no_sync: bool, options: dict[str, Any],
               fsdp_options: dict[str, Any]) -> Any:  # fmt: skip
    """Weights, norms, bytes of state and active entries of this rank; ``when`` the optimizer is made."""
    if when == "before":  # as transformers' Trainer does, and accelerate, which puts the sharded parameters into the groups
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
