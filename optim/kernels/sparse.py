# ruff: noqa: ANN001, ANN201  (arguments of Triton functions have no Python types)
"""SparseSignSGD in one launch: duplicates summed, rows updated, no host synchronization."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_ROWS = 8192  # every program looks at all ids: beyond this the sorted reference is as good
BLOCK_N, BLOCK_W = 64, 128


@triton.jit
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
    BLOCK_N: tl.constexpr,
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
        total = tl.zeros((BLOCK_N, BLOCK_W), dtype=tl.float32)
        earlier = 0
        for start in range(0, n, BLOCK_N):
            j = start + lanes
            same = (tl.load(ids + j, mask=j < n, other=-1) == own) & (j < n)
            earlier += tl.sum((same & (j < i)).to(tl.int32))
            wanted = tl.where(earlier == 0, tl.sum(same.to(tl.int32)), 0)
            if wanted > 0:
                where = rows + j[:, None].to(tl.int64) * width + columns[None, :]
                mask = same[:, None] & inside[None, :]
                total += tl.load(where, mask=mask, other=0.0).to(tl.float32)
        if earlier == 0:
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
    sparse_signsgd_kernel[(n, triton.cdiv(width, BLOCK_W))](
        table,
        ids,
        rows.contiguous(),
        lr,
        lr if grad_scale is None else grad_scale,
        lr if found_inf is None else found_inf,
        n,
        width,
        table.stride(0),
        float(weight_decay),
        HAS_SCALE=grad_scale is not None,
        HAS_FOUND=found_inf is not None,
        BLOCK_N=BLOCK_N,
        BLOCK_W=BLOCK_W,
        num_warps=4,
        enable_fp_fusion=True,
    )
