"""What every process of a run on two hosts does: FSDP2, a checkpoint every two steps, resuming from the newest whole one."""

from __future__ import annotations

import datetime
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from distributed_training import (
    EVERYONE,
    STEPS,
    _checkpointed,
    full_weights,
    make_optimizer,
    sharded_model,
    train,
)

PACE = 0.2  # seconds a step, so that a test can kill a host in the middle


def main(folder: Path) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import set_state_dict

    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=8))
    rank, world = dist.get_rank(), dist.get_world_size()
    model = sharded_model()
    optimizer = make_optimizer(model, capture_gradients=True)
    whole = sorted(int(p.parent.name) for p in folder.glob("*/.metadata"))  # written last
    first = whole[-1] if whole else 0
    if first:
        state = _checkpointed(model, optimizer)
        dcp.load(state, checkpoint_id=folder / str(first))
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    if rank == 0:
        print(f"starts at step {first}", flush=True)
    for step in range(first, STEPS):
        train(model, optimizer, rank, world, EVERYONE, steps=range(step, step + 1))
        time.sleep(PACE)
        if (step + 1) % 2 == 0:
            dcp.save(_checkpointed(model, optimizer), checkpoint_id=folder / str(step + 1))
            if rank == 0:
                print(f"saved step {step + 1}", flush=True)
    weights = full_weights(model)
    if rank == 0:
        torch.save(weights, folder / "weights.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
