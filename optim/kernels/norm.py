# ruff: noqa: ANN001, ANN201  (arguments of Triton functions have no Python types)
"""Norm of all gradients over a table in one launch: the same bits every time."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _chunk(chunk, chunk_tensor, chunk_index, addresses, sizes, chunks, BLOCK: tl.constexpr):
    """First element of a chunk, elements from there to the end of its tensor, its address."""
    inside = chunk < chunks  # in the last round some programs have nothing left
    t = tl.load(chunk_tensor + chunk, mask=inside, other=0)
    start = tl.load(chunk_index + chunk, mask=inside, other=0).to(tl.int64) * BLOCK
    left = tl.where(inside, tl.load(sizes + t) - start, 0)
    return start, left, tl.load(addresses + t)


@triton.jit(do_not_specialize_on_alignment=["addresses"])
def norm_kernel(
    addresses,
    chunk_tensor,
    chunk_index,
    sizes,
    partials,
    ticket,
    out,
    first,
    chunks,
    max_norm,
    ROUNDS: tl.constexpr,
    COUNT: tl.constexpr,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """partials[first + i]: the squares of chunks i, i + programs, … summed in this order.

    Each lane keeps its own sum until the end, so the error grows with the number of chunks of a
    program, not with the number of elements. With COUNT > 0 (the last launch of a step) the
    program that finishes last, by an integer ticket, sums all COUNT partials in a fixed order:
    out[0] = norm, out[1] = max((norm + 1e-6) / max_norm, 1), or 1 for max_norm 0.
    """
    program = tl.program_id(0)
    offsets = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    start, left, address = _chunk(
        program, chunk_tensor, chunk_index, addresses, sizes, chunks, BLOCK
    )
    for i in range(ROUNDS):
        g_ptr = address.to(tl.pointer_type(DTYPE))
        if ALIGNED:
            g_ptr = tl.multiple_of(g_ptr, 16)
        now, rest = start, left
        # where the next chunk is, is on its way while this one is read
        following = program + (i + 1) * tl.num_programs(0)
        start, left, address = _chunk(
            following, chunk_tensor, chunk_index, addresses, sizes, chunks, BLOCK
        )
        if rest >= BLOCK:
            g = tl.load(g_ptr + now + offsets).to(tl.float32)
            total = tl.fma(g, g, total)
        else:
            g = tl.load(g_ptr + now + offsets, mask=offsets < rest, other=0.0).to(tl.float32)
            total = tl.fma(g, g, total)
    tl.store(partials + first + program, tl.sum(total))
    if COUNT > 0:
        tl.debug_barrier()  # the partial is written before the ticket is drawn, which releases it
        if tl.atomic_add(ticket, 1, sem="acq_rel") == tl.num_programs(0) - 1:
            lanes = tl.arange(0, 1024)
            rest = tl.zeros((1024,), dtype=tl.float32)
            for begin in range(0, COUNT, 1024):
                # past the first-level cache, which may not have seen the others' writes
                rest += tl.load(
                    partials + begin + lanes,
                    mask=begin + lanes < COUNT,
                    other=0.0,
                    cache_modifier=".cg",
                )
            norm = tl.sqrt_rn(tl.sum(rest))
            scale = tl.div_rn(norm + 1e-6, max_norm)
            scale = tl.where((scale < 1.0) | (max_norm == 0.0), 1.0, scale)  # NaN stays
            tl.store(out, norm)
            tl.store(out + 1, scale)
            tl.store(ticket, 0)
