"""Fused forward and backward operations, each beside the plain PyTorch that it equals.

A layer asks `usable("NAME", x)` and takes its plain path where the answer is no: on devices
without a kernel, in float32 and float64, where Triton is missing, or where the operation was
switched off. Importing this package imports neither torch nor Triton.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

OPERATIONS = ("attention", "mixer", "residual", "rows", "swiglu")
_TRITON = find_spec("triton") is not None
_off: set[str] = set()
_forced = False


def available() -> bool:
    """Whether Triton can be imported here."""
    return _TRITON


def usable(name: str, x: Tensor) -> bool:
    """Whether the fused operation `name` takes activations like `x` here."""
    import torch

    if name in _off or not available():
        return False
    if _forced:
        return True
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)


def switch_off(*names: str) -> None:
    """Leave these operations (of OPERATIONS; none given: all) to their plain paths from now on."""
    unknown = set(names) - set(OPERATIONS)
    if unknown:
        raise ValueError(f"unknown fused operation {min(unknown)!r}; there are {OPERATIONS}")
    _off.update(names or OPERATIONS)


def switch_on(*names: str) -> None:
    """Undo `switch_off`."""
    _off.difference_update(names or OPERATIONS)


@contextmanager
def forced() -> Iterator[None]:
    """Use the kernels wherever a layer asks, for tests under Triton's interpreter."""
    global _forced
    before, _forced = _forced, True
    try:
        yield
    finally:
        _forced = before
