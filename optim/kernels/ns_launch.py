"""The Newton–Schulz iteration as a sequence of launches over one batch of equal shapes.

Two forms. "standard", in bfloat16:

    G = X Xᵀ,  P = b G + c G²,  X = a X + P X

"gram", for long rows, in float16 (whose three more digits it needs): X is touched only at the ends
of segments, in between everything is symmetric, (M, M), and commutes:

    G = X Xᵀ,  Q = I
    Z = b G + c G²,  Q = a Q + Q Z,  G = (a I + Z) G (a I + Z)        per iteration
    X = Q X                                                            after SEGMENT iterations

Rounding errors of G grow with Q, relative to the small singular values of X; starting again from
X after SEGMENT iterations keeps them below those of the standard form in bfloat16.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from optim.kernels.launcher import Repeat, is_current, repeat_all
from optim.kernels.ns_products import Products
from optim.kernels.ns_table import Path

Coefficients = Sequence[tuple[float, float, float]]
SEGMENT = 3
# Scales of float16 numbers, so that small entries keep their digits: of X (Frobenius norm 1 before
# the first iteration) and of G and Z (norm below 3).
GAIN, GRAM_GAIN = 2.0**12, 2.0**10
# Slots of an input in the workspace of the Gram form.
G, Q, Y, Q_NEXT, Z = range(5)


def working_memory(path: Path, shape: Sequence[int], steps: int) -> int:
    """Elements of a dtype like X that `iterate` needs besides X and its result.

    Args:
        path: for this shape.
        shape: (batch, M, K).
        steps: iterations.
    """
    batch, size, length = shape
    squares, alone = (5, SEGMENT) if path.gram else (2, 1)
    return batch * size * (squares * size + (length if steps > alone else 0))


# What repeats the launches of an iteration, by everything they depend on, the latest last: buffers
# that are born again every step come back at few addresses.
_programs: dict[tuple[Any, ...], list[Repeat]] = {}
KEPT = 64


def iterate(
    x: Tensor, out: Tensor, coefficients: Coefficients, path: Path, work: Tensor | None = None
) -> None:
    """Orthogonalize a batch of normalized matrices.

    Args:
        x: (batch, M, K), padded with zeros as `path` wants; in its dtype, times its gain. It is
            used as working memory.
        out: (batch, M, K), contiguous, receives the result.
        coefficients: a, b, c of every iteration.
        path: for this shape.
        work: at least `working_memory` elements of x's dtype; allocated where it is None.
    """
    coefficients, device = tuple(coefficients), x.device
    if work is None:
        work = x.new_empty(working_memory(path, x.shape, len(coefficients)))
    keep = path.tma and is_current(device)
    if keep:
        addresses = (x.data_ptr(), out.data_ptr(), work.data_ptr())
        key = (device.index, addresses, x.shape, path, coefficients)
        program = _programs.pop(key, None)
        if program is not None:
            _programs[key] = program
            repeat_all(program, device)
            return
    products = Products(path, device, keep=keep)
    form = _gram_form if path.gram else _standard_form
    form(products, x, out, work, coefficients)
    if products.program is not None:
        _programs[key] = products.program
        if len(_programs) > KEPT:
            del _programs[next(iter(_programs))]


def _standard_form(
    products: Products, x: Tensor, out: Tensor, work: Tensor, coefficients: Coefficients
) -> None:
    path, (batch, size, _) = products.path, x.shape
    square = batch * size * size
    gram, poly = work[: 2 * square].view(2, batch, size, size)
    # the last of the alternating results shall be `out`
    other = _rest(work, 2 * square, x) if len(coefficients) > 1 else out
    for k, (a, b, c) in enumerate(coefficients):
        target = out if k == len(coefficients) - 1 else other
        products.symmetric(path.outer, x, x, gram, (1.0, 0.0))
        products.symmetric(path.inner, gram, gram, poly, (c, b))
        products.update(poly, x, target, (1.0, a))
        x, other = target, x


def _rest(work: Tensor, start: int, x: Tensor) -> Tensor:
    """Working memory of the shape of x."""
    return work[start : start + x.numel()].view(x.shape)


def _gram_form(
    products: Products, x: Tensor, out: Tensor, work: Tensor, coefficients: Coefficients
) -> None:
    path, (batch, size, _) = products.path, x.shape
    squares = 5 * batch * size * size
    other = _rest(work, squares, x) if len(coefficients) > SEGMENT else out
    work = work[:squares].view(batch * 5, size, size)
    one = 1.0 / GRAM_GAIN  # takes the scale of Z out of a product with it
    for start in range(0, len(coefficients), SEGMENT):
        segment = coefficients[start : start + SEGMENT]
        products.symmetric(path.outer, x, x, work, (GRAM_GAIN / GAIN**2, 0.0), out_slot=(5, G, 0))
        here, there = Q_NEXT, Q
        for k, (a, b, c) in enumerate(segment):
            # Z = b G + c G², and the first Q = a I + Z
            products.symmetric(
                *(path.inner, work, work, work, (c * one, b)),
                x_slot=(5, G, 0),
                y_slot=(5, G),
                out_slot=(5, Z, 0),
                second=(there, a, one) if k == 0 else None,
            )
            last = k == len(segment) - 1
            # Y = a G + G Z for the next G, and Q = a Q + Q Z: one launch where both are due
            todo = [(G, Y)] * (not last) + [(here, there)] * (k > 0)
            if todo:
                (x_first, out_first), (x_last, out_last) = todo[0], todo[-1]
                block = path.pair if len(todo) == 2 else path.inner
                products.symmetric(
                    *(block, work, work, work, (one, a)),
                    x_slot=(5, x_first, x_last - x_first),
                    y_slot=(5, Z),
                    out_slot=(5, out_first, out_last - out_first),
                    pair=len(todo),
                )
            if not last:
                products.symmetric(
                    *(path.inner, work, work, work, (one, a)),
                    x_slot=(5, Y, 0),
                    y_slot=(5, Z),
                    out_slot=(5, G, 0),
                )
            here, there = there, here
        final = start + SEGMENT >= len(coefficients)
        target = out if final else other
        products.update(work, x, target, (1.0 / GAIN if final else 1.0, 0.0), (5, here))
        x, other = target, x
