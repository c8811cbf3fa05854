# ruff: noqa: ANN001, ANN201  (arguments of Triton functions have no Python types)
"""Self-attention over 129 to 1,024 tokens, straight from the packed qkv product, RoPE inside.

Kernels for Hopper GPUs: the forward pass, which for the backward also leaves the rotated q and k;
two that give dqkv, rotated back, and in Triton what those need of each token. No other pass over
memory is left around attention.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.kernels.hopper import attention_long
from models.kernels.hopper.attention import HEAD_DIM
from models.kernels.launch import on_hopper, operation

MIN_TOKENS = 129  # fewer: models.kernels.attention


@triton.jit
def sums_kernel(
    out_ptr, dout_ptr, lse_ptr, sums_ptr, L, heads, padded, R: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    """sums (B heads, padded / 2, 4) from out, dout (B, L, heads, C), lse (B heads, L)."""
    batch, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    t = tl.program_id(1) * R + tl.arange(0, R)
    row = (batch.to(tl.int64) * L + t) * heads + head
    at = row[:, None] * C + tl.arange(0, C)[None, :]
    inside = t < L
    out = tl.load(out_ptr + at, mask=inside[:, None], other=0.0).to(tl.float32)
    dout = tl.load(dout_ptr + at, mask=inside[:, None], other=0.0).to(tl.float32)
    of_head = tl.program_id(0).to(tl.int64)
    lse = tl.load(lse_ptr + of_head * L + t, mask=inside, other=float("inf"))
    to = sums_ptr + of_head * 2 * padded + t // 2 * 4 + t % 2
    tl.store(to, lse * 1.4426950408889634, mask=t < padded)
    tl.store(to + 2, tl.sum(out * dout, axis=1), mask=t < padded)


def backward_sums(out: Tensor, dout: Tensor, lse: Tensor, heads: int, padded: int) -> Tensor:
    """Of every two tokens: lse / ln 2 twice, Σ out ⊙ dout twice; (B heads, padded / 2, 4) float32.

    out, dout: (B, L, D). lse: (B, heads, L). Past the end: infinity and zero.
    """
    batch, length, width = out.shape
    sums = lse.new_empty(batch * heads, padded // 2, 4)
    sums_kernel[(batch * heads, triton.cdiv(padded, 64))](
        out, dout, lse, sums, length, heads, padded, R=64, C=width // heads
    )
    return sums


@operation("loopwright::long_attention")
def _attend(
    qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, rope: bool, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """out (B, L, D) and, if `save`, lse (B, heads, L) and rotated q | k (B, L, 2 D)."""
    return attention_long.attend(qkv, cos, sin, heads, rope, save)


@_attend.register_fake
def _(
    qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, rope: bool, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    lse, turned = ((batch, heads, length), (batch, length, 2 * width)) if save else ((1,), (1,))
    out = qkv.new_empty((batch, length, width))
    return out, qkv.new_empty(lse, dtype=torch.float32), qkv.new_empty(turned)


@operation("loopwright::long_attention_backward")
def _attend_backward(
    qkv: Tensor, cos: Tensor, sin: Tensor, out: Tensor, lse: Tensor, turned: Tensor, dout: Tensor,
    heads: int, rope: bool,
) -> Tensor:  # fmt: skip
    """dqkv (B, L, 3 D)."""
    sums = backward_sums(out, dout, lse, heads, attention_long.padded(out.shape[1]))
    return attention_long.attend_backward(qkv, cos, sin, turned, dout, sums, heads, rope)


@_attend_backward.register_fake
def _(
    qkv: Tensor, cos: Tensor, sin: Tensor, out: Tensor, lse: Tensor, turned: Tensor, dout: Tensor,
    heads: int, rope: bool,
) -> Tensor:  # fmt: skip
    return torch.empty_like(qkv)


class _LongAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, cos, sin, heads, rope):
        out, lse, turned = _attend(qkv, cos, sin, heads, rope, True)
        ctx.save_for_backward(qkv, cos, sin, out, lse, turned)
        ctx.options = heads, rope
        return out

    @staticmethod
    def backward(ctx, dout):
        dqkv = _attend_backward(*ctx.saved_tensors, dout.contiguous(), *ctx.options)
        return dqkv, None, None, None, None


def long_attention(qkv: Tensor, heads: int, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    """softmax(q kᵀ / 8) v of rotated q and k, every token seeing all.

    Args:
        qkv: (B, L, 3 D): queries, keys, values, each (heads, 64); see `supported`.
        heads: number of heads.
        cos, sin: (L, 64) float32 with equal halves (see `RotaryTable`), or None: no rotation.

    Returns:
        (B, L, D) in the dtype of qkv. Rotation and softmax are in float32; rounded to that dtype
        are the rotated q and k, the probabilities before their division, and the result.
    """
    rope = cos is not None
    if not rope:
        cos, sin = torch.empty(2, 1, dtype=torch.float32, device=qkv.device)
    qkv = qkv.contiguous()
    if torch.is_grad_enabled():
        return _LongAttention.apply(qkv, cos, sin, heads, rope)
    return _attend(qkv, cos, sin, heads, rope, False)[0]


def supported(x: Tensor, heads: int) -> bool:
    """Whether `long_attention` takes the qkv of x (B, L, D): by device, dtype and shape."""
    length, width = x.shape[1], x.shape[2]
    if not x.is_cuda or x.dtype != torch.bfloat16:
        return False
    fits = MIN_TOKENS <= length <= attention_long.MAX_TOKENS and width == heads * HEAD_DIM
    return fits and on_hopper(x.device.index)
