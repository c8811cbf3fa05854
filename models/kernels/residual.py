# ruff: noqa: ANN001, ANN201  (arguments of Triton functions have no Python types)
"""What follows a branch of a block: out = v / rms(v), v = r + x Wᵀ, in the product's epilogue.

A row of v lies in one cluster of thread blocks (`models.kernels.hopper`), so sum and norm cost no
pass over memory. The backward goes from the gradient of out to that of v, which is also that of r.

A norm inside SwiGLU (`models.layers.normed_gate`, "product") scales each row of h = silu(gate) ⊙ up
by a factor f, and so what the second product makes of the row. Backwards, gate ⊙ up has by way of f
the gradient slope · gate ⊙ up besides, slope = -f² Σ dv (v - r) / J: v - r is what f multiplies.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.kernels import hopper
from models.kernels.launch import next_power, on_hopper, operation
from models.kernels.swiglu import cast_weights


@triton.jit
def norm_backward_kernel(
    out_ptr, factor_ptr, dout_ptr, dv_ptr, r_ptr, scale_ptr, slope_ptr, M, D, J,
    NORMED: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """dv (M, D) = factor (dout - out mean(dout out)); factor (M,) = 1 / rms.

    NORMED: slope (M,) = -scale² Σ dv (out / factor - r) / J.
    """
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BD)
    mask = (m < M)[:, None] & (d < D)[None, :]
    at = m.to(tl.int64)[:, None] * D + d[None, :]
    out = tl.load(out_ptr + at, mask=mask, other=0.0).to(tl.float32)
    dout = tl.load(dout_ptr + at, mask=mask, other=0.0).to(tl.float32)
    factor = tl.load(factor_ptr + m, mask=m < M, other=0.0)
    mean = tl.sum(out * dout, axis=1) / D
    dv = (dout - out * mean[:, None]) * factor[:, None]
    tl.store(dv_ptr + at, dv.to(dv_ptr.dtype.element_ty), mask=mask)
    if NORMED:
        r = tl.load(r_ptr + at, mask=mask, other=0.0).to(tl.float32)
        scale = tl.load(scale_ptr + m, mask=m < M, other=0.0)
        branch = out / tl.where(m < M, factor, 1.0)[:, None] - r
        slope = -scale * scale * tl.sum(dv * branch, axis=1) / J
        tl.store(slope_ptr + m, slope, mask=m < M)


def norm_backward(
    out: Tensor,
    factors: Tensor,
    dout: Tensor,
    r: Tensor | None = None,
    scales: Tensor | None = None,
    inner: int = 1,
) -> tuple[Tensor, Tensor | None]:
    """Gradient of v from that of out = v · factor; out, dout (..., D), factors (...) float32.

    With the residual r (..., D) and an inner norm's factors `scales` (...) over `inner` features
    also its slopes (...) float32, else None.
    """
    dv = torch.empty_like(out)
    slopes = None if scales is None else torch.empty_like(scales)
    width = out.shape[-1]
    rows = out.numel() // width
    norm_backward_kernel[(triton.cdiv(rows, 2),)](
        out, factors, dout, dv, r, scales, slopes, rows, width, inner,
        NORMED=slopes is not None, ROWS=2, BD=next_power(width), num_warps=4,
    )  # fmt: skip
    return dv, slopes


@triton.jit
def inverse_rms_kernel(parts_ptr, out_ptr, M, T, J, eps, BM: tl.constexpr):
    """out (M,) = 1 / sqrt(Σ parts / J + eps) of parts (T, M)."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    total = tl.zeros((BM,), tl.float32)
    for _ in range(0, T):
        total += tl.load(parts_ptr + m, mask=m < M, other=0.0)
        parts_ptr += M
    tl.store(out_ptr + m, tl.rsqrt(total / J + eps), mask=m < M)


def inverse_rms(parts: Tensor, inner: int, eps: float) -> Tensor:
    """1 / rms over `inner` features from sums of squares in parts (T, M) float32: (M,)."""
    count, rows = parts.shape
    out = parts.new_empty(rows)
    inverse_rms_kernel[(triton.cdiv(rows, 256),)](parts, out, rows, count, inner, eps, BM=256)
    return out


@operation("loopwright::linear_norm")
def _linear_norm(
    x: Tensor, weight: Tensor, r: Tensor, eps: float, save: bool
) -> tuple[Tensor, Tensor]:
    """out (..., N) and, if `save`, factors (...) for the backward."""
    out, factors = hopper.linear_residual_norm(x, weight, r, eps, save)
    return out, r.new_empty(1, dtype=torch.float32) if factors is None else factors


@_linear_norm.register_fake
def _(x: Tensor, weight: Tensor, r: Tensor, eps: float, save: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(r), r.new_empty(r.shape[:-1] if save else (1,), dtype=torch.float32)


@operation("loopwright::linear_norm_backward")
def _linear_norm_backward(
    x: Tensor, weight_t: Tensor, out: Tensor, factors: Tensor, dout: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dv = dr (..., N), dx (..., K), and d weight (N, K) in float32."""
    dv, _ = norm_backward(out, factors, dout)
    dv_MN, x_MK = (t.view(-1, t.shape[-1]) for t in (dv, x))
    return dv, hopper.linear(dv, weight_t), torch.mm(dv_MN.t(), x_MK, out_dtype=torch.float32)


@_linear_norm_backward.register_fake
def _(
    x: Tensor, weight_t: Tensor, out: Tensor, factors: Tensor, dout: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    wide = weight_t.new_empty(weight_t.shape[::-1], dtype=torch.float32)
    return torch.empty_like(out), torch.empty_like(x), wide


class _LinearNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, half, half_t, r, eps):
        out, factors = _linear_norm(x, half, r, eps, True)
        half_t = half.t().contiguous() if half_t is None else half_t
        ctx.save_for_backward(x, half_t, out, factors)
        ctx.kind = weight.dtype
        return out

    @staticmethod
    def backward(ctx, dout):
        dv, dx, dweight = _linear_norm_backward(*ctx.saved_tensors, dout.contiguous())
        return dx, dweight.to(ctx.kind), None, None, dv, None


def linear_norm(
    x: Tensor, weight: Tensor, r: Tensor, eps: float,
    half: Tensor | None = None, half_t: Tensor | None = None,
) -> Tensor | None:  # fmt: skip
    """rms_norm(r + F.linear(x, weight)), or None where no kernel takes these.

    Args:
        x: (..., K).
        weight: (N, K).
        r: (..., N), the residual.
        eps: of the RMSNorm.
        half, half_t: the weight in the dtype of x, and that transposed (K, N), contiguous, where
            they are at hand.

    Returns:
        (..., N) in the dtype of r. Rounded on the way is the sum, after its squares are summed up.
    """
    if not takes(x, *weight.shape):
        return None
    x, r = x.contiguous(), r.contiguous()
    half = weight.detach().to(x.dtype) if half is None else half
    if torch.is_grad_enabled():
        return _LinearNorm.apply(x, weight, half, half_t, r, eps)
    return _linear_norm(x, half, r, eps, False)[0]


@operation("loopwright::linear_half")
def linear_half(x: Tensor, half: Tensor) -> Tensor:
    """F.linear(x, half), without a gradient, where `takes(x, K, N)`."""
    return hopper.linear(x, half)


@linear_half.register_fake
def _(x: Tensor, half: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], half.shape[0]))


@operation("loopwright::linear_beside_backward")
def linear_beside_backward(
    x: Tensor, half_t: Tensor, dx: Tensor, dy: Tensor
) -> tuple[Tensor, Tensor]:
    """dx + dy W (..., K), and d weight (N, K) in float32."""
    dy_MN, x_MK = (t.view(-1, t.shape[-1]) for t in (dy, x))
    dweight = torch.mm(dy_MN.t(), x_MK, out_dtype=torch.float32)
    return hopper.linear_residual(dy, half_t, dx), dweight


@linear_beside_backward.register_fake
def _(x: Tensor, half_t: Tensor, dx: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    columns, rows = half_t.shape
    return torch.empty_like(x), half_t.new_empty((rows, columns), dtype=torch.float32)


class _LinearBeside(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, half, half_t):
        ctx.save_for_backward(x, half_t)
        ctx.kind = weight.dtype
        return linear_half(x, half), x.view_as(x)

    @staticmethod
    def backward(ctx, dy, dx):
        x, half_t = ctx.saved_tensors
        dx, dweight = linear_beside_backward(x, half_t, dx.contiguous(), dy.contiguous())
        return dx, dweight.to(ctx.kind), None, None


def linear_beside(x: Tensor, weight: Tensor, half: Tensor, half_t: Tensor) -> tuple[Tensor, Tensor]:
    """F.linear(x, half), and x once more: the backward sums both gradients in one product.

    Args:
        x: (..., K), which `takes(x, K, N)` takes.
        weight: (N, K), gets the gradient.
        half, half_t: the weight in the dtype of x, and that transposed (K, N), contiguous.
    """
    return _LinearBeside.apply(x.contiguous(), weight, half, half_t)


@operation("loopwright::swiglu_norm")
def _swiglu_norm(
    x: Tensor, gate_up: Tensor, down: Tensor, eps: float, save: bool, normed: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out (..., K) and, if `save`, gate | up (..., 2 J) and factors (...) for the backward.

    If `normed`, too, also the inner norm's factors (...).
    """
    scales = None
    if normed:
        h, wide, parts = hopper.linear_swiglu_squares(x, gate_up, save)
        scales = inverse_rms(parts, down.shape[1], eps).view(x.shape[:-1])
    else:
        h, wide = hopper.linear_swiglu(x, gate_up, save)
    out, factors = hopper.linear_residual_norm(h, down, x, eps, save, scales)
    if not save or scales is None:
        scales = x.new_empty(1, dtype=torch.float32)
    if wide is None or factors is None:
        return out, x.new_empty(1), x.new_empty(1, dtype=torch.float32), scales
    return out, wide, factors, scales


@_swiglu_norm.register_fake
def _(
    x: Tensor, gate_up: Tensor, down: Tensor, eps: float, save: bool, normed: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = (*x.shape[:-1], gate_up.shape[0]) if save else (1,)
    rows = x.new_empty(x.shape[:-1] if save else (1,), dtype=torch.float32)
    inside = torch.empty_like(rows) if normed else x.new_empty(1, dtype=torch.float32)
    return torch.empty_like(x), x.new_empty(wide), rows, inside


@operation("loopwright::swiglu_norm_backward")
def _swiglu_norm_backward(
    x: Tensor, wide: Tensor, out: Tensor, factors: Tensor, scales: Tensor | None, dout: Tensor,
    gate_up_t: Tensor, down_t: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dx (..., K), and in float32 d gate_up (2 J, K), d down (K, J)."""
    dv, slopes = norm_backward(out, factors, dout, x, scales, down_t.shape[0])
    dwide, h = hopper.linear_dswiglu(dv, down_t, wide, scales, slopes)
    rows = (t.view(-1, t.shape[-1]) for t in (dwide, x, dv, h))
    dwide_MJ, x_MK, dv_MK, h_MJ = rows
    dgate_up = torch.mm(dwide_MJ.t(), x_MK, out_dtype=torch.float32)
    ddown = torch.mm(dv_MK.t(), h_MJ, out_dtype=torch.float32)
    dx = hopper.linear_residual(dwide, gate_up_t, dv, out=dv)  # the residual's, and the branch's
    return dx, dgate_up, ddown


@_swiglu_norm_backward.register_fake
def _(
    x: Tensor, wide: Tensor, out: Tensor, factors: Tensor, scales: Tensor | None, dout: Tensor,
    gate_up_t: Tensor, down_t: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        torch.empty_like(x),
        gate_up_t.new_empty(gate_up_t.shape[::-1], dtype=torch.float32),
        down_t.new_empty((down_t.shape[1], down_t.shape[0]), dtype=torch.float32),
    )


class _SwiGLUNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gate_up, down, gate_up_half, down_half, gate_up_t, down_t, eps, normed):
        out, *kept = _swiglu_norm(x, gate_up_half, down_half, eps, True, normed)
        wide, factors, scales = kept
        scales = scales if normed else None
        ctx.save_for_backward(x, wide, out, factors, scales, gate_up_t, down_t)
        ctx.kinds = gate_up.dtype, down.dtype
        return out

    @staticmethod
    def backward(ctx, dout):
        x, wide, out, factors, scales, *weights = ctx.saved_tensors
        saved = x, wide, out, factors, scales, dout.contiguous()
        dx, dgate_up, ddown = _swiglu_norm_backward(*saved, *weights)
        return dx, dgate_up.to(ctx.kinds[0]), ddown.to(ctx.kinds[1]), *(None,) * 6


def swiglu_norm(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    eps: float,
    halves: tuple[Tensor, ...] | None = None,
    normed: bool = False,
) -> Tensor | None:
    """rms_norm(x + W_down(silu(W_gate x) ⊙ W_up x)), or None where no kernel takes these.

    Args:
        x: (..., K).
        gate_up: (2 J, K), the gate's rows first.
        down: (K, J).
        eps: of the RMSNorm.
        halves: `cast_weights` of the two, where they are at hand.
        normed: sigmoid(W_gate x) ⊙ RMSNorm(W_gate x ⊙ W_up x) goes into W_down instead.

    Returns:
        (..., K) in the dtype of x; rounded on the way are the weights, gate and up, h, and the sum
        that is normalized.
    """
    if not takes_swiglu(x, gate_up, down):
        return None
    x = x.contiguous()
    halves = halves or cast_weights(gate_up, down, x.dtype)
    if torch.is_grad_enabled():
        return _SwiGLUNorm.apply(x, gate_up, down, *halves, eps, normed)
    return _swiglu_norm(x, *halves[:2], eps, False, normed)[0]


def takes(x: Tensor, rows: int, columns: int) -> bool:
    """Whether a product of x with a weight (rows, columns) and the norm after it are taken."""
    if x.dtype != torch.bfloat16 or not x.is_cuda or columns % 128:
        return False
    small = x.numel() < x.shape[-1] * 2**26
    return rows in hopper.NORM_WIDTHS and small and on_hopper(x.device.index)


def takes_swiglu(x: Tensor, gate_up: Tensor, down: Tensor) -> bool:
    """Whether `swiglu_norm` takes these."""
    return takes(x, *down.shape) and gate_up.shape[0] % 256 == 0
