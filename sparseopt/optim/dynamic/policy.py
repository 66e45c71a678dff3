"""When masks change, how much of them, and how sparse they are by then.

rigl      exchange a cosine-decayed fraction: the smallest |w| leave, the largest dense gradients come (Evci et al. 2020)
set       the same with random growth (Mocanu et al. 2018)
gradual   sparsity rises with a cubic curve, nothing comes back (Zhu & Gupta 2017)
static    the first masks stay
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["POLICIES", "Plan", "SparsitySchedule", "check_sparsity", "random_scores", "random_seed"]

POLICIES = ("rigl", "set", "gradual", "static")
SparsitySchedule = Callable[[int, int], float]


def check_sparsity(value: object, what: str) -> float:
    """A sparsity as a float.

    Raises:
        ValueError: NaN, or outside [0, 1).
    """
    number = float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    if not 0 <= number < 1:
        raise ValueError(f"{what} must lie in [0, 1), got {value!r}.")
    return number


@dataclass(frozen=True)
class Plan:
    """What happens at which optimizer step; steps count from 1.

    Attributes:
        policy: one of :data:`POLICIES`.
        total_steps: of the training.
        interval: steps between two updates.
        fraction: share of the active entries that is exchanged, before its decay.
        sparsity: the sparsity, for ``gradual`` the final one.
        initial_sparsity: where ``gradual`` begins.
        end: share of the training after which nothing is exchanged any more.
        schedule: ``(step, total steps) -> sparsity`` in place of a constant or the cubic curve.
    """

    policy: str = "rigl"
    total_steps: int = 1000
    interval: int = 100
    fraction: float = 0.3
    sparsity: float = 0.5
    initial_sparsity: float = 0.0
    end: float = 0.75
    schedule: SparsitySchedule | None = None

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ValueError(f"the policy must be one of {', '.join(POLICIES)}, got {self.policy!r}.")
        for what in ("total_steps", "interval"):
            value = getattr(self, what)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{what} must be a whole number, 1 or more, got {value!r}.")
        if not 0 <= self.fraction <= 1:
            raise ValueError(f"the fraction of entries to exchange must lie in 0..1, got {self.fraction!r}.")
        if not 0 < self.end <= 1:
            raise ValueError(f"end must lie in (0, 1], got {self.end!r}.")
        check_sparsity(self.sparsity, "the sparsity")
        check_sparsity(self.initial_sparsity, "initial_sparsity")
        if self.schedule is not None and self.policy == "static":
            raise ValueError("a sparsity schedule needs masks that change: choose another policy than 'static'.")

    @property
    def last_exchange(self) -> int:
        """The last step at which entries may be exchanged."""
        return int(self.end * self.total_steps)

    @property
    def growth(self) -> str:
        """What decides which entries come: ``"gradient"`` or ``"random"``."""
        return "random" if self.policy == "set" else "gradient"

    def updates(self, step: int) -> bool:
        """Whether masks are looked at after this step."""
        if self.policy == "static" or step < 1 or step % self.interval:
            return False
        return step <= (self.total_steps if self.schedule is not None else self.last_exchange)

    def exchange(self, step: int) -> float:
        """Share of the active entries to exchange: f / 2 (1 + cos(pi step / end)), 0 from the end on."""
        end = self.end * self.total_steps
        if self.policy not in ("rigl", "set") or step >= end:
            return 0.0
        return self.fraction / 2 * (1 + math.cos(math.pi * step / end))

    def sparsity_at(self, step: int) -> float:
        """Sparsity after the update of a step; step 0: of the first masks.

        Raises:
            ValueError: the schedule returned NaN or something outside [0, 1).
        """
        if self.schedule is not None:
            what = f"the sparsity that the schedule returns for step {step} of {self.total_steps}"
            return check_sparsity(self.schedule(step, self.total_steps), what)
        if self.policy != "gradual":
            return self.sparsity
        # The last update reaches the final sparsity, wherever the interval puts it.
        last = self.last_exchange // self.interval * self.interval
        left = 0.0 if not last else (1 - min(step, last) / last) ** 3
        return self.sparsity + (self.initial_sparsity - self.sparsity) * left


def random_seed(seed: int, step: int, name: str) -> int:
    """63 bits that depend on seed, step and name only."""
    digest = hashlib.sha256(f"{int(seed)}:{step}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def random_scores(shape: tuple[int, ...], seed: int, step: int, name: str) -> Tensor:
    """fp32 uniform numbers that depend on seed, step, name and shape only; on the CPU, whatever the model is on."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(random_seed(seed, step, name)))
