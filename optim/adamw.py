"""AdamW: Adam with decoupled weight decay, as torch's fused kernel computes it.

Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization", algorithm 2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from optim.adam_like import AdamLike, same_order
from optim.base import Fused, Half, Params, bias_correction, work_dtype


def adamw_update(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    lr: float | Tensor,
    *,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.1,
) -> tuple[Tensor, Tensor, Tensor]:
    """The rule, as a pure function of one parameter.

        p = p * (1 - lr * weight_decay)
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g²
        p = p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

    Args:
        param: any shape and floating dtype; the arithmetic is in float64 for float64, else float32.
        grad: of that shape.
        exp_avg: m, of that shape, in the dtype of the arithmetic.
        exp_avg_sq: v, likewise.
        step: 0-dim float32, t, this update included (1 at the first).
        lr: a number or a 0-dim tensor.
        betas: decay rates of m and v, in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: decoupled.

    Returns:
        New (param, m, v): param in its dtype, the moments in theirs.
    """
    beta1, beta2 = betas
    p, g = param.to(work_dtype(param.dtype)), grad.to(work_dtype(param.dtype))
    m = torch.lerp(exp_avg, g, 1.0 - beta1)
    v = torch.addcmul(exp_avg_sq * beta2, g, g, value=1.0 - beta2)
    c1, c2 = bias_correction(step, beta1), bias_correction(step, beta2)
    denominator = v.sqrt() / c2.sqrt() + eps
    p = p * (1.0 - lr * weight_decay) - lr / c1 * m / denominator
    return p.to(param.dtype), m, v


class AdamW(AdamLike):
    """AdamW over groups of parameters: torch's fused kernel where it applies, else `adamw_update`.

    torch's kernel takes float32 parameters on every device and float64 ones on the CPU. Where it
    gets a `grad_scale`, it leaves the divided gradient in `.grad`.

    Args:
        params: tensors, (name, tensor) pairs or groups.
        lr: learning rate, a number or a one-element tensor (whose value is copied).
        betas: decay rates of the moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled; a step takes `lr * weight_decay` of a weight.
        fused: see DeviceOptimizer.
        half: see DeviceOptimizer.
    """

    elementwise = True

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        fused: Fused | None = None,
        half: Half = "nearest",
    ) -> None:
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        options["half"] = half
        super().__init__(params, options, fused)

    def _update(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        lr: Tensor,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        for dtype in (torch.float32, torch.float64):
            fused = [p for p in params if p.dtype == dtype and _fusable(p, grad_scale)]
            self._fused(group, fused, lr, grad_scale, found_inf)
        rest = [p for p in params if not _fusable(p, grad_scale)]
        super()._update(group, rest, lr, grad_scale, found_inf)

    def _fused(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        lr: Tensor,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        if not params:
            return
        states = [self.state[p] for p in params]
        steps = [s["step"] for s in states]
        # The kernel wants the step counted already, and compares the float32 flag with 1.
        found = None if found_inf is None else found_inf.to(torch.float32)
        torch._foreach_add_(steps, 1)
        # It walks storage, so a view with gaps is updated through a copy (its moments have none).
        targets = [p if _dense(p) else p.contiguous() for p in params]
        torch._fused_adamw_(
            targets,
            [same_order(p.grad, t) for p, t in zip(params, targets, strict=True)],
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            steps,
            lr=lr if lr.device.type == "cpu" else lr.to(torch.float32),
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
            grad_scale=None if grad_scale is None else grad_scale.to(torch.float32),
            found_inf=found,
        )
        if found is not None:
            torch._foreach_sub_(steps, [found] * len(steps))  # a tensor alone would synchronize
        for p, target in zip(params, targets, strict=True):
            if target is not p:
                p.copy_(target)

    def _kernel_rule(self, group: dict[str, Any]) -> tuple[str, dict[str, float]]:
        return "adamw", {"eps": group["eps"]}

    def _rule(
        self,
        group: dict[str, Any],
        param: Tensor,
        grad: Tensor,
        state: dict[str, Tensor],
        lr: Tensor,
    ) -> tuple[Tensor, ...]:
        return adamw_update(
            param,
            grad,
            state["exp_avg"],
            state["exp_avg_sq"],
            state["step"],
            lr,
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
        )


def _fusable(p: Tensor, grad_scale: Tensor | None) -> bool:
    """Whether torch's kernel takes this parameter without losing digits of scale or rate."""
    if p.dtype == torch.float64:
        return p.device.type == "cpu" and grad_scale is None
    return p.dtype == torch.float32


def _dense(p: Tensor) -> bool:
    """Whether the elements of `p`, in memory order, are one gapless run."""
    return p.is_contiguous() or torch.empty_like(p, device="meta").stride() == p.stride()
