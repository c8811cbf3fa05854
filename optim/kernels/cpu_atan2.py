"""AdamATan2 in one pass over memory on a CPU, compiled by numba."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numba
import numpy as np
import torch
from torch import Tensor

_ALIGN = 1 << 14  # threads' shares are multiples of it: vectors end where they would for one thread

# As in atan2.py: minimax coefficients of (atan(r) - r) / r³ in r² on [0, 1].
C0, C1, C2, C3, C4, C5, C6, C7, C8 = (
    np.float32(c)
    for c in (-0.333333, 0.19998549, -0.14264242, 0.10952186, -0.0840345, 0.057957593,
              -0.031177843, 0.010914604, -0.0017936213)
)  # fmt: skip
HALF_PI, HALF_PI_LOW = np.float32(math.pi / 2), np.float32(math.pi / 2 - np.float32(math.pi / 2))
ZERO, ONE, INF = np.float32(0), np.float32(1), np.float32(np.inf)


@numba.njit(cache=True, nogil=True, error_model="numpy", fastmath={"contract"})
def _update(
    p: np.ndarray,
    g: np.ndarray,
    m: np.ndarray,
    v: np.ndarray,
    numbers: np.ndarray,
) -> None:  # pragma: no cover  (compiled)
    """A share in place: `adam_atan2_update`, the atan2 of a second argument that is >= 0."""
    keep1, take1, keep2, take2, g_times, m_times, v_times, decay, size = numbers
    for i in range(p.size):
        grad = g[i] * g_times
        first = keep1 * m[i] + take1 * grad
        second = keep2 * v[i] + take2 * (grad * grad)
        m[i] = first
        v[i] = second
        y = first * m_times
        x = np.sqrt(second) * v_times
        ay = abs(y)
        large = ay if ay > x else x
        small = x if ay > x else ay
        r = small / large
        r = ZERO if large == ZERO else r
        r = ONE if small == INF else r
        s = r * r
        q = C8 * s + C7
        q = q * s + C6
        q = q * s + C5
        q = q * s + C4
        q = q * s + C3
        q = q * s + C2
        q = q * s + C1
        q = q * s + C0
        angle = (r * s) * q + r
        angle = HALF_PI - (angle - HALF_PI_LOW) if ay > x else angle
        p[i] = p[i] * decay - size * math.copysign(angle, y)


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="optim")


def supported(p: Tensor) -> bool:
    """Whether `p` and its gradient are float32 and contiguous on the CPU."""
    grad = p.grad
    return (
        p.dtype == torch.float32
        and p.device.type == "cpu"
        and p.is_contiguous()
        and grad.is_contiguous()
    )


def adam_atan2_launch(
    p: Tensor, m: Tensor, v: Tensor, numbers: tuple[float, ...], threads: int
) -> None:
    """Update a parameter with its moments in place.

    Args:
        p: as `supported` says.
        m: first moment, contiguous.
        v: second moment, contiguous.
        numbers: beta1, 1 - beta1, beta2, 1 - beta2, what multiplies the gradient, m and sqrt(v)
            inside the atan2, 1 - lr * weight_decay, and the step size.
        threads: that share the elements, in one call each, since calls wait for the interpreter's
            lock. The result does not depend on it.
    """
    values = np.array(numbers, dtype=np.float32)
    arrays = [t.detach().view(-1).numpy() for t in (p, p.grad, m, v)]
    share = -(-p.numel() // (threads * _ALIGN)) * _ALIGN

    def part(number: int) -> None:
        mine = slice(number * share, (number + 1) * share)
        _update(*(a[mine] for a in arrays), values)

    if threads == 1:
        part(0)
    else:
        list(_pool(threads).map(part, range(threads)))
