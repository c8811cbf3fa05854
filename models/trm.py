"""TRM, the Tiny Recursive Model: one small network that improves a latent z_L and an answer z_H.

Source: Jolicoeur-Martineau, "Less is More: Recursive Reasoning with Tiny Networks" (2025),
arXiv:2510.04871. `mixer=mlp` replaces attention by an MLP over the tokens (its Sudoku variant);
`latents` is 0 for its single-state ablation, and k for z_L split into k states.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from models.config import RecursiveConfig
from models.recursion import INPUT, Schedule, Update, truncated

if TYPE_CHECKING:
    from models.block import BlockStack


class TRMConfig(RecursiveConfig):
    """`arch=trm` (attention), `arch=trm_mlp` (token-mixing MLP), `arch=trm_single` (one state)."""

    name: Literal["trm"] = "trm"
    mixer: Literal["attention", "mlp"] = Field("attention", description="how tokens exchange")
    latents: int = Field(1, ge=0, le=64, description="latent states beside z_H; 0: z_L alone")
    L_layers: int = Field(2, ge=1, le=1024, description="blocks in the network")

    @model_validator(mode="after")
    def _check(self) -> TRMConfig:
        if not self.has_attention and self.pos_encodings in ("rope", "rope_2d"):
            raise ValueError(
                f"pos_encodings={self.pos_encodings} needs mixer=attention; use none or learned"
            )
        if not self.has_attention and self.attn_norm:
            raise ValueError("attn_norm=true needs mixer=attention, as arch=trm has")
        if not self.has_attention and self.causal:
            raise ValueError("causal=true needs mixer=attention, as arch=trm has")
        if self.latents > self.L_cycles:
            raise ValueError(
                f"latents={self.latents} is more than L_cycles={self.L_cycles}: some would never "
                "be updated"
            )
        return self

    @property
    def has_attention(self) -> bool:
        """Whether `mixer` is attention."""
        return self.mixer == "attention"

    @property
    def latents_in_turn(self) -> tuple[str, ...]:
        """The latent states, updated in turn: z_L, or z_L1 to z_Lk."""
        k = self.latents
        return tuple(f"z_L{i}" for i in range(1, k + 1)) if k > 1 else ("z_L",)

    @property
    def states(self) -> tuple[str, ...]:
        """The answer and its latents."""
        return ("z_H", *self.latents_in_turn) if self.latents else ("z_L",)

    def levels(self, stack: Callable[..., BlockStack]) -> dict[str, BlockStack]:
        """One network for all states."""
        return {"L": stack(self.L_layers, self.mixer)}

    def schedule(self, progress: float = 1.0) -> Schedule:
        """H times: L updates of a latent state from all states and the input, one of the answer."""
        slow_cycles, fast_cycles = self.cycles(progress)
        names, answer = self.latents_in_turn, ("z_H",) if self.latents else ()
        fast = tuple(
            Update(name, (*(n for n in names if n != name), *answer, INPUT), "L")
            for name in (names[i % len(names)] for i in range(fast_cycles))
        )
        slow = Update("z_H", names, "L") if self.latents else Update("z_L", (), "L")
        return truncated((*fast, slow), cycles=slow_cycles, grad_cycles=self.H_grad_cycles, tail=2)
