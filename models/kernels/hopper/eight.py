"""Products of 8-bit factors (e4m3) with fused epilogues on Hopper GPUs, forward only.

As in `models.kernels.hopper`, but x and W are torch.float8_e4m3fn, and W comes in units of `unit`,
a float32 scalar on the device: y = unit · x Wᵀ, accumulated in float32 (the tensor cores keep some
14 bits of a partial sum). K and N are multiples of 128. Activations have no scale: they follow an
RMSNorm, or are products of such, and e4m3 spans 2⁻⁹ to 448; what is beyond becomes ±448.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.fp8 import E4M3
from models.kernels import hopper


def linear(x: Tensor, w: Tensor, unit: Tensor) -> Tensor:
    """unit · x Wᵀ: x (..., K), w (N, K) → (..., N) in bfloat16."""
    out = x.new_empty(*x.shape[:-1], w.shape[0], dtype=torch.bfloat16)
    p = hopper.plan(hopper.PLAIN, w.shape[1], w.shape[0], eight=True)
    hopper.launch(p, x, w, None, out, unit=unit)
    return out


def linear_rotary(
    x: Tensor, w: Tensor, unit: Tensor, cos: Tensor | None, sin: Tensor | None, scale: float
) -> Tensor:
    """`hopper.linear_rotary` of unit · x Wᵀ: x (B, L, K), w (3 D, K) → (B, L, 3 D) in bfloat16."""
    out = x.new_empty(*x.shape[:-1], w.shape[0], dtype=torch.bfloat16)
    p = hopper.plan(hopper.ROTARY, w.shape[1], w.shape[0], False, x.shape[-2], eight=True)
    hopper.launch(p, x, w, None, out, eps=scale, scales=cos, slopes=sin, unit=unit)
    return out


def linear_swiglu(
    x: Tensor, w: Tensor, unit: Tensor, squares: bool
) -> tuple[Tensor, Tensor | None]:
    """`gate, up = (unit · x Wᵀ).chunk(2, -1)`; h = silu(gate) ⊙ up in 8 bits.

    x (..., K), w (2 I, K) → h (..., I), and sums of (gate ⊙ up)² in parts (T, M) if `squares`.
    """
    inner = w.shape[0] // 2
    p = hopper.plan(hopper.SWIGLU, w.shape[1], inner, squares, eight=True, result8=True)
    h = x.new_empty(*x.shape[:-1], inner)
    rows = x.numel() // x.shape[-1]
    parts = x.new_empty(inner // p.out, rows, dtype=torch.float32) if squares else None
    hopper.launch(p, x, w, None, h, factors=parts, unit=unit)
    return h, parts


def linear_residual_norm(
    x: Tensor,
    w: Tensor,
    unit: Tensor | None,
    r: Tensor,
    eps: float,
    scales: Tensor | None = None,
    again: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`v = r + scales · unit · x Wᵀ; v / sqrt(mean(v², -1) + eps)`; if `again` in 8 bits, too.

    x (..., K), w (N, K), both in 8 bits, or in bfloat16 without `unit`; r (..., N) bfloat16 → as r.
    """
    out = r.new_empty(r.shape)
    small = r.new_empty(r.shape, dtype=E4M3) if again else None
    normed, eight = scales is not None, unit is not None
    p = hopper.plan(hopper.NORM, w.shape[1], w.shape[0], normed, eight=eight, result8=again)
    hopper.launch(p, x, w, r, out, small, eps=eps, scales=scales, unit=unit)
    return out, small
