# ruff: noqa: ANN001, ANN201  (arguments of Triton functions have no Python types)
"""AdamATan2 and AdamW over any number of tensors in one launch."""

from __future__ import annotations

import triton
import triton.language as tl

from optim.kernels.atan2 import atan2


@triton.jit
def _corrections(t, log1_high, log1_low, log2_high, log2_low):
    """1 - beta1^t and sqrt(1 - beta2^t), worked out in float64, as float32."""
    t = t.to(tl.float64)
    c1 = 1.0 - tl.exp(t * log1_high + t * log1_low)
    c2 = 1.0 - tl.exp(t * log2_high + t * log2_low)
    return c1.to(tl.float32), tl.sqrt_rn(c2.to(tl.float32))


@triton.jit
def _blend(old, new, new_low, keep, keep_low, take, take_low):
    """keep * old + take * (new + new_low), rounded once: factors are pairs of float32.

    torch works this out in float64; pairs give the same float32 at a fraction of the cost where
    float64 is slow. s + lo is the exact sum of the two leading products.
    """
    a = keep * old
    b = take * new
    s = a + b
    part = s - a
    lo = (a - (s - part)) + (b - part)
    lo += tl.fma(keep, old, -a) + tl.fma(take, new, -b)
    lo += tl.fma(keep_low, old, tl.fma(take_low, new, take * new_low))
    return s + lo


@triton.jit
def _update(
    p_ptr,
    g_ptr,
    m_ptr,
    v_ptr,
    e_ptr,
    left,
    lr,
    scale,
    c1,
    c2_root,
    keep1,
    keep1_low,
    take1,
    take1_low,
    keep2,
    keep2_low,
    take2,
    take2_low,
    weight_decay,
    eps,
    a,
    b,
    ema_take,
    RULE: tl.constexpr,
    HAS_EMA: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One chunk: pointers at its first element, `left` elements of the tensor from there on."""
    offsets = tl.arange(0, BLOCK)
    mask = offsets < left if MASKED else None
    p_old = tl.load(p_ptr + offsets, mask=mask)
    p = p_old.to(tl.float32)
    g = tl.load(g_ptr + offsets, mask=mask).to(tl.float32)
    m = tl.load(m_ptr + offsets, mask=mask)
    v = tl.load(v_ptr + offsets, mask=mask)
    g = tl.div_rn(g, scale)
    square = g * g
    # m = beta1 * m + (1 - beta1) * g ;  v = beta2 * v + (1 - beta2) * g²
    m = _blend(m, g, 0.0, keep1, keep1_low, take1, take1_low)
    v = _blend(v, square, tl.fma(g, g, -square), keep2, keep2_low, take2, take2_low)
    # p = p * (1 - lr * weight_decay)
    p = tl.fma(-(lr * weight_decay), p, p)
    if RULE == "adamw":
        # p = p - lr / c1 * m / (sqrt(v) / sqrt(c2) + eps)
        denominator = tl.div_rn(tl.sqrt_rn(v), c2_root) + eps
        p = p - tl.div_rn(tl.div_rn(lr, c1) * m, denominator)
    elif RULE == "atan2_outside":
        # p = p - a * lr / c1 * atan2(m, b * sqrt(v) / sqrt(c2))
        direction = atan2(m, tl.sqrt_rn(v) * tl.div_rn(b, c2_root))
        p = p - tl.div_rn(a * lr, c1) * direction
    else:
        # p = p - a * lr * atan2(m / c1, b * sqrt(v / c2))
        direction = atan2(tl.div_rn(m, c1), tl.sqrt_rn(v) * tl.div_rn(b, c2_root))
        p = p - a * lr * direction
    rounded = p.to(p_old.dtype)
    tl.store(p_ptr + offsets, rounded, mask=mask)
    tl.store(m_ptr + offsets, m, mask=mask)
    tl.store(v_ptr + offsets, v, mask=mask)
    if HAS_EMA:
        # shadow = rate * shadow + (1 - rate) * p
        e = tl.load(e_ptr + offsets, mask=mask)
        e = tl.fma(ema_take, rounded.to(tl.float32) - e, e)
        tl.store(e_ptr + offsets, e, mask=mask)


@triton.jit
def adam_kernel(
    chunk_tensor,
    chunk_index,
    addresses,
    sizes,
    counts,
    tickets,
    ready,
    tensors,
    lr_ptr,
    scale_ptr,
    found_ptr,
    log1,
    log1_low,
    log2,
    log2_low,
    keep1,
    keep1_low,
    take1,
    take1_low,
    keep2,
    keep2_low,
    take2,
    take2_low,
    weight_decay,
    eps,
    a,
    b,
    ema_take,
    RULE: tl.constexpr,
    DTYPE: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_FOUND: tl.constexpr,
    HAS_EMA: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per chunk of the table; columns p, g, m, v, step (and the EMA shadow).

    `ready` (tensors, 3) float32 holds, from the step before, for which step the bias corrections
    beside it are; the last program of a tensor (by an integer ticket, so that every other has
    read the step) counts the step and works out the next ones. A `step` that was loaded or reset
    does not match, and then each program works them out itself.
    """
    found = 0.0
    if HAS_FOUND:
        flag = tl.load(found_ptr).to(tl.float32)
        found = tl.where(flag == 0.0, 0.0, 1.0)  # NaN counts as found
    if found == 0.0:
        chunk = tl.program_id(0)
        t = tl.load(chunk_tensor + chunk)
        start = tl.load(chunk_index + chunk).to(tl.int64) * BLOCK
        left = tl.load(sizes + t) - start
        column = addresses + t
        p_ptr = tl.load(column).to(tl.pointer_type(DTYPE))
        g_ptr = tl.load(column + tensors).to(tl.pointer_type(DTYPE))
        m_ptr = tl.load(column + 2 * tensors).to(tl.pointer_type(tl.float32))
        v_ptr = tl.load(column + 3 * tensors).to(tl.pointer_type(tl.float32))
        step_ptr = tl.load(column + 4 * tensors).to(tl.pointer_type(tl.float32))
        e_ptr = m_ptr
        if HAS_EMA:
            e_ptr = tl.load(column + 5 * tensors).to(tl.pointer_type(tl.float32))
        if ALIGNED:
            p_ptr, g_ptr = tl.multiple_of(p_ptr, 16), tl.multiple_of(g_ptr, 16)
            m_ptr, v_ptr = tl.multiple_of(m_ptr, 16), tl.multiple_of(v_ptr, 16)
            e_ptr = tl.multiple_of(e_ptr, 16)
        lr = tl.load(lr_ptr).to(tl.float32)
        scale = 1.0
        if HAS_SCALE:
            scale = tl.load(scale_ptr).to(tl.float32)
        step = tl.load(step_ptr) + 1.0
        c1 = tl.load(ready + 3 * t + 1)
        c2_root = tl.load(ready + 3 * t + 2)
        if tl.load(ready + 3 * t) != step:
            c1, c2_root = _corrections(step, log1, log1_low, log2, log2_low)
        if left >= BLOCK:
            _update(
                p_ptr + start, g_ptr + start, m_ptr + start, v_ptr + start, e_ptr + start,
                left, lr, scale, c1, c2_root,
                keep1, keep1_low, take1, take1_low, keep2, keep2_low, take2, take2_low,
                weight_decay, eps, a, b, ema_take,
                RULE, HAS_EMA, False, BLOCK,
            )  # fmt: skip
        else:
            _update(
                p_ptr + start, g_ptr + start, m_ptr + start, v_ptr + start, e_ptr + start,
                left, lr, scale, c1, c2_root,
                keep1, keep1_low, take1, take1_low, keep2, keep2_low, take2, take2_low,
                weight_decay, eps, a, b, ema_take,
                RULE, HAS_EMA, True, BLOCK,
            )  # fmt: skip
        tl.debug_barrier()  # every thread of this program has used the step it read
        if tl.atomic_add(tickets + t, 1, sem="relaxed") == tl.load(counts + t) - 1:
            next1, next2 = _corrections(step + 1.0, log1, log1_low, log2, log2_low)
            tl.store(tickets + t, 0)
            tl.store(step_ptr, step)
            tl.store(ready + 3 * t, step + 1.0)
            tl.store(ready + 3 * t + 1, next1)
            tl.store(ready + 3 * t + 2, next2)
