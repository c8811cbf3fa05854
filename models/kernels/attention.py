# ruff: noqa: ANN001, ANN201  (arguments of Triton functions have no Python types)
"""Self-attention over short sequences, straight from the packed qkv product, RoPE inside.

A program holds one head of one puzzle: all its queries, keys and values (P ≥ L tokens), rotated
on the chip; nothing is transposed in memory and no rotated copy is written. On Hopper GPUs the
kernels of `models.kernels.hopper.attention` do the same at twice the speed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.kernels.hopper import attention as hopper
from models.kernels.launch import next_power, operation, precision

MAX_TOKENS = 128


@triton.jit
def _halves(at, cos, sin, mask, H: tl.constexpr, SIGN: tl.constexpr):
    """The two halves of a head's features, rotated by SIGN × their position's angle."""
    low = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(at + H, mask=mask, other=0.0).to(tl.float32)
    return low * cos - SIGN * high * sin, high * cos + SIGN * low * sin


@triton.jit
def forward_kernel(
    qkv_ptr, cos_ptr, sin_ptr, out_ptr, lse_ptr, L, heads, scale,
    ROPE: tl.constexpr, CAUSAL: tl.constexpr, SAVE: tl.constexpr, PRECISION: tl.constexpr,
    P: tl.constexpr, H: tl.constexpr,
):  # fmt: skip
    """out (B, L, heads, 2 H) from qkv (B, L, 3, heads, 2 H); cos, sin (L, 2 H), equal halves."""
    batch, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    t = tl.arange(0, P)
    c = tl.arange(0, H)
    width = heads * 2 * H
    base = qkv_ptr + batch.to(tl.int64) * L * 3 * width + head * 2 * H
    at = base + (t[:, None] * (3 * width) + c[None, :])
    mask = (t < L)[:, None]
    kind = out_ptr.dtype.element_ty
    cos = tl.full((P, H), 1.0, tl.float32)
    sin = tl.zeros((P, H), tl.float32)
    if ROPE:
        cos = tl.load(cos_ptr + t[:, None] * (2 * H) + c[None, :], mask=mask, other=0.0)
        sin = tl.load(sin_ptr + t[:, None] * (2 * H) + c[None, :], mask=mask, other=0.0)
    q0, q1 = _halves(at, cos, sin, mask, H, 1.0)
    k0, k1 = _halves(at + width, cos, sin, mask, H, 1.0)
    s = tl.dot(q0.to(kind), tl.trans(k0.to(kind)), input_precision=PRECISION)
    s = tl.dot(q1.to(kind), tl.trans(k1.to(kind)), s, input_precision=PRECISION) * scale
    seen = (t < L)[None, :]
    if CAUSAL:
        seen = seen & (t[None, :] <= t[:, None])
    s = tl.where(seen, s, float("-inf"))
    top = tl.max(s, axis=1)
    e = tl.exp2((s - top[:, None]) * 1.4426950408889634)
    total = tl.sum(e, axis=1)
    v0 = tl.load(at + 2 * width, mask=mask, other=0.0)
    v1 = tl.load(at + 2 * width + H, mask=mask, other=0.0)
    p = e.to(kind)
    o0 = tl.dot(p, v0, input_precision=PRECISION) / total[:, None]
    o1 = tl.dot(p, v1, input_precision=PRECISION) / total[:, None]
    to = out_ptr + batch.to(tl.int64) * L * width + head * 2 * H
    to += t[:, None] * width + c[None, :]
    tl.store(to, o0.to(kind), mask=mask)
    tl.store(to + H, o1.to(kind), mask=mask)
    if SAVE:
        tl.store(lse_ptr + tl.program_id(0) * L + t, top + tl.log(total), mask=t < L)


@triton.jit
def backward_kernel(
    qkv_ptr, cos_ptr, sin_ptr, out_ptr, lse_ptr, dout_ptr, dqkv_ptr, L, heads, scale,
    ROPE: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    P: tl.constexpr, H: tl.constexpr,
):  # fmt: skip
    """dqkv (B, L, 3, heads, 2 H) from dout (B, L, heads, 2 H) and what the forward pass saved."""
    batch, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    t = tl.arange(0, P)
    c = tl.arange(0, H)
    width = heads * 2 * H
    base = batch.to(tl.int64) * L * 3 * width + head * 2 * H
    offset = t[:, None] * (3 * width) + c[None, :]
    at = qkv_ptr + base + offset
    mask = (t < L)[:, None]
    kind = dqkv_ptr.dtype.element_ty
    cos = tl.full((P, H), 1.0, tl.float32)
    sin = tl.zeros((P, H), tl.float32)
    if ROPE:
        cos = tl.load(cos_ptr + t[:, None] * (2 * H) + c[None, :], mask=mask, other=0.0)
        sin = tl.load(sin_ptr + t[:, None] * (2 * H) + c[None, :], mask=mask, other=0.0)
    q0, q1 = _halves(at, cos, sin, mask, H, 1.0)
    k0, k1 = _halves(at + width, cos, sin, mask, H, 1.0)
    q0, q1, k0, k1 = q0.to(kind), q1.to(kind), k0.to(kind), k1.to(kind)
    # all scores transposed, (keys, queries), so that they feed dk and dv from registers
    s = tl.dot(k0, tl.trans(q0), input_precision=PRECISION)
    s = tl.dot(k1, tl.trans(q1), s, input_precision=PRECISION) * scale
    lse = tl.load(lse_ptr + tl.program_id(0) * L + t, mask=t < L, other=float("inf"))
    p = tl.exp2((s - lse[None, :]) * 1.4426950408889634)  # 0 for queries past L
    seen = (t < L)[:, None]
    if CAUSAL:
        seen = seen & (t[:, None] <= t[None, :])
    p = tl.where(seen, p, 0.0)
    narrow = t[:, None] * width + c[None, :]
    dout_ptr += batch.to(tl.int64) * L * width + head * 2 * H
    out_ptr += batch.to(tl.int64) * L * width + head * 2 * H
    do0 = tl.load(dout_ptr + narrow, mask=mask, other=0.0)
    do1 = tl.load(dout_ptr + H + narrow, mask=mask, other=0.0)
    o0 = tl.load(out_ptr + narrow, mask=mask, other=0.0).to(tl.float32)
    o1 = tl.load(out_ptr + H + narrow, mask=mask, other=0.0).to(tl.float32)
    delta = tl.sum(o0 * do0.to(tl.float32) + o1 * do1.to(tl.float32), axis=1)  # (queries,)
    to = dqkv_ptr + base + offset
    pk = p.to(kind)
    dv0 = tl.dot(pk, do0, input_precision=PRECISION)
    tl.store(to + 2 * width, dv0.to(kind), mask=mask)
    dv1 = tl.dot(pk, do1, input_precision=PRECISION)
    tl.store(to + 2 * width + H, dv1.to(kind), mask=mask)
    v0 = tl.load(at + 2 * width, mask=mask, other=0.0)
    v1 = tl.load(at + 2 * width + H, mask=mask, other=0.0)
    dp = tl.dot(v0, tl.trans(do0), input_precision=PRECISION)
    dp = tl.dot(v1, tl.trans(do1), dp, input_precision=PRECISION)
    ds = (p * (dp - delta[None, :]) * scale).to(kind)  # (keys, queries)
    dk0 = tl.dot(ds, q0, input_precision=PRECISION)
    dk1 = tl.dot(ds, q1, input_precision=PRECISION)
    # the rotation's transpose is the rotation back
    tl.store(to + width, (dk0 * cos + dk1 * sin).to(kind), mask=mask)
    tl.store(to + width + H, (dk1 * cos - dk0 * sin).to(kind), mask=mask)
    dst = tl.trans(ds)
    dq0 = tl.dot(dst, k0, input_precision=PRECISION)
    dq1 = tl.dot(dst, k1, input_precision=PRECISION)
    tl.store(to, (dq0 * cos + dq1 * sin).to(kind), mask=mask)
    tl.store(to + H, (dq1 * cos - dq0 * sin).to(kind), mask=mask)


_FORWARD = {"num_warps": 4}
_BACKWARD = {"num_warps": 8}


def supported(length: int, head_dim: int) -> bool:
    """Whether one program can hold a head: at most 128 tokens, 32 to 128 features."""
    return length <= MAX_TOKENS and head_dim in (32, 64, 128)


@operation("loopwright::short_attention")
def _attend(
    qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, rope: bool, causal: bool, save: bool
) -> tuple[Tensor, Tensor]:
    """out (B, L, D) and, if `save`, lse (B heads, L)."""
    if hopper.supported(qkv, cos, heads, rope):
        return hopper.attend(qkv, cos, sin, heads, rope, causal, save)
    batch, length, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    half = width // heads // 2
    out = torch.empty((batch, length, width), dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty(
        (batch * heads, length) if save else (1,), dtype=torch.float32, device=qkv.device
    )
    forward_kernel[(batch * heads,)](
        qkv, cos, sin, out, lse, length, heads, (2 * half) ** -0.5, ROPE=rope, CAUSAL=causal,
        SAVE=save, PRECISION=precision(qkv.dtype), P=next_power(length), H=half, **_FORWARD,
    )  # fmt: skip
    return out, lse


@_attend.register_fake
def _(
    qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, rope: bool, causal: bool, save: bool
) -> tuple[Tensor, Tensor]:
    batch, length, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    lse = (batch * heads, length) if save else (1,)
    return qkv.new_empty((batch, length, width)), qkv.new_empty(lse, dtype=torch.float32)


@operation("loopwright::short_attention_backward")
def _attend_backward(
    qkv: Tensor, cos: Tensor, sin: Tensor, out: Tensor, lse: Tensor, dout: Tensor,
    heads: int, rope: bool, causal: bool,
) -> Tensor:  # fmt: skip
    """dqkv (B, L, 3 D)."""
    if hopper.supported(qkv, cos, heads, rope):
        return hopper.attend_backward(qkv, cos, sin, out, lse, dout, heads, rope, causal)
    batch, length, width = out.shape
    half = width // heads // 2
    dqkv = torch.empty_like(qkv)
    backward_kernel[(batch * heads,)](
        qkv, cos, sin, out, lse, dout, dqkv, length, heads, (2 * half) ** -0.5,
        ROPE=rope, CAUSAL=causal, PRECISION=precision(qkv.dtype), P=next_power(length), H=half,
        **_BACKWARD,
    )  # fmt: skip
    return dqkv


@_attend_backward.register_fake
def _(
    qkv: Tensor, cos: Tensor, sin: Tensor, out: Tensor, lse: Tensor, dout: Tensor,
    heads: int, rope: bool, causal: bool,
) -> Tensor:  # fmt: skip
    return torch.empty_like(qkv)


class _ShortAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, cos, sin, heads, rope, causal):
        qkv = qkv.contiguous()
        out, lse = _attend(qkv, cos, sin, heads, rope, causal, True)
        ctx.save_for_backward(qkv, cos, sin, out, lse)
        ctx.options = heads, rope, causal
        return out

    @staticmethod
    def backward(ctx, dout):
        dqkv = _attend_backward(*ctx.saved_tensors, dout.contiguous(), *ctx.options)
        return dqkv, None, None, None, None, None


def short_attention(
    qkv: Tensor, heads: int, cos: Tensor | None, sin: Tensor | None, causal: bool = False
) -> Tensor:
    """softmax(q kᵀ / sqrt(head_dim)) v of rotated q and k.

    Args:
        qkv: (B, L, 3 D): queries, keys, values, each (heads, head_dim); see `supported`.
        heads: number of heads.
        cos, sin: (L, head_dim) float32 with equal halves (see `RotaryTable`), or None: no rotation.
        causal: whether a token sees earlier ones only.

    Returns:
        (B, L, D) in the dtype of qkv. Rotation and softmax are in float32; rounded to that dtype
        are the rotated q and k, the probabilities before their division, and the result.
    """
    rope = cos is not None
    if not rope:
        cos, sin = torch.empty(2, 1, dtype=torch.float32, device=qkv.device)
    if torch.is_grad_enabled():
        return _ShortAttention.apply(qkv, cos, sin, heads, rope, causal)
    return _attend(qkv.contiguous(), cos, sin, heads, rope, causal, False)[0]
