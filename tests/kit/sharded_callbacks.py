"""DeltaLogger and MaskCollector on a model in shards, driven as a trainer drives them: what each rank of a test does."""

from __future__ import annotations

import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from distributed_training import ROWS, batch, full_weights, loss_of, make_model, weights
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState
from transformers.trainer_utils import SaveStrategy

import sparseopt as so
from sparseopt import _sharded
from sparseopt.trainers import DeltaLogger, MaskCollector

STEPS = 6
WORLD = 2  # rows of two processes, whatever the number
TOLERANCES = [1e-6, 1e-5]


def make(sharded: bool) -> Any:
    """A tied embedding of 13 rows, one parameter of one row, a frozen block, a buffer, and a name."""
    from torch.distributed.fsdp import fully_shard

    model: Any = make_model(tied=True)
    model.register_buffer("counts", torch.arange(5))
    model.config = types.SimpleNamespace(_name_or_path="nobody/nothing", _commit_hash="0123abc")
    model.blocks[0].requires_grad_(False)
    if sharded:
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
    return model


def optimizer_of(model: nn.Module, capture: bool) -> Any:
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    if not capture:
        return torch.optim.SGD([p for _, p in trained], lr=0.1)
    generator = torch.Generator().manual_seed(1)
    masks = {n: torch.rand(p.shape, generator=generator) < 0.3 for n, p in trained}
    return so.SparseAdamW(trained, lr=1e-2, masks=masks, capture_gradients=True)


class Run:
    """One training's callbacks; ``sharded`` processes each take their rows of a batch, one process takes all."""

    def __init__(self, folder: Path, model: Any, optimizer: Any, rank: int, world: int, step: int) -> None:
        self.model, self.optimizer, self.rank, self.world = model, optimizer, rank, world
        self.state = TrainerState(global_step=step, max_steps=STEPS, is_world_process_zero=rank == 0)
        self.args: Any = types.SimpleNamespace(
            fsdp=None, deepspeed=None, max_grad_norm=0.0, world_size=world, save_strategy=SaveStrategy.NO,
            output_dir=str(folder / "run"), report_to=[],
        )  # fmt: skip
        self.callbacks: list[Any] = [
            DeltaLogger(folder / "log", "every:2,5"),
            MaskCollector(folder, save_interval=2, mask_save_interval=3, tolerance=TOLERANCES),
        ]
        self.tell("on_train_begin")

    def tell(self, event: str, **more: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(
                self.args, self.state, TrainerControl(), model=self.model, optimizer=self.optimizer, **more
            )

    def train(self, until: int, after: Callable[[int], None] = lambda step: None) -> None:
        per = ROWS * WORLD // self.world
        while self.state.global_step < until:
            self.tell("on_step_begin")
            tokens = batch(self.state.global_step, 0, ROWS * WORLD)[self.rank * per : (self.rank + 1) * per]
            loss_of(self.model, tokens).backward()
            self.tell("on_pre_optimizer_step")
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.state.global_step += 1
            self.tell("on_step_end")
            after(self.state.global_step)

    def end(self) -> dict[str, Any]:
        """What the callbacks add to the last log entry."""
        logs: dict[str, Any] = {}
        self.tell("on_log", logs=logs)
        self.tell("on_train_end")
        return logs


def train(rank: int, world: int, folder: str, capture: bool, sharded: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(the weights at the end, what was added to the log) of a whole training."""
    model = make(sharded)
    run = Run(Path(folder), model, optimizer_of(model, capture), rank, world, 0)
    run.train(STEPS)
    return (full_weights if sharded else weights)(model), run.end()


def stop_and_resume(rank: int, world: int, folder: str) -> dict[str, Tensor]:
    """Stops after step 5 and goes on from the weights of step 2."""
    model = make(True)
    kept: dict[str, Tensor] = {}

    def keep(step: int) -> None:
        if step == 2:
            kept.update({n: _sharded.local(p).detach().clone() for n, p in model.named_parameters()})

    run = Run(Path(folder), model, optimizer_of(model, False), rank, world, 0)
    run.train(5, keep)
    for callback in run.callbacks:
        callback.close()
    torch.distributed.barrier()
    again = make(True)
    with torch.no_grad():
        for name, param in again.named_parameters():
            _sharded.local(param).copy_(kept[name])
    run = Run(Path(folder), again, optimizer_of(again, False), rank, world, 2)
    run.train(STEPS)
    run.end()
    return full_weights(again)


# ---- parts ---------------------------------------------------------------------------------------------------------------
SHAPES = [(13, 5), (1,), (1, 7), (4, 2, 3)]


class Parameters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.all = nn.ParameterList(
            torch.randn(shape, generator=torch.manual_seed(i)) for i, shape in enumerate(SHAPES)
        )


def put_together(rank: int, world: int, copies: int) -> list[tuple[Any, ...]]:
    """Of each parameter: (this rank's range, whether it comes together again, the marks of all ranks, whether the sum is right).

    With ``copies`` = 2 the processes hold copies of one shard, which must not be summed twice.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (copies, world // copies), mesh_dim_names=("copies", "shards"))
    expected, model = list(Parameters().parameters()), fully_shard(Parameters(), mesh=mesh)
    found: list[tuple[Any, ...]] = []
    params = list(model.parameters())
    sums = [_sharded.local(param).detach().double().sum() for param in params]
    total = _sharded.reduce_over_shards(params, sums, torch.distributed.ReduceOp.SUM)
    for i, (param, before) in enumerate(zip(params, expected, strict=True)):
        begin, end = _sharded.held_entries("p", param)
        held = _sharded.local(param)
        marks = torch.full(held.shape, rank + 1, dtype=torch.uint8)
        good = torch.equal(_sharded.whole(param), before) and torch.equal(held.view(-1), before.view(-1)[begin:end])
        right = torch.allclose(total[i], before.detach().double().sum())
        found.append(((begin, end), good, _sharded.whole(_sharded.like(param, marks)).flatten().tolist(), right))
    return found


def under_a_loss_scale(rank: int, world: int, offload: bool) -> Any:
    """(updates that counted, the embedding's accumulation): the second of three steps overflows on rank 1 only."""
    model = make(world > 1)
    ema = so.GradientEMA(model, beta=0.5, offload=offload)
    per = ROWS * WORLD // world
    for step in range(3):
        loss = loss_of(model, batch(step, 0, ROWS * WORLD)[rank * per : (rank + 1) * per])
        (loss * (float("inf") if step == 1 and rank == world - 1 else 512.0)).backward()
        ema.update(torch.tensor(512.0))
        model.zero_grad()
    return ema.count, ema["embedding.weight"], ema.nbytes


def refused(rank: int, world: int, columns: bool) -> list[str]:
    """Errors of the logger and of the collector, of a weight split by columns, or of a bias that is left whole."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard

    plain = nn.Linear(8, 4)
    model: nn.Module = (
        fully_shard(nn.Linear(8, 4, bias=False), shard_placement_fn=lambda param: Shard(1))
        if columns
        else fully_shard(plain, ignored_params={plain.bias})
    )
    messages = []
    for callback in (DeltaLogger("nowhere", "1"), MaskCollector("nowhere"))[0 if columns else 1 :]:
        try:
            args: Any = types.SimpleNamespace(fsdp=None, deepspeed=None, world_size=world)
            state: Any = types.SimpleNamespace(is_world_process_zero=rank == 0, global_step=0, max_steps=9)
            callback.on_train_begin(args, state, TrainerControl(), model=model)
            messages.append("")
        except ValueError as error:
            messages.append(str(error))
    return messages
