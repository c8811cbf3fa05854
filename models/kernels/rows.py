# ruff: noqa: ANN001, ANN201  (arguments of Triton functions have no Python types)
"""Choosing whole rows of one tensor or another in one pass that reads what it takes only."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096


@triton.jit
def select_rows_kernel(
    mask_ptr, then_ptr, other_ptr, out_ptr, size, width,
    PER_ROW: tl.constexpr, BROADCAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out (B, size) = mask ? then : other; mask (B,) or, not PER_ROW, a scalar.

    BROADCAST: then is a vector (width,), again and again along a row.
    """
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    taken = tl.load(mask_ptr + (row if PER_ROW else 0)).to(tl.int1)
    if taken:
        source = then_ptr + at % width if BROADCAST else then_ptr + row * size + at
        value = tl.load(source, mask=inside)
        tl.store(out_ptr + row * size + at, value, mask=inside)
    else:
        value = tl.load(other_ptr + row * size + at, mask=inside)
        tl.store(out_ptr + row * size + at, value, mask=inside)


def select_rows(mask: Tensor, then: Tensor, other: Tensor, out: Tensor | None = None) -> Tensor:
    """torch.where(mask, then, other) of whole rows, bit for bit.

    Args:
        mask: (B,), or a scalar (), bool.
        then: as other, or a vector of its last dimension, expanded.
        other: (B, ...), contiguous.
        out: where the result goes, as other; new if None.
    """
    out = torch.empty_like(other) if out is None else out
    rows = other.shape[0]
    size = other.numel() // max(rows, 1)
    broadcast = not then.is_contiguous()
    if broadcast and any(then.stride()[:-1]):
        then, broadcast = then.contiguous(), False
    if size:
        select_rows_kernel[(rows, triton.cdiv(size, _BLOCK))](
            mask, then, other, out, size, other.shape[-1],
            PER_ROW=mask.ndim > 0, BROADCAST=broadcast, BLOCK=_BLOCK, num_warps=8,
        )  # fmt: skip
    return out
