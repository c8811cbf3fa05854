"""AdamATan2: Adam whose division is an atan2, so that it needs no epsilon.

Everett et al. 2024, "Scaling Exponents Across Parameterizations and Optimizers" (section 4.3), in
the form of the CUDA original `adam-atan2`, which HRM and TRM were trained with.
"""

from __future__ import annotations

import math
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor

from optim.adam_like import AdamLike
from optim.base import Fused, Half, Params, work_dtype
from optim.base import bias_correction as _correction
from optim.checks import check_number

BiasCorrection = Literal["outside", "inside"]


def adam_atan2_update(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    lr: float | Tensor,
    *,
    betas: tuple[float, float] = (0.9, 0.95),
    weight_decay: float = 0.1,
    a: float = 1.0,
    b: float = 1.0,
    bias_correction: BiasCorrection = "outside",
) -> tuple[Tensor, Tensor, Tensor]:
    """The rule, as a pure function of one parameter.

        p = p * (1 - lr * weight_decay)
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g²
        outside:  p = p - a * lr / (1 - beta1^t) * atan2(m, b * sqrt(v) / sqrt(1 - beta2^t))
        inside:   p = p - a * lr * atan2(m / (1 - beta1^t), b * sqrt(v / (1 - beta2^t)))

    "outside" is the CUDA original; "inside" with a=1.27 is the package adam-atan2-pytorch. An
    update is at most a * lr * π/2 large ("outside": over 1 - beta1^t); atan2(0, 0) is 0.

    Args:
        param: any shape and floating dtype; the arithmetic is in float64 for float64, else float32.
        grad: of that shape.
        exp_avg: m, of that shape, in the dtype of the arithmetic.
        exp_avg_sq: v, likewise.
        step: 0-dim float32, t, this update included (1 at the first).
        lr: a number or a 0-dim tensor.
        betas: decay rates of m and v, in [0, 1).
        weight_decay: decoupled.
        a: scale of the update.
        b: scale of the second moment.
        bias_correction: "outside" or "inside", see above.

    Returns:
        New (param, m, v): param in its dtype, the moments in theirs.
    """
    beta1, beta2 = betas
    p, g = param.to(work_dtype(param.dtype)), grad.to(work_dtype(param.dtype))
    m = torch.lerp(exp_avg, g, 1.0 - beta1)
    v = torch.addcmul(exp_avg_sq * beta2, g, g, value=1.0 - beta2)
    c1, c2 = _correction(step, beta1), _correction(step, beta2)
    if bias_correction == "outside":
        size, direction = a * lr / c1, torch.atan2(m, v.sqrt() * (b / c2.sqrt()))
    else:
        size, direction = a * lr, torch.atan2(m / c1, v.sqrt() * (b / c2.sqrt()))
    p = p * (1.0 - lr * weight_decay) - size * direction
    return p.to(param.dtype), m, v


class AdamATan2(AdamLike):
    """AdamATan2 over groups of parameters; the rule is `adam_atan2_update`.

    Args:
        params: tensors, (name, tensor) pairs or groups.
        lr: learning rate, a number or a one-element tensor (whose value is copied).
        betas: decay rates of the moments.
        weight_decay: decoupled; a step takes `lr * weight_decay` of a weight.
        a: scale of the update.
        b: scale of the second moment.
        bias_correction: "outside" the atan2 (the original) or "inside".
        fused: see DeviceOptimizer.
        half: see DeviceOptimizer.
    """

    elementwise = True

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.1,
        a: float = 1.0,
        b: float = 1.0,
        bias_correction: BiasCorrection = "outside",
        fused: Fused | None = None,
        half: Half = "nearest",
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "weight_decay": weight_decay,
                "a": a,
                "b": b,
                "bias_correction": bias_correction,
                "half": half,
            },
            fused,
        )

    def _check_options(self, group: dict[str, Any]) -> None:
        super()._check_options(group)
        for name in ("a", "b"):
            check_number(name, group[name], above=True)
        if group["bias_correction"] not in ("outside", "inside"):
            raise ValueError(
                f"bias_correction must be 'outside' or 'inside', got {group['bias_correction']!r}"
            )

    def _update_one(
        self,
        group: dict[str, Any],
        p: Tensor,
        lr: Tensor,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        if p.device.type == "cpu" and p.dtype == work_dtype(p.dtype) and found_inf is None:
            self._update_in_place(group, p, lr, grad_scale)
        else:
            super()._update_one(group, p, lr, grad_scale, found_inf)

    def _update_in_place(
        self, group: dict[str, Any], p: Tensor, lr: Tensor, grad_scale: Tensor | None
    ) -> None:
        """`adam_atan2_update` without its temporaries, whose page faults cost most of the time.

        Operation for operation, or for large tensors in one compiled pass where numba is there.
        """
        state, (beta1, beta2) = self.state[p], group["betas"]
        m, v, t = state["exp_avg"], state["exp_avg_sq"], state["step"].add_(1)
        if _compiles(p):
            _compiled(group, p, m, v, float(t), float(lr), grad_scale)
            return
        grad = p.grad if grad_scale is None else p.grad / grad_scale
        m.lerp_(grad, 1.0 - beta1)
        v.mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)
        c1, c2 = _correction(t, beta1), _correction(t, beta2)
        direction = torch.sqrt(v).mul_(group["b"] / c2.sqrt())
        size = group["a"] * lr
        if group["bias_correction"] == "outside":
            torch.atan2(m, direction, out=direction)
            size = size / c1
        else:
            torch.atan2(m / c1, direction, out=direction)
        p.mul_(1.0 - lr * group["weight_decay"]).sub_(direction.mul_(size))

    def _kernel_rule(self, group: dict[str, Any]) -> tuple[str, dict[str, float]]:
        return f"atan2_{group['bias_correction']}", {"a": group["a"], "b": group["b"]}

    def _rule(
        self,
        group: dict[str, Any],
        param: Tensor,
        grad: Tensor,
        state: dict[str, Tensor],
        lr: Tensor,
    ) -> tuple[Tensor, ...]:
        return adam_atan2_update(
            param,
            grad,
            state["exp_avg"],
            state["exp_avg_sq"],
            state["step"],
            lr,
            betas=group["betas"],
            weight_decay=group["weight_decay"],
            a=group["a"],
            b=group["b"],
            bias_correction=group["bias_correction"],
        )


def _compiles(p: Tensor) -> bool:
    """Whether one compiled pass over this parameter is possible, and worth it."""
    if p.numel() < 1 << 18 or find_spec("numba") is None:
        return False
    from optim.kernels import cpu_atan2

    return cpu_atan2.supported(p)


def _compiled(
    group: dict[str, Any],
    p: Tensor,
    m: Tensor,
    v: Tensor,
    t: float,
    lr: float,
    grad_scale: Tensor | None,
) -> None:
    from optim.kernels.cpu_atan2 import adam_atan2_launch

    (beta1, beta2), a, b = group["betas"], group["a"], group["b"]
    c1, c2 = 1.0 - beta1**t, 1.0 - beta2**t
    outside = group["bias_correction"] == "outside"
    numbers = (
        *(beta1, 1.0 - beta1, beta2, 1.0 - beta2),
        1.0 if grad_scale is None else 1.0 / float(grad_scale),
        1.0 if outside else 1.0 / c1,
        b / math.sqrt(c2),
        1.0 - lr * group["weight_decay"],
        a * lr / c1 if outside else a * lr,
    )
    adam_atan2_launch(p, m, v, numbers, torch.get_num_threads())
