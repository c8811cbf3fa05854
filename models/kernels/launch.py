"""What the fused operations share: the sigmoid, the precision of products, sizes, the card."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from models.kernels import hopper


@triton.jit
def sigmoid(x, FAST: tl.constexpr):  # noqa: ANN001, ANN201
    """1 / (1 + exp(-x)); FAST: ½ + ½ tanh(x/2) by the card's own tanh, off by 3e-4 at most.

    One special-function instruction in place of two, which bound these kernels; a rounding to
    bfloat16 is off by 2e-3 relative.
    """
    if FAST:
        t = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [x * 0.5], dtype=tl.float32, is_pure=True, pack=1
        )
        return t * 0.5 + 0.5
    return tl.sigmoid(x)


def fast(x: torch.Tensor) -> bool:
    """Whether `sigmoid` may be the fast one: its error drowns in bfloat16's rounding."""
    return x.dtype == torch.bfloat16 and x.is_cuda


def precision(dtype: torch.dtype) -> str:
    """How Triton multiplies: float32 in full, half precision on the tensor cores."""
    return "ieee" if dtype == torch.float32 else "tf32"


def next_power(n: int, least: int = 16) -> int:
    """The least power of two that is at least n (and `least`)."""
    return max(least, 1 << (n - 1).bit_length())


@torch.compiler.assume_constant_result
def on_hopper(device: int) -> bool:
    """Whether a CUDA device can run `models.kernels.hopper`."""
    return hopper.available(device)
