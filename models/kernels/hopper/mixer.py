"""The token mixer of TRM-MLP on Hopper GPUs, in bfloat16, forward and backward.

    y = x + W_down(silu(W_gate x) ⊙ W_up x);  out = y / rms(y)      along the tokens of each feature

The forward pass is one kernel (mixer.cu): x is read where it lies, the inner activations stay on
chip. The backward forms them anew, once for dx (mixer_backward.cu) and once for the gradients of
the weights (mixer_weights.cu): cheaper than writing them and reading them back. Deterministic, and
can be captured in a CUDA graph. (TRM: arXiv:2510.04871, the Sudoku variant.)
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from models.kernels.hopper.compile import cubin, sources, wgmma_named
from models.kernels.hopper.driver import Kernel, load, tensor_map

MAX_TOKENS = 128
_WEIGHTS_MAX_TOKENS = 112  # of mixer_weights.cu, for its registers
_SHARED_BYTES = 227 * 1024  # of one thread block
_REST_BYTES = 1536  # alignment and barriers


@dataclass(frozen=True)
class Plan:
    """The compile-time choices of a kernel; the comments in its source explain them."""

    J: int
    NT: int
    KT: int
    STAGES: int = 0
    WGS: int = 2
    CLUSTER: int = 2
    NORMED: int = 0

    @property
    def blocks(self) -> int:
        """Blocks of 64 tokens."""
        return -(-self.KT // 64)

    def fill(self, most: int) -> Plan:
        """The plan with as many stages as there is room for, `most` at most."""
        room = _SHARED_BYTES - _REST_BYTES - self.fixed_bytes
        return replace(self, STAGES=min(most, room // self.stage_bytes))

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a thread block."""
        return self.STAGES * self.stage_bytes + self.fixed_bytes + _REST_BYTES


@dataclass(frozen=True)
class ForwardPlan(Plan):
    """Of mixer.cu."""

    CH: int = 32
    TURNS: int = 0
    SAVE: int = 0

    files = ("primitives.cu", "mixer.cu")

    @property
    def stage_bytes(self) -> int:
        """Shared memory of a stage of weights."""
        return self.blocks * 128 * 128 + self.NT * 128

    @property
    def fixed_bytes(self) -> int:
        """Shared memory of the rest: what each warpgroup reads, and stages for writing."""
        return self.WGS * (self.KT + self.NT) * 128

    def functions(self) -> str:
        """The matrix instructions that the source takes for granted."""
        inner = wgmma_named("wgmma_inner", 2 * self.CH, True)
        return inner + wgmma_named("wgmma_tokens", self.NT, True)


@dataclass(frozen=True)
class BackwardPlan(Plan):
    """Of mixer_backward.cu."""

    INNER: int = 0

    files = ("primitives.cu", "mixer_inner.cu", "mixer_backward.cu")

    @property
    def stage_bytes(self) -> int:
        """Shared memory of a stage of weights."""
        return self.blocks * 96 * 128

    @property
    def fixed_bytes(self) -> int:
        """Shared memory of the rest: what each warpgroup reads, and stages for writing."""
        return self.WGS * (3 * self.KT * 128 + (24 * 1024 if self.INNER else self.NT * 128))

    def functions(self) -> str:
        """The matrix instructions that the source takes for granted."""
        inner = wgmma_named("wgmma_inner", 64, True) + wgmma_named("wgmma_half", 32, True)
        return inner + wgmma_named("wgmma_tokens", self.NT, True, turned_b=True)


@dataclass(frozen=True)
class WeightsPlan(Plan):
    """Of mixer_weights.cu."""

    PART: int = 0
    SLICES: int = 0

    files = ("primitives.cu", "mixer_inner.cu", "mixer_weights.cu")

    @property
    def stage_bytes(self) -> int:
        """Shared memory of a pair of tiles."""
        return 4 * self.KT * 128

    @property
    def fixed_bytes(self) -> int:
        """Shared memory of the rest: weights, and the inner gradients of a pair."""
        return 2 * self.blocks * 96 * 128 + 3 * 128 * 128

    def functions(self) -> str:
        """The matrix instructions that the source takes for granted."""
        inner = wgmma_named("wgmma_inner", 64, True) + wgmma_named("wgmma_half", 32, True)
        tokens = wgmma_named("wgmma_tokens", self.NT, False, turned_a=True)
        return inner + tokens + wgmma_named("wgmma_part", self.PART, False, turned_a=True)


def _tokens(length: int) -> tuple[int, int]:
    return -(-length // 8) * 8, -(-length // 16) * 16


@functools.cache
def forward_plan(inner: int, length: int, save: bool, normed: bool = False) -> ForwardPlan:
    """The plan of the forward pass: a rule, no timing."""
    nt, kt = _tokens(length)
    # Three warpgroups have 160 registers a thread each, enough for up to 112 tokens.
    wgs = 3 if kt <= 112 else 2
    return ForwardPlan(inner, nt, kt, WGS=wgs, SAVE=int(save), NORMED=int(normed)).fill(4)


@functools.cache
def backward_plan(inner: int, length: int, keep: bool, normed: bool = False) -> BackwardPlan:
    """The same of the backward; `keep` as in `backward`."""
    return BackwardPlan(inner, *_tokens(length), INNER=int(keep), NORMED=int(normed)).fill(6)


@functools.cache
def weights_plan(inner: int, length: int, normed: bool = False) -> WeightsPlan:
    """The same of the weights' gradients."""
    nt, kt = _tokens(length)
    slices = inner // 64
    part = -(-nt // 16) * 8
    cluster = 2 - slices % 2
    p = WeightsPlan(inner, nt, kt, CLUSTER=cluster, PART=part, SLICES=slices, NORMED=int(normed))
    return p.fill(3)


@functools.cache
def _kernel(p: Plan, device: int) -> Kernel:
    name = p.files[-1].removesuffix(".cu")
    code = cubin(p.functions() + sources(*p.files), asdict(p))
    return load(code, name, 128 * (p.WGS + 1), p.shared_bytes, p.CLUSTER)


def _launch(p: Plan, x: Tensor, clusters: int, *arguments: object) -> None:
    stream = torch.cuda.current_stream(x.device).cuda_stream
    with torch.cuda.device(x.device):
        _kernel(p, x.device.index).launch(clusters, stream, arguments)


def _clusters(p: Plan, x: Tensor) -> int:
    """As many as have a tile, of 64 features of a puzzle, for each of their warpgroups."""
    return -(-x.shape[0] * x.shape[2] // (64 * p.WGS * p.CLUSTER))


def takes(x: Tensor, inner: int) -> bool:
    """Whether these functions take x (B, L, D) and J = `inner` on a Hopper GPU.

    bfloat16, 1 ≤ L ≤ MAX_TOKENS, D and J multiples of 64, B · D below 2³¹.
    """
    batch, length, width = x.shape
    right = x.is_cuda and x.dtype == torch.bfloat16 and width % 64 == inner % 64 == 0
    return right and 1 <= length <= MAX_TOKENS and inner > 0 and 0 < batch * width < 2**31


def sums_weights(length: int, inner: int) -> bool:
    """Whether `weight_gradients` takes these: else `backward` must keep the inner gradients."""
    return length <= _WEIGHTS_MAX_TOKENS and inner <= 4096


def _aligned(x: Tensor) -> Tensor:
    """x, contiguous and at an address that tensor copies take."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def pad(weight: Tensor) -> Tensor:
    """Tokens, the last dimension, padded to a multiple of 8: rows of 16 bytes."""
    return F.pad(weight, (0, -weight.shape[-1] % 8))


def _weight_maps(gate_up: Tensor, down: Tensor, rows: int, box: int) -> tuple[ctypes.Array, ...]:
    """Maps of gate_up (2 J, P), `rows` of gate and of up at a time, and of down in `box` rows."""
    gate_and_up = gate_up.view(2, -1, gate_up.shape[1])
    return tensor_map(gate_and_up, (64, rows, 2)), tensor_map(down[None], (64, box, 1))


def _numbers(*values: float) -> tuple[object, ...]:
    return tuple((ctypes.c_uint32 if isinstance(v, int) else ctypes.c_float)(v) for v in values)


def _pointer(t: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(t.data_ptr())


def forward(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    eps: float,
    save: bool,
    normed: bool = False,
    p: ForwardPlan | None = None,
) -> tuple[Tensor, Tensor]:
    """out (B, L, D) and, if `save`, inv (B, D) float32 = 1 / rms of y (else any).

    x (B, L, D), gate_up (2 J, L up to a multiple of 8) from `pad`, down (L, J), all bfloat16.
    `normed`: sigmoid(gate) ⊙ RMSNorm(gate ⊙ up) in place of silu(gate) ⊙ up; inv is (2, B, D) then,
    the second 1 / rms of gate ⊙ up.
    """
    batch, length, width = x.shape
    p = p or forward_plan(down.shape[1], length, save, normed)
    x, gate_up, down = _aligned(x), _aligned(gate_up), _aligned(down)
    out = torch.empty_like(x)
    rows = (2, batch, width) if normed else (batch, width)
    inv = x.new_empty(rows if save else (1,), dtype=torch.float32)
    _launch(
        p,
        x,
        _clusters(p, x),
        tensor_map(x, (64, p.KT, 1)),
        *_weight_maps(gate_up, down, p.CH, p.NT),
        tensor_map(out, (64, p.NT, 1)),
        _pointer(inv),
        *_numbers(batch, width, 1.0 / length, float(eps), 1.0 / down.shape[1]),
    )
    return out, inv


def backward(
    x: Tensor,
    out: Tensor,
    inv: Tensor,
    dout: Tensor,
    gate_up: Tensor,
    down_t: Tensor,
    keep: bool,
    p: BackwardPlan | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx and dy (B, L, D) and, if `keep`, d gate | d up (B, D, 2 J) and h (B, D, J); all bfloat16.

    Last, for `weight_gradients` where `forward` was `normed`, what it calls slopes.

    Arguments as in `forward`, with its results `out` and `inv`; down_t (J, L up to a multiple
    of 8) = `pad(down.t())`. The gradients of the weights are Σ over puzzles and features of
    (d gate | d up) xᵀ and of dy hᵀ.
    """
    batch, length, width = x.shape
    inner = down_t.shape[0]
    normed = inv.ndim == 3
    p = p or backward_plan(inner, length, keep, normed)
    x, out, dout = _aligned(x), _aligned(out), _aligned(dout)
    gate_up, down_t = _aligned(gate_up), _aligned(down_t)
    dx, dy = torch.empty_like(x), torch.empty_like(x)
    rows = (batch, width) if keep else (1, 1)
    dgu, h = x.new_empty(*rows, 2 * inner), x.new_empty(*rows, inner)
    slopes = inv.new_empty((batch, width) if normed else (1,))
    _launch(
        p,
        x,
        _clusters(p, x),
        *(tensor_map(t, (64, p.KT, 1)) for t in (x, out, dout)),
        *_weight_maps(gate_up, down_t, 32, 32),
        *(tensor_map(t, (64, p.NT, 1)) for t in (dx, dy)),
        *(tensor_map(t.view(-1, t.shape[2]), (32, 16)) for t in (dgu, h)),
        _pointer(inv),
        *_numbers(batch, width, 1.0 / length),
        _pointer(slopes),
        *_numbers(1.0 / inner),
    )
    return dx, dy, dgu, h, slopes


def weight_gradients(
    x: Tensor,
    dy: Tensor,
    gate_up: Tensor,
    down_t: Tensor,
    scales: Tensor | None = None,
    slopes: Tensor | None = None,
    p: WeightsPlan | None = None,
) -> tuple[Tensor, Tensor]:
    """d gate_up (2 J, L) and d down (L, J) in float32; arguments as in `backward`.

    `scales` and `slopes` (B, D), where `forward` was `normed`: its inv[1], and by how much of
    itself gate ⊙ up has a greater gradient than by the scale alone.
    """
    batch, length, width = x.shape
    inner = down_t.shape[0]
    p = p or weights_plan(inner, length, scales is not None)
    x, dy, gate_up, down_t = _aligned(x), _aligned(dy), _aligned(gate_up), _aligned(down_t)
    resident = _kernel(p, x.device.index).resident * p.CLUSTER
    shares = max(1, min(resident // p.SLICES, batch * width // 64))
    parts = x.new_empty(shares, 3 * inner, p.NT, dtype=torch.float32)
    _launch(
        p,
        x,
        shares * p.SLICES // p.CLUSTER,
        *(tensor_map(t, (64, p.KT, 1)) for t in (x, dy)),
        *_weight_maps(gate_up, down_t, 32, 32),
        _pointer(parts),
        *_numbers(batch, width),
        *(ctypes.c_void_p(0 if t is None else t.data_ptr()) for t in (scales, slopes)),
    )
    total = parts.sum(0)[:, :length]
    return total[: 2 * inner].contiguous(), total[2 * inner :].t().contiguous()
