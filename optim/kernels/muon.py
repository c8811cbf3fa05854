# ruff: noqa: ANN001, ANN201  (arguments of Triton functions have no Python types)
"""What Muon does around the Newton–Schulz iteration, for all its matrices in one launch each.

A piece is a matrix that is orthogonalized on its own: a parameter, or one of several stacked along
its rows. Columns of addresses: gradient, momentum, parameter, step (0 but for the first piece of a
parameter), and the EMA shadow. `shapes` (pieces, 6) int32: rows, columns, whether the buffer holds
the transpose, row length of the buffer, whether the buffer is float16, first of the partial sums.
"""

from __future__ import annotations

import triton
import triton.language as tl

SIDE = 64  # of the tiles that fill and read buffers
GAIN = 4096.0  # of float16 buffers, see ns_launch
FIELDS = 6


@triton.jit
def _ahead(g, m, momentum, NESTEROV: tl.constexpr):
    """What is orthogonalized, from the gradient and the momentum that already holds it."""
    return tl.fma(momentum, m, g) if NESTEROV else m


@triton.jit
def _move(g_ptr, m_ptr, left, scale, momentum, HAS_SCALE: tl.constexpr, NESTEROV: tl.constexpr,
          MASKED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """One chunk: m = momentum * m + g; returns the sum of squares of what is orthogonalized."""
    offsets = tl.arange(0, BLOCK)
    mask = offsets < left if MASKED else None
    other = 0.0 if MASKED else None
    g = tl.load(g_ptr + offsets, mask=mask, other=other).to(tl.float32)
    m = tl.load(m_ptr + offsets, mask=mask, other=other)
    if HAS_SCALE:
        g = tl.div_rn(g, scale)
    m = tl.fma(momentum, m, g)
    tl.store(m_ptr + offsets, m, mask=mask)
    u = _ahead(g, m, momentum, NESTEROV)
    return tl.sum(u * u)


@triton.jit
def momentum_kernel(
    addresses,
    scale_ptr,
    found_ptr,
    chunk_tensor,
    chunk_index,
    sizes,
    partials,
    pieces,
    momentum,
    HAS_SCALE: tl.constexpr,
    HAS_FOUND: tl.constexpr,
    NESTEROV: tl.constexpr,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Move the momenta; partials (chunks,) = sums of squares of what is orthogonalized."""
    found = 0.0
    if HAS_FOUND:
        flag = tl.load(found_ptr).to(tl.float32)
        found = tl.where(flag == 0.0, 0.0, 1.0)  # NaN counts as found
    if found == 0.0:
        chunk = tl.program_id(0)
        t = tl.load(chunk_tensor + chunk)
        start = tl.load(chunk_index + chunk).to(tl.int64) * BLOCK
        left = tl.load(sizes + t) - start
        g_ptr = tl.load(addresses + t).to(tl.pointer_type(DTYPE))
        m_ptr = tl.load(addresses + pieces + t).to(tl.pointer_type(tl.float32))
        if ALIGNED:
            g_ptr, m_ptr = tl.multiple_of(g_ptr, 16), tl.multiple_of(m_ptr, 16)
        scale = 1.0
        if HAS_SCALE:
            scale = tl.load(scale_ptr).to(tl.float32)
        if left >= BLOCK:
            total = _move(g_ptr + start, m_ptr + start, left, scale, momentum,
                          HAS_SCALE, NESTEROV, False, BLOCK)  # fmt: skip
        else:
            total = _move(g_ptr + start, m_ptr + start, left, scale, momentum,
                          HAS_SCALE, NESTEROV, True, BLOCK)  # fmt: skip
        tl.store(partials + chunk, total)


@triton.jit
def sum_partials(partials, count):
    """The sum of `count` numbers, in a fixed order."""
    lanes = tl.arange(0, 256)
    total = tl.zeros((256,), dtype=tl.float32)
    for start in range(0, count, 256):
        total += tl.load(partials + start + lanes, mask=start + lanes < count, other=0.0)
    return tl.sum(total)


@triton.jit
def store_tile(tile, out, r, c, length, tall, half, WIDE: tl.constexpr):
    """Write a tile (rows r, columns c of a matrix) to a buffer of rows of `length`."""
    if tall:
        at = c[:, None].to(tl.int64) * length + r[None, :]
        tile = tile.T
    else:
        at = r[:, None].to(tl.int64) * length + c[None, :]
    if WIDE:  # the interpreter
        tl.store(out.to(tl.pointer_type(tl.float32)) + at, tile)
    elif half:
        tl.store(out.to(tl.pointer_type(tl.float16)) + at, tile.to(tl.float16))
    else:
        tl.store(out.to(tl.pointer_type(tl.bfloat16)) + at, tile.to(tl.bfloat16))


@triton.jit
def gather_kernel(
    addresses,
    scale_ptr,
    buffers,
    tile_piece,
    tile_row,
    tile_column,
    shapes,
    offsets,
    counts,
    partials,
    pieces,
    momentum,
    safety,
    HAS_SCALE: tl.constexpr,
    NESTEROV: tl.constexpr,
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    GAIN: tl.constexpr,
    FIELDS: tl.constexpr,
    SIDE: tl.constexpr,
):
    """Write what is orthogonalized, divided by its norm, to the buffers of equal shapes.

    offsets (2, pieces) int64: where in `buffers` (bytes) a piece goes, and where its result is.
    Tiles cover the padding of the buffers, too, which becomes zero.
    """
    tile = tl.program_id(0)
    t = tl.load(tile_piece + tile)
    r = tl.load(tile_row + tile) * SIDE + tl.arange(0, SIDE)
    c = tl.load(tile_column + tile) * SIDE + tl.arange(0, SIDE)
    shape = shapes + t * FIELDS
    rows, columns, tall = tl.load(shape), tl.load(shape + 1), tl.load(shape + 2)
    length, half, first = tl.load(shape + 3), tl.load(shape + 4), tl.load(shape + 5)
    length = tl.multiple_of(length, 16)
    g_ptr = tl.load(addresses + t).to(tl.pointer_type(DTYPE))
    m_ptr = tl.load(addresses + pieces + t).to(tl.pointer_type(tl.float32))
    if ALIGNED:
        g_ptr, m_ptr = tl.multiple_of(g_ptr, 16), tl.multiple_of(m_ptr, 16)
        columns = tl.multiple_of(columns, 16)
    at = r[:, None].to(tl.int64) * columns + c[None, :]
    mask = (r[:, None] < rows) & (c[None, :] < columns)
    g = tl.load(g_ptr + at, mask=mask, other=0.0).to(tl.float32)
    m = tl.load(m_ptr + at, mask=mask, other=0.0)
    if HAS_SCALE:
        g = tl.div_rn(g, tl.load(scale_ptr).to(tl.float32))
    u = _ahead(g, m, momentum, NESTEROV)
    norm = tl.sqrt_rn(sum_partials(partials + first, tl.load(counts + t)))
    u = tl.div_rn(u, norm * safety + 1e-7) * tl.where(half != 0, GAIN, 1.0)
    u = tl.where(mask, u, 0.0)
    out = tl.multiple_of(buffers + tl.load(offsets + t), 16)
    store_tile(u, out, r, c, length, tall != 0, half != 0, WIDE)


@triton.jit
def apply_kernel(
    addresses,
    lr_ptr,
    found_ptr,
    buffers,
    tile_piece,
    tile_row,
    tile_column,
    shapes,
    offsets,
    sizes,
    pieces,
    weight_decay,
    ema_take,
    HAS_FOUND: tl.constexpr,
    HAS_EMA: tl.constexpr,
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    FIELDS: tl.constexpr,
    SIDE: tl.constexpr,
):
    """p = p * (1 - lr * weight_decay) - lr * size * o; step = step + 1; and the EMA.

    sizes (pieces,) float32.
    """
    found = 0.0
    if HAS_FOUND:
        flag = tl.load(found_ptr).to(tl.float32)
        found = tl.where(flag == 0.0, 0.0, 1.0)
    if found == 0.0:
        tile = tl.program_id(0)
        t = tl.load(tile_piece + tile)
        tr, tc = tl.load(tile_row + tile), tl.load(tile_column + tile)
        r = tr * SIDE + tl.arange(0, SIDE)
        c = tc * SIDE + tl.arange(0, SIDE)
        shape = shapes + t * FIELDS
        rows, columns, tall = tl.load(shape), tl.load(shape + 1), tl.load(shape + 2)
        length = tl.multiple_of(tl.load(shape + 3), 16)
        lr = tl.load(lr_ptr).to(tl.float32)
        p_ptr = tl.load(addresses + 2 * pieces + t).to(tl.pointer_type(DTYPE))
        source = tl.multiple_of(buffers + tl.load(offsets + pieces + t), 16)
        if ALIGNED:
            p_ptr, columns = tl.multiple_of(p_ptr, 16), tl.multiple_of(columns, 16)
        if WIDE:
            o_ptr = source.to(tl.pointer_type(tl.float32))
        else:
            o_ptr = source.to(tl.pointer_type(tl.bfloat16))
        # the buffer is padded to whole tiles, so it is read without a mask
        if tall != 0:
            o = tl.load(o_ptr + c[:, None].to(tl.int64) * length + r[None, :]).to(tl.float32).T
        else:
            o = tl.load(o_ptr + r[:, None].to(tl.int64) * length + c[None, :]).to(tl.float32)
        at = r[:, None].to(tl.int64) * columns + c[None, :]
        mask = (r[:, None] < rows) & (c[None, :] < columns)
        p_old = tl.load(p_ptr + at, mask=mask)
        p = p_old.to(tl.float32)
        p = tl.fma(-(lr * weight_decay), p, p)
        p = tl.fma(-(lr * tl.load(sizes + t)), o, p).to(p_old.dtype)
        tl.store(p_ptr + at, p, mask=mask)
        if HAS_EMA:
            e_ptr = tl.load(addresses + 4 * pieces + t).to(tl.pointer_type(tl.float32))
            if ALIGNED:
                e_ptr = tl.multiple_of(e_ptr, 16)
            e = tl.load(e_ptr + at, mask=mask)
            tl.store(e_ptr + at, tl.fma(ema_take, p.to(tl.float32) - e, e), mask=mask)
        if (tr == 0) & (tc == 0):
            step = tl.load(addresses + 3 * pieces + t)
            if step != 0:
                step_ptr = step.to(tl.pointer_type(tl.float32))
                tl.store(step_ptr, tl.load(step_ptr) + 1.0)


@triton.jit
def squares_kernel(x, partials, size, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """partials (matrices, programs): the squares of a matrix of `size` numbers, by parts."""
    start = tl.program_id(1).to(tl.int64) * size
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for i in range(WIDTH):
        at = (tl.program_id(0) * WIDTH + i).to(tl.int64) * BLOCK + lanes
        value = tl.load(x + start + at, mask=at < size, other=0.0).to(tl.float32)
        total = tl.fma(value, value, total)
    part = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    tl.store(partials + part, tl.sum(total))


@triton.jit(do_not_specialize=["rows", "tiles", "parts"])
def fill_kernel(
    x,
    partials,
    buffer,
    rows,
    columns,
    tiles,
    parts,
    matrix,
    length,
    safety,
    gain,
    TALL: tl.constexpr,
    HALF: tl.constexpr,
    WIDE: tl.constexpr,
    SIDE: tl.constexpr,
):
    """Write a batch x (matrices, rows, columns), each divided by its norm, to a padded buffer.

    Grid (row tiles * `tiles`, matrices); `matrix` numbers of the buffer per matrix.
    """
    b = tl.program_id(1).to(tl.int64)
    r = (tl.program_id(0) // tiles) * SIDE + tl.arange(0, SIDE)
    c = (tl.program_id(0) % tiles) * SIDE + tl.arange(0, SIDE)
    at = b * rows * columns + r[:, None].to(tl.int64) * columns + c[None, :]
    mask = (r[:, None] < rows) & (c[None, :] < columns)
    u = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    norm = tl.sqrt_rn(sum_partials(partials + b * parts, parts))
    u = tl.div_rn(u, norm * safety + 1e-7) * gain
    u = tl.where(mask, u, 0.0)
    store_tile(u, buffer + b * matrix, r, c, length, TALL, HALF, WIDE)
