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
from functools import cache
from typing import Any

import torch
from torch import Tensor

from optim.kernels.launcher import Kernel, Repeat, is_current, repeat_all
from optim.kernels.ns_kernels import symmetric_kernel, symmetric_tma_kernel, update_tma_kernel
from optim.kernels.ns_table import Block, Path

Coefficients = Sequence[tuple[float, float, float]]
SEGMENT = 3
# Scales of float16 numbers, so that small entries keep their digits: of X (Frobenius norm 1 before
# the first iteration) and of G and Z (norm below 3).
GAIN, GRAM_GAIN = 2.0**12, 2.0**10
# Slots of an input in the workspace of the Gram form.
G, Q, Y, Q_NEXT, Z = range(5)

_symmetric = Kernel(symmetric_kernel)
_symmetric_tma = Kernel(symmetric_tma_kernel)
_update_tma = Kernel(update_tma_kernel)


@cache  # graphs and kept programs go on reading them
def tile_order(rows: int, ratio: int, device: torch.device) -> Tensor:
    """Tiles on and below the diagonal, `row << 16 | column`, as the kernels take them.

    Column by column within groups of 8 rows, so that neighbours in time share operands in the L2.

    Args:
        rows: tile rows.
        ratio: width of a tile over its height.
        device: where the kernel runs.
    """
    tiles = []
    for first in range(0, rows, 8):
        group = range(first, min(first + 8, rows))
        for column in range(group[-1] // ratio + 1):
            tiles += [row << 16 | column for row in group if column * ratio <= row]
    return torch.tensor(tiles, dtype=torch.int32).to(device)


class Products:
    """The products of one iteration over a batch, with the blocks of `path`.

    Args:
        path: from `ns_table`.
        device: of all tensors.
        keep: whether to note what repeats the launches, in `program`: None if anything cannot be.
    """

    def __init__(self, path: Path, device: torch.device, *, keep: bool = False) -> None:
        self.path, self.device = path, device
        self.program: list[Repeat] | None = [] if keep else None
        self.programs = 1
        if device.type == "cuda":
            self.programs = torch.cuda.get_device_properties(device).multi_processor_count
        self.descriptors: dict[tuple[Any, ...], Any] = {}

    def symmetric(
        self,
        block: Block,
        x: Tensor,
        y: Tensor,
        out: Tensor,
        scales: tuple[float, float],
        *,
        x_slot: tuple[int, int, int] = (1, 0, 0),
        y_slot: tuple[int, int] = (1, 0),
        out_slot: tuple[int, int, int] = (1, 0, 0),
        pair: int = 1,
        second: tuple[int, float, float] | None = None,
    ) -> None:
        """out = alpha * x yᵀ + beta * x, symmetric, for every input of a batch.

        Args:
            block: of the kernel.
            x: (batch * slots, M, K), contiguous; K is M unless beta is 0.
            y: (batch * slots, M, K).
            out: (batch * slots, M, M).
            scales: alpha, beta.
            x_slot: matrices per input, which one, and how much further the next of a pair is.
            y_slot: likewise; a pair shares it.
            out_slot: likewise.
            pair: products per input.
            second: slot of `out`, gamma and delta of a second output delta * out + gamma * I.
        """
        size, length = x.shape[1:]
        order = tile_order(size // block.bm, block.bn // block.bm, self.device)
        products = x.shape[0] // x_slot[0] * pair
        slot, gamma, delta = second or (0, 0.0, 0.0)
        numbers = (
            *(size, length, *scales, gamma, delta),
            *(*x_slot, *y_slot, *out_slot, slot, pair),
        )
        flags = {"HAS_ADD": scales[1] != 0.0, "HAS_SECOND": second is not None}
        sizes = {"BM": block.bm, "BN": block.bn, "BK": block.bk}
        options = {"num_warps": block.warps, "num_stages": block.stages}
        if not self.path.tma:
            arguments = (x, y, out, order, *numbers)
            grid = (order.numel(), products)
            self._run(_symmetric, grid, arguments, {**flags, **sizes}, None, **options)
            return
        total = order.numel() * products
        square = (block.bm, block.bm)
        arguments = (
            self._descriptor(x, block.bm, block.bk),
            self._descriptor(y, block.bn, block.bk),
            self._descriptor(x if flags["HAS_ADD"] else out, *square),
            self._descriptor(out, *square),
            *(order, order.numel(), *numbers, total),
        )
        constants = {**flags, **sizes, "FLATTEN": block.persistent}
        grid = (min(total, self.programs) if block.persistent else total,)
        # sides are multiples of 64, and nothing else is specialized on
        kinds = (x.dtype, out.dtype)
        self._run(_symmetric_tma, grid, arguments, constants, kinds, **options)

    def update(
        self,
        p: Tensor,
        x: Tensor,
        out: Tensor,
        scales: tuple[float, float],
        p_slot: tuple[int, int] = (1, 0),
    ) -> None:
        """out = alpha * p x + beta * x.

        Args:
            p: (batch * slots, M, M).
            x: (batch, M, K).
            out: (batch, M, K), not x.
            scales: alpha, beta.
            p_slot: matrices of p per input, and which one.
        """
        block, (alpha, beta) = self.path.update, scales
        if block is None:
            p = p.view(x.shape[0], p_slot[0], *p.shape[1:])[:, p_slot[1]]
            torch.baddbmm(x, p, x, beta=beta, alpha=alpha, out=out)
            self.program = None
            return
        size, length = x.shape[1:]
        rows, columns = size // block.bm, -(-length // block.bn)
        total = rows * columns * x.shape[0]
        half = (block.bm, block.bn // 2)
        arguments = (
            self._descriptor(p, block.bm, block.bk),
            self._descriptor(x, block.bk, block.bn),
            self._descriptor(x, *half),
            self._descriptor(out, *half),
            *(rows, columns, size, alpha, beta, *p_slot, total),
        )
        constants = {"HAS_ADD": beta != 0.0, "BM": block.bm, "BN": block.bn, "BK": block.bk}
        constants |= {"GROUP": 8, "FLATTEN": block.persistent}
        options = {"num_warps": block.warps, "num_stages": block.stages}
        grid = (min(total, self.programs) if block.persistent else total,)
        kinds = (x.dtype, out.dtype)
        self._run(_update_tma, grid, arguments, constants, kinds, **options)

    def _run(
        self,
        kernel: Kernel,
        grid: tuple[int, ...],
        arguments: Sequence[Any],
        constants: dict[str, Any],
        kinds: tuple[Any, ...] | None,
        **options: Any,
    ) -> None:
        """Launch, and note how to do so again."""
        if self.program is None:
            kernel(grid, self.device, arguments, constants, kinds, **options)
            return
        again = kernel.again(grid, self.device, arguments, constants, kinds, **options)
        self.program = None if again is None else [*self.program, again]

    def _descriptor(self, tensor: Tensor, rows: int, columns: int) -> Any:
        """A tensor descriptor of a batch of matrices as one tall matrix."""
        from triton.tools.tensor_descriptor import TensorDescriptor

        key = (tensor.data_ptr(), rows, columns)  # buffers of one call do not overlap
        if key not in self.descriptors:
            flat = tensor.view(-1, tensor.shape[-1])
            self.descriptors[key] = TensorDescriptor.from_tensor(flat, [rows, columns])
        return self.descriptors[key]


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
