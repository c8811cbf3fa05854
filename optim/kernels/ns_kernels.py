# ruff: noqa: ANN001, ANN201  (arguments of Triton functions have no Python types)
"""Products of the Newton–Schulz iteration: symmetric ones computed once, epilogues fused.

Sides of matrices are multiples of the blocks (whoever fills the buffers pads with zeros, which
stay zeros). A batch of matrices is one tall matrix; `slots` of them belong to one input, so that
an operand is found at row `(input * slots + first + j * step) * M` for the j-th of `pair` products
per input.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Numbers no kernel is compiled anew for.
PLACES = [
    *("tiles", "x_slots", "x_first", "x_step", "y_slots", "y_first", "out_slots", "out_first"),
    *("out_step", "second", "pair", "total", "rows", "columns", "p_slots", "p_first"),
]


@triton.jit(do_not_specialize=PLACES)
def symmetric_tma_kernel(
    x_desc,
    y_desc,
    add_desc,
    out_desc,
    order,
    tiles,
    M,
    K,
    alpha,
    beta,
    gamma,
    delta,
    x_slots,
    x_first,
    x_step,
    y_slots,
    y_first,
    out_slots,
    out_first,
    out_step,
    second,
    pair,
    total,
    HAS_ADD: tl.constexpr,
    HAS_SECOND: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    """out = alpha * x yᵀ + beta * x, which must be symmetric; second = delta * out + gamma * I.

    x, y: (M, K) per product, read by tensor descriptors; with HAS_ADD x is (M, M). Only tiles that
    touch the lower triangle are computed; `order` (tiles,) lists them as `row << 16 | column`.
    Persistent: any number of programs for `total` tiles. BN is BM or 2 BM.
    """
    OUTSIDE: tl.constexpr = 1 << 30  # a store there is dropped
    HALVES: tl.constexpr = BN // BM
    for tile in tl.range(tl.program_id(0), total, tl.num_programs(0), flatten=FLATTEN):
        item = tile // tiles
        b = item // pair
        j = item % pair
        x_base = (b * x_slots + x_first + j * x_step) * M
        y_base = (b * y_slots + y_first) * M
        out_base = (b * out_slots + out_first + j * out_step) * M
        where = tl.load(order + tile % tiles)
        row = (where >> 16) * BM
        col = (where & 0xFFFF) * BN
        acc = tl.zeros((BM, BN), dtype=tl.float32)
        for k in range(0, K, BK):
            x = x_desc.load([x_base + row, k])
            y = y_desc.load([y_base + col, k])
            acc = tl.dot(x, y.T, acc)
        for half in tl.static_range(HALVES):
            if HALVES == 2:
                low, high = acc.reshape(BM, 2, BM).permute(0, 2, 1).split()
                value = low if half == 0 else high
            else:
                value = acc
            at = col + half * BM
            value *= alpha
            if HAS_ADD:
                value += beta * add_desc.load([x_base + row, at]).to(tl.float32)
            out = value.to(out_desc.dtype)
            below = tl.where(at <= row, out_base + row, OUTSIDE)
            out_desc.store([below, at], out)
            mirror = tl.where(at < row, out_base + at, OUTSIDE)
            out_desc.store([mirror, row], out.T)
            if HAS_SECOND:
                lanes = tl.arange(0, BM)
                unit = (row + lanes[:, None] == at + lanes[None, :]).to(tl.float32)
                out = (delta * value + gamma * unit).to(out_desc.dtype)
                shift = (second - out_first) * M
                out_desc.store([tl.where(at <= row, below + shift, OUTSIDE), at], out)
                out_desc.store([tl.where(at < row, mirror + shift, OUTSIDE), row], out.T)


@triton.jit(do_not_specialize=PLACES)
def update_tma_kernel(
    p_desc,
    x_desc,
    add_desc,
    out_desc,
    rows,
    columns,
    M,
    alpha,
    beta,
    p_slots,
    p_first,
    total,
    HAS_ADD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    """out = alpha * p x + beta * x for p (M, M) and x (M, columns * BN), read by descriptors."""
    HALF: tl.constexpr = BN // 2
    for tile in tl.range(tl.program_id(0), total, tl.num_programs(0), flatten=FLATTEN):
        b = tile // (rows * columns)
        p_base = (b * p_slots + p_first) * M
        base = b * M
        t = tile % (rows * columns)
        width = GROUP * columns
        first = (t // width) * GROUP
        size = min(rows - first, GROUP)
        row = (first + (t % width) % size) * BM
        col = ((t % width) // size) * BN
        acc = tl.zeros((BM, BN), dtype=tl.float32)
        for k in range(0, M, BK):
            p = p_desc.load([p_base + row, k])
            x = x_desc.load([base + k, col])
            acc = tl.dot(p, x, acc)
        low, high = acc.reshape(BM, 2, HALF).permute(0, 2, 1).split()
        low *= alpha
        high *= alpha
        if HAS_ADD:
            low += beta * add_desc.load([base + row, col]).to(tl.float32)
            high += beta * add_desc.load([base + row, col + HALF]).to(tl.float32)
        out_desc.store([base + row, col], low.to(out_desc.dtype))
        out_desc.store([base + row, col + HALF], high.to(out_desc.dtype))


@triton.jit(do_not_specialize=PLACES)
def symmetric_kernel(
    x_ptr,
    y_ptr,
    out_ptr,
    order,
    M,
    K,
    alpha,
    beta,
    gamma,
    delta,
    x_slots,
    x_first,
    x_step,
    y_slots,
    y_first,
    out_slots,
    out_first,
    out_step,
    second,
    pair,
    HAS_ADD: tl.constexpr,
    HAS_SECOND: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """`symmetric_tma_kernel` with pointers, for cards without tensor descriptors.

    Grid (tiles, products).
    """
    b = tl.program_id(1) // pair
    j = tl.program_id(1) % pair
    where = tl.load(order + tl.program_id(0))
    row = (where >> 16) * BM
    col = (where & 0xFFFF) * BN
    rows = row + tl.arange(0, BM)
    columns = col + tl.arange(0, BN)
    lanes = tl.arange(0, BK)
    x_row = (b * x_slots + x_first + j * x_step).to(tl.int64) * M
    y_row = (b * y_slots + y_first).to(tl.int64) * M
    out_row = (b * out_slots + out_first + j * out_step).to(tl.int64) * M
    x_at = x_ptr + (x_row + rows)[:, None] * K + lanes[None, :]
    y_at = y_ptr + (y_row + columns)[:, None] * K + lanes[None, :]
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for _ in range(0, K, BK):
        acc = tl.dot(tl.load(x_at), tl.load(y_at).T, acc)
        x_at += BK
        y_at += BK
    acc *= alpha
    if HAS_ADD:
        at = x_ptr + (x_row + rows)[:, None] * K + columns[None, :]
        acc += beta * tl.load(at).to(tl.float32)
    below = columns[None, :] < row + BM
    above = columns[:, None] < row
    out = acc.to(out_ptr.dtype.element_ty)
    at = out_ptr + (out_row + rows)[:, None] * M + columns[None, :]
    mirror = out_ptr + (out_row + columns)[:, None] * M + rows[None, :]
    tl.store(at, out, mask=below)
    tl.store(mirror, out.T, mask=above)
    if HAS_SECOND:
        unit = (rows[:, None] == columns[None, :]).to(tl.float32)
        out = (delta * acc + gamma * unit).to(out_ptr.dtype.element_ty)
        shift = (second - out_first).to(tl.int64) * M * M
        tl.store(at + shift, out, mask=below)
        tl.store(mirror + shift, out.T, mask=above)
