# ruff: noqa: ANN001, ANN201  (arguments of Triton functions have no Python types)
"""Adam-mini over any number of tensors in at most two launches.

A tile is what one program works on: some whole small blocks (rows of one width), or a piece of a
block that is larger than a tile. The first launch is for the latter only: it sums their squares,
each piece in a program of its own, and moves their second moments. The second launch does all the
rest; a small block's gradient is read once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from optim.kernels.formats import fp8_scale, narrow, noise16, noise_key, widen
from optim.kernels.large_blocks import (
    BLOCK,
    DECAY,
    EMA,
    EMA_TAKE,
    EPS,
    FIRST_BLOCK,
    KEEP2,
    LARGE,
    LARGE_COLUMNS,
    LOG1,
    LOG2,
    MASTER,
    ROWS,
    SCALE,
    SHAPE,
    START,
    STEP,
    TAKE1,
    TAKE2,
    TENSOR,
    TILE_COLUMNS,
    TILES,
    WIDTH,
    G,
    M,
    P,
    V,
    pointer_to,
)


@triton.jit
def _corrections(step, numbers):
    """1 - beta1^t and sqrt(1 - beta2^t), as float32."""
    t = step.to(tl.float64)
    c1 = (1.0 - tl.exp(t * tl.load(numbers + LOG1))).to(tl.float32)
    c2 = (1.0 - tl.exp(t * tl.load(numbers + LOG2))).to(tl.float32)
    return c1, tl.sqrt_rn(c2)


@triton.jit
def _tile(
    row,
    addresses,
    next_scales,
    numbers,
    tensors,
    lr,
    scale,
    c1,
    c2_root,
    key,
    PARAM: tl.constexpr,
    PARAM_DTYPE: tl.constexpr,
    MOMENT: tl.constexpr,
    MOMENT_DTYPE: tl.constexpr,
    SCALED: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_MASTER: tl.constexpr,
    HAS_EMA: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    IS_LARGE: tl.constexpr,
    ALIGNED: tl.constexpr,
    LOG: tl.constexpr,
    TILE: tl.constexpr,
):
    """Rows of up to 2^LOG elements, each of them a block; or (IS_LARGE) a piece of a block."""
    C: tl.constexpr = TILE if IS_LARGE else 1 << LOG
    R: tl.constexpr = TILE // C if TILE > C else 1
    t = tl.load(row + TENSOR)
    start = tl.load(row + START)
    width = tl.load(row + WIDTH).to(tl.int32)
    rows = tl.load(row + ROWS).to(tl.int32)
    if ALIGNED:
        start, width = tl.multiple_of(start, 16), tl.multiple_of(width, 16)
    r, c = tl.arange(0, R), tl.arange(0, C)
    inside = r < rows
    mask = inside[:, None] & (c < width)[None, :]
    offsets = r[:, None] * width + c[None, :]
    p_ptr = pointer_to(addresses, P, tensors, t, PARAM_DTYPE, ALIGNED) + start
    g_ptr = pointer_to(addresses, G, tensors, t, PARAM_DTYPE, ALIGNED) + start
    m_ptr = pointer_to(addresses, M, tensors, t, MOMENT_DTYPE, ALIGNED) + start
    g = widen(tl.load(g_ptr + offsets, mask=mask, other=0), PARAM)
    m = widen(tl.load(m_ptr + offsets, mask=mask, other=0), MOMENT)
    master_ptr = m_ptr
    if HAS_MASTER:
        master_ptr = pointer_to(addresses, MASTER, tensors, t, tl.float32, ALIGNED) + start
        p = tl.load(master_ptr + offsets, mask=mask, other=0.0)
    else:
        p = widen(tl.load(p_ptr + offsets, mask=mask, other=0), PARAM)
    ema_ptr = m_ptr
    e = p
    if HAS_EMA:
        ema_ptr = pointer_to(addresses, EMA, tensors, t, tl.float32, ALIGNED) + start
        e = tl.load(ema_ptr + offsets, mask=mask, other=0.0)
    if HAS_SCALE:
        g = g * scale

    # v = beta2 * v + (1 - beta2) * mean(g²)
    if IS_LARGE:
        blocks = tl.load(row + FIRST_BLOCK) + tl.zeros((R,), dtype=tl.int64)
    else:
        blocks = tl.load(row + FIRST_BLOCK) + r
    v_ptr = pointer_to(addresses, V, tensors, t, tl.float32, False) + blocks
    v = tl.load(v_ptr, mask=inside, other=0.0)
    if not IS_LARGE:  # the first launch has moved those
        mean = tl.div_rn(tl.sum(g * g, axis=1), width.to(tl.float32))
        v = tl.fma(mean, tl.load(numbers + TAKE2).to(tl.float32),
                   v * tl.load(numbers + KEEP2).to(tl.float32))  # fmt: skip
        tl.store(v_ptr, v, mask=inside)

    # m = m + (1 - beta1) * (g - m)
    old_scale = tl.full((R,), 1.0, dtype=tl.float32)
    scale_ptr = v_ptr
    if SCALED:
        scale_ptr = pointer_to(addresses, SCALE, tensors, t, tl.float32, False) + blocks
        old_scale = tl.load(scale_ptr, mask=inside, other=1.0)
        m = m * tl.div_rn(1.0, old_scale)[:, None]
    m = tl.fma(tl.load(numbers + TAKE1).to(tl.float32), g - m, m)

    # p = p * (1 - lr * weight_decay) - lr / c1 * m / (sqrt(v) / c2_root + eps)
    eps = tl.load(numbers + EPS).to(tl.float32)
    size = tl.div_rn(tl.div_rn(lr, c1), tl.div_rn(tl.sqrt_rn(v), c2_root) + eps)
    keep = tl.fma(-lr, tl.load(numbers + DECAY).to(tl.float32), 1.0)
    p = tl.fma(-size[:, None], m, p * keep)  # rounded where the official package rounds

    if SCALED:
        if IS_LARGE:
            new_scale = tl.load(next_scales + tl.load(row + LARGE)) + tl.zeros((R,), tl.float32)
        else:
            new_scale = fp8_scale(tl.max(tl.abs(m), axis=1), old_scale)
            tl.store(scale_ptr, new_scale, mask=inside)
        m = m * new_scale[:, None]
    tl.store(m_ptr + offsets, narrow(m, key, MOMENT, False), mask=mask)
    noise = key
    if STOCHASTIC:
        noise = noise16(start + offsets, key)
    stored = narrow(p, noise, PARAM, STOCHASTIC)
    tl.store(p_ptr + offsets, stored, mask=mask)
    if HAS_MASTER:
        tl.store(master_ptr + offsets, p, mask=mask)
    if HAS_EMA:
        # shadow = rate * shadow + (1 - rate) * p
        take = tl.load(numbers + EMA_TAKE).to(tl.float32)
        new_e = tl.fma(take, widen(stored, PARAM) - e, e)
        tl.store(ema_ptr + offsets, new_e, mask=mask)


@triton.jit(
    do_not_specialize_on_alignment=["addresses", "lr_ptr", "scale_ptr", "found_ptr"],
)
def adam_mini_kernel(
    addresses,
    lr_ptr,
    scale_ptr,
    found_ptr,
    tiles,
    larges,
    counts,
    tickets,
    large_tickets,
    ready,
    next_scales,
    seeds,
    numbers,
    tensors,
    PARAM: tl.constexpr,
    PARAM_DTYPE: tl.constexpr,
    MOMENT: tl.constexpr,
    MOMENT_DTYPE: tl.constexpr,
    SCALED: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_FOUND: tl.constexpr,
    HAS_MASTER: tl.constexpr,
    HAS_EMA: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ALIGNED: tl.constexpr,
    SHAPES: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program per tile. Counts steps and carries bias corrections as `adam_kernel` does.

    SHAPES has a bit for every shape of tile in the table, see `optim.kernels.mini_tiles`.
    """
    found = 0.0
    if HAS_FOUND:
        flag = tl.load(found_ptr).to(tl.float32)
        found = tl.where(flag == 0.0, 0.0, 1.0)  # NaN counts as found
    if found == 0.0:
        row = tiles + tl.program_id(0).to(tl.int64) * TILE_COLUMNS
        t = tl.load(row + TENSOR)
        shape = tl.load(row + SHAPE)
        lr = tl.load(lr_ptr).to(tl.float32)
        scale = 1.0
        if HAS_SCALE:
            scale = tl.div_rn(1.0, tl.load(scale_ptr).to(tl.float32))
        step_ptr = pointer_to(addresses, STEP, tensors, t, tl.float32, False)
        step = tl.load(step_ptr) + 1.0
        c1 = tl.load(ready + 3 * t + 1)
        c2_root = tl.load(ready + 3 * t + 2)
        if tl.load(ready + 3 * t) != step:
            c1, c2_root = _corrections(step, numbers)
        key = shape.to(tl.uint32)
        if STOCHASTIC:
            key = noise_key(tl.load(seeds + t), step)
        for k in tl.static_range(0, 32):
            if (SHAPES >> k) & 1:  # noqa: SIM102  (known when compiled, unlike the next)
                if shape == k:
                    _tile(
                        row, addresses, next_scales, numbers, tensors, lr, scale, c1, c2_root, key,
                        PARAM, PARAM_DTYPE, MOMENT, MOMENT_DTYPE, SCALED, HAS_SCALE, HAS_MASTER,
                        HAS_EMA, STOCHASTIC, k % 16 == 15, ALIGNED and k < 16, k % 16,
                        TILE if k < 16 else TILE // 4,
                    )  # fmt: skip
        tl.debug_barrier()  # every thread of this program has used the step it read
        if SCALED:
            large = tl.load(row + LARGE)
            if large >= 0:
                entry = larges + large * LARGE_COLUMNS
                count = tl.load(entry + TILES).to(tl.int32)
                if tl.atomic_add(large_tickets + large, 1, sem="relaxed") == count - 1:
                    target = pointer_to(addresses, SCALE, tensors, t, tl.float32, False)
                    tl.store(target + tl.load(entry + BLOCK), tl.load(next_scales + large))
                    tl.store(large_tickets + large, 0)
        if tl.atomic_add(tickets + t, 1, sem="relaxed") == tl.load(counts + t) - 1:
            next1, next2 = _corrections(step + 1.0, numbers)
            tl.store(tickets + t, 0)
            tl.store(step_ptr, step)
            tl.store(ready + 3 * t, step + 1.0)
            tl.store(ready + 3 * t + 1, next1)
            tl.store(ready + 3 * t + 2, next2)
