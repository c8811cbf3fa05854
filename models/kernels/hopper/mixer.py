"""The token mixer of TRM-MLP on Hopper GPUs, in bfloat16, forward and backward.

    y = x + W_down(silu(W_gate x) ⊙ W_up x);  out = y / rms(y)      along the tokens of each feature

One kernel each way, see mixer.cu and mixer_backward.cu: x is read where it lies, the inner
activations stay on chip in the forward pass and are formed anew in the backward. Deterministic, and
can be captured in a CUDA graph. (TRM: arXiv:2510.04871, the Sudoku variant.)
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from models.kernels.hopper.compile import cubin, wgmma_registers
from models.kernels.hopper.driver import Kernel, load, tensor_map

MAX_TOKENS = 128
_SHARED_BYTES = 227 * 1024 - 1536  # of one thread block, less alignment and barriers


@dataclass(frozen=True)
class Plan:
    """The compile-time choices of mixer.cu and mixer_backward.cu; their comments explain them."""

    backward: bool
    J: int
    NT: int
    KT: int
    WGS: int
    CH: int = 32
    STAGES: int = 0
    CLUSTER: int = 2
    TURNS: int = 0
    SAVE: int = 0

    @property
    def stage_bytes(self) -> int:
        """Shared memory of a stage of weights."""
        blocks = -(-self.KT // 64)
        if self.backward:
            return blocks * 96 * 128
        return blocks * 128 * 128 + self.NT * 128

    @property
    def tile_bytes(self) -> int:
        """Shared memory of a warpgroup: what it reads and what it stages for writing."""
        if self.backward:
            return 3 * self.KT * 128 + 24 * 1024
        return (self.KT + self.NT) * 128

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a thread block."""
        return self.STAGES * self.stage_bytes + self.WGS * self.tile_bytes + 1536


def _staged(p: Plan, most: int) -> Plan:
    room = _SHARED_BYTES - p.WGS * p.tile_bytes
    return replace(p, STAGES=min(most, room // p.stage_bytes))


@functools.cache
def forward_plan(inner: int, length: int, save: bool) -> Plan:
    """The plan of the forward pass: a rule, no timing."""
    nt, kt = -(-length // 8) * 8, -(-length // 16) * 16
    # Three warpgroups have 160 registers a thread each, enough for up to 112 tokens.
    p = Plan(False, inner, nt, kt, WGS=3 if kt <= 112 else 2, SAVE=int(save))
    return _staged(p, 4)


@functools.cache
def backward_plan(inner: int, length: int) -> Plan:
    """The same of the backward."""
    nt, kt = -(-length // 8) * 8, -(-length // 16) * 16
    return _staged(Plan(True, inner, nt, kt, WGS=2), 6)


@functools.cache
def _kernel(p: Plan, device: int) -> Kernel:
    name = "mixer_backward" if p.backward else "mixer"
    parts = [
        wgmma_registers("wgmma_inner", 2 * p.CH),
        wgmma_registers("wgmma_half", p.CH),
        wgmma_registers("wgmma_tokens", p.NT, transposed=p.backward),
        *(Path(__file__).with_name(f).read_text() for f in ("primitives.cu", f"{name}.cu")),
    ]
    macros = {k: v for k, v in asdict(p).items() if k != "backward"}
    return load(cubin("".join(parts), macros), name, 128 * (p.WGS + 1), p.shared_bytes, p.CLUSTER)


def _launch(p: Plan, x: Tensor, *arguments: object) -> None:
    with torch.cuda.device(x.device):
        tiles = x.shape[0] * x.shape[2] // 64
        stream = torch.cuda.current_stream().cuda_stream
        clusters = -(-tiles // (p.WGS * p.CLUSTER))
        _kernel(p, x.device.index).launch(clusters, stream, arguments)


def takes(x: Tensor, inner: int) -> bool:
    """Whether these functions take x (B, L, D) and J = `inner` on a Hopper GPU.

    bfloat16, 1 ≤ L ≤ MAX_TOKENS, D and J multiples of 64, B · D below 2³¹.
    """
    batch, length, width = x.shape
    right = x.is_cuda and x.dtype == torch.bfloat16 and width % 64 == inner % 64 == 0
    return right and 1 <= length <= MAX_TOKENS and inner > 0 and 0 < batch * width < 2**31


def _aligned(x: Tensor) -> Tensor:
    """x, contiguous and at an address that tensor copies take."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _three(weight: Tensor, gate_up: bool) -> Tensor:
    """(2 J, P) as (2, J, P), or (rows, columns) as (1, rows, columns)."""
    return weight.view(1 + gate_up, -1, weight.shape[1])


def pad(weight: Tensor) -> Tensor:
    """Tokens, the last dimension, padded to a multiple of 8: rows of 16 bytes."""
    return F.pad(weight, (0, -weight.shape[-1] % 8))


def forward(
    x: Tensor, gate_up: Tensor, down: Tensor, eps: float, save: bool, p: Plan | None = None
) -> tuple[Tensor, Tensor]:
    """out (B, L, D) and, if `save`, inv (B, D) float32 = 1 / rms of y (else any).

    x (B, L, D), gate_up (2 J, L up to a multiple of 8) from `pad`, down (L, J), all bfloat16.
    """
    batch, length, width = x.shape
    p = p or forward_plan(down.shape[1], length, save)
    x, gate_up, down = _aligned(x), _aligned(gate_up), _aligned(down)
    out = torch.empty_like(x)
    inv = x.new_empty((batch, width) if save else (1,), dtype=torch.float32)
    _launch(
        p,
        x,
        tensor_map(x, (64, p.KT, 1)),
        tensor_map(_three(gate_up, True), (64, p.CH, 2)),
        tensor_map(_three(down, False), (64, p.NT, 1)),
        tensor_map(out, (64, p.NT, 1)),
        ctypes.c_void_p(inv.data_ptr()),
        *(ctypes.c_uint32(n) for n in (batch, width)),
        *(ctypes.c_float(v) for v in (1 / length, eps)),
    )
    return out, inv


def backward(
    x: Tensor,
    out: Tensor,
    inv: Tensor,
    dout: Tensor,
    gate_up: Tensor,
    down: Tensor,
    p: Plan | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx and dy (B, L, D), d gate | d up (B, D, 2 J) and h (B, D, J), all bfloat16.

    Arguments as in `forward`, with its results `out` and `inv`. The gradients of the weights are
    Σ over puzzles and features of (d gate | d up) xᵀ and of dy hᵀ.
    """
    batch, length, width = x.shape
    inner = down.shape[1]
    p = p or backward_plan(inner, length)
    x, out, dout, gate_up = _aligned(x), _aligned(out), _aligned(dout), _aligned(gate_up)
    down_t = pad(down.t()).contiguous()
    dx, dy = torch.empty_like(x), torch.empty_like(x)
    dgu, h = x.new_empty(batch, width, 2 * inner), x.new_empty(batch, width, inner)
    _launch(
        p,
        x,
        *(tensor_map(t, (64, p.KT, 1)) for t in (x, out, dout)),
        tensor_map(_three(gate_up, True), (64, 32, 2)),
        tensor_map(_three(down_t, False), (64, 32, 1)),
        *(tensor_map(t, (64, p.NT, 1)) for t in (dx, dy)),
        *(tensor_map(t.view(batch * width, -1), (32, 16)) for t in (dgu, h)),
        ctypes.c_void_p(inv.data_ptr()),
        *(ctypes.c_uint32(n) for n in (batch, width)),
        ctypes.c_float(1 / length),
    )
    return dx, dy, dgu, h
