"""Typed configuration of every optimizer a run can choose. Needs no torch to validate."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from torch.nn import Parameter

    from optim.base import DeviceOptimizer
    from optim.cuts import Divide

logger = logging.getLogger(__name__)

Beta = Annotated[float, Field(ge=0.0, lt=1.0)]
Betas = Annotated[
    tuple[Beta, Beta],
    Field(description="decay rates of the first and the second moment, in [0, 1)"),
]
Eps = Annotated[float, Field(ge=0.0, description="added to the root of the second moment")]
Decay = Annotated[
    float,
    Field(ge=0.0, description="decoupled decay: each step takes lr * weight_decay of a weight"),
]

_OURS = {"name", "sharded"}  # keys that are not for the optimizer's class


class OptimizerConfig(BaseModel):
    """What every optimizer's configuration has: its name and a way to build it."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str = Field(description="which optimizer: a key of OPTIMIZERS")
    fused: Literal["off", "auto", "on"] = Field(
        "auto", description="Triton kernels: auto uses them on CUDA; on fails without Triton"
    )

    sharded: bool = Field(
        False, description="spread its state over the ranks (ZeRO-1); one rank: no difference"
    )
    elementwise: ClassVar[bool] = False  # see DeviceOptimizer

    @property
    def divide(self) -> Divide | None:
        """Where a sharded one may cut parameters, if not anywhere (see ShardedOptimizer)."""
        return None

    def build(
        self, named_parameters: Sequence[tuple[str, Parameter]], lr: float
    ) -> DeviceOptimizer:
        """The optimizer over `named_parameters` at learning rate `lr`."""
        raise NotImplementedError


class AdamATan2Config(OptimizerConfig):
    """Adam with atan2 in place of the division; no epsilon, invariant to the gradient's scale."""

    elementwise: ClassVar[bool] = True

    name: Literal["adam_atan2"] = Field(
        "adam_atan2", description="which optimizer: a key of OPTIMIZERS"
    )
    betas: Betas = (0.9, 0.95)
    weight_decay: Decay = 0.1
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

        return AdamATan2(named_parameters, lr, **self.model_dump(exclude=_OURS))


class AdamWConfig(OptimizerConfig):
    """Adam with decoupled weight decay."""

    elementwise: ClassVar[bool] = True

    name: Literal["adamw"] = Field("adamw", description="which optimizer: a key of OPTIMIZERS")
    betas: Betas = (0.9, 0.95)
    eps: Eps = 1e-8
    weight_decay: Decay = 0.1

    def build(
        self, named_parameters: Sequence[tuple[str, Parameter]], lr: float
    ) -> DeviceOptimizer:
        """The optimizer over `named_parameters` at learning rate `lr`."""
        from optim.adamw import AdamW

        return AdamW(named_parameters, lr, **self.model_dump(exclude=_OURS))


class MuonConfig(OptimizerConfig):
    """Orthogonalized momentum for the matrices of the blocks, Adam for all other parameters."""

    name: Literal["muon"] = Field("muon", description="which optimizer: a key of OPTIMIZERS")
    momentum: Beta = Field(0.95, description="decay rate of the momentum, in [0, 1)")
    nesterov: bool = Field(True, description="whether the momentum looks one step ahead")
    weight_decay: Decay = 0.1
    scaling: Literal["moonlight", "keller"] = Field(
        "moonlight",
        description="size of an update: 0.2 * sqrt(longer side), as large as AdamW's, or "
        "sqrt(max(1, rows / columns))",
    )
    ns_steps: int = Field(5, ge=1, le=20, description="Newton-Schulz iterations")
    coefficients: Literal["quintic", "polar_express"] = Field(
        "quintic", description="polynomial of the Newton-Schulz iteration"
    )
    split_fused: bool = Field(
        True, description="whether q, k, v and gate, up in one parameter are matrices of their own"
    )
    adam: Literal["adam_atan2", "adamw"] = Field(
        "adam_atan2", description="rule of embeddings, heads, biases and gains"
    )
    adam_lr_scale: float = Field(1.0, ge=0.0, description="learning rate of that rule over lr")
    adam_weight_decay: float | None = Field(
        None, ge=0.0, description="decay of that rule, of its own rate; null: weight_decay"
    )
    betas: tuple[Beta, Beta] = Field(
        (0.9, 0.95), description="decay rates of that rule's moments, in [0, 1)"
    )
    eps: float = Field(1e-8, ge=0.0, description="of adam=adamw: added to the root")

    def build(
        self, named_parameters: Sequence[tuple[str, Parameter]], lr: float
    ) -> DeviceOptimizer:
        """The optimizer over `named_parameters` at learning rate `lr`."""
        from optim.muon import Muon

        return Muon(named_parameters, lr, **self.model_dump(exclude=_OURS))

    @property
    def divide(self) -> Divide:
        """Between the matrices of a fused parameter."""
        from optim.muon import Muon

        return lambda named, group: Muon.divide(named, {**self.model_dump(), **group})


class AdamMiniConfig(OptimizerConfig):
    """AdamW with one second moment per block of a parameter (head, neuron, token, tensor)."""

    name: Literal["adam_mini"] = Field(
        "adam_mini", description="which optimizer: a key of OPTIMIZERS"
    )
    betas: Betas = (0.9, 0.95)
    eps: Eps = 1e-8
    weight_decay: Decay = 0.1
    num_heads: int | None = Field(
        None, ge=1, description="attention heads of the model, for the blocks of queries and keys"
    )
    num_kv_heads: int | None = Field(
        None, ge=1, description="heads of keys and values, where there are fewer"
    )
    state: Literal["fp32", "bf16", "fp8"] = Field(
        "fp32", description="format of the first moment; fp8 is e4m3 with a scale per block"
    )
    print_partition: bool = Field(
        False, description="whether the log shows the blocks of every parameter"
    )

    def build(
        self, named_parameters: Sequence[tuple[str, Parameter]], lr: float
    ) -> DeviceOptimizer:
        """The optimizer over `named_parameters` at learning rate `lr`."""
        from optim.adam_mini import AdamMini

        options = self.model_dump(exclude={*_OURS, "print_partition"})
        optimizer = AdamMini(named_parameters, lr, **options)
        if self.print_partition:
            logger.info("blocks of Adam-mini:\n%s", optimizer.partition)
        return optimizer

    @property
    def divide(self) -> Divide:
        """Between blocks."""
        from optim.adam_mini import AdamMini

        return lambda named, group: AdamMini.divide(named, {**self.model_dump(), **group})


OPTIMIZERS: dict[str, type[OptimizerConfig]] = {
    "adam_atan2": AdamATan2Config,
    "adamw": AdamWConfig,
    "adam_mini": AdamMiniConfig,
    "muon": MuonConfig,
}
