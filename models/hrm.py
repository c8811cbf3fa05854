"""HRM, the Hierarchical Reasoning Model: a slow network over z_H and a fast one over z_L.

Source: Wang et al., "Hierarchical Reasoning Model" (2025), arXiv:2506.21734. Only the last update
of either state carries gradient, and halting is learned as Q-learning with a bootstrapped target.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from models.config import RecursiveConfig
from models.recursion import INPUT, Schedule, Update, truncated

if TYPE_CHECKING:
    from models.block import BlockStack


class HRMConfig(RecursiveConfig):
    """`arch=hrm`."""

    name: Literal["hrm"] = "hrm"
    H_layers: int = Field(4, ge=1, le=1024, description="blocks in the slow network")
    L_layers: int = Field(4, ge=1, le=1024, description="blocks in the fast network")
    H_cycles: int = Field(2, ge=1, le=1024, description="slow cycles of one ACT step")
    L_cycles: int = Field(2, ge=1, le=1024, description="fast updates in each slow cycle")
    H_grad_cycles: int = Field(
        0, ge=0, le=1024, description="H cycles with gradient; 0: the last updates only"
    )
    no_act_continue: bool = Field(False, description="halt by q_halt alone, without q_continue")

    @property
    def states(self) -> tuple[str, ...]:
        """The slow state and the fast one."""
        return ("z_H", "z_L")

    def levels(self, stack: Callable[..., BlockStack]) -> dict[str, BlockStack]:
        """One network for each state."""
        return {"H": stack(self.H_layers), "L": stack(self.L_layers)}

    def schedule(self, progress: float = 1.0) -> Schedule:
        """H times: L updates of z_L from z_H and the input, then one of z_H from z_L."""
        slow_cycles, fast_cycles = self.cycles(progress)
        fast, slow = Update("z_L", ("z_H", INPUT), "L"), Update("z_H", ("z_L",), "H")
        cycle = (fast,) * fast_cycles + (slow,)
        return truncated(cycle, cycles=slow_cycles, grad_cycles=self.H_grad_cycles, tail=2)
