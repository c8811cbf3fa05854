"""What AdamW, AdamATan2 and Muon's smaller half share: two moments, the way to their kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from optim.base import DeviceOptimizer

if TYPE_CHECKING:
    from optim.kernels.launch import AdamLaunch


@dataclass
class Bucket:
    """Parameters of one launch, and the names of their shadows in the attached EMA."""

    params: list[Tensor]
    names: list[str]
    launch: AdamLaunch


class AdamLike(DeviceOptimizer):
    """An optimizer with `exp_avg` and `exp_avg_sq` whose rule the kernel `adam_kernel` knows."""

    moments = ("exp_avg", "exp_avg_sq")

    def _kernel_rule(self, group: dict[str, Any]) -> tuple[str, dict[str, float]]:
        """Name of the rule in the kernel, and its numbers besides betas and weight decay."""
        raise NotImplementedError

    def _launch(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        lr: Tensor,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> list[Tensor]:
        from optim.kernels.launch import numbers

        plans: dict[tuple[int, ...], tuple[list[Bucket], list[Tensor]]]
        plans = self.__dict__.setdefault("_plans", {})
        key = (id(self.ema), *map(id, params))
        if key not in plans:
            plans[key] = self._plan(params)
        buckets, rest = plans[key]
        rule, extra = self._kernel_rule(group)
        for bucket in buckets:
            if bucket.names:
                extra = {**extra, "ema_rate": self.ema.begin_fused(bucket.names)}
            values = numbers(rule, group["betas"], group["weight_decay"], **extra)
            grads = [same_order(p.grad, p) for p in bucket.params]
            bucket.launch.run(grads, rule, values, lr, grad_scale, found_inf)
        return rest

    def _plan(self, params: list[Tensor]) -> tuple[list[Bucket], list[Tensor]]:
        """Buckets of a dtype, with or without a shadow that the kernel can move; and the rest."""
        from optim.kernels.launch import DTYPES, AdamLaunch, supported

        names = {} if self.ema is None else {id(p): n for n, p in self.ema.params.items()}
        shadows: dict[int, Tensor] = {}
        for p in params:
            if id(p) in names:
                shadow = self.ema.shadow[names[id(p)]]
                wanted = (torch.float32, p.stride(), p.device)
                if (shadow.dtype, shadow.stride(), shadow.device) == wanted:
                    shadows[id(p)] = shadow
        buckets = []
        for dtype in DTYPES:
            for shadowed in (True, False):
                some = [p for p in params if p.dtype == dtype and supported(p)]
                some = [p for p in some if (id(p) in shadows) == shadowed]
                if some:
                    own = [shadows[id(p)] for p in some] if shadowed else None
                    launch = AdamLaunch(some, [self.state[p] for p in some], own)
                    buckets.append(
                        Bucket(some, [names[id(p)] for p in some] if shadowed else [], launch)
                    )
        return buckets, [p for p in params if not supported(p)]


def same_order(grad: Tensor, p: Tensor) -> Tensor:
    """`grad` with the memory order of `p`."""
    return grad if grad.stride() == p.stride() else torch.empty_like(p).copy_(grad)
