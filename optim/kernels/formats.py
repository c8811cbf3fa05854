# ruff: noqa: ANN001, ANN201  (arguments of Triton functions have no Python types)
"""Number formats by their bits: float32 from and to bf16 and e4m3, noise for stochastic rounding.

Integer arithmetic, so that every architecture (and the interpreter) gives the same bits. Formats
are named "fp32", "fp16", "bf16" (in memory uint16), "fp8" (e4m3, in memory uint8), and "fp8_cvt":
the same by the conversion instructions of compute capability 8.9 and up.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

FORMATS = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    getattr(torch, "float8_e4m3fn", torch.uint8): "fp8",
}
ELEMENTS = {
    "fp32": tl.float32,
    "fp16": tl.float16,
    "bf16": tl.uint16,
    "fp8": tl.uint8,
    "fp8_cvt": tl.uint8,
}


@triton.jit
def hash32(x):
    """A bijective mix of uint32 (Wellons' lowbias32: bias 0.17 of 2¹⁶)."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def noise_key(seed, step):
    """A uint32 for one tensor at one step; `seed` int32, `step` float32 of a whole number."""
    return hash32(hash32(step.to(tl.uint32)) + seed.to(tl.uint32))


@triton.jit
def noise16(index, key):
    """16 random bits for each element number `index` (int64), as uint32."""
    low = (index & 0xFFFFFFFF).to(tl.uint32)
    high = (index >> 32).to(tl.uint32)
    return hash32(low ^ hash32(key + high)) >> 16


@triton.jit
def widen(x, FORMAT: tl.constexpr):
    """float32 from what was loaded."""
    if FORMAT == "bf16":
        return (x.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    elif FORMAT == "fp8_cvt":
        return x.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    elif FORMAT == "fp8":
        bits = x.to(tl.uint32)
        # e4m3 has exponent bias 7, float32 127: the same digits, 2^120 smaller; also subnormals
        size = ((bits & 0x7F) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36
        size = tl.where((bits & 0x7F) == 0x7F, float("nan"), size)
        return tl.where((bits & 0x80) != 0, -size, size)
    else:
        return x.to(tl.float32)


@triton.jit
def narrow(x, noise, FORMAT: tl.constexpr, STOCHASTIC: tl.constexpr):
    """What to store for float32 `x`: nearest, ties to even; or up with the chance of its rest.

    `noise`: 16 random bits as uint32, where STOCHASTIC (bf16 only). e4m3 saturates.
    """
    if FORMAT == "bf16":
        bits = x.to(tl.uint32, bitcast=True)
        even = 0x7FFF + ((bits >> 16) & 1)
        if STOCHASTIC:
            infinite = (bits & 0x7F800000) == 0x7F800000
            rounded = bits + tl.where(infinite, 0, noise)
        else:
            rounded = bits + even
        return tl.where(x != x, 0x7FC0, rounded >> 16).to(tl.uint16)
    elif FORMAT == "fp8_cvt":
        return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    elif FORMAT == "fp8":
        bits = x.to(tl.uint32, bitcast=True)
        sign = (bits >> 24) & 0x80
        size = bits & 0x7FFFFFFF
        normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - 960  # 120 << 3: the biases
        # below 2⁻⁶ the spacing is 2⁻⁹, that of float32 numbers next to 2¹⁴
        sum = size.to(tl.float32, bitcast=True) + 16384.0
        code = tl.where(size < 0x3C800000, sum.to(tl.uint32, bitcast=True) & 0xF, normal)
        code = tl.where(size > 0x43E00000, 0x7E, code)  # beyond 448
        code = tl.where(size > 0x7F800000, 0x7F, code)
        return (code | sign).to(tl.uint8)
    elif FORMAT == "fp16":
        return x.to(tl.float16)
    else:
        return x


@triton.jit
def fp8_scale(amax, scale):
    """`optim.moments.fp8_scale`, by bits."""
    peak = amax * scale
    keep = ((peak >= 56.0) & (peak <= 448.0)) | (amax == 0.0) | (amax == float("inf"))
    keep = keep | (amax != amax)
    bits = amax.to(tl.int32, bitcast=True)
    power = 8 - ((bits >> 23) - 127)
    power = power - tl.where((bits & 0x7FFFFF) > 0x600000, 1, 0)
    power = tl.minimum(tl.maximum(power, -126), 126)
    return tl.where(keep, scale, ((power + 127) << 23).to(tl.float32, bitcast=True))
