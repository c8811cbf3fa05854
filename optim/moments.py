"""First moments in eight bits: e4m3 numbers with a power of two per block.

Micikevicius et al. 2022, "FP8 Formats for Deep Learning" (arXiv:2209.05433). A scale is a power of
two, so scaling and unscaling are exact and the only error is the rounding to e4m3: 2⁻⁴ of a number
relatively, down to 2⁻¹⁵ of its block's largest, and at most 2⁻¹⁰ / scale below.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from optim.partition import Segment

LARGEST = 448.0  # of e4m3
LOWEST_PEAK = 56.0  # a block's largest number, scaled, stays between these two


def fp8_missing(device: torch.device) -> str:
    """Why moments on `device` cannot be e4m3; "" if they can."""
    if not hasattr(torch, "float8_e4m3fn"):
        return f"torch {torch.__version__} has no float8_e4m3fn"
    if device.type == "cuda" and torch.version.cuda:
        major, minor = torch.cuda.get_device_capability(device)
        if (major, minor) < (8, 9):
            return f"a GPU of compute capability {major}.{minor} has no fp8"
    elif device.type not in ("cpu", "meta"):
        return f"fp8 is not used on {device.type}"
    return ""


def per_element(values: Tensor, segments: Sequence[Segment], like: Tensor) -> Tensor:
    """`values` (blocks,) repeated over the elements of their blocks, in the shape of `like`."""
    parts, start = [], 0
    for s in segments:
        part = values[start : start + s.blocks]
        parts.append(part.unsqueeze(1).expand(s.blocks, s.size).reshape(-1))
        start += s.blocks
    return (torch.cat(parts) if parts else values).reshape(like.shape)


def block_amax(x: Tensor, segments: Sequence[Segment]) -> Tensor:
    """Largest absolute value of each block of `x`, (blocks,) float32."""
    flat, out, start = x.reshape(-1), [], 0
    for s in segments:
        part = flat[start : start + s.blocks * s.size].view(s.blocks, s.size)
        out.append(part.abs().amax(dim=1))
        start += part.numel()
    return torch.cat(out).float() if out else flat.new_zeros(0, dtype=torch.float32)


def fp8_scale(amax: Tensor, scale: Tensor) -> Tensor:
    """The scales of the next step: the old one while the largest number stays in range.

    Where `amax * scale` leaves [56, 448], the scale becomes the power of two that puts it into
    [224, 448]. Zero, infinite and NaN blocks keep theirs.

    Args:
        amax: largest absolute value per block, (blocks,).
        scale: powers of two, (blocks,) float32.
    """
    peak = amax * scale
    keep = (peak >= LOWEST_PEAK) & (peak <= LARGEST)
    keep |= ~((amax > 0) & (amax < float("inf")))
    fraction, exponent = torch.frexp(amax)  # amax = fraction · 2^exponent, fraction in [0.5, 1)
    power = torch.where(fraction <= 0.875, 9 - exponent, 8 - exponent).clamp(-126, 126)
    return torch.where(keep, scale, torch.ldexp(torch.ones_like(scale), power))


def to_fp8(x: Tensor, scale: Tensor, segments: Sequence[Segment]) -> Tensor:
    """`x * scale` rounded to the nearest e4m3 (ties to even)."""
    scaled = x.float() * per_element(scale, segments, x)
    return scaled.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)


def from_fp8(codes: Tensor, scale: Tensor, segments: Sequence[Segment]) -> Tensor:
    """The numbers that `to_fp8` stored, float32."""
    return codes.float() * per_element(1.0 / scale, segments, codes)
