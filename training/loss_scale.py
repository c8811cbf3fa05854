"""Dynamic loss scaling for float16: gradients are scaled into its range, and back before clipping.

Source: Micikevicius et al. 2018, "Mixed Precision Training", arXiv:1710.03740. All of it stays on
the device: nothing waits, and a CUDA graph can hold it.
"""

from __future__ import annotations

import torch
from torch import Tensor

_START, _MOST = 2.0**16, 2.0**24
_PATIENCE = 1000  # good steps before the scale is doubled


class LossScale:
    """A power of two that the loss is multiplied by: halved at an overflow, doubled in time."""

    def __init__(self, device: torch.device) -> None:
        self.scale = torch.full((), _START, device=device)
        self.good_steps = torch.zeros((), dtype=torch.int32, device=device)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds of it."""
        return {"loss_scale": self.scale, "loss_scale_good_steps": self.good_steps}

    @torch.no_grad()
    def update(self, overflow: Tensor) -> Tensor:
        """Adapt to a step (0-dim bool); true where not even a scale of 1 would have helped."""
        hopeless = overflow & (self.scale <= 1)
        self.good_steps.copy_(torch.where(overflow, 0, self.good_steps + 1))
        grow = self.good_steps >= _PATIENCE
        factor = torch.where(overflow, 0.5, torch.where(grow, 2.0, 1.0))
        self.scale.mul_(factor).clamp_(1.0, _MOST)
        self.good_steps.copy_(torch.where(grow, 0, self.good_steps))
        return hopeless
