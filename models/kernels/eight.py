# ruff: noqa: ANN001, ANN201  (arguments of Triton functions have no Python types)
"""A block without gradient whose products have 8-bit factors (e4m3), on Hopper GPUs.

States stay in bfloat16. What a product reads is written in 8 bits by the kernel before it, so 8
bits cost no pass of their own but where a block begins; weights are quantized once a pass of the
model (`models.casting`). The products of attention's scores and its last map, which memory bounds,
and the token mixer stay in bfloat16. See `models.kernels.hopper.eight` for scales and ranges.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.kernels.hopper import attention_long, eight
from models.kernels.launch import operation
from models.kernels.residual import inverse_rms


@triton.jit
def to_eight_kernel(x_ptr, other_ptr, sum_ptr, small_ptr, N, ADD: tl.constexpr, B: tl.constexpr):
    """small (N,) = x, or sum = x + other, in 8 bits."""
    at = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    x = tl.load(x_ptr + at, mask=at < N, other=0.0)
    if ADD:
        x = (x.to(tl.float32) + tl.load(other_ptr + at, mask=at < N).to(tl.float32)).to(x.dtype)
        tl.store(sum_ptr + at, x, mask=at < N)
    x = tl.clamp(x.to(tl.float32), -448.0, 448.0)
    tl.store(small_ptr + at, x.to(small_ptr.dtype.element_ty), mask=at < N)


def _to_eight(x: Tensor, other: Tensor | None, total: Tensor | None) -> Tensor:
    small = torch.empty_like(x, dtype=eight.E4M3)
    if x.numel():
        to_eight_kernel[(triton.cdiv(x.numel(), 8192),)](
            x, other, total, small, x.numel(), ADD=other is not None, B=8192, num_warps=8
        )
    return small


@operation("loopwright::to_eight")
def to_eight(x: Tensor) -> Tensor:
    """x (contiguous) in 8 bits; what is beyond 448 becomes ±448."""
    return _to_eight(x, None, None)


@to_eight.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=eight.E4M3)


@operation("loopwright::sum_in_eight")
def sum_in_eight(x: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """x + other (both contiguous, of one shape), and that in 8 bits."""
    total = torch.empty_like(x)
    return total, _to_eight(x, other, total)


@sum_in_eight.register_fake
def _(x: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x, dtype=eight.E4M3)


@operation("loopwright::linear_eight")
def linear(x8: Tensor, w8: Tensor, unit: Tensor) -> Tensor:
    """unit · x8 w8ᵀ: (..., K), (N, K) → (..., N) in bfloat16."""
    return eight.linear(x8, w8, unit)


@linear.register_fake
def _(x8: Tensor, w8: Tensor, unit: Tensor) -> Tensor:
    return x8.new_empty((*x8.shape[:-1], w8.shape[0]), dtype=torch.bfloat16)


@operation("loopwright::turned_qkv_eight")
def turned_qkv(
    x8: Tensor, w8: Tensor, unit: Tensor, cos: Tensor | None, sin: Tensor | None
) -> Tensor:
    """`linear` (B, L, 3 D), turned and scaled as `models.kernels.long_attention` takes it."""
    return eight.linear_rotary(x8, w8, unit, cos, sin, attention_long.SCALE)


@turned_qkv.register_fake
def _(x8: Tensor, w8: Tensor, unit: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    return x8.new_empty((*x8.shape[:-1], w8.shape[0]), dtype=torch.bfloat16)


@operation("loopwright::linear_norm_eight")
def linear_norm(x: Tensor, weight: Tensor, r: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """rms_norm(r + F.linear(x, weight)), all in bfloat16, and that in 8 bits: (..., N) each."""
    return eight.linear_residual_norm(x, weight, None, r, eps, again=True)


@linear_norm.register_fake
def _(x: Tensor, weight: Tensor, r: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(r), torch.empty_like(r, dtype=eight.E4M3)


@operation("loopwright::swiglu_norm_eight")
def swiglu_norm(
    x: Tensor, x8: Tensor, gate_up: Tensor, gate_up_unit: Tensor, down: Tensor, down_unit: Tensor,
    eps: float, normed: bool, again: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`models.kernels.residual.swiglu_norm` of x (..., K); products read x8 and 8-bit weights.

    Returns (..., K) in the dtype of x and, if `again`, that in 8 bits (else something empty).
    """
    h, parts = eight.linear_swiglu(x8, gate_up, gate_up_unit, normed)
    scales = None if parts is None else inverse_rms(parts, down.shape[1], eps)
    out, small = eight.linear_residual_norm(h, down, down_unit, x, eps, scales, again)
    return out, x8.new_empty(0) if small is None else small


@swiglu_norm.register_fake
def _(
    x: Tensor, x8: Tensor, gate_up: Tensor, gate_up_unit: Tensor, down: Tensor, down_unit: Tensor,
    eps: float, normed: bool, again: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(x), torch.empty_like(x8) if again else x8.new_empty(0)
