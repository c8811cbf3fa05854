"""Matrix products in 8 bits: e4m3 for activations and weights, e5m2 for gradients.

Scales are per tensor and dynamic: the largest magnitude, taken on the device, fills the format's
range. The product of the weight's own gradient, whose long sum needs the precision, stays in the
activations' dtype. Source: Micikevicius et al. 2022, "FP8 Formats for Deep Learning",
arXiv:2209.05433.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.errors import ModelError

_MULTIPLE = 16  # of both dimensions of a matrix that the hardware takes


def check_device(device: torch.device, dtype: torch.dtype) -> None:
    """Raise ModelError unless `device` multiplies in 8 bits and accumulates for `dtype`."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        raise ModelError(
            f"fp8=true needs a CUDA device of compute capability 8.9 or more (Ada, Hopper), but "
            f"this is {device.type}; use fp8=false"
        )
    if dtype not in (torch.bfloat16, torch.float16):
        raise ModelError(
            f"fp8=true needs forward_dtype=bfloat16 or float16, not "
            f"{str(dtype).removeprefix('torch.')}"
        )


def fits(weight: Tensor) -> bool:
    """Whether a weight (out, in) has dimensions that 8-bit products take."""
    return weight.shape[0] % _MULTIPLE == 0 and weight.shape[1] % _MULTIPLE == 0


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x / scale in `dtype`, and the scale (0-dim float32); zeros keep the scale 1e-12."""
    largest = x.abs().amax().to(torch.float32)
    scale = (largest / torch.finfo(dtype).max).clamp(min=1e-12)
    return (x.to(torch.float32) / scale).to(dtype), scale


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND: Tensor, weight_MD: Tensor) -> Tensor:  # noqa: ANN001
        x8, x_scale = quantize(x_ND, torch.float8_e4m3fn)
        w8, w_scale = quantize(weight_MD, torch.float8_e4m3fn)
        ctx.save_for_backward(x_ND, w8, w_scale)
        ctx.weight_dtype = weight_MD.dtype
        return torch._scaled_mm(
            x8, w8.t(), scale_a=x_scale, scale_b=w_scale, out_dtype=x_ND.dtype, use_fast_accum=True
        )

    @staticmethod
    def backward(ctx, grad_NM: Tensor) -> tuple[Tensor | None, Tensor | None]:  # noqa: ANN001
        x_ND, w8, w_scale = ctx.saved_tensors
        grad_x = grad_w = None
        if ctx.needs_input_grad[0]:
            g8, g_scale = quantize(grad_NM, torch.float8_e5m2)
            columns = w8.t().contiguous().t()  # the second factor lies column by column
            grad_x = torch._scaled_mm(
                g8.contiguous(), columns, scale_a=g_scale, scale_b=w_scale, out_dtype=x_ND.dtype
            )
        if ctx.needs_input_grad[1]:
            grad_w = (grad_NM.t() @ x_ND).to(ctx.weight_dtype)
        return grad_x, grad_w


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x Wᵀ in 8 bits: x (..., in), weight (out, in) → (..., out) in the dtype of x."""
    flat = x.reshape(-1, x.shape[-1])
    return _Product.apply(flat, weight).view(*x.shape[:-1], weight.shape[0])
