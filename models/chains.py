"""Several trajectories of a puzzle in training, of which the best one learns.

Rows of the batch come in groups of K: one puzzle, K initial latents. After each ACT step the row
with the smallest token loss wins its group: it alone is trained, its answer state is taken over by
the others, which keep their latents, and it decides on halting. Gradient costs what it does for one
row: the race is without, and the winner does once more what carries it. Evaluation has one
trajectory, from the first of the K initial latents.

Source: Dillon 2026, "Speed is Confidence", arXiv:2601.19085 (winner-take-all training, K = 4,
z_H copied, z_L kept, fixed initial latents).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from models.reasoning import State


def grouped(x: Tensor, chains: int) -> Tensor:
    """The first row of each group in all its rows: (B, ...) → (B, ...)."""
    return x[::chains].repeat_interleave(chains, 0)


def initial(states: State, latents: Mapping[str, Tensor], chains: int) -> State:
    """`states` (B, L, D) with the further initial latents (K - 1, D) in their rows."""
    started = dict(states)
    for name, further in latents.items():
        own = states[name]
        rows = torch.cat((own[:1, 0], further)).repeat(len(own) // chains, 1)  # (B, D)
        started[name] = rows.unsqueeze(1).expand_as(own)
    return started


def winners(loss_B: Tensor, chains: int) -> Tensor:
    """Row numbers (B,) of each row's winner: the first with the smallest loss of the group."""
    best = loss_B.view(-1, chains).argmin(1)
    first = torch.arange(0, len(loss_B), chains, device=loss_B.device)
    return (first + best).repeat_interleave(chains)
