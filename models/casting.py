"""Weights in the activations' dtype: cast once for a whole pass of the model, not at every use.

A recursion uses the same weights dozens of times. What is made here are copies without gradient:
each layer computes with them and gives the gradient to the weight itself, in the weight's dtype,
so sums over the uses lose no precision.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from models import fp8
from models.block import Block
from models.layers import Linear


@contextmanager
def cast_once(levels: nn.Module, like: Tensor, eight: bool = False) -> Iterator[None]:
    """Inside, the layers of `levels` find their weights as activations like `like` need them.

    `like` (B, L, D) has the shape, dtype and device of all states. Nothing happens where the
    weights have its dtype already. `eight`: in 8 bits, too, where a layer may multiply in these.
    """
    linears = [m for m in levels.modules() if isinstance(m, Linear) and m.casts(like)]
    blocks = [m for m in levels.modules() if isinstance(m, Block)] if linears else []
    try:
        if linears:
            weights = [m.weight.detach() for m in linears]
            halves = [torch.empty_like(w, dtype=like.dtype) for w in weights]
            with torch.no_grad():
                torch._foreach_copy_(halves, weights)  # one launch
            for linear, half in zip(linears, halves, strict=True):
                linear.half = half
                if eight and linear.fp8:
                    linear.eight = fp8.quantize(linear.weight.detach())
            for block in blocks:
                block.prepare(like)
        yield
    finally:
        for linear in linears:
            linear.half = linear.eight = None
        for block in blocks:
            block.release()
