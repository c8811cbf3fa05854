"""Newton–Schulz of a batch of matrices in a tensor: normalized into a buffer, iterated, cropped."""

from __future__ import annotations

import torch
from torch import Tensor

from optim.kernels.launcher import Kernel
from optim.kernels.muon import SIDE, fill_kernel, squares_kernel
from optim.kernels.ns_launch import GAIN, Coefficients, iterate
from optim.kernels.ns_table import path_for

_squares, _fill = Kernel(squares_kernel), Kernel(fill_kernel)
BLOCK = 4096  # numbers whose squares a program adds at once


def orthogonalize(matrix: Tensor, coefficients: Coefficients, safety: float) -> Tensor | None:
    """The iteration of every (rows, columns) matrix of a batch; None where there is no path.

    Args:
        matrix: (batch, rows, columns), contiguous, float32, bfloat16 or float16.
        coefficients: a, b, c of every iteration.
        safety: a matrix is divided by this many times its Frobenius norm, plus 1e-7.

    Returns:
        The shape of `matrix`, bfloat16 (float32 in the interpreter).
    """
    batch, rows, columns = matrix.shape
    tall = rows > columns
    path = path_for(matrix.device, batch, min(rows, columns), max(rows, columns))
    if path is None or matrix.numel() == 0:
        return None
    size, length = path.padded(min(rows, columns), max(rows, columns))
    wide = not matrix.is_cuda
    x = matrix.new_empty(batch, size, length, dtype=torch.float32 if wide else path.dtype)
    out = torch.empty_like(x, dtype=torch.float32 if wide else torch.bfloat16)
    normalize(matrix, x, safety, GAIN if path.gram else 1.0, tall)
    iterate(x, out, coefficients, path)
    result = out.mT if tall else out
    return result[:, :rows, :columns].contiguous()


def normalize(matrix: Tensor, x: Tensor, safety: float, gain: float, tall: bool) -> None:
    """Write `matrix` (batch, rows, columns), each divided by its norm, times `gain`, to x.

    Args:
        matrix: contiguous.
        x: (batch, M, K), 2-byte floating point (float32 in the interpreter); M and K are multiples
            of SIDE; the padding becomes zero.
        safety, gain: see `orthogonalize` and `iterate`.
        tall: whether x holds the transposes.
    """
    batch, rows, columns = matrix.shape
    size = rows * columns
    # at most 256 partial sums, so that each program of the second kernel adds them up quickly
    width = max(1, -(-size // (BLOCK * 256)))
    parts = -(-size // (BLOCK * width))
    partials = matrix.new_empty(batch, parts, dtype=torch.float32)
    _squares(
        (parts, batch),
        matrix.device,
        (matrix, partials, size),
        {"WIDTH": width, "BLOCK": BLOCK},
        num_warps=8,
    )
    down, across = (x.shape[2], x.shape[1]) if tall else x.shape[1:]
    tiles = across // SIDE
    constants = {
        "TALL": tall,
        "HALF": x.dtype == torch.float16,
        "WIDE": x.dtype == torch.float32,
        "SIDE": SIDE,
    }
    numbers = (rows, columns, tiles, parts, x[0].numel(), x.shape[2], safety, gain)
    grid = (down // SIDE * tiles, batch)
    _fill(grid, matrix.device, (matrix, partials, x, *numbers), constants, num_warps=4)
