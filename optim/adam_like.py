"""What AdamW and AdamATan2 share: two moments, and the way to their Triton kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from optim.base import DeviceOptimizer
from optim.kernels import available


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
        on_cuda = params[0].device.type == "cuda"
        if self.fused == "auto" and not (on_cuda and available()):
            return params
        if not available():
            raise RuntimeError("fused='on' needs Triton, which is not installed")
        from optim.kernels import launch

        rest = [p for p in params if not launch.supported(p)]
        rule, extra = self._kernel_rule(group)
        numbers = launch.scalars(group["betas"], group["weight_decay"], **extra)
        for dtype in launch.DTYPES:
            bucket = [p for p in params if p.dtype == dtype and launch.supported(p)]
            if not bucket:
                continue
            # The kernel keeps bias corrections from step to step: they belong to these betas.
            key = (group["betas"], *map(id, bucket))
            launches = self.__dict__.setdefault("_launches", {})
            if key not in launches:
                launches[key] = launch.AdamLaunch(bucket, [self.state[p] for p in bucket])
            grads = [same_order(p.grad, p) for p in bucket]
            launches[key].run(grads, rule, numbers, lr, grad_scale, found_inf)
        return rest


def same_order(grad: Tensor, p: Tensor) -> Tensor:
    """`grad` with the memory order of `p`."""
    return grad if grad.stride() == p.stride() else torch.empty_like(p).copy_(grad)
