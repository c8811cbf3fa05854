# ruff: noqa: ANN001, ANN201  (arguments of Triton functions have no Python types)
"""Norm of all gradients over a table, without atomics: the same bits every time."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def norm_kernel(
    chunk_tensor,
    chunk_index,
    addresses,
    sizes,
    partials,
    chunks,
    ROUNDS: tl.constexpr,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program i sums the squares of chunks i, i + programs, … in this order: (programs,) float32.

    Each lane keeps its own sum until the end, so the error grows with the number of chunks of a
    program, not with the number of elements.
    """
    program = tl.program_id(0)
    offsets = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for i in range(ROUNDS):
        chunk = program + i * tl.num_programs(0)
        inside = chunk < chunks  # in the last round some programs have nothing left
        t = tl.load(chunk_tensor + chunk, mask=inside, other=0)
        start = tl.load(chunk_index + chunk, mask=inside, other=0).to(tl.int64) * BLOCK
        left = tl.where(inside, tl.load(sizes + t) - start, 0)
        g_ptr = tl.load(addresses + t).to(tl.pointer_type(DTYPE))
        if ALIGNED:
            g_ptr = tl.multiple_of(g_ptr, 16)
        if left >= BLOCK:
            g = tl.load(g_ptr + start + offsets).to(tl.float32)
            total += g * g
        else:
            g = tl.load(g_ptr + start + offsets, mask=offsets < left, other=0.0).to(tl.float32)
            total += g * g
    tl.store(partials + program, tl.sum(total))


@triton.jit
def norm_finish_kernel(partials, norm, N: tl.constexpr, BLOCK: tl.constexpr):
    """norm[0] = sqrt of the sum of N partial sums, by one program in a fixed order."""
    offsets = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, N, BLOCK):
        total += tl.load(partials + start + offsets, mask=start + offsets < N, other=0.0)
    tl.store(norm, tl.sqrt_rn(tl.sum(total)))
