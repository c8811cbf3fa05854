"""Newton–Schulz iteration: the nearest orthogonal matrix, approximately, by products alone."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from optim.checks import check_count
from optim.kernels import available

Coefficients = Literal["quintic", "polar_express"]

# X ← a X + b (X Xᵀ) X + c (X Xᵀ)² X, one row per iteration; the last one repeats.
COEFFICIENTS: dict[str, tuple[tuple[float, float, float], ...]] = {
    # Jordan et al. 2024, "Muon": steepest at 0; singular values end between 0.7 and 1.2.
    "quintic": ((3.4445, -4.7750, 2.0315),),
    # Amsel et al. 2025, "The Polar Express", arXiv:2505.16932: for singular values from 1e-3 on.
    "polar_express": (
        (8.28721201814563, -23.595886519098837, 17.300387312530933),
        (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
        (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
        (3.3184196573706015, -2.488488024314874, 0.51004894012372),
        (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
        (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
        (1.875, -1.25, 0.375),
    ),
}
# What a bf16 rounding may add to a singular value of 1; only Polar Express minds.
_SAFETY = {"quintic": 1.0, "polar_express": 1.01}


def work_dtype(matrix: Tensor) -> torch.dtype:
    """bfloat16 on CUDA; float32 elsewhere, where it is the faster; float64 for float64."""
    if matrix.dtype == torch.float64:
        return torch.float64
    return torch.bfloat16 if matrix.is_cuda else torch.float32


def iterations(coefficients: Coefficients, steps: int) -> tuple[list[tuple[float, ...]], float]:
    """a, b, c of every iteration, and by how much more than its norm a matrix is divided."""
    table, safety = COEFFICIENTS[coefficients], _SAFETY[coefficients]
    rows = []
    for k in range(steps):
        a, b, c = table[min(k, len(table) - 1)]
        if k < len(table) - 1:
            a, b, c = a / safety, b / safety**3, c / safety**5
        rows.append((a, b, c))
    return rows, safety


@torch.no_grad()
def newton_schulz(
    matrix: Tensor,
    steps: int = 5,
    *,
    coefficients: Coefficients = "quintic",
    dtype: torch.dtype | None = None,
    fused: Literal["off", "auto", "on"] = "auto",
) -> Tensor:
    """U Vᵀ of the singular value decomposition U S Vᵀ, up to the accuracy of the iteration.

    Args:
        matrix: (..., rows, columns); every leading dimension is a batch.
        steps: iterations, of two symmetric and one rectangular product each.
        coefficients: "quintic" (Muon's own) or "polar_express" (closer to orthogonal).
        dtype: of the products, see `work_dtype`.
        fused: Triton kernels, which compute symmetric products once: "auto" on CUDA where Triton is
            installed and `dtype` is bfloat16, "off", or "on" (the interpreter on the CPU).

    Returns:
        The shape of `matrix`, in the dtype of the products. Zero gives zero.

    Raises:
        TypeError: for what is not a tensor.
        ValueError: for fewer than two dimensions, numbers that are not real floating-point ones,
            no steps, and choices that there are not.
    """
    _check(matrix, steps, coefficients, dtype, fused)
    rows, safety = iterations(coefficients, steps)
    dtype = dtype or work_dtype(matrix)
    if matrix.numel() == 0:
        return matrix.to(dtype, copy=True)
    if _fusable(matrix, dtype, fused):
        from optim.kernels.ns_batch import orthogonalize

        flat = matrix.reshape(-1, *matrix.shape[-2:]).contiguous()
        result = orthogonalize(flat, rows, safety)
        if result is not None:
            return result.view(matrix.shape)
    wide = matrix.shape[-2] <= matrix.shape[-1]
    x = matrix if wide else matrix.mT
    shape = x.shape
    size = torch.linalg.matrix_norm(x.to(torch.promote_types(x.dtype, torch.float32)), keepdim=True)
    x = (x / (size * safety + 1e-7)).to(dtype).reshape(-1, *shape[-2:])
    for a, b, c in rows:
        gram = x @ x.mT  # (batch, rows, rows)
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, poly, x, beta=a)
    x = x.reshape(shape)
    return x if wide else x.mT


def _check(
    matrix: Tensor, steps: int, coefficients: str, dtype: torch.dtype | None, fused: str
) -> None:
    """Raise for arguments of `newton_schulz` that it cannot mean."""
    if not isinstance(matrix, Tensor):
        raise TypeError(f"newton_schulz takes a tensor, got {type(matrix).__name__}")
    if matrix.layout != torch.strided:
        raise ValueError(f"a matrix must be dense, got layout {matrix.layout}")
    if matrix.ndim < 2:
        raise ValueError(f"a matrix has at least 2 dimensions, got shape {tuple(matrix.shape)}")
    for what, kind in (("the matrix", matrix.dtype), ("dtype", dtype or matrix.dtype)):
        if not kind.is_floating_point:
            raise ValueError(f"{what} must be of real floating-point numbers, got {kind}")
    check_count("steps", steps)
    if coefficients not in COEFFICIENTS:
        names = tuple(COEFFICIENTS)
        raise ValueError(f"coefficients must be one of {names}, got {coefficients!r}")
    if fused not in ("off", "auto", "on"):
        raise ValueError(f"fused must be 'off', 'auto' or 'on', got {fused!r}")


def _fusable(matrix: Tensor, dtype: torch.dtype, fused: str) -> bool:
    if fused == "off" or matrix.dtype == torch.float64 or not available():
        return False
    if matrix.is_cuda:
        return dtype == torch.bfloat16
    return fused == "on" and dtype == torch.float32
