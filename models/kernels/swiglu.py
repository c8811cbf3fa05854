# ruff: noqa: ANN001, ANN201  (arguments of Triton functions have no Python types)
"""SwiGLU in the product's epilogue, for passes without gradient: h = silu(x Wgᵀ) ⊙ (x Wuᵀ).

Unfused, the 2·inner wide product is written, read again and reduced to `inner` by a pass of its
own; here a program holds the gate's and the up's tile of the same columns and writes h at once.
(With gradient gate and up must be written anyway, and this product, which reaches three quarters
of cuBLAS's rate, gains nothing.)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import custom_op

from models.kernels.launch import fast, precision, sigmoid


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


@custom_op("loopwright::linear_swiglu", mutates_args=())
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
