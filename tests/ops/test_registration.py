"""Every op as PyTorch sees it: opcheck, fullgraph compilation, version counters, no re-compilation, no waiting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sparseopt import _schema, functional
from sparseopt.optim.plan import IndexPlan

ops = torch.ops.sparseopt


def samples(name: str, device: torch.device) -> list[tuple[Any, ...]]:
    """Arguments of each op, minimal and with everything that is optional."""
    mask = (torch.rand(1000) < 0.3).to(device)
    packed = functional.pack_mask(mask)
    masks = [mask.cpu(), torch.ones(70, dtype=torch.bool)]
    plan = IndexPlan.build([functional.pack_mask(m) for m in masks], [1000, 70]).to(device)

    def tensors() -> list[Tensor]:
        return [torch.randn(1000, device=device), torch.randn(70, device=device)]

    def state(dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(plan.active, dtype=dtype, device=device)

    hyper = torch.tensor([[1e-2, 0.9, 0.999, 1e-8, 0.1, 0, 1, 1]], dtype=torch.float64, device=device)
    groups = torch.zeros(2, dtype=torch.int32, device=device)
    steps = torch.zeros(2, device=device)
    fixed = (plan.indices, plan.chunks, groups, hyper, steps)
    scalar = torch.tensor(0.0, device=device)
    match name:
        case "pack_mask":
            return [(mask,), (mask.view(10, 100).t(),)]
        case "unpack_mask" | "mask_indices":
            return [(packed, 1000)]
        case "popcount":
            return [(packed,)]
        case "mask_overlap":
            return [(packed, ~packed)]
        case "gather_grads_":
            squares = torch.zeros(len(plan.chunks) * plan.squares_per_chunk, device=device)
            return [
                (
                    state(),
                    tensors(),
                    plan.indices,
                    plan.chunks,
                    0,
                    accumulate,
                    plan.run,
                    squares if accumulate else None,
                )
                for accumulate in (False, True)
            ]
        case "clip_coefficient_":
            numbers = (torch.zeros((), device=device) for _ in range(3))
            return [(torch.rand(100, device=device), 1.0, scalar + 0.5, scalar, *numbers)]
        case "scatter_values_":
            return [(tensors(), torch.rand(plan.active, device=device), plan.indices, plan.chunks, plan.run)]
        case "remap_entries_":
            other = IndexPlan.build(
                [functional.pack_mask(torch.rand(n) < 0.4) for n in plan.numels], plan.numels
            ).to(device)  # fmt: skip
            return [
                (
                    [
                        torch.rand(plan.active, device=device),
                        torch.zeros(plan.active, dtype=torch.int16, device=device),
                    ],
                    [
                        torch.rand(other.active, device=device),
                        torch.ones(other.active, dtype=torch.int16, device=device),
                    ],
                    plan.indices,
                    plan.chunks,
                    other.indices,
                    other.chunks,
                )
            ]
        case "select_entries":
            vector = torch.zeros(192, dtype=torch.uint8, device=device)
            vector[: packed.numel()] = packed
            counts, seeds = torch.tensor([20, 3], device=device), torch.tensor([1, 2], device=device)
            halves = [t.bfloat16() for t in tensors()]
            return [(tensors(), vector, counts.clamp(max=0), False, None), (halves, vector, counts, True, seeds)]
        case "accumulate_squares_":
            halves = [t.bfloat16() for t in tensors()]
            return [(tensors(), tensors(), 0.5, None, None), (tensors(), halves, 0.5, scalar + 0.9, scalar + 0.25)]
        case "grad_project":
            given = [
                torch.randn(2, 5, 40, device=device),
                torch.randn(2, 5, 3, device=device),
                torch.randn(8, 40, device=device),
            ]
            apart = torch.randn(5, 2, 50, device=device).transpose(0, 1)[..., :40]
            halves16 = [t.bfloat16() for t in given]
            return [(*given, 0.5), (apart, *given[1:], 1.0), (*halves16, 2.0), (halves16[0], *given[1:], 1.0)]
        case "cross_entropy_":
            targets = torch.tensor([3, -100, 0], device=device)
            return [
                (torch.randn(3, 70, device=device), targets, -100),
                (torch.randn(3, 90, device=device).bfloat16()[:, 10:80], targets.clamp(min=0), 3),
            ]
    halves = [t.bfloat16() for t in tensors()]
    none = (*(None,) * 7, plan.run, False)
    births = torch.zeros(2, 1, device=device)
    ages = (state(torch.uint8), births, scalar + 0.5, scalar, plan.run, True)
    full, copy = (state(), state(torch.int16), None, *ages), (state(), None, state(), *ages)
    return [
        (tensors(), tensors(), None, *fixed, state(), state(), *none),
        (halves, [], state(), *fixed, state(), state(), *full),
        (halves, [], state(), *fixed, state(), state(), *copy),
    ]


@pytest.mark.parametrize("name", _schema.OPS)
def test_opcheck(device: torch.device, name: str) -> None:
    """All of opcheck's tests. The ops have no derivative, so no sample requires grad, and `test_autograd_registration`
    asks nothing more of them."""
    for arguments in samples(name, device):
        results = torch.library.opcheck(getattr(ops, name).default, arguments)
        assert set(results.values()) == {"SUCCESS"}, results


def test_every_op_is_sampled_and_bumps_what_it_writes(device: torch.device) -> None:
    for name in _schema.OPS:
        written = [a.alias_info is not None for a in getattr(ops, name).default._schema.arguments]
        assert any(written) == (name in _schema.MUTABLE_OPS)
        for arguments in samples(name, device):
            lists = [a if isinstance(a, list) else [a] for a in arguments]
            flat = [(t, w) for group, w in zip(lists, written, strict=True) for t in group if isinstance(t, Tensor)]
            before = [t._version for t, _ in flat]
            getattr(ops, name)(*arguments)
            for (tensor, is_written), version in zip(flat, before, strict=True):
                assert (tensor._version > version) == is_written


def test_autograd_notices_a_step(device: torch.device) -> None:
    weight = torch.nn.Parameter(torch.randn(1000, device=device))
    loss = (weight * weight).sum()
    params, grads, *rest = samples("sparse_adamw_", device)[0]
    with torch.no_grad():
        ops.sparse_adamw_([weight, params[1]], grads, *rest)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_raw_ops_refuse_what_would_read_anywhere(device: torch.device) -> None:
    """Unchecked callers of torch.ops get an error, not an invalid address."""
    params, grads, *rest = samples("sparse_adamw_", device)[0]
    strided = torch.randn(2000, device=device)[::2]
    for bad_params, bad_grads in (
        (params, []),
        (params, grads[:1]),
        (params, [grads[0], grads[1][:0]]),
        (params, [grads[0], grads[0]]),
        (params, [strided, grads[1]]),
        ([strided, params[1]], grads),
        ([params[0].to(torch.int32), params[1]], grads),
    ):
        with pytest.raises((RuntimeError, ValueError, TypeError)):
            ops.sparse_adamw_(bad_params, bad_grads, *rest)
    compact, gathered, *where = samples("gather_grads_", device)[0]
    for bad in ([strided, gathered[1]], [gathered[0], gathered[1].half()]):
        with pytest.raises((RuntimeError, ValueError, TypeError)):
            ops.gather_grads_(compact, bad, *where)
    params, values, *where = samples("scatter_values_", device)[0]
    for bad, given in (
        ([strided, params[1]], values),
        ([params[0], params[1].half()], values),
        (params, values.half()),
        (params, torch.rand(2 * values.numel(), device=device)[::2]),
    ):
        with pytest.raises((RuntimeError, ValueError, TypeError)):
            ops.scatter_values_(bad, given, *where)


def clone(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    return [clone(v) for v in value] if isinstance(value, list) else value


@pytest.mark.parametrize("name", _schema.OPS)
def test_compiles_as_one_graph(device: torch.device, name: str, same_bits: Callable) -> None:
    for arguments in samples(name, device):
        torch._dynamo.reset()
        operator = getattr(ops, name)
        eager, compiled = clone(list(arguments)), clone(list(arguments))
        expected = operator(*eager)
        # The op stays whole: what runs inside is the kernel itself, whatever the compiler's backend.
        result = torch.compile(lambda *args: operator(*args), fullgraph=True, backend="aot_eager")(*compiled)  # noqa: B023
        after = [t for v in [*eager, expected] for t in (v if isinstance(v, list) else [v]) if isinstance(t, Tensor)]
        other = [t for v in [*compiled, result] for t in (v if isinstance(v, list) else [v]) if isinstance(t, Tensor)]
        assert len(after) == len(other)
        assert all(same_bits(a, b) for a, b in zip(after, other, strict=True))


def test_checked_functions_compile_as_one_graph(device: torch.device, same_bits: Callable, problem: Callable) -> None:
    mask = (torch.rand(1003) < 0.3).to(device)

    def masks(mask: Tensor) -> tuple[Tensor, ...]:
        packed = functional.pack_mask(mask)
        unpacked = functional.unpack_mask(packed, 1003)
        indices = functional.mask_indices(packed, 1003)
        return packed, unpacked, functional.popcount(packed), indices, functional.mask_overlap(packed, ~packed)

    torch._dynamo.reset()
    compiled = torch.compile(masks, fullgraph=True, backend="aot_eager")
    assert all(same_bits(a, b) for a, b in zip(masks(mask), compiled(mask), strict=True))

    made = problem(torch.float32, [mask.cpu(), torch.ones(70, dtype=torch.bool)])
    plan = made.plan.to(device)

    def step(params: list[Tensor], grads: list[Tensor], state: list[Tensor], steps: Tensor) -> None:
        compact, m, v = state
        functional.gather_grads_(compact, grads, plan)
        functional.sparse_adamw_(
            params, compact, plan, groups=made.groups.to(device), hyper=made.hyper.to(device), steps=steps,
            exp_avg=m, exp_avg_sq=v,
        )  # fmt: skip

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        params = [p.to(device, copy=True) for p in made.params]
        state = [torch.zeros(plan.active, device=device) for _ in range(3)]
        steps = torch.zeros(2, device=device)
        function(params, [g.to(device) for g in made.grads[0]], state, steps)
        results.append([*params, *state, steps])
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))
    assert not same_bits(results[1][0].cpu(), made.params[0])


# ---- on a GPU --------------------------------------------------------------------------------------------------------
@pytest.mark.gpu
def test_a_step_neither_waits_nor_compiles_again(cuda: torch.device) -> None:
    import triton

    arguments = list(samples("sparse_adamw_", cuda)[1])
    gather = samples("gather_grads_", cuda)[1]
    scalars = {"hyper": arguments[6], "multiplier": arguments[14]}
    ops.sparse_adamw_(*arguments)
    ops.gather_grads_(*gather)
    rates = [torch.full((), 0.1 * i, dtype=torch.float64, device=cuda) for i in range(3)]
    compiled: list[str] = []
    previous = triton.knobs.runtime.jit_post_compile_hook
    torch.cuda.synchronize()
    try:
        triton.knobs.runtime.jit_post_compile_hook = lambda **info: compiled.append(str(info.get("repr")))
        torch.cuda.set_sync_debug_mode("error")
        for rate in rates:
            scalars["hyper"][:, 0] = rate
            scalars["multiplier"].fill_(rate)
            ops.gather_grads_(*gather)
            ops.sparse_adamw_(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        triton.knobs.runtime.jit_post_compile_hook = previous
    assert compiled == []
    assert arguments[7].tolist() == [4.0, 4.0]


@pytest.mark.gpu
def test_cuda_graph_replays_steps(cuda: torch.device, same_bits: Callable) -> None:
    def fresh() -> tuple[list[Any], list[Any]]:
        torch.manual_seed(0)
        step, gather = list(samples("sparse_adamw_", cuda)[1]), list(samples("gather_grads_", cuda)[0])
        gather[0], gather[2], gather[3] = step[2], step[3], step[4]
        return step, gather

    step, gather = fresh()
    for _ in range(4):
        ops.gather_grads_(*gather)
        ops.sparse_adamw_(*step)

    captured, captured_gather = fresh()
    ops.gather_grads_(*captured_gather)
    ops.sparse_adamw_(*captured)  # the warm-up step
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.gather_grads_(*captured_gather)
        ops.sparse_adamw_(*captured)
    for _ in range(3):
        graph.replay()
    assert captured[7].tolist() == [4.0, 4.0]
    assert all(same_bits(a, b) for a, b in zip(step[0], captured[0], strict=True))


@pytest.mark.gpu
def test_side_streams(cuda: torch.device, same_bits: Callable) -> None:
    torch.manual_seed(0)
    arguments = samples("sparse_adamw_", cuda)[0]
    other = clone(list(arguments))
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        ops.sparse_adamw_(*arguments)
    torch.cuda.synchronize()
    ops.sparse_adamw_(*other)
    assert all(same_bits(a, b) for a, b in zip(arguments[0], other[0], strict=True))
