# ruff: noqa: ANN001, ANN201  (arguments of Triton functions have no Python types)
"""Adam-mini's first launch: second moments of blocks larger than a tile; columns of the tables."""

from __future__ import annotations

import triton
import triton.language as tl

from optim.kernels.formats import fp8_scale, widen

# Columns of the table of tiles, see `MiniTiles`.
TENSOR, START, SHAPE, WIDTH, ROWS, FIRST_BLOCK, LARGE = (tl.constexpr(i) for i in range(7))
TILE_COLUMNS: tl.constexpr = tl.constexpr(7)
# Columns of the table of large blocks.
FIRST_TILE, TILES, SIZE, BLOCK = (tl.constexpr(i) for i in range(4))
LARGE_COLUMNS: tl.constexpr = tl.constexpr(4)
# Float64 numbers of a launch.
LOG1, LOG2, KEEP2, TAKE1, TAKE2, DECAY, EPS, EMA_TAKE = (tl.constexpr(i) for i in range(8))
# Columns of the addresses.
P, G, M, V, STEP, MASTER, EMA, SCALE = (tl.constexpr(i) for i in range(8))

LANES: tl.constexpr = tl.constexpr(512)


@triton.jit
def pointer_to(
    addresses, column: tl.constexpr, tensors, t, DTYPE: tl.constexpr, ALIGNED: tl.constexpr
):
    pointer = tl.load(addresses + column * tensors + t).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _piece(
    row,
    addresses,
    numbers,
    tensors,
    t,
    scale,
    old_scale,
    GRAD: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    MOMENT: tl.constexpr,
    SCALED: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
):
    """The sum of a piece's squares; with e4m3, the largest size of its new first moments."""
    start = tl.load(row + START)
    width = tl.load(row + WIDTH).to(tl.int32)
    if ALIGNED:
        start, width = tl.multiple_of(start, 16), tl.multiple_of(width, 16)
    lanes = tl.arange(0, TILE)
    mask = lanes < width
    g_ptr = pointer_to(addresses, G, tensors, t, GRAD_DTYPE, ALIGNED) + start
    g = widen(tl.load(g_ptr + lanes, mask=mask, other=0), GRAD)
    if HAS_SCALE:
        g = g * scale
    peak = 0.0
    if SCALED:
        m_ptr = pointer_to(addresses, M, tensors, t, tl.uint8, ALIGNED) + start
        m = widen(tl.load(m_ptr + lanes, mask=mask, other=0), MOMENT) * tl.div_rn(1.0, old_scale)
        m = tl.fma(tl.load(numbers + TAKE1).to(tl.float32), g - m, m)
        peak = tl.max(tl.abs(m))
    return tl.sum(g * g), peak


@triton.jit(do_not_specialize_on_alignment=["addresses", "scale_ptr", "found_ptr"])
def large_blocks_kernel(
    addresses,
    scale_ptr,
    found_ptr,
    tiles,
    larges,
    partials,
    peaks,
    tickets,
    next_scales,
    numbers,
    tensors,
    GRAD: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    MOMENT: tl.constexpr,
    SCALED: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_FOUND: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
):
    """v = beta2 * v + (1 - beta2) * mean(g²) of the large blocks; with e4m3, their next scales.

    One program per tile of a large block (the first of the table). The one that finishes last in
    its block, by an integer ticket, adds up the partial sums in a fixed order. Leaves all tickets
    at 0.
    """
    found = 0.0
    if HAS_FOUND:
        flag = tl.load(found_ptr).to(tl.float32)
        found = tl.where(flag == 0.0, 0.0, 1.0)  # NaN counts as found
    if found == 0.0:
        program = tl.program_id(0)
        row = tiles + program * TILE_COLUMNS
        t = tl.load(row + TENSOR)
        large = tl.load(row + LARGE)
        block = tl.load(larges + large * LARGE_COLUMNS + BLOCK)
        scale = 1.0
        if HAS_SCALE:
            scale = tl.div_rn(1.0, tl.load(scale_ptr).to(tl.float32))
        old_scale = 1.0
        if SCALED:
            old_scale = tl.load(pointer_to(addresses, SCALE, tensors, t, tl.float32, False) + block)
        if tl.load(row + SHAPE) < 16:
            square, own_peak = _piece(
                row, addresses, numbers, tensors, t, scale, old_scale,
                GRAD, GRAD_DTYPE, MOMENT, SCALED, HAS_SCALE, ALIGNED, TILE,
            )  # fmt: skip
        else:
            square, own_peak = _piece(
                row, addresses, numbers, tensors, t, scale, old_scale,
                GRAD, GRAD_DTYPE, MOMENT, SCALED, HAS_SCALE, False, TILE // 4,
            )  # fmt: skip
        tl.store(partials + program, square)
        if SCALED:
            tl.store(peaks + program, own_peak)
        tl.debug_barrier()  # the partial is written before the ticket is drawn, which releases it
        count = tl.load(larges + large * LARGE_COLUMNS + TILES).to(tl.int32)
        if tl.atomic_add(tickets + large, 1, sem="acq_rel") == count - 1:
            first = tl.load(larges + large * LARGE_COLUMNS + FIRST_TILE)
            some = tl.arange(0, LANES)
            total = tl.zeros((LANES,), dtype=tl.float32)
            peak = tl.zeros((LANES,), dtype=tl.float32)
            for k in range(0, count, LANES):
                inside = k + some < count
                where = first + k + some
                # past the first-level cache, which may not have seen the others' writes
                total += tl.load(partials + where, mask=inside, other=0.0, cache_modifier=".cg")
                if SCALED:
                    more = tl.load(peaks + where, mask=inside, other=0.0, cache_modifier=".cg")
                    peak = tl.maximum(peak, more)
            size = tl.load(larges + large * LARGE_COLUMNS + SIZE).to(tl.float32)
            v_ptr = pointer_to(addresses, V, tensors, t, tl.float32, False) + block
            v = tl.load(v_ptr) * tl.load(numbers + KEEP2).to(tl.float32)
            mean = tl.div_rn(tl.sum(total), size)
            tl.store(v_ptr, tl.fma(mean, tl.load(numbers + TAKE2).to(tl.float32), v))
            if SCALED:
                tl.store(next_scales + large, fp8_scale(tl.max(peak), old_scale))
            tl.store(tickets + large, 0)
