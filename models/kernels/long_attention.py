# ruff: noqa: ANN001, ANN201  (arguments of Triton functions have no Python types)
"""Self-attention over 129 to 1,024 tokens on Hopper GPUs, RoPE inside, no pass of its own for it.

The product that makes q | k | v rotates q and k in its epilogue, where both halves of a pair are in
a thread's registers, and scales q so that scores are exponents of 2. Attention reads that, and so
does its backward, which rotates the gradients back before it writes them: what comes out is the
gradient of the product's own result. Where a qkv product comes from elsewhere (a width that
the kernel does not take), one pass over memory turns it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.kernels import hopper
from models.kernels.hopper import attention_long
from models.kernels.hopper.attention import HEAD_DIM
from models.kernels.launch import on_hopper, operation
from models.kernels.residual import linear_beside_backward

MIN_TOKENS = 129  # fewer: models.kernels.attention


@triton.jit
def turn_kernel(
    qkv_ptr, cos_ptr, sin_ptr, out_ptr, L, heads, scale,
    ROPE: tl.constexpr, R: tl.constexpr, H: tl.constexpr,
):  # fmt: skip
    """out (B L, 3, heads, 2 H): q and k turned, q times scale; cos, sin (L, 2 H), equal halves."""
    head, part = tl.program_id(1) % heads, tl.program_id(1) // heads  # of q, k, v
    batch = (tl.program_id(0) // tl.cdiv(L, R)).to(tl.int64)
    t, c = tl.program_id(0) % tl.cdiv(L, R) * R + tl.arange(0, R), tl.arange(0, H)
    at = (batch * L + t)[:, None] * (3 * heads * 2 * H) + (part * heads + head) * 2 * H + c[None, :]
    mask = (t < L)[:, None]
    low = tl.load(qkv_ptr + at, mask=mask, other=0.0)
    high = tl.load(qkv_ptr + at + H, mask=mask, other=0.0)
    if part < 2:
        factor = tl.where(part == 0, scale, 1.0)
        x, y = low.to(tl.float32) * factor, high.to(tl.float32) * factor
        if ROPE:
            cos = tl.load(cos_ptr + t[:, None] * (2 * H) + c[None, :], mask=mask, other=0.0)
            sin = tl.load(sin_ptr + t[:, None] * (2 * H) + c[None, :], mask=mask, other=0.0)
            x, y = x * cos - y * sin, y * cos + x * sin
        low, high = x.to(low.dtype), y.to(high.dtype)
    tl.store(out_ptr + at, low, mask=mask)
    tl.store(out_ptr + at + H, high, mask=mask)


@operation("loopwright::turned_qkv")
def turn(qkv: Tensor, heads: int, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    """[q | k | v] (B, L, 3 D), contiguous, with q and k rotated and q scaled for `_attend`."""
    batch, length, width = qkv.shape
    out = torch.empty_like(qkv)
    if out.numel():
        turn_kernel[(batch * triton.cdiv(length, 64), 3 * heads)](
            qkv, cos, sin, out, length, heads, attention_long.SCALE,
            ROPE=cos is not None, R=64, H=width // heads // 6,
        )  # fmt: skip
    return out


@turn.register_fake
def _(qkv: Tensor, heads: int, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    return torch.empty_like(qkv)


@operation("loopwright::turned_qkv_product")
def _product(x: Tensor, half: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    """`turn` of F.linear(x, half)."""
    return hopper.linear_rotary(x, half, cos, sin, attention_long.SCALE)


@_product.register_fake
def _(x: Tensor, half: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], half.shape[0]))


@operation("loopwright::long_attention")
def _attend(turned: Tensor, heads: int, save: bool) -> tuple[Tensor, Tensor]:
    """out (B, L, D) and, if `save`, lse (B, heads, L), of base 2."""
    return attention_long.attend(turned, heads, save)


@_attend.register_fake
def _(turned: Tensor, heads: int, save: bool) -> tuple[Tensor, Tensor]:
    batch, length, width = turned.shape[0], turned.shape[1], turned.shape[2] // 3
    lse = (batch, heads, length) if save else (1,)
    out = turned.new_empty((batch, length, width))
    return out, turned.new_empty(lse, dtype=torch.float32)


@operation("loopwright::long_attention_backward")
def _attend_backward(
    turned: Tensor, cos: Tensor | None, sin: Tensor | None, out: Tensor, lse: Tensor, dout: Tensor,
    heads: int,
) -> Tensor:  # fmt: skip
    """The gradient (B, L, 3 D) of what was turned."""
    return attention_long.attend_backward(turned, cos, sin, out, lse, dout, heads)


@_attend_backward.register_fake
def _(
    turned: Tensor, cos: Tensor | None, sin: Tensor | None, out: Tensor, lse: Tensor, dout: Tensor,
    heads: int,
) -> Tensor:  # fmt: skip
    return torch.empty_like(turned)


class _LongAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, cos, sin, heads):
        turned = turn(qkv, heads, cos, sin)
        out, lse = _attend(turned, heads, True)
        ctx.save_for_backward(turned, cos, sin, out, lse)
        ctx.heads = heads
        return out

    @staticmethod
    def backward(ctx, dout):
        return _attend_backward(*ctx.saved_tensors, dout.contiguous(), ctx.heads), None, None, None


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
    qkv = qkv.contiguous()
    if torch.is_grad_enabled():
        return _LongAttention.apply(qkv, cos, sin, heads)
    return attend_turned(turn(qkv, heads, cos, sin), heads)


def attend_turned(turned: Tensor, heads: int) -> Tensor:
    """Attention (B, L, D), without gradient, of what `turn` gives (B, L, 3 D)."""
    return _attend(turned, heads, False)[0]


class _ProjectedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, half, half_t, cos, sin, heads):
        turned = _product(x, half, cos, sin)
        out, lse = _attend(turned, heads, True)
        ctx.save_for_backward(x, half, half_t, turned, cos, sin, out, lse)
        ctx.heads, ctx.kind = heads, weight.dtype
        return out, x.view_as(x)

    @staticmethod
    def backward(ctx, dout, dx):
        x, half, half_t, *saved = ctx.saved_tensors
        dqkv = _attend_backward(*saved, dout.contiguous(), ctx.heads)
        half_t = half.t().contiguous() if half_t is None else half_t
        dx, dweight = linear_beside_backward(x, half_t, dx.contiguous(), dqkv)
        return dx, dweight.to(ctx.kind), *(None,) * 5


def projected_attention(
    x: Tensor, weight: Tensor, heads: int, cos: Tensor | None, sin: Tensor | None,
    half: Tensor | None = None, half_t: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`long_attention` of F.linear(x, weight); and x once more, for what else it is used for.

    With the second its uses' gradients are summed in the backward's product, which always makes
    both gradients, of x and of the weight. See `takes_product`.

    Args:
        x: (B, L, K).
        weight: (3 D, K), gets the gradient.
        heads, cos, sin: as of `long_attention`.
        half, half_t: the weight in the dtype of x, and that transposed (K, 3 D), contiguous, where
            they are at hand.

    Returns:
        (B, L, D) and (B, L, K) in the dtype of x. Of q and k only the rotated ones are rounded.
    """
    half = weight.detach().to(x.dtype) if half is None else half
    x = x.contiguous()
    if torch.is_grad_enabled():
        return _ProjectedAttention.apply(x, weight, half, half_t, cos, sin, heads)
    return attend_turned(_product(x, half, cos, sin), heads), x


def supported(x: Tensor, heads: int) -> bool:
    """Whether `long_attention` takes the qkv of x (B, L, D): by device, dtype and shape."""
    length, width = x.shape[1], x.shape[2]
    if not x.is_cuda or x.dtype != torch.bfloat16:
        return False
    fits = MIN_TOKENS <= length <= attention_long.MAX_TOKENS and width == heads * HEAD_DIM
    return fits and on_hopper(x.device.index)


def takes_product(x: Tensor) -> bool:
    """Whether `projected_attention` takes x (B, L, D), which is `supported`: by its width."""
    return x.shape[2] % 128 == 0 and x.numel() < x.shape[2] * 2**26
