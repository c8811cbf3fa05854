"""Counter-based random numbers: a pure function of (seed, step, row), with nothing to restore."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_NORMAL = 0x6E6F726D616C  # tells the normal numbers of a seed from its uniform ones
_MASK = 0xFFFFFFFF


def _mix(x: Tensor) -> Tensor:
    """32-bit finalizer "lowbias32" (C. Wellons, hash-prospector) on int64 holding 32 bits."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _MASK
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def counter_uniform(seed: int, step: Tensor, rows: Tensor, streams: int) -> Tensor:
    """Uniform float32 in [0, 1), shape (streams, len(rows)).

    `step` is a 0-dim int64 tensor (so that a captured graph can advance it), `rows` int64 (B,)
    global row numbers: the same numbers on any number of ranks.
    """
    key = torch.full_like(step, seed & _MASK)
    key = _mix(key ^ _mix(torch.full_like(step, (seed >> 32) & _MASK) + 0x9E3779B9))
    key = _mix(key ^ _mix((step & _MASK) + 0x3C6EF372))
    stream = torch.arange(streams, device=rows.device, dtype=torch.int64).unsqueeze(1)
    bits = _mix(_mix(_mix((rows & _MASK) ^ key) + stream) ^ key)
    return (bits >> 8).to(torch.float32) * 2.0**-24  # 24 bits: exact in float32


def counter_normal(seed: int, step: Tensor, rows: Tensor, count: int) -> Tensor:
    """Standard normal float32, shape (len(rows), count), by Box and Muller; see `counter_uniform`.

    Global row number × `count` should stay below 2³², after which numbers come again.
    """
    places = rows.unsqueeze(1) * count + torch.arange(count, device=rows.device)
    u, v = counter_uniform(seed ^ _NORMAL, step, places.reshape(-1), streams=2)
    normal = (-2 * torch.log1p(-u)).sqrt() * torch.cos(2 * math.pi * v)
    return normal.view(len(rows), count)
