"""Products with fused epilogues on Hopper GPUs (compute capability 9.0), in bfloat16.

`y = x Wᵀ` with what follows it (SwiGLU, its backward, a residual, a rotation) done before the
result leaves the chip; see gemm.cu. All of it is deterministic and can be captured in a CUDA graph.
Each function equals the plain PyTorch in its docstring up to one rounding of the result, and where
it says so one before its epilogue (sums and the epilogue are float32). None is differentiable:
callers write their backward out of these.

Shapes: M rows (any number; leading dimensions are flattened into them), K features in, N or I
features out. Weights are bfloat16, as the layers store them: (out, in), contiguous.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from models.kernels.hopper.compile import CompileError, cubin, nvrtc, sources, wgmma
from models.kernels.hopper.driver import Kernel, load, row_map, weight_map

PLAIN, SWIGLU, SWIGLU_SAVE, DSWIGLU, RESIDUAL, NORM, ROTARY = range(7)  # as in gemm.cu
NORM_WIDTHS = (128, 256, 512, 1024)  # a row in one cluster of at most four thread blocks
_SHARED_BYTES = 227 * 1024  # that one thread block may use


@dataclass(frozen=True)
class Plan:
    """The compile-time choices of gemm.cu; its comments explain them."""

    epilogue: int
    k: int
    columns: int
    bn: int = 256
    stationary: bool = False
    stages: int = 0
    cm: int = 1
    cn: int = 1
    normed: bool = False
    period: int = 1
    eight: bool = False
    result8: bool = False

    @property
    def out(self) -> int:
        """Columns of the result in a tile."""
        return self.bn // 2 if self.epilogue in (SWIGLU, SWIGLU_SAVE) else self.bn

    @property
    def rows(self) -> int:
        """Rows of the result in a tile."""
        return 64 if self.stationary else 128

    @property
    def stage_bytes(self) -> int:
        """Shared memory of a stage: 128 bytes of each row of x, and of W where it streams."""
        return 128 * (self.rows + (0 if self.stationary else self.bn))

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block: W, the stages, barriers, alignment, sums of squares."""
        weights = self.bn * self.k if self.stationary else 0  # in 8 bits
        small = 1536 + 8 * (self.k // 64) + 8 * self.cn * self.rows
        return weights + self.stages * self.stage_bytes + small


@functools.cache
def plan(
    epilogue: int,
    k: int,
    columns: int,
    normed: bool = False,
    period: int = 1,
    eight: bool = False,
    result8: bool = False,
) -> Plan:
    """The plan for a product with K = k and `columns` columns of result: a rule, no timing."""
    p = Plan(epilogue, k, columns, 256, False, 0, 2, 1, normed, period, eight, result8)
    if eight and k <= 512 and epilogue != NORM:
        p = replace(p, stationary=True, cm=1)
    if epilogue == DSWIGLU and columns % 192 == 0:  # gate and up take registers, too
        p = replace(p, bn=192)
    elif columns % p.out or epilogue == DSWIGLU:
        p = replace(p, bn=128)
    if epilogue == NORM:
        p = replace(p, cm=1, cn=columns // p.bn)
    return replace(p, stages=min(8, (_SHARED_BYTES - p.shared_bytes) // p.stage_bytes))


@functools.cache
def _kernel(p: Plan, device: int) -> Kernel:
    text = wgmma(p.bn, p.eight) + "\n" + sources("instructions.cu", "gemm.cu")
    macros = {
        "EPILOGUE": p.epilogue,
        "NORMED": int(p.normed),
        "K": p.k,
        "COLUMNS": p.columns,
        "BN": p.bn,
        "STATIONARY": int(p.stationary),
        "STAGES": p.stages,
        "CM": p.cm,
        "CN": p.cn,
        "PERIOD": p.period,
        "EIGHT": int(p.eight),
        "RESULT8": int(p.result8),
    }
    code = cubin(text, macros)
    return load(code, "gemm", 384, p.shared_bytes, p.cm * p.cn)


def launch(
    p: Plan,
    x: Tensor,
    w: Tensor,
    other: Tensor | None,
    out: Tensor,
    wide: Tensor | None = None,
    factors: Tensor | None = None,
    eps: float = 0.0,
    scales: Tensor | None = None,
    slopes: Tensor | None = None,
    unit: Tensor | None = None,
) -> None:
    """Run gemm.cu by plan `p`; the tensors are those of its kernel, contiguous, None: not used."""
    if not out.numel():
        return
    with torch.cuda.device(x.device):
        kernel = _kernel(p, x.device.index)
        rows = out.numel() // p.columns
        clusters = -(-rows // (p.rows * p.cm)) * (p.columns // p.out // p.cn)
        pointers = (0 if t is None else t.data_ptr() for t in (other, out, wide, factors))
        kernel.launch(
            clusters,
            torch.cuda.current_stream().cuda_stream,
            (
                row_map(x.view(rows, p.k), p.rows // p.cn),
                weight_map(w, p.bn // 2),
                *map(ctypes.c_void_p, pointers),
                ctypes.c_uint32(rows),
                ctypes.c_float(eps),
                *(
                    ctypes.c_void_p(0 if t is None else t.data_ptr())
                    for t in (scales, slopes, unit)
                ),
            ),
        )


@functools.cache
def available(device: int) -> bool:
    """Whether CUDA device number `device` can run these kernels."""
    if torch.version.cuda is None or torch.cuda.get_device_capability(device) != (9, 0):
        return False
    try:
        nvrtc()
    except CompileError:
        return False
    return True


def supported(w: Tensor, *activations: Tensor) -> bool:
    """Whether these functions take w (out, K) and activations: else the caller does it plainly.

    All bfloat16 on one Hopper GPU, contiguous, aligned to 16 bytes; K a multiple of 64, `out` of
    128 (of SwiGLU's 2 I, so I of 64; of w_t's I); fewer than 2²⁶ rows.
    """
    if not (w.is_cuda and w.dtype == torch.bfloat16 and available(w.device.index)):
        return False
    if w.shape[1] % 64 or w.shape[0] % 128 or not w.shape[1]:
        return False
    return all(
        t.device == w.device
        and t.dtype == w.dtype
        and t.is_contiguous()
        and t.data_ptr() % 16 == 0
        and t.numel() < t.shape[-1] * 2**26
        for t in (w, *activations)
    )


def linear(x: Tensor, w: Tensor) -> Tensor:
    """`F.linear(x, w)`: x (..., K), w (N, K) → (..., N)."""
    out = x.new_empty(*x.shape[:-1], w.shape[0])
    launch(plan(PLAIN, w.shape[1], w.shape[0]), x, w, None, out)
    return out


def linear_rotary(
    x: Tensor, w: Tensor, cos: Tensor | None, sin: Tensor | None, scale: float
) -> Tensor:
    """[q | k | v] = `F.linear(x, w)` with q and k rotated, and q multiplied by `scale`.

    x (B, L, K), w (3 D, K) → (B, L, 3 D), rounded once. Heads of 64 features, of which i and i + 32
    are turned together: cos, sin (L, 64) float32 with equal halves (see `RotaryTable`), or None.
    """
    out = x.new_empty(*x.shape[:-1], w.shape[0])
    p = plan(ROTARY, w.shape[1], w.shape[0], False, x.shape[-2])
    launch(p, x, w, None, out, eps=scale, scales=cos, slopes=sin)
    return out


def linear_swiglu(x: Tensor, w: Tensor, save: bool) -> tuple[Tensor, Tensor | None]:
    """`gate, up = F.linear(x, w).chunk(2, -1); h = F.silu(gate) * up`, and gate | up if `save`.

    x (..., K), w (2 I, K) → h (..., I), gate | up (..., 2 I) or None. Gate and up are rounded.
    (Shazeer 2020.)
    """
    return _swiglu(x, w, save, None)


def linear_swiglu_squares(x: Tensor, w: Tensor, save: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """`linear_swiglu`, and sums of (gate ⊙ up)² in parts: (T, M) float32, to be added over T."""
    tiles = w.shape[0] // 2 // plan(SWIGLU, w.shape[1], w.shape[0] // 2, True).out
    parts = x.new_empty(tiles, x.numel() // x.shape[-1], dtype=torch.float32)
    return *_swiglu(x, w, save, parts), parts


def _swiglu(x: Tensor, w: Tensor, save: bool, parts: Tensor | None) -> tuple[Tensor, Tensor | None]:
    inner = w.shape[0] // 2
    h = x.new_empty(*x.shape[:-1], inner)
    wide = x.new_empty(*x.shape[:-1], 2 * inner) if save else None
    p = plan(SWIGLU_SAVE if save else SWIGLU, w.shape[1], inner, parts is not None)
    launch(p, x, w, None, h, wide, parts)
    return h, wide


def linear_dswiglu(
    dy: Tensor,
    w_t: Tensor,
    gate_up: Tensor,
    scales: Tensor | None = None,
    slopes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The backward of `y = F.linear(h, w)` and of SwiGLU: d gate | d up, and h once more.

    dy (..., N), w_t (I, N) = wᵀ contiguous, gate_up (..., 2 I) → (..., 2 I), (..., I). With
    dh = dy w: d up = dh silu(gate), d gate = dh up silu'(gate), h = silu(gate) up.

    dh is rounded on the way. With `scales` and `slopes`, (...) float32, the same of h' = scale h,
    where the scale depends on gate ⊙ up so that d (gate ⊙ up) gets slope · gate ⊙ up besides.
    """
    wide = gate_up.new_empty(gate_up.shape)
    h = dy.new_empty(*dy.shape[:-1], w_t.shape[0])
    p = plan(DSWIGLU, w_t.shape[1], w_t.shape[0], scales is not None)
    launch(p, dy, w_t, gate_up, h, wide, scales=scales, slopes=slopes)
    return wide, h


def linear_residual(x: Tensor, w: Tensor, r: Tensor, out: Tensor | None = None) -> Tensor:
    """`r + F.linear(x, w)`: x (..., K), w (N, K), r (..., N) → (..., N), into `out`, maybe r."""
    out = r.new_empty(r.shape) if out is None else out
    launch(plan(RESIDUAL, w.shape[1], w.shape[0]), x, w, r, out)
    return out


def linear_residual_norm(
    x: Tensor, w: Tensor, r: Tensor, eps: float, save: bool, scales: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """`v = r + F.linear(x, w); v / sqrt(mean(v², -1) + eps)`, and the row's factor if `save`.

    `scales` (...) float32, if given, multiply the rows of the product.

    x (..., K), w (N, K) with N one of NORM_WIDTHS, r (..., N) → (..., N), and (...) float32 or
    None: 1 / sqrt(mean(v²) + eps), by which the backward gets from d y to d v. v is rounded once
    its squares are summed up.
    """
    out = r.new_empty(r.shape)
    factors = r.new_empty(r.shape[:-1], dtype=torch.float32) if save else None
    p = plan(NORM, w.shape[1], w.shape[0], scales is not None)
    launch(p, x, w, r, out, None, factors, eps, scales)
    return out, factors
