# ruff: noqa: ANN001, ANN201  (arguments of Triton functions have no Python types)
"""The SwiGLU MLP with its elementwise part in the products' epilogues.

    gate, up = x Wguᵀ;  h = silu(gate) ⊙ up;  y = h Wdᵀ

Unfused, the 2·inner wide product is written, read again and reduced to `inner` by a pass of its
own. On Hopper GPUs both directions go through `models.kernels.hopper`: the forward pass saves gate
and up, and the backward forms h anew while it has them in hand. Elsewhere there is a kernel in
Triton for passes without gradient only: with gradient gate and up must be written anyway, and that
product, at three quarters of cuBLAS's rate, gains nothing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from models.kernels import hopper
from models.kernels.launch import fast, on_hopper, operation, precision, sigmoid


@triton.jit
def _place(M, J, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """Row and column tile of this program: GROUP row tiles share the columns of W in the L2."""
    rows, columns = tl.cdiv(M, BM), tl.cdiv(J, BN)
    pid = tl.program_id(0)
    band = pid // (GROUP * columns)
    height = tl.minimum(rows - band * GROUP, GROUP)
    inside = pid % (GROUP * columns)
    return band * GROUP + inside % height, inside // height


@triton.jit
def forward_kernel(
    x_ptr, w_ptr, h_ptr, M, K, J,
    EVEN_K: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """h (M, J) from x (M, K) and w (2 J, K) = [gate | up]."""
    row, column = _place(M, J, BM, BN, GROUP)
    first = (row * BM).to(tl.int64)  # offsets inside a tile stay 32 bits wide
    m, n = tl.arange(0, BM), column * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    inside_m = m < M - row * BM
    x_at = x_ptr + first * K + (tl.where(inside_m, m, 0)[:, None] * K + k[None, :])
    gate_at = w_ptr + (tl.where(n < J, n, 0)[None, :] * K + k[:, None])
    up_at = gate_at + J * K
    gate = tl.zeros((BM, BN), tl.float32)
    up = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        if EVEN_K:
            x, wg, wu = tl.load(x_at), tl.load(gate_at), tl.load(up_at)
        else:
            inside = start + k < K
            x = tl.load(x_at, mask=inside[None, :], other=0.0)
            wg = tl.load(gate_at, mask=inside[:, None], other=0.0)
            wu = tl.load(up_at, mask=inside[:, None], other=0.0)
        gate = tl.dot(x, wg, gate, input_precision=PRECISION)
        up = tl.dot(x, wu, up, input_precision=PRECISION)
        x_at += BK
        gate_at += BK
        up_at += BK
    mask = inside_m[:, None] & (n < J)[None, :]
    kind = h_ptr.dtype.element_ty
    h = gate * sigmoid(gate, FAST) * up
    tl.store(h_ptr + first * J + (m[:, None] * J + n[None, :]), h.to(kind), mask=mask)


_FORWARD = {"BM": 128, "BN": 64, "BK": 64, "GROUP": 8, "num_warps": 4, "num_stages": 3}


@operation("loopwright::linear_swiglu")
def linear_swiglu(x: Tensor, weight: Tensor) -> Tensor:
    """silu(x Wgᵀ) ⊙ (x Wuᵀ), without a gradient.

    Args:
        x: (..., K), contiguous, K a multiple of 8.
        weight: (2 J, K) = [gate | up] in the dtype of x.

    Returns:
        (..., J), rounded once, after the product of the two.
    """
    rows, inner = x.numel() // x.shape[-1], weight.shape[0] // 2
    h = torch.empty((*x.shape[:-1], inner), dtype=x.dtype, device=x.device)
    tile = _FORWARD
    forward_kernel[(triton.cdiv(rows, tile["BM"]) * triton.cdiv(inner, tile["BN"]),)](
        x, weight, h, rows, x.shape[-1], inner,
        EVEN_K=x.shape[-1] % tile["BK"] == 0, FAST=fast(x), PRECISION=precision(x.dtype), **tile,
    )  # fmt: skip
    return h


@linear_swiglu.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0] // 2))


@operation("loopwright::swiglu_mlp")
def _mlp(x: Tensor, gate_up: Tensor, down: Tensor, save: bool) -> tuple[Tensor, Tensor]:
    """y (..., K) and, if `save`, gate | up (..., 2 J)."""
    h, wide = hopper.linear_swiglu(x, gate_up, save)
    return F.linear(h, down), x.new_empty(1) if wide is None else wide


@_mlp.register_fake
def _(x: Tensor, gate_up: Tensor, down: Tensor, save: bool) -> tuple[Tensor, Tensor]:
    wide = (*x.shape[:-1], gate_up.shape[0]) if save else (1,)
    return x.new_empty((*x.shape[:-1], down.shape[0])), x.new_empty(wide)


@operation("loopwright::swiglu_mlp_backward")
def _mlp_backward(
    x: Tensor, wide: Tensor, dy: Tensor, gate_up_t: Tensor, down_t: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dx (..., K), and in float32 d gate_up (2 J, K), d down (K, J)."""
    dwide, h = hopper.linear_dswiglu(dy, down_t, wide)
    rows = (t.view(-1, t.shape[-1]) for t in (dwide, x, dy, h))
    dwide_MJ, x_MK, dy_MK, h_MJ = rows
    dgate_up = torch.mm(dwide_MJ.t(), x_MK, out_dtype=torch.float32)
    ddown = torch.mm(dy_MK.t(), h_MJ, out_dtype=torch.float32)
    return hopper.linear(dwide, gate_up_t), dgate_up, ddown


@_mlp_backward.register_fake
def _(
    x: Tensor, wide: Tensor, dy: Tensor, gate_up_t: Tensor, down_t: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(x),
        gate_up_t.new_empty(gate_up_t.shape[::-1], dtype=torch.float32),
        down_t.new_empty((down_t.shape[1], down_t.shape[0]), dtype=torch.float32),
    )


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gate_up, down, gate_up_half, down_half, gate_up_t, down_t):
        y, wide = _mlp(x, gate_up_half, down_half, True)
        ctx.save_for_backward(x, wide, gate_up_t, down_t)
        ctx.kinds = gate_up.dtype, down.dtype
        return y

    @staticmethod
    def backward(ctx, dy):
        x, wide, *weights = ctx.saved_tensors
        dx, dgate_up, ddown = _mlp_backward(x, wide, dy.contiguous(), *weights)
        return dx, dgate_up.to(ctx.kinds[0]), ddown.to(ctx.kinds[1]), *(None,) * 4


def cast_weights(gate_up: Tensor, down: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """gate_up (2 J, K) and down (K, J) in `dtype`; with gradient, transposed ones besides."""
    halves = gate_up.detach().to(dtype), down.detach().to(dtype)
    return *halves, *(w.t().contiguous() for w in halves if torch.is_grad_enabled())


def swiglu_mlp(
    x: Tensor, gate_up: Tensor, down: Tensor, halves: tuple[Tensor, ...] | None = None
) -> Tensor | None:
    """W_down(silu(W_gate x) ⊙ W_up x), or None where no kernel takes these.

    Args:
        x: (..., K).
        gate_up: (2 J, K), the gate's rows first.
        down: (K, J).
        halves: `cast_weights` of the two, where they are at hand.

    Returns:
        (..., K) in the dtype of x. Sums are float32; rounded to the dtype of x are the weights,
        h, the result, and gate and up for the backward; the weights' gradients are not rounded.
    """
    graded = torch.is_grad_enabled()
    if hopper_takes(x, gate_up, down):
        x = x.contiguous()
        halves = halves or cast_weights(gate_up, down, x.dtype)
        if graded:
            return _MLP.apply(x, gate_up, down, *halves)
        return _mlp(x, *halves[:2], False)[0]
    if graded or x.shape[-1] % 8:
        return None
    gate_up, down, *_ = halves or cast_weights(gate_up, down, x.dtype)
    return F.linear(linear_swiglu(x.contiguous(), gate_up), down)


def hopper_takes(x: Tensor, gate_up: Tensor, down: Tensor) -> bool:
    """Whether `models.kernels.hopper` takes both products: by device, dtype and shapes."""
    widths = (gate_up.shape[1], gate_up.shape[0] // 2, down.shape[0])
    if x.dtype != torch.bfloat16 or not x.is_cuda or any(w % 128 for w in widths):
        return False
    return on_hopper(x.device.index) and x.numel() < x.shape[-1] * 2**26
