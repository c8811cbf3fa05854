# ruff: noqa: ANN001, ANN201  (arguments of Triton functions have no Python types)
"""AdamATan2 and AdamW over any number of tensors in one launch."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from optim.kernels.atan2 import atan2
from optim.kernels.formats import narrow, noise16, noise_key, widen

# Float64 numbers of a launch, in the order of `launch.numbers`.
LOG1, LOG2, KEEP1, KEEP2, TAKE1, TAKE2, DECAY, EPS, A, B, LR_SCALE, EMA_TAKE = (
    tl.constexpr(i) for i in range(12)
)


STEPS = tl.constexpr(1 << 16)  # for which `powers` holds the corrections of AdamW


@triton.jit
def _corrections(t, numbers, powers, RULE: tl.constexpr, POWF: tl.constexpr):
    """1 - beta1^t and sqrt(1 - beta2^t), as float32.

    AdamW wants the powers of torch's kernel to the bit: where 1 - beta^t cancels, anything else is
    several ulp away from them. So torch's own are looked up, in `powers` (2, STEPS); later, where
    nothing cancels any more, they are worked out in float32. The other rules (and the interpreter)
    use float64.
    """
    if POWF and RULE == "adamw":
        at = powers + tl.minimum(t, STEPS - 1.0).to(tl.int32)
        late1 = 1.0 - libdevice.pow(tl.load(numbers + KEEP1).to(tl.float32), t)
        late2 = 1.0 - libdevice.pow(tl.load(numbers + KEEP2).to(tl.float32), t)
        c1 = tl.where(t < STEPS, tl.load(at), late1)
        c2 = tl.where(t < STEPS, tl.load(at + STEPS), late2)
    else:
        c1 = (1.0 - tl.exp(t.to(tl.float64) * tl.load(numbers + LOG1))).to(tl.float32)
        c2 = (1.0 - tl.exp(t.to(tl.float64) * tl.load(numbers + LOG2))).to(tl.float32)
    return c1, tl.sqrt_rn(c2)


@triton.jit
def _update(
    p_ptr,
    g_ptr,
    m_ptr,
    v_ptr,
    e_ptr,
    master_ptr,
    start,
    key,
    left,
    lr,
    scale,
    c1,
    c2_root,
    numbers,
    RULE: tl.constexpr,
    FORMAT: tl.constexpr,
    HAS_MASTER: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_EMA: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One chunk: pointers at its first element, `left` elements of the tensor from there on.

    `start` is the number of that element. With HAS_MASTER the update is that of a float32 copy,
    from which the parameter is rounded.
    """
    offsets = tl.arange(0, BLOCK)
    mask = offsets < left if MASKED else None
    if HAS_MASTER:
        p = tl.load(master_ptr + offsets, mask=mask)
    else:
        p = widen(tl.load(p_ptr + offsets, mask=mask), FORMAT)
    g = widen(tl.load(g_ptr + offsets, mask=mask), FORMAT)
    m = tl.load(m_ptr + offsets, mask=mask)
    v = tl.load(v_ptr + offsets, mask=mask)
    if HAS_EMA:
        e = tl.load(e_ptr + offsets, mask=mask)
    keep1 = tl.load(numbers + KEEP1).to(tl.float32)
    keep2 = tl.load(numbers + KEEP2).to(tl.float32)
    decay = lr * tl.load(numbers + DECAY).to(tl.float32)
    if HAS_SCALE:
        g = tl.div_rn(g, scale)
    square = g * g
    # p = p * (1 - lr * weight_decay)
    p = tl.fma(-decay, p, p)
    # m = beta1 * m + (1 - beta1) * g ;  v = beta2 * v + (1 - beta2) * g²
    if RULE == "adamw":
        # p = p - lr / c1 * m / (sqrt(v) / sqrt(c2) + eps), every rounding as in torch's kernel
        m = tl.fma(keep1, m, tl.fma(-keep1, g, g))
        v = tl.fma(keep2, v, tl.fma(-keep2, square, square))
        eps = tl.load(numbers + EPS).to(tl.float32)
        denominator = tl.div_rn(tl.sqrt_rn(v), c2_root) + eps
        p = p - tl.div_rn(tl.div_rn(lr, c1) * m, denominator)
    else:
        a = tl.load(numbers + A).to(tl.float32)
        b = tl.div_rn(tl.load(numbers + B).to(tl.float32), c2_root)
        m = tl.fma(keep1, m, tl.load(numbers + TAKE1).to(tl.float32) * g)
        v = tl.fma(keep2, v, tl.load(numbers + TAKE2).to(tl.float32) * square)
        if RULE == "atan2_outside":
            # p = p - a * lr / c1 * atan2(m, b * sqrt(v) / sqrt(c2))
            p = tl.fma(-tl.div_rn(a * lr, c1), atan2(m, tl.sqrt_rn(v) * b), p)
        else:
            # p = p - a * lr * atan2(m / c1, b * sqrt(v / c2))
            p = tl.fma(-(a * lr), atan2(tl.div_rn(m, c1), tl.sqrt_rn(v) * b), p)
    noise = key
    if STOCHASTIC:
        noise = noise16(start + offsets, key)
    rounded = narrow(p, noise, FORMAT, STOCHASTIC)
    tl.store(p_ptr + offsets, rounded, mask=mask)
    if HAS_MASTER:
        tl.store(master_ptr + offsets, p, mask=mask)
    tl.store(m_ptr + offsets, m, mask=mask)
    tl.store(v_ptr + offsets, v, mask=mask)
    if HAS_EMA:
        # shadow = rate * shadow + (1 - rate) * p
        take = tl.load(numbers + EMA_TAKE).to(tl.float32)
        tl.store(e_ptr + offsets, tl.fma(take, widen(rounded, FORMAT) - e, e), mask=mask)


@triton.jit(
    do_not_specialize_on_alignment=["addresses", "lr_ptr", "scale_ptr", "found_ptr", "powers"],
)
def adam_kernel(
    addresses,
    lr_ptr,
    scale_ptr,
    found_ptr,
    powers,
    chunk_tensor,
    chunk_index,
    sizes,
    counts,
    tickets,
    ready,
    numbers,
    seeds,
    tensors,
    RULE: tl.constexpr,
    FORMAT: tl.constexpr,
    DTYPE: tl.constexpr,
    HAS_MASTER: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_FOUND: tl.constexpr,
    HAS_EMA: tl.constexpr,
    ALIGNED: tl.constexpr,
    POWF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per chunk of the table; columns p, g, m, v, step (EMA shadow) (master).

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
        if HAS_SCALE:  # a norm has likely just read the gradients, the last ones are still in L2
            chunk = tl.num_programs(0) - 1 - chunk
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
        master_ptr = m_ptr
        if HAS_MASTER:
            place = (6 if HAS_EMA else 5) * tensors
            master_ptr = tl.load(column + place).to(tl.pointer_type(tl.float32))
        if ALIGNED:
            p_ptr, g_ptr = tl.multiple_of(p_ptr, 16), tl.multiple_of(g_ptr, 16)
            m_ptr, v_ptr = tl.multiple_of(m_ptr, 16), tl.multiple_of(v_ptr, 16)
            e_ptr, master_ptr = tl.multiple_of(e_ptr, 16), tl.multiple_of(master_ptr, 16)
        lr = tl.load(lr_ptr).to(tl.float32) * tl.load(numbers + LR_SCALE).to(tl.float32)
        scale = 1.0
        if HAS_SCALE:
            scale = tl.load(scale_ptr).to(tl.float32)
        step = tl.load(step_ptr) + 1.0
        c1 = tl.load(ready + 3 * t + 1)
        c2_root = tl.load(ready + 3 * t + 2)
        if tl.load(ready + 3 * t) != step:
            c1, c2_root = _corrections(step, numbers, powers, RULE, POWF)
        key = t.to(tl.uint32)
        if STOCHASTIC:
            key = noise_key(tl.load(seeds + t), step)
        if left >= BLOCK:
            _update(
                p_ptr + start, g_ptr + start, m_ptr + start, v_ptr + start, e_ptr + start,
                master_ptr + start, start, key, left, lr, scale, c1, c2_root, numbers,
                RULE, FORMAT, HAS_MASTER, STOCHASTIC, HAS_SCALE, HAS_EMA, False, BLOCK,
            )  # fmt: skip
        else:
            _update(
                p_ptr + start, g_ptr + start, m_ptr + start, v_ptr + start, e_ptr + start,
                master_ptr + start, start, key, left, lr, scale, c1, c2_root, numbers,
                RULE, FORMAT, HAS_MASTER, STOCHASTIC, HAS_SCALE, HAS_EMA, True, BLOCK,
            )  # fmt: skip
        tl.debug_barrier()  # every thread of this program has used the step it read
        if tl.atomic_add(tickets + t, 1, sem="relaxed") == tl.load(counts + t) - 1:
            next1, next2 = _corrections(step + 1.0, numbers, powers, RULE, POWF)
            tl.store(tickets + t, 0)
            tl.store(step_ptr, step)
            tl.store(ready + 3 * t, step + 1.0)
            tl.store(ready + 3 * t + 1, next1)
            tl.store(ready + 3 * t + 2, next2)
