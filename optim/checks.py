"""What is wrong with a parameter, a gradient, an option or a saved state, in one sentence each."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DEVICES = ("cpu", "cuda", "mps", "xpu")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def warn(message: str) -> None:
    """A UserWarning that points at the first line outside of this package and torch.optim."""
    homes = {Path(__file__).parent, Path(torch.optim.__file__).parent}
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and Path(frame.f_code.co_filename).parent in homes:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)


def check_param(item: Tensor | tuple[str, Tensor]) -> None:
    """Raise ValueError or TypeError for what cannot be optimized."""
    name, p = item if isinstance(item, tuple) else ("", item)
    if not isinstance(p, Tensor):
        raise TypeError(f"an optimizer takes tensors, got {type(p).__name__}")
    what = f"parameter {name!r}" if name else f"the parameter of shape {tuple(p.shape)}"
    if not p.is_leaf:
        raise ValueError(f"{what} is not a leaf tensor: pass the tensor it was computed from")
    if p.layout != torch.strided:
        raise ValueError(f"{what} has layout {p.layout}: parameters must be dense")
    if p.is_complex():
        raise ValueError(f"{what} is complex, which no optimizer here supports")
    if p.device.type not in DEVICES:
        raise ValueError(f"{what} is on {p.device}: supported are {', '.join(DEVICES)}")
    if p.dtype not in DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise ValueError(f"{what} is {p.dtype}: supported are {names}")


def check_lr(lr: float | Tensor) -> None:
    """Raise ValueError unless `lr` is a finite number of at least 0 or a one-element tensor."""
    if isinstance(lr, Tensor):
        if lr.numel() != 1 or not lr.is_floating_point():
            raise ValueError("lr as a tensor must hold one floating-point number")
    elif not 0.0 <= lr < math.inf:
        raise ValueError(f"lr must be a finite number of at least 0, got {lr}")


def check_options(group: Mapping[str, Any]) -> None:
    """Raise ValueError for hyperparameters out of range."""
    check_lr(group["lr"])
    for name in ("weight_decay", "eps"):
        if not 0.0 <= group.get(name, 0.0) < math.inf:
            raise ValueError(f"{name} must be a finite number of at least 0, got {group[name]}")
    if group.get("half", "nearest") not in ("nearest", "stochastic", "master"):
        raise ValueError(f"half must be 'nearest', 'stochastic' or 'master', got {group['half']!r}")
    betas = group.get("betas", (0.0, 0.0))
    if len(betas) != 2:
        raise ValueError(f"betas must be two numbers, got {betas}")
    for i, beta in enumerate(betas):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"betas[{i}] must be in [0, 1), got {beta}")


def check_grad(p: Tensor, optimizer: str, *, sparse_ok: bool) -> None:
    """Raise RuntimeError unless `p.grad` is a gradient of `p` that the optimizer can apply."""
    grad = p.grad
    what = f"the gradient of the parameter of shape {tuple(p.shape)}"
    if grad.layout != torch.strided and not (sparse_ok and grad.is_sparse):
        raise RuntimeError(
            f"{what} is sparse, which {optimizer} does not support: use SparseSignSGD or a dense "
            "embedding"
        )
    if grad.shape != p.shape:
        raise RuntimeError(f"{what} has shape {tuple(grad.shape)}")
    if grad.dtype != p.dtype:
        raise RuntimeError(f"{what} is {grad.dtype}, the parameter {p.dtype}")
    if grad.device != p.device:
        raise RuntimeError(f"{what} is on {grad.device}, the parameter on {p.device}")


def match_state(
    index: int, saved: Mapping[str, Tensor], own: Mapping[str, Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """Pairs (own tensor, saved value) of one parameter's state; ValueError if they do not fit."""
    if saved.keys() != own.keys():
        raise ValueError(
            f"the saved state of parameter {index} has {sorted(saved)}, expected {sorted(own)}"
        )
    for name, value in own.items():
        theirs = torch.as_tensor(saved[name])
        if theirs.shape != value.shape:
            raise ValueError(
                f"the saved {name} of parameter {index} has shape {tuple(theirs.shape)}, expected "
                f"{tuple(value.shape)}"
            )
    return [(value, torch.as_tensor(saved[name])) for name, value in own.items()]


def match_groups(
    saved: Mapping[str, Any],
    own_groups: Sequence[Mapping[str, Any]],
    own_state: Mapping[Tensor, Mapping[str, Tensor]],
    check: Callable[[dict[str, Any]], None],
) -> list[tuple[Tensor, Tensor]]:
    """Pairs (own tensor, saved value) of a whole optimizer; ValueError if they do not fit."""
    groups = saved["param_groups"]
    sizes, own = [len(g["params"]) for g in groups], [len(g["params"]) for g in own_groups]
    if sizes != own:
        raise ValueError(f"the saved optimizer has groups of {sizes} parameters, this one of {own}")
    copies: list[tuple[Tensor, Tensor]] = []
    for theirs, ours in zip(groups, own_groups, strict=True):
        check({**ours, **theirs})
        for i, p in zip(theirs["params"], ours["params"], strict=True):
            copies += match_state(i, saved["state"].get(i, {}), own_state[p])
    return copies
