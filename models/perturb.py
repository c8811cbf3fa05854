"""Random initial states and noise on the states, in training.

Both are meant to widen what the recursion converges from, which pays at test time, where several
trajectories of a puzzle are compared. Evaluation is without (but for `eval.random_init`, `noise`).

Sources: random initial states and small noise: EqR, arXiv:2605.21488. Noise on one latent for
ensembles: Dillon 2026, arXiv:2601.19085.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from models.act import Carry, choose
from models.config import ReasoningConfig
from models.random import counter_normal


def perturbed(
    carry: Carry, fresh: Tensor, config: ReasoningConfig, *, seed: int, step: Tensor, rows: Tensor
) -> Carry:
    """A refilled carry before its ACT step: normal states in rows that begin, noise in the others.

    `fresh` (B,) bool are the rows that begin a puzzle; `step` (0-dim) and `rows` (B,) global row
    numbers decide the numbers drawn, the same on any number of ranks. Without `random_init` rows
    that begin get noise on their initial state.
    """
    if not (config.random_init or config.state_noise):
        return carry
    state = {}
    for number, (name, x) in enumerate(carry.state.items()):
        drawn = counter_normal(seed + number, step, rows, x[0].numel()).view_as(x).to(x.dtype)
        state[name] = x + config.state_noise * drawn if config.state_noise else x
        if config.random_init:
            state[name] = choose(fresh, drawn, state[name])
    return replace(carry, state=state)
