# ruff: noqa: ANN001, ANN201  (arguments of Triton functions have no Python types)
"""The token mixer of TRM-MLP in one kernel: out = norm(x + W_down(silu(W_gate x) ⊙ W_up x)).

It works along the tokens of each feature. A program holds all tokens of 128 features of one
puzzle, so x is read where it lies (no transposes), the inner activations never leave the chip,
and residual and norm cost nothing. Weights come padded to P tokens: gate and up (2 J, P), down
transposed (J, P). Accumulators are (features, tokens) so that h feeds the second product from
registers. On Hopper GPUs `models.kernels.hopper.mixer` does the same in CUDA C++.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from models.kernels.hopper import mixer as hopper_mixer
from models.kernels.launch import fast, next_power, on_hopper, operation, precision, sigmoid

MAX_TOKENS = 128
USE_HOPPER = True  # whether Hopper's own kernels are taken where they can be


@triton.jit
def forward_kernel(
    x_ptr, gu_ptr, down_ptr, out_ptr, inv_ptr, L, D, J, eps,
    SAVE: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr,
    P: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out (B, L, D) from x (B, L, D); with SAVE also inv (B, D) = 1 / rms of the sum."""
    tiles = tl.cdiv(D, BD)
    pid = tl.program_id(0)
    batch, tile = pid // tiles, pid % tiles
    d = tile * BD + tl.arange(0, BD)
    t = tl.arange(0, P)
    j = tl.arange(0, BN)
    base = batch.to(tl.int64) * L * D
    at = t[:, None] * D + d[None, :]  # inside one puzzle, 32 bits wide
    mask = (t < L)[:, None] & (d < D)[None, :]
    x = tl.load(x_ptr + base + at, mask=mask, other=0.0)
    xt = tl.trans(x)  # (BD, P)
    acc = tl.zeros((BD, P), tl.float32)
    rows = gu_ptr + j[None, :] * P + t[:, None]  # (P, BN): transposed
    down = down_ptr + j[:, None] * P + t[None, :]  # (BN, P)
    for _ in range(0, J, BN):
        gate = tl.dot(xt, tl.load(rows), input_precision=PRECISION)  # (BD, BN)
        up = tl.dot(xt, tl.load(rows + J * P), input_precision=PRECISION)
        h = gate * sigmoid(gate, FAST) * up
        acc = tl.dot(h.to(x.dtype), tl.load(down), acc, input_precision=PRECISION)
        rows += BN * P
        down += BN * P
    y = tl.trans(acc) + x.to(tl.float32)
    inv = tl.rsqrt(tl.sum(y * y, axis=0) / L + eps)  # (BD,); rows past L are zero
    tl.store(out_ptr + base + at, (y * inv[None, :]).to(x.dtype), mask=mask)
    if SAVE:
        tl.store(inv_ptr + batch * D + d, inv, mask=d < D)


@triton.jit
def backward_kernel(
    x_ptr, out_ptr, inv_ptr, dout_ptr, gu_ptr, down_ptr, dx_ptr, dy_ptr, dgu_ptr, h_ptr, L, D, J,
    FAST: tl.constexpr, PRECISION: tl.constexpr,
    P: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dx (B, L, D); for the weights also dy (B, L, D), dgu (B, D, 2 J) and h (B, D, J)."""
    tiles = tl.cdiv(D, BD)
    pid = tl.program_id(0)
    batch, tile = pid // tiles, pid % tiles
    d = tile * BD + tl.arange(0, BD)
    t = tl.arange(0, P)
    j = tl.arange(0, BN)
    base = batch.to(tl.int64) * L * D
    at = t[:, None] * D + d[None, :]  # inside one puzzle, 32 bits wide
    mask = (t < L)[:, None] & (d < D)[None, :]
    # backward of the norm: dy = inv (dout - out mean(dout out))
    out = tl.load(out_ptr + base + at, mask=mask, other=0.0).to(tl.float32)
    dout = tl.load(dout_ptr + base + at, mask=mask, other=0.0).to(tl.float32)
    inv = tl.load(inv_ptr + batch * D + d, mask=d < D, other=0.0)
    mean = tl.sum(out * dout, axis=0) / L
    dy32 = (dout - out * mean[None, :]) * inv[None, :]
    kind = dx_ptr.dtype.element_ty
    dy = dy32.to(kind)
    tl.store(dy_ptr + base + at, dy, mask=mask)
    x = tl.load(x_ptr + base + at, mask=mask, other=0.0)
    xt, dyt = tl.trans(x), tl.trans(dy)  # (BD, P)
    acc = tl.zeros((BD, P), tl.float32)
    rows = gu_ptr + j[None, :] * P + t[:, None]  # (P, BN)
    down = down_ptr + j[None, :] * P + t[:, None]  # (P, BN)
    h_ptr += batch.to(tl.int64) * D * J
    dgu_ptr += 2 * batch.to(tl.int64) * D * J
    inner = d[:, None] * J + j[None, :]
    wide = d[:, None] * (2 * J) + j[None, :]
    inside = (d < D)[:, None]
    for _ in range(0, J, BN):
        wg, wu = tl.load(rows), tl.load(rows + J * P)
        gate = tl.dot(xt, wg, input_precision=PRECISION)
        up = tl.dot(xt, wu, input_precision=PRECISION)
        dh = tl.dot(dyt, tl.load(down), input_precision=PRECISION)
        s = sigmoid(gate, FAST)
        silu = gate * s
        dgate = (dh * up * (s + silu * (1.0 - s))).to(kind)
        dup = (dh * silu).to(kind)
        acc = tl.dot(dgate, tl.trans(wg), acc, input_precision=PRECISION)
        acc = tl.dot(dup, tl.trans(wu), acc, input_precision=PRECISION)
        tl.store(h_ptr + inner, (silu * up).to(kind), mask=inside)
        tl.store(dgu_ptr + wide, dgate, mask=inside)
        tl.store(dgu_ptr + J + wide, dup, mask=inside)
        rows += BN * P
        down += BN * P
        h_ptr += BN
        dgu_ptr += BN
    tl.store(dx_ptr + base + at, (tl.trans(acc) + dy32).to(kind), mask=mask)


@triton.jit
def weights_kernel(
    a_ptr, b_ptr, part_ptr, B, A, L, D, SPLITS,
    PRECISION: tl.constexpr, P: tl.constexpr, BA: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """part (SPLITS, A, P): Σ over a share of the puzzles of a[b]ᵀ (A, D) @ b[b] (L, D)ᵀ."""
    tile, split = tl.program_id(0), tl.program_id(1)
    row = tile * BA + tl.arange(0, BA)
    t = tl.arange(0, P)
    d = tl.arange(0, BD)
    acc = tl.zeros((BA, P), tl.float32)
    steps = tl.cdiv(D, BD)
    share = tl.cdiv(B, SPLITS)
    first = split * share
    count = tl.maximum(tl.minimum(share, B - first), 0)
    for i in range(0, count * steps):
        batch = (first + i // steps).to(tl.int64)
        c = (i % steps) * BD + d
        a = tl.load(
            a_ptr + batch * D * A + c[:, None] * A + row[None, :],
            mask=(c < D)[:, None] & (row < A)[None, :], other=0.0,
        )  # fmt: skip
        b = tl.load(
            b_ptr + batch * L * D + t[None, :] * D + c[:, None],
            mask=(t < L)[None, :] & (c < D)[:, None], other=0.0,
        )  # fmt: skip
        acc = tl.dot(tl.trans(a), b, acc, input_precision=PRECISION)
    at = part_ptr + split.to(tl.int64) * A * P + row[:, None] * P + t[None, :]
    tl.store(at, acc, mask=(row < A)[:, None])


# (features, inner) of a program and how it is compiled, measured on an H100 at 97 tokens.
_FORWARD = {"BD": 128, "BN": 64, "num_warps": 8, "num_stages": 3}
_BACKWARD = {"BD": 128, "BN": 32, "num_warps": 8, "num_stages": 3}
_WEIGHTS = {"BA": 128, "BD": 64, "num_warps": 8, "num_stages": 4}
_SPLITS = 33  # shares of the puzzles; with 4 and 8 row tiles, one and two waves of 132 programs


def cast_weights(x: Tensor, gate_up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """gate_up (2 J, L) and down (L, J) as the kernels take them for x (B, L, D), in its dtype.

    (2 J, P), and (J, P) twice; on Hopper (2 J, P'), (L, J), and for the backward (J, P') with P'
    the next multiple of 8. Without gradient the third is the second.
    """
    gate_up, down = gate_up.detach().to(x.dtype), down.detach().to(x.dtype)
    if on_hopper_kernel(x, down.shape[1]):
        turned = hopper_mixer.pad(down.t()).contiguous() if torch.is_grad_enabled() else down
        return hopper_mixer.pad(gate_up), down, turned
    excess = next_power(gate_up.shape[1]) - gate_up.shape[1]
    turned = F.pad(down.t(), (0, excess))
    return F.pad(gate_up, (0, excess)), turned, turned


def on_hopper_kernel(x: Tensor, inner: int) -> bool:
    """Whether x (B, L, D) goes through the kernels of `models.kernels.hopper`."""
    return USE_HOPPER and hopper_mixer.takes(x, inner) and on_hopper(x.device.index)


@operation("loopwright::token_mixer")
def _mix(
    x: Tensor, gate_up: Tensor, down: Tensor, eps: float, save: bool, hopper: bool, normed: bool
) -> tuple[Tensor, Tensor]:
    """out (B, L, D) and, if `save`, inv (B, D) for the backward; weights from `cast_weights`.

    If `normed` inv is (2, B, D): the outer norm's and the inner one's.
    """
    if hopper:
        return hopper_mixer.forward(x, gate_up, down, eps, save, normed)
    batch, length, width = x.shape
    inner, padded = down.shape
    out = torch.empty_like(x)
    inv = torch.empty((batch, width) if save else (1,), dtype=torch.float32, device=x.device)
    forward_kernel[(batch * triton.cdiv(width, _FORWARD["BD"]),)](
        x, gate_up, down, out, inv, length, width, inner, eps,
        SAVE=save, FAST=fast(x), PRECISION=precision(x.dtype), P=padded, **_FORWARD,
    )  # fmt: skip
    return out, inv


@_mix.register_fake
def _(
    x: Tensor, gate_up: Tensor, down: Tensor, eps: float, save: bool, hopper: bool, normed: bool
) -> tuple[Tensor, Tensor]:
    rows = x.shape[0], x.shape[2]
    shape = ((2, *rows) if normed else rows) if save else (1,)
    return torch.empty_like(x), x.new_empty(shape, dtype=torch.float32)


@operation("loopwright::token_mixer_backward")
def _mix_backward(
    x: Tensor,
    out: Tensor,
    inv: Tensor,
    dout: Tensor,
    gate_up: Tensor,
    down_t: Tensor,
    hopper: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx (B, L, D), and in float32 d gate_up (2 J, L), d down (L, J)."""
    if hopper:
        keep = not hopper_mixer.sums_weights(x.shape[1], down_t.shape[0])
        dx, dy, dgu, h, slopes = hopper_mixer.backward(x, out, inv, dout, gate_up, down_t, keep)
        if not keep:
            inside = (inv[1], slopes) if inv.ndim == 3 else ()
            return dx, *hopper_mixer.weight_gradients(x, dy, gate_up, down_t, *inside)
    else:
        dx, dy, dgu, h = _inner_gradients(x, out, inv, dout, gate_up, down_t)
    dgate_up, ddown = _weight_gradient(dgu, x), _weight_gradient(h, dy)
    return dx, dgate_up.contiguous(), ddown.t().contiguous()


def _inner_gradients(
    x: Tensor, out: Tensor, inv: Tensor, dout: Tensor, gate_up: Tensor, down: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx and dy (B, L, D), d gate | d up (B, D, 2 J), h (B, D, J)."""
    batch, length, width = x.shape
    inner, padded = down.shape
    dx, dy = torch.empty_like(x), torch.empty_like(x)
    dgu = torch.empty((batch, width, 2 * inner), dtype=x.dtype, device=x.device)
    h = torch.empty((batch, width, inner), dtype=x.dtype, device=x.device)
    backward_kernel[(batch * triton.cdiv(width, _BACKWARD["BD"]),)](
        x, out, inv, dout, gate_up, down, dx, dy, dgu, h, length, width, inner,
        FAST=fast(x), PRECISION=precision(x.dtype), P=padded, **_BACKWARD,
    )  # fmt: skip
    return dx, dy, dgu, h


def _weight_gradient(a: Tensor, b: Tensor) -> Tensor:
    """Σ over the puzzles of a[i]ᵀ b[i]ᵀ: a (B, D, A), b (B, L, D) → (A, L) float32."""
    batch, width, rows = a.shape
    length = b.shape[1]
    padded = next_power(length)
    part = torch.empty((_SPLITS, rows, padded), dtype=torch.float32, device=a.device)
    weights_kernel[(triton.cdiv(rows, _WEIGHTS["BA"]), _SPLITS)](
        a, b, part, batch, rows, length, width, _SPLITS,
        PRECISION=precision(a.dtype), P=padded, **_WEIGHTS,
    )  # fmt: skip
    return part.sum(0)[:, :length]


@_mix_backward.register_fake
def _(
    x: Tensor,
    out: Tensor,
    inv: Tensor,
    dout: Tensor,
    gate_up: Tensor,
    down_t: Tensor,
    hopper: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    length, inner = x.shape[1], gate_up.shape[0] // 2
    wide = x.new_empty((2 * inner, length), dtype=torch.float32)
    return torch.empty_like(x), wide, x.new_empty((length, inner), dtype=torch.float32)


class _TokenMixer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gate_up, down, gate_up_half, down_half, down_t, eps, hopper, normed):
        out, inv = _mix(x, gate_up_half, down_half, eps, True, hopper, normed)
        ctx.save_for_backward(x, out, inv, gate_up_half, down_half if down_t is None else down_t)
        ctx.kinds = gate_up.dtype, down.dtype
        ctx.hopper = hopper
        return out

    @staticmethod
    def backward(ctx, dout):
        x, out, inv, *halves = ctx.saved_tensors
        dx, dgate_up, ddown = _mix_backward(x, out, inv, dout.contiguous(), *halves, ctx.hopper)
        none = (None,) * 6
        return dx, dgate_up.to(ctx.kinds[0]), ddown.to(ctx.kinds[1]), *none


def token_mixer(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    eps: float,
    halves: tuple[Tensor, ...] | None = None,
    normed: bool = False,
) -> Tensor:
    """norm(x + down(silu(gate x) ⊙ (up x))) along the tokens of each feature.

    Args:
        x: (B, L, D) with L ≤ MAX_TOKENS.
        gate_up: (2 J, L), the gate's rows first; J a multiple of 64.
        down: (L, J).
        eps: of the RMSNorm.
        halves: `cast_weights` of the two, where they are at hand.
        normed: sigmoid(gate x) ⊙ RMSNorm(gate x ⊙ up x) instead; needs `on_hopper_kernel`.

    Returns:
        (B, L, D) in the dtype of x. Products are accumulated in float32; rounded to the dtype of x
        are the weights, h and the result (the plain path also rounds gate, up and the sum).
    """
    x, hopper = x.contiguous(), on_hopper_kernel(x, down.shape[1])
    halves = halves or cast_weights(x, gate_up, down)
    if torch.is_grad_enabled():
        turned = halves[2] if hopper else None  # the compiler takes no tensor twice
        return _TokenMixer.apply(x, gate_up, down, *halves[:2], turned, eps, hopper, normed)
    return _mix(x, *halves[:2], eps, False, hopper, normed)[0]
