"""The products of the Newton–Schulz iteration, launched over one batch of equal shapes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from optim.kernels.launcher import Kernel, Repeat
from optim.kernels.ns_kernels import symmetric_kernel, symmetric_tma_kernel, update_tma_kernel
from optim.kernels.ns_table import Block, Path

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
        if not self.path.tma:
            arguments = (x, y, out, order, *numbers)
            grid = (order.numel(), products)
            self._run(_symmetric, block, grid, arguments, {**flags, **sizes}, None)
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
        self._run_tma(_symmetric_tma, block, total, arguments, {**flags, **sizes}, (x, out))

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
        self._run_tma(_update_tma, block, total, arguments, {**constants, "GROUP": 8}, (x, out))

    def _run_tma(
        self,
        kernel: Kernel,
        block: Block,
        total: int,
        arguments: Sequence[Any],
        constants: dict[str, Any],
        tensors: tuple[Tensor, Tensor],
    ) -> None:
        """Launch over `total` tiles: a program each, or persistent ones for all multiprocessors."""
        grid = (min(total, self.programs) if block.persistent else total,)
        constants = {**constants, "FLATTEN": block.persistent}
        # sides are multiples of 64, and nothing else is specialized on
        kinds = tuple([t.dtype for t in tensors])
        self._run(kernel, block, grid, arguments, constants, kinds)

    def _run(
        self,
        kernel: Kernel,
        block: Block,
        grid: tuple[int, ...],
        arguments: Sequence[Any],
        constants: dict[str, Any],
        kinds: tuple[Any, ...] | None,
    ) -> None:
        """Launch, and note how to do so again."""
        options = {"num_warps": block.warps, "num_stages": block.stages}
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
