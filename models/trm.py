"""TRM, the Tiny Recursive Model: one small network that improves a latent z_L and an answer z_H.

Source: Jolicoeur-Martineau, "Less is More: Recursive Reasoning with Tiny Networks" (2025),
arXiv:2510.04871. `mixer=mlp` replaces attention by an MLP over the tokens (its Sudoku variant).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from models.config import ModelDims, ReasoningConfig
from models.recursion import INPUT, Schedule, Update, nested

if TYPE_CHECKING:
    import torch

    from models.reasoning import ReasoningModel


class TRMConfig(ReasoningConfig):
    """`arch=trm` (attention) and `arch=trm_mlp` (token-mixing MLP)."""

    name: Literal["trm"] = "trm"
    mixer: Literal["attention", "mlp"] = Field("attention", description="how tokens exchange")
    H_cycles: int = Field(
        3, ge=1, le=1024, description="times the answer z_H is updated per ACT step"
    )
    L_cycles: int = Field(
        6, ge=1, le=1024, description="times the latent z_L is updated per z_H update"
    )
    L_layers: int = Field(2, ge=1, le=1024, description="blocks in the network")

    @model_validator(mode="after")
    def _check_mixer(self) -> TRMConfig:
        if self.mixer == "attention":
            self.check_heads()
        elif self.pos_encodings == "rope":
            raise ValueError("pos_encodings=rope needs mixer=attention; use none or learned")
        elif self.causal:
            raise ValueError("causal=true needs mixer=attention")
        return self

    def schedule(self) -> Schedule:
        """Which state is updated when."""
        return nested(
            slow=Update("z_H", ("z_L",), "L"),
            fast=Update("z_L", ("z_H", INPUT), "L"),
            slow_cycles=self.H_cycles,
            fast_cycles=self.L_cycles,
        )

    def build(
        self, dims: ModelDims, *, dtype: torch.dtype, generator: torch.Generator
    ) -> ReasoningModel:
        """One stack of `L_layers` blocks serves both states; the answer is read from z_H."""
        from models.block import BlockStack
        from models.reasoning import ReasoningModel

        return ReasoningModel(
            self,
            dims,
            levels={"L": BlockStack(self, dims, self.L_layers, self.mixer, generator)},
            schedule=self.schedule(),
            states=("z_H", "z_L"),
            answer="z_H",
            dtype=dtype,
            generator=generator,
        )
