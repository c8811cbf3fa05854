"""Recursion schedules as data: which state is updated from which, how often, with gradient or not.

A schedule is a tuple of phases; a phase repeats its updates. `run` executes one. HRM (Wang et al.
2025, arXiv:2506.21734) and TRM (Jolicoeur-Martineau 2025, arXiv:2510.04871) differ only here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

INPUT = "input"  # the embedded puzzle, the one source that is not a state


@dataclass(frozen=True)
class Update:
    """`target` becomes `level(target + Σ sources)`."""

    target: str
    sources: tuple[str, ...]
    level: str


@dataclass(frozen=True)
class Phase:
    """`updates` in order, `repeat` times over, with or without gradient."""

    updates: tuple[Update, ...]
    repeat: int
    grad: bool


Schedule = tuple[Phase, ...]


def nested(slow: Update, fast: Update, *, slow_cycles: int, fast_cycles: int) -> Schedule:
    """`slow_cycles` × (`fast_cycles` × fast, then slow); gradient through the last slow cycle."""
    cycle = (fast,) * fast_cycles + (slow,)
    return (Phase(cycle, slow_cycles - 1, grad=False), Phase(cycle, 1, grad=True))


def run(
    schedule: Schedule,
    state: Mapping[str, Tensor],
    x: Tensor,
    levels: Mapping[str, Callable[[Tensor, Tensor], Tensor]],
) -> dict[str, Tensor]:
    """Carry out `schedule` from `state` (each (B, L, D)) with the embedded input `x` (B, L, D).

    `levels[name]` maps (target, sum of the sources) to the new target. Returns the new state;
    `state` is left as it is.
    """
    import torch

    values = {**state, INPUT: x}
    grad_enabled = torch.is_grad_enabled()
    for phase in schedule:
        with torch.set_grad_enabled(phase.grad and grad_enabled):
            sums: dict[tuple[str, ...], Tensor] = {}  # of sources that have not changed since
            for update in phase.updates * phase.repeat:
                if update.sources not in sums:
                    sums[update.sources] = reduce(add, (values[s] for s in update.sources))
                injection = sums[update.sources]
                values[update.target] = levels[update.level](values[update.target], injection)
                sums = {k: v for k, v in sums.items() if update.target not in k}
    return {name: values[name] for name in state}
