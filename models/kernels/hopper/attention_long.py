"""Self-attention over up to 1,024 tokens on Hopper GPUs, RoPE inside: attention_long.cu.

Heads of 64 features, every token sees all, bfloat16. Deterministic; fit for CUDA graphs.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from models.kernels import hopper
from models.kernels.hopper.attention import HEAD_DIM, wgmma
from models.kernels.hopper.compile import cubin
from models.kernels.hopper.driver import Kernel, load, tile_map

MAX_TOKENS = 1024
_ROWS, _QUERIES, _STAGES = 128, 192, 3  # as in attention_long.cu


@dataclass(frozen=True)
class Plan:
    """The compile-time choices of attention_long.cu."""

    length: int
    rope: bool
    save: bool

    threads = 512

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory: keys, two rounds of queries, values, barriers, alignment."""
        tiles = -(-self.length // _ROWS)
        barriers = 8 * (3 * tiles + 4 + 2 * _STAGES)
        return 128 * (_ROWS * (tiles + _STAGES) + 2 * _QUERIES) + barriers + 1024

    def source(self) -> tuple[str, dict[str, int]]:
        """The kernel's text and its macros."""
        last = -(-((self.length - 1) % _ROWS + 1) // 8) * 8
        texts = [wgmma("scores", n, "ss", across=False) for n in sorted({_ROWS, last})]
        texts.append(wgmma("mix", HEAD_DIM, "rs", across=True))
        for name in ("common", "long"):
            texts.append(Path(__file__).with_name(f"attention_{name}.cu").read_text())
        macros = {"LENGTH": self.length, "ROPE": int(self.rope), "SAVE": int(self.save)}
        return "\n".join(texts), macros


@functools.cache
def _kernel(p: Plan, device: int) -> Kernel:
    return load(cubin(*p.source()), "attend_long", p.threads, p.shared_bytes, 1)


def supported(qkv: Tensor, cos: Tensor, heads: int, rope: bool) -> bool:
    """Whether `attend` takes qkv (B, L, 3 D), contiguous: bfloat16, heads of 64, Hopper."""
    if not (qkv.is_cuda and qkv.dtype == torch.bfloat16 and hopper.available(qkv.device.index)):
        return False
    table = not rope or (cos.dtype == torch.float32 and cos.data_ptr() % 16 == 0)
    fits = qkv.shape[1] <= MAX_TOKENS and qkv.shape[2] == 3 * heads * HEAD_DIM
    return fits and table and qkv.data_ptr() % 16 == 0 and qkv.shape[0] * heads < 2**31


def attend(
    qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, rope: bool, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """out (B, L, D) and, if `save`, lse (B, heads, L) float32 and rotated q | k (B, L, 2 D).

    softmax(q kᵀ / 8) v of qkv (B, L, 3 D), with q and k turned by cos, sin (L, 64) if `rope`.
    """
    batch, length, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    out = qkv.new_empty(batch, length, width)
    lse = qkv.new_empty((batch, heads, length) if save else (1,), dtype=torch.float32)
    turned = qkv.new_empty((batch, length, 2 * width) if save else (1,))
    if out.numel():
        with torch.cuda.device(qkv.device):
            _kernel(Plan(length, rope, save), qkv.device.index).launch(
                batch * heads,
                torch.cuda.current_stream().cuda_stream,
                (
                    tile_map(qkv, _QUERIES),
                    tile_map(qkv, _ROWS),
                    *(ctypes.c_void_p(t.data_ptr()) for t in (cos, sin, out, lse, turned)),
                    ctypes.c_uint32(heads),
                    ctypes.c_uint32(batch * heads),
                ),
            )
    return out, lse, turned
