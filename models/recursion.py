"""Recursion schedules as data: which state is updated from which, how often, with gradient or not.

A schedule is a tuple of phases; a phase repeats a cycle of updates. `run` executes one. HRM (Wang
et al. 2025, arXiv:2506.21734), TRM (Jolicoeur-Martineau 2025, arXiv:2510.04871) and URM (Gao et
al. 2025, arXiv:2512.14693) recur by different schedules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from models.block import BlockStack
    from models.config import GradCheckpoint

INPUT = "input"  # the embedded puzzle, the one source that is not a state


@dataclass(frozen=True)
class Update:
    """`target` becomes `level(target + Σ sources)`."""

    target: str
    sources: tuple[str, ...]
    level: str


Cycle = tuple[Update, ...]


@dataclass(frozen=True)
class Phase:
    """`updates` in order, `repeat` times over, with or without gradient."""

    updates: Cycle
    repeat: int
    grad: bool


Schedule = tuple[Phase, ...]


def truncated(cycle: Cycle, *, cycles: int, grad_cycles: int, tail: int = 1) -> Schedule:
    """`cycles` times `cycle`, of which the last `grad_cycles` (at most all) carry gradient.

    With `grad_cycles` = 0 only the last `tail` updates do: HRM's one-step gradient.
    """
    if grad_cycles:
        grad_cycles = min(grad_cycles, cycles)
        phases = (Phase(cycle, cycles - grad_cycles, False), Phase(cycle, grad_cycles, True))
    else:
        phases = (
            Phase(cycle, cycles - 1, False),
            Phase(cycle[:-tail], 1, False),
            Phase(cycle[-tail:], 1, True),
        )
    return tuple(p for p in phases if p.repeat and p.updates)


def split(schedule: Schedule) -> tuple[Schedule, Schedule]:
    """What comes before the first phase with gradient, and the rest."""
    first = next((i for i, phase in enumerate(schedule) if phase.grad), len(schedule))
    return schedule[:first], schedule[first:]


def run(
    schedule: Schedule,
    state: Mapping[str, Tensor],
    x: Tensor,
    levels: Mapping[str, BlockStack],
    grad_checkpoint: GradCheckpoint = "none",
    after_cycle: Callable[[Mapping[str, Tensor]], None] | None = None,
) -> dict[str, Tensor]:
    """Carry out `schedule` from `state` (each (B, L, D)) with the embedded input `x` (B, L, D).

    `levels[name]` maps (target, sum of the sources or None) to the new target. Returns the new
    state; `state` is left as it is.

    `grad_checkpoint` says what is kept for the backward pass where there is gradient: everything
    ("none"), or the input of each "block", or of each update ("cycle"; an update is one L cycle,
    or that of the slow state), or of each whole cycle and, inside the one that is being
    differentiated, of each block ("all"). The rest is computed a second time, except for the last
    piece, which the backward pass begins with.

    `after_cycle` is called with the states after every cycle with gradient but the last one.
    """
    import torch

    from models import fp8

    values = {**state, INPUT: x}
    grad_enabled = torch.is_grad_enabled()
    for phase in schedule:
        grad = phase.grad and grad_enabled
        kept = grad_checkpoint if grad else "none"
        with torch.set_grad_enabled(grad), fp8.eight_bits(not phase.grad):
            for number in range(phase.repeat):
                last = phase is schedule[-1] and number == phase.repeat - 1
                if kept == "all" and not last:
                    values |= _recomputed_cycle(phase.updates, values, levels)
                else:
                    _cycle(phase.updates, values, levels, kept, last)
                if grad and not last and after_cycle is not None:
                    after_cycle(values)
    return {name: values[name] for name in state}


def _cycle(
    updates: Cycle,
    values: dict[str, Tensor],
    levels: Mapping[str, BlockStack],
    kept: GradCheckpoint,
    last: bool,
) -> None:
    """Carry out `updates` on `values`, in place. `last`: the backward pass begins here."""
    sums: dict[tuple[str, ...], Tensor | None] = {(): None}  # of sources as they are
    for number, update in enumerate(updates):
        level, ends = levels[update.level], last and number == len(updates) - 1
        if update.sources not in sums:
            sums[update.sources] = reduce(add, (values[name] for name in update.sources))
        inputs = values[update.target], sums[update.sources]
        if kept == "cycle" and not ends:
            values[update.target] = recomputed(level, *inputs)
        else:
            by_block = kept in ("block", "all")
            values[update.target] = level(*inputs, len(level.blocks) - ends if by_block else 0)
        sums = {names: total for names, total in sums.items() if update.target not in names}


def _recomputed_cycle(
    updates: Cycle, values: Mapping[str, Tensor], levels: Mapping[str, BlockStack]
) -> dict[str, Tensor]:
    """The states that `updates` change, of which the backward pass recomputes everything."""
    targets = tuple(dict.fromkeys(update.target for update in updates))

    def apply(*inputs: Tensor) -> tuple[Tensor, ...]:
        inner = dict(zip(values, inputs, strict=True))
        _cycle(updates, inner, levels, "block", last=True)
        return tuple(inner[name] for name in targets)

    return dict(zip(targets, recomputed(apply, *values.values()), strict=True))


def recomputed(function, *inputs):  # noqa: ANN001, ANN201 (as torch's)
    """`function(*inputs)`, keeping only `inputs` for the backward pass, which calls it again.

    torch's generators are not rewound (which no CUDA graph could capture): the models draw no
    numbers from them, and those of `models.random` come out the same a second time.
    """
    from torch.utils.checkpoint import checkpoint

    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
