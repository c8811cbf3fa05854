"""The ablation baseline: a plain transformer, applied once per ACT step.

What remains of HRM (Wang et al. 2025, arXiv:2506.21734) without hierarchy and without recursion
inside of a step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from models.config import ReasoningConfig
from models.recursion import INPUT, Schedule, Update, truncated

if TYPE_CHECKING:
    from models.block import BlockStack


class TransformerConfig(ReasoningConfig):
    """`arch=transformer`."""

    name: Literal["transformer"] = "transformer"
    H_layers: int = Field(8, ge=1, le=1024, description="blocks in the network")
    no_act_continue: bool = Field(False, description="halt by q_halt alone, without q_continue")

    @property
    def states(self) -> tuple[str, ...]:
        """The only one."""
        return ("z_H",)

    def levels(self, stack: Callable[..., BlockStack]) -> dict[str, BlockStack]:
        """One network."""
        return {"H": stack(self.H_layers)}

    def schedule(self, progress: float = 1.0) -> Schedule:
        """One update of the state from itself and the input."""
        return truncated((Update("z_H", (INPUT,), "H"),), cycles=1, grad_cycles=1)
