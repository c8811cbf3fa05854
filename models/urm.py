"""URM, the Universal Reasoning Model: one deep network over one state, with ConvSwiGLU.

Source: Gao et al., "Universal Reasoning Model" (2025), arXiv:2512.14693. Backpropagation is
truncated: of the H × L passes of an ACT step the last L carry gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from models.config import RecursiveConfig
from models.recursion import INPUT, Schedule, Update, truncated

if TYPE_CHECKING:
    from models.block import BlockStack


class URMConfig(RecursiveConfig):
    """`arch=urm`."""

    name: Literal["urm"] = "urm"
    num_layers: int = Field(4, ge=1, le=1024, description="blocks in the network")
    conv_kernel: int = Field(
        2, ge=1, le=64, description="tokens that ConvSwiGLU's convolution sees"
    )
    H_cycles: int = Field(2, ge=1, le=1024, description="groups of passes of one ACT step")
    L_cycles: int = Field(6, ge=1, le=1024, description="passes in each group")

    @property
    def states(self) -> tuple[str, ...]:
        """The only one."""
        return ("z",)

    def levels(self, stack: Callable[..., BlockStack]) -> dict[str, BlockStack]:
        """One network."""
        return {"L": stack(self.num_layers, conv_kernel=self.conv_kernel)}

    def schedule(self, progress: float = 1.0) -> Schedule:
        """H × L updates of the one state from itself and the input."""
        slow_cycles, fast_cycles = self.cycles(progress)
        cycle = (Update("z", (INPUT,), "L"),) * fast_cycles
        return truncated(cycle, cycles=slow_cycles, grad_cycles=self.H_grad_cycles)
