# ruff: noqa: ANN001, ANN201  (arguments of Triton functions have no Python types)
"""SparseSignSGD in one launch: duplicates summed, rows updated, no host synchronization."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from optim.kernels.launcher import Kernel

MOST_ROWS = 8192  # every program looks at all ids: beyond this the sorted reference is as good
BLOCK_N = 1024  # ids looked at once
BLOCK_D = 16  # rows added at once where an id comes often
FEW = 8  # "often" is more than this
MOST_COLUMNS = 512


@triton.jit(do_not_specialize=["n"])
def sparse_signsgd_kernel(
    table,
    ids,
    rows,
    lr_ptr,
    scale_ptr,
    found_ptr,
    n,
    width,
    table_stride,
    weight_decay,
    HAS_SCALE: tl.constexpr,
    HAS_FOUND: tl.constexpr,
    FEW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Program (i, w): the columns of block w, if i is the first entry of its id.

    It sums the rows of all entries of that id, in a fixed order, and updates the row of the table;
    no other program touches these elements.
    """
    found = 0.0
    if HAS_FOUND:
        flag = tl.load(found_ptr).to(tl.float32)
        found = tl.where(flag == 0.0, 0.0, 1.0)  # NaN counts as found
    if found == 0.0:
        i = tl.program_id(0)
        own = tl.load(ids + i)
        lanes = tl.arange(0, BLOCK_N)
        columns = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
        inside = columns < width
        both = 0  # entries of this id, and in the upper half those before i
        for start in range(0, n, BLOCK_N):
            j = start + lanes
            same = (tl.load(ids + j, mask=j < n, other=-1) == own) & (j < n)
            both += tl.sum(tl.where(same, tl.where(j < i, 65537, 1), 0))
        if both < 65536:
            if both <= FEW:
                g = tl.load(rows + i.to(tl.int64) * width + columns, mask=inside, other=0.0)
                g = g.to(tl.float32)
                last = i
                for _ in range(1, both):
                    following = n
                    for start in range(0, n, BLOCK_N):
                        j = start + lanes
                        same = tl.load(ids + j, mask=j < n, other=-1) == own
                        later = same & (j < n) & (j > last)
                        following = tl.minimum(following, tl.min(tl.where(later, j, n)))
                    last = following
                    at = rows + last.to(tl.int64) * width + columns
                    g += tl.load(at, mask=inside, other=0.0).to(tl.float32)
            else:
                few = tl.arange(0, BLOCK_D)
                total = tl.zeros((BLOCK_D, BLOCK_W), dtype=tl.float32)
                for start in range(0, n, BLOCK_D):
                    j = start + few
                    same = (tl.load(ids + j, mask=j < n, other=-1) == own) & (j < n)
                    if tl.sum(same.to(tl.int32)) > 0:
                        at = rows + j[:, None].to(tl.int64) * width + columns[None, :]
                        mask = same[:, None] & inside[None, :]
                        total += tl.load(at, mask=mask, other=0.0).to(tl.float32)
                g = tl.sum(total, axis=0)
            if HAS_SCALE:
                g = tl.div_rn(g, tl.load(scale_ptr).to(tl.float32))
            lr = tl.load(lr_ptr).to(tl.float32)
            target = table + own.to(tl.int64) * table_stride + columns
            w = tl.load(target, mask=inside).to(tl.float32)
            # w = w * (1 - lr * weight_decay) - lr * sign(g)
            sign = tl.where(g > 0.0, 1.0, 0.0) - tl.where(g < 0.0, 1.0, 0.0)
            w = w * (1.0 - lr * weight_decay) - lr * sign
            tl.store(target, w.to(table.dtype.element_ty), mask=inside)


_kernel = Kernel(sparse_signsgd_kernel)


def supported(table: Tensor, n: int) -> bool:
    """Whether the kernel takes n rows for this table."""
    half = (torch.float32, torch.bfloat16, torch.float16)
    return table.dtype in half and table.stride(1) == 1 and n <= MOST_ROWS


def sparse_signsgd_launch(
    table: Tensor,
    ids: Tensor,
    rows: Tensor,
    lr: Tensor,
    weight_decay: float,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """`sparse_signsgd_update`, written into `table` (rows, width); see there."""
    n, width = rows.shape
    if n == 0 or width == 0:
        return
    block = min(MOST_COLUMNS, max(16, triton.next_power_of_2(width)))
    arguments = (
        *(table, ids, rows.contiguous(), lr),
        lr if grad_scale is None else grad_scale,
        lr if found_inf is None else found_inf,
        *(n, width, table.stride(0), float(weight_decay)),
    )
    constants = {
        "HAS_SCALE": grad_scale is not None,
        "HAS_FOUND": found_inf is not None,
        "FEW": FEW,
        "BLOCK_N": BLOCK_N,
        "BLOCK_D": BLOCK_D,
        "BLOCK_W": block,
    }
    grid = (n, triton.cdiv(width, block))
    _kernel(grid, table.device, arguments, constants, num_warps=4, enable_fp_fusion=True)
