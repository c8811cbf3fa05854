"""Matrix products with 8-bit factors (e4m3) where a schedule has no gradient.

`arch.fp8=true` marks the linear maps of the blocks; while a phase without gradient runs
(`eight_bits`, in `models.recursion`), in training as in evaluation, they multiply in 8 bits. On
Hopper a whole block does so by fused kernels (`models.kernels.eight`); elsewhere by torch's scaled
products, with scales per tensor, taken on the device, that fill the format's range. Source:
Micikevicius et al. 2022, "FP8 Formats for Deep Learning", arXiv:2209.05433.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from models.errors import ModelError

if TYPE_CHECKING:
    from models.recursion import Schedule

E4M3 = torch.float8_e4m3fn
_MULTIPLE = 16  # of both dimensions of a matrix that the hardware takes
_active = False


@contextmanager
def eight_bits(on: bool) -> Iterator[None]:
    """Inside, products that may be made in 8 bits are, if `on`. Only without gradient."""
    global _active
    before, _active = _active, on
    try:
        yield
    finally:
        _active = before


def active() -> bool:
    """Whether products that may be made in 8 bits are, now."""
    return _active


def check_schedule(schedule: Schedule) -> None:
    """Raise ModelError if all of `schedule` carries gradient: there is nothing for 8 bits."""
    if all(phase.grad for phase in schedule):
        raise ModelError(
            "fp8=true is for phases without gradient, but all cycles of this model carry it; "
            "use fp8=false"
        )


def check_device(device: torch.device, dtype: torch.dtype) -> None:
    """Raise ModelError unless `device` multiplies in 8 bits and accumulates for `dtype`."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        raise ModelError(
            f"fp8=true needs a CUDA device of compute capability 8.9 or more (Ada, Hopper), but "
            f"this is {device.type}; use fp8=false"
        )
    if dtype not in (torch.bfloat16, torch.float16):
        raise ModelError(
            f"fp8=true needs forward_dtype=bfloat16 or float16, not "
            f"{str(dtype).removeprefix('torch.')}"
        )


def fits(weight: Tensor) -> bool:
    """Whether a weight (out, in) has dimensions that 8-bit products take."""
    return weight.shape[0] % _MULTIPLE == 0 and weight.shape[1] % _MULTIPLE == 0


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """x / unit in e4m3, and the unit (0-dim float32); zeros keep the unit 1e-12."""
    largest = x.abs().amax().to(torch.float32)
    unit = (largest / torch.finfo(E4M3).max).clamp(min=1e-12)
    return (x.to(torch.float32) / unit).to(E4M3), unit


def linear(x: Tensor, weight: Tensor, unit: Tensor) -> Tensor:
    """x Wᵀ in 8 bits, without gradient: x (..., in), W = weight · unit (out, in), see `quantize`.

    Returns (..., out) in the dtype of x.
    """
    x8, x_unit = quantize(x.detach().reshape(-1, x.shape[-1]).contiguous())
    out = torch._scaled_mm(
        x8, weight.t(), scale_a=x_unit, scale_b=unit, out_dtype=x.dtype, use_fast_accum=True
    )
    return out.view(*x.shape[:-1], weight.shape[0])
