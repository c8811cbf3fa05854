"""The layers without state of their own: linear maps that cast, RMSNorm, RoPE, SwiGLU.

Weights are kept in float32 (or float64) and cast to the activations' dtype where they are used.
Shape suffixes: B batch, L tokens, H heads, D features.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import fp8
from models.errors import ModelError
from models.kernels import usable

# Standard deviation of a unit normal truncated at ±2; dividing by it restores the asked-for one.
_TRUNCATED_STD = 0.87962566103423978


def truncated_normal(
    shape: tuple[int, ...], std: float, generator: torch.Generator | None
) -> Tensor:
    """Normal samples of standard deviation `std`, truncated at ±2 sigma of the untruncated one."""
    tensor = torch.empty(shape)
    if std == 0 or tensor.numel() == 0:
        return tensor.zero_()
    sigma = std / _TRUNCATED_STD
    return nn.init.trunc_normal_(tensor, std=sigma, a=-2 * sigma, b=2 * sigma, generator=generator)


class _LinearOfHalf(torch.autograd.Function):
    """`F.linear(x, half)` with `half` a copy of `weight`, which gets the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, half: Tensor) -> Tensor:
        ctx.save_for_backward(x, half)
        ctx.kind = weight.dtype
        return F.linear(x, half)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, half = ctx.saved_tensors
        dx = dy @ half if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return dx, None, None
        dweight = dy.reshape(-1, dy.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
        return dx, dweight.to(ctx.kind), None


class Linear(nn.Module):
    """`y = x Wᵀ (+ b)` in the dtype of x; truncated LeCun-normal weight, zero bias."""

    half: Tensor | None = None  # the weight, cast for the pass under way (`models.casting`)
    eight: tuple[Tensor, Tensor] | None = None  # the same in 8 bits, and its unit

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        std = 1.0 / math.sqrt(in_features)
        self.weight = nn.Parameter(truncated_normal((out_features, in_features), std, generator))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self.fp8 = False  # `build_model` sets it where the configuration and the shape allow

    def casts(self, x: Tensor) -> bool:
        """Whether the weight has to be cast for activations like x."""
        return self.weight.dtype != x.dtype and self.bias is None

    @property
    def in_eight(self) -> bool:
        """Whether to multiply in 8 bits now."""
        return self.fp8 and fp8.active()

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) → (..., out_features)."""
        if self.in_eight:
            return fp8.linear(x, *(self.eight or fp8.quantize(self.weight.detach())))
        if self.half is not None:
            if torch.is_grad_enabled():
                return _LinearOfHalf.apply(x, self.weight, self.half)
            return F.linear(x, self.half)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


def norm_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype norms and losses are computed in: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


class _RMSNorm(torch.autograd.Function):
    """The backward pass out of the result: dx = (dy - y mean(dy y)) / rms."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        wide = x.to(norm_dtype(x.dtype))
        inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        out = (wide * inverse).to(x.dtype)
        ctx.save_for_backward(out, inverse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        out, inverse = ctx.saved_tensors
        out, wide = out.to(inverse.dtype), grad.to(inverse.dtype)
        along = (wide * out).mean(-1, keepdim=True)
        return torch.addcmul(wide, out, along, value=-1).mul_(inverse).to(grad.dtype), None


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x², last dimension) + eps), without a gain (Zhang & Sennrich 2019)."""
    if torch.compiler.is_compiling():  # which fuses this, and derives it, by itself
        wide = x.to(norm_dtype(x.dtype))
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    return _RMSNorm.apply(x, eps)


class _GatedSiLU(torch.autograd.Function):
    """The backward pass writes both gradients where they belong, side by side."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        silu = F.silu(gate)
        ctx.save_for_backward(gate_up, silu)
        return silu * up

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        gate_up, silu = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        out = torch.empty_like(gate_up)
        dgate, dup = out.chunk(2, dim=-1)
        torch.mul(grad, silu, out=dup)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=dgate)
        return out


def gated_silu(gate_up: Tensor) -> Tensor:
    """silu(gate) ⊙ up of gate_up (..., 2 I) = [gate | up] → (..., I)."""
    if torch.compiler.is_compiling():
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up
    return _GatedSiLU.apply(gate_up)


def normed_gate(gate_up: Tensor, norm: str, eps: float) -> Tensor:
    """The gated hidden layer of [gate | up] (..., 2 I) with an RMSNorm inside: (..., I).

    norm="product": sigmoid(gate) ⊙ RMSNorm(gate ⊙ up), from Dillon 2026, "Speed is Confidence",
    arXiv:2601.19085, section 3.4; norm="hidden": RMSNorm(silu(gate) ⊙ up). Both bound what the last
    map is given, so that an optimizer whose steps do not shrink with the gradient stays stable.
    """
    if norm == "hidden":
        return rms_norm(gated_silu(gate_up), eps)
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.sigmoid(gate) * rms_norm(gate * up, eps)


class SwiGLU(nn.Module):
    """`W_down(silu(W_gate x) ⊙ W_up x)` (Shazeer 2020, arXiv:2002.05202).

    The inner width is `expansion · 2/3 · features`, rounded up to a multiple of 256. `norm` puts an
    RMSNorm before the last map, see `normed_gate`.
    """

    halves: tuple[Tensor, ...] | None = None  # as the kernels take them, like `Linear.half`

    def __init__(
        self,
        features: int,
        expansion: float,
        generator: torch.Generator | None = None,
        norm: str = "none",
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.norm, self.eps = norm, eps
        inner = -(-round(expansion * features * 2 / 3) // 256) * 256
        inner = max(inner, 256)
        self.gate_up = Linear(features, 2 * inner, generator=generator)
        self.down = Linear(inner, features, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., features) → (..., features)."""
        features = x.shape[-1]
        if self.norm == "none" and usable("swiglu", x) and not self.gate_up.in_eight:
            from models.kernels.swiglu import swiglu_mlp

            fused = swiglu_mlp(x, self.gate_up.weight, self.down.weight, self.halves)
            if fused is not None:
                return fused
        excess = -features % 8 if x.is_cuda else 0
        if excess:  # rows of 16 bytes: unaligned products run at a third of the speed
            gate_up = F.pad(self.gate_up.weight.to(x.dtype), (0, excess))
            h = self.gated(F.linear(F.pad(x, (0, excess)), gate_up))
            down = F.pad(self.down.weight.to(x.dtype), (0, 0, 0, excess))
            return F.linear(h, down)[..., :features]
        return self.down(self.gated(self.gate_up(x)))

    def gated(self, gate_up: Tensor) -> Tensor:
        """[gate | up] (..., 2 I) → what the last map is given (..., I)."""
        if self.norm == "none":
            return gated_silu(gate_up)
        return normed_gate(gate_up, self.norm, self.eps)


class DepthwiseConv(nn.Module):
    """A convolution over the tokens, each feature by itself; zeros stand beyond both ends.

    Of `kernel` = 2 taps a token sees the one before it and itself; of 3, a neighbour either side.
    """

    def __init__(
        self, features: int, kernel: int, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        bound = 1 / math.sqrt(kernel)  # uniform, as torch initializes convolutions
        weight, bias = torch.empty(features, 1, kernel), torch.empty(features)
        self.weight = nn.Parameter(weight.uniform_(-bound, bound, generator=generator))
        self.bias = nn.Parameter(bias.uniform_(-bound, bound, generator=generator))

    def forward(self, x_BLD: Tensor) -> Tensor:
        """(B, L, D) → (B, L, D)."""
        taps = self.weight.to(x_BLD.dtype).squeeze(1).unbind(-1)  # each (D,)
        before, length = len(taps) // 2, x_BLD.shape[1]
        # a sum of shifted copies needs no transposition, and a compiler fuses it
        padded = F.pad(x_BLD, (0, 0, before, len(taps) - 1 - before))
        y_BLD = self.bias.to(x_BLD.dtype)
        for shift, tap in enumerate(taps):
            y_BLD = y_BLD + tap * padded[:, shift : shift + length]
        return y_BLD


class ConvSwiGLU(SwiGLU):
    """`W_down silu(conv(silu(W_gate x) ⊙ W_up x))`.

    Source: Gao et al. 2025, "Universal Reasoning Model", arXiv:2512.14693.
    """

    def __init__(
        self,
        features: int,
        expansion: float,
        kernel: int,
        generator: torch.Generator | None = None,
        norm: str = "none",
        eps: float = 1e-5,
    ) -> None:
        super().__init__(features, expansion, generator, norm, eps)
        self.conv = DepthwiseConv(self.down.weight.shape[1], kernel, generator)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """(B, L, D) → (B, L, D)."""
        return self.down(F.silu(self.conv(self.gated(self.gate_up(x_BLD)))))


def grid_positions(prefix: int, cells: int) -> Tensor:
    """Row and column of every token of a square grid, (prefix + cells, 2).

    The prefix lies side by side in the row above the grid. ModelError: `cells` is no square.
    """
    side = math.isqrt(cells)
    if side * side != cells:
        raise ModelError(
            f"arch.pos_encodings=rope_2d needs puzzles on a square grid, but these have {cells} "
            "cells; use rope"
        )
    before = torch.stack((torch.zeros(prefix), torch.arange(prefix)), dim=1)
    number = torch.arange(cells)
    within = torch.stack((1 + number // side, number % side), dim=1)
    return torch.cat((before, within))


class RotaryTable(nn.Module):
    """Cosines and sines of the rotary position encoding (Su et al. 2021, arXiv:2104.09864).

    Tokens stand at `positions` (L,), or (L, axes): then each axis turns its share of the pairs, as
    if that share were a head. Computed in float32, whatever the model's dtype, and never saved.
    """

    cos: Tensor  # (L, head_dim)
    sin: Tensor  # (L, head_dim)

    def __init__(self, head_dim: int, positions: Tensor, theta: float) -> None:
        super().__init__()
        positions = positions.to(torch.float32).view(len(positions), -1)
        share = head_dim // positions.shape[1]
        frequencies = theta ** (-torch.arange(0, share, 2, dtype=torch.float32) / share)
        angles = (positions[:, :, None] * frequencies).flatten(1)
        angles = torch.cat((angles, angles), dim=-1)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x_BLHD: Tensor) -> Tensor:
        """Rotate each head's pairs (i, i + head_dim/2) by the angle of their position."""
        dtype = torch.promote_types(x_BLHD.dtype, self.cos.dtype)
        x = x_BLHD.to(dtype)
        low, high = x.chunk(2, dim=-1)
        turned = torch.cat((-high, low), dim=-1)
        cos, sin = self.cos.unsqueeze(-2), self.sin.unsqueeze(-2)
        return (x * cos + turned * sin).to(x_BLHD.dtype)
