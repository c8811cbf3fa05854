"""Self-attention over 129 to 1,024 tokens on Hopper GPUs: attention_long.cu and its backward.

Heads of 64 features, every token sees all, bfloat16. Deterministic; fit for CUDA graphs. Scores are
exponents of 2: what makes qkv rotates q and k and multiplies q by `SCALE`, once and not for every
pair. `attend` takes what `models.kernels.long_attention.supported` says.
"""

from __future__ import annotations

import ctypes
import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from models.kernels.hopper.attention import HEAD_DIM, wgmma
from models.kernels.hopper.compile import cubin, sources
from models.kernels.hopper.driver import Kernel, load, tensor_map

MAX_TOKENS = 1024
SCALE = math.log2(math.e) / math.sqrt(HEAD_DIM)  # of q
_ROWS, _QUERIES, _STAGES, _MARKS = 128, 192, 3, 12  # as in attention_long.cu


@dataclass(frozen=True)
class Plan:
    """The compile-time choices of attention_long.cu."""

    length: int
    bold: bool
    save: bool

    threads = 512

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory: keys, two rounds of queries, values, barriers, alignment."""
        tiles = -(-self.length // _ROWS)
        barriers = 8 * (2 * tiles + 4 + 2 * _STAGES)
        return 128 * (_ROWS * (tiles + _STAGES) + 2 * _QUERIES) + barriers + 1024

    def source(self) -> tuple[str, dict[str, int]]:
        """The kernel's text and its macros."""
        last = -(-((self.length - 1) % _ROWS + 1) // 8) * 8
        texts = [wgmma("scores", n, "ss", across=False) for n in sorted({_ROWS, last})]
        texts.append(wgmma("mix", HEAD_DIM, "rs", across=True))
        texts.append(sources("attention_common.cu", "attention_long.cu"))
        macros = {"LENGTH": self.length, "BOLD": int(self.bold), "SAVE": int(self.save)}
        return "\n".join(texts), macros


def padded(length: int) -> int:
    """Tokens of a head in `sums`: as many as any block or tile asks for."""
    return -(-length // 64) * 64 + 192


@dataclass(frozen=True)
class BackwardPlan:
    """The compile-time choices of attention_long_backward.cu."""

    length: int
    rope: bool
    keys: bool
    wgs: int
    columns: int
    stages: int = 4

    @property
    def rows(self) -> int:
        """Rows of a block."""
        return 64 * self.wgs

    @property
    def threads(self) -> int:
        """Threads: the multiplying warpgroups and the loading one."""
        return 128 * (self.wgs + 1)

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory: rows of two blocks, stages, barriers, alignment."""
        stage = self.columns * (256 + (8 if self.keys else 0))
        return 4 * 128 * self.rows + self.stages * (stage + 16) + 32 + 1024

    def source(self) -> tuple[str, dict[str, int]]:
        """The kernel's text and its macros."""
        last = -(-((self.length - 1) % self.columns + 1) // 8) * 8
        sizes = sorted({self.columns, last})
        texts = [wgmma("scores", n, "ss", across=False) for n in sizes]
        texts.append(wgmma("mix", HEAD_DIM, "rs", across=True))
        texts.append(sources("attention_common.cu", "attention_long_backward.cu"))
        macros = {
            "LENGTH": self.length,
            "PADDED": padded(self.length),
            "ROPE": int(self.rope),
            "KEYS": int(self.keys),
            "WGS": self.wgs,
            "COLS": self.columns,
            "STAGES": self.stages,
        }
        return "\n".join(texts), macros


def backward_plans(length: int, rope: bool) -> tuple[BackwardPlan, BackwardPlan]:
    """The two passes of the backward, in their order: the queries' one leaves sums for the keys'.

    As many tokens as a warpgroup has registers for.
    """
    return (
        BackwardPlan(length, rope, keys=False, wgs=3, columns=80),
        BackwardPlan(length, rope, keys=True, wgs=2, columns=96),
    )


@functools.cache
def _kernel(p: Plan, device: int) -> Kernel:
    return load(cubin(*p.source()), "attend_long", p.threads, p.shared_bytes, 1)


@functools.cache
def _backward_kernel(p: BackwardPlan, device: int) -> Kernel:
    return load(cubin(*p.source()), "attend_long_backward", p.threads, p.shared_bytes, 1)


def attend(qkv: Tensor, heads: int, save: bool) -> tuple[Tensor, Tensor]:
    """out (B, L, D) and, if `save`, lse (B, heads, L) float32, both of base 2.

    softmax₂(q kᵀ) v of qkv (B, L, 3 D), contiguous: q and k rotated, q times `SCALE`. A second
    launch does the heads again whose sums the first one, without a maximum, found out of bounds.
    """
    batch, length, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    out = qkv.new_empty(batch, length, width)
    lse = qkv.new_empty((batch, heads, length) if save else (1,), dtype=torch.float32)
    marks = qkv.new_empty(batch * heads * _MARKS, dtype=torch.int32)
    for bold in (True, False) if out.numel() else ():
        with torch.cuda.device(qkv.device):
            _kernel(Plan(length, bold, save), qkv.device.index).launch(
                batch * heads,
                torch.cuda.current_stream().cuda_stream,
                (
                    tensor_map(qkv, (HEAD_DIM, _QUERIES, 1)),
                    tensor_map(qkv, (HEAD_DIM, _ROWS, 1)),
                    *(ctypes.c_void_p(t.data_ptr()) for t in (out, lse, marks)),
                    ctypes.c_uint32(heads),
                    ctypes.c_uint32(batch * heads),
                ),
            )
    return out, lse


def attend_backward(
    qkv: Tensor, cos: Tensor | None, sin: Tensor | None, out: Tensor, lse: Tensor, dout: Tensor,
    heads: int,
) -> Tensor:  # fmt: skip
    """The gradient (B, L, 3 D) of [q | k | v] before rotation and scaling; all contiguous.

    qkv, out and lse are those of `attend`; cos, sin (L, 64) what q and k were turned by.
    """
    batch, length = qkv.shape[:2]
    dqkv = torch.empty_like(qkv)
    # of every two queries lse (infinite past the end) twice, and Σ out ⊙ dout twice
    sums = lse.new_empty(batch * heads, padded(length) // 2, 4)
    for plan in backward_plans(length, cos is not None):
        items = batch * heads * -(-length // plan.rows)
        if not items:
            continue
        own, tile = (qkv, qkv), (qkv, dout)
        if not plan.keys:
            own, tile = tile, own
        with torch.cuda.device(qkv.device):
            _backward_kernel(plan, qkv.device.index).launch(
                items,
                torch.cuda.current_stream().cuda_stream,
                (
                    *(tensor_map(t, (HEAD_DIM, plan.rows, 1)) for t in own),
                    *(tensor_map(t, (HEAD_DIM, plan.columns, 1)) for t in tile),
                    *(
                        ctypes.c_void_p(0 if t is None else t.data_ptr())
                        for t in (cos, sin, out, dout, lse, sums, dqkv)
                    ),
                    ctypes.c_uint32(heads),
                    ctypes.c_uint32(items),
                ),
            )
    return dqkv
