"""One grid for every backend: where ops run, and problems of sparse AdamW to run them on.

The tests call `torch.ops.sparseopt` through `sparseopt.functional`. On CPU tensors that is the compiled extension, or
with SPARSEOPT_BACKEND=triton TRITON_INTERPRET=1 Triton's interpreter (test_interpreter.py runs the grid that way); on
CUDA tensors (marker `gpu`) it is Triton, compiled.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from sparseopt import _backend, functional, reference
from sparseopt.optim.plan import IndexPlan

CPU_BACKEND = os.environ.get("SPARSEOPT_BACKEND") or "cpp"
INTERPRETED = CPU_BACKEND == "triton"

RESIDUAL_DTYPES = (torch.bfloat16, torch.float16)


@pytest.fixture(scope="session", autouse=True)
def patched_once() -> None:
    """The interpreter patches Triton's language at each call of a device function, a third of its time: here once."""
    if not INTERPRETED:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    patch, done = interpreter._patch_lang, set()

    def once(function: Callable) -> object:
        names = function.__globals__.values()
        languages = frozenset(value.__name__ for value in names if inspect.ismodule(value) and value in (tl, tl.core))
        if languages not in done:
            done.add(languages)
            patch(function)  # for good: only what it returns can undo it
        return interpreter._LangPatchScope()

    interpreter._patch_lang = once


@pytest.fixture(
    params=[
        pytest.param("cpu", id="interpreter" if INTERPRETED else CPU_BACKEND),
        *([] if INTERPRETED else [pytest.param("cuda", id="cuda", marks=pytest.mark.gpu)]),
    ]
)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where the op under test runs; fails if not the expected backend would."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    chosen = torch.device(request.param)
    expected = CPU_BACKEND if request.param == "cpu" else "triton"
    assert _backend.selection(chosen).backend == expected, "the backend under test is not the one that runs"
    return chosen


@pytest.fixture
def cuda() -> torch.device:
    """For tests that are of a GPU only; they are marked ``gpu``."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device("cuda")


@pytest.fixture
def native_only() -> None:
    """For sizes that the interpreter would take minutes for."""
    if INTERPRETED:
        pytest.skip("too large for the interpreter; the compiled backends run it")


def make_mask(n: int, density: float | str, run: int = 1) -> Tensor:
    """bool[n] with active runs: nothing, one element (the last), all, or that share at random."""
    if density == "none":
        return torch.zeros(n, dtype=torch.bool)
    if density == "all":
        return torch.ones(n, dtype=torch.bool)
    if density == "one":
        return torch.arange(n) == n - 1
    return (torch.rand((n + run - 1) // run) < float(density)).repeat_interleave(run)[:n]


def shifted(tensor: Tensor, offset: int) -> Tensor:
    """A contiguous copy that starts `offset` elements into its storage: misaligned for every wide load."""
    storage = torch.zeros(tensor.numel() + offset, dtype=tensor.dtype, device=tensor.device)
    view = storage[offset:]
    view.copy_(tensor.reshape(-1))
    return view


@dataclass
class Problem:
    """Inputs of `sparse_adamw_` on the CPU; `run` copies them to a device and returns what a number of steps made."""

    masks: list[Tensor]
    plan: IndexPlan
    params: list[Tensor]
    grads: list[list[Tensor]]  # per step
    hyper: Tensor
    groups: Tensor
    amsgrad: bool
    residual: bool
    master: bool = False  # fp32 copies instead of residuals
    follow: bool = False  # somebody changes weights before every step
    cohorts: Tensor | None = None
    births: Tensor | None = None
    multiplier: Tensor | None = None
    skip: Tensor | None = None
    compact: bool = False
    offset: int = 0
    absent: frozenset[int] = frozenset()
    first_step: float = 0.0

    @property
    def state_dtype(self) -> torch.dtype:
        return torch.float64 if self.params[0].dtype == torch.float64 else torch.float32

    def expected_steps(self) -> Tensor:
        skipped = self.skip is not None and bool(self.skip != 0)
        steps = torch.full((len(self.params),), self.first_step)
        for tensor, param in enumerate(self.params):
            if param.numel() and tensor not in self.absent and not skipped:
                steps[tensor] += len(self.grads)
        return steps

    def run(self, device: torch.device | str, *, oracle: bool = False) -> Outcome:
        plan = self.plan.to(torch.device(device))

        def place(tensor: Tensor) -> Tensor:
            return shifted(tensor.to(device), self.offset)

        def state(dtype: torch.dtype) -> Tensor:
            return torch.zeros(plan.active, dtype=dtype, device=device)

        def to(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device)

        params = [place(p) for p in self.params]
        empty = params[0].new_empty(0)
        present = [empty if t in self.absent else p for t, p in enumerate(params)]
        steps = torch.full((len(params),), self.first_step, device=device)
        m, v = state(self.state_dtype), state(self.state_dtype)
        v_max = state(self.state_dtype) if self.amsgrad else None
        residual = state(torch.int16) if self.residual and not self.master else None
        master = None
        if self.residual and self.master:
            master = state(torch.float32)
            reference.gather_grads_(master, params, plan.indices, plan.chunks, 0, False)
        for dense in self.grads:
            if self.follow:
                for tensor, mask in zip(params, self.masks, strict=True):
                    tensor[mask.to(device)] += (torch.arange(int(mask.sum())) % 3 == 0).to(tensor)
            grads: list[Tensor] | Tensor = [empty if t in self.absent else place(g) for t, g in enumerate(dense)]
            if self.compact:
                gathered = state(self.state_dtype)
                if oracle:
                    reference.gather_grads_(gathered, grads, plan.indices, plan.chunks, 0, False)
                else:
                    functional.gather_grads_(gathered, grads, plan)
                grads = gathered
            options = (v_max, residual, master, to(self.cohorts), to(self.births), to(self.multiplier), to(self.skip))
            if oracle:
                lists = ([], grads) if isinstance(grads, Tensor) else (grads, None)
                reference.sparse_adamw_(
                    present,
                    *lists,
                    plan.indices,
                    plan.chunks,
                    self.groups,
                    self.hyper,
                    steps,
                    m,
                    v,
                    *options,
                    follow=self.follow,
                )
            else:
                names = ("max_exp_avg_sq", "residual", "master", "cohorts", "births", "multiplier", "skip")
                functional.sparse_adamw_(
                    present, grads, plan, groups=self.groups.to(device), hyper=self.hyper.to(device), steps=steps,
                    exp_avg=m, exp_avg_sq=v, follow=self.follow, **dict(zip(names, options, strict=True)),
                )  # fmt: skip
        optional = [None if t is None else t.cpu() for t in (v_max, residual, master)]
        return Outcome([t.cpu() for t in params], steps.cpu(), m.cpu(), v.cpu(), *optional)

    def changed(self, **fields: object) -> Problem:
        return replace(self, **fields)  # type: ignore[arg-type]


@dataclass
class Outcome:
    """What a run left behind, on the CPU."""

    params: list[Tensor]
    steps: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    max_exp_avg_sq: Tensor | None = None
    residual: Tensor | None = None
    master: Tensor | None = None
    tensors: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        optional = [t for t in (self.max_exp_avg_sq, self.residual, self.master) if t is not None]
        self.tensors = [*self.params, self.steps, self.exp_avg, self.exp_avg_sq, *optional]


def build_problem(
    dtype: torch.dtype,
    masks: Sequence[Tensor],
    *,
    steps: int = 2,
    amsgrad: bool = False,
    maximize: bool = False,
    correct_bias: bool = True,
    residual: bool = False,
    lr: float = 1e-2,
    weight_decay: float = 0.1,
    groups: int = 1,
    **fields: object,
) -> Problem:
    """Random weights and gradients; group g has its own rate, betas, eps and decay."""
    numels = [mask.numel() for mask in masks]
    plan = IndexPlan.build([functional.pack_mask(mask) for mask in masks], numels)
    rows = [
        [lr * (1 + g), 0.9 - 0.1 * g, 0.999 - 0.009 * g, 1e-8 * (1 + g), weight_decay, maximize, correct_bias, amsgrad]
        for g in range(groups)
    ]
    return Problem(
        masks=list(masks),
        plan=plan,
        params=[torch.randn(n).to(dtype) for n in numels],
        grads=[[torch.randn(n).to(dtype) for n in numels] for _ in range(steps)],
        hyper=torch.tensor(rows, dtype=torch.float64),
        groups=(torch.arange(len(numels)) % groups).to(torch.int32),
        amsgrad=amsgrad,
        residual=residual,
        **fields,  # type: ignore[arg-type]
    )


def bits(tensor: Tensor) -> Tensor:
    """The tensor's bytes, for comparisons that tell -0 from 0 and see through NaN."""
    return tensor.reshape(-1).view(torch.uint8)


def check_problem(problem: Problem, device: torch.device) -> Outcome:
    """Runs a problem on `device` and checks it against the reference on the CPU. Returns the run.

    fp32: the same operations in the same order; what differs is the last place of a few roundings (fused multiply-adds,
    the other branch of `lerp`), on weights and gradients of order 1: 1e-6 relative, 1e-7 absolute. fp64: 1e-12.
    """
    ours, oracle = problem.run(device), problem.run("cpu", oracle=True)
    rtol, atol = (1e-12, 1e-13) if problem.state_dtype == torch.float64 else (1e-6, 1e-7)
    assert torch.equal(ours.steps, problem.expected_steps())
    torch.testing.assert_close(ours.exp_avg, oracle.exp_avg, rtol=rtol, atol=atol)
    torch.testing.assert_close(ours.exp_avg_sq, oracle.exp_avg_sq, rtol=rtol, atol=atol)
    if ours.max_exp_avg_sq is not None:
        torch.testing.assert_close(ours.max_exp_avg_sq, oracle.max_exp_avg_sq, rtol=rtol, atol=atol)
    for tensor, (mask, before, mine, theirs) in enumerate(
        zip(problem.masks, problem.params, ours.params, oracle.params, strict=True)
    ):
        frozen = ~mask if tensor not in problem.absent else torch.ones_like(mask)
        assert torch.equal(bits(mine[frozen]), bits(before[frozen])), "an untouched element changed"
        if ours.residual is not None and oracle.residual is not None:
            arena = problem.plan.arena(tensor)
            masters = [
                reference.join_master(p[mask], r[arena]) for p, r in ((mine, ours.residual), (theirs, oracle.residual))
            ]
            torch.testing.assert_close(*masters, rtol=rtol, atol=atol)
            assert torch.equal(masters[0].to(mine.dtype), mine[mask]), "rounding the master must return the weight"
        elif ours.master is not None and oracle.master is not None:
            arena = problem.plan.arena(tensor)
            torch.testing.assert_close(ours.master[arena], oracle.master[arena], rtol=rtol, atol=atol)
            assert torch.equal(ours.master[arena].to(mine.dtype), mine[mask]), "the weight must be its rounded master"
        elif mine.dtype in RESIDUAL_DTYPES:
            _check_rounded(mine[mask], theirs[mask])
        else:
            torch.testing.assert_close(mine, theirs, rtol=rtol, atol=atol)
    return ours


def _check_rounded(mine: Tensor, theirs: Tensor) -> None:
    """16-bit weights without masters: a last-place difference before rounding flips few roundings, by a unit a step."""
    differs = mine != theirs
    assert int(differs.sum()) <= 1 + mine.numel() // 1000
    # A weight that a step of lr = 0.01 brings near zero keeps the rounding error of where it was.
    eps = torch.finfo(mine.dtype).eps
    torch.testing.assert_close(mine, theirs, rtol=2 * eps, atol=0.02 * eps)


@pytest.fixture
def problem() -> Callable[..., Problem]:
    return build_problem


@pytest.fixture
def check() -> Callable[[Problem, torch.device], Outcome]:
    return check_problem


@pytest.fixture
def mask_of() -> Callable[..., Tensor]:
    return make_mask


@pytest.fixture
def shift() -> Callable[[Tensor, int], Tensor]:
    return shifted


@pytest.fixture
def same_bits() -> Callable[[Tensor, Tensor], bool]:
    return lambda a, b: torch.equal(bits(a), bits(b))
