"""Typed configuration of every optimizer a run can choose. Needs no torch to validate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from torch.nn import Parameter

    from optim.base import DeviceOptimizer

Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class OptimizerConfig(BaseModel):
    """What every optimizer's configuration has: its name and a way to build it."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str = Field(description="which optimizer: a key of OPTIMIZERS")

    def build(
        self, named_parameters: Sequence[tuple[str, Parameter]], lr: float
    ) -> DeviceOptimizer:
        """The optimizer over `named_parameters` at learning rate `lr`."""
        raise NotImplementedError


class AdamATan2Config(OptimizerConfig):
    """Adam with atan2 in place of the division; no epsilon, invariant to the gradient's scale."""

    name: Literal["adam_atan2"] = Field(
        "adam_atan2", description="which optimizer: a key of OPTIMIZERS"
    )
    betas: tuple[Beta, Beta] = Field(
        (0.9, 0.95), description="decay rates of the first and the second moment, in [0, 1)"
    )
    weight_decay: float = Field(
        0.1, ge=0.0, description="decoupled decay: each step takes lr * weight_decay of a weight"
    )
    a: float = Field(1.0, gt=0.0, description="scale of the update")
    b: float = Field(1.0, gt=0.0, description="scale of the second moment inside the atan2")
    bias_correction: Literal["outside", "inside"] = Field(
        "outside", description="where m is bias corrected: outside the atan2 (original) or inside"
    )

    def build(
        self, named_parameters: Sequence[tuple[str, Parameter]], lr: float
    ) -> DeviceOptimizer:
        """The optimizer over `named_parameters` at learning rate `lr`."""
        from optim.adam_atan2 import AdamATan2

        return AdamATan2(named_parameters, lr, **self.model_dump(exclude={"name"}))


class AdamWConfig(OptimizerConfig):
    """Adam with decoupled weight decay."""

    name: Literal["adamw"] = Field("adamw", description="which optimizer: a key of OPTIMIZERS")
    betas: tuple[Beta, Beta] = Field(
        (0.9, 0.95), description="decay rates of the first and the second moment, in [0, 1)"
    )
    eps: float = Field(1e-8, ge=0.0, description="added to the root of the second moment")
    weight_decay: float = Field(
        0.1, ge=0.0, description="decoupled decay: each step takes lr * weight_decay of a weight"
    )

    def build(
        self, named_parameters: Sequence[tuple[str, Parameter]], lr: float
    ) -> DeviceOptimizer:
        """The optimizer over `named_parameters` at learning rate `lr`."""
        from optim.adamw import AdamW

        return AdamW(named_parameters, lr, **self.model_dump(exclude={"name"}))


OPTIMIZERS: dict[str, type[OptimizerConfig]] = {
    "adam_atan2": AdamATan2Config,
    "adamw": AdamWConfig,
}
