# ruff: noqa: ANN001, ANN201  (arguments of Triton functions have no Python types)
"""atan2 in float32 by a polynomial, without libdevice."""

from __future__ import annotations

import triton
import triton.language as tl

# Minimax (relative) coefficients of (atan(r) - r) / r³ in r² on [0, 1], rounded to float32:
# the polynomial alone is off by 1.2e-8, a tenth of an ulp.
C0: tl.constexpr = tl.constexpr(-0.333333)
C1: tl.constexpr = tl.constexpr(0.19998549)
C2: tl.constexpr = tl.constexpr(-0.14264242)
C3: tl.constexpr = tl.constexpr(0.10952186)
C4: tl.constexpr = tl.constexpr(-0.0840345)
C5: tl.constexpr = tl.constexpr(0.057957593)
C6: tl.constexpr = tl.constexpr(-0.031177843)
C7: tl.constexpr = tl.constexpr(0.010914604)
C8: tl.constexpr = tl.constexpr(-0.0017936213)
HALF_PI: tl.constexpr = tl.constexpr(1.57079637050628662109375)  # the float32, and what it lacks:
HALF_PI_LOW: tl.constexpr = tl.constexpr(-4.37113900018624283e-8)
PI: tl.constexpr = tl.constexpr(3.1415927410125732421875)
PI_LOW: tl.constexpr = tl.constexpr(-8.74227800037248566e-8)


@triton.jit
def atan2(y, x):
    """atan2(y, x) of float32 blocks, to 4 ulp; signed zeros, infinities and NaN as in IEEE 754."""
    ax, ay = tl.abs(x), tl.abs(y)
    large, small = tl.maximum(ax, ay), tl.minimum(ax, ay)
    r = tl.div_rn(small, large)
    r = tl.where(large == 0.0, 0.0, r)
    r = tl.where(small == float("inf"), 1.0, r)
    s = r * r
    q = tl.fma(s, C8, C7)
    q = tl.fma(s, q, C6)
    q = tl.fma(s, q, C5)
    q = tl.fma(s, q, C4)
    q = tl.fma(s, q, C3)
    q = tl.fma(s, q, C2)
    q = tl.fma(s, q, C1)
    q = tl.fma(s, q, C0)
    angle = tl.fma(r * s, q, r)
    angle = tl.where(ay > ax, HALF_PI - (angle - HALF_PI_LOW), angle)
    angle = tl.where(x.to(tl.int32, bitcast=True) < 0, PI - (angle - PI_LOW), angle)
    sign = y.to(tl.int32, bitcast=True) & -2147483648
    angle = (angle.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    return tl.where((x != x) | (y != y), x + y, angle)
