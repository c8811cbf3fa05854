"""What the fused operations share: the sigmoid, the precision of products, sizes, the card."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import library

from models.kernels import hopper


class Operation:
    """A function of tensors and numbers that torch's compiler takes as one opaque operation.

    What torch's `custom_op` makes of a function that changes no argument; but the first call of
    those imports the compiler, which takes seconds, whether anything is compiled or not.
    """

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        schema = library.infer_schema(function, mutates_args=())
        library.define(name, schema, tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(name, "default", function)
        self.name, self.__doc__ = name, function.__doc__
        namespace, _, own = name.partition("::")
        self.overload = getattr(getattr(torch.ops, namespace), own).default

    def __call__(self, *args: Any) -> Any:
        """What the function returns."""
        return self.overload(*args)

    def register_fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A decorator: `function` gives the shapes of the results."""
        library.register_fake(self.name, function)
        return function


def operation(name: str) -> Callable[[Callable[..., Any]], Operation]:
    """A decorator: the function as the `Operation` `name`, such as "loopwright::swiglu_mlp"."""
    return lambda function: Operation(name, function)


@triton.jit
def sigmoid(x, FAST: tl.constexpr):  # noqa: ANN001, ANN201
    """1 / (1 + exp(-x)); FAST: ½ + ½ tanh(x/2) by the card's own tanh, off by 3e-4 at most.

    One special-function instruction in place of two, which bound these kernels; a rounding to
    bfloat16 is off by 2e-3 relative.
    """
    if FAST:
        t = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [x * 0.5], dtype=tl.float32, is_pure=True, pack=1
        )
        return t * 0.5 + 0.5
    return tl.sigmoid(x)


def fast(x: torch.Tensor) -> bool:
    """Whether `sigmoid` may be the fast one: its error drowns in bfloat16's rounding."""
    return x.dtype == torch.bfloat16 and x.is_cuda


def precision(dtype: torch.dtype) -> str:
    """How Triton multiplies: float32 in full, half precision on the tensor cores."""
    return "ieee" if dtype == torch.float32 else "tf32"


def next_power(n: int, least: int = 16) -> int:
    """The least power of two that is at least n (and `least`)."""
    return max(least, 1 << (n - 1).bit_length())


def on_hopper(device: int) -> bool:
    """Whether a CUDA device can run `models.kernels.hopper`."""
    return hopper.available(device)


# `torch.compiler.assume_constant_result`, without importing the compiler for it
on_hopper._dynamo_marked_constant = True  # type: ignore[attr-defined]
