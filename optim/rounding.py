"""bfloat16 parameters that do not stand still: stochastic rounding, reproducible to the bit.

A bfloat16 weight has eight bits; an update smaller than half its last bit is lost when rounded to
nearest. Rounded up with the chance of what would be lost, it is right on average (Gupta et al.
2015, "Deep Learning with Limited Numerical Precision", arXiv:1502.02551, section 3.2).
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def hash32(x: Tensor) -> Tensor:
    """A bijective mix of 32-bit numbers held in int64 (Wellons' lowbias32)."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _MASK
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def noise16(shape: torch.Size, seed: int, step: Tensor) -> Tensor:
    """16 random bits per element, a function of (seed, step, place in row-major order), int64.

    Args:
        shape: of the parameter.
        seed: of the parameter, below 2³¹.
        step: 0-dim, counts the updates.
    """
    key = (hash32(step.to(torch.int64)) + seed) & _MASK
    index = torch.arange(shape.numel(), device=step.device)
    noise = hash32((index & _MASK) ^ hash32((hash32(key) + (index >> 32)) & _MASK)) >> 16
    return noise.reshape(shape)


def stochastic_round(x: Tensor, seed: int, step: Tensor) -> Tensor:
    """float32 `x` as bfloat16, up or down with the chance of the distance; see `noise16`."""
    bits = x.float().contiguous().view(torch.int32).to(torch.int64) & _MASK
    finite = (bits & 0x7F800000) != 0x7F800000
    rounded = (bits + torch.where(finite, noise16(x.shape, seed, step), 0)) >> 16
    rounded = torch.where(x.isnan(), 0x7FC0, rounded)
    signed = torch.where(rounded >= 1 << 15, rounded - (1 << 16), rounded)
    return signed.to(torch.int16).view(torch.bfloat16)
